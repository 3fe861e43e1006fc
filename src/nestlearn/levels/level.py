"""One level of a nested system: how often it is updated, by which error, how strongly."""

from __future__ import annotations

import dataclasses
import math

from nestlearn.levels.clock import Clock

ERRORS: dict[str, str] = {"outer": "step", "online": "token", "context": "token"}
"""Where a level's error comes from -> the unit its period is counted in."""

FATES = ("discard", "keep", "consolidate")


@dataclasses.dataclass(frozen=True)
class Level:
    """A level of a continuum memory (SPEC §6, Eq. 70-74), as plain data.

    Args:
        period: C, the level is updated every C units (`Clock`). ``NEVER`` freezes it.
        name: name of its parameters and states; None lets the layer number its levels.
        unit: what ``period`` counts, ``"step"`` (optimizer steps) or ``"token"``. None takes the
            unit that goes with ``error``.
        error: where the error comes from: ``"outer"``, the task loss by backpropagation;
            ``"online"``, gradients handed in while the model is in use; ``"context"``, the level's
            own objective on what it reads.
        lr_scale: the outer optimizer's learning rate is multiplied by this (``"outer"``).
        eta: inner learning rate. ``"context"``: upper bound of the learned rate per token;
            ``"online"``: the step size. 0 freezes the level.
        fate: what becomes of the change a context made when the context ends: ``"discard"``,
            ``"keep"`` (carried to the next context) or ``"consolidate"`` (moved into the next
            slower level, which holds this level's initial state).
        meta_rate: share of the next faster level's change that this level takes over whenever it
            is due: into that level's initial state (``kind="nested"``), or from that level into
            itself (`nestlearn.adapt`: consolidation).
        half_life: tokens within which a change that is not renewed fades to a half
            (`nestlearn.adapt`: retention towards the slower levels); None: it stays.

    Raises:
        ValueError: a value out of range, or a unit that does not fit the error.

    Example:
        >>> Level(period=16, name="fast", error="context").unit
        'token'
    """

    period: int = 1
    name: str | None = None
    unit: str | None = None
    error: str = "outer"
    lr_scale: float = 1.0
    eta: float = 0.1
    fate: str = "discard"
    meta_rate: float = 0.5
    half_life: float | None = None

    def __post_init__(self) -> None:
        Clock(self.period)  # validates
        if self.name is not None and not (
            isinstance(self.name, str) and self.name and "." not in self.name
        ):
            raise ValueError(
                f"a level's name must be text without '.' (it names parameters), got {self.name!r}"
            )
        if self.error not in ERRORS:
            raise ValueError(f"error must be one of {', '.join(ERRORS)}, got {self.error!r}")
        unit = ERRORS[self.error]
        if self.unit is None:
            object.__setattr__(self, "unit", unit)
        elif self.unit != unit:
            raise ValueError(
                f"a level with error={self.error!r} counts its period in {unit}s, got "
                f"unit={self.unit!r}; leave unit out, or choose another error"
            )
        if self.fate not in FATES:
            raise ValueError(f"fate must be one of {', '.join(FATES)}, got {self.fate!r}")
        for field in ("lr_scale", "eta"):
            value = getattr(self, field)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{field} must be 0 or more and finite, got {value!r}")
        if self.half_life is not None and not self.half_life > 0:
            raise ValueError(f"half_life must be more than 0 tokens, got {self.half_life!r}")
        if not 0 <= self.meta_rate <= 1:
            raise ValueError(f"meta_rate must be between 0 and 1, got {self.meta_rate!r}")

    @property
    def clock(self) -> Clock:
        """The clock that says when this level is due."""
        return Clock(self.period)

    def with_error(self, error: str) -> Level:
        """The same level with another source of error, counted in the unit that goes with it."""
        return dataclasses.replace(self, error=error, unit=None)
