"""What goes from a system to its heads, and from points to a system."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nestlearn.evals.harness.heads import AutoEncoder, PointReader, sinusoids
from nestlearn.evals.harness.systems import Size, build
from nestlearn.optim.groups import level_groups


@torch.no_grad()
def test_everything_told_comes_through_the_last_hidden_state() -> None:
    coder = AutoEncoder(build("gated_deltanet", Size(16, 1, 2), 8, 6), 6).eval()
    tokens = torch.randint(8, (3, 6), generator=torch.Generator().manual_seed(0))
    hidden = coder.system(tokens, use_cache=False).last_hidden_state
    before = coder(tokens).logits

    def disturb(module: Any, args: Any, output: Any) -> Any:
        output.last_hidden_state[:, :-1] = torch.randn(3, 5, 16)
        return output

    # The same last state behind other states gives the same answers.
    coder.system.register_forward_hook(disturb)
    told = coder(tokens).logits
    assert torch.equal(told, before)
    x = hidden[:, -1]
    for t in range(6):
        assert torch.allclose(told[:, t], coder.decoder(x + coder.positions[t]), atol=1e-6)
    assert not torch.allclose(told[:, 0], told[:, 1])


def test_all_parameters_but_the_unused_head_learn() -> None:
    for system in ("transformer", "hope"):
        coder = AutoEncoder(build(system, Size(16, 1, 2), 8, 6), 6)
        coder(torch.randint(8, (3, 6))).logits.square().sum().backward()
        assert all(p.grad is not None for p in coder.parameters())
        names = {id(p): n for n, p in coder.named_parameters()}
        decayed = [names[id(p)] for g in level_groups(coder, 1e-3) if g["weight_decay"]
                   for p in g["params"]]  # fmt: skip
        assert all(f"decoder.{i}.weight" in decayed for i in (1, 4, 7))
        assert not any("embed" in n or "decoder.0" in n or "bias" in n for n in decayed)


def test_points_take_the_place_of_embeddings() -> None:
    reader = PointReader(build("hope", Size(16, 1, 2), 3, 8), 5).eval()
    points = torch.randn(2, 8, 5)
    with torch.no_grad():
        whole = reader(points).logits
        assert torch.equal(
            whole, reader.system(inputs_embeds=reader.projection(points), use_cache=False).logits
        )
        shorter = reader(points[:, :4]).logits
    assert torch.allclose(whole[:, :4], shorter, atol=1e-5)  # causal


def test_sinusoids_tell_positions_apart() -> None:
    table = sinusoids(256, 64)
    distance = torch.cdist(table, table) + 10 * torch.eye(256)
    assert table.shape == (256, 64) and distance.min() > 0.3
    with pytest.raises(ValueError, match="even"):
        sinusoids(4, 7)
