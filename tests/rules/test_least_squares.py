"""The exact delta rule against the normal equations."""

from __future__ import annotations

import pytest
import torch

from nestlearn.rules.least_squares import least_squares, solve
from nestlearn.rules.reference import dgd


def pairs(n: int = 12, d_in: int = 5, d_out: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return (
        torch.randn(n, d_in, generator=g, dtype=torch.float64),
        torch.randn(n, d_out, generator=g, dtype=torch.float64),
    )


def run(K: torch.Tensor, V: torch.Tensor, prior: torch.Tensor) -> torch.Tensor:
    M, P = torch.zeros(V.shape[1], K.shape[1], dtype=K.dtype), torch.linalg.inv(prior)
    for k, v in zip(K, V, strict=True):
        M, P = least_squares(M, P, k, v)
    return M


def test_recursion_and_sums_are_the_minimum() -> None:
    K, V = pairs()
    R = torch.randn(5, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    prior = R.mT @ R + 0.1 * torch.eye(5)
    M = solve(K.mT @ K, V.mT @ K, prior).requires_grad_()
    torch.testing.assert_close(run(K, V, prior), M.detach())
    objective = (K @ M.mT - V).square().sum() + torch.trace(M @ prior @ M.mT)
    (gradient,) = torch.autograd.grad(objective, M)
    assert gradient.abs().max() < 1e-10


def test_order_does_not_matter() -> None:
    K, V = pairs()
    order = torch.randperm(len(K), generator=torch.Generator().manual_seed(2))
    prior = 0.3 * torch.eye(5, dtype=torch.float64)
    torch.testing.assert_close(run(K, V, prior), run(K[order], V[order], prior))


def test_the_first_step_is_the_proximal_one() -> None:
    """With P = eta I: delta gradient descent with eta / (1 + eta |k|^2)."""
    K, V = pairs()
    eta = 0.7
    M0 = torch.randn(3, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    M, _ = least_squares(M0, eta * torch.eye(5, dtype=torch.float64), K[0], V[0])
    step = eta / (1 + eta * K[0].square().sum())
    torch.testing.assert_close(M, dgd(M0, K[0], -V[0], step, 1.0))


def test_damaged_sums_are_refused() -> None:
    with pytest.raises(ValueError, match="not positive definite"):
        solve(-2 * torch.eye(3), torch.ones(1, 3), torch.eye(3))
