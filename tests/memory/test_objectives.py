"""Closed-form gradients of the inner objectives against automatic differentiation."""

from __future__ import annotations

import pytest
import torch

from nestlearn.memory.objectives import OBJECTIVES, get_objective, huber, lp

ALL = {
    **OBJECTIVES,
    "lp, p = 1.5": lp(1.5),
    "lp, literal": lp(2.5, smooth=0.0),
    "huber, narrow": huber(0.2),
}


@pytest.mark.parametrize("name", ALL)
def test_gradient_is_that_of_the_value(name):
    objective = ALL[name]
    y = torch.randn(4, 7, dtype=torch.float64).requires_grad_()
    v = torch.randn(4, 7, dtype=torch.float64)
    (expected,) = torch.autograd.grad(objective.value(y, v).sum(), y)
    torch.testing.assert_close(objective.grad(y, v), expected)
    if objective.curvature is not None:
        hessian = torch.autograd.functional.hessian(lambda a: objective.value(a, v[0]), y[0])
        assert objective.curvature(y[0], v[0]) >= hessian.abs().max() - 1e-9


def test_lp_is_differentiable_at_zero_error():
    y = torch.zeros(3, requires_grad=True)
    get_objective("lp", p=1.0).grad(y, torch.zeros(3)).sum().backward()
    assert y.grad.isfinite().all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lp(0.5), "p >= 1"),
        (lambda: lp(2, -1), ">= 0"),
        (lambda: huber(0.0), "delta > 0"),
        (lambda: get_objective("l3"), "choose one of"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
