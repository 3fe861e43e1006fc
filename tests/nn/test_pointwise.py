"""Hand-written backward passes of the write path's pointwise pieces."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from nestlearn.nn.pointwise import gelu_and_slope, guard_rows, silu_and_slope, unit

F64 = torch.float64


def test_unit():
    x = torch.randn(3, 4, 5, dtype=F64, requires_grad=True)
    torch.testing.assert_close(unit(x, 1), F.normalize(x, dim=1), rtol=0, atol=1e-5)
    assert unit(torch.zeros(2, 3)).eq(0).all()
    assert unit(torch.full((1, 4), 1e15)).isfinite().all()
    assert torch.autograd.gradcheck(lambda t: unit(t, -1), (x,))
    assert torch.autograd.gradcheck(lambda t: unit(t, 1), (x,))


def test_silu_and_slope():
    z = torch.randn(50, dtype=F64, requires_grad=True)
    value, slope = silu_and_slope(z)
    torch.testing.assert_close(value, F.silu(z))
    torch.testing.assert_close(slope, torch.autograd.grad(F.silu(z).sum(), z)[0])
    assert torch.autograd.gradcheck(silu_and_slope, (z,))


def test_guard_rows():
    weight = torch.randn(4, 6, dtype=F64) * torch.tensor([[0.1], [1.0], [5.0], [0.0]], dtype=F64)
    bound = torch.full((4, 1), 1.5, dtype=F64)
    out = guard_rows(weight, bound)
    expected = weight * (bound / weight.norm(dim=-1, keepdim=True).clamp(min=1e-30)).clamp(max=1)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(out[0], weight[0])
    assert torch.autograd.gradcheck(
        lambda w: guard_rows(w, bound[:3]), (weight[:3].clone().requires_grad_(),)
    )


def test_gelu_and_slope():
    z = torch.randn(50, dtype=F64, requires_grad=True)
    value, slope = gelu_and_slope(z)
    exact = F.gelu(z, approximate="tanh")
    torch.testing.assert_close(value, exact)
    torch.testing.assert_close(slope, torch.autograd.grad(exact.sum(), z)[0])
    assert torch.autograd.gradcheck(gelu_and_slope, (z,))


def test_guarded_rows_hold_no_number_whose_square_is_denormal():
    weight = torch.logspace(-40, 0, 400).view(20, 20)
    out = guard_rows(weight, torch.full((20, 1), 10.0))
    left = out[out != 0].abs()
    assert left.min() > 1e-18
    torch.testing.assert_close(out, weight, rtol=1e-6, atol=1e-16)


def test_row_bound_and_unit():
    w = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]], requires_grad=True)
    bounded = guard_rows(w, torch.ones(3, 1))
    torch.testing.assert_close(bounded, torch.tensor([[0.6, 0.8], [0.3, 0.4], [0.0, 0.0]]))
    (bounded.sum() + unit(w).sum()).backward()
    assert w.grad.isfinite().all()
