"""Element-wise pieces of the write path, each with a hand-written backward.

A write touches its intermediate results far more often with element-wise kernels than with matrix
products; these save the temporaries that automatic differentiation would keep and re-read.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

GELU_SCALE, GELU_CUBIC = math.sqrt(2 / math.pi), 0.044715


def unit(x: Tensor, dim: int = -1) -> Tensor:
    """``x / sqrt(||x||^2 + 1e-6)`` along ``dim``: norm 1, smooth, and zero at zero."""
    return _Unit.apply(x, dim)


class _Unit(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, dim: int) -> Tensor:
        scale = torch.rsqrt(x.square().sum(dim, keepdim=True) + 1e-6)
        y = x * scale
        ctx.save_for_backward(y, scale)
        ctx.dim = dim
        return y

    @staticmethod
    def backward(ctx, grad: Tensor):
        y, scale = ctx.saved_tensors
        along = (grad * y).sum(ctx.dim, keepdim=True)
        return torch.addcmul(grad, y, along.expand_as(y), value=-1) * scale, None


def silu_and_slope(z: Tensor) -> tuple[Tensor, Tensor]:
    """``z sigmoid(z)`` and its derivative, both differentiable."""
    return _SiluAndSlope.apply(z)


class _SiluAndSlope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z: Tensor):
        gate = torch.sigmoid(z)
        value = z * gate
        slope = torch.addcmul(gate + value, value, gate, value=-1)
        ctx.save_for_backward(z, gate, slope)
        return value, slope

    @staticmethod
    def backward(ctx, g_value: Tensor, g_slope: Tensor):
        z, gate, slope = ctx.saved_tensors
        # slope' = s (1 - s) (2 + z (1 - 2 s)) with s = sigmoid(z)
        curve = (1 - 2 * gate).mul_(z).add_(2).mul_(gate).mul_(1 - gate)
        return torch.addcmul(g_value * slope, g_slope, curve)


def gelu_and_slope(z: Tensor) -> tuple[Tensor, Tensor]:
    """The tanh form of GELU and its derivative, both differentiable."""
    return _GeluAndSlope.apply(z)


class _GeluAndSlope(torch.autograd.Function):
    # gelu = z (1 + tanh w) / 2 with w = r (z + c z^3)
    @staticmethod
    def forward(ctx, z: Tensor):
        r, c = GELU_SCALE, GELU_CUBIC
        square = z * z
        tanh = (square * (r * c)).add_(r).mul_(z).tanh_()
        half = (0.5 * tanh).add_(0.5)
        value = z * half
        bell = torch.addcmul(torch.ones_like(tanh), tanh, tanh, value=-1)
        # slope = half + z/2 bell w',  w' = r (1 + 3 c z^2)
        slope = square.mul_(1.5 * r * c).add_(0.5 * r).mul_(z).mul_(bell).add_(half)
        ctx.save_for_backward(z, tanh, bell, slope)
        return value, slope

    @staticmethod
    def backward(ctx, g_value: Tensor, g_slope: Tensor):
        r, c = GELU_SCALE, GELU_CUBIC
        z, tanh, bell, slope = ctx.saved_tensors
        # slope' = bell (w' + z w''/2 - z tanh w'^2),  w' + z w''/2 = r (1 + 6 c z^2)
        square = z * z
        steep = (square * (3 * r * c)).add_(r)
        curve = square.mul_(6 * r * c).add_(r)
        curve = curve.addcmul_(steep.square_().mul_(z), tanh, value=-1).mul_(bell)
        return torch.addcmul(g_value * slope, g_slope, curve)


TINY = 1e-10  # adding and subtracting it makes float32 values below 1e-17 exact zeros


def guard_rows(weight: Tensor, bound: Tensor) -> Tensor:
    """Scale rows of ``weight (..., out, in)`` down to norm ``bound (..., out, 1)`` at most.

    Keys, values and targets are of norm 1 and steps are proximal, so rows rarely get there; with
    the guard a memory is bounded for any input and any length (FINDINGS §1). No gradient flows
    to ``bound``.
    """
    return _GuardRows.apply(weight, bound)


class _GuardRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight: Tensor, bound: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(weight, dim=-1, keepdim=True)
        scale = bound / torch.maximum(norm, bound)
        out = weight * scale
        # What is never written again decays for ever; after some 10,000 tokens its square would be
        # a denormal number, with which every CPU kernel is several times slower.
        out.add_(TINY).sub_(TINY)
        ctx.save_for_backward(out, scale, norm)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        out, scale, norm = ctx.saved_tensors
        # Clipped rows lose the part of the gradient along themselves: out = bound * w / ||w||.
        along = (grad * out).sum(-1, keepdim=True) / (scale * norm).square().clamp(min=1e-30)
        along = torch.where(scale < 1, along, 0.0)
        return torch.addcmul(grad, out, along.expand_as(out), value=-1) * scale, None
