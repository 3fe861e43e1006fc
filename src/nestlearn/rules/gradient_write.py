"""The hot path of gradient writes: damped terms, next memory and read-out, backward by hand.

`GradientWrite` is `nestlearn.rules.chunk.gradient_chunk` with the step of `steady`, and is tested
against both. It exists for speed: what the gates do is computed once per chunk and shared by all
layers (`ChunkGates`), and the three steps of a layer save what automatic differentiation would
compute, store and read again. Tokens are rows, ``(..., C, d)``, with the same leading axes for all.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nestlearn.rules.decay import decay_matrix, log_cumulative


@dataclass
class ChunkGates:
    """What retention, momentum and window do within one chunk, for all layers of a memory:

        M_t = gamma_t M_0 + c_t S_0 + sum_s mix[t, s] u_s a_s^T

    Attributes:
        mix: ``(..., C, N)``, or None if only the memory after the chunk is asked for.
        last: ``mix[C]``, ``(..., N)``; None for ones.
        after: ``gamma_t``, ``(..., C)``; None for ones. ``total``: its last, ``(..., 1)``.
        gain: ``c_t``, ``(..., C)``; None without momentum. ``gain_last``: its last, ``(..., 1)``.
        own_last: weights of the terms in the final momentum, ``(..., N)``.
        own_total: the part of ``S_0`` in it, ``(..., 1)``.
    """

    mix: Tensor | None = None
    last: Tensor | None = None
    after: Tensor | None = None
    total: Tensor | None = None
    gain: Tensor | None = None
    gain_last: Tensor | None = None
    own_last: Tensor | None = None
    own_total: Tensor | None = None

    @classmethod
    def of(
        cls,
        like: Tensor,
        alpha: Tensor | None = None,
        beta: Tensor | None = None,
        weights: Tensor | None = None,
        *,
        tokens: bool = True,
    ) -> ChunkGates:
        """From the gates of a chunk.

        Args:
            like: any gate, ``(..., C)``; gives length and type.
            alpha: retention ``(..., C)``; None for 1.
            beta: momentum decay ``(..., C)``; None without momentum.
            weights: ``(..., C, N)``: weight of pair j in the gradient of token t, without the
                part that a pair has by itself (that one goes into its ``u``); None if token t
                takes the gradient of pair t alone.
            tokens: whether the memory after every token is asked for (``mix``).
        """
        if alpha is None and beta is None and weights is None:
            length = like.shape[-1]
            ones = torch.ones(length, length, dtype=like.dtype, device=like.device).tril()
            return cls(mix=ones.expand(*like.shape[:-1], length, length) if tokens else None)
        if alpha is None:
            alpha = torch.ones_like(like)
        log_gamma = log_cumulative(alpha)
        end = log_gamma[..., -1:]
        last = (end - log_gamma).exp()
        gates = cls(last=last, total=end.exp(), after=log_gamma.exp() if tokens else None)
        mix = decay_matrix(log_gamma) if tokens else None
        inner = weights
        if beta is not None:
            log_b = log_cumulative(beta)
            b, end_b = log_b.exp(), log_b[..., -1:]
            gates.own_last = (end_b - log_b).exp()
            gates.own_total = end_b.exp()
            gates.gain_last = (last * b).sum(-1, keepdim=True)
            gates.gain = None if mix is None else (mix @ b.unsqueeze(-1)).squeeze(-1)
            inner = decay_matrix(log_b)
            if weights is not None:
                inner = inner @ weights
                gates.own_last = (gates.own_last.unsqueeze(-2) @ weights).squeeze(-2)
        if inner is not None:
            gates.last = (last.unsqueeze(-2) @ inner).squeeze(-2)
            mix = None if mix is None else mix @ inner
        gates.mix = mix
        return gates


@dataclass
class GradientWrite:
    """What one chunk writes to one layer.

    Attributes:
        start: weights before the chunk, ``M_0 (..., out, in)``.
        momentum_start: ``S_0``, or None.
        inputs, terms: ``a (..., N, in)`` and ``u (..., N, out)``, see `damped_terms`.
        gates: of the chunk.
    """

    start: Tensor
    momentum_start: Tensor | None
    inputs: Tensor
    terms: Tensor
    gates: ChunkGates

    def finish(self) -> tuple[Tensor, Tensor | None]:
        """Memory and momentum after the chunk."""
        gates = self.gates
        memory, momentum = _Advance.apply(
            self.start, self.momentum_start, self.inputs, self.terms,
            gates.last, gates.total, gates.gain_last, gates.own_last, gates.own_total,
        )  # fmt: skip
        return memory, None if self.momentum_start is None else momentum

    def read(self, queries: Tensor, first: int = 0) -> Tensor:
        """``M_t q_t`` of the tokens from ``first`` on, ``(..., C - first, in) -> (..., out)``."""
        gates = self.gates
        mix, after, gain = gates.mix, gates.after, gates.gain
        if mix is None:
            raise ValueError("these gates are without `mix`; make them with tokens=True")
        if first:
            mix = mix[..., first:, :]
            after = None if after is None else after[..., first:]
            gain = None if gain is None else gain[..., first:]
        return _Read.apply(
            queries, self.start, self.momentum_start, self.inputs, self.terms, mix, after, gain
        )


def damped_terms(
    inputs: Tensor, grad: Tensor, rate: Tensor, bend: Tensor, share: Tensor | None = None
) -> Tensor:
    """``u_t = -eta'_t g_t`` with the damped step of `nestlearn.rules.chunk.steady`:

        eta'_t = share_t / (1 + bend_t sum_{s<=t} rate_s (a_s . a_t)^2 / ||a_t||^2)

    Args:
        inputs: what the layer reads, ``a (..., N, in)``.
        grad: gradients at its output, ``g (..., N, out)``.
        rate: inner learning rates ``(..., N)``.
        bend: ``gain C/t``, ``(..., N)``.
        share: what the damping divides; ``rate`` if None.
    """
    return _Damp.apply(inputs, grad, rate, bend, share)


class _Damp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, inputs, grad, rate, bend, share):
        gram = inputs @ inputs.mT
        norm = gram.diagonal(dim1=-2, dim2=-1).clamp(min=1e-12)
        along = (gram.square().tril_() @ rate.unsqueeze(-1)).squeeze(-1) / norm
        damping = 1 + bend * along
        step = (rate if share is None else share) / damping
        ctx.save_for_backward(inputs, grad, rate, bend, gram, norm, along, damping, step)
        ctx.shared = share is None
        return grad * -step.unsqueeze(-1)

    @staticmethod
    def backward(ctx, g_u):
        inputs, grad, rate, bend, gram, norm, along, damping, step = ctx.saved_tensors
        g_step = -(g_u * grad).sum(-1)
        g_share = g_step / damping
        g_damping = -g_share * step
        g_sum = g_damping * bend / norm
        # Sums over s <= t of (a_s . a_t)^2: their gradient is that of the lower triangle.
        lower = gram.tril()
        g_rate = ((lower * gram).mT @ g_sum.unsqueeze(-1)).squeeze(-1)
        g_gram = lower.mul_((2 * g_sum).unsqueeze(-1)).mul_(rate.unsqueeze(-2))
        g_norm = torch.where(norm > 1e-12, -g_sum * along, 0.0)
        g_gram.diagonal(dim1=-2, dim2=-1).add_(g_norm)
        g_inputs = (g_gram + g_gram.mT) @ inputs
        g_grad = g_u * -step.unsqueeze(-1)
        if ctx.shared:
            return g_inputs, g_grad, g_rate + g_share, g_damping * along, None
        return g_inputs, g_grad, g_rate, g_damping * along, g_share


class _Advance(torch.autograd.Function):
    """``M_C = total M_0 + gain S_0 + (last u)^T a`` and ``S_C = own_total S_0 + (own_last u)^T a``;
    without momentum the second result is empty."""

    @staticmethod
    def forward(ctx, memory, momentum, inputs, u, last, total, gain, own_last, own_total):
        ctx.save_for_backward(memory, momentum, inputs, u, last, total, gain, own_last, own_total)
        base = memory if total is None else memory * total.unsqueeze(-1)
        if momentum is None:
            return _add_product(base, _scaled(u, last).mT, inputs), memory.new_empty(0)
        base = torch.addcmul(base, momentum, gain.unsqueeze(-1).expand_as(momentum))
        new = _add_product(base, _scaled(u, last).mT, inputs)
        carried = momentum * own_total.unsqueeze(-1)
        return new, _add_product(carried, _scaled(u, own_last).mT, inputs)

    @staticmethod
    def backward(ctx, g_new, g_momentum):
        (memory, momentum, inputs, u, last, total, gain, own_last, own_total) = ctx.saved_tensors
        weighted = inputs @ g_new.mT
        g_inputs = _scaled(u, last) @ g_new
        g_u = _scaled(weighted, last)
        g_last = None if last is None else (weighted * u).sum(-1)
        g_total = None if total is None else _inner(g_new, memory)
        g_memory = g_new if total is None else g_new * total.unsqueeze(-1)
        if momentum is None:
            return g_memory, None, g_inputs, g_u, g_last, g_total, None, None, None
        weighted = inputs @ g_momentum.mT
        g_inputs = _add_product(g_inputs, _scaled(u, own_last), g_momentum)
        g_u = torch.addcmul(g_u, weighted, own_last.unsqueeze(-1).expand_as(u))
        g_before = g_momentum * own_total.unsqueeze(-1)
        g_before.addcmul_(g_new, gain.unsqueeze(-1).expand_as(g_new))
        return (
            g_memory, g_before, g_inputs, g_u, g_last, g_total,
            _inner(g_new, momentum), (weighted * u).sum(-1), _inner(g_momentum, momentum),
        )  # fmt: skip


class _Read(torch.autograd.Function):
    """``y_t = gamma_t M_0 x_t + c_t S_0 x_t + sum_s mix[t, s] (a_s . x_t) u_s``."""

    @staticmethod
    def forward(ctx, x, memory, momentum, inputs, u, mix, after, gain):
        kept = x @ memory.mT
        scores = x @ inputs.mT
        mixed = scores * mix
        carried = None
        if after is None:
            out = _add_product(kept, mixed, u)
        else:
            out = torch.addcmul(mixed @ u, kept, after.unsqueeze(-1).expand_as(kept))
        if momentum is not None:
            carried = x @ momentum.mT
            out = out.addcmul_(carried, gain.unsqueeze(-1).expand_as(carried))
        ctx.save_for_backward(
            x, memory, momentum, inputs, u, mix, after, gain,
            None if after is None else kept, carried, scores, mixed,
        )  # fmt: skip
        return out

    @staticmethod
    def backward(ctx, grad):
        (x, memory, momentum, inputs, u, mix, after, gain,
         kept, carried, scores, mixed) = ctx.saved_tensors  # fmt: skip
        g_u = mixed.mT @ grad
        g_mixed = grad @ u.mT
        g_mix = g_mixed * scores if ctx.needs_input_grad[5] else None
        g_scores = g_mixed.mul_(mix)
        g_kept = _scaled(grad, after)
        g_x = _add_product(g_scores @ inputs, g_kept, memory)
        g_memory = g_kept.mT @ x
        g_after = None if after is None else (grad * kept).sum(-1)
        g_momentum = g_gain = None
        if momentum is not None:
            g_carried = _scaled(grad, gain)
            g_x = _add_product(g_x, g_carried, momentum)
            g_momentum = g_carried.mT @ x
            g_gain = (grad * carried).sum(-1)
        return g_x, g_memory, g_momentum, g_scores.mT @ x, g_u, g_mix, g_after, g_gain


def _scaled(x: Tensor, scale: Tensor | None) -> Tensor:
    """Rows of x times ``scale``; None is 1."""
    return x if scale is None else x * scale.unsqueeze(-1)


def _add_product(base: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``base + a @ b`` in one kernel."""
    flat = torch.baddbmm(base.flatten(0, -3), a.flatten(0, -3), b.flatten(0, -3))
    return flat.view(base.shape)


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """Sum of ``a * b`` over the last two axes, ``(..., 1)``."""
    return (a.flatten(-2).unsqueeze(-2) @ b.flatten(-2).unsqueeze(-1)).squeeze(-1)
