"""Eq. 70-74 of the continuum memory against hand-written loops and autograd, in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nestlearn.levels import Level
from nestlearn.nn import continuum_block
from nestlearn.nn.continuum import ContinuumMemory

D, H = 5, 12
ACT = {"silu": F.silu, "gelu": lambda z: F.gelu(z, approximate="tanh")}


def make(levels, **settings) -> ContinuumMemory:
    layer = ContinuumMemory(D, H, levels, **settings).double()
    for parameter in layer.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return layer


def mlp(block, weights, x: Tensor, act) -> Tensor:
    return act(x @ weights[0].T) @ weights[1].T


def bounded(delta: Tensor, base: Tensor) -> Tensor:
    rows = []
    for d, b in zip(delta, base, strict=True):
        limit = max(1.0, b.norm().item())
        rows.append(d * min(1.0, limit / max(d.norm().item(), 1e-30)))
    return torch.stack(rows)


class Loop:
    """One row, one level, token by token; every inner gradient by autograd on the objective."""

    def __init__(self, block, act) -> None:
        self.block, self.act = block, act
        self.base = [block.up.weight, block.down.weight]
        self.delta = [torch.zeros_like(w) for w in self.base]
        self.start = [torch.zeros_like(w) for w in self.base]
        self.chunk: list[Tensor] = []
        self.read = 0

    def __call__(self, x: Tensor) -> Tensor:
        weights = [w + d for w, d in zip(self.base, self.delta, strict=True)]
        y = mlp(self.block, weights, x, self.act)
        self.chunk.append(x)
        self.read += 1
        if self.read % self.block.level.period == 0:
            self.write(weights)
            slower = self.block.slower
            if slower is not None and self.read % slower.period == 0:
                rho = slower.meta_rate
                pairs = zip(self.start, self.delta, strict=True)
                self.start = [(1 - rho) * s + rho * d for s, d in pairs]
                self.delta = list(self.start)
        return y

    def write(self, weights: list[Tensor]) -> None:
        level = self.block.level
        total = [torch.zeros_like(w) for w in weights]
        mass = [torch.zeros((), dtype=x.dtype) for x in weights]
        for x in self.chunk:
            copies = [w if w.requires_grad else w.clone().requires_grad_() for w in weights]
            y = mlp(self.block, copies, x, self.act)
            value = self.block.value(x)
            target = self.block.gain * value / value.norm()
            loss = 0.5 * (y - target).square().sum()
            grads = torch.autograd.grad(loss, copies, create_graph=True)
            eta = level.eta * torch.sigmoid(self.block.rate(x)[0] - math.log(level.period))
            hidden = self.act(x @ weights[0].T)
            for i, a in enumerate((x, hidden)):
                step = eta / (1 + eta * a.square().sum())
                total[i] = total[i] + step * grads[i]
                mass[i] = mass[i] + step * a.square().sum()
        self.delta = [
            bounded(d - g / m.clamp_min(1), w)
            for d, g, m, w in zip(self.delta, total, mass, self.base, strict=True)
        ]
        self.chunk = []


def run_loop(layer: ContinuumMemory, x: Tensor, act) -> tuple[Tensor, list[list[Loop]]]:
    rows, loops = [], []
    for row in x:
        levels = [Loop(block, act) for block in layer.chain]
        outputs = []
        for token in row:
            if layer.kind == "independent":
                ys = [loop(token) for loop in levels]
                outputs.append(sum(m * y for m, y in zip(layer.mix, ys, strict=True)))
                continue
            h = token
            for loop in levels:
                h = h + loop(h) if layer.residual else loop(h)
            outputs.append(h - token if layer.residual else h)
        rows.append(torch.stack(outputs))
        loops.append(levels)
    return torch.stack(rows), loops


CASES = {
    "one level": ([Level(4)], {}),
    "chunk of one": ([Level(1, eta=3.0)], {}),
    "large rate": ([Level(4, eta=50.0)], {}),
    "gelu": ([Level(3)], {"activation": "gelu"}),
    "chain": ([Level(1), Level(3), Level(4)], {}),
    "composition": ([Level(2), Level(3)], {"residual": False}),
    "independent": ([Level(2), Level(5)], {"kind": "independent"}),
    "nested": ([Level(2, eta=1.0), Level(4, meta_rate=0.3), Level(8)], {"kind": "nested"}),
}


@pytest.mark.parametrize("case", CASES)
def test_in_context_writes_equal_the_token_loop(case):
    levels, settings = CASES[case]
    layer = make(levels, error="context", **settings)
    act = ACT[settings.get("activation", "silu")]
    x = torch.randn(2, 11, D, dtype=torch.float64)
    y, state = layer(x)
    expected, loops = run_loop(layer, x, act)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    for row, levels_of_row in enumerate(loops):
        for fast, loop in zip(state.levels, levels_of_row, strict=True):
            torch.testing.assert_close(fast.up[row], loop.delta[0], rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(fast.down[row], loop.delta[1], rtol=1e-10, atol=1e-10)
            assert loop.delta[0].abs().max() > 1e-4  # something was written


@pytest.mark.parametrize("case", ["one level", "chain", "independent", "nested"])
def test_outer_gradient_flows_through_the_writes(case):
    levels, settings = CASES[case]
    layer = make(levels, error="context", **settings)
    x = torch.randn(1, 11, D, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(1, 11, D, dtype=torch.float64)
    inputs = [x, *layer.parameters()]
    names = ["x", *(name for name, _ in layer.named_parameters())]
    got = torch.autograd.grad((layer(x)[0] * weight).sum(), inputs)
    expected = torch.autograd.grad((run_loop(layer, x, F.silu)[0] * weight).sum(), inputs)
    for name, a, b in zip(names, got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
        assert a.abs().max() > 0, name


def test_long_chunks_are_added_up_in_parts(monkeypatch):
    layer = make([Level(12)], error="context")
    x = torch.randn(2, 31, D, dtype=torch.float64)
    whole, state = layer(x)
    monkeypatch.setattr(continuum_block, "MAX_PENDING", 5)
    parts = ContinuumMemory(D, H, [Level(12)], error="context").double()
    parts.load_state_dict(layer.state_dict())
    y, other = parts(x)
    assert parts.chain[0].part.period == 4 and other.levels[0].pending.shape[1] == 3
    torch.testing.assert_close(y, whole, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(other.levels[0].up, state.levels[0].up, rtol=1e-11, atol=1e-11)
    flushed, reference = (
        m.chain[0].flush(s.levels[0], s.position, torch.float64)
        for m, s in ((parts, other), (layer, state))
    )
    torch.testing.assert_close(flushed.down, reference.down, rtol=1e-11, atol=1e-11)


def test_proximal_step_never_overshoots():
    # One repeated token, a huge rate: the output layer moves onto its target and not beyond.
    layer = make([Level(8, eta=1e6)], error="context")
    block = layer.chain[0]
    x = torch.randn(1, 1, D, dtype=torch.float64).expand(1, 8, D)
    value = block.value(x)
    target = block.gain * value / value.norm(dim=-1, keepdim=True)
    fast = block.init_fast(1, x.device, x.dtype)
    z, y = block.read(x, *block.weights(fast, x.dtype))
    fast = block.update(fast, *block.chunk_terms(x, z, y, block.down.weight))
    after = y + F.silu(z) @ fast.down.mT
    torch.testing.assert_close(after, target.expand_as(after), rtol=1e-4, atol=1e-4)


# -- outer --------------------------------------------------------------------------------------


def test_one_level_is_a_transformer_mlp():
    layer = make(None)
    x = torch.randn(2, 7, D, dtype=torch.float64)
    up, down = layer.chain[0].up.weight, layer.chain[0].down.weight
    assert torch.equal(layer(x)[0], F.linear(F.silu(F.linear(x, up)), down))


def test_chain_and_composition():
    x = torch.randn(2, 3, D, dtype=torch.float64)
    layer = make([Level(1), Level(2), Level(4)])
    h = x
    for block in layer.chain:
        h = h + block(h)
    torch.testing.assert_close(layer(x)[0], h - x, rtol=1e-12, atol=1e-12)
    literal = make([Level(1), Level(2)], residual=False)
    torch.testing.assert_close(literal(x)[0], literal.chain[1](literal.chain[0](x)))


def test_independent_levels_are_one_wide_mlp_cut_into_pieces():
    layer = ContinuumMemory(D, H, [Level(1), Level(4), Level(8)], kind="independent").double()
    x = torch.randn(2, 3, D, dtype=torch.float64)
    up = torch.cat([block.up.weight for block in layer.chain])
    down = torch.cat([block.down.weight for block in layer.chain], 1)
    torch.testing.assert_close(layer(x)[0], F.silu(x @ up.T) @ down.T)


def test_nested_outer_levels_restart_from_learned_initial_states():
    layer = make([Level(2, "fast"), Level(4, "slow", meta_rate=0.25)], kind="nested")
    initial = layer.initial_weights()
    assert set(initial) == {"fast.up.weight", "fast.down.weight"}
    begin = {k: v.clone() for k, v in initial.items()}
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 1
    for step in (1, 2, 3):
        initial = layer.meta_step(step, initial)
    assert all(torch.equal(begin[k], initial[k]) for k in begin)
    slow = layer.chain[1].up.weight.clone()
    initial = layer.meta_step(4, initial)
    torch.testing.assert_close(initial["fast.up.weight"], begin["fast.up.weight"] + 0.25)
    torch.testing.assert_close(layer.chain[0].up.weight.data, begin["fast.up.weight"] + 0.25)
    assert torch.equal(layer.chain[1].up.weight, slow)


# -- online -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("levels", "settings"),
    [
        ([Level(3, error="online"), Level(6, error="online", eta=0.02)], {}),
        ([Level(2, error="online"), Level(5), Level(6, error="online")], {}),
        ([Level(3, error="online"), Level(4, error="online")], {"residual": False}),
        ([Level(3, error="online"), Level(4, error="online")], {"kind": "independent"}),
        ([Level(2, error="online"), Level(4, error="online")], {"kind": "nested"}),
        ([Level(3, error="online")], {"activation": "gelu"}),
    ],
)
def test_online_learning_equals_accumulated_autograd(levels, settings):
    layer = make(levels, **settings)
    act = ACT[settings.get("activation", "silu")]
    x = torch.randn(2, 14, D, dtype=torch.float64)
    goal = torch.randn(2, 14, D, dtype=torch.float64)
    state = layer.init_state(2)
    # Hand-written: per row and level the current weights and the error since the last update.
    base = [(b.up.weight.detach(), b.down.weight.detach()) for b in layer.chain]
    now = [[[w.clone() for w in pair] for pair in base] for _ in range(2)]
    first = [[[w.clone() for w in pair] for pair in base] for _ in range(2)]
    error = [[[torch.zeros_like(w) for w in pair] for pair in base] for _ in range(2)]
    for start, stop in layer.cut(0, 14):
        piece, target = x[:, start:stop], goal[:, start:stop]
        y, same = layer(piece, state)
        assert same is state
        leaf = y.detach().requires_grad_()
        (0.5 * (leaf - target).square().sum()).backward()
        state = layer.learn(piece, leaf.grad, state)
        for row in range(2):
            weights = [[w.clone().requires_grad_() for w in pair] for pair in now[row]]
            outs, h = [], piece[row]
            for i, pair in enumerate(weights):
                if layer.kind == "independent":
                    outs.append(layer.mix[i].detach() * mlp(None, pair, piece[row], act))
                else:
                    o = mlp(None, pair, h, act)
                    h = h + o if layer.residual else o
            if layer.kind == "independent":
                out = sum(outs)
            else:
                out = h - piece[row] if layer.residual else h
            torch.testing.assert_close(out, y[row], rtol=1e-10, atol=1e-10)
            loss = 0.5 * (out - target[row]).square().sum()
            flat = torch.autograd.grad(loss, [w for pair in weights for w in pair])
            for i, block in enumerate(layer.chain):
                if not block.learns:
                    continue
                for j in range(2):
                    error[row][i][j] += block.level.eta * flat[2 * i + j]
                    if stop % block.level.period == 0:
                        change = now[row][i][j] - error[row][i][j] - base[i][j]
                        now[row][i][j] = base[i][j] + bounded(change, base[i][j])
                        error[row][i][j].zero_()
                    if block.slower is not None and stop % block.slower.period == 0:
                        first[row][i][j] = 0.5 * (first[row][i][j] + now[row][i][j])
                        now[row][i][j] = first[row][i][j].clone()
    for row in range(2):
        for i, fast in enumerate(state.levels):
            if fast is None:
                assert layer.levels[i].error == "outer"
                continue
            for got, expected, w in zip((fast.up, fast.down), now[row][i], base[i], strict=True):
                torch.testing.assert_close(got[row], expected - w, rtol=1e-9, atol=1e-10)
    assert state.position == (14, 14)
