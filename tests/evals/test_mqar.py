"""Multi-query associative recall against a plain reading of its sequences."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nestlearn.evals.harness.experiment import Request
from nestlearn.evals.harness.results import Results
from nestlearn.evals.harness.systems import Size
from nestlearn.evals.harness.task import IGNORE
from nestlearn.evals.harness.trained import Plan
from nestlearn.evals.mqar import MQAR, AssociativeRecall


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("pairs", [4, 16, 64])
def test_every_key_comes_again_and_asks_for_its_value(pairs: int) -> None:
    task = AssociativeRecall(vocab_size=256)
    batch = task.draw(str(pairs), 30, seeded())
    assert batch.inputs.shape == (30, max(64, 4 * pairs))
    for row, targets in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True):
        known = dict(zip(row[: 2 * pairs : 2], row[1 : 2 * pairs : 2], strict=True))
        assert len(known) == len(set(known.values())) == pairs
        assert all(1 <= k < 128 <= v < 256 for k, v in known.items())
        asked = {i: t for i, t in enumerate(targets) if t != IGNORE}
        assert all(i >= 2 * pairs and i % 2 == 0 for i in asked)
        assert sorted(row[i] for i in asked) == sorted(known)
        assert all(known[row[i]] == t for i, t in asked.items())


def test_places_of_the_queries_follow_the_power_law() -> None:
    # One pair: the chance of place g is g^(power - 1) over the sum of all.
    task = AssociativeRecall(pairs=(1,), vocab_size=16, shortest=12, power=0.3)
    batch = task.draw("1", 20_000, seeded())
    found = batch.asked.float().mean(0)[2::2]
    expected = torch.arange(1, 6).float().pow(-0.7)
    assert torch.allclose(found, expected / expected.sum(), atol=0.012)


def test_splits() -> None:
    task = AssociativeRecall(pairs=(2, 4), beyond=(8,), vocab_size=32, shortest=8)
    assert task.splits == ("2", "4", "8") and task.length == 32
    lengths = {task.draw("train", 3, seeded(i)).inputs.shape[1] for i in range(20)}
    assert lengths == {8, 16}  # never those beyond
    mixed = task.draw("validation", 10, seeded())
    assert mixed.inputs.shape == (10, 16)
    assert mixed.asked.sum(1).tolist() == [2] * 5 + [4] * 5 and not mixed.asked[:5, 8:].any()


@pytest.mark.parametrize(
    "wrong", [{"vocab_size": 64}, {"power": 0.0}, {"power": 1.5}, {"shortest": 63}]
)
def test_bad_values(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong)).split("_")[0]):
        AssociativeRecall(**{"vocab_size": 512, **wrong})


def test_widths_are_tasks(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    plan = Plan(Size(64, 1, 2), 2, 4, (1e-2,), (0.0,), 1, ("transformer", "hope"), 5)
    monkeypatch.setattr(MQAR, "plans", {"tiny": plan})
    monkeypatch.setattr(MQAR, "heads_of", 16)
    task = AssociativeRecall(pairs=(2, 4), beyond=(8,), vocab_size=32, shortest=8)
    monkeypatch.setattr(MQAR, "tasks", lambda self: {"width 32": task, "width 64": task})
    item = MQAR("tiny")
    assert item.plan_of("width 32").size == Size(32, 1, 2)
    assert item.plan_of("width 64").size == Size(64, 1, 4)
    results = Results(tmp_path / "r.json", item.question, item.settings())
    for name, cell in item.due(results, Request()).items():
        results.add(name, {**item.measure(cell), "seconds": 0.0})
    assert item.due(results, Request()) == {}
    small, large = item.tables(results)
    assert small.columns == ("system", "2 pairs", "4 pairs", "8 pairs")
    assert len(small.rows) == len(large.rows) == 2
    sizes = {r["task"]: r["parameters"] for r in results.rows(system="hope")}
    assert sizes["width 64"] > 3 * sizes["width 32"]
    assert item.plot(results, tmp_path / "p.png")


@pytest.mark.parametrize("scale", ["tiny", "small", "paper"])
def test_plans_of_all_scales(scale: Any) -> None:
    item = MQAR(scale)
    for name, task in item.tasks().items():
        assert item.plan_of(name).size.width == int(name.split()[1])
        assert max(map(int, task.splits)) * 4 == task.length


def test_a_system_learns_it(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Plan(Size(64, 1, 2), 200, 32, (3e-3,), (0.0,), 1, ("gated_deltanet",), 50)
    monkeypatch.setattr(MQAR, "plans", {"tiny": plan})
    task = AssociativeRecall(pairs=(2,), vocab_size=12, shortest=8)
    monkeypatch.setattr(MQAR, "tasks", lambda self: {"width 32": task})
    cell = {"task": "width 32", "system": "gated_deltanet", "seed": 0, "device": "cpu"}
    row = MQAR("tiny").measure({**cell, "lr": 1e-2, "weight_decay": 0.0, "tuning": False})
    assert row["2"]["tokens"] > 0.9
