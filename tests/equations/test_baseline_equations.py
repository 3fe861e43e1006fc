"""The baselines' layers against token loops that state their published equations again."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nestlearn.nn.lstm import LSTM
from nestlearn.nn.mamba2 import Mamba2
from nestlearn.nn.rwkv7 import RWKV7
from nestlearn.nn.self_referential import SelfReferentialMatrix
from nestlearn.nn.titans import TitansGate, TitansLayer
from nestlearn.nn.titans_context import TitansContext

D, HEADS, T = 8, 2, 11
d = D // HEADS


def randomised(layer: nn.Module) -> nn.Module:
    """Float64 with nothing at a special start value."""
    layer = layer.double()
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return layer


def inputs():
    return torch.randn(1, T, D, dtype=torch.float64)


def test_rwkv7_is_the_published_recurrence():
    layer, x = randomised(RWKV7(D, HEADS, chunk=4)), inputs()
    y, state = layer(x)
    sig, before = torch.sigmoid, torch.zeros(D, dtype=torch.float64)
    S = torch.zeros(HEADS, d, d, dtype=torch.float64)
    for t in range(T):
        now = x[0, t]
        xr, xw, xk, xv, xa, xg = (now + mu * (before - now) for mu in layer.shift)
        before = now
        up, down = layer.decay.up, layer.decay.down
        w = torch.exp(-math.exp(-0.5) * sig(up.bias + up.weight @ torch.tanh(down.weight @ xw)))
        a = sig(layer.rate.up.bias + layer.rate.up.weight @ (layer.rate.down.weight @ xa))
        g = layer.gate.up.weight @ sig(layer.gate.down.weight @ xg)
        r, k, v = (
            p.weight @ z for p, z in ((layer.receptance, xr), (layer.key, xk), (layer.value, xv))
        )
        kappa = layer.removal * k
        k = k * (1 + layer.replacement * (a - 1))
        outputs = []
        for h in range(HEADS):
            s = slice(h * d, (h + 1) * d)
            kh = kappa[s] / (kappa[s].square().sum() + 1e-6).sqrt()
            G = torch.diag(w[s]) - torch.outer(kh, a[s] * kh)
            S[h] = S[h].clone() @ G + torch.outer(v[s], k[s])
            out = F.layer_norm(S[h] @ r[s], (d,), eps=1e-5 * d) * layer.gain[h, 0]
            outputs.append(out + (r[s] * layer.bonus[h, 0] * k[s]).sum() * v[s])
        expected = layer.out_proj.weight @ (torch.cat(outputs) * g)
        torch.testing.assert_close(y[0, t], expected, atol=1e-10, rtol=1e-8)
    torch.testing.assert_close(state.memory.weights[0][0], S, atol=1e-10, rtol=1e-8)


def mamba2_parts(layer, x):
    """B, C, dt, values ``(T, H, 2d)`` and the gate, written out again."""
    z, u, step = (x[0] @ layer.in_proj.weight.T).split([2 * D, 2 * D + 2 * d, HEADS], -1)
    padded = torch.cat([torch.zeros(3, u.shape[1], dtype=u.dtype), u])
    kernel = layer.conv.weight[:, 0]
    u = F.silu(torch.stack([(padded[t : t + 4] * kernel.T).sum(0) for t in range(T)]))
    value, B, C = u.split([2 * D, d, d], -1)
    dt = torch.log1p(torch.exp(step + layer.step_bias))
    return z, value.view(T, HEADS, 2 * d), B, C, dt


def test_mamba2_is_the_selective_state_space():
    layer, x = randomised(Mamba2(D, HEADS, chunk=4)), inputs()
    y, state = layer(x)
    z, value, B, C, dt = mamba2_parts(layer, x)
    h = torch.zeros(HEADS, 2 * d, d, dtype=torch.float64)
    A = -layer.log_rate.exp()
    for t in range(T):
        decay = torch.exp(dt[t] * A)[:, None, None]
        h = decay * h + dt[t][:, None, None] * value[t][..., None] * B[t]
        out = (h @ C[t] + layer.skip[:, None] * value[t]).flatten() * F.silu(z[t])
        out = out / (out.square().mean() + 1e-6).sqrt() * layer.norm.weight
        torch.testing.assert_close(y[0, t], layer.out_proj.weight @ out, atol=1e-10, rtol=1e-8)
    torch.testing.assert_close(state.memory.weights[0][0], h, atol=1e-10, rtol=1e-8)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_mamba2_against_flash_linear_attention():
    naive = pytest.importorskip("fla.ops.simple_gla.naive")
    layer, x = randomised(Mamba2(D, HEADS, chunk=4)), inputs()
    _, state = layer(x)
    _, value, B, C, dt = mamba2_parts(layer, x)
    B, C = (t[None, :, None].expand(1, T, HEADS, d) for t in (B, C))
    _, S = naive.naive_recurrent_simple_gla(
        C, B, (value * dt[..., None])[None], (-dt * layer.log_rate.exp())[None], scale=1.0
    )
    ours = state.memory.weights[0].mT.float()
    torch.testing.assert_close(ours, S, atol=1e-5, rtol=1e-4)


def test_lstm_is_torch_s_and_the_equation():
    layer, x = randomised(LSTM(D)), inputs()
    peer = nn.LSTM(D, D, batch_first=True).double()
    with torch.no_grad():
        peer.weight_ih_l0.copy_(layer.weight_ih)
        peer.weight_hh_l0.copy_(layer.weight_hh)
        peer.bias_ih_l0.copy_(layer.bias)
        peer.bias_hh_l0.zero_()
    expected, (h_last, c_last) = peer(x)
    y, state = layer(x)
    torch.testing.assert_close(y, expected @ layer.out_proj.weight.T)
    torch.testing.assert_close(state.weights[0], h_last[0])
    torch.testing.assert_close(state.weights[1], c_last[0])
    h = c = torch.zeros(D, dtype=torch.float64)
    for t in range(T):
        gates = layer.weight_ih @ x[0, t] + layer.weight_hh @ h + layer.bias
        i, f, g, o = gates.split(D)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        torch.testing.assert_close(y[0, t], layer.out_proj.weight @ h)


def test_srwm_is_the_published_recurrence():
    """With the four matrices apart and values of key and query apart, as it is published."""
    layer, x = randomised(SelfReferentialMatrix(D, HEADS, row_limit=0.0)), inputs()
    y, state = layer(x)
    outputs = []
    for h in range(HEADS):
        parts = list(layer.initial[h].split([d, d, d, 4]))
        for t in range(T):
            token = x[0, t, h * d : (h + 1) * d]
            out, q, k, beta = (W @ token for W in parts)
            q, k, beta = torch.softmax(q, 0), torch.softmax(k, 0), torch.sigmoid(beta)
            new, old = [W @ q for W in parts], [W @ k for W in parts]
            parts = [
                W + rate * torch.outer(v - o, k)
                for W, rate, v, o in zip(parts, beta, new, old, strict=True)
            ]
            outputs.append(out)
        torch.testing.assert_close(state.weights[0][0, h], torch.cat(parts))
    out = torch.stack(outputs).view(HEADS, T, d).transpose(0, 1).flatten(1)
    torch.testing.assert_close(y[0], out @ layer.out_proj.weight.T)


def test_srwm_rows_are_bounded():
    layer = SelfReferentialMatrix(D, HEADS, row_limit=1.0)
    bound = layer.initial.norm(dim=-1).amax(-1)
    _, state = layer(100 * torch.randn(1, 200, D))
    assert (state.weights[0][0].norm(dim=-1) <= bound[:, None] * (1 + 1e-5)).all()


def attention(layer, q, k, v):
    """Softmax over all given keys, per head, for one query."""
    out = []
    for h in range(HEADS):
        s = slice(h * d, (h + 1) * d)
        p = torch.softmax(k[:, s] @ q[s] / math.sqrt(d), 0)
        out.append(p @ v[:, s])
    return torch.cat(out)


def rotated(x, t):
    """Rotary position t on one token, heads joined."""
    x = x.view(HEADS, d)
    angle = t * 10_000.0 ** (-torch.arange(0, d, 2, dtype=x.dtype) / d)
    a, b = x.chunk(2, -1)
    turned = [a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()]
    return torch.cat(turned, -1).flatten()


def norm(x, gain):
    return x / (x.square().mean() + 1e-6).sqrt() * gain.weight


def windowed(layer, x, window):
    """Sliding-window attention with persistent tokens, token by token."""
    wq, wk, wv = layer.qkv.weight.chunk(3)
    fixed = layer.persistent
    out = []
    for t in range(T):
        seen = range(max(0, t - window + 1), t + 1)
        k = torch.stack([*(fixed @ wk.T), *(rotated(wk @ x[s], s) for s in seen)])
        v = torch.stack([*(fixed @ wv.T), *(wv @ x[s] for s in seen)])
        out.append(layer.out.weight @ attention(layer, rotated(wq @ x[t], t), k, v))
    return torch.stack(out)


def test_titans_gate():
    layer, x = randomised(TitansGate(D, HEADS, window=3, chunk=4)), inputs()
    seen = windowed(layer.attention, x[0], 3)
    told, _ = layer.memory(x)
    for t, y in enumerate(layer(x)[0][0]):
        gated = norm(seen[t], layer.attention_norm) * F.silu(norm(told[0, t], layer.memory_norm))
        torch.testing.assert_close(y, layer.out_proj.weight @ gated, atol=1e-9, rtol=1e-7)


def test_titans_layer():
    layer, x = randomised(TitansLayer(D, HEADS, window=3, chunk=4)), inputs()
    told, _ = layer.memory(x)
    told = torch.stack([norm(m, layer.memory_norm) for m in told[0]])
    torch.testing.assert_close(layer(x)[0][0], windowed(layer.attention, told, 3))


def test_titans_context():
    """Segment by segment: recall at the segment's start, attend, write the answers, gate."""
    layer, x = randomised(TitansContext(D, HEADS, chunk=4, conv_size=1)), inputs()
    got, _ = layer(x)
    u = x[0] * layer.conv.weight[:, 0, 0]
    wq, wk, wv = layer.qkv.weight.chunk(3)
    fixed, memory = layer.persistent, layer.memory.init_state(1, dtype=torch.float64)
    for start in range(0, T, 4):
        segment = u[start : start + 4]
        recalled, _ = layer.memory(segment[None], memory.freeze())
        answers = []
        for i, token in enumerate(segment):
            sources = [
                (s, j) for many in (recalled[0], segment) for j, s in enumerate(many[: i + 1])
            ]
            k = torch.stack([*(fixed @ wk.T), *(rotated(wk @ s, j) for s, j in sources)])
            v = torch.stack([*(fixed @ wv.T), *(wv @ s for s, _ in sources)])
            answer = attention(layer, rotated(wq @ token, i), k, v)
            answers.append(layer.attention_out.weight @ answer)
        told, memory = layer.memory(torch.stack(answers)[None], memory)
        for i, answer in enumerate(answers):
            gated = norm(answer, layer.attention_norm)
            gated = gated * F.silu(norm(told[0, i], layer.memory_norm))
            expected = layer.out_proj.weight @ gated
            torch.testing.assert_close(got[0, start + i], expected, atol=1e-9, rtol=1e-7)


