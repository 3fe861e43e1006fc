"""The hot path of delta gradient descent: a chunk's final memory with a hand-written backward.

`dgd_write` computes what ``dgd_chunk(...).memory`` computes (SPEC §4) and is tested against it. It
exists for speed: automatic differentiation of the plain form spends most of its time in pointwise
kernels on intermediate results. Tokens are columns, ``(..., d, C)``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nestlearn.rules.decay import (
    decay_matrix,
    log_cumulative,
    previous,
    previous_rows,
    unit_lower_inverse,
)


@dataclass
class ChunkDecay:
    """What retention does within one chunk, for all layers of all memories that share α.

    Attributes:
        before: ``gamma_{t-1}``, ``(..., C)``.
        after: ``gamma_t``, ``(..., C)``.
        rest: ``gamma_C / gamma_s``, ``(..., C)``.
        total: ``gamma_C``, ``(..., 1)``.
        mix: ``gamma_t / gamma_s`` for ``s <= t``, else 0, ``(..., C, C)``.
        pairs: ``gamma_{t-1} / gamma_s`` for ``s < t``, else 0, ``(..., C, C)``.
    """

    before: Tensor
    after: Tensor
    rest: Tensor
    total: Tensor
    mix: Tensor
    pairs: Tensor

    @classmethod
    def from_alpha(cls, alpha: Tensor) -> ChunkDecay:
        """From the retention ``(..., C)`` of the chunk's tokens."""
        log_gamma = log_cumulative(alpha)
        last = log_gamma[..., -1:]
        after, mix = log_gamma.exp(), decay_matrix(log_gamma)
        return cls(
            previous(log_gamma).exp(),
            after,
            (last - log_gamma).exp(),
            last.exp(),
            mix,
            previous_rows(mix),
        )

    def unsqueeze(self, dim: int) -> ChunkDecay:
        """With a new leading axis at ``dim`` (>= 0), to broadcast over memories."""
        return ChunkDecay(*(getattr(self, n).unsqueeze(dim) for n in self.__dataclass_fields__))


def dgd_write(
    memory: Tensor, inputs: Tensor, grad: Tensor, response: Tensor, eta: Tensor, decay: ChunkDecay
) -> tuple[Tensor, Tensor]:
    """``M_C`` after a chunk of ``M_t = M_{t-1} (alpha_t I - eta'_t a_t a_t^T) - eta'_t g_t a_t^T``
    with the proximal step ``eta' = eta / (1 + eta ||a||^2)`` (SPEC §3.5).

    Args:
        memory: ``M_0 (..., out, in)``.
        inputs: what the layer reads, as columns ``a (..., in, C)``.
        grad: gradients at the layer's output, columns ``(..., out, C)``.
        response: ``M_0 a``, ``(..., out, C)``.
        eta: inner learning rate ``(..., C)``.
        decay: retention of the chunk; its tensors broadcast against the leading axes.

    Returns:
        ``M_C (..., out, in)`` and the terms ``u (..., out, C)`` of
        ``M_t = gamma_t M_0 + sum_s gamma_t/gamma_s u_s a_s^T``; differentiable in every argument.
    """
    if inputs.shape[-1] == 1:  # the token recurrence: nothing to solve
        step = eta / (1 + eta * inputs.square().sum(-2))
        u = -step.unsqueeze(-2) * (response + grad)
        return decay.total.unsqueeze(-1) * memory + u * inputs.mT, u
    return _DGDWrite.apply(
        memory, inputs, grad, response, eta, decay.before, decay.rest, decay.total, decay.pairs
    )


