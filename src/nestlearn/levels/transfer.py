"""The five kinds of knowledge transfer between levels (§3.3, SPEC §1), as plain values.

A transfer goes from the box whose knowledge is used (``source``) to the box that uses it
(``target``). Which of the two must be the faster one belongs to the kind and is checked by
`NestedSystem`.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar


@dataclasses.dataclass(frozen=True)
class Transfer:
    """Knowledge of box ``source`` reaches box ``target``; use one of the five kinds below.

    Args:
        source: name of the box whose knowledge is used.
        target: name of the box that uses it.

    Raises:
        ValueError: a box would transfer to itself, or no kind was chosen.

    Example:
        >>> Initialisation("meta", "memory").kind
        'initialisation'
    """

    source: str
    target: str

    kind: ClassVar[str] = ""
    meaning: ClassVar[str] = ""
    faster: ClassVar[str | None] = None  # which end must be the faster box
    non_parametric_source: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not self.kind:
            raise ValueError(
                "Transfer is the common base; use DirectParametric, DirectNonParametric, "
                "Backpropagation, Initialisation or Generation"
            )
        if self.source == self.target:
            raise ValueError(f"box {self.source!r} cannot transfer knowledge to itself")

    def describe(self) -> str:
        """What is transferred, in words."""
        return self.meaning

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"kind": self.kind, **dataclasses.asdict(self)}


@dataclasses.dataclass(frozen=True)
class DirectParametric(Transfer):
    """The slow box's forward pass is conditioned on the fast box's parameters or output
    (Eq. 24-26)."""

    kind: ClassVar[str] = "direct parametric"
    meaning: ClassVar[str] = "its parameters or output condition the forward pass"
    faster: ClassVar[str | None] = "source"


@dataclasses.dataclass(frozen=True)
class DirectNonParametric(Transfer):
    """The slow box's forward pass is conditioned on the fast box's context itself (Eq. 27);
    softmax attention is the example. The source has no parameters."""

    kind: ClassVar[str] = "direct non-parametric"
    meaning: ClassVar[str] = "its context conditions the forward pass"
    faster: ClassVar[str | None] = "source"
    non_parametric_source: ClassVar[bool] = True


@dataclasses.dataclass(frozen=True)
class Backpropagation(Transfer):
    """One gradient flow reaches both boxes, which are updated at different frequencies."""

    kind: ClassVar[str] = "backpropagation"
    meaning: ClassVar[str] = "one gradient flow, other update frequency"


@dataclasses.dataclass(frozen=True)
class Initialisation(Transfer):
    """The slow box learns the fast box's initial state (Eq. 28; Eq. 72 in a continuum memory)."""

    kind: ClassVar[str] = "initialisation"
    meaning: ClassVar[str] = "learns its initial state"
    faster: ClassVar[str | None] = "target"


@dataclasses.dataclass(frozen=True)
class Generation(Transfer):
    """One box generates another's weights (a hypernetwork) or its context (a model generates the
    gradients that its optimizer compresses).

    Args:
        generates: ``"weights"`` or ``"context"``.
    """

    generates: str = "context"

    kind: ClassVar[str] = "generation"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.generates not in ("weights", "context"):
            raise ValueError(f"generates must be 'weights' or 'context', got {self.generates!r}")

    def describe(self) -> str:
        """What is transferred, in words."""
        return f"generates its {self.generates}"
