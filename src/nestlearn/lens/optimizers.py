"""Recognisers of optimizers: which memories they keep of gradients (§4, App. B).

The objectives are exact readings of the code: ``m <- beta m + g`` is a gradient step on
``-<m, g>`` (with retention beta), ``m <- m + (1 - beta) (g - m)`` one on ``1/2 |m - g|^2`` with
step ``1 - beta``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from nestlearn.lens.findings import Memory, Rule
from nestlearn.lens.registry import register_optimizer, rule_of
from nestlearn.levels.clock import NEVER
from nestlearn.optim.multirate import MultiRate

DOT = "-<m, g>, g the gradient"
MEAN = "1/2 |m - g|^2, g the gradient"
SQUARE = "1/2 |v - g*g|^2, g the gradient"
SUM_OF_SQUARES = "-<s, g*g>, g the gradient"
AVERAGE = "gradient descent, step 1 - beta"
NEWTON_SCHULZ = 5  # iterations of torch.optim.Muon unless its group says otherwise


@dataclasses.dataclass(frozen=True)
class Update:
    """How one parameter is updated.

    Attributes:
        optimizer: name of the class that does it.
        period: optimizer steps between two updates; `NEVER`: frozen.
        rule: how; None: the optimizer is not known.
        state: state of this parameter, so far, by key.
        accumulated: bytes that a slow level gathers gradients in.
    """

    optimizer: str
    period: int
    rule: Rule | None
    state: dict[str, Any]
    accumulated: int = 0

    def size(self, memory: Memory, parameter: Tensor) -> int:
        """Bytes of a memory of ``parameter``: as they are, or as they will be after a step."""
        present = [self.state[k] for k in memory.state if torch.is_tensor(self.state.get(k))]
        if present:
            return sum(t.numel() * t.element_size() for t in present)
        if memory.bytes is not None:
            return memory.bytes
        return parameter.numel() * parameter.element_size()


def updates_of(optimizers: Sequence[Optimizer]) -> dict[Tensor, Update]:
    """Per parameter, how it is updated.

    Raises:
        ValueError: two optimizers hold the same parameter.
    """
    found: dict[Tensor, Update] = {}
    for optimizer, period in _leaves(optimizers):
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p in found:
                    raise ValueError(
                        f"a parameter of shape {tuple(p.shape)} is in {found[p].optimizer} and in "
                        f"{type(optimizer).__name__}; give each parameter to one optimizer"
                    )
                rare = 1 < period < NEVER
                size = torch.promote_types(p.dtype, torch.float32).itemsize
                found[p] = Update(
                    type(optimizer).__name__,
                    period,
                    rule_of(optimizer, group, p),
                    dict(optimizer.state.get(p, {})),
                    size * p.numel() if rare else 0,
                )
    return found


def _leaves(optimizers: Sequence[Optimizer]) -> Iterator[tuple[Optimizer, int]]:
    """The optimizers that do the work, each with its period in steps."""
    for optimizer in optimizers:
        if isinstance(optimizer, MultiRate):
            for level in optimizer.levels.values():
                yield level.optimizer, level.period
        elif isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
            yield from _leaves([inner])  # accelerate's wrapper
        else:
            yield optimizer, 1


# -- torch.optim -------------------------------------------------------------------------------


@register_optimizer(torch.optim.SGD)
def _sgd(optimizer: Any, group: dict[str, Any], p: Tensor) -> Sequence[Memory]:
    if not group["momentum"]:
        return ()
    how = f"gradient descent, retention {group['momentum']:g}"
    how += ", Nesterov" if group["nesterov"] else ""
    return (Memory("momentum", DOT, ("momentum_buffer",), how),)


def _adam_like(square: str, second: str = "exp_avg_sq") -> Any:
    def memories(optimizer: Any, group: dict[str, Any], p: Tensor) -> Sequence[Memory]:
        found = [
            Memory("first moment", MEAN, ("exp_avg",), AVERAGE),
            Memory("second moment", square, (second,), AVERAGE),
        ]
        if group.get("amsgrad"):
            found.append(
                Memory(
                    "largest second moment",
                    "max over time of v",
                    ("max_exp_avg_sq",),
                    "maximum",
                    needs=("second moment",),
                )
            )
        return found

    return memories


for _adam in (torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam):
    register_optimizer(_adam)(_adam_like(SQUARE))
register_optimizer(torch.optim.Adamax)(_adam_like("max of beta v and |g|", "exp_inf"))


@register_optimizer(torch.optim.Adagrad)
def _adagrad(optimizer: Any, group: dict[str, Any], p: Tensor) -> Sequence[Memory]:
    return (Memory("sum of squares", SUM_OF_SQUARES, ("sum",), "gradient descent, step 1"),)


@register_optimizer(torch.optim.RMSprop)
def _rmsprop(optimizer: Any, group: dict[str, Any], p: Tensor) -> Sequence[Memory]:
    found = [Memory("second moment", SQUARE, ("square_avg",), AVERAGE)]
    if group["centered"]:
        found.append(Memory("first moment", MEAN, ("grad_avg",), AVERAGE))
    if group["momentum"]:
        # m <- mu m + g / sqrt(v): it needs the v of the same step.
        needed = tuple(m.name for m in found)
        found.append(
            Memory(
                "momentum",
                "-<m, g / sqrt(v)>",
                ("momentum_buffer",),
                f"gradient descent, retention {group['momentum']:g}",
                needs=needed,
            )
        )
    return found


@register_optimizer(torch.optim.Adadelta)
def _adadelta(optimizer: Any, group: dict[str, Any], p: Tensor) -> Sequence[Memory]:
    return (
        Memory("second moment", SQUARE, ("square_avg",), AVERAGE),
        Memory(
            "second moment of the steps",
            "1/2 |u - step*step|^2",
            ("acc_delta",),
            AVERAGE,
            needs=("second moment",),
        ),
    )


@register_optimizer(lambda optimizer: type(optimizer) is getattr(torch.optim, "Muon", None))
def _muon(optimizer: Any, group: dict[str, Any], p: Tensor) -> Sequence[Memory]:
    steps = group.get("ns_steps", NEWTON_SCHULZ)
    return (
        Memory(
            "momentum",
            MEAN,
            ("momentum_buffer",),
            f"{AVERAGE}; read through {steps} Newton-Schulz steps",
            flops=newton_schulz_flops(p, steps),
        ),
    )


def newton_schulz_flops(matrix: Tensor, steps: int, gram: bool = False) -> float:
    """``steps (4 m^2 n + 2 m^3)`` for an m x n matrix, m <= n (quintic iteration); further leading
    dimensions count as a batch.

    With ``gram`` and ``n >= 2 m`` (`nestlearn.optim.newton_schulz`), per run of k <= 3 steps:
    ``4 m^2 n`` at its ends, and ``2 k + 6 (k - 1)`` times ``m^3`` in between.

    Example:
        >>> newton_schulz_flops(torch.empty(2, 3), 1)
        64.0
    """
    if matrix.ndim < 2:
        return 0.0
    m, n = sorted(matrix.shape[-2:])
    batch = matrix.numel() // max(1, m * n)
    if gram and n >= 2 * m:
        runs = [k for k in (min(3, steps), steps - 3) if k > 0]
        return float(batch * sum(4 * m * m * n + (2 * k + 6 * (k - 1)) * m**3 for k in runs))
    return float(batch * steps * (4 * m * m * n + 2 * m**3))
