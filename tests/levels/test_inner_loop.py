"""Two-level systems by hand: every transfer against its equation, and how the lens sees them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nestlearn as nl
from nestlearn.levels import (
    Backpropagation,
    DirectNonParametric,
    DirectParametric,
    Generation,
    Initialisation,
    InnerLoop,
    TwoLevel,
)

INIT, FLOW = Initialisation("meta", "task"), Backpropagation("meta", "task")
LR = 0.05


def linear() -> nn.Linear:
    return nn.Linear(3, 1, bias=False).double()


def points(*shape: int) -> tuple[Tensor, Tensor]:
    return torch.randn(*shape, 3).double(), torch.randn(*shape, 1).double()


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)).double()


# -- the inner loop ------------------------------------------------------------------------------


def test_steps_are_gradient_descent() -> None:
    """Linear regression: theta_k = theta* + (I - lr H)^k (theta_0 - theta*), H = 2 X^T X / n."""
    module, (x, y) = linear(), points(20)
    learned = InnerLoop(module, F.mse_loss, steps=7, lr=LR).learn(
        dict(module.named_parameters()), (x, y)
    )
    best = torch.linalg.lstsq(x, y).solution.T
    shrink = torch.linalg.matrix_power(torch.eye(3) - LR * 2 * x.T @ x / 20, 7)
    assert torch.allclose(learned["weight"], best + (module.weight - best) @ shrink.T)
    assert torch.equal(dict(module.named_parameters())["weight"], module.weight)  # untouched


def test_a_vector_becomes_parameters_in_order() -> None:
    loop = InnerLoop(net(), F.mse_loss)
    flat = torch.arange(loop.size).double()
    made = loop.unflatten(flat)
    assert {n: p.shape for n, p in made.items()} == {
        n: p.shape for n, p in loop.parameters().items()
    }
    assert torch.equal(torch.cat([p.flatten() for p in made.values()]), flat)
    with pytest.raises(ValueError, match="26 parameters"):
        loop.unflatten(flat[1:])


# -- initialisation: MAML ------------------------------------------------------------------------


@pytest.mark.parametrize("through", [True, False])
def test_gradient_of_the_initial_state(through: bool) -> None:
    """d L(theta_k) / d theta_0 = (I - lr H)^k grad L(theta_k); first order: grad L(theta_k)."""
    module, (x, y), (qx, qy) = linear(), points(1, 20), points(1, 8)
    links = [INIT, FLOW] if through else [INIT]
    maml = TwoLevel(InnerLoop(module, F.mse_loss, steps=3, lr=LR), links)
    maml.loss((x, y), (qx, qy)).backward()
    learned = maml.learn((x[0], y[0]))["weight"].detach()
    slope = 2 * (learned @ qx[0].T - qy[0].T) @ qx[0] / 8
    if through:
        slope = slope @ torch.linalg.matrix_power(torch.eye(3) - LR * 2 * x[0].T @ x[0] / 20, 3)
    assert torch.allclose(module.weight.grad, slope)


def test_second_order_of_a_network_against_an_unrolled_loop() -> None:
    module, (x, y), (qx, qy) = net(), points(4, 10), points(4, 6)
    maml = TwoLevel(InnerLoop(module, F.mse_loss, steps=2, lr=LR), [INIT, FLOW])
    maml.loss((x, y), (qx, qy)).backward()
    total = torch.zeros(()).double()
    start = [p.detach().clone().requires_grad_() for p in module.parameters()]

    def predict(p: list[Tensor], x: Tensor) -> Tensor:
        return torch.tanh(x @ p[0].T + p[1]) @ p[2].T + p[3]

    for i in range(4):
        weights = start
        for _ in range(2):
            loss = (predict(weights, x[i]) - y[i]).square().mean()
            slopes = torch.autograd.grad(loss, weights, create_graph=True)
            weights = [w - LR * g for w, g in zip(weights, slopes, strict=True)]
        total = total + (predict(weights, qx[i]) - qy[i]).square().mean() / 4
    for p, g in zip(module.parameters(), torch.autograd.grad(total, start), strict=True):
        assert torch.allclose(p.grad, g)


def test_another_module_may_hold_the_initial_state() -> None:
    holder, module = net(), net()
    maml = TwoLevel(InnerLoop(module, F.mse_loss), [INIT, FLOW], slow=holder)
    assert {id(p) for p in maml.parameters()} == {id(p) for p in holder.parameters()}
    context, query = points(2, 4), points(2, 4)
    maml.loss(context, query).backward()
    assert all(p.grad is not None for p in holder.parameters())
    assert all(p.grad is None for p in module.parameters())


# -- the other kinds -----------------------------------------------------------------------------


class Reads(nn.Module):
    """A slow module whose output depends on both of its inputs."""

    def __init__(self, first: int, second: int, out: int) -> None:
        super().__init__()
        self.map = nn.Linear(first + second, out).double()

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.map(torch.cat([a, b], -1))


class Generator(nn.Module):
    """The mean of the context's points, mapped to ``out`` numbers."""

    def __init__(self, out: int) -> None:
        super().__init__()
        self.map = nn.Linear(4, out).double()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.map(torch.cat([x, y], -1).mean(0))


