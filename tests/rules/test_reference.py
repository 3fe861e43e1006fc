"""Every token step is one gradient step on the objective it is said to minimise (SPEC §2)."""

from __future__ import annotations

import pytest
import torch

from nestlearn.rules import reference as rule

ETA, ALPHA, BETA = 0.3, 0.9, 0.7


@pytest.fixture
def pair():
    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64)

    return draw(2, 5, 4).requires_grad_(), draw(2, 4), draw(2, 5)


def slope(objective, M):
    """d objective / d M by automatic differentiation, memories apart."""
    return torch.autograd.grad(objective.sum(), M)[0]


def answer(M, k):
    return torch.einsum("boi,bi->bo", M, k)


OBJECTIVES = {
    "hebbian": lambda M, k, v: -(answer(M, k) * v).sum(-1),
    "delta": lambda M, k, v: 0.5 * (answer(M, k) - v).pow(2).sum(-1),
    "oja": lambda M, k, v: (
        -(answer(M, k) * v).sum(-1) + 0.5 * torch.einsum("boi,bo->bi", M, v).pow(2).sum(-1)
    ),
    "lp": lambda M, k, v: (answer(M, k) - v).abs().pow(3).sum(-1),
    "huber": lambda M, k, v: torch.nn.functional.huber_loss(
        answer(M, k), v, delta=1.0, reduction="none"
    ).sum(-1),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_step_descends_its_objective(name, pair):
    M, k, v = pair
    expected = ALPHA * M - ETA * slope(OBJECTIVES[name](M, k, v), M)
    torch.testing.assert_close(getattr(rule, name)(M, k, v, ETA, ALPHA), expected)


def test_momentum_accumulates_the_gradient(pair):
    M, k, v = pair
    S = torch.randn_like(M)
    step = BETA * S - ETA * slope(OBJECTIVES["delta"](M, k, v), M)
    new, momentum = rule.momentum(M, S, k, v, ETA, ALPHA, BETA)
    torch.testing.assert_close(momentum, step)
    torch.testing.assert_close(new, ALPHA * M + step)


def test_omega_descends_the_weighted_sum_over_its_window(pair):
    M, k, v = pair
    pairs = [(k, v, 0.5), (2 * k, -v, 0.25), (k - 1, v + 1, 1.0)]
    total = sum(w * OBJECTIVES["delta"](M, a, b) for a, b, w in pairs)
    torch.testing.assert_close(rule.omega(M, pairs, ETA, ALPHA), ALPHA * M - ETA * slope(total, M))


def test_kl_step_solves_the_proximal_problem_on_the_simplex(pair):
    """The minimiser of <G, W> + alpha/eta KL(W | M) + (1-alpha)/eta KL(W | 1) has equal slopes in
    every row: no direction within the simplex descends."""
    M, k, v = pair
    M = torch.softmax(M.detach(), -1).requires_grad_()
    gradient = slope(OBJECTIVES["delta"](M, k, v), M)
    W = rule.kl(M, k, v, ETA, ALPHA).detach().requires_grad_()
    divergence = (W * (W.log() - ALPHA * M.detach().log())).sum()
    slopes = slope((gradient * W).sum() + divergence / ETA, W)
    torch.testing.assert_close(W.sum(-1), torch.ones_like(W.sum(-1)))
    torch.testing.assert_close(slopes, slopes.mean(-1, keepdim=True).expand_as(slopes))


@pytest.mark.parametrize("momentum", [False, True])
def test_dgd_solves_its_proximal_problem(pair, momentum):
    """SPEC §3.5: argmin 1/2 |W x - u|^2 + 1/(2 eta) |W - M|^2 with u = -g."""
    M, k, g = pair
    shrunk = ETA / (1 + ETA * k.pow(2).sum(-1))
    if momentum:
        W, S = rule.dgd_momentum(M, torch.zeros_like(M), k, g, shrunk, 1.0, BETA)
        torch.testing.assert_close(S, -shrunk[:, None, None] * g[:, :, None] * k[:, None])
    else:
        W = rule.dgd(M, k, g, shrunk, 1.0)
    W = W.detach().requires_grad_()
    problem = 0.5 * (answer(W, k) + g).pow(2).sum() + (W - M.detach()).pow(2).sum() / (2 * ETA)
    assert slope(problem, W).abs().max() < 1e-12


def test_gated_delta_places_retention_inside(pair):
    M, k, v = pair
    eye = torch.eye(4, dtype=torch.float64)
    kk = k[:, :, None] * k[:, None]
    expected = ALPHA * M @ (eye - ETA * kk) + ETA * v[:, :, None] * k[:, None]
    torch.testing.assert_close(rule.delta(M, k, v, ETA, ALPHA, ALPHA * ETA), expected)
