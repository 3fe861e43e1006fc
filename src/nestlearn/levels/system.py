"""Nested systems of associative memories: boxes, their order, their transfers (Def. 1-7)."""

from __future__ import annotations

import dataclasses
import io
import json
import math
from collections.abc import Sequence
from fractions import Fraction
from functools import cached_property
from os import PathLike
from typing import TYPE_CHECKING, Any

from nestlearn.levels.transfer import Transfer

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import RenderableType

Frequency = int | float | Fraction


@dataclasses.dataclass(frozen=True)
class Box:
    """One optimisation problem ``(L_i, C_i, Theta_i)``, solved at one frequency (Def. 3-7).

    Args:
        name: unique within its system.
        objective: L, what is minimised.
        context: C, the data it compresses (tokens, samples, gradients).
        parameters: Theta, names of what is learned; empty for a box that is solved
            non-parametrically (softmax attention, Eq. 62).
        frequency: updates per unit of time, the unit being one update step over one data point
            (Def. 2). 0: never; ``math.inf``: solved anew at every read.
        solver: how it is optimised.
        needs: names of boxes whose state at time t is needed to compute this box's state at
            time t. A box of equal frequency that is needed is faster (the second case of Def. 2).
        differentiated: what the gradients of slower boxes do at this box, in words.
        parameter_bytes: size of Theta where it belongs to the model; None: not known.
        state_bytes: size of what the box keeps beside the model's parameters (a memory, a momentum,
            a cache of keys and values); None: not known.
        flops_per_token: arithmetic of its matrix products for one token; None: not known.

    Raises:
        ValueError: an empty name, a negative frequency, a box that needs itself, or a frequency of
            infinity for a box with parameters.

    Example:
        >>> Box("MLP", "task loss", "training samples", ("W1", "W2"), 1).frequency
        Fraction(1, 1)
    """

    name: str
    objective: str
    context: str
    parameters: tuple[str, ...]
    frequency: Frequency
    solver: str = "gradient descent"
    needs: tuple[str, ...] = ()
    differentiated: str = ""
    parameter_bytes: int | None = None
    state_bytes: int | None = None
    flops_per_token: int | None = None

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("a box needs a name")
        for field in ("parameter_bytes", "state_bytes", "flops_per_token"):
            size = getattr(self, field)
            if size is not None and size < 0:
                raise ValueError(f"box {self.name!r}: {field} must be 0 or more, got {size}")
        for field in ("parameters", "needs"):
            value = getattr(self, field)
            if isinstance(value, str):
                raise ValueError(
                    f"box {self.name!r}: {field} must be a tuple of names, got {value!r}"
                )
            object.__setattr__(self, field, tuple(value))
        if self.name in self.needs:
            raise ValueError(f"box {self.name!r} cannot need its own state at the same time")
        f = self.frequency
        if isinstance(f, bool) or not isinstance(f, Frequency) or math.isnan(f) or f < 0:
            raise ValueError(
                f"box {self.name!r}: frequency must be a number >= 0 or math.inf, got {f!r}"
            )
        if f == math.inf and self.parameters:
            raise ValueError(
                f"box {self.name!r} has parameters, so its update frequency is finite; infinity is "
                "for boxes that are solved anew at every read and have none"
            )
        if f != math.inf:
            object.__setattr__(self, "frequency", Fraction(f).limit_denominator(10**12))

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return dataclasses.asdict(self) | {"frequency": frequency_text(self.frequency, "inf")}


def frequency_text(frequency: Frequency, infinity: str = "∞") -> str:
    """``"1/64"``, ``"16"``, ``"0"`` or infinity's sign."""
    return infinity if frequency == math.inf else str(frequency)


