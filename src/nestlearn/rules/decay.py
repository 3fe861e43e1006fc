"""Cumulative retention in log space (SPEC §4).

Within a chunk the retention of token ``s`` seen from token ``t`` is ``gamma_t / gamma_s`` with
``gamma_t = prod_{s <= t} alpha_s``. The products may underflow; their ratios are at most 1 and are
formed as ``exp`` of a difference of logarithms, so alpha is never divided by.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SMALLEST_RETENTION = 1e-20
"""Smaller retention counts as "everything is forgotten" (keeps logarithm and gradient finite)."""


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type that decays and triangular solves run in: at least float32."""
    return torch.promote_types(dtype, torch.float32)


def log_cumulative(alpha: Tensor) -> Tensor:
    """``log gamma_t = sum_{s <= t} log alpha_s`` (SPEC §4).

    Args:
        alpha: retention in [0, 1], ``(..., C)``.

    Returns:
        ``(..., C)``, float32 (float64 for float64 input), non-increasing along C.

    Example:
        >>> log_cumulative(torch.tensor([0.5, 0.5])).exp()
        tensor([0.5000, 0.2500])
    """
    safe = alpha.to(wide(alpha.dtype)).clamp(min=SMALLEST_RETENTION)
    return safe.log().cumsum(-1)


def decay_matrix(log_gamma: Tensor) -> Tensor:
    """``D[t, s] = gamma_t / gamma_s`` for ``s <= t``, else 0: ``(..., C) -> (..., C, C)``.

    Example:
        >>> decay_matrix(log_cumulative(torch.tensor([0.5, 0.5])))
        tensor([[1.0000, 0.0000],
                [0.5000, 1.0000]])
    """
    length = log_gamma.shape[-1]
    past = torch.ones(length, length, dtype=torch.bool, device=log_gamma.device).tril()
    ratio = log_gamma[..., :, None] - log_gamma[..., None, :]
    # The mask comes before exp: above the diagonal exp would overflow and its gradient be inf * 0.
    return ratio.masked_fill(~past, -torch.inf).exp()


def previous_rows(matrix: Tensor) -> Tensor:
    """Shift rows down by one, zeros first: ``D[t, s] -> D[t-1, s]``, strictly lower triangular."""
    return F.pad(matrix[..., :-1, :], (0, 0, 1, 0))


def previous(log_gamma: Tensor) -> Tensor:
    """Shift by one token: ``log gamma_t -> log gamma_{t-1}`` with ``log gamma_0 = 0``."""
    return F.pad(log_gamma[..., :-1], (1, 0))


def unit_lower_inverse(strict: Tensor) -> Tensor:
    """``(I + L)^{-1}`` of strictly lower triangular ``L``, ``(..., C, C)``, by substitution.

    The inverse rather than one solve, so that memories which share a key share the work. (The power
    series of L would need no substitution but cancels catastrophically when keys repeat.)
    """
    return _UnitLowerInverse.apply(strict)


class _UnitLowerInverse(torch.autograd.Function):
    """With the inverse at hand its gradient ``-X^T g X^T`` is two products, not two more solves."""

    @staticmethod
    def forward(ctx, strict: Tensor) -> Tensor:
        eye = torch.eye(strict.shape[-1], dtype=strict.dtype, device=strict.device)
        inverse = torch.linalg.solve_triangular(
            strict, eye.expand_as(strict), upper=False, unitriangular=True
        )
        ctx.save_for_backward(inverse)
        return inverse

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (inverse,) = ctx.saved_tensors
        return (inverse.mT @ grad).neg_().matmul(inverse.mT).tril_(-1)
