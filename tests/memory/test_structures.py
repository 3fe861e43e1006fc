"""Closed-form gradients of deep memories against automatic differentiation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from nestlearn.memory.structures import forward, layer_gradients, weight_shapes

D, WIDTH, C = 5, 7, 3


def make(depth):
    shapes = weight_shapes(D, D, depth, WIDTH)
    weights = [torch.randn(2, 3, *s, dtype=torch.float64).requires_grad_() for s in shapes]
    return weights, torch.randn(2, 3, C, D, dtype=torch.float64)


@pytest.mark.parametrize("activation", ["silu", "gelu"])
@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_gradients(depth, activation):
    weights, x = make(depth)
    act = F.silu if activation == "silu" else lambda z: F.gelu(z, approximate="tanh")
    v = torch.randn_like(x)
    h = x
    for w in weights[:-1]:
        h = act(torch.einsum("bhoi,bhci->bhco", w, h))
    y = torch.einsum("bhoi,bhci->bhco", weights[-1], h) + (x if depth > 1 else 0)
    torch.testing.assert_close(forward(weights, x, activation), y)

    inputs, deltas, answer = layer_gradients(weights, x, lambda out: out - v, activation)
    torch.testing.assert_close(answer, y)
    for t in range(C):
        loss = 0.5 * (y[:, :, t] - v[:, :, t]).square().sum()
        expected = torch.autograd.grad(loss, weights, retain_graph=True)
        for a, d, e in zip(inputs, deltas, expected, strict=True):
            torch.testing.assert_close(d[:, :, t, :, None] * a[:, :, t, None], e)


def test_outer_gradient_goes_through_the_inner_one():
    weights, x = make(2)

    def inner(*ws):
        _, deltas, _ = layer_gradients(ws, x, lambda out: out)
        return deltas[0].sum() + deltas[1].square().sum()

    assert torch.autograd.gradcheck(inner, weights)


@pytest.mark.parametrize(("args", "message"), [((4, 4, 5, 8), "1 to 4"), ((4, 5, 2, 8), "d_in")])
def test_errors(args, message):
    with pytest.raises(ValueError, match=message):
        weight_shapes(*args)
