"""Delta momentum: a momentum that forgets along the direction it is about to learn (Eq. 48-49)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Unpack

import torch
from torch import Tensor

from nestlearn.optim.base import Common, GradientOptimizer, check, choose
from nestlearn.optim.blocks import in_blocks
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
        # What is differentiated through must not be changed block by block.
        run = whole if torch.is_grad_enabled() else in_blocks
        kinds: tuple[list[int], list[int]] = ([], [])
        for i, p in enumerate(params):
            entries = p.ndim < 2 or group["structure"] == "elementwise" or not group["delta"]
            kinds[entries].append(i)
        squares = [
            self._mean_square(group, params[i], pieces[i]) if i in kinds[True] else None
            for i in range(len(params))
        ]
        for i in kinds[False]:
            self._forget(group, params[i], buffers[i], pieces[i])

        def learn(entries: bool) -> Callable[..., None]:
            def update(rows: list[int], p: list[Tensor], m: list[Tensor], g: list[Tensor]) -> None:
                if not entries:
                    torch._foreach_add_(m, g)
                elif not group["delta"]:
                    torch._foreach_mul_(m, group["momentum"])
                    torch._foreach_add_(m, g)
                else:
                    for k, mk, gk in zip(rows, m, g, strict=True):
                        _by_entries(group, squares[kinds[True][k]], mk, gk)
                descend(group, p, m)

            return update

        for entries in (False, True):
            own = kinds[entries]
            if own:
                run(learn(entries), *([xs[i] for i in own] for xs in (parts, buffers, pieces)))

    def _mean_square(self, group: dict[str, Any], p: Tensor, g: Tensor) -> Tensor | None:
        """Of all of a parameter's gradient, where delta is measured in it."""
        if not (group["normalize"] and group["delta"]):
            return None
        return gather(g.square(), p).mean().clamp(min=torch.finfo(g.dtype).tiny)

    def _forget(self, group: dict[str, Any], p: Tensor, buffer: Tensor, piece: Tensor) -> None:
        """``m <- m (momentum I - e' g^T g)``, of this process's part of m."""
        m = gather(buffer.clone() if torch.is_grad_enabled() else buffer, p).flatten(1)
        g = gather(piece, p).flatten(1)
        square = g.square().sum()
        if group["normalize"]:
            g = g * square.clamp(min=torch.finfo(g.dtype).tiny).rsqrt()
            square = torch.ones_like(square)
        rate = group["delta"] / (1 + group["delta"] * square)
        kind = group["decay_dtype"] or g.dtype
        g, rate = g.to(kind), rate.to(kind)
        # m g^T g is a product of two, of which the smaller is made first.
        thin = g.shape[0] <= g.shape[1]
        left = m.to(kind) @ g.mT * rate if thin else m.to(kind)
        right = g if thin else g.mT @ g * rate
        if kind == m.dtype and m.data_ptr() == buffer.data_ptr() and buffer.ndim == 2:
            source = left if thin else left.clone()
            buffer.addmm_(source, right, beta=group["momentum"], alpha=-1)
            return
        forgotten = own_part((left @ right).view(p.shape), p)
        buffer.mul_(group["momentum"]).sub_(forgotten.to(buffer.dtype))


def _by_entries(group: dict[str, Any], mean: Tensor | None, m: Tensor, g: Tensor) -> None:
    """``m <- m (momentum - delta g^2 / (1 + delta g^2)) + g``; g^2 over ``mean`` if there is one.

    The fraction is computed as ``1 - 1 / (1 + delta g^2)``, in few passes over memory.
    """
    square = g.square() if mean is None else g.square() / mean
    kept = square.mul_(group["delta"]).add_(1).reciprocal_()
    m.mul_(kept + (group["momentum"] - 1)).add_(g)


def whole(function: Callable[..., None], *lists: list[Any]) -> None:
    """`in_blocks` in one block."""
    function(range(len(lists[0])), *lists)


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
