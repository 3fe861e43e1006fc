"""The nested system of a model that `nestlearn.adapt` gave levels to."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import TYPE_CHECKING

from torch import nn

from nestlearn.adaptation.attach import Adaptation, adaptation_of
from nestlearn.adaptation.memory import level_name
from nestlearn.levels.clock import NEVER
from nestlearn.levels.system import Box, NestedSystem
from nestlearn.levels.transfer import Backpropagation, DirectParametric, Transfer

if TYPE_CHECKING:
    from rich.console import RenderableType

BASE = "pre-trained weights"
MOMENTA = 2  # numbers that AdamW, the default, keeps per number that is learned


class AdaptedSystem(NestedSystem):
    """Boxes and levels of an adapted model, what was matched in it, and what learning costs.

    Attributes:
        adaptation: the matched blocks and the weights that are learned.
        level_bytes: per level, bytes of its changes and of AdamW's momenta, float32, once it
            learns. What a level reads and what it adds to the forward pass is shared by all.
    """

    def __init__(self, adaptation: Adaptation, parameters: int) -> None:
        self.adaptation = adaptation
        sizes = {name: t.weight.numel() for name, t in adaptation.targets.items()}
        boxes = [
            Box("attention", "regression on the context (Eq. 62)", "tokens so far", (), math.inf,
                solver="non-parametric"),
            Box(BASE, "next-token loss", "pre-training text", (f"{parameters:,} numbers",), 0,
                solver="finished"),
        ]  # fmt: skip
        transfers: list[Transfer] = []
        self.level_bytes: dict[str, int] = {}
        for level in adaptation.levels:
            name = level_name(level)
            own = [n for n, t in adaptation.targets.items() if name in t.levels]
            count = sum(sizes[n] for n in own)
            learns = level.period != NEVER and level.eta > 0
            exact = adaptation.method == "readout"
            self.level_bytes[name] = 4 * count * (1 if exact else 1 + MOMENTA) if learns else 0
            blocks = sorted(
                {s.block for s in adaptation.sites if set(own) & {s.output, *s.linears}}
            )
            what = f"{'V' if adaptation.method == 'added' else 'MLP weights'} of blocks "
            what = "sums of the readout" if exact else what + _ranges(blocks)
            boxes.append(
                Box(
                    name,
                    "next-token loss of the stream",
                    f"{level.period:,} tokens",
                    (f"{what}, {count:,} numbers",),
                    Fraction(1, level.period) if learns else 0,
                    solver=("least squares" if exact else "optimizer of its own")
                    if learns
                    else "frozen",
                )
            )
            if learns:
                transfers.append(DirectParametric(name, BASE))
        slower = [level_name(lv) for lv in adaptation.levels if self.level_bytes[level_name(lv)]]
        transfers += [Backpropagation(b, a) for a, b in zip(slower, slower[1:], strict=False)]
        super().__init__(boxes, transfers, name="adapted model")

    @property
    def added_bytes(self) -> int:
        """Bytes that the model has more than before: keys and values, or kept base weights."""
        targets = self.adaptation.targets.values()
        if self.adaptation.method == "placement":
            return sum(t.weight.nbytes for t in targets)
        keys = self.adaptation.keys
        size = next(iter(targets)).weight.element_size()
        return sum(t.weight.nbytes for t in targets) + size * sum(k.numel() for k in keys.values())

    def tree(self) -> RenderableType:
        """The system, with what was matched and what it costs."""
        from rich.markup import escape
        from rich.tree import Tree

        tree = super().tree()
        assert isinstance(tree, Tree)
        handle = self.adaptation
        matched = tree.add(
            f"matched: {len(handle.sites)} blocks learn, {len(handle.frozen_sites)} do not "
            "(no backward work is done in those below the first that learns)"
        )
        for site in (*handle.frozen_sites, *handle.sites):
            state = "learns" if site in handle.sites else "frozen"
            matched.add(escape(f"block {site.block}: {site.output} {site.hidden}->{site.width}, "
                               f"{state}"))  # fmt: skip
        cost = tree.add("cost")
        cost.add(f"in the model: {self.added_bytes / 1e6:.1f} MB")
        how = "" if handle.method == "readout" else " with AdamW"
        for name, size in self.level_bytes.items():
            cost.add(escape(f"{name}, once it learns: {size / 1e6:.1f} MB{how}"))
        return tree


def inspect(model: nn.Module) -> AdaptedSystem:
    """The nested system of an adapted model (Def. 1-4): boxes, update frequencies, transfers.

    Printing it shows which MLPs were matched, which levels learn, and the memory it will take.

    Args:
        model: a model that `nestlearn.adapt` was called on.

    Raises:
        ValueError: the model is not adapted.

    Example:
        >>> print(nl.inspect(nl.adapt(model)))
    """
    handle = adaptation_of(model)
    own = {id(t.weight) for t in handle.targets.values() if t.base is None}
    parameters = sum(p.numel() for p in model.parameters() if id(p) not in own)
    return AdaptedSystem(handle, parameters)


def _ranges(numbers: list[int]) -> str:
    """``0-3, 7``."""
    parts: list[list[int]] = []
    for n in numbers:
        if parts and n == parts[-1][-1] + 1:
            parts[-1].append(n)
        else:
            parts.append([n])
    return ", ".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts)