class Teacher(nn.Module):
    """Makes the targets that the fast level learns."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(3, 1).double()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, self.map(x)


def test_generated_weights() -> None:
    slow = Generator(3)
    link = Generation("hyper", "task", generates="weights")
    system = TwoLevel(InnerLoop(linear(), F.mse_loss, steps=0), [link], slow=slow)
    (x, y), (qx, _) = points(10), points(4)
    weights = slow.map(torch.cat([x, y], -1).mean(0))
    assert torch.allclose(system((x, y), qx), qx @ weights[:, None])
    loop = InnerLoop(linear(), F.mse_loss, steps=1, lr=LR)
    stepped = TwoLevel(loop, [link, Backpropagation("hyper", "task")], slow=slow)
    slope = 2 * x.T @ (x @ weights[:, None] - y) / 10
    assert torch.allclose(stepped((x, y), qx), qx @ (weights[:, None] - LR * slope))
    assert {id(p) for p in stepped.parameters()} == {id(p) for p in slow.parameters()}


def test_generated_context() -> None:
    """The slow level teaches: its gradient comes through what the fast level learned from it."""
    slow, module = Teacher(), linear()
    links = [Generation("teacher", "task"), Backpropagation("teacher", "task")]
    system = TwoLevel(InnerLoop(module, F.mse_loss, lr=LR), links, slow, objective=F.mse_loss)
    (x, _), (qx, qy) = points(10), points(4)
    made = slow.map(x)
    learned = module.weight.T - LR * 2 * x.T @ (x @ module.weight.T - made) / 10
    assert torch.allclose(system((x,), qx), qx @ learned)
    system.loss((x[None],), (qx[None], qy[None])).backward()
    assert slow.map.weight.grad.abs().sum() > 0
    assert module.weight.grad is None  # a fixed start, not trained
    learned = InnerLoop(module, F.mse_loss).learn(
        {"weight": module.weight.detach()}, (x, slow.map(x)), through=False
    )
    assert not learned["weight"].requires_grad  # steps are constants: no way to the teacher


def test_direct_parametric() -> None:
    slow, module = Reads(3, 1, 1), linear()
    link = DirectParametric("task", "reader")
    system = TwoLevel(InnerLoop(module, F.mse_loss, steps=2, lr=LR), [link], slow)
    (x, y), (qx, _) = points(10), points(4)
    answer = qx @ system.learn((x, y))["weight"].T
    assert torch.allclose(system((x, y), qx), slow(qx, answer))


def test_direct_non_parametric() -> None:
    """The slow box reads the context itself; here, softmax attention over it (Eq. 27, 62)."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q = nn.Linear(3, 2).double()

        def forward(self, query: Tensor, x: Tensor, y: Tensor) -> Tensor:
            return torch.softmax(self.q(query) @ self.q(x).mT, -1) @ y

    slow = Attention()
    link = DirectNonParametric("context", "reader")
    system = TwoLevel(None, [link], slow, objective=F.mse_loss)
    (x, y), (qx, qy) = points(2, 10), points(2, 4)
    assert torch.allclose(system.episodes((x, y), qx), slow(qx, x, y))
    system.loss((x, y), (qx, qy)).backward()
    assert slow.q.weight.grad is not None


# -- what the lens sees --------------------------------------------------------------------------


def seen(system: TwoLevel, **sgd: Any) -> tuple[list[dict[str, Any]], set[tuple[str, str, str]]]:
    found = nl.inspect(system, torch.optim.SGD(system.parameters(), 0.1, **sgd))
    boxes = [{box.name: box.frequency for box in level} for level in found.levels]
    return boxes, {(t.kind, t.source, t.target) for t in found.transfers}


