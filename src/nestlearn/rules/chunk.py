"""Exact chunk-parallel forms of the learning rules (SPEC §2, §4; Eq. 88-93).

All rules write rank-one terms, so after ``t`` tokens of a chunk that starts at ``M_0`` (and, with
momentum, ``S_0``)

    M_t = gamma_t M_0 + c_t S_0 + sum_s mix[t, s] u_s k_s^T

and a rule only has to say what ``mix`` and ``u`` are. `ChunkWrite` holds these and gives the memory
after the chunk and the token-level read-out ``M_t q_t`` for all t at once.

Shapes: ``M (..., d_out, d_in)``, keys ``K (..., C, d_in)``, values or output gradients
``V, G (..., C, d_out)``, gates ``eta, alpha, beta (..., C)``; the leading dimensions broadcast.
Decays and triangular solves run in float32 (float64 for float64), products in the type of K.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from nestlearn.rules.decay import (
    decay_matrix,
    log_cumulative,
    previous,
    previous_rows,
    unit_lower_inverse,
    wide,
)


@dataclass
class ChunkWrite:
    """What one chunk writes: ``M_t = gamma_t M_0 + c_t S_0 + sum_s mix[t, s] u_s k_s^T``.

    Attributes:
        start: memory before the chunk, ``M_0``.
        gamma: cumulative retention, ``(..., C)``.
        keys: ``k_s``, ``(..., N, d_in)``; N is C, plus the window's past pairs for Omega.
        terms: pairs ``(mix (..., C, N), u (..., N, d_out))``.
        momentum_start: ``S_0``, or None without momentum.
        momentum_gain: ``c_t``, ``(..., C)``.
        memory: memory after the chunk, ``M_C``.
        momentum: ``S_C``, or None without momentum.
    """

    start: Tensor
    gamma: Tensor
    keys: Tensor
    terms: tuple[tuple[Tensor, Tensor], ...]
    momentum_start: Tensor | None = None
    momentum_gain: Tensor | None = None
    momentum: Tensor | None = None
    memory: Tensor = field(init=False)

    def __post_init__(self) -> None:
        total = scale_rows(self.terms[0][0][..., -1, :], self.terms[0][1])
        for mix, u in self.terms[1:]:
            total = total + scale_rows(mix[..., -1, :], u)
        memory = self.gamma[..., -1, None, None] * self.start + product(total.mT, self.keys)
        if self.momentum_start is not None and self.momentum_gain is not None:
            memory = memory + self.momentum_gain[..., -1, None, None] * self.momentum_start
        self.memory = memory.to(self.start.dtype)

    def finish(self) -> tuple[Tensor, Tensor | None]:
        """Memory and momentum after the chunk."""
        return self.memory, self.momentum

    def read(self, queries: Tensor, first: int = 0) -> Tensor:
        """Token-level read-out ``M_t q_t``, each token after its own write.

        Args:
            queries: ``(..., C - first, d_in)``, those of the tokens from ``first`` on.
            first: tokens of the chunk that are not read (they were read in an earlier call).

        Returns:
            ``(..., C - first, d_out)``.
        """
        out = scale_rows(self.gamma[..., first:], product(queries, self.start.mT))
        if self.momentum_start is not None and self.momentum_gain is not None:
            gain = self.momentum_gain[..., first:]
            out = out + scale_rows(gain, product(queries, self.momentum_start.mT))
        scores = product(queries, self.keys.mT)
        for mix, u in self.terms:
            out = out + product((mix[..., first:, :] * scores).to(queries.dtype), u)
        return out.to(queries.dtype)


@dataclass
class Factor:
    """The part of a DGD chunk that depends on keys and gates only; memories that read the same key
    share it (make it with `dgd_factor`, broadcastable to every memory)."""

    log_gamma: Tensor
    mix: Tensor
    lower: Tensor
    inverse: Tensor


def product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` in the narrower of both types, returned as at least float32."""
    narrow = a.dtype if a.element_size() <= b.element_size() else b.dtype
    return (a.to(narrow) @ b.to(narrow)).to(wide(narrow))


