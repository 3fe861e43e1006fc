"""What a model has learned beside its weights: a value of its own, in levels."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nestlearn.levels.level import Level

Changes = dict[str, dict[str, Tensor]]
"""Level name -> target name -> change, float32, in the target's shape. Where rows are slots it may
have fewer: those behind them are free, and zero."""
WRITTEN = "keys"
"""What holds the keys of added memories, and a readout's completions, among the levels' changes."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where a memory belongs: two memories of one layout can be compared, merged and swapped.

    Attributes:
        base: fingerprint of the base model's weights.
        method: ``"added"``, ``"placement"`` or ``"readout"``, see `nestlearn.adapt`.
        rank: numbers in a key, r; 0 for placement.
        fixed: fingerprint of what they need and never change; empty for placement.
        shapes: target name -> shape.
    """

    base: str
    method: str
    rank: int
    fixed: str
    shapes: dict[str, tuple[int, ...]]

    def in_slots(self, target: str) -> bool:
        """Whether a target's rows are slots that are filled one by one."""
        keys = f".{WRITTEN}"
        return target.endswith(keys) or target + keys in self.shapes

    def difference(self, other: Layout) -> str | None:
        """Why a memory of ``other`` does not fit here; None if it does."""
        if self.base != other.base:
            return "it belongs to another base model (the fingerprints of the weights differ)"
        for field in ("method", "rank"):
            mine, theirs = getattr(self, field), getattr(other, field)
            if mine != theirs:
                return f"it was made with {field}={theirs!r}, here it is {mine!r}"
        if self.shapes != other.shapes:
            return "it was made for other blocks of the model"
        if self.fixed != other.fixed:
            return "its keys are made in another way (another seed or calibration text)"
        return None


@dataclasses.dataclass
class Snapshot:
    """A state to come back to: changes and counts of an earlier moment."""

    label: str
    created: float
    changes: Changes
    counts: dict[str, int]


@dataclasses.dataclass
class Memory:
    """Everything that was learned, apart from the base model.

    The working weight of a target is its base plus the sum of all levels' changes, so memories can
    be added, subtracted and scaled, and what moves from one level to another moves exactly.

    Attributes:
        layout: what it belongs to.
        levels: fastest first.
        fixed: projections of added memories, target name -> ``(r, H)``; a readout's prior.
        changes: per level and target; a target that a level never changed may be missing. The
            keys of added memories are under `WRITTEN`, which is no level.
        counts: ``tokens``, ``documents``, ``updates`` ... since it was made.
        optimizer: state of the levels' optimizers (clocks, momenta, open accumulators) or None.
        snapshots: oldest first.
        model: name of the base model, for people.
        created: seconds since 1970.
    """

    layout: Layout
    levels: tuple[Level, ...]
    fixed: dict[str, Tensor]
    changes: Changes
    counts: dict[str, int] = dataclasses.field(default_factory=dict)
    optimizer: dict[str, Any] | None = None
    snapshots: list[Snapshot] = dataclasses.field(default_factory=list)
    model: str = ""
    created: float = dataclasses.field(default_factory=time.time)

    @property
    def names(self) -> tuple[str, ...]:
        """Level names, fastest first."""
        return tuple(level_name(level) for level in self.levels)

    @property
    def is_empty(self) -> bool:
        """Whether nothing was learned."""
        return not any(t.count_nonzero() for level in self.changes.values() for t in level.values())

    def total(self, target: str) -> Tensor | None:
        """Sum of all levels' changes of a target; None if there are none."""
        found = [level[target] for level in self.changes.values() if target in level]
        return sum_of(found) if found else None

    def snapshot(self, label: str, keep: int | None = None) -> None:
        """Remember the present state, and drop all but the newest ``keep`` snapshots."""
        changes = copy_changes(self.changes)
        self.snapshots.append(Snapshot(label, time.time(), changes, dict(self.counts)))
        if keep is not None:
            del self.snapshots[: max(0, len(self.snapshots) - keep)]

    def rollback(self, steps: int = 1) -> Snapshot:
        """Return to the ``steps``-th snapshot from the end, which is removed with all later ones.

        Momenta and open accumulators are dropped: they belong to what is being forgotten.

        Raises:
            ValueError: there are fewer snapshots.
        """
        if not 1 <= steps <= len(self.snapshots):
            raise ValueError(
                f"cannot roll back {steps} snapshot{'s' if steps != 1 else ''}: the memory holds "
                f"{len(self.snapshots)}"
            )
        chosen = self.snapshots[-steps]
        self.changes = copy_changes(chosen.changes)
        self.counts = dict(chosen.counts)
        self.optimizer = None
        del self.snapshots[-steps:]
        return chosen

    def copy(self) -> Memory:
        """A memory of its own with the same content."""
        return copy.deepcopy(self)


def with_rows(tensor: Tensor, rows: int) -> Tensor:
    """A tensor with ``rows`` rows: zeros behind those it has, or the first of them.

    Example:
        >>> with_rows(torch.ones(1, 2), 2)
        tensor([[1., 1.],
                [0., 0.]])
    """
    more = rows - len(tensor)
    if more <= 0:
        return tensor[:rows]
    return torch.cat([tensor, tensor.new_zeros(more, *tensor.shape[1:])])


def used_rows(keys: Tensor) -> int:
    """Slots up to the last one in use."""
    taken = keys.any(-1).nonzero()
    return int(taken[-1]) + 1 if len(taken) else 0


def sum_of(changes: Sequence[Tensor]) -> Tensor:
    """Sum of one target's changes, of one or more; a tensor of its own unless there is one."""
    first, *others = sorted(changes, key=len, reverse=True)
    if not others:
        return first
    total = first.clone()
    for change in others:
        total[: len(change)] += change
    return total


def level_name(level: Level) -> str:
    """A level's name, by default its period: ``every 64``."""
    return level.name or f"every {level.period}"


def copy_changes(changes: Changes) -> Changes:
    """Changes with tensors of their own."""
    return {level: {n: t.clone() for n, t in own.items()} for level, own in changes.items()}