def test_maml_is_seen() -> None:
    """The fast level makes k steps while the slow one makes one (Def. 2); with k = 1 it is faster
    because the slow level's gradient, and the momentum of it, need what it learned."""
    for steps in (1, 5):
        maml = TwoLevel(InnerLoop(net(), F.mse_loss, steps=steps), [INIT, FLOW])
        boxes, links = seen(maml, momentum=0.9)
        assert boxes == [{"meta": 1}, {"momentum": 1}, {"task": steps}]
        assert links == {
            ("initialisation", "meta", "task"),
            ("backpropagation", "meta", "task"),
            ("direct parametric", "task", "meta"),
            ("generation", "meta", "momentum"),
            ("direct parametric", "momentum", "meta"),
        }
    system = nl.inspect(maml)
    assert system["meta"].objective == "mse_loss of the query, after the context"
    assert system["task"].parameters == ("0.weight", "0.bias", "2.weight", "2.bias")
    assert [box.frequency for box in system.boxes] == [0, 5]
    first = TwoLevel(InnerLoop(net(), F.mse_loss), [INIT])
    trained = nl.inspect(first, torch.optim.SGD(first.parameters()))
    assert trained["task"].differentiated == "first order: its steps are constants"
    assert "backpropagation" not in {t.kind for t in trained.transfers}


def test_a_hypernetwork_is_seen() -> None:
    link = Generation("hyper", "task", generates="weights")
    system = TwoLevel(InnerLoop(linear(), F.mse_loss, steps=0), [link], Generator(3))
    boxes, links = seen(system)
    assert boxes == [{"hyper": 1}, {"task": 1}]
    assert links == {("generation", "hyper", "task"), ("direct parametric", "task", "hyper")}
    found = nl.inspect(system)
    assert found["task"].solver == "generated, no steps"
    # The class Generator takes a mean over points, which nobody told the lens about.
    assert found["hyper"].parameters == ("slow.map.weight", "slow.map.bias")
    assert [u.what for u in found.unknown] == ["Generator"]


def test_direct_transfers_are_seen() -> None:
    link = DirectParametric("task", "reader")
    boxes, links = seen(TwoLevel(InnerLoop(linear(), F.mse_loss, steps=2), [link], Reads(3, 1, 1)))
    assert boxes == [{"start of task": 0}, {"reader": 1}, {"task": 2}]
    assert links == {("direct parametric", "task", "reader")}
    bare = TwoLevel(None, [DirectNonParametric("context", "reader")], Reads(3, 3, 1), F.mse_loss)
    boxes, links = seen(bare)
    assert boxes == [{"reader": 1}, {"context": float("inf")}]
    assert links == {("direct non-parametric", "context", "reader")}


# -- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: InnerLoop(nn.ReLU(), F.mse_loss), "no parameters"),
        (lambda: InnerLoop(net(), F.mse_loss, steps=-1), "steps"),
        (lambda: InnerLoop(net(), F.mse_loss, lr=float("nan")), "lr"),
        (lambda: TwoLevel(InnerLoop(net(), F.mse_loss), []), "slow level act"),
        (lambda: TwoLevel(InnerLoop(net(), F.mse_loss), [FLOW]), "slow level act"),
        (
            lambda: TwoLevel(InnerLoop(net(), F.mse_loss), [INIT, Backpropagation("a", "b")]),
            "one slow and one fast",
        ),
        (
            lambda: TwoLevel(InnerLoop(net(), F.mse_loss), [INIT, Initialisation("a", "b")]),
            "one slow and one fast",
        ),
        (
            lambda: TwoLevel(InnerLoop(net(), F.mse_loss), [INIT, Generation("meta", "task")]),
            "one thing",
        ),
        (
            lambda: TwoLevel(InnerLoop(net(), F.mse_loss), [INIT], slow=linear()),
            "parameters of the fast one",
        ),
        (
            lambda: TwoLevel(InnerLoop(net(), F.mse_loss), [Generation("a", "b")]),
            "slow level's module",
        ),
        (
            lambda: TwoLevel(InnerLoop(net(), F.mse_loss), [Generation("a", "b")], Teacher()),
            "Backpropagation",
        ),
        (lambda: TwoLevel(None, [INIT], net(), F.mse_loss), "needs an InnerLoop"),
        (lambda: TwoLevel(None, [DirectNonParametric("c", "r")], net()), "objective"),
        (
            lambda: TwoLevel(
                None, [DirectNonParametric("c", "r"), Backpropagation("r", "c")], net(), F.mse_loss
            ),
            "no fast parameters",
        ),
    ],
)
def test_mistakes_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
