"""The five kinds of knowledge transfer between levels (§3.3, SPEC §1).

A transfer goes from the box whose knowledge is used (``source``) to the box that uses it
(``target``). Which of the two must be the faster one belongs to the kind and is checked by
`NestedSystem`.

The same objects describe a system and build one: handed to `nestlearn.levels.TwoLevel`, each does
what it says in every episode (`before` and `after`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from torch import Tensor

    from nestlearn.levels.inner_loop import InnerLoop


@dataclasses.dataclass
class Episode:
    """What passes between a slow and a fast level while the fast one sees one context.

    Attributes:
        context: what the fast level learns from: inputs, then whatever its objective compares
            outputs with.
        query: the input that is answered when it has learned.
        initial: the fast level's parameters before its first step.
        through: whether the slow level's gradient flows through the fast level's steps.
        output: the answer.
    """

    context: tuple[Any, ...]
    query: Any
    initial: Mapping[str, Tensor]
    through: bool = False
    output: Any = None


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

    @property
    def label(self) -> str:
        """What a picture writes on the arrow."""
        return self.kind

    def describe(self) -> str:
        """What is transferred, in words."""
        return self.meaning

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"kind": self.kind, **dataclasses.asdict(self)}

    def before(self, slow: Any, fast: InnerLoop | None, episode: Episode) -> None:
        """What it does before the fast level learns (in place, on ``episode``)."""

    def after(self, slow: Any, fast: InnerLoop | None, episode: Episode) -> None:
        """What it does when the fast level has learned and answered."""


@dataclasses.dataclass(frozen=True)
class DirectParametric(Transfer):
    """The slow box's forward pass is conditioned on the fast box's parameters or output
    (Eq. 24-26): ``slow(query, answer of the fast box)``."""

    kind: ClassVar[str] = "direct parametric"
    meaning: ClassVar[str] = "its parameters or output condition the forward pass"
    faster: ClassVar[str | None] = "source"

    def after(self, slow: Any, fast: InnerLoop | None, episode: Episode) -> None:
        episode.output = slow(episode.query, episode.output)


@dataclasses.dataclass(frozen=True)
class DirectNonParametric(Transfer):
    """The slow box's forward pass is conditioned on the fast box's context itself (Eq. 27):
    ``slow(query, *context)``; softmax attention is the example. The source has no parameters."""

    kind: ClassVar[str] = "direct non-parametric"
    meaning: ClassVar[str] = "its context conditions the forward pass"
    faster: ClassVar[str | None] = "source"
    non_parametric_source: ClassVar[bool] = True

    def after(self, slow: Any, fast: InnerLoop | None, episode: Episode) -> None:
        episode.output = slow(episode.query, *episode.context)


@dataclasses.dataclass(frozen=True)
class Backpropagation(Transfer):
    """One gradient flow reaches both boxes, which are updated at different frequencies: the slow
    box's gradient goes through the fast box's steps. Without it they count as constants."""

    kind: ClassVar[str] = "backpropagation"
    meaning: ClassVar[str] = "one gradient flow, other update frequency"

    def before(self, slow: Any, fast: InnerLoop | None, episode: Episode) -> None:
        episode.through = True


@dataclasses.dataclass(frozen=True)
class Initialisation(Transfer):
    """The slow box learns the fast box's initial state (Eq. 28; Eq. 72 in a continuum memory): the
    slow box's parameters are where the fast box starts."""

    kind: ClassVar[str] = "initialisation"
    meaning: ClassVar[str] = "learns its initial state"
    faster: ClassVar[str | None] = "target"

    def before(self, slow: Any, fast: InnerLoop | None, episode: Episode) -> None:
        episode.initial = dict(slow.named_parameters())


@dataclasses.dataclass(frozen=True)
class Generation(Transfer):
    """One box generates another's weights (a hypernetwork) or its context (a model generates the
    gradients that its optimizer compresses): ``slow(*context)``.

    Args:
        generates: ``"weights"`` or ``"context"``.
    """

    generates: str = "context"

    kind: ClassVar[str] = "generation"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.generates not in ("weights", "context"):
            raise ValueError(f"generates must be 'weights' or 'context', got {self.generates!r}")

    @property
    def label(self) -> str:
        """What a picture writes on the arrow."""
        return f"{self.kind} ({self.generates})"

    def describe(self) -> str:
        """What is transferred, in words."""
        return f"generates its {self.generates}"

    def before(self, slow: Any, fast: InnerLoop | None, episode: Episode) -> None:
        made = slow(*episode.context)
        if self.generates == "context":
            episode.context = made if isinstance(made, tuple) else (made,)
        elif fast is not None:
            episode.initial = fast.unflatten(made)
