"""The class-incremental benchmark's bookkeeping: what is asked, and what follows from it."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nestlearn.evals.streams import Stream, Task

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
LABELS = ("red", "green", "blue")
PLAN = {"data": "toy", "tasks": None, "tuning_tasks": 2, "train": 1, "test": 2, "tuned": True,
        "model_path": "nowhere", "context": None}  # fmt: skip


class LastTaskOnly:
    """Knows the labels of the last task it learned, and says the first label else."""

    def __init__(self) -> None:
        self.known: set[str] = set()
        self.asked: list[int] = []

    def learn(self, examples: Any) -> None:
        self.known = {e.completion.strip() for e in examples}

    def classify(self, prompts: list[str], completions: list[str]) -> list[int]:
        self.asked.append(len(prompts))
        names = [c.strip() for c in completions]
        wanted = [next(label for label in LABELS if f"{label} thing" in p) for p in prompts]
        return [names.index(w) if w in self.known else (names.index(w) + 1) % len(names)
                for w in wanted]  # fmt: skip


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script, on a toy stream with a classifier that forgets all but its last task."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(sys, "argv", ["benchmarks/class_incremental.py"])
    import class_incremental

    from nestlearn.cli import pretrained
    from nestlearn.evals import streams

    def toy(path: Path, **_: Any) -> Stream:
        pairs = {label: [(f"{label} thing {i}", label) for i in range(3)] for label in LABELS}
        tasks = (Task((k,), tuple(found[:1]), tuple(found[1:])) for k, found in pairs.items())
        return Stream(tuple(tasks), "Colour")

    model = SimpleNamespace(dtype="none")
    monkeypatch.setattr(class_incremental, "data_root", Path)
    monkeypatch.setattr(pretrained, "load_pretrained", lambda path: (model, None))
    monkeypatch.setitem(streams.STREAMS, "toy", toy)
    monkeypatch.setattr(class_incremental, "make", lambda *_: made)
    made = LastTaskOnly()
    class_incremental.made = made
    return class_incremental


@pytest.mark.parametrize(
    ("ask", "asked", "matrix"),
    [
        ("end", [6], [[0, 0, 1]]),
        ("own", [2, 2, 6], [[1], [None, 1], [0, 0, 1]]),
        ("all", [2, 4, 6], [[1], [0, 1], [0, 0, 1]]),
    ],
)
def test_what_is_asked(benchmark: Any, ask: str, asked: list[int], matrix: list[Any]) -> None:
    row = benchmark.run_cell("naive", {"lr": 1.0}, 0, PLAN | {"ask": ask}, False)
    assert benchmark.made.asked == asked
    assert row["accuracy_matrix"] == matrix
    assert row["average_accuracy"] == pytest.approx(1 / 3)
    assert ("forgetting_since_learned" in row) == (ask != "end")
    assert ("forgetting_from_best" in row) == (ask == "all")
    if ask != "end":
        assert row["forgetting_since_learned"] == 1 == -row["backward_transfer"]


def test_what_learns_all_at_once_is_asked_at_the_end(benchmark: Any) -> None:
    row = benchmark.run_cell("joint", {"lr": 1.0}, 0, PLAN | {"ask": "all"}, False)
    assert benchmark.made.asked == [6]
    assert row["average_accuracy"] == 1 and "backward_transfer" not in row
