"""What `nestlearn.inspect` returns: a nested system, its unit of time, its cost and its gaps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from nestlearn.lens.findings import Unknown
from nestlearn.levels.system import Box, NestedSystem, quantity
from nestlearn.levels.transfer import Transfer

if TYPE_CHECKING:
    from rich.console import RenderableType

WHERE = 3  # places of an unknown block that are printed; JSON has all


class InspectedSystem(NestedSystem):
    """The nested system of a model as `nestlearn.inspect` found it.

    Attributes:
        unit: the unit of time that frequencies count by (Def. 2).
        unknown: modules and optimizers that no recogniser knows.
        notes: where the set-up does something else than was probably meant.
    """

    def __init__(
        self,
        boxes: Sequence[Box],
        transfers: Sequence[Transfer] = (),
        name: str = "nested system",
        *,
        unit: str = "one data point",
        unknown: tuple[Unknown, ...] = (),
        notes: tuple[str, ...] = (),
    ) -> None:
        super().__init__(boxes, transfers, name)
        self.unit, self.unknown, self.notes = unit, unknown, notes

    @property
    def parameter_bytes(self) -> int:
        """Bytes of the model's parameters."""
        return sum(box.parameter_bytes or 0 for box in self.boxes)

    @property
    def state_bytes(self) -> int | None:
        """Bytes of all states of one sequence and of the optimizer; None if one is not known."""
        return _sum([box.state_bytes for box in self.boxes])

    @property
    def flops_per_token(self) -> int | None:
        """FLOPs of one token in a forward pass with its writes; None if a part is not known."""
        return _sum([box.flops_per_token for box in self.boxes])

    def to_dict(self) -> dict[str, Any]:
        """Plain data: see `NestedSystem.to_dict`; with the totals, what is unknown, and notes."""
        return super().to_dict() | {
            "unit": self.unit,
            "parameter_bytes": self.parameter_bytes,
            "state_bytes": self.state_bytes,
            "flops_per_token": self.flops_per_token,
            "unknown": [unknown.to_dict() for unknown in self.unknown],
            "notes": list(self.notes),
        }

    def tree(self) -> RenderableType:
        """The system as a rich tree, with the unit of time, totals, gaps and notes."""
        from rich.markup import escape
        from rich.tree import Tree

        tree = super().tree()
        assert isinstance(tree, Tree)
        tree.add(escape(f"unit of time: {self.unit}"))
        tree.add(f"in all: {self._totals()}")
        if self.unknown:
            branch = tree.add("unknown: not guessed at; see nl.lens.register_module")
            for unknown in self.unknown:
                where = ", ".join(unknown.where[:WHERE])
                more = len(unknown.where) - WHERE
                where += f" and {more} more" if more > 0 else ""
                branch.add(escape(f"{unknown.what} ({where}): {unknown.reason}"))
        for note in self.notes:
            tree.add(escape(f"note: {note}"))
        return tree

    def _totals(self) -> str:
        state, flops = self.state_bytes, self.flops_per_token
        parts = [
            f"parameters {quantity(self.parameter_bytes)}B",
            "state not known" if state is None else f"state {quantity(state)}B",
            "FLOP not known" if flops is None else f"{quantity(flops)}FLOP per token",
        ]
        return ", ".join(parts)


def _sum(numbers: Sequence[int | None]) -> int | None:
    return None if any(n is None for n in numbers) else sum(n for n in numbers if n is not None)
