"""One battery for every optimizer: it converges, keeps types, resumes, and no NaN enters it."""

from __future__ import annotations

import copy
import io
import warnings

import pytest
import torch
from torch import Tensor, nn

from nestlearn.optim import AssociativeMomentum, DeltaMomentum

from .optimizers import OPTIMIZERS, OURS, Problem

DIFFERENTIABLE = ["sgd", "nesterov", "adam", "nadam", "adagrad", "muon", "delta", "DeltaMomentum"]
CAPTURABLE = ["sgd", "adam", "nadam", "lion", "muon", "adamuon", "DeltaMomentum", "DGD",
              "DeepMomentum"]  # fmt: skip


@pytest.fixture(params=OPTIMIZERS)
def make(request: pytest.FixtureRequest):
    return OPTIMIZERS[request.param]


@pytest.fixture(params=OURS)
def ours(request: pytest.FixtureRequest):
    return OPTIMIZERS[request.param]


def run(problem: Problem, optimizer, steps: int, which: str = "convex", last: float = 1.0) -> list:
    """Steps with a learning rate that falls linearly to ``last`` times its first value."""
    rates = [g["lr"] for g in optimizer.param_groups]
    losses = []
    for step in range(steps):
        for group, lr in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = lr * (1 - (1 - last) * step / steps)
        optimizer.zero_grad()
        loss = getattr(problem, which)()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def state_of(optimizer) -> list[Tensor]:
    found = optimizer.state_dict()["state"]
    return [v for s in found.values() for k, v in s.items() if torch.is_tensor(v)]


def gradient(problem: Problem, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in problem.parameters():
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def test_convex(make, request) -> None:
    problem = Problem()
    losses = run(problem, make(problem), 150, last=0.05)
    # The literal Alg. 1 slows down as 1/sqrt(t), because nothing decays.
    bound = 0.2 if "paper" in request.node.name else 0.03
    assert losses[-1] < bound * losses[0], f"{losses[0]} to {losses[-1]}"


def test_rosenbrock(make, request) -> None:
    problem = Problem()
    losses = run(problem, make(problem), 400, "rosenbrock", last=0.05)
    bound = 0.2 if "paper" in request.node.name else 0.05
    assert losses[-1] < bound * losses[0], f"{losses[0]} to {losses[-1]}"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_types_are_kept(make, dtype: torch.dtype, request) -> None:
    if dtype == torch.bfloat16 and any(n in request.node.name for n in ("full", "shampoo")):
        pytest.skip("torch has no eigenvalues in bfloat16")
    problem = Problem(dtype)
    losses = run(problem, make(problem), 8)
    assert all(p.dtype == dtype and torch.isfinite(p).all() for p in problem.parameters())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("stop", [1, 5, 9])
def test_resumes_bit_exactly(make, stop: int) -> None:
    straight, broken = Problem(torch.float32), Problem(torch.float32)
    run(straight, make(straight), 13)
    first = make(broken)
    run(broken, first, stop)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    if hasattr(first, "close"):
        first.close()
    second = make(broken)
    second.load_state_dict(torch.load(file, weights_only=True))
    run(broken, second, 13 - stop)
    for a, b in zip(straight.parameters(), broken.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_gradient_enters_nothing(ours, bad: float) -> None:
    """The parameter is left out of the step, state and all; the others are updated as usual."""
    problem, other = Problem(), Problem()
    optimizer, clean = ours(problem), ours(other)
    for seed in range(6):
        gradient(problem, seed)
        gradient(other, seed)
        if seed == 3:
            problem.layer.weight.grad[1, 2] = bad
            other.layer.weight.grad = None
            with pytest.warns(RuntimeWarning, match="not finite"):
                optimizer.step()
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("error", RuntimeWarning)
                warnings.filterwarnings("ignore", "layer had a gradient")
                optimizer.step()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "layer had a gradient")
            clean.step()
    assert optimizer.skipped == 1
    for a, b in zip(problem.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert all(torch.isfinite(s).all() for s in state_of(optimizer))


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e15])
def test_zero_and_huge_gradients(ours, size: float) -> None:
    problem = Problem(torch.float32)
    optimizer = ours(problem, lr=1e-20 if size > 1 else 1e-2)
    before = [p.detach().clone() for p in problem.parameters()]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "layer had a gradient")
        for seed in range(4):
            gradient(problem, seed)
            for p in problem.parameters():
                p.grad.mul_(size)
            optimizer.step()
    assert all(torch.isfinite(p).all() for p in problem.parameters())
    assert all(torch.isfinite(s).all() for s in state_of(optimizer))
    assert optimizer.skipped == 0
    if size == 0:
        for p, q in zip(problem.parameters(), before, strict=True):
            assert torch.equal(p, q)


