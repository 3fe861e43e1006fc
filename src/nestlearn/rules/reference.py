"""Each learning rule as one token step that reads like its equation (SPEC §2, §3.5).

``M (..., d_out, d_in)`` is a linear memory, ``k (..., d_in)`` a key, ``v (..., d_out)`` a value,
``g`` the gradient of the objective at the memory's output, and ``eta, alpha, beta (...)`` one
scalar per memory. The fast forms are tested against these.

Example:
    >>> M = hebbian(torch.zeros(2, 2), torch.tensor([1.0, 0.0]), torch.tensor([3.0, 4.0]), 1.0, 1.0)
    >>> M
    tensor([[3., 0.],
            [4., 0.]])
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Gate = Tensor | float


def outer(a: Tensor, b: Tensor) -> Tensor:
    """``a b^T``."""
    return a[..., :, None] * b[..., None, :]


def read(M: Tensor, k: Tensor) -> Tensor:
    """``M k``."""
    return (M @ k[..., None])[..., 0]


def hebbian(M: Tensor, k: Tensor, v: Tensor, eta: Gate, alpha: Gate) -> Tensor:
    """``alpha M + eta v k^T`` (Eq. 64): a gradient step on ``-<M k, v>``."""
    return _s(alpha) * M + _s(eta) * outer(v, k)


def delta(
    M: Tensor, k: Tensor, v: Tensor, eta: Gate, alpha: Gate, decay_eta: Gate | None = None
) -> Tensor:
    """``alpha M - eta (M k - v) k^T`` (Eq. 65): a gradient step on ``1/2 ||M k - v||^2``.

    ``decay_eta`` is the coefficient of ``M k k^T`` where it differs from ``eta``: gated DeltaNet's
    ``alpha M (I - eta k k^T) + eta v k^T`` has ``decay_eta = alpha eta``.
    """
    decay = eta if decay_eta is None else decay_eta
    return _s(alpha) * M - _s(decay) * outer(read(M, k), k) + _s(eta) * outer(v, k)


def oja(
    M: Tensor, k: Tensor, v: Tensor, eta: Gate, alpha: Gate, decay_eta: Gate | None = None
) -> Tensor:
    """``alpha M + eta v (k - M^T v)^T`` (Eq. 66-67): a step on ``-<M k, v> + 1/2 ||M^T v||^2``."""
    decay = eta if decay_eta is None else decay_eta
    return _s(alpha) * M + _s(eta) * outer(v, k) - _s(decay) * outer(v, read(M.mT, v))


def lp(M: Tensor, k: Tensor, v: Tensor, eta: Gate, alpha: Gate, p: float = 3.0) -> Tensor:
    """``alpha M - eta p sign(e) |e|^{p-1} k^T``, ``e = M k - v``: ``||M k - v||_p^p`` (Moneta)."""
    e = read(M, k) - v
    return _s(alpha) * M - _s(eta) * outer(p * e.sign() * e.abs() ** (p - 1), k)


def huber(M: Tensor, k: Tensor, v: Tensor, eta: Gate, alpha: Gate, threshold: float = 1.0):
    """``alpha M - eta clip(M k - v, -threshold, threshold) k^T``: the Huber loss (Yaad)."""
    e = read(M, k) - v
    return _s(alpha) * M - _s(eta) * outer(e.clamp(-threshold, threshold), k)


def kl(M: Tensor, k: Tensor, v: Tensor, eta: Gate, alpha: Gate, scale: float = 1.0) -> Tensor:
    """``scale softmax(alpha log M - eta (M k - v) k^T)``: KL retention (Memora).

    Every row of M is a point of the simplex times ``scale``; a step minimises the linearised
    objective plus a KL divergence to the last row (and, for alpha < 1, to the uniform one). The
    softmax runs over the inputs of a row.
    """
    gradient = outer(read(M, k) - v, k)
    return scale * torch.softmax(_s(alpha) * M.log() - _s(eta) * gradient, dim=-1)


def omega(
    M: Tensor, pairs: Sequence[tuple[Tensor, Tensor, Gate]], eta: Gate, alpha: Gate
) -> Tensor:
    """``alpha M - eta sum_j w_j (M k_j - v_j) k_j^T`` over the window's last c pairs (Eq. 68, l2).

    Args:
        pairs: ``(k_j, v_j, w_j)`` of the window, the current pair included.
    """
    total = torch.zeros_like(M)
    for k, v, w in pairs:
        total = total + _s(w) * outer(read(M, k) - v, k)
    return _s(alpha) * M - _s(eta) * total


def momentum(
    M: Tensor, S: Tensor, k: Tensor, v: Tensor, eta: Gate, alpha: Gate, beta: Gate
) -> tuple[Tensor, Tensor]:
    """``S <- beta S - eta (M k - v) k^T; M <- alpha M + S`` (Titans). Returns M and S."""
    S = _s(beta) * S - _s(eta) * outer(read(M, k) - v, k)
    return _s(alpha) * M + S, S


def dgd(
    M: Tensor, k: Tensor, g: Tensor, eta: Gate, alpha: Gate, decay_eta: Gate | None = None
) -> Tensor:
    """``M (alpha I - decay_eta k k^T) - eta g k^T`` (Eq. 57, 88); ``decay_eta`` is eta if None."""
    decay = eta if decay_eta is None else decay_eta
    return _s(alpha) * M - _s(decay) * outer(read(M, k), k) - _s(eta) * outer(g, k)


def dgd_momentum(
    M: Tensor,
    S: Tensor,
    k: Tensor,
    g: Tensor,
    eta: Gate,
    alpha: Gate,
    beta: Gate,
    decay_eta: Gate | None = None,
) -> tuple[Tensor, Tensor]:
    """``S <- beta S - eta g k^T; M <- M (alpha I - decay_eta k k^T) + S`` (SPEC §4, Tab. 6)."""
    decay = eta if decay_eta is None else decay_eta
    S = _s(beta) * S - _s(eta) * outer(g, k)
    return _s(alpha) * M - _s(decay) * outer(read(M, k), k) + S, S


def _s(gate: Gate) -> Gate:
    """A scalar per memory, shaped to multiply a matrix."""
    return gate[..., None, None] if isinstance(gate, Tensor) else gate
