"""Memory structures: what is stored, as plain functions of explicit weights (SPEC §2, Eq. 89, 91).

A memory is a tuple of weights ``(..., out, in)`` with one independent memory per leading index:

- one weight: ``M(x) = W x``;
- L >= 2 weights: ``M(x) = x + W_L s(W_{L-1} ... s(W_1 x))`` (needs ``d_out = d_in``).

Gradients of the inner objective are written out by hand, so the outer gradient goes through them
as through any other layer; no automatic differentiation runs inside a forward pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_DEPTH = 4


def silu(z: Tensor) -> tuple[Tensor, Tensor]:
    """``z sigmoid(z)`` and its slope."""
    gate = torch.sigmoid(z)
    out = z * gate
    return out, gate + out * (1 - gate)


def gelu(z: Tensor) -> tuple[Tensor, Tensor]:
    """The tanh form of GELU and its slope."""
    scale = math.sqrt(2 / math.pi)
    tanh = torch.tanh(scale * (z + 0.044715 * z**3))
    inner = scale * (1 + 3 * 0.044715 * z.square())
    return 0.5 * z * (1 + tanh), 0.5 * (1 + tanh) + 0.5 * z * (1 - tanh.square()) * inner


ACTIVATIONS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {"silu": silu, "gelu": gelu}
"""Name to function of ``z`` that returns value and slope."""


def activate(activation: str, z: Tensor) -> Tensor:
    """The activation without its slope."""
    return F.silu(z) if activation == "silu" else F.gelu(z, approximate="tanh")


def weight_shapes(d_in: int, d_out: int, depth: int, width: int) -> list[tuple[int, int]]:
    """Shapes ``(out, in)`` of the weights of a memory.

    Args:
        d_in, d_out: sizes of input and output.
        depth: number of weights, 1 to 4.
        width: hidden size (unused at depth 1).

    Raises:
        ValueError: depth out of range, or a deep memory with ``d_in != d_out``.
    """
    if not 1 <= depth <= MAX_DEPTH:
        raise ValueError(f"memory depth must be 1 to {MAX_DEPTH}, got {depth}")
    if depth == 1:
        return [(d_out, d_in)]
    if d_in != d_out:
        raise ValueError(
            "a deep memory adds its input to its output and needs d_in = d_out, "
            f"got {d_in} and {d_out}; use depth 1 or a feature map that keeps the size"
        )
    return [(width, d_in), *[(width, width)] * (depth - 2), (d_out, width)]


def forward(weights: Sequence[Tensor], x: Tensor, activation: str = "silu") -> Tensor:
    """``M(x)`` for ``x (..., C, d_in)``: ``(..., C, d_out)`` (Eq. 89).

    Example:
        >>> forward([torch.eye(2) * 3], torch.ones(1, 2))
        tensor([[3., 3.]])
    """
    if len(weights) == 1:
        return x @ weights[0].mT
    h = x
    for w in weights[:-1]:
        h = activate(activation, h @ w.mT)
    return x + h @ weights[-1].mT


def layer_gradients(
    weights: Sequence[Tensor],
    x: Tensor,
    grad_fn: Callable[[Tensor], Tensor],
    activation: str | Callable[[Tensor], tuple[Tensor, Tensor]] = "silu",
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Backpropagation through the memory, written out (SPEC §2).

    The gradient of the objective of token t with respect to weight l is ``delta_l[t] a_l[t]^T``.

    Args:
        weights: the memory.
        x: keys ``(..., C, d_in)``.
        grad_fn: objective's gradient at the output, ``y -> dL/dy``.
        activation: "silu", "gelu", or a function that returns value and slope.

    Returns:
        Inputs ``a_l (..., C, in_l)`` of every layer, gradients ``delta_l (..., C, out_l)`` at every
        layer's output (before the activation), and the memory's output ``y``.

    Example:
        >>> inputs, grads, y = layer_gradients([torch.eye(2)], torch.ones(1, 2), lambda y: y - 3)
        >>> grads[0]
        tensor([[-2., -2.]])
    """
    both = ACTIVATIONS[activation] if isinstance(activation, str) else activation
    inputs = [x]
    slopes: list[Tensor] = []
    for w in weights[:-1]:
        value, slope = both(inputs[-1] @ w.mT)
        inputs.append(value)
        slopes.append(slope)
    y = inputs[-1] @ weights[-1].mT
    if len(weights) > 1:
        y = y + x
    grads = [grad_fn(y)]
    for w, slope in zip(reversed(weights[1:]), reversed(slopes), strict=True):
        grads.append((grads[-1] @ w) * slope)
    grads.reverse()
    return inputs, grads, y
