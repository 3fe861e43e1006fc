"""The clock of a level: the one place that decides which level is due (SPEC §6, Eq. 71)."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from fractions import Fraction
from typing import Final

NEVER: Final[int] = sys.maxsize
"""Period of a level that is never updated (update frequency 0)."""


@dataclasses.dataclass(frozen=True)
class Clock:
    """Level l is updated at step i if ``i = 0 mod C`` and left alone otherwise (Eq. 71).

    A clock holds no count. The count (optimizer steps or tokens, from 1) is a plain integer that
    belongs to whoever counts and is saved with their state, so a clock is the same value for every
    batch row and after every restart.

    Args:
        period: C, steps between two updates; ``NEVER`` for a level that is not updated.
        offset: the count at which the clock was started; it is due at ``offset + n * period``,
            n = 1, 2, ...

    Raises:
        ValueError: a period below 1, a negative offset, or one that is not an integer.

    Example:
        >>> clock = Clock(4)
        >>> [step for step in range(10) if clock.due(step)]
        [4, 8]
        >>> clock.until(5), list(clock.boundaries(3, 12))
        (3, [4, 8, 12])
    """

    period: int = 1
    offset: int = 0

    def __post_init__(self) -> None:
        _require_int("period", self.period)
        _require_int("offset", self.offset)
        if not 1 <= self.period <= NEVER:
            raise ValueError(
                f"a clock's period must be 1 or more steps, got {self.period}; for a level that is "
                "never updated use period=NEVER"
            )
        if self.offset < 0:
            raise ValueError(f"a clock's offset must be 0 or more, got {self.offset}")

    @property
    def frequency(self) -> Fraction:
        """Updates per step (Def. 2): ``1 / period``, 0 if never updated."""
        return Fraction(0) if self.period == NEVER else Fraction(1, self.period)

    def due(self, step: int) -> bool:
        """Whether the level is updated at the end of ``step`` (steps are counted from 1)."""
        return step > self.offset and (step - self.offset) % self.period == 0

    def until(self, step: int) -> int:
        """Steps from ``step`` to the next update, at least 1 (an update at ``step`` is past)."""
        if step < self.offset:
            return self.offset - step + self.period
        return self.period - (step - self.offset) % self.period

    def elapsed(self, step: int) -> int:
        """Steps in the chunk that is open after ``step``: 0 right after an update."""
        return max(0, step - self.offset) % self.period

    def boundaries(self, start: int, stop: int) -> range:
        """All steps ``start < i <= stop`` at which the level is due."""
        return range(start + self.until(start), stop + 1, self.period)


def segments(clocks: Sequence[Clock], start: int, stop: int) -> list[tuple[int, int]]:
    """Cut the steps ``start < i <= stop`` behind every step at which one of the clocks is due.

    Returns:
        ``(start, end)`` pairs without gaps; within a piece no level is due before its last step, so
        all parameters are constant.

    Example:
        >>> segments([Clock(4), Clock(6)], 3, 13)
        [(3, 4), (4, 6), (6, 8), (8, 12), (12, 13)]
    """
    ends = {stop, *(i for clock in clocks for i in clock.boundaries(start, stop))}
    cuts = sorted({start, *ends})
    return list(zip(cuts[:-1], cuts[1:], strict=True))


def _require_int(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"a clock's {name} must be an integer number of steps, got {value!r}")
