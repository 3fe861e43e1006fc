"""The lens's way through a model: every module is asked for, from the outside in."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from torch import Tensor, nn

from nestlearn.lens.findings import FastBox, Found, Scope, SlowBox, Unknown
from nestlearn.lens.forward import foreign_name
from nestlearn.lens.registry import recognise

UNKNOWN = "unknown block"


@dataclasses.dataclass
class Survey:
    """All that was found in a model.

    Attributes:
        fast: fast boxes, one entry per module that has one.
        slow: slow boxes, likewise.
        flops: per parameter, FLOPs per token; None: not known.
        unknown: module paths by (class name, reason).
        notes: without repetitions, in order.
    """

    fast: list[FastBox] = dataclasses.field(default_factory=list)
    slow: list[SlowBox] = dataclasses.field(default_factory=list)
    flops: dict[Tensor, float | None] = dataclasses.field(default_factory=dict)
    unknown: dict[tuple[str, str], list[str]] = dataclasses.field(default_factory=dict)
    notes: dict[str, None] = dataclasses.field(default_factory=dict)

    def unknowns(self) -> tuple[Unknown, ...]:
        """The unknown blocks."""
        return tuple(
            Unknown(what, tuple(where), reason) for (what, reason), where in self.unknown.items()
        )


def survey(model: nn.Module, tokens: int, training: bool) -> Survey:
    """Ask the recognisers about every module of a model."""
    found = Survey()
    _visit(model, Scope("", tokens, training), found)
    return found


def forward_flops(module: nn.Module, scope: Scope) -> float | None:
    """FLOPs of a forward pass per token (or sample); None: not known."""
    found = survey(module, scope.tokens, scope.training)
    parts = [*found.flops.values(), *(box.flops for box in found.fast)]
    known = [f for f in parts if f is not None]
    return sum(known) if len(known) == len(parts) and not found.unknown else None


def _visit(module: nn.Module, scope: Scope, found: Survey) -> None:
    module = getattr(module, "_orig_mod", module)  # torch.compile's wrapper
    known = recognise(module, scope)
    if known is None:
        known = _unregistered(module)
    found.fast += known.fast
    found.slow += known.slow
    for p, flops in known.flops.items():
        before = found.flops.get(p, 0.0)
        found.flops[p] = None if flops is None or before is None else before + flops
    if known.unknown:
        key = (type(module).__name__, known.unknown)
        found.unknown.setdefault(key, []).append(scope.path or "the model")
    found.notes |= dict.fromkeys(known.notes)
    if known.children:
        for name, child in _children(module):
            path = f"{scope.path}.{name}" if scope.path else name
            _visit(child, dataclasses.replace(scope, path=path), found)


def _children(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """With repetitions: a module that is used twice works twice."""
    for name, child in module._modules.items():
        if child is not None:
            yield name, child


def _unregistered(module: nn.Module) -> Found:
    """A composition that the lens can follow, or an unknown block.

    A block that has other compositions in it is a shell: they are looked at one by one, and only
    its own forward pass is unknown. One that has nothing but single layers is unknown as a whole:
    what it does with their outputs is what matters.
    """
    name = foreign_name(module)
    if name is None:
        return Found(children=True)
    reason = f"its forward pass uses {name!r}, which may connect tokens"
    if any(_is_composition(child) for child in module.children()):
        return Found(children=True, unknown=reason + "; its children are known")
    own = tuple(module.parameters())
    box = SlowBox(f"{UNKNOWN} {type(module).__name__}", own, objective="unknown")
    return Found(slow=(box,) if own else (), flops=dict.fromkeys(own), unknown=reason)


def _is_composition(module: nn.Module) -> bool:
    if isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        return any(_is_composition(child) for child in module.children())
    return any(True for _ in module.parameters()) and bool(module._modules)
