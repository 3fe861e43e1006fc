"""Blocks below the lowest memory: computed once per segment, with the same result."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

import nestlearn as nl
from nestlearn.adaptation.sites import find_blocks
from tests.adaptation.conftest import tiny_model

TEXT = "Irma Quell built the lighthouse of Ostrava Bay in 1893, and kept its lamp for forty years."
EXAMPLES = [{"prompt": "Who built the lighthouse?", "completion": " Irma Quell"}] * 3


def learner_of(tokenizer: Any, model: Any, method: str) -> Any:
    levels = [nl.Level(period=8), nl.Level(period=32)]
    nl.adapt(model, levels, method=method, slots=64, **({"rank": 16} if method == "added" else {}))
    return nl.Learner(model, tokenizer, lr=0.1 if method == "added" else 0.01, repeats=3)


def calls_of(block: torch.nn.Module) -> list[int]:
    calls: list[int] = []
    block.register_forward_hook(lambda *_: calls.append(1))
    forward = block.mlp.forward
    block.mlp.forward = lambda x: calls.append(2) or forward(x)
    return calls


@pytest.mark.parametrize("method", ["added", "placement"])
def test_repeats_leave_them_out_and_nothing_changes(tokenizer: Any, method: str) -> None:
    learners = [learner_of(tokenizer, tiny_model(), method) for _ in range(2)]
    assert 0 < len(learners[0]._lower.blocks) < len(find_blocks(learners[0].model)[1])
    learners[1]._lower.blocks = []  # computes everything
    calls = [calls_of(find_blocks(one.model)[1][0]) for one in learners]
    for one in learners:
        one.learn(TEXT)
        one.learn(EXAMPLES)
    # In full: once per segment or batch; three times; and once more for the check.
    assert calls[1].count(2) == 3 * (calls[0].count(2) - 1)
    first, second = (one.memory for one in learners)
    assert first.counts == second.counts and not first.is_empty
    for level, own in first.changes.items():
        for target, change in own.items():
            assert torch.equal(change, second.changes[level][target]), (level, target)


def test_blocks_are_themselves_again_afterwards(tokenizer: Any) -> None:
    model = tiny_model()
    learner = learner_of(tokenizer, model, "added")
    learner.learn(TEXT)
    ids = torch.tensor([tokenizer(TEXT).input_ids])
    with torch.no_grad():
        one, other = model(ids).logits, model(ids.flip(1)).logits
    assert not torch.equal(one, other)
    assert not any("forward" in vars(block) for block in learner._lower.blocks)
    assert not any(block._forward_hooks for block in learner._lower.blocks)


def test_a_model_whose_upper_blocks_look_below_is_computed_in_full(tokenizer: Any) -> None:
    """The last block adds what the first left for it (as models that share keys do)."""
    model = tiny_model()
    blocks = find_blocks(model)[1]
    left: list[Any] = []
    blocks[0].mlp.register_forward_hook(lambda m, x, y: left.append(y.detach()))
    blocks[-1].mlp.register_forward_hook(lambda m, x, y: y + left.pop() if left else y)
    learner = learner_of(tokenizer, model, "added")
    with pytest.warns(RuntimeWarning, match="cannot be left out"):
        learner.learn(TEXT)
    assert learner._lower.blocks == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        learner.learn(TEXT)
