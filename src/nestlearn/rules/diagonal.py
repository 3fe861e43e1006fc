"""The generalised delta rule: a decay per channel and free removal keys (RWKV-7).

    M_t = M_{t-1} (diag(w_t) + a_t b_t^T) + v_t k_t^T          o_t = M_t q_t

With ``w = alpha``, ``a = k``, ``b = -alpha eta k``, value ``eta v`` this is the gated delta rule.
`diagonal_step` is one token of it; `diagonal_sequence` computes the same for all chunks in one
batch, as `nestlearn.rules.linear` does for scalar decays.

A decay per channel cannot be taken out of the products of keys as one number per pair of tokens.
It is split over both factors, ``exp(L_t - m)`` and ``exp(m - L_s)``, L the summed logarithms and m
their middle in the chunk; `LOWEST_LOG` bounds a token's decay so that neither overflows.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from nestlearn.rules.decay import unit_lower_inverse, wide
from nestlearn.rules.linear import chunked, run_states
from nestlearn.rules.reference import outer, read

LOWEST_LOG = -math.exp(-0.5)
"""Lower bound of log w: RWKV-7's decay lies in (exp(-exp(-1/2)), 1) = (0.545, 1)."""
LARGEST_CHUNK = 64  # exp(64 * 0.607) = 7e16, in float32 far from overflow on both sides


def diagonal_step(M: Tensor, k: Tensor, v: Tensor, log_w: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``M (diag(w) + a b^T) + v k^T`` for one token.

    Args:
        M: ``(..., d_out, d_in)``.
        k, log_w, a, b: ``(..., d_in)``; v: ``(..., d_out)``.

    Example:
        >>> e = torch.eye(2)
        >>> diagonal_step(2 * e, e[0], e[1], torch.zeros(2), e[0], -e[0])
        tensor([[0., 0.],
                [1., 2.]])
    """
    return M * log_w.exp()[..., None, :] + outer(read(M, a), b) + outer(v, k)


def diagonal_sequence(
    M: Tensor,
    Q: Tensor,
    K: Tensor,
    V: Tensor,
    log_w: Tensor,
    A: Tensor,
    B: Tensor,
    chunk: int = 32,
) -> tuple[Tensor, Tensor]:
    """Run the rule over T tokens; token t reads after its own write, ``o_t = M_t q_t``.

    Args:
        M: memory before the first token, ``(B, H, d_out, d_in)``.
        Q, K, A, B: queries, keys, removal keys and what replaces them, ``(B, H, T, d_in)``.
        V: values ``(B, H, T, d_out)``.
        log_w: logarithm of the decay per channel in [LOWEST_LOG, 0], ``(B, H, T, d_in)``.
        chunk: tokens per chunk, at most `LARGEST_CHUNK` (speed only).

    Returns:
        Outputs ``(B, H, T, d_out)`` in the type of Q and the memory after the last token, as M.

    Raises:
        ValueError: the chunk is empty or too long for the bound on the decay.
    """
    if not 1 <= chunk <= LARGEST_CHUNK:
        raise ValueError(f"chunk must be 1 to {LARGEST_CHUNK}, got {chunk}")
    length, dtype = Q.shape[2], wide(Q.dtype)
    memory_dtype, out_dtype = M.dtype, Q.dtype
    chunk = min(chunk, length)
    # Padding writes nothing: w = 1, all else 0.
    q, k, v, a, b, log_w = (chunked(x.to(dtype), chunk, 0.0) for x in (Q, K, V, A, B, log_w))

    total = log_w.cumsum(-2)
    before = F.pad(total[..., :-1, :], (0, 0, 1, 0))
    last = total[..., -1:, :]
    middle = 0.5 * last.detach()
    up, down = (total - middle).exp(), (middle - total).exp()
    up_before = (before - middle).exp()
    q_in, a_in, k_out, b_out = q * up, a * up_before, k * down, b * down

    # u_t = M_{t-1} a_t for all tokens: (I - lower(a b)) U = lower(a k) V + (gamma_{t-1} a) M_0^T
    inverse = unit_lower_inverse(-(a_in @ b_out.mT).tril(-1))
    fresh = inverse @ ((a_in @ k_out.mT).tril(-1) @ v)
    carry = inverse @ (a * before.exp())
    tail = (last - total).exp()
    k_end, b_end = k * tail, b * tail
    transition = torch.diag_embed(last.exp().squeeze(-2)) + carry.mT @ b_end
    start, memory = run_states(M.to(dtype), transition, fresh.mT @ b_end + v.mT @ k_end)

    u = fresh + carry @ start.mT
    out = (q * total.exp()) @ start.mT
    out = out + (q_in @ b_out.mT).tril() @ u + (q_in @ k_out.mT).tril() @ v
    return out.flatten(2, 3)[:, :, :length].to(out_dtype), memory.to(memory_dtype)
