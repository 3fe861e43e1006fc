"""The baselines against plain loops."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nestlearn.evals.methods import FineTuning
from tests.adaptation.conftest import tiny_model

TEXTS = ["the first document", "a second one", "and number three"]


def rows() -> list[torch.Tensor]:
    return [torch.tensor([[256, *t.encode()]]) for t in TEXTS]


def test_fine_tuning_is_a_plain_loop(tokenizer: Any) -> None:
    method = FineTuning(tiny_model(), tokenizer, lr=1e-3, repeats=2, clip=1e9)
    for text in TEXTS:
        method.learn(text)
    model = tiny_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0)
    for row in rows():
        for _ in range(2):
            optimizer.zero_grad()
            model(input_ids=row, labels=row).loss.backward()
            optimizer.step()
    for a, b in zip(method.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_small_steps_are_not_lost_in_bfloat16(tokenizer: Any) -> None:
    model = tiny_model(dtype=torch.bfloat16)
    method = FineTuning(model, tokenizer, lr=1e-5)
    before = [c.clone() for c in method.copies]
    for _ in range(3):
        method.learn(TEXTS[0])
    assert all((c - b).abs().max() > 0 for c, b in zip(method.copies, before, strict=True))
    assert all(
        torch.equal(w, c.bfloat16()) for w, c in zip(method.weights, method.copies, strict=True)
    )


def test_lora_trains_only_adapters(tokenizer: Any) -> None:
    pytest.importorskip("peft")
    model = tiny_model()
    base = {n: p.detach().clone() for n, p in model.named_parameters()}
    method = FineTuning(model, tokenizer, lr=1e-2, lora=2)
    method.learn(TEXTS[0])
    state = dict(method.model.named_parameters())
    assert all(
        torch.equal(p, base[n.removeprefix("base_model.model.").replace(".base_layer", "")])
        for n, p in state.items()
        if "lora_" not in n
    )
    assert any(p.abs().sum() > 0 for n, p in state.items() if "lora_B" in n)
    assert len(method.weights) == sum("lora_" in n for n in state)


def test_replay_trains_on_what_was_read(tokenizer: Any, monkeypatch: Any) -> None:
    method = FineTuning(tiny_model(), tokenizer, lr=1e-3, replay=1.0)
    seen: list[list[int]] = []
    plain = method._backward

    def watch(row: torch.Tensor) -> None:
        seen.append(row.tolist()[0])
        plain(row)

    monkeypatch.setattr(method, "_backward", watch)
    for text in TEXTS:
        method.learn(text)
    texts = [r.tolist()[0] for r in rows()]
    assert seen[:3] == [texts[0], texts[1], texts[0]] and seen[3] == texts[2]
    assert seen[4] in texts[:2] and len(seen) == 5


def test_elastic_weights_hold(tokenizer: Any) -> None:
    anchor = torch.randint(256, (4, 12), generator=torch.Generator().manual_seed(0))

    def moved(weight: float) -> float:
        """Fisher-weighted distance from the beginning."""
        method = FineTuning(tiny_model(), tokenizer, lr=1e-3, repeats=6, ewc=weight, anchor=anchor)
        fisher = [f.clone() for f in method._fisher or []]
        begin = [c.clone() for c in method.copies]
        method.learn(TEXTS[0])
        return sum(
            (f * (c - b).square()).sum().item()
            for f, c, b in zip(fisher, method.copies, begin, strict=True)
        )

    assert moved(1e4) < 0.5 * moved(1e-9)


def test_the_penalty_is_the_stated_one(tokenizer: Any) -> None:
    anchor = torch.randint(256, (3, 9), generator=torch.Generator().manual_seed(0))
    model = tiny_model()
    method = FineTuning(model, tokenizer, lr=0.0, ewc=0.5, anchor=anchor, clip=1e9)
    expected = [torch.zeros_like(p) for p in model.parameters()]
    for row in anchor:
        loss = model(input_ids=row[None], labels=row[None]).loss
        for total, g in zip(
            expected, torch.autograd.grad(loss, list(model.parameters())), strict=True
        ):
            total += g.square()
    assert method._fisher is not None
    for fisher, right in zip(method._fisher, expected, strict=True):
        torch.testing.assert_close(fisher, right)
    for copy in method.copies:
        copy += 0.01
    row = rows()[0]
    loss = model(input_ids=row, labels=row).loss
    plain = torch.autograd.grad(loss, list(model.parameters()))
    method._backward(row)
    method._step()
    for copy, g, fisher in zip(method.copies, plain, expected, strict=True):
        torch.testing.assert_close(copy.grad, g + 0.5 * 0.01 * fisher)


def test_settings_are_checked(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="ewc needs anchor"):
        FineTuning(tiny_model(), tokenizer, lr=1e-3, ewc=1.0)
