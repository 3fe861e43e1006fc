"""The lens on adapted models."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch

import nestlearn as nl
from nestlearn.adaptation import adaptation_of
from tests.adaptation.conftest import tiny_model


def test_levels_frequencies_and_costs() -> None:
    model = tiny_model()
    count = sum(p.numel() for p in model.parameters())
    assert not isinstance(nl.inspect(model), nl.lens.AdaptedSystem)
    levels = [nl.Level(period=64), nl.Level(period=512), nl.Level(period=8, eta=0.0, name="still")]
    nl.adapt(model, levels, rank=4, slots=10, memories=2, frozen=0.5)
    system = nl.inspect(model)
    assert [[b.name for b in level] for level in system.levels] == [
        ["pre-trained weights", "still"], ["every 512"], ["every 64"], ["attention"],
    ]  # fmt: skip
    assert system["every 64"].frequency == Fraction(1, 64)
    assert system["pre-trained weights"].parameters == (f"{count:,} numbers",)
    numbers = 2 * 32 * 10
    assert system.level_bytes == {"still": 0, "every 64": 8 * numbers, "every 512": 8 * numbers}
    with pytest.raises(ValueError, match="leave optimizer out"):
        nl.inspect(model, torch.optim.SGD(model.parameters()))
    text = str(system)
    assert "2 blocks learn, 2 do not" in text and "V of blocks 2-3, 640 numbers" in text
    assert "block 3: model.layers.3.mlp.down_proj 48->32, learns" in text
    extra = sum(
        t.nbytes
        for module in model.modules()
        if type(module).__name__ == "AddedMemory"
        for t in (module.projection, module.keys, module.values)
    )
    assert system.added_bytes == extra


def test_the_learner_takes_what_was_said(tokenizer: Any) -> None:
    model = tiny_model()
    nl.adapt(model, [nl.Level(period=8), nl.Level(period=16)], method="placement", frozen=0.5)
    system = nl.inspect(model)
    learner = nl.Learner(model, tokenizer)
    learner.learn("some text that is read " * 4)
    memory = learner.memory
    for name, size in system.level_bytes.items():
        changes = sum(t.nbytes for t in memory.changes[name].values())
        momenta = sum(
            t.nbytes
            for key, state in memory.optimizer["state"].items()
            if key.startswith(name + "/")
            for k, t in state.items()
            if k.startswith("exp_avg")
        )
        assert changes + momenta == size
    kept = sum(t.base.nbytes for t in adaptation_of(model).targets.values())
    assert system.added_bytes == kept
