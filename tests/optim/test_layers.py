"""DGD and generalised gradient descent: against their proximal problem, autograd and the rules."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from nestlearn.memory.objectives import get_objective
from nestlearn.optim import DGD, GeneralizedGD, MultiRate
from nestlearn.rules import reference

from .models import distance, tiny_lm, train


def double(module: nn.Module) -> nn.Module:
    return module.to(torch.float64)


@pytest.mark.parametrize("lr", [0.05, 1.0, 50.0])
@pytest.mark.parametrize("bias", [True, False])
def test_one_row_solves_the_proximal_problem(lr: float, bias: bool) -> None:
    """After the step, 1/2 ||W x - u||^2 + 1/(2 lr) ||W - W_t||^2 has no slope (Eq. 53-56)."""
    layer = double(nn.Linear(4, 3, bias=bias))
    before = [p.detach().clone() for p in layer.parameters()]
    optimizer = DGD(layer, lr=lr)
    x, delta = torch.randn(1, 4).double() * 3, torch.randn(1, 3).double()
    (layer(x) * delta).sum().backward()
    optimizer.step()
    after = [p.detach().clone().requires_grad_() for p in layer.parameters()]
    y = x @ after[0].T + (after[1] if bias else 0)
    proximal = 0.5 * (y + delta).square().sum() + sum(
        (a - b).square().sum() for a, b in zip(after, before, strict=True)
    ) / (2 * lr)
    for slope in torch.autograd.grad(proximal, after):
        assert slope.abs().max() < 1e-9
    optimizer.close()


def test_a_batch_is_the_mean_of_its_rows_proximal_steps() -> None:
    layer = double(nn.Linear(4, 3, bias=False))
    W = layer.weight.detach().clone()
    X, D = torch.randn(5, 4).double(), torch.randn(5, 3).double()
    lr = 0.7
    expected = torch.stack([
        W - lr / (1 + lr * x @ x) * torch.outer(d + W @ x, x) for x, d in zip(X, D, strict=True)
    ]).mean(0)  # fmt: skip
    optimizer = DGD(layer, lr=lr)
    ((layer(X) * D).sum(-1)).mean().backward()
    optimizer.step()
    torch.testing.assert_close(layer.weight.detach(), expected)


def test_dgd_is_the_rule_of_memories() -> None:
    """The optimizer's step on one row and `rules.reference.dgd`, Eq. 57 with its plain rate."""
    layer = double(nn.Linear(4, 3, bias=False))
    W, x, d = layer.weight.detach().clone(), torch.randn(4).double(), torch.randn(3).double()
    optimizer = DGD(layer, lr=0.1, proximal=False)
    (layer(x) * d).sum().backward()
    optimizer.step()
    expected = W @ (torch.eye(4) - 0.1 * torch.outer(x, x)).double() - 0.1 * torch.outer(d, x)
    torch.testing.assert_close(layer.weight.detach(), expected)
    torch.testing.assert_close(expected, reference.delta(W, x, -d, 0.1, 1.0))


