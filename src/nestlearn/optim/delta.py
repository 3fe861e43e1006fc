"""Delta momentum: a momentum that forgets along the direction it is about to learn (Eq. 48-49)."""

from __future__ import annotations

from typing import Any, Unpack

import torch
from torch import Tensor

from nestlearn.optim.base import Common, GradientOptimizer, check, choose
from nestlearn.optim.sharding import gather, local, own_part


class DeltaMomentum(GradientOptimizer):
    """Momentum learned with the delta rule (Eq. 48-49).

    The momentum m is an associative memory whose inner objective is the regression
    ``1/2 ||m g^T + 1||^2`` on the gradient g instead of momentum's dot product ``<m, g>``. One
    gradient step on it, with retention ``momentum``, gives for a matrix ``(out, in)``

        m <- m (momentum I - e' g^T g) - g,    W <- (1 - lr weight_decay) W + lr m
        e' = delta / (1 + delta ||g||^2)

    and for vectors and scalars, entry by entry, ``m <- m (momentum - delta g^2 / (1 + delta g^2)) -
    g``. So what the memory holds along the present gradient is replaced rather than added to, and
    the more so the larger the gradient. ``e'`` is the exact proximal step: it never overshoots
    (the paper has delta itself). ``m g^T g`` is computed as ``(m g^T) g`` or ``m (g^T g)``,
    whichever is smaller. With ``delta=0`` this is ``torch.optim.SGD(momentum=...)``.

    The state ``momentum_buffer`` holds -m, as in ``torch.optim.SGD``.

    Args:
        params: a model, parameters or groups.
        lr: learning rate.
        momentum: retention of the momentum, in [0, 1).
        delta: the inner learning rate, 0 or more. It multiplies squared gradients.
        weight_decay: decoupled.
        normalize: take g over its norm (entry by entry: over its root mean square) in the decay, so
            that delta does not depend on the gradient's scale.
        structure: ``"matrix"``, or ``"elementwise"`` for all parameters.
        decay_dtype: what the products ``m g^T g`` are computed in; None for the parameters' own.
            In bfloat16 the forgotten part is rounded to 8 bits, where that is fast it costs a
            fraction.
        common: see `Common`.

    Raises:
        ValueError: an option out of range.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([1.0]))
        >>> optimizer = DeltaMomentum([w], lr=0.1, momentum=0.9, delta=1.0)
        >>> for _ in range(2):
        ...     w.grad = torch.tensor([1.0])
        ...     optimizer.step()
        >>> optimizer.state[w]["momentum_buffer"]  # 1 (0.9 - 1/2) + 1
        tensor([1.4000])
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-2,
        momentum: float = 0.9,
        delta: float = 1.0,
        weight_decay: float = 0.0,
        *,
        normalize: bool = False,
        structure: str = "matrix",
        decay_dtype: torch.dtype | None = None,
        **common: Unpack[Common],
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "delta": delta,
            "weight_decay": weight_decay,
            "normalize": normalize,
            "structure": structure,
            "decay_dtype": decay_dtype,
        }
        super().__init__(params, defaults, common)

    def _check(self, group: dict[str, Any]) -> None:
        check(group, "momentum", high=1.0)
        check(group, "delta")
        choose("structure", group["structure"], ("matrix", "elementwise"))

    def _initial(self, group: dict[str, Any], p: Tensor) -> dict[str, Any]:
        zeros = torch.zeros_like(p, memory_format=torch.preserve_format)
        return {"momentum_buffer": zeros.detach()}

    def _update(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        parts = [local(p) for p in params]
        buffers = [local(self.state[p]["momentum_buffer"]) for p in params]
        pieces = [local(g) for g in grads]
        if group["delta"]:
            old = [m.clone() for m in buffers] if torch.is_grad_enabled() else buffers
            forgotten = [
                self._forgotten(group, p, m, g) for p, m, g in zip(params, old, pieces, strict=True)
            ]
        torch._foreach_mul_(buffers, group["momentum"])
        if group["delta"]:
            torch._foreach_sub_(
                buffers, [x.to(m.dtype) for x, m in zip(forgotten, buffers, strict=True)]
            )
        torch._foreach_add_(buffers, pieces)
        descend(group, parts, buffers)

    def _forgotten(self, group: dict[str, Any], p: Tensor, m: Tensor, g: Tensor) -> Tensor:
        """``e' m g^T g``: what leaves the memory, this process's part of it."""
        if p.ndim < 2 or group["structure"] == "elementwise":
            square = g.square()
            if group["normalize"]:
                mean = gather(square, p).mean()
                square = square / mean.clamp(min=torch.finfo(g.dtype).tiny)
            return m * (group["delta"] * square / (1 + group["delta"] * square))
        m, g = gather(m, p).flatten(1), gather(g, p).flatten(1)
        square = g.square().sum()
        if group["normalize"]:
            g = g * square.clamp(min=torch.finfo(g.dtype).tiny).rsqrt()
            square = torch.ones_like(square)
        rate = group["delta"] / (1 + group["delta"] * square)
        rows, columns = g.shape
        kind = group["decay_dtype"] or g.dtype
        m, g, rate = m.to(kind), g.to(kind), rate.to(kind)
        term = (m @ g.mT * rate) @ g if rows <= columns else m @ (g.mT @ g * rate)
        return own_part(term.view(p.shape), p)


def descend(group: dict[str, Any], params: list[Tensor], directions: list[Tensor]) -> None:
    """``W <- (1 - lr weight_decay) W - lr direction``, on each process's part."""
    lr = group["lr"]
    if group["weight_decay"]:
        torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
    if isinstance(lr, Tensor) and not group["capturable"] and not lr.requires_grad:
        lr = lr.item()
    if isinstance(lr, Tensor):
        torch._foreach_sub_(params, torch._foreach_mul(directions, lr))
    else:
        torch._foreach_add_(params, directions, alpha=-lr)