def scale_rows(scale: Tensor, x: Tensor) -> Tensor:
    """``diag(scale) x`` for ``scale (..., C)`` and ``x (..., C, d)``."""
    return scale[..., None] * x


def proximal(eta: Tensor, inputs: Tensor) -> Tensor:
    """``eta' = eta / (1 + eta ||x||^2)``: the exact proximal step of SPEC §3.5, which never
    overshoots: ``eta' ||x||^2 < 1`` for every input.

    Args:
        eta: ``(..., C)``.
        inputs: what the written layer reads, ``(..., C, d_in)``.
    """
    square = inputs.to(wide(inputs.dtype)).square().sum(-1)
    return eta / (1 + eta * square)


def steady(
    eta: Tensor, inputs: Tensor, chunk: int, gain: Tensor | float = 1.0, first: int = 0
) -> Tensor:
    """The proximal step for gradients that are frozen over a chunk of C tokens (**our choice**).

    A chunk adds up C steps taken at one point, so keys that resemble each other overshoot although
    each step alone would not. The step is damped by the curvature that the chunk will have along
    its own input if it goes on as it began:

        eta'_t = eta_t / (1 + gain C/t sum_{s<=t} eta_s (a_s . a_t)^2 / ||a_t||^2)

    C equal inputs then add up to ``C eta/(1 + C eta)`` < 1 of the way; C = 1 is `proximal`.

    Args:
        eta: ``(..., N)``, the tokens of the chunk so far.
        inputs: what the written layer reads, ``(..., N, d_in)``.
        chunk: C.
        gain: factor on the curvature, ``1/(1 - beta)`` under momentum, broadcastable to eta.
        first: tokens of N that come before the chunk (a window's).
    """
    a = inputs.to(wide(inputs.dtype))
    gram = a @ a.mT
    length = eta.shape[-1]
    norm = gram.diagonal(dim1=-2, dim2=-1).clamp(min=1e-12)
    along = (gram.square().tril() @ eta.to(a.dtype)[..., None])[..., 0] / norm
    count = torch.arange(1, length + 1, device=eta.device, dtype=a.dtype)
    ahead = (chunk + first) / count
    return eta / (1 + gain * ahead * along)


def dgd_factor(K: Tensor, eta: Tensor, alpha: Tensor) -> Factor:
    """Factorise the chunk: ``L[t, s] = eta_t gamma_{t-1}/gamma_s (k_t . k_s)``, s < t (SPEC §4).

    Args:
        K: keys ``(..., C, d_in)``.
        eta: decay step ``(..., C)``, the coefficient of ``k k^T``.
        alpha: retention ``(..., C)``.
    """
    log_gamma = log_cumulative(alpha)
    mix = decay_matrix(log_gamma)
    lower = scale_rows(eta, product(K, K.mT)) * previous_rows(mix)
    return Factor(log_gamma, mix, lower, unit_lower_inverse(lower))


