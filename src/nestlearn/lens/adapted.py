"""The nested system of a model that `nestlearn.adapt` gave levels to."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import TYPE_CHECKING

from torch import nn

from nestlearn.adaptation.adapted import Adaptation, adaptation_of
from nestlearn.adaptation.added import AddedMemory
from nestlearn.adaptation.memory import level_name
from nestlearn.lens.findings import Found, Scope, Unknown
from nestlearn.lens.registry import register_module
from nestlearn.lens.system import InspectedSystem
from nestlearn.lens.walk import Survey, survey
from nestlearn.levels.clock import NEVER
from nestlearn.levels.system import Box
from nestlearn.levels.transfer import (
    Backpropagation,
    DirectNonParametric,
    DirectParametric,
    Transfer,
)

if TYPE_CHECKING:
    from rich.console import RenderableType

BASE = "pre-trained weights"
MOMENTA = {"added": 1, "placement": 2, "readout": 0}
"""Numbers that the method's usual optimizer keeps per number that is learned."""


@register_module(AddedMemory)
def _added_memory(module: AddedMemory, scope: Scope) -> Found:
    """Keys are no parameters that learn: their work, at full slots, is counted with the values."""
    return Found(
        flops={
            module.values: 2.0
            * (module.values.numel() + module.keys.numel() + module.projection.numel())
        }
    )


def is_adapted(model: nn.Module) -> bool:
    """Whether `nestlearn.adapt` was called on it."""
    try:
        adaptation_of(model)
    except ValueError:
        return False
    return True


class AdaptedSystem(InspectedSystem):
    """Boxes and levels of an adapted model, what was matched in it, and what learning costs.

    Attributes:
        adaptation: the matched blocks and the weights that are learned.
        level_bytes: per level, bytes of its changes and of its optimizer's momenta, float32, once
            it learns and every slot is taken. What a level reads and what it adds to the forward
            pass is shared by all.
    """

    def __init__(self, adaptation: Adaptation, model: nn.Module, found: Survey) -> None:
        self.adaptation = adaptation
        sizes = {name: t.weight.numel() for name, t in adaptation.targets.items()}
        own = {t.weight for t in adaptation.targets.values() if t.base is None}
        base = [p for p in model.parameters() if p not in own]
        base_flops = [found.flops.get(p, 0.0) for p in base]
        attention = [box for box in found.fast if box.rate == math.inf]
        boxes = [
            Box("attention", "regression on the context (Eq. 62)", "tokens so far", (), math.inf,
                solver="non-parametric",
                state_bytes=_total([box.state_bytes for box in attention]),
                flops_per_token=_total([box.flops for box in attention])),
            Box(BASE, "next-token loss", "pre-training text",
                (f"{sum(p.numel() for p in base):,} numbers",), 0, solver="finished",
                parameter_bytes=sum(p.numel() * p.element_size() for p in base),
                flops_per_token=_total(base_flops)),
        ]  # fmt: skip
        transfers: list[Transfer] = [DirectNonParametric("attention", BASE)]
        self.level_bytes: dict[str, int] = {}
        for level in adaptation.levels:
            name = level_name(level)
            targets = [n for n, t in adaptation.targets.items() if name in t.levels]
            count = sum(sizes[n] for n in targets)
            learns = level.period != NEVER and level.eta > 0
            kept = 1 + MOMENTA[adaptation.method]
            self.level_bytes[name] = 4 * count * kept if learns else 0
            blocks = sorted(
                {s.block for s in adaptation.sites if set(targets) & {s.output, *s.linears}}
            )
            exact = adaptation.method == "readout"
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
                    differentiated="no: written without a graph",
                    state_bytes=self.level_bytes[name],
                    flops_per_token=0,  # read with what all levels share, see `shared_flops`
                )
            )
            if learns:
                transfers.append(DirectParametric(name, BASE))
        slower = [level_name(lv) for lv in adaptation.levels if self.level_bytes[level_name(lv)]]
        transfers += [Backpropagation(b, a) for a, b in zip(slower, slower[1:], strict=False)]
        unknown: tuple[Unknown, ...] = found.unknowns()
        super().__init__(boxes, transfers, "adapted model", unit="one token", unknown=unknown)
        self.shared_flops = round(sum(found.flops.get(p) or 0.0 for p in own))

    @classmethod
    def of(cls, model: nn.Module, tokens: int) -> AdaptedSystem:
        """The system of a model that levels were attached to.

        Raises:
            ValueError: none were.
        """
        return cls(adaptation_of(model), model, survey(model, tokens, training=False))

    @property
    def added_bytes(self) -> int:
        """Bytes that the model has more than before: keys and values, or kept base weights."""
        targets = self.adaptation.targets.values()
        if self.adaptation.method == "placement":
            return sum(t.weight.nbytes for t in targets)
        fixed = self.adaptation.fixed
        size = next(iter(targets)).weight.element_size()
        return sum(t.weight.nbytes for t in targets) + size * sum(k.numel() for k in fixed.values())

    @property
    def flops_per_token(self) -> int | None:
        """As of any system; the work of added memories, which all levels share, is in it."""
        total = super().flops_per_token
        return None if total is None else total + self.shared_flops

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
        for name, size in self.level_bytes.items():
            cost.add(escape(f"{name}, once it learns: up to {size / 1e6:.1f} MB with its momenta"))
        return tree


def _total(numbers: list[float | None] | list[int | None]) -> int | None:
    known = [n for n in numbers if n is not None]
    return round(sum(known)) if len(known) == len(numbers) else None


def _ranges(numbers: list[int]) -> str:
    """``0-3, 7``."""
    parts: list[list[int]] = []
    for n in numbers:
        if parts and n == parts[-1][-1] + 1:
            parts[-1].append(n)
        else:
            parts.append([n])
    return ", ".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts)
