"""Inner objectives: what a memory's answer ``y = M(k)`` is compared with (SPEC §2, Def. 1).

Each objective gives its value and, in closed form, its gradient at the memory's output; the rest of
the gradient is the memory structure's affair. All are sums over the last axis.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Objective:
    """An inner objective.

    Attributes:
        name: its name in `OBJECTIVES`.
        value: ``(y, v) -> (...)`` for ``y, v (..., d)``.
        grad: ``(y, v) -> d value / d y``, like ``y``.
        curvature: ``(y, v) -> (...)``, a bound on the second derivative along any coordinate, at
            least 1; steps are damped by it. None for objectives that never exceed 1.
    """

    name: str
    value: Callable[[Tensor, Tensor], Tensor]
    grad: Callable[[Tensor, Tensor], Tensor]
    curvature: Callable[[Tensor, Tensor], Tensor] | None = None


def dot() -> Objective:
    """``-<y, v>`` (Eq. 64)."""
    return Objective("dot", lambda y, v: -(y * v).sum(-1), lambda y, v: (-v).expand_as(y))


def l2() -> Objective:
    """``1/2 ||y - v||^2`` (Eq. 65)."""
    return Objective("l2", lambda y, v: 0.5 * (y - v).square().sum(-1), lambda y, v: y - v)


def lp(p: float = 3.0, smooth: float = 1e-3) -> Objective:
    """``sum_i |e_i|^p`` with ``e = y - v`` (SPEC §2, l_p): gradient ``p sign(e) |e|^{p-1}``.

    Args:
        p: exponent, at least 1.
        smooth: ``|e|`` is taken as ``sqrt(e^2 + smooth^2)``, so that the gradient can itself be
            differentiated at ``e = 0`` for every p. 0 gives the literal objective.

    Raises:
        ValueError: p < 1 (not convex) or smooth < 0.
    """
    if p < 1:
        raise ValueError(f"l_p needs p >= 1 to be convex, got {p}")
    if smooth < 0:
        raise ValueError(f"l_p smoothing must be >= 0, got {smooth}")

    def value(y: Tensor, v: Tensor) -> Tensor:
        return (((y - v).square() + smooth**2) ** (p / 2) - smooth**p).sum(-1)

    def grad(y: Tensor, v: Tensor) -> Tensor:
        e = y - v
        if smooth == 0:
            return p * e.sign() * e.abs() ** (p - 1)
        return p * e * (e.square() + smooth**2) ** (p / 2 - 1)

    def curvature(y: Tensor, v: Tensor) -> Tensor:
        if p == 2 or smooth == 0 and p < 2:
            return y.new_full(y.shape[:-1], max(1.0, p * (p - 1)))
        size = ((y - v).square() + smooth**2) ** (p / 2 - 1)
        return (p * max(p - 1, 1) * size.amax(-1)).clamp(min=1.0)

    return Objective("lp", value, grad, curvature)


def huber(delta: float = 1.0) -> Objective:
    """``sum_i h(e_i)``, ``h(e) = e^2/2`` for ``|e| <= delta``, else ``delta (|e| - delta/2)``.

    The gradient is ``e`` clipped to ``[-delta, delta]``: outliers are learned from, but not more
    than ``delta`` at a time (SPEC §2, Yaad).

    Raises:
        ValueError: delta <= 0.
    """
    if delta <= 0:
        raise ValueError(f"huber needs delta > 0, got {delta}")

    def value(y: Tensor, v: Tensor) -> Tensor:
        inside = (y - v).abs().clamp(max=delta)
        return (inside * ((y - v).abs() - 0.5 * inside)).sum(-1)

    return Objective("huber", value, lambda y, v: (y - v).clamp(-delta, delta))


OBJECTIVES: dict[str, Objective] = {"dot": dot(), "l2": l2(), "lp": lp(), "huber": huber()}
"""The objectives with their default parameters, by name."""


def get_objective(name: str, *, p: float = 3.0, delta: float = 1.0) -> Objective:
    """The objective called ``name`` with its parameter set.

    Raises:
        ValueError: no such objective.
    """
    if name == "lp":
        return lp(p)
    if name == "huber":
        return huber(delta)
    if name not in OBJECTIVES:
        raise ValueError(f"unknown objective {name!r}; choose one of {', '.join(OBJECTIVES)}")
    return OBJECTIVES[name]