def dgd_chunk(
    M: Tensor,
    K: Tensor,
    G: Tensor,
    eta: Tensor,
    alpha: Tensor,
    decay_eta: Tensor | None = None,
    *,
    S: Tensor | None = None,
    beta: Tensor | None = None,
    factor: Factor | None = None,
    response: Tensor | None = None,
    offset: Tensor | None = None,
) -> ChunkWrite:
    """Delta gradient descent over a chunk (SPEC §4, Eq. 88-93), exact.

        M_t = M_{t-1} (alpha_t I - decay_eta_t k_t k_t^T) - eta_t g_t k_t^T

    With momentum ``S`` the last term is replaced by ``S_t = beta_t S_{t-1} - eta_t g_t k_t^T``:
    ``M_t = M_{t-1} (alpha_t I - decay_eta_t k_t k_t^T) + S_t``.

    Args:
        M: memory at the chunk's start ``(..., d_out, d_in)``.
        K: keys ``(..., C, d_in)``.
        G: gradients at the memory's output, fixed over the chunk, ``(..., C, d_out)``.
        eta: inner learning rate ``(..., C)``.
        alpha: retention in (0, 1], ``(..., C)``.
        decay_eta: coefficient of ``k k^T``; ``eta`` if None.
        S: momentum at the chunk's start, like M (needs ``beta``).
        beta: momentum decay in [0, 1], ``(..., C)``.
        factor: `dgd_factor` of ``(K, decay_eta, alpha)``, to share it between memories.
        response: ``K M^T (..., C, d_out)`` if it is known already.
        offset: ``b (..., C, d_out)``: the decay term is ``decay_eta_t (M_{t-1} k_t + b_t) k_t^T``,
            for a memory that is the sum of M and of something fixed with response b.

    Example:
        >>> M, K, G = torch.zeros(2, 3), torch.eye(3), torch.ones(3, 2)
        >>> dgd_chunk(M, K, G, torch.ones(3), torch.ones(3)).memory
        tensor([[-1., -1., -1.],
                [-1., -1., -1.]])
    """
    decay = eta if decay_eta is None else decay_eta
    if factor is None:
        factor = dgd_factor(K, decay, alpha)
    log_gamma, mix = factor.log_gamma, factor.mix
    step = -scale_rows(eta, G)
    if response is None:
        response = product(K, M.mT)
    right = -scale_rows(decay * previous(log_gamma).exp(), response)
    if offset is not None:
        right = right - scale_rows(decay, offset)
    if S is None:
        u = factor.inverse @ (right + step)
        return ChunkWrite(M, log_gamma.exp(), K, ((mix, u),))
    if beta is None:
        raise ValueError("dgd_chunk with momentum S needs its decay beta")
    gain, momentum_mix, final = _momentum(log_gamma, mix, beta, S, step, K)
    before = torch.cat([torch.zeros_like(gain[..., :1]), gain[..., :-1]], -1)
    right = right - scale_rows(decay * before, product(K, S.mT))
    gram = product(K, K.mT)
    right = right - (scale_rows(decay, gram) * previous_rows(momentum_mix)) @ step.to(gram.dtype)
    u = factor.inverse @ right
    return ChunkWrite(M, log_gamma.exp(), K, ((mix, u), (momentum_mix, step)), S, gain, final)


def hebbian_chunk(M: Tensor, K: Tensor, V: Tensor, eta: Tensor, alpha: Tensor) -> ChunkWrite:
    """``M_t = alpha_t M_{t-1} + eta_t v_t k_t^T`` over a chunk (Eq. 64: linear attention)."""
    return gradient_chunk(M, K, -V, eta, alpha)


def delta_chunk(
    M: Tensor,
    K: Tensor,
    V: Tensor,
    eta: Tensor,
    alpha: Tensor,
    decay_eta: Tensor | None = None,
) -> ChunkWrite:
    """``M_t = alpha_t M_{t-1} - eta_t (M_{t-1} k_t - v_t) k_t^T`` over a chunk (Eq. 65).

    The gradient here moves with M, and still the form is exact: the rule is linear in M. Gated
    DeltaNet's ``alpha_t M_{t-1} (I - eta_t k k^T) + eta_t v k^T`` is ``decay_eta = alpha * eta``.
    """
    return dgd_chunk(M, K, -V, eta, alpha, decay_eta)


def oja_chunk(M: Tensor, K: Tensor, V: Tensor, eta: Tensor, alpha: Tensor) -> ChunkWrite:
    """``M_t = alpha_t M_{t-1} + eta_t v_t (k_t - M_{t-1}^T v_t)^T`` over a chunk (Eq. 66-67).

    It is the delta rule for ``M^T`` with key and value exchanged.
    """
    swapped = delta_chunk(M.mT, V, K, eta, alpha)
    mix, u = swapped.terms[0]
    return ChunkWrite(M, swapped.gamma, u, ((mix, V),))


