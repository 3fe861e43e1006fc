"""What reproduces a table or figure: cells that are measured one by one, tables, a plot."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from nestlearn.evals.harness.kept import Kept
from nestlearn.evals.harness.results import Results

Scale = Literal["tiny", "small", "paper"]
SCALES: tuple[Scale, ...] = ("tiny", "small", "paper")
"""Minutes on two CPU cores; under an hour on one GPU; the paper's sizes."""


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of a report.

    Attributes:
        title: what it shows.
        columns: their heads.
        rows: numbers, text, or None for what was not measured.
        note: what a reader must know, below it.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Request:
    """Which part of an experiment is to be measured; None: all that its scale has.

    Attributes:
        systems, tasks: their names.
        seeds: how many.
        device: where models run.
        model: folder, .gguf file or hub id of the pre-trained model, for experiments that need one.
        fresh: earlier results are dropped, those that an experiment keeps elsewhere, too.
    """

    systems: tuple[str, ...] | None = None
    tasks: tuple[str, ...] | None = None
    seeds: int | None = None
    device: str = "cpu"
    model: str | None = None
    fresh: bool = False

    def pick(self, kind: str, known: Sequence[str]) -> tuple[str, ...]:
        """The ``"systems"`` or ``"tasks"`` asked for, among ``known``.

        Raises:
            ValueError: one that is not known.
        """
        asked: tuple[str, ...] | None = getattr(self, kind)
        if asked is None:
            return tuple(known)
        wrong = [name for name in asked if name not in known]
        if wrong:
            raise ValueError(f"--{kind}: {', '.join(wrong)} not among {', '.join(known)}")
        return asked


class Experiment(ABC):
    """One table or figure.

    Attributes:
        name: on the command line.
        item: of the paper, "Table 5".
        title: what it is about.
        question: what it answers, one sentence.
        scales: those it has.
        needs_model: it teaches or asks a pre-trained model; its cells have the entry ``"model"``.
        kept: what the cell that is being measured had reached before it was cut off.
        shares_cells: under ``torchrun`` all processes measure a cell together.
    """

    name: str
    item: str
    title: str
    question: str
    scales: tuple[Scale, ...] = SCALES
    needs_model: bool = False
    shares_cells: bool = False

    def __init__(self, scale: Scale = "tiny") -> None:
        self.kept = Kept()
        if scale not in self.scales:
            raise ValueError(
                f"{self.name} has no scale {scale!r}; choose one of {', '.join(self.scales)}"
            )
        self.scale = scale

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What decides what a cell means; results of other settings are not continued."""

    @abstractmethod
    def due(self, results: Results, request: Request) -> dict[str, dict[str, Any]]:
        """Cells that can be measured now, by name: those of a first round (say, of tuning), then
        those that depend on them. Empty when all that is asked for is there."""

    @abstractmethod
    def measure(self, cell: dict[str, Any]) -> dict[str, Any]:
        """The row of a cell, in a process of its own."""

    @abstractmethod
    def tables(self, results: Results) -> list[Table]:
        """What was measured so far, beside the paper's numbers."""

    def stale(self, row: dict[str, Any]) -> bool:
        """Whether a row is of what the experiment no longer measures."""
        return False

    def summary(self, row: dict[str, Any]) -> str:
        """A row in a few words, for the log."""
        return f"{row['seconds']:.0f} s"

    def plot(self, results: Results, path: Path) -> bool:
        """Draw what was measured into a file; False if there is nothing to draw."""
        return False


def beside(ours: float | None, paper: float | str | None, digits: int = 1) -> str | None:
    """Our number with the paper's in brackets.

    Example:
        >>> beside(99.31, 100.0), beside(None, 51.2)
        ('99.3 (100.0)', '(51.2)')
    """
    words = [] if ours is None else [f"{ours:.{digits}f}"]
    if paper is not None:
        words.append(f"({paper})" if isinstance(paper, str) else f"({paper:.{digits}f})")
    return " ".join(words) or None
