"""What recognisers say about modules and optimizers: the lens's vocabulary, as plain values."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from torch import Tensor, nn

from nestlearn.levels.transfer import Transfer

Rate = int | float | Fraction


@dataclasses.dataclass(frozen=True)
class FastBox:
    """A box that a module updates in its forward pass: a memory, attention, a recurrent state.

    Boxes of equal ``name`` found in several layers are shown as one; they must then agree in all
    but sizes.

    Args:
        name: of the box.
        objective, context, solver, differentiated: as in `nestlearn.levels.Box`.
        learns: names of what is learned in context; empty if it is solved non-parametrically.
        rate: updates per token; ``math.inf``: solved anew at every read.
        per: what ``rate`` counts by: ``"token"``, or ``"sample"`` (once per data point).
        state_bytes: state of one sequence; None: not known.
        flops: matrix-product FLOPs per token of reading and writing; None: not known.
        slow: slow parameters whose forward pass uses the box's output, normally all of the
            module's; their boxes get the direct transfer.
        initial: slow parameters that are its learned initial state.
        flow: whether gradients of the slow parameters flow through its updates.
        needs: names of fast boxes whose new state it needs.
        transfers: further transfers between fast boxes.
    """

    name: str
    objective: str
    context: str
    learns: tuple[str, ...]
    rate: Rate
    solver: str
    differentiated: str = ""
    per: str = "token"
    state_bytes: int | None = None
    flops: float | None = None
    slow: tuple[Tensor, ...] = ()
    initial: tuple[Tensor, ...] = ()
    flow: bool = True
    needs: tuple[str, ...] = ()
    transfers: tuple[Transfer, ...] = ()

    def __post_init__(self) -> None:
        if self.per not in ("token", "sample"):
            raise ValueError(f"per must be 'token' or 'sample', got {self.per!r}")
        if self.rate == math.inf and self.learns:
            raise ValueError(f"{self.name!r} is solved anew at every read, so it learns nothing")


@dataclasses.dataclass(frozen=True)
class SlowBox:
    """Parameters that deserve a box of their own, like one level of a continuum memory.

    Args:
        name: of the box; equal names of several layers are one box.
        parameters: what is in it.
        period: update period in optimizer steps that the module asks for; None: no wish. The lens
            shows what the optimizer does, and says so where that differs.
        objective: None: the task's.
        transfers: from or to this box, where both ends have different frequencies.
    """

    name: str
    parameters: tuple[Tensor, ...]
    period: int | None = None
    objective: str | None = None
    transfers: tuple[Transfer, ...] = ()


@dataclasses.dataclass(frozen=True)
class Found:
    """What a module is.

    Args:
        fast: boxes that its forward pass updates.
        slow: parameters that have boxes of their own; all others are in the box "weights".
        flops: FLOPs per token that are done with a parameter in matrix products; None: not known.
        children: whether the lens goes on into the module's children.
        unknown: why the module is shown as an unknown block; "" for a known one.
        notes: lines that are printed under the system.
    """

    fast: tuple[FastBox, ...] = ()
    slow: tuple[SlowBox, ...] = ()
    flops: Mapping[Tensor, float | None] = dataclasses.field(default_factory=dict)
    children: bool = False
    unknown: str = ""
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Scope:
    """Where a recogniser looks from.

    Attributes:
        path: of the module in the model.
        tokens: length of one data point, in tokens.
        training: whether an optimizer updates the model.
    """

    path: str
    tokens: int
    training: bool


@dataclasses.dataclass(frozen=True)
class Memory:
    """What an optimizer remembers of the gradients of one parameter, as an associative memory.

    Args:
        name: of the box, e.g. ``"momentum"``.
        objective: what it minimises.
        state: keys of the optimizer's state of a parameter that hold it.
        solver: how, e.g. ``"gradient descent, step 1 - beta"``.
        period: optimizer steps between two updates of it.
        needs: names of memories of this optimizer whose new state it needs.
        bytes: its size for this parameter, if it is not that of the parameter.
        flops: FLOPs of matrix products per optimizer step with it.
        differentiated: as in `nestlearn.levels.Box`.
    """

    name: str
    objective: str
    state: tuple[str, ...]
    solver: str
    period: int = 1
    needs: tuple[str, ...] = ()
    bytes: int | None = None
    flops: float = 0.0
    differentiated: str = ""


@dataclasses.dataclass(frozen=True)
class Rule:
    """How an optimizer updates one parameter.

    Args:
        memories: what it remembers of the gradients; none: gradient descent.
        objective: what the parameter minimises, where that is not the task's loss itself.
        solver: name of the rule.
    """

    memories: tuple[Memory, ...] = ()
    objective: str | None = None
    solver: str = "gradient descent"


@dataclasses.dataclass(frozen=True)
class Unknown:
    """Something that the lens does not know, and does not guess at."""

    what: str
    where: tuple[str, ...]
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return dataclasses.asdict(self)


def matrix_flops(parameters: Sequence[Tensor]) -> dict[Tensor, float | None]:
    """``2 * numel`` for every matrix: one multiplication and one addition per entry and token."""
    return {p: 2.0 * p.numel() for p in parameters if p.ndim >= 2}


def tensors(module: nn.Module) -> tuple[Tensor, ...]:
    """All parameters of a module."""
    return tuple(module.parameters())