def gradient_chunk(
    M: Tensor,
    K: Tensor,
    G: Tensor,
    eta: Tensor,
    alpha: Tensor,
    *,
    S: Tensor | None = None,
    beta: Tensor | None = None,
    weights: Tensor | None = None,
) -> ChunkWrite:
    """Gradients frozen at the chunk's start, scalar decay, optional momentum and window.

        S_t = beta_t S_{t-1} - eta_t sum_j w[t, j] g_j k_j^T,    M_t = alpha_t M_{t-1} + S_t

    without momentum ``S_t`` is its last term. Titans, TTT, l_p and Huber memories write this way
    (SPEC §2), layer by layer; ``weights`` makes it the Omega rule (Eq. 68).

    Args:
        M, K, G, eta, alpha, S, beta: as in `dgd_chunk`.
        weights: ``w (..., C, N)``: weight of pair j in the objective of token t (see
            `window_weights`); K and G then hold the N pairs, the last C of them this chunk's.
    """
    log_gamma = log_cumulative(alpha)
    mix = decay_matrix(log_gamma)
    if weights is None:
        keys, u = K, -scale_rows(eta, G)
        each: Tensor | None = None
    else:
        keys, u = K, -G
        each = scale_rows(eta, weights)
    if S is None:
        total = mix if each is None else mix @ each
        return ChunkWrite(M, log_gamma.exp(), keys, ((total, u),))
    if beta is None:
        raise ValueError("gradient_chunk with momentum S needs its decay beta")
    gain, total, final = _momentum(log_gamma, mix, beta, S, u, keys, each)
    return ChunkWrite(M, log_gamma.exp(), keys, ((total, u),), S, gain, final)


def window_weights(length: int, past: int, omega: Tensor) -> Tensor:
    """``w[t, j] = omega_j`` for the last ``past + 1`` pairs up to token t, else 0 (Eq. 68).

    Args:
        length: tokens in the chunk, C.
        past: pairs kept from before the chunk; the window has ``past + 1`` pairs.
        omega: weight of each of the ``past + C`` pairs, ``(..., past + C)`` (0 where none exists).

    Returns:
        ``(..., C, past + C)``.
    """
    if omega.shape[-1] != past + length:
        raise ValueError(f"omega needs {past + length} weights, got {omega.shape[-1]}")
    t = torch.arange(length, device=omega.device)[:, None]
    j = torch.arange(past + length, device=omega.device)[None]
    inside = (j >= t) & (j <= t + past)
    return omega[..., None, :] * inside


def _momentum(
    log_gamma: Tensor,
    mix: Tensor,
    beta: Tensor,
    S: Tensor,
    step: Tensor,
    keys: Tensor,
    each: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum the momentum out of the memory, with ``w = D_gamma D_beta``:

        sum_{r<=t} gamma_t/gamma_r S_r = c_t S_0 + sum_s w[t, s] step_s k_s^T

    Returns ``c``, ``w`` and the final momentum."""
    log_b = log_cumulative(beta)
    own = decay_matrix(log_b)
    if each is not None:
        own = own @ each
    gain = (mix @ log_b.exp()[..., None])[..., 0]
    written = product(scale_rows(own[..., -1, :], step).mT, keys)
    final = (log_b[..., -1, None, None].exp() * S + written).to(S.dtype)
    return gain, mix @ own, final


def kl_chunk(A: Tensor, K: Tensor, G: Tensor, eta: Tensor, alpha: Tensor) -> ChunkWrite:
    """KL retention over a chunk, in log space (SPEC §2, Memora).

    ``M_t = c softmax(alpha_t log M_{t-1} - eta_t g_t k_t^T)``. The softmax only shifts every row of
    ``log M`` by a constant, and a shift stays a shift under the next step, so the logits follow
    the gradient rule ``A_t = alpha_t A_{t-1} - eta_t g_t k_t^T`` and ``M_t = c softmax(A_t)``.

    Args:
        A: logits of the memory, ``log M`` up to a constant per row, ``(..., d_out, d_in)``.
        K, G, eta, alpha: as in `gradient_chunk`.

    Returns:
        The write of the logits; its ``read`` is not that of the memory.
    """
    return gradient_chunk(A, K, G, eta, alpha)
