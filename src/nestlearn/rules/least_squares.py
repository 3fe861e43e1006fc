"""The exact delta rule: a memory that is the least-squares solution of everything it was told.

A step of delta gradient descent solves a proximal problem whose metric is the identity (SPEC §3.5);
with the metric of all keys so far, ``P = (A_0 + sum k k^T)^{-1}``, the same step solves

    min_M  sum_i ||M k_i - v_i||^2 + tr(M A_0 M^T)

exactly (recursive least squares). The solution depends on what was read, not on the order: nothing
is forgotten, and two memories are joined by adding their sums ``sum k k^T`` and ``sum v k^T``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nestlearn.rules.reference import outer, read


def least_squares(M: Tensor, P: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """One pair: ``M <- M - (M k - v) (P k)^T / (1 + k^T P k)``, and P by Sherman-Morrison.

    With ``P = eta I`` the step is SPEC §3.5's proximal one, ``eta / (1 + eta ||k||^2)``.

    Args:
        M: memory ``(d_out, d_in)``; zero at the beginning.
        P: running inverse ``(d_in, d_in)``; ``A_0^{-1}`` at the beginning.
        k, v: key ``(d_in,)`` and value ``(d_out,)``.

    Returns:
        M and P after the step.

    Example:
        >>> M, P = torch.zeros(1, 2), torch.eye(2)
        >>> least_squares(M, P, torch.tensor([1.0, 0.0]), torch.tensor([4.0]))[0]
        tensor([[2., 0.]])
    """
    Pk = read(P, k)
    size = 1.0 + (k * Pk).sum(-1)
    M = M - outer(read(M, k) - v, Pk) / size[..., None, None]
    return M, P - outer(Pk, Pk) / size[..., None, None]


def solve(gram: Tensor, cross: Tensor, prior: Tensor) -> Tensor:
    """``M = (sum v k^T) (A_0 + sum k k^T)^{-1}``, in float64.

    Args:
        gram: ``sum k k^T (d_in, d_in)``.
        cross: ``sum v k^T (d_out, d_in)``.
        prior: A_0, symmetric and positive definite.

    Returns:
        M ``(d_out, d_in)`` in ``cross``'s type.

    Raises:
        ValueError: a matrix that is not positive definite: the sums are damaged.

    Example:
        >>> k, v = torch.tensor([[1.0, 0.0]]), torch.tensor([[4.0]])
        >>> solve(k.T @ k, v.T @ k, torch.eye(2))
        tensor([[2., 0.]])
    """
    factor, failed = torch.linalg.cholesky_ex(gram.double() + prior.double())
    if failed.item():
        raise ValueError("the sums of a least-squares memory are not positive definite")
    return torch.cholesky_solve(cross.double().mT, factor).mT.to(cross.dtype)
