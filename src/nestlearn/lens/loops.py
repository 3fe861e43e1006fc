"""Recogniser of two-level systems built by hand: MAML-like loops, hypernetworks."""

from __future__ import annotations

import functools
import math
from typing import Any

from torch import nn

from nestlearn.lens.findings import FastBox, Found, Scope, SlowBox
from nestlearn.lens.registry import register_module
from nestlearn.lens.walk import forward_flops
from nestlearn.levels.inner_loop import TwoLevel
from nestlearn.levels.transfer import (
    Backpropagation,
    DirectNonParametric,
    DirectParametric,
    Initialisation,
)


@register_module(TwoLevel)
def _two_level(module: TwoLevel, scope: Scope) -> Found:
    """The transfers say what the loop does; the slow module is then looked at as any other."""
    slow, fast = module.slow_name, module.fast_name
    loop = module.fast
    outer = SlowBox(slow, tuple(module.slow.parameters()), objective=_outer(module))
    boxes: tuple[SlowBox, ...] = (outer,)
    if module.starts_fixed:
        boxes += (SlowBox(f"start of {fast}", tuple(module.start.parameters()), objective="none"),)
    if loop is None:
        box = FastBox(
            fast, "none: the context itself", "context of one episode", (), math.inf,
            "non-parametric", "yes", per="sample", flops=0, flow=False,
            transfers=(DirectNonParametric(fast, slow),),
        )  # fmt: skip
        return Found(fast=(box,), slow=boxes, children=True)
    through = module.has(Backpropagation)
    links = tuple(t for t in module.transfers if not isinstance(t, Backpropagation))
    links += (Backpropagation(slow, fast),) if through else ()
    if not module.has(DirectParametric):
        # The slow level's objective is taken at the fast level's answer.
        links += (DirectParametric(fast, slow),)
    steps = f"{loop.steps} step{'s' if loop.steps != 1 else ''}"
    box = FastBox(
        fast,
        _name_of(loop.objective),
        "context of one episode" + (", generated" if module.generates("context") else ""),
        tuple(n for n, _ in loop.module.named_parameters()),
        max(1, loop.steps),
        f"gradient descent, {steps} of {loop.lr:g}" if loop.steps else "generated, no steps",
        _differentiated(loop.steps, through),
        per="sample",
        state_bytes=sum(p.numel() * p.element_size() for p in loop.module.parameters()),
        flops=forward_flops(loop.module, scope),
        flow=False,
        transfers=links,
    )
    # With Initialisation the slow module only holds the start: the fast box does its arithmetic.
    return Found(fast=(box,), slow=boxes, children=not module.has(Initialisation))


def _outer(module: TwoLevel) -> str:
    return f"{_name_of(module.objective)} of the query, after the context"


def _name_of(function: Any) -> str:
    if isinstance(function, functools.partial):
        return _name_of(function.func)
    if isinstance(function, nn.Module):
        return type(function).__name__
    return getattr(function, "__name__", type(function).__name__)


def _differentiated(steps: int, through: bool) -> str:
    if not steps:
        return "yes: into what generates it"
    return "yes: through every step" if through else "first order: its steps are constants"
