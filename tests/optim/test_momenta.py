"""Delta momentum, deep momentum and the parts of the general form, each against its equation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from nestlearn.memory.objectives import get_objective
from nestlearn.optim import AssociativeMomentum, DeepMomentum, DeltaMomentum
from nestlearn.rules import reference

from .models import distance, tiny_lm, train

SHAPE = (3, 5)


def gradients(n: int, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(n, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(7))


def drive(optimizer: torch.optim.Optimizer, p: Tensor, gs: Tensor) -> Tensor:
    for g in gs:
        p.grad = g.clone()
        optimizer.step()
    return p.detach().clone()


def zeros(shape: tuple[int, ...] = SHAPE) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (4, 2, 2)])
def test_delta_momentum_is_its_equation(shape: tuple[int, ...]) -> None:
    """Eq. 49 with g^T g formed: m <- m (alpha I - e' g^T g) - g, W <- W + lr m."""
    gs, p = gradients(6, shape), zeros(shape)
    m, w = torch.zeros(shape).double().flatten(1), torch.zeros(shape).double().flatten(1)
    for g in gs.flatten(2):
        rate = 0.7 / (1 + 0.7 * g.square().sum())
        m = m @ (0.9 * torch.eye(g.shape[1]).double() - rate * g.T @ g) - g
        w = w + 0.1 * m
    after = drive(DeltaMomentum([p], lr=0.1, momentum=0.9, delta=0.7), p, gs)
    torch.testing.assert_close(after.flatten(1), w)


def test_delta_momentum_of_vectors_and_elementwise() -> None:
    gs = gradients(6)
    m, w = torch.zeros(SHAPE).double(), torch.zeros(SHAPE).double()
    for g in gs:
        m = m * (0.9 - 0.7 * g**2 / (1 + 0.7 * g**2)) - g
        w = w + 0.1 * m
    p, q = zeros(), zeros((15,))
    options = {"lr": 0.1, "delta": 0.7}
    torch.testing.assert_close(
        drive(DeltaMomentum([p], structure="elementwise", **options), p, gs), w
    )
    torch.testing.assert_close(drive(DeltaMomentum([q], **options), q, gs.flatten(1)), w.flatten())


def test_delta_momentum_descends_its_inner_objective() -> None:
    """The change of m is that of a gradient step on 1/2 ||m g^T + I||^2 (autograd), where decay
    and value have one rate."""
    g, m0 = gradients(2)
    m = m0.clone().requires_grad_()
    (slope,) = torch.autograd.grad(0.5 * (m @ g.T + torch.eye(3)).square().sum(), m)
    p = zeros()
    optimizer = DeltaMomentum([p], lr=1.0, momentum=0.999999, delta=1e-6)
    p.grad = -m0.clone()
    optimizer.step()  # the buffer holds -m0 with the sign of the gradient
    before = -optimizer.state[p]["momentum_buffer"].clone()
    p.grad = g
    optimizer.step()
    change = -optimizer.state[p]["momentum_buffer"] - 0.999999 * before
    # m g^T g has the rate 1e-6, the value g the rate 1.
    torch.testing.assert_close(change, -g - 1e-6 / (1 + 1e-6 * g.square().sum()) * (slope - g))


def test_delta_momentum_without_delta_is_sgd() -> None:
    a, b = tiny_lm(), tiny_lm()
    train(a, torch.optim.SGD(a.parameters(), lr=0.1, momentum=0.9))
    train(b, DeltaMomentum(b, lr=0.1, momentum=0.9, delta=0.0))
    assert distance(a, b) < 1e-9


def test_the_decay_may_be_computed_in_fewer_bits() -> None:
    gs = gradients(6)
    p, q = zeros(), zeros()
    low = drive(DeltaMomentum([p], lr=0.1, decay_dtype=torch.bfloat16), p, gs)
    exact = drive(DeltaMomentum([q], lr=0.1), q, gs)
    assert low.dtype == torch.float64 and 0 < (low - exact).abs().max() < 0.02 * exact.abs().max()


def test_normalized_delta_does_not_see_the_gradients_scale() -> None:
    gs = gradients(5)
    for structure in ("matrix", "elementwise"):
        options = {"lr": 0.1, "normalize": True, "structure": structure}
        p, q = zeros(), zeros()
        a = drive(DeltaMomentum([p], **options), p, gs)
        b = drive(DeltaMomentum([q], **options), q, 1000 * gs)
        torch.testing.assert_close(1000 * a, b)


def test_the_delta_preset_is_the_rule_of_memories() -> None:
    """Keys are the gradient's rows: with one row it is `rules.reference.delta` with value 1, and
    for the dot product `rules.reference.hebbian`."""
    gs = gradients(5, (1, 4))
    for preset, rule in (("delta", reference.delta), ("sgd", reference.hebbian)):
        p, M = zeros((1, 4)), torch.zeros(1, 4).double()
        optimizer = AssociativeMomentum([p], preset, lr=0.1, retention=0.8)
        for g in gs:
            p.grad = g.clone()
            optimizer.step()
            rate = 1 / (1 + g.square().sum()) if preset == "delta" else torch.tensor(1.0)
            M = rule(M, g[0], torch.ones(1).double(), rate, torch.tensor(0.8))
        torch.testing.assert_close(optimizer.state[p]["momentum"], M)


@pytest.mark.parametrize("objective", ["l2", "lp", "huber"])
@pytest.mark.parametrize("structure", ["matrix", "elementwise"])
def test_any_objective_is_descended(objective: str, structure: str) -> None:
    """The memory moves along the autograd gradient of the stated objective."""
    L = get_objective(objective)
    g, start = gradients(2)
    p = zeros()
    optimizer = AssociativeMomentum(
        [p], "sgd", lr=0.1, objective=objective, structure=structure, retention=1.0
    )
    p.grad = start
    optimizer.step()
    m = optimizer.state[p]["momentum"].clone().requires_grad_()
    if structure == "matrix":
        value = L.value(m @ g.T, torch.eye(3).double()).sum()
    else:
        value = L.value((m * g).unsqueeze(-1), torch.ones(*SHAPE, 1).double()).sum()
    (slope,) = torch.autograd.grad(value, m)
    p.grad = g.clone()
    optimizer.step()
    change = optimizer.state[p]["momentum"] - m.detach()
    ratio = change / -slope
    assert (ratio > 0).all() and (ratio <= 1).all()  # descent, with a rate damped below eta
    if structure == "matrix":
        torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio))