def test_frozen_parameters_and_empty_groups(make) -> None:
    problem = Problem()
    problem.matrix.requires_grad_(False)
    before = problem.matrix.clone()
    optimizer = make(problem)
    assert optimizer.step() is None  # no gradient anywhere
    losses = run(problem, optimizer, 4)
    assert losses[-1] < losses[0] and torch.equal(problem.matrix, before)
    if hasattr(optimizer, "close"):
        optimizer.close()


def test_an_empty_group() -> None:
    problem = Problem()
    optimizer = AssociativeMomentum([{"params": []}, {"params": problem.parameters()}], lr=0.01)
    run(problem, optimizer, 2)
    with pytest.raises(ValueError, match="no trainable parameter"):
        AssociativeMomentum(nn.ReLU())


def test_maximize_and_closure(ours) -> None:
    down, up = Problem(), Problem()
    first, second = ours(down), ours(up, maximize=True)
    for seed in range(3):
        gradient(down, seed)
        gradient(up, seed)
        for p in up.parameters():
            p.grad.neg_()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "layer had a gradient")
            first.step(), second.step()
    for a, b in zip(down.parameters(), up.parameters(), strict=True):
        assert torch.equal(a, b)

    def closure() -> Tensor:
        first.zero_grad()
        loss = down.convex()
        loss.backward()
        return loss

    assert first.step(closure) > first.step(closure)