def patches(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """Rows below every output position, ``(positions, groups, in/groups * k)``."""
    unfolded = nn.functional.unfold(
        x, layer.kernel_size, layer.dilation, layer.padding, layer.stride
    )
    return unfolded.movedim(1, -1).reshape(-1, layer.groups, unfolded.shape[1] // layer.groups)


@pytest.mark.parametrize("options", [
    {}, {"groups": 2}, {"stride": 2, "padding": 1}, {"dilation": 2, "bias": False},
])  # fmt: skip
def test_a_convolution_is_a_linear_map_of_its_patches(options: dict) -> None:
    conv = double(nn.Conv2d(4, 6, 3, **options))
    x = torch.randn(2, 4, 7, 7).double()
    W, lr = conv.weight.detach().clone(), 0.3
    b = None if conv.bias is None else conv.bias.detach().clone()
    D = torch.randn_like(conv(x))
    optimizer = DGD(conv, lr=lr)
    rows = D[:, 0].numel()
    ((conv(x) * D).sum() / rows).backward()
    optimizer.step()
    P, per = patches(conv, x), 6 // conv.groups
    y, d = (t.movedim(1, -1).reshape(-1, 6) for t in (conv_of(conv, W, b, x), D))
    expected, shift = W.clone(), None if b is None else b.clone()
    for out in range(6):
        rowsets = P[:, out // per]
        rate = lr / (1 + lr * (rowsets.square().sum(-1) + (b is not None)))
        step = rate * (d[:, out] + y[:, out])
        expected[out] -= (step @ rowsets / rows).view(W[out].shape)
        if shift is not None:
            shift[out] -= step.sum() / rows
    torch.testing.assert_close(conv.weight.detach(), expected)
    if shift is not None:
        torch.testing.assert_close(conv.bias.detach(), shift)


def conv_of(conv: nn.Conv2d, W: Tensor, b: Tensor | None, x: Tensor) -> Tensor:
    return nn.functional.conv2d(x, W, b, conv.stride, conv.padding, conv.dilation, conv.groups)


def test_an_embedding_is_a_linear_map_of_one_hot_rows() -> None:
    table = double(nn.Embedding(6, 3))
    linear = double(nn.Linear(6, 3, bias=False))
    with torch.no_grad():
        linear.weight.copy_(table.weight.T)
    ids, D = torch.tensor([[1, 4], [1, 0]]), torch.randn(2, 2, 3).double()
    a, b = DGD(table, lr=0.4), DGD(linear, lr=0.4)
    ((table(ids) * D).sum(-1)).mean().backward()
    ((linear(nn.functional.one_hot(ids, 6).double()) * D).sum(-1)).mean().backward()
    a.step(), b.step()
    torch.testing.assert_close(table.weight.detach(), linear.weight.detach().T)


def test_earlier_layers_get_the_plain_gradient() -> None:
    model = double(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    plain = torch.autograd.grad(model(x).square().mean(), x)[0]
    optimizer = DGD(model, lr=0.1)
    assert torch.equal(torch.autograd.grad(model(x).square().mean(), x)[0], plain)
    optimizer.close()
    loss = model(x).square().mean()
    hooked = torch.autograd.grad(loss, model[0].weight)[0]
    fresh = double(nn.Linear(3, 4))
    fresh.load_state_dict(model[0].state_dict())
    y = model[2](torch.tanh(fresh(x)))
    assert torch.equal(hooked, torch.autograd.grad(y.square().mean(), fresh.weight)[0])


def test_dot_product_is_gradient_descent() -> None:
    a, b = tiny_lm(), tiny_lm()
    ours = GeneralizedGD(a, lr=0.1, objective="dot", momentum=0.9, weight_decay=0.01)
    train(a, ours, 50)
    decoupled = torch.optim.SGD(b.parameters(), lr=0.1, momentum=0.9)

    def decay(*_) -> None:
        for p in b.parameters():
            p.data.mul_(1 - 0.1 * 0.01)

    decoupled.register_step_pre_hook(decay)
    train(b, decoupled, 50)
    assert distance(a, b) < 1e-9


def test_oja_is_the_rule() -> None:
    layer = double(nn.Linear(4, 3, bias=False))
    W, x, d = layer.weight.detach().clone(), torch.randn(4).double(), torch.randn(3).double()
    optimizer = GeneralizedGD(layer, lr=0.1, objective="oja")
    (layer(x) * d).sum().backward()
    optimizer.step()
    torch.testing.assert_close(layer.weight.detach(), reference.oja(W, x, -d, 0.1, 1.0))


@pytest.mark.parametrize("objective", ["l2", "lp", "huber", "function"])
def test_any_objective_and_a_value_of_its_own(objective: str) -> None:
    """.grad is the gradient of the stated objective at the self-generated value (autograd)."""

    def function(y: Tensor, u: Tensor) -> Tensor:
        return ((y - u) ** 4).sum(-1)

    L = function if objective == "function" else get_objective(objective).value
    layer = double(nn.Linear(4, 3))
    X, D = torch.randn(6, 4).double(), torch.randn(6, 3).double()

    def value(x: Tensor, y: Tensor, delta: Tensor) -> Tensor:
        return (y - 0.5 * delta).sin()

    u = value(X, layer(X), D).detach()
    expected = torch.autograd.grad(L(layer(X), u).mean(), list(layer.parameters()))
    optimizer = GeneralizedGD(
        layer, lr=0.1, objective=function if objective == "function" else objective,
        value=value, proximal=False,
    )  # fmt: skip
    ((layer(X) * D).sum(-1)).mean().backward()
    for p, g in zip(layer.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, g)
    assert optimizer.plain == []


@pytest.mark.parametrize(("retention", "strength"), [("decay", 0.5), ("l2", 0.5), ("l1", 0.3)])
def test_retention_solves_its_problem(retention: str, strength: float) -> None:
    layer = double(nn.Linear(3, 2, bias=False))
    W, lr = layer.weight.detach().clone(), 0.2
    optimizer = GeneralizedGD(layer, lr=lr, objective="dot", retention=retention,
                              weight_decay=strength)  # fmt: skip
    layer.weight.grad = G = torch.randn(2, 3).double()
    with pytest.warns(RuntimeWarning, match="the layer had a gradient"):  # none of its own
        optimizer.step()
    after = layer.weight.detach().clone().requires_grad_()
    cost = (G * after).sum() + (after - W).square().sum() / (2 * lr)
    if retention == "decay":  # linearised at W_t
        cost = cost + strength * (W * after).sum()
    elif retention == "l2":
        cost = cost + 0.5 * strength * after.square().sum()
    slope = torch.autograd.grad(cost, after)[0]
    if retention == "l1":
        zero = after == 0
        assert (slope[zero].abs() <= strength + 1e-9).all()
        torch.testing.assert_close(slope[~zero], -strength * after[~zero].sign())
    else:
        assert slope.abs().max() < 1e-9


def test_own_retention() -> None:
    layer = double(nn.Linear(3, 2))
    optimizer = GeneralizedGD(
        layer, lr=0.1, objective="dot", retention=lambda w, lr: w.clamp(min=0)
    )
    layer(torch.ones(1, 3).double()).sum().backward()
    optimizer.step()
    assert (layer.weight >= 0).all()


def test_accumulation_and_gradient_scaling_give_the_same_step() -> None:
    X, D = torch.randn(8, 4), torch.randn(8, 3)

    def weight(halves: bool, scaled: bool) -> Tensor:
        torch.manual_seed(3)
        layer = nn.Linear(4, 3)
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0, enabled=scaled)
        share = 2 if halves else 1
        optimizer = DGD(layer, lr=0.3, loss_scale=lambda: scaler.get_scale() / share)
        for x, d in zip(X.chunk(share), D.chunk(share), strict=True):
            scaler.scale((layer(x) * d).sum(-1).mean() / share).backward()
        scaler.step(optimizer)
        return layer.weight.detach()

    for halves, scaled in ((True, False), (False, True), (True, True)):
        torch.testing.assert_close(weight(halves, scaled), weight(False, False))


def test_sum_and_mean_and_maximize() -> None:
    X, D = torch.randn(5, 4).double(), torch.randn(5, 3).double()
    grads = {}
    for reduction in ("mean", "sum"):
        layer = double(nn.Linear(4, 3))
        torch.nn.init.ones_(layer.weight), torch.nn.init.zeros_(layer.bias)
        optimizer = DGD(layer, lr=0.1, reduction=reduction)
        loss = (layer(X) * D).sum(-1)
        (loss.mean() if reduction == "mean" else loss.sum()).backward()
        grads[reduction] = layer.weight.grad
        optimizer.close()
    torch.testing.assert_close(grads["sum"], 5 * grads["mean"])
    layers = [double(nn.Linear(4, 3)) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    for layer, sign, up in zip(layers, (1.0, -1.0), (False, True), strict=True):
        optimizer = DGD(layer, lr=0.1, maximize=up)
        (sign * (layer(X) * D).sum(-1).mean()).backward()
        optimizer.step()
    torch.testing.assert_close(layers[0].weight, layers[1].weight)


def test_under_autocast_and_checkpointing() -> None:
    from torch.utils.checkpoint import checkpoint

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))
    x = torch.randn(4, 8)
    optimizer = DGD(model, lr=0.1)
    model(x).square().mean().backward()
    exact = [p.grad.clone() for p in model.parameters()]
    optimizer.zero_grad()
    checkpoint(model, x, use_reentrant=False).square().mean().backward()
    for p, g in zip(model.parameters(), exact, strict=True):
        torch.testing.assert_close(p.grad, g)
    optimizer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(x).float().square().mean()
    loss.backward()
    for p, g in zip(model.parameters(), exact, strict=True):
        assert p.grad.dtype == torch.float32
        torch.testing.assert_close(p.grad, g, rtol=0.1, atol=0.02)


def test_the_hooked_model_compiles() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    optimizer = DGD(model, lr=0.1)
    x = torch.randn(3, 4)
    model(x).square().mean().backward()
    plain = model[0].weight.grad.clone()
    optimizer.zero_grad()
    torch.compile(model, backend="aot_eager")(x).square().mean().backward()
    torch.testing.assert_close(model[0].weight.grad, plain)


def test_it_says_where_it_is_plain_and_where_it_cannot_be() -> None:
    model = tiny_lm()
    optimizer = DGD(model, lr=0.1)
    assert optimizer.plain == ["norm.weight", "norm.bias"]
    with pytest.raises(ValueError, match="already with another optimizer"):
        DGD(model, lr=0.1)
    optimizer.close()
    DGD(model, lr=0.1).close()
    with pytest.raises(ValueError, match="needs the layers"):
        DGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="none of these parameters"):
        DGD(nn.LayerNorm(3), lr=0.1)
    with pytest.raises(ValueError, match="objective must be one of"):
        GeneralizedGD(model, objective="x")
    with pytest.raises(ValueError, match="retention must be one of"):
        GeneralizedGD(model, retention="x")
    attention = nn.MultiheadAttention(4, 2)
    optimizer = DGD(attention, lr=0.1)
    attention(*[torch.randn(3, 1, 4)] * 3)[0].sum().backward()
    with pytest.warns(RuntimeWarning, match="out_proj had a gradient"):
        optimizer.step()


def test_groups_of_a_model_and_an_optimizer_that_is_gone() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    optimizer = DGD([{"params": model[1].parameters(), "lr": 0.5}], lr=0.1, model=model)
    model(torch.ones(1, 2)).sum().backward()
    assert torch.equal(model[0].weight.grad[:, 0], model[0].weight.grad[:, 1])
    before = model[0].weight.clone()
    optimizer.step()
    assert torch.equal(model[0].weight, before)
    with pytest.raises(TypeError, match="bound to its model"):
        optimizer.__reduce_ex__(2)
    del optimizer
    again = DGD(model, lr=0.1)  # the first one's hooks are dead
    assert len(again.param_groups) == 1


def test_levels_of_generalised_gradient_descent() -> None:
    """Def. 6-7: every level an objective of its own, at its own frequency."""
    model = double(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
    inner = {
        "fast": lambda g: GeneralizedGD(g, lr=0.1, objective="l2", model=model),
        "slow": lambda g: GeneralizedGD(g, lr=0.1, objective="dot", model=model),
    }
    groups = [
        {"params": model[0].parameters(), "level": "fast"},
        {"params": model[2].parameters(), "level": "slow", "period": 2},
    ]
    optimizer = MultiRate(groups, inner)
    starts, sums = [p.detach().clone() for p in model[2].parameters()], [0.0, 0.0]
    x = torch.randn(6, 3).double()
    for _ in range(2):
        optimizer.zero_grad()
        y = model(x)
        y.retain_grad()
        h = torch.tanh(model[0](x)).detach()
        y.square().sum(-1).mean().backward()
        sums = [sums[0] + y.grad.T @ h, sums[1] + y.grad.sum(0)]
        before, G = model[0].weight.detach().clone(), model[0].weight.grad.clone()
        optimizer.step()
        torch.testing.assert_close(model[0].weight.detach(), before - 0.1 * G)
    for p, start, total in zip(model[2].parameters(), starts, sums, strict=True):
        torch.testing.assert_close(p.detach(), start - 0.1 * total)