def test_feature_map_value_and_output() -> None:
    """Eq. 47, 51, 52: m <- alpha m + eta P phi(g), W <- W - lr sigma(m)."""
    gs, p = gradients(4), zeros()
    h, m, w = (torch.zeros(SHAPE).double() for _ in range(3))
    for g in gs:
        h = 0.5 * h + 0.5 * g**2
        m = 0.8 * m + 0.3 * torch.tanh(g) / (h.sqrt() + 1e-3)
        w = w - 0.1 * m.sign()
    optimizer = AssociativeMomentum(
        [p], "sgd", lr=0.1, retention=0.8, rate=0.3, feature=torch.tanh, value="diagonal",
        value_retention=0.5, eps=1e-3, output="sign",
    )  # fmt: skip
    torch.testing.assert_close(drive(optimizer, p, gs), w)


def test_designs_that_do_not_fit_raise() -> None:
    p = [zeros()]
    for options, message in (
        ({"preset": "nothing"}, "preset must be one of"),
        ({"objective": "l2", "value": "diagonal"}, "place='memory'"),
        ({"retention": 1.0, "rate": None}, "give rate"),
        ({"retention": 1.5}, "retention must be in"),
        ({"readout": "nadam"}, "leave rate=None"),
        ({"value": "full", "place": "output"}, "value='diagonal'"),
        ({"output": "x"}, "output must be one of"),
        ({"ns_dtype": "float8"}, "ns_dtype must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            AssociativeMomentum(p, **options)
    with pytest.raises(ValueError, match="is no matrix"):
        AssociativeMomentum([zeros((3,))], "muon")


@pytest.mark.parametrize("objective", ["dot", "l2"])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_deep_momentum_is_its_equation(objective: str, depth: int) -> None:
    """Inner steps by autograd on the stated objective, three steps; Eq. 50."""
    gs, p = gradients(3), zeros()
    optimizer = DeepMomentum([p], lr=0.1, inner_lr=0.5, retention=0.9, depth=depth, width=4,
                             objective=objective, bound=1e9)  # fmt: skip
    p.grad = torch.zeros(SHAPE).double()
    optimizer.step()  # makes the memory, writes nothing
    state = optimizer.state[p]
    first = [state[f"initial_{i}"].clone() for i in range(depth - 1)]
    learned = [state[f"weight_{i}"].clone() for i in range(depth)]

    def network(weights: list[Tensor], k: Tensor) -> Tensor:
        h = k
        for w, start in zip(weights[:-1], first, strict=True):
            h = nn.functional.silu(h @ (w + start).T)
        answer = h @ weights[-1].T
        return answer if objective == "l2" else k + answer

    w = torch.zeros(SHAPE).double()
    for g in gs:
        norm = g.norm(dim=1, keepdim=True)
        k = g / norm
        weights = [x.requires_grad_() for x in learned]
        y = network(weights, k)
        L = 0.5 * (y - k).square() if objective == "l2" else -y * k
        slopes = torch.autograd.grad(L.sum(-1).mean(), weights)
        learned = [(0.9 * x - 0.5 * s).detach() for x, s in zip(weights, slopes, strict=True)]
        w = w - 0.1 * norm * network(learned, k)
    torch.testing.assert_close(drive(optimizer, p, gs), w.detach())


def test_an_empty_deep_memory_is_gradient_descent() -> None:
    a, b = tiny_lm(), tiny_lm()
    train(a, torch.optim.SGD(a.parameters(), lr=0.1), 30)
    train(b, DeepMomentum(b, lr=0.1, inner_lr=0.0, momentum=0.0), 30)
    assert distance(a, b) < 1e-10


def test_deep_momentum_answers_a_repeated_direction_louder() -> None:
    p, q = zeros((1, 6)), zeros((1, 6))
    optimizer = DeepMomentum([p], lr=1.0, inner_lr=0.3)
    direction = torch.eye(6).double()[:1]
    moved = []
    for _ in range(30):
        before = p.detach().clone()
        p.grad = direction.clone()
        optimizer.step()
        moved.append((before - p.detach())[0, 0].item())
    assert moved[-1] > 1.2 * moved[0]
    bounded = DeepMomentum([q], lr=1.0, inner_lr=10.0, bound=0.5)
    for g in gradients(50, (1, 6)):
        q.grad = g
        bounded.step()
    assert bounded.state[q]["weight_1"].norm() <= 0.5 + 1e-12


def test_the_literal_value_of_deep_momentum_ignores_the_gradients_sign() -> None:
    """<m(u), 1> moves every answer the same way, whatever u says: why it is not the default."""
    answers = []
    for sign in (1.0, -1.0):
        p = zeros((2, 3))
        optimizer = DeepMomentum([p], lr=1.0, depth=1, inner_lr=1.0, value="ones")
        p.grad = sign * torch.ones(2, 3).double()
        before = optimizer.defaults["value"]
        optimizer.step()
        answers.append(optimizer.state[p]["weight_0"].clone() * sign)
    assert before == "ones"
    torch.testing.assert_close(answers[0], answers[1])
    assert (answers[0] > 0).all()


def test_deep_momentum_orthogonalises_its_answer() -> None:
    p = zeros()
    optimizer = DeepMomentum([p], lr=1.0, output="newton_schulz")
    p.grad = gradients(1)[0]
    optimizer.step()
    values = torch.linalg.svdvals(p.detach())
    assert values.min() > 0.5 and values.max() < 1.3