class NestedSystem:
    """Boxes, sorted into levels by update frequency, and the knowledge transfers between them.

    A box A is faster than B (``A > B`` in Def. 2) if ``f_A > f_B``, or if ``f_A = f_B`` and B's
    state at t needs A's state at t, directly or through other boxes. Boxes of which neither is
    faster share a level. Level 1 is the slowest.

    Args:
        boxes: the boxes, in any order.
        transfers: knowledge transfers between boxes of different levels (SPEC §1).
        name: title when printed.

    Raises:
        ValueError: no boxes, double or unknown names, boxes that need each other in a circle, or a
            transfer that its kind does not allow (an initial state is held by the slower box, a
            forward pass is conditioned on the faster one).

    Example:
        >>> W = Box("W", "task loss", "samples", ("W",), 1, needs=("momentum",))
        >>> m = Box("momentum", "<m, gradient>", "gradients", ("m",), 1)
        >>> system = NestedSystem([m, W])
        >>> [[box.name for box in level] for level in system.levels], system.faster("momentum", "W")
        ([['W'], ['momentum']], True)
    """

    def __init__(
        self, boxes: Sequence[Box], transfers: Sequence[Transfer] = (), name: str = "nested system"
    ) -> None:
        self.name = name
        self.boxes = tuple(boxes)
        self.transfers = tuple(transfers)
        if not self.boxes:
            raise ValueError("a nested system needs at least one box")
        self._by_name = {box.name: box for box in self.boxes}
        if len(self._by_name) != len(self.boxes):
            names = [box.name for box in self.boxes]
            raise ValueError(f"box names must be unique, got {names}")
        for box in self.boxes:
            for other in box.needs:
                self._known(other, f"box {box.name!r} needs")
        self._needed = {box.name: self._closure(box.name) for box in self.boxes}
        for transfer in self.transfers:
            self._check(transfer)

    # -- order --------------------------------------------------------------------------------

    def __getitem__(self, name: str) -> Box:
        """The box of this name."""
        return self._known(name, "asked for")

    def faster(self, a: str, b: str) -> bool:
        """Whether box ``a`` is faster than box ``b`` (``a > b`` of Def. 2)."""
        first, second = self[a], self[b]
        if first.frequency != second.frequency:
            return first.frequency > second.frequency
        return a in self._needed[b]

    @cached_property
    def levels(self) -> tuple[tuple[Box, ...], ...]:
        """Boxes by level, slowest first, in the given order within a level."""
        ranks = {box.name: (box.frequency, self._height(box)) for box in self.boxes}
        return tuple(
            tuple(box for box in self.boxes if ranks[box.name] == rank)
            for rank in sorted(set(ranks.values()))
        )

    def level_of(self, name: str) -> int:
        """Level of a box, counted from 1, the slowest."""
        box = self[name]
        return next(i for i, level in enumerate(self.levels, 1) if box in level)

    def _height(self, box: Box) -> int:
        """Longest chain of boxes of the same frequency, each needing the one before, up to
        ``box``: each step up is one level faster."""
        slower = [
            other
            for other in self.boxes
            if other.frequency == box.frequency and box.name in self._needed[other.name]
        ]
        return 1 + max((self._height(other) for other in slower), default=-1)

    def _closure(self, name: str) -> set[str]:
        """All boxes whose state at t is needed, directly or not, for ``name``'s state at t."""
        found: set[str] = set()
        path: list[str] = []

        def visit(current: str) -> None:
            if current in path:
                circle = " -> ".join([*path[path.index(current) :], current])
                raise ValueError(
                    f"boxes need each other's state at the same time: {circle}; one of them must "
                    "use the state before the update"
                )
            path.append(current)
            for other in self._by_name[current].needs:
                if other not in found or other in path:
                    found.add(other)
                    visit(other)
            path.pop()

        visit(name)
        return found

    # -- validation ---------------------------------------------------------------------------

    def _known(self, name: str, why: str) -> Box:
        if name not in self._by_name:
            raise ValueError(f"{why} {name!r}, but the boxes are {sorted(self._by_name)}")
        return self._by_name[name]

    def _check(self, transfer: Transfer) -> None:
        source = self._known(transfer.source, f"a {transfer.kind} transfer comes from")
        target = self._known(transfer.target, f"a {transfer.kind} transfer goes to")
        text = f"{transfer.kind} transfer {source.name!r} -> {target.name!r}"
        if self.level_of(source.name) == self.level_of(target.name):
            raise ValueError(f"{text}: both boxes are at one level; transfers are between levels")
        if transfer.faster is not None:
            quick, slow = source.name, target.name
            if transfer.faster == "target":
                quick, slow = slow, quick
            if not self.faster(quick, slow):
                raise ValueError(f"{text}: {quick!r} must be faster than {slow!r} (Def. 2)")
        if transfer.non_parametric_source and source.parameters:
            raise ValueError(
                f"{text}: the source has parameters {source.parameters}; use DirectParametric"
            )

    # -- output -------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Plain data: levels slowest first, each with its boxes, and the transfers."""
        return {
            "name": self.name,
            "levels": [
                {"level": i, "boxes": [box.to_dict() for box in level]}
                for i, level in enumerate(self.levels, 1)
            ],
            "transfers": [transfer.to_dict() for transfer in self.transfers],
        }

    def to_json(self, indent: int | None = 2) -> str:
        """``to_dict`` as JSON text; frequencies are text (``"1/64"``, ``"inf"``), being exact."""
        return json.dumps(self.to_dict(), indent=indent, ensure_ascii=False)

    def tree(self) -> RenderableType:
        """The system as a rich tree: levels slowest first, boxes, what they pass on."""
        from rich.markup import escape
        from rich.tree import Tree

        count = len(self.levels)
        root = Tree(f"{escape(self.name)}: {count} level{'s' if count != 1 else ''}")
        for i, level in enumerate(self.levels, 1):
            speed = " (slowest)" if i == 1 and count > 1 else " (fastest)" if i == count > 1 else ""
            branch = root.add(f"level {i}{speed}, frequency {frequency_text(level[0].frequency)}")
            for box in level:
                node = branch.add(escape(_headline(box)))
                node.add(escape(f"objective: {box.objective}"))
                node.add(escape(f"context: {box.context}"))
                if box.differentiated:
                    node.add(escape(f"differentiated: {box.differentiated}"))
                if cost := cost_text(box):
                    node.add(cost)
                for transfer in self.transfers:
                    if transfer.source == box.name:
                        line = f"{transfer.kind} -> {transfer.target}: {transfer.describe()}"
                        node.add(escape(line))
        return root

    def table(self) -> RenderableType:
        """The system as a rich table, one row per box, slowest first."""
        from rich.markup import escape
        from rich.table import Table

        head = ("level", "frequency", "box", "objective", "context", "parameters", "solver", "cost")
        table = Table(*head)
        table.title = escape(self.name)
        for i, level in enumerate(self.levels, 1):
            for box in level:
                cells = [box.name, box.objective, box.context, learned_text(box), box.solver]
                cells.append(cost_text(box))
                table.add_row(str(i), frequency_text(box.frequency), *map(escape, cells))
        return table

    def picture(self, path: str | PathLike[str] | None = None) -> Figure:
        """The system as a matplotlib figure, the slowest level at the bottom.

        Args:
            path: where to write it as well; the ending says the format (``.png``, ``.svg``,
                ``.pdf``).

        Raises:
            ValueError: matplotlib is not installed, or cannot write this format.
        """
        from nestlearn.levels.picture import draw

        return draw(self, path)

    def __rich__(self) -> RenderableType:
        return self.tree()

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(file=io.StringIO(), width=120, color_system=None, force_terminal=False)
        with console.capture() as capture:
            console.print(self.tree())
        return capture.get().rstrip("\n")

    def __repr__(self) -> str:
        return f"NestedSystem({self.name!r}, boxes={len(self.boxes)}, levels={len(self.levels)})"


def _headline(box: Box) -> str:
    learned = learned_text(box) if box.parameters else "no parameters"
    return f"{box.name}: {learned} ({box.solver})"


SHOWN = 8  # names of parameters that are printed; JSON has all


def learned_text(box: Box) -> str:
    """Names of what a box learns, the first of them if there are many."""
    names = list(box.parameters[:SHOWN])
    if len(box.parameters) > SHOWN:
        names.append(f"and {len(box.parameters) - SHOWN} more")
    return ", ".join(names) or "none"


def cost_text(box: Box) -> str:
    """What a box costs, as far as it is known."""
    parts = []
    if box.parameter_bytes:
        parts.append(f"parameters {quantity(box.parameter_bytes)}B")
    if box.state_bytes:
        parts.append(f"state {quantity(box.state_bytes)}B")
    if box.flops_per_token:
        parts.append(f"{quantity(box.flops_per_token)}FLOP per token")
    return ", ".join(parts)


def quantity(number: int) -> str:
    """A number with three digits and a unit prefix.

    Example:
        >>> quantity(123_456)
        '123 k'
    """
    for size, prefix in ((10**12, "T"), (10**9, "G"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.3g} {prefix}"
    return f"{number} "
