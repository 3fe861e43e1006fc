"""Experiments small enough to run within a test, in this process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from nestlearn.evals.harness.experiment import Experiment, Request, Scale, Table
from nestlearn.evals.harness.results import Results
from nestlearn.evals.harness.systems import Size
from nestlearn.evals.harness.task import Batch, Task
from nestlearn.evals.harness.trained import Plan, Trained


class Squares(Experiment):
    """Squares of numbers, then their sum; ``broken`` fails."""

    name = "squares"
    item = "Table | 0"
    title = "squares <of> numbers"
    question = "What are squares & their sum?"
    scales = ("tiny", "small")
    broken: set[int] = set()
    measured: list[str] = []

    def settings(self) -> dict[str, Any]:
        return {"numbers": 3}

    def due(self, results: Results, request: Request) -> dict[str, dict[str, Any]]:
        chosen = [int(n) for n in request.pick("tasks", ("1", "2", "3"))]
        cells = {f"square {n}": {"n": n} for n in chosen if results.get(f"square {n}") is None}
        if cells:
            return cells
        values = [results.get(f"square {n}") or {} for n in chosen]
        if results.get("sum") is None and all("error" not in v for v in values):
            return {"sum": {"n": None, "values": [v["value"] for v in values]}}
        return {}

    def measure(self, cell: dict[str, Any]) -> dict[str, Any]:
        n = cell["n"]
        type(self).measured.append(f"{n}")
        if n in self.broken:
            raise ArithmeticError(f"{n} is broken")
        value = sum(cell["values"]) if n is None else n * n
        return {"value": value}

    def tables(self, results: Results) -> list[Table]:
        rows = tuple((r["cell"], r.get("value"), "a|b <i>") for r in results.record["rows"])
        return [Table("squares & more", ("cell | name", "value", "<b>"), rows, "a note & more")]

    def plot(self, results: Results, path: Path) -> bool:
        path.write_bytes(b"png")
        return True


class Taught(Squares):
    """An experiment that needs a pre-trained model: its cells say which they got."""

    name = "taught"
    needs_model = True
    models: list[Any] = []

    def measure(self, cell: dict[str, Any]) -> dict[str, Any]:
        type(self).models.append(cell.get("model"))
        return {**super().measure(cell), "model": cell["model"]}


class Copy(Task):
    """Says each token again; ``hard``: a random one."""

    vocab_size = 4
    length = 6
    splits = ("test",)

    def __init__(self, name: str) -> None:
        self.name = name

    def draw(self, split: str, count: int, generator: torch.Generator) -> Batch:
        inputs = torch.randint(0, 4, (count, 6), generator=generator)
        targets = torch.randint(0, 4, (count, 6), generator=generator)
        return Batch.of(inputs, inputs if self.name == "easy" else targets)


class Copying(Trained):
    """Two tasks, of which one can be learned."""

    name = "copying"
    item = "Table 0"
    title = "copying"
    question = "Is a token said again?"
    plans: Mapping[Scale, Plan] = {
        "tiny": Plan(Size(16, 1, 2), 40, 8, (1e-4, 3e-2), (0.0,), seeds=2,
                     systems=("transformer",), examples=40),
    }  # fmt: skip
    scales = ("tiny",)

    def tasks(self) -> dict[str, Task]:
        return {name: Copy(name) for name in ("easy", "hard")}

    def tables(self, results: Results) -> list[Table]:
        return []


def here(
    work: Callable[..., dict[str, Any]],
    cells: Mapping[str, tuple[Any, ...]],
    jobs: int,
    done: Callable[[str, dict[str, Any]], None],
    threads: int = 1,
) -> None:
    """`nestlearn.evals.harness.parallel.in_parallel` in this process, where what a test replaced is
    replaced."""
    for name, cell in cells.items():
        try:
            row = work(*cell)
        except Exception as error:
            row = {"error": f"{type(error).__name__}: {error}"}
        done(name, row)
