"""Layers whose weights learn from an objective on their own output instead of the plain gradient.

A forward hook replaces a layer's node in the autograd graph: the gradient that flows on to earlier
layers stays what it was, the gradient of the layer's own parameters becomes that of an inner
objective ``L(W x; u)``. The forward pass computes nothing twice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from nestlearn.memory.objectives import Objective

Value = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass
class LayerRule:
    """The inner objective of a layer's parameters, and the size of a step on it.

    Attributes:
        objective: ``L(y; u)``.
        value: ``(x, y, delta) -> u``; None for ``u = -delta``.
        rate: outer learning rate for the proximal step; 0 for no damping.
        loss_scale: what the loss was multiplied by before ``backward()``.
        mean: whether the loss is a mean over the layer's rows.
        oja: take the input of the gradient as ``x - W^T u`` (Oja's rule).
    """

    objective: Objective
    value: Value | None
    rate: Any
    loss_scale: float
    mean: bool
    oja: bool = False

    def signal(self, x: Tensor, y: Tensor, grad: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        """Gradient of the inner objective at the output (a new tensor), scaled as the loss is, and
        ``u`` (of no meaning for the plain regression, whose curvature does not need it).

        Args:
            x: inputs of the layer, or what stands for them in ``value``.
            y: outputs; features in the last axis.
            grad: gradient of the scaled loss at the output, like ``y``.
            rows: number of rows that the loss is a mean over.
        """
        share = self.loss_scale / (rows if self.mean else 1)
        if self.objective.name == "l2" and self.value is None:  # delta + y, and nothing else made
            return torch.add(grad, y, alpha=share), grad
        delta = grad / share  # the gradient of a row's own loss
        u = -delta if self.value is None else self.value(x, y, delta)
        return self.objective.grad(y, u) * share, u

    def damping(self, squares: Tensor, y: Tensor, u: Tensor) -> Tensor | None:
        """``1 / (1 + rate c ||x||^2)`` of every row, c the objective's curvature; None for 1.

        ``squares`` is ``||x||^2`` per row, or per row and feature where these differ in input.
        """
        if self.objective.name == "dot" or isinstance(self.rate, float) and self.rate == 0:
            return None
        if self.objective.curvature is not None:
            bend = self.objective.curvature(y, u)
            squares = squares * (bend.unsqueeze(-1) if squares.ndim > bend.ndim else bend)
        return 1 / (1 + self.rate * squares)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, y, rule):
        ctx.save_for_backward(x, weight, bias, y)
        ctx.rule = rule
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, bias, y = ctx.saved_tensors
        rule: LayerRule = ctx.rule
        w = weight.to(grad.dtype)
        g_x = (grad @ w).to(x.dtype) if ctx.needs_input_grad[0] else None
        rows, y, grad = (t.reshape(-1, t.shape[-1]) for t in (x.to(grad.dtype), y, grad))
        signal, u = rule.signal(rows, y, grad, len(rows))
        ones: Any = None
        if rule.oja:  # the bias is the weight of an input 1, so that has its own residual
            ones = None if bias is None else 1 - u @ bias.to(u.dtype)
            rows = rows - u @ w
        else:
            squares = torch.linalg.vector_norm(rows, dim=-1).square() + (bias is not None)
            scale = rule.damping(squares, y, u)
            if scale is not None:
                signal.mul_(scale.to(signal.dtype).unsqueeze(-1))
        g_w = (signal.mT @ rows).to(weight.dtype) if ctx.needs_input_grad[1] else None
        g_b = None
        if ctx.needs_input_grad[2]:
            g_b = (signal.sum(0) if ones is None else signal.mT @ ones).to(bias.dtype)
        return g_x, g_w, g_b, None, None


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, index, weight, y, rule, padding):
        ctx.save_for_backward(index, weight, y)
        ctx.rule, ctx.padding = rule, padding
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        index, weight, y = ctx.saved_tensors
        rule: LayerRule = ctx.rule
        y, grad = (t.reshape(-1, t.shape[-1]) for t in (y, grad))
        signal, u = rule.signal(index.flatten(), y, grad, len(y))
        scale = rule.damping(torch.ones_like(y[:, 0]), y, u)  # a row's input is one-hot
        signal = signal if scale is None else signal * scale.to(signal.dtype).unsqueeze(-1)
        g_w = torch.ops.aten.embedding_dense_backward(
            signal, index.flatten(), weight.shape[0], ctx.padding, False
        )
        return None, g_w.to(weight.dtype), None, None, None


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, y, rule, shape):
        ctx.save_for_backward(x, weight, bias, y)
        ctx.rule, ctx.shape = rule, shape
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, bias, y = ctx.saved_tensors
        rule: LayerRule = ctx.rule
        stride, padding, dilation, groups = ctx.shape
        kind, ones = grad.dtype, [0] * len(stride)
        xs, w = x.to(kind), weight.to(kind)

        def backward(signal: Tensor, mask: list[bool]) -> Any:
            return torch.ops.aten.convolution_backward(
                signal, xs, w, None if bias is None else [w.shape[0]],
                stride, padding, dilation, False, ones, groups, mask,
            )  # fmt: skip

        needs = ctx.needs_input_grad
        g_x = backward(grad, [True, False, False])[0].to(x.dtype) if needs[0] else None
        # Channels last: every position of the output is a row, its input the patch below it.
        last, grad_last = y.movedim(1, -1), grad.movedim(1, -1)
        rows = last[..., 0].numel()
        signal, u = rule.signal(xs, last, grad_last, rows)
        convolve = (F.conv1d, F.conv2d, F.conv3d)[len(stride) - 1]
        kernel = torch.ones(groups, *w.shape[1:], dtype=kind, device=w.device)
        squares = convolve(xs.square(), kernel, None, stride, padding, dilation, groups)
        squares = squares.movedim(1, -1) + (bias is not None)
        per_group = w.shape[0] // groups
        squares = squares.repeat_interleave(per_group, dim=-1)
        scale = rule.damping(squares, last, u)
        signal = signal if scale is None else signal * scale.to(kind)
        signal = signal.movedim(-1, 1).contiguous()
        _, g_w, g_b = backward(signal, [False, needs[1], needs[2]])
        cast = [None if g is None else g.to(weight.dtype) for g in (g_w, g_b)]
        return g_x, *cast, None, None, None


def supported(module: nn.Module, objective: str) -> bool:
    """Whether a layer's parameters can learn from an objective on its output."""
    if isinstance(module, nn.Linear):
        return True
    if objective == "oja":
        return False
    if isinstance(module, nn.Embedding):
        plain = not module.sparse and not module.scale_grad_by_freq and module.max_norm is None
        return plain
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return module.padding_mode == "zeros" and not isinstance(module.padding, str)
    return False


def attach(
    module: nn.Module, rule: Callable[[nn.Module], LayerRule | None]
) -> torch.utils.hooks.RemovableHandle:
    """Let a layer's own parameters learn from an inner objective, until the handle is removed.

    Args:
        module: a `supported` layer.
        rule: asked at every forward pass; None leaves the layer as it is.
    """

    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not torch.is_grad_enabled():
            return None
        now = rule(module)
        if now is None:
            return None
        layer: Any = module
        x, y, weight = args[0], output.detach(), layer.weight
        if isinstance(module, nn.Embedding):
            padding = -1 if module.padding_idx is None else module.padding_idx
            return _Embedding.apply(x, weight, y, now, padding)
        if isinstance(module, nn.Linear):
            return _Linear.apply(x, weight, layer.bias, y, now)
        shape = (layer.stride, layer.padding, layer.dilation, layer.groups)
        return _Convolution.apply(x, weight, layer.bias, y, now, shape)

    return module.register_forward_hook(hook)
