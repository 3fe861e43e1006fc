"""Linear rules over a whole sequence (SPEC §2, §4): every chunk at once.

Hebbian, delta and Oja updates are linear in the memory, so one chunk maps ``M -> M A + B`` with A
and B that depend on its keys, values and gates only. These are computed for all chunks in one
batch; what runs chunk after chunk is a single small product. It is exact for any chunk size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nestlearn.rules.chunk import scale_rows
from nestlearn.rules.decay import (
    decay_matrix,
    log_cumulative,
    previous,
    previous_rows,
    unit_lower_inverse,
    wide,
)

LINEAR_RULES = ("hebbian", "delta", "oja")


def linear_sequence(
    rule: str,
    M: Tensor,
    Q: Tensor,
    K: Tensor,
    V: Tensor,
    eta: Tensor,
    alpha: Tensor,
    decay_eta: Tensor | None = None,
    chunk: int = 64,
) -> tuple[Tensor, Tensor]:
    """Run a linear rule over T tokens; token t reads after its own write, ``o_t = M_t q_t``.

    - hebbian (Eq. 64): ``M_t = alpha_t M + eta_t v k^T``
    - delta (Eq. 65): ``M_t = alpha_t M - decay_eta_t M k k^T + eta_t v k^T``
    - oja (Eq. 66-67): ``M_t = alpha_t M - decay_eta_t v v^T M + eta_t v k^T``

    Args:
        rule: one of `LINEAR_RULES`.
        M: memory before the first token, ``(B, H, d_out, d_in)``.
        Q, K: queries and keys ``(B, H, T, d_in)``.
        V: values ``(B, H, T, d_out)``.
        eta, alpha: gates ``(B, H, T)``.
        decay_eta: coefficient of the decay term; ``eta`` if None.
        chunk: tokens per chunk (speed only).

    Returns:
        Outputs ``(B, H, T, d_out)`` in the type of Q and the memory after the last token, as M.

    Raises:
        ValueError: the rule is not linear or the chunk is empty.
    """
    if rule not in LINEAR_RULES:
        raise ValueError(f"{rule!r} is not a linear rule; choose one of {', '.join(LINEAR_RULES)}")
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    length = Q.shape[2]
    chunk = min(chunk, length)
    dtype = wide(Q.dtype)
    memory_dtype, out_dtype = M.dtype, Q.dtype
    decay = eta if decay_eta is None else decay_eta
    # Padding with eta = 0 and alpha = 1 writes nothing.
    M = M.to(dtype)
    q, k, v = (chunked(x.to(dtype), chunk, 0.0) for x in (Q, K, V))
    step, decay = (chunked(x.to(dtype), chunk, 0.0) for x in (eta, decay))
    log_gamma = log_cumulative(chunked(alpha.to(dtype), chunk, 1.0))

    mix = decay_matrix(log_gamma)
    gamma, tail = log_gamma.exp(), mix[..., -1, :]
    if rule == "hebbian":
        start, memory = _decayed_states(M, gamma[..., -1], scale_rows(tail * step, v).mT @ k)
        scores = (q @ k.mT) * mix
        out = scale_rows(gamma, q) @ start.mT + scores @ scale_rows(step, v)
        return _tokens(out, length).to(out_dtype), memory.to(memory_dtype)

    # The delta rule of M, or (Oja) of M^T with key and value exchanged: U = fresh - carry M_0^T.
    swap = rule == "oja"
    key, value = (v, k) if swap else (k, v)
    lower = scale_rows(decay, key @ key.mT) * previous_rows(mix)
    inverse = unit_lower_inverse(lower)
    fresh = inverse @ scale_rows(step, value)
    carry = inverse @ scale_rows(decay * previous(log_gamma).exp(), key)
    kept = scale_rows(tail, key)
    eye = torch.eye(key.shape[-1], dtype=dtype, device=key.device)
    transition = gamma[..., -1, None, None] * eye - carry.mT @ kept
    start, memory = run_states(M.mT if swap else M, transition, fresh.mT @ kept)
    if swap:
        u = fresh - carry @ start.mT
        out = scale_rows(gamma, q) @ start + ((q @ u.mT) * mix) @ v
        memory = memory.mT
    else:
        scores = (q @ k.mT) * mix
        out = (scale_rows(gamma, q) - scores @ carry) @ start.mT + scores @ fresh
    return _tokens(out, length).to(out_dtype), memory.to(memory_dtype)


def chunked(x: Tensor, chunk: int, fill: float) -> Tensor:
    """``(B, H, T, ...) -> (B, H, N, C, ...)``, padded at the end with ``fill``."""
    short = -x.shape[2] % chunk
    if short:
        x = F.pad(x, (0, 0) * (x.ndim - 3) + (0, short), value=fill)
    return x.unflatten(2, (-1, chunk))


def _tokens(x: Tensor, length: int) -> Tensor:
    return x.flatten(2, 3)[:, :, :length]


def run_states(M: Tensor, transition: Tensor, added: Tensor) -> tuple[Tensor, Tensor]:
    """``M_{n+1} = M_n A_n + B_n``: the memory before every chunk, and after the last."""
    batch, heads, count = transition.shape[:3]
    shape = M.shape
    M = M.reshape(batch * heads, *shape[2:])
    before = []
    steps = transition.flatten(0, 1).unbind(1), added.flatten(0, 1).unbind(1)
    for a, b in zip(*steps, strict=True):
        before.append(M)
        M = torch.baddbmm(b, M, a)
    start = torch.stack(before, 1).view(batch, heads, count, *shape[2:])
    return start, M.view(shape)


def _decayed_states(M: Tensor, gamma: Tensor, added: Tensor) -> tuple[Tensor, Tensor]:
    """``M_{n+1} = gamma_n M_n + B_n``: the memory before every chunk, and after the last."""
    before = []
    for g, b in zip(gamma[..., None, None].unbind(2), added.unbind(2), strict=True):
        before.append(M)
        M = g * M + b
    return torch.stack(before, 2), M