def test_foreach_changes_nothing(ours) -> None:
    problems = [Problem(), Problem()]
    for problem, foreach in zip(problems, (True, False), strict=True):
        run(problem, ours(problem, foreach=foreach), 6)
    for a, b in zip(*(p.parameters() for p in problems), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_sparse_and_complex_are_refused(ours, request) -> None:
    problem = Problem()
    optimizer = ours(problem)
    gradient(problem, 0)
    problem.matrix.grad = problem.matrix.grad.to_sparse()
    with pytest.raises(ValueError, match="sparse gradients are not supported"):
        optimizer.step()
    other = Problem()
    other.register_parameter("wave", nn.Parameter(torch.zeros(2, 2, dtype=torch.complex64)))
    with pytest.raises(ValueError, match="complex"):
        ours(other)


def test_a_gradient_scaler_leaves_out_what_overflowed(ours, request) -> None:
    if "DGD" in request.node.name or "Generalized" in request.node.name:
        pytest.skip("these take the scale as loss_scale: tests/optim/test_layers.py")
    scaled, plain = Problem(torch.float32), Problem(torch.float32)
    first, second = ours(scaled), ours(plain)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(4):
        first.zero_grad(), second.zero_grad()
        scaler.scale(scaled.convex()).backward()
        if step == 2:
            scaled.layer.weight.grad[0, 0] = float("inf")
        scaler.step(first)
        scaler.update()
        if step != 2:
            plain.convex().backward()
            second.step()
    for a, b in zip(scaled.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert first.skipped == 0  # the scaler left the whole step out


def test_schedulers_and_deepcopy(ours, request) -> None:
    problem = Problem()
    optimizer = ours(problem)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8)
    rates = [g["lr"] for g in optimizer.param_groups]
    run(problem, optimizer, 2)
    scheduler.step()
    assert all(g["lr"] < r for g, r in zip(optimizer.param_groups, rates, strict=True))
    if hasattr(optimizer, "close"):
        return  # bound to its model's layers
    twin, copied = copy.deepcopy((problem, optimizer))
    run(problem, optimizer, 3)
    run(twin, copied, 3)
    for a, b in zip(problem.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


def test_state_follows_names_into_other_groups(ours, request) -> None:
    if "adamuon" in request.node.name or "muon" in request.node.name:
        pytest.skip("built with groups of its own; M3 covers two kinds of groups")
    problem = Problem()
    optimizer = ours(problem)
    run(problem, optimizer, 3)
    stored = copy.deepcopy(optimizer.state_dict())
    twin = copy.deepcopy(problem)
    for m in twin.modules():
        m._forward_hooks.clear()
    other = ours(twin)
    turned = list(reversed(list(twin.named_parameters())))
    rest = {k: v for k, v in other.param_groups[0].items() if k not in ("params", "param_names")}
    if len(other.param_groups) == 1:  # one group per parameter, in the opposite order
        other.param_groups.clear()
        for name, p in turned:
            other.add_param_group({**rest, "params": [(name, p)], "lr": 123.0})
    other.load_state_dict(stored)
    assert all(g["lr"] != 123.0 for g in other.param_groups)
    run(problem, optimizer, 3)
    run(twin, other, 3)
    for a, b in zip(problem.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    stored["param_groups"][0]["param_names"][0] = "elsewhere"
    with pytest.raises(ValueError, match="belongs to other parameters.*elsewhere"):
        other.load_state_dict(stored)


def test_unknown_options_and_bad_values(ours) -> None:
    with pytest.raises(TypeError, match="nothing"):
        ours(Problem(), nothing=1)
    for name, value in (("lr", -1.0), ("lr", float("nan")), ("weight_decay", -0.1)):
        with pytest.raises(ValueError, match=f"{name} must be in"):
            ours(Problem(), **{name: value})


@pytest.mark.parametrize("name", CAPTURABLE)
def test_capturable_is_the_same_step_and_cleans_bad_gradients(name: str) -> None:
    problems = [Problem(), Problem()]
    for problem, capturable in zip(problems, (False, True), strict=True):
        optimizer = OPTIMIZERS[name](problem, capturable=capturable)
        run(problem, optimizer, 5)
    for a, b in zip(*(p.parameters() for p in problems), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    gradient(problem, 0)
    problem.matrix.grad[0, 0] = float("nan")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "layer had a gradient")
        optimizer.step()
    assert optimizer.skipped == 1
    assert all(torch.isfinite(p).all() for p in problem.parameters())


@pytest.mark.parametrize("name", ["adam", "DeltaMomentum", "M3", "lion"])
def test_the_step_compiles(name: str) -> None:
    plain, compiled = Problem(), Problem()
    first = OPTIMIZERS[name](plain)
    second = OPTIMIZERS[name](compiled, capturable=name not in ("M3", "lion"))
    step = torch.compile(second.step, backend="eager")
    for _ in range(5):
        for problem, optimizer in ((plain, first), (compiled, second)):
            optimizer.zero_grad()
            problem.convex().backward()
        first.step()
        step()
    for a, b in zip(plain.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients_flow_through_steps(name: str) -> None:
    """Two steps as a function of the gradients and the start, beside finite differences."""
    options = {"sgd": {}, "DeltaMomentum": {"delta": 0.5}}.get(name, {})

    def steps(start: Tensor, g1: Tensor, g2: Tensor) -> Tensor:
        w = start.clone()
        if name == "DeltaMomentum":
            optimizer = DeltaMomentum([w], lr=0.1, differentiable=True, **options)
        else:
            optimizer = AssociativeMomentum(
                [w], name, lr=0.1, differentiable=True, ns_dtype=None, ns_steps=2
            )
        for g in (g1, g2):
            w.grad = g
            optimizer.step()
        return w

    inputs = [torch.randn(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(steps, inputs, atol=1e-4)


def test_what_has_no_such_step_says_so() -> None:
    for name in ("M3", "DGD", "DeepMomentum"):
        with pytest.raises(ValueError, match="no differentiable step"):
            OPTIMIZERS[name](Problem(), differentiable=True)