MAKERS = {
    "rwkv7": lambda: RWKV7(D, HEADS),
    "mamba2": lambda: Mamba2(D, HEADS),
    "lstm": lambda: LSTM(D),
    "srwm": lambda: SelfReferentialMatrix(D, HEADS),
    "titans_mac": lambda: TitansContext(D, HEADS, chunk=4),
    "titans_mag": lambda: TitansGate(D, HEADS, window=3, chunk=4),
    "titans_mal": lambda: TitansLayer(D, HEADS, window=3, chunk=4),
}


@pytest.mark.parametrize("name", MAKERS)
def test_frozen_memories_are_read_and_not_written(name):
    layer = randomised(MAKERS[name]())
    x = inputs()
    _, state = layer(x)
    frozen = state.freeze()
    y, after = layer(x[:, :5], frozen)
    assert y.abs().max() > 0
    memory = getattr(after, "memory", after)
    before = getattr(frozen, "memory", frozen)
    for one, two in zip(
        getattr(memory, "memory", memory).tensors(),
        getattr(before, "memory", before).tensors(),
        strict=True,
    ):
        assert torch.equal(one, two)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RWKV7(10, 4), "multiple of heads"),
        (lambda: RWKV7(8, 2, chunk=0), "chunk"),
        (lambda: Mamba2(10, 4), "multiple of heads"),
        (lambda: Mamba2(8, 2, state_size=0), "state_size"),
        (lambda: LSTM(0), "dim"),
        (lambda: SelfReferentialMatrix(10, 4), "multiple of heads"),
        (lambda: SelfReferentialMatrix(8, 2, row_limit=-1), "row_limit"),
        (lambda: TitansContext(6, 2), "even head size"),
        (lambda: TitansGate(8, 2, window=0), "window"),
    ],
)
def test_errors_say_what_to_do(make, message):
    with pytest.raises(ValueError, match=message):
        make()
