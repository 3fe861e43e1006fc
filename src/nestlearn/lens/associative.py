"""Recognisers of the library's own optimizers: what each remembers of gradients (§4, App. B, C)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from nestlearn.lens.findings import Memory, Rule
from nestlearn.lens.optimizers import (
    AVERAGE,
    DOT,
    MEAN,
    NEWTON_SCHULZ,
    SQUARE,
    SUM_OF_SQUARES,
    newton_schulz_flops,
)
from nestlearn.lens.registry import register_optimizer
from nestlearn.memory.structures import weight_shapes
from nestlearn.optim.associative import AssociativeMomentum
from nestlearn.optim.deep import DeepMomentum
from nestlearn.optim.delta import DeltaMomentum
from nestlearn.optim.generalized import GeneralizedGD
from nestlearn.optim.m3 import M3

DELTA = "1/2 |m g^T + 1|^2 (Eq. 48-49), g the gradient"
SUMS = "gradient descent, step 1"


def _sides(p: Tensor) -> tuple[int, int]:
    """Rows and columns of a parameter seen as a matrix ``out x rest``."""
    rows = p.shape[0] if p.ndim else 1
    return rows, p.numel() // max(1, rows)


@register_optimizer(M3)
def _m3(optimizer: M3, group: dict[str, Any], p: Tensor) -> Sequence[Memory]:
    """Two momenta of different frequencies and a second moment (Alg. 1, Eq. 75)."""
    if group["algorithm"] == "adamw":
        return (
            Memory("first moment", MEAN, ("exp_avg",), AVERAGE),
            Memory("second moment of AdamW", SQUARE, ("exp_avg_sq",), AVERAGE),
        )
    ema, period = group["form"] == "ema", group["frequency"]
    matrix = p.flatten(1) if group["layout"] == "flatten" else p
    flops = newton_schulz_flops(matrix, group["ns_steps"], group["ns_gram"])
    read = f"; read through {group['ns_steps']} Newton-Schulz steps"
    found = [
        Memory(
            "fast momentum",
            MEAN if ema else DOT,
            ("momentum",),
            (AVERAGE if ema else SUMS) + read,
            flops=flops,
        )
    ]
    if group["alpha"]:
        kind = group["ns_dtype"] or p.dtype
        found.append(
            Memory(
                "slow momentum",
                f"-<m, sum of {period} gradients>",
                ("slow_momentum", "slow_direction"),
                ("gradient descent, retention b3" if ema else SUMS) + read,
                period=period,
                bytes=p.numel() * (p.element_size() + kind.itemsize),
                flops=flops / period,
            )
        )
    if group["second_moment"]:
        objective, how = (SQUARE, AVERAGE) if ema else (SUM_OF_SQUARES, SUMS)
        found.append(Memory("second moment", objective, ("second_moment",), how))
    return found


@register_optimizer(DeltaMomentum)
def _delta(optimizer: DeltaMomentum, group: dict[str, Any], p: Tensor) -> Sequence[Memory]:
    how = f"gradient descent, retention {group['momentum']:g}"
    if not group["delta"]:
        return (Memory("momentum", DOT, ("momentum_buffer",), how),)
    rows, columns = _sides(p)
    short, long = min(rows, columns), max(rows, columns)
    whole = p.ndim >= 2 and group["structure"] == "matrix"
    flops = 4.0 * short * short * long if whole else 0.0
    return (Memory("momentum", DELTA, ("momentum_buffer",), f"proximal {how}", flops=flops),)


@register_optimizer(GeneralizedGD)
def _generalised(optimizer: GeneralizedGD, group: dict[str, Any], p: Tensor) -> Rule:
    """Hooked layers descend an objective on their own output (Def. 5, Eq. 53-60)."""
    memories: tuple[Memory, ...] = ()
    if group["momentum"]:
        how = f"gradient descent, retention {group['momentum']:g}"
        memories = (Memory("momentum", "-<m, G>, G the direction", ("momentum_buffer",), how),)
    if not any(p is own for layer in optimizer._layers.values() for own in layer.parameters(False)):
        return Rule(memories)
    name = "oja" if optimizer._oja else optimizer._objective.name
    texts = {"dot": "-<W x, u>", "l2": "1/2 |W x - u|^2", "oja": "-<W x, u> + 1/2 |W^T u|^2"}
    value = "-gradient of the task loss at W x" if optimizer._value is None else "generated"
    objective = f"{texts.get(name, f'{name} of (W x, u)')}, u = {value}"
    solver = "delta gradient descent" if name == "l2" else "generalised gradient descent"
    return Rule(memories, objective, solver)


@register_optimizer(AssociativeMomentum)
def _associative(
    optimizer: AssociativeMomentum, group: dict[str, Any], p: Tensor
) -> Sequence[Memory]:
    """The momentum and the memory behind its preconditioner, as the design says (Eq. 33-52)."""
    found = []
    first, second = "momentum", "second moment"
    if group["retention"] or group["readout"] != "memory":
        rows, columns = _sides(p)
        objective, flops = _objective(group, rows, columns)
        how = AVERAGE if group["rate"] is None else _retained(group["retention"])
        if group["output"] == "newton_schulz":
            how += f"; read through {group['ns_steps']} Newton-Schulz steps"
            flops += newton_schulz_flops(p.flatten(1), group["ns_steps"])
        before = group["value"] != "identity" and group["place"] == "gradient"
        needs = (second,) if before else ()
        found.append(Memory(first, objective, ("momentum",), how, needs=needs, flops=flops))
    if group["value"] != "identity":
        found.append(_second(group, p, second, first))
    return found


def _retained(retention: float) -> str:
    return f"gradient descent, retention {retention:g}"


def _objective(group: dict[str, Any], rows: int, columns: int) -> tuple[str, float]:
    feature = group["feature"]
    key = "g" if feature == "identity" else "phi(g)"
    if group["value"] != "identity" and group["place"] == "gradient":
        key = f"P {key}"
    tail = ", g the gradient"
    if group["objective"] == "dot":
        text = f"1/2 |m - {key}|^2" if group["rate"] is None else f"-<m, {key}>"
        return text + tail, 0.0
    name = {"l2": "1/2 |m {0}^T - I|^2"}.get(group["objective"], group["objective"] + "(m {0}, I)")
    matrix = group["structure"] == "matrix" and rows > 1 and columns > 1
    return name.format(key) + tail, 4.0 * rows * rows * columns if matrix else 0.0


def _second(group: dict[str, Any], p: Tensor, name: str, first: str) -> Memory:
    average = group["value_rate"] is None
    how = AVERAGE if average else _retained(group["value_retention"])
    seen, needs = ("g", ()) if group["place"] != "output" else ("sigma(m)", (first,))
    rows, columns = _sides(p)
    size = p.element_size()
    if group["value"] == "diagonal":
        text = f"1/2 |v - {seen}*{seen}|^2" if average else f"-<v, {seen}*{seen}>"
        return Memory(name, text, ("square",), how, needs=needs)
    if group["value"] == "full":
        count = p.numel()
        flops = 2.0 * count**3 + 2.0 * count**2
        return Memory(name, "-<H, g g^T>", ("outer",), how, bytes=size * count**2, flops=flops)
    flops = 4.0 * rows * rows * columns + 2.0 * rows**3
    held = rows * rows
    if p.ndim > 1:
        flops += 4.0 * rows * columns * columns + 2.0 * columns**3
        held += columns * columns
    objective = "-<L, g g^T> - <R, g^T g>"
    return Memory(name, objective, ("left", "right"), how, bytes=size * held, flops=flops)


@register_optimizer(DeepMomentum)
def _deep(optimizer: DeepMomentum, group: dict[str, Any], p: Tensor) -> Sequence[Memory]:
    """A network per matrix that rows of gradients are written into (Eq. 50, 52)."""
    if p.ndim < 2:
        return (Memory("momentum", DOT, ("momentum_buffer",), _retained(group["momentum"])),)
    rows, columns = _sides(p)
    depth = group["depth"]
    shapes = weight_shapes(columns, columns, depth, group["width"] or min(columns, 64))
    sizes = [out * into for out, into in shapes]
    total, first = sum(sizes), sizes[0]
    # Per row of the gradient: forward, backward, outer products, and the answer that is read.
    flops = float(rows * (2 * total + 2 * (total - first) + 2 * total + 2 * total))
    solver = f"gradient descent, step {group['inner_lr']:g}, retention {group['retention']:g}"
    if group["output"] == "newton_schulz":
        flops += newton_schulz_flops(p.flatten(1), NEWTON_SCHULZ)
        solver += f"; read through {NEWTON_SCHULZ} Newton-Schulz steps"
    text = {"dot": "-<m(k), v>", "l2": "1/2 |m(k) - v|^2"}[group["objective"]]
    value = "k = v = g / |g|" if group["value"] == "gradient" else "k = g / |g|, v = 1"
    state = [f"weight_{i}" for i in range(depth)] + [f"initial_{i}" for i in range(depth - 1)]
    held = (2 * total - sizes[-1]) * p.element_size()
    name = "deep momentum"
    objective = f"{text}, {value}, g the gradient"
    return (Memory(name, objective, tuple(state), solver, bytes=held, flops=flops),)
