"""State and settings of a continuum memory system (SPEC §6)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from torch import Tensor

from nestlearn.levels.clock import NEVER
from nestlearn.levels.level import Level
from nestlearn.memory.state import State
from nestlearn.memory.structures import ACTIVATIONS

KINDS = ("sequential", "nested", "independent")


@dataclasses.dataclass
class FastWeights(State):
    """What one level has learned in context (or online), per batch row.

    Attributes:
        up, down: Delta of the two weights, ``(B, H, D)`` and ``(B, D, H)``, at least fp32.
        start: nested systems: the initial state, held by the next slower level, as a change to
            theta_0 (same shapes as ``up``, ``down``); else empty.
        pending: inputs read since the last time errors were added up, ``(B, n, D)``; valid are
            those of the open chunk, the rest is zero.
        error: sum over the open chunk of errors of ``up`` and ``down`` and their masses ``(B, 2)``;
            empty where the whole chunk fits into ``pending``.
    """

    up: Tensor
    down: Tensor
    start: tuple[Tensor, ...]
    pending: Tensor
    error: tuple[Tensor, ...]


@dataclasses.dataclass
class ContinuumState(State):
    """What the levels of a `ContinuumMemory` learned on a stream.

    Attributes:
        levels: per level its `FastWeights`, None for a level that learns by the outer loss only.
        position: tokens on which the levels learned, per batch row (all levels' clock).
        frozen: read only; nothing is written and the clock stands still.
    """

    levels: tuple[FastWeights | None, ...] = ()
    position: tuple[int, ...] = ()
    frozen: bool = False

    @property
    def batch_size(self) -> int:
        """Number of batch rows."""
        return len(self.position)

    def freeze(self, frozen: bool = True) -> ContinuumState:
        """The same memory, read-only (or writable again)."""
        return dataclasses.replace(self, frozen=frozen)


def check_settings(
    dim: int, hidden: int, levels: list[Level], kind: str, activation: str, residual: bool
) -> None:
    """Refuse settings of a `ContinuumMemory` that do not fit together."""
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if not levels:
        raise ValueError("a continuum memory needs at least one level; Level() is a plain MLP")
    if dim < 1 or hidden < len(levels):
        raise ValueError(
            f"dim must be at least 1 and hidden at least the number of levels ({len(levels)}), got "
            f"dim={dim}, hidden={hidden}"
        )
    if kind == "independent" and not residual:
        raise ValueError("residual=False is for chains; independent levels are summed")
    errors = {level.error for level in levels}
    if {"context", "online"} <= errors:
        raise ValueError(
            "in-context and online levels cannot be mixed in one layer; use two layers"
        )
    if kind == "nested" and len(errors) > 1:
        raise ValueError(
            f"nested levels must take their error from one place, got {sorted(errors)}"
        )


def slower_levels(levels: Sequence[Level]) -> dict[Level, Level]:
    """Each level's next slower level."""
    ordered = sorted(levels, key=lambda level: level.period)
    pairs = dict(zip(ordered[:-1], ordered[1:], strict=True))
    for fast, slow in pairs.items():
        if slow.period == fast.period or (slow.period != NEVER and slow.period % fast.period):
            raise ValueError(
                "nested levels need distinct periods, each a multiple of the next faster one, got "
                f"{[level.period for level in ordered]}"
            )
    return pairs
