"""MAD's tasks, each against a plain reading of its sequences token by token."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import pytest
import torch

from nestlearn.evals.harness.experiment import Request
from nestlearn.evals.harness.results import Results
from nestlearn.evals.harness.systems import Size
from nestlearn.evals.harness.task import IGNORE
from nestlearn.evals.harness.trained import Plan
from nestlearn.evals.mad import (
    MAD,
    PAPER,
    TASKS,
    Compression,
    FuzzyRecall,
    InContextRecall,
    Memorisation,
    SelectiveCopying,
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", TASKS)
def test_the_published_parameters_hold_and_draws_repeat(name: str) -> None:
    task = TASKS[name]
    sizes = {
        "compression": (16, 32),
        "in_context_recall": (16, 127),
        "fuzzy_recall": (16, 128),
        "noisy_recall": (32, 127),
        "selective_copying": (16, 256),
        "memorisation": (256, 32),
    }
    assert (task.vocab_size, task.length) == sizes[name]
    for split in ("train", "test"):
        batch, again = task.draw(split, 20, seeded()), task.draw(split, 20, seeded())
        assert batch.inputs.shape == batch.targets.shape == (20, task.length)
        assert batch.inputs.min() >= 0 and batch.inputs.max() < task.vocab_size
        assert batch.targets.max() < task.vocab_size and batch.asked.any(1).all()
        assert torch.equal(batch.inputs, again.inputs) and torch.equal(batch.targets, again.targets)
        assert not torch.equal(batch.inputs, task.draw(split, 20, seeded(1)).inputs)


@pytest.mark.parametrize("task", [InContextRecall(), InContextRecall(noise=16, share=0.2)])
def test_recall_asks_for_the_values_of_keys_that_came_before(task: InContextRecall) -> None:
    batch = task.draw("test", 50, seeded())
    noise = places = 0
    for row, targets in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True):
        known: dict[int, int] = {}
        for i in range(0, len(row) - 1, 2):
            key, value = row[i], row[i + 1]
            assert targets[i + 1] == IGNORE
            places += 1
            if key >= 16:
                noise += 1
                assert value >= 16 and targets[i] == IGNORE
                continue
            assert key < 8 <= value < 16
            assert known.setdefault(key, value) == value
            assert targets[i] == (value if key in list(row[:i:2]) else IGNORE)
        assert targets[-1] == known[row[-1]]  # the last pair came before
    assert noise / places == pytest.approx(task.share, abs=0.03)


def test_recall_trains_on_every_next_token() -> None:
    batch = InContextRecall().draw("train", 5, seeded())
    assert batch.asked.all() and torch.equal(batch.inputs[:, 1:], batch.targets[:, :-1])


def test_maps_of_recall_differ_between_sequences() -> None:
    batch = InContextRecall().draw("test", 400, seeded())
    of_first_key = [
        next((row[i + 1] for i in range(0, 126, 2) if row[i] == 0), None)
        for row in batch.inputs.tolist()
    ]
    counts = Counter(v for v in of_first_key if v is not None)
    assert set(counts) == set(range(8, 16)) and max(counts.values()) < 90


@pytest.mark.parametrize("split", ["train", "test"])
def test_fuzzy_recall_reads_as_keys_and_values(split: str) -> None:
    task = FuzzyRecall()
    batch = task.draw(split, 100, seeded())
    sizes: Counter[int] = Counter()
    for row, targets, asked in zip(*map(torch.Tensor.tolist, (
        batch.inputs, batch.targets, batch.asked)), strict=True):  # fmt: skip
        start = next(i for i, token in enumerate(row) if token != task.padding)
        tokens = [*row[start:], targets[-1]]
        assert task.padding not in tokens and start <= 6 + 3
        kinds = "".join("k" if t in task.keys else "v" for t in tokens)
        known: dict[tuple[int, ...], tuple[int, ...]] = {}
        right = [False] * len(tokens)
        i = 0
        while i < len(tokens):
            j = kinds.index("v", i)
            end = kinds.find("k", j)
            end = len(tokens) if end < 0 else end
            key, value = tuple(tokens[i:j]), tuple(tokens[j:end])
            assert len(set(key)) == len(key) <= 3 and len(set(value)) == len(value) <= 3
            right[j:end] = [key in known] * len(value)
            assert known.setdefault(key, value) == value
            sizes[len(key)] += 1
            i = end
        assert right[-1]  # the last pair came before
        if split == "test":
            assert asked[start:] == right[1:] and not any(asked[: max(0, start - 1)])
            assert [t for t, a in zip(targets, asked, strict=True) if a] == [
                t for t, r in zip(tokens, right, strict=True) if r
            ]
        else:
            assert all(asked) and targets[:-1] == row[1:]
    assert set(sizes) == ({1, 2, 3} if split == "train" else {3})


def test_copying_asks_for_the_tokens_in_their_order() -> None:
    batch = SelectiveCopying().draw("test", 200, seeded())
    gaps = Counter()
    for row, targets in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True):
        assert row.count(15) == 1 and row.index(15) == 239
        tokens = [t for t in row if t < 14]
        assert len(tokens) == 16 and row[240:] == [14] * 16
        assert targets == [IGNORE] * 240 + tokens
        places = [i for i, t in enumerate(row) if t < 14]
        for j, (a, b) in enumerate(zip([-1, *places], places, strict=False)):
            gaps[j] += b - a - 1
    # Every blank is in front of each of the sixteen tokens equally often.
    assert all(n / (200 * 223) == pytest.approx(1 / 16, abs=0.006) for n in gaps.values())


def test_compression_asks_for_its_own_input() -> None:
    batch = Compression().draw("test", 50, seeded())
    assert torch.equal(batch.inputs, batch.targets) and batch.asked.all()
    assert (batch.inputs[:, -1] == 15).all() and set(batch.inputs[:, :-1].unique().tolist()) == {
        *range(15)
    }


def test_memorisation_has_one_map_everywhere() -> None:
    seen: dict[int, int] = {}
    for split, seed in (("train", 0), ("test", 1)):
        batch = Memorisation().draw(split, 100, seeded(seed))
        assert (batch.inputs[:, 1::2] == 255).all() and (batch.targets[:, ::2] == IGNORE).all()
        pairs = zip(
            batch.inputs[:, ::2].flatten().tolist(),
            batch.targets[:, 1::2].flatten().tolist(),
            strict=True,
        )
        for key, value in pairs:
            assert key < 127 <= value < 255 and seen.setdefault(key, value) == value
    assert len(seen) == len(set(seen.values())) == 127


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> MAD:
    plan = Plan(Size(16, 1, 2), 2, 4, (1e-2,), (0.0,), 1, ("transformer", "hope"), 6, pool=8)
    monkeypatch.setattr(MAD, "plans", {"tiny": plan})
    monkeypatch.setattr(MAD, "memorised", {"pool": 4, "batch": 4, "steps": 2})
    return MAD("tiny")


def test_every_cell_is_measured_and_shown(toy: MAD, tmp_path: Any) -> None:
    results = Results(tmp_path / "r.json", toy.question, toy.settings())
    request = Request()
    cells = toy.due(results, request)
    assert len(cells) == 2 * len(TASKS)
    for name, cell in cells.items():
        results.add(name, {**toy.measure(cell), "seconds": 0.0})
    assert toy.due(results, request) == {}
    table = toy.tables(results)[0]
    assert [row[0] for row in table.rows] == ["Transformer", "Hope"]
    assert all(cell is not None for row in table.rows for cell in row)
    assert (
        "(51.2)" in table.rows[1][1]
        and f"({sum(filter(None, PAPER['hope'])) / 5:.1f})" in (table.rows[1][-1])
    )
    assert toy.plot(results, tmp_path / "p.png") and (tmp_path / "p.png").stat().st_size > 1_000
    assert "test" in toy.summary(results.record["rows"][0])


def test_memorisation_has_its_own_examples_and_steps() -> None:
    paper = MAD("paper")
    assert paper.plan_of("compression") == paper.plan
    own = paper.plan_of("memorisation")
    assert own == dataclasses.replace(paper.plan, pool=256, steps=400)
    assert MAD("tiny").plan_of("memorisation").batch == 128
    # Both are 200 passes.
    assert own.steps * own.batch == 200 * 256
    assert paper.plan.steps * paper.plan.batch == 200 * 12_800


def test_a_system_learns_the_fixed_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Plan(Size(32, 1, 2), 1, 64, (1e-2,), (0.0,), 1, ("transformer",), 16)
    monkeypatch.setattr(MAD, "plans", {"tiny": plan})
    monkeypatch.setattr(MAD, "memorised", {"pool": 48, "batch": 64, "steps": 120})
    cell = {"task": "memorisation", "system": "transformer", "seed": 0, "device": "cpu"}
    row = MAD("tiny").measure({**cell, "lr": 1e-2, "weight_decay": 0.0, "tuning": False})
    assert row["test"]["tokens"] > 0.9