def read_per_token(memory: Tensor, inputs: Tensor, u: Tensor, x: Tensor, decay: ChunkDecay):
    """``M_t x_t`` for the last tokens of a chunk, each after its own write.

    Args:
        memory: ``M_0 (..., out, in)``.
        inputs, u: the chunk's ``a (..., in, C)`` and ``u (..., out, C)`` from `dgd_write`.
        x: what is read with, for the last ``n <= C`` tokens, ``(..., in, n)``.
        decay: retention of the chunk.

    Returns:
        ``(..., out, n)``.
    """
    first = inputs.shape[-1] - x.shape[-1]
    scores = (inputs.mT @ x) * decay.mix.mT[..., first:]
    return (memory @ x) * decay.after[..., first:].unsqueeze(-2) + u @ scores


class _DGDWrite(torch.autograd.Function):
    """``U (I + L)^T = X`` with ``X = -eta' (gamma_{t-1} R + G)``, ``L = eta' pairs (a^T a)``, then
    ``M_C = gamma_C M_0 + (U rest) a^T``."""

    @staticmethod
    def forward(ctx, memory, inputs, grad, response, eta, before, rest, total, pairs):
        gram = inputs.mT @ inputs
        square = gram.diagonal(dim1=-2, dim2=-1)  # ||a||^2 comes with the Gram matrix
        step = eta / (1 + eta * square)
        lower = gram * pairs
        lower *= step.unsqueeze(-1)
        inverse = unit_lower_inverse(lower)
        error = torch.addcmul(grad, response, before.unsqueeze(-2).expand_as(response))
        x = error * -step.unsqueeze(-2)
        u = x @ inverse.mT
        new = (u * rest.unsqueeze(-2)) @ inputs.mT
        new = torch.addcmul(new, memory, total.unsqueeze(-1).expand_as(memory))
        ctx.save_for_backward(
            memory, inputs, response, eta, step, before, rest, total, pairs,
            gram, inverse, error, u,
        )  # fmt: skip
        return new, u

    @staticmethod
    def backward(ctx, g_new, g_u):
        (memory, inputs, response, eta, step, before, rest, total, pairs,
         gram, inverse, error, u) = ctx.saved_tensors  # fmt: skip
        g_total = _sum_to((g_new * memory).sum((-1, -2), keepdim=True).squeeze(-1), total.shape)
        g_weighted = g_new @ inputs
        g_inputs = g_new.mT @ (u * rest.unsqueeze(-2))
        g_rest = _sum_to((g_weighted * u).sum(-2), rest.shape)
        g_x = torch.addcmul(g_u, g_weighted, rest.unsqueeze(-2).expand_as(u)) @ inverse
        g_error = g_x * -step.unsqueeze(-2)
        g_before = _sum_to((g_error * response).sum(-2), before.shape)
        g_response = g_error * before.unsqueeze(-2)
        # dL = -(g_x^T u) and L = eta gram pairs; above the diagonal `pairs` is a masked zero, which
        # lets no gradient through, so nothing has to be cut off here.
        g_lower = g_x.mT @ u
        g_pairs = g_lower * gram
        g_step = -(g_x * error).sum(-2) - (g_pairs * pairs).sum(-1)
        g_pairs = _sum_to(g_pairs.mul_(-step.unsqueeze(-1)), pairs.shape)
        g_gram = g_lower.mul_(pairs).mul_(-step.unsqueeze(-1))
        # d eta' / d eta = (eta'/eta)^2, d eta' / d ||a||^2 = -eta'^2
        g_gram.diagonal(dim1=-2, dim2=-1).addcmul_(g_step, step.square(), value=-1)
        g_eta = _sum_to(g_step / (1 + eta * gram.diagonal(dim1=-2, dim2=-1)).square(), eta.shape)
        g_inputs += inputs @ (g_gram + g_gram.mT)
        g_memory = g_new * total.unsqueeze(-1)
        return (
            g_memory, g_inputs, g_error, g_response,
            g_eta, g_before, g_rest, g_total, g_pairs,
        )  # fmt: skip


def _sum_to(grad: Tensor, shape: torch.Size) -> Tensor:
    """Undo broadcasting: sum over the axes that ``shape`` does not have."""
    return grad if grad.shape == shape else grad.sum_to_size(shape)
