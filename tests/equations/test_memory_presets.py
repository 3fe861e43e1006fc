"""Each NeuralMemory preset against an independent statement of its update (SPEC §2).

The statement is a token loop: features, gates and the damped step are written out again, gradients
come from automatic differentiation of the objective, at the memory of the chunk's start.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from nestlearn.nn.neural_memory import NeuralMemory

D, HEADS, T, CHUNK = 4, 2, 11, 4
LINEAR = ("linear_attention", "retnet", "deltanet", "gated_deltanet", "comba")
# preset: objective, whether S carries momentum, window, activation
WRITTEN = {
    "ttt_linear": ("l2", False, 1, None),
    "ttt_mlp": ("l2", False, 1, "gelu"),
    "titans": ("l2", True, 1, "silu"),
    "dla": ("dot", False, 1, "silu"),
    "atlas": ("l2", True, 8, "silu"),
    "moneta": ("lp", False, 1, "silu"),
    "yaad": ("huber", False, 1, "silu"),
    "memora": ("l2", False, 1, "silu"),
}


def random_layer(preset, **more):
    layer = NeuralMemory(HEADS * D, HEADS, preset, chunk=CHUNK, row_limit=0.0, **more).double()
    with torch.no_grad():
        for p in (*layer.initial, *([] if layer.gate_bias is None else [layer.gate_bias])):
            p.normal_(0, 0.5)
        if layer.feedback is not None:
            layer.feedback.normal_()
            layer.correction.normal_()
    return layer


def remember(layer):
    """Random projections of one row, the layer's read-outs ``(H, T, d)`` and its final state."""
    n = len(layer.spec.gates)
    q, k, v = (torch.randn(1, T, HEADS * D, dtype=torch.float64) for _ in range(3))
    logits = torch.randn(1, T, n * HEADS, dtype=torch.float64)
    out, state = layer._remember(q, k, v, logits, layer.init_state(1, dtype=torch.float64).memory)
    split = (x.view(T, HEADS, D).transpose(0, 1) for x in (q, k, v))
    gates = {}
    for i, name in enumerate(layer.spec.gates):
        bias = layer.gate_bias[i].detach()
        gates[name] = torch.sigmoid(logits.view(T, n, HEADS)[:, i] + bias).T
    return *split, gates, out[0], state


def normal(x):
    return x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()


def scaled(x):
    return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()


@pytest.mark.parametrize(
    ("preset", "eta_max"), [*((name, 1.0) for name in LINEAR), ("deltanet", 2.0), ("comba", 2.0)]
)
def test_linear_presets(preset, eta_max):
    layer = random_layer(preset, eta_max=eta_max)
    q, k, v, gates, out, state = remember(layer)
    eye = torch.eye(D, dtype=torch.float64)
    for h in range(HEADS):
        M = layer.initial[0][h].detach()
        for t in range(T):
            phi = (lambda x: F.elu(x) + 1) if preset == "linear_attention" else (lambda x: x)
            key, query = normal(phi(scaled(k[h, t]))), normal(phi(scaled(q[h, t])))
            vk = torch.outer(v[h, t], key)
            if preset == "linear_attention":
                M = M + vk
            elif preset == "retnet":
                M = (1 - 2.0 ** (-5 - h)) * M + vk
            else:
                eta = eta_max * gates["eta"][h, t]
                alpha = 1.0 if preset == "deltanet" else gates["alpha"][h, t]
                share = 1.0
                if preset == "comba":  # closed loop: Hu et al. 2025, as their code places alpha
                    share = torch.sigmoid(layer.feedback[h].detach())
                    query = query - layer.correction[h].detach() * key
                M = alpha * M @ (eye - share * eta * torch.outer(key, key)) + eta * vk
            torch.testing.assert_close(out[h, t], M @ query)
        torch.testing.assert_close(state.weights[0][0, h], M)


def answer(weights, x, activation):
    act = F.silu if activation == "silu" else lambda z: F.gelu(z, approximate="tanh")
    h = x
    for w in weights[:-1]:
        h = act(w @ h)
    return weights[-1] @ h + (x if len(weights) > 1 else 0)


def loss(name, y, v, layer):
    e = y - v
    if name == "dot":
        return -(y * v).sum()
    if name == "l2":
        return 0.5 * e.square().sum()
    if name == "lp":
        return ((e.square() + 1e-6) ** 1.5).sum()
    return F.huber_loss(y, v, delta=layer.spec.threshold, reduction="sum")


def hidden_inputs(weights, x, activation):
    act = F.silu if activation == "silu" else lambda z: F.gelu(z, approximate="tanh")
    inputs = [x]
    for w in weights[:-1]:
        inputs.append(act(w @ inputs[-1]))
    return inputs


def simplex(logits):
    return [math.sqrt(a.shape[-1]) * torch.softmax(a, -1) for a in logits]


def damped(eta, inputs, gain, length):
    """eta'_t: the curvature that the pairs so far show, extrapolated to all ``length`` of them."""
    steps = []
    for t, a in enumerate(inputs):
        seen = sum(eta[s] * (inputs[s] @ a) ** 2 for s in range(t + 1))
        norm = (a @ a).clamp(min=1e-12)
        steps.append(eta[t] / (1 + gain[t] * length / (t + 1) * seen / norm))
    return steps


@pytest.mark.parametrize("rule", ["gradient", "dgd"])
@pytest.mark.parametrize("preset", WRITTEN)
def test_gradient_presets(preset, rule):
    objective, momentum, window, activation = WRITTEN[preset]
    if rule == "dgd" and (window > 1 or preset == "memora"):
        pytest.skip("not a point of the space")
    layer = random_layer(preset, rule=rule)
    q, k, v, gates, out, state = remember(layer)
    kl = preset == "memora"
    for h in range(HEADS):
        stored = [w[h].detach() for w in layer.initial]
        S = [torch.zeros_like(w) for w in stored]

        def features(x, h=h):
            x = scaled(x)
            if layer.spec.feature == "polynomial":
                x = x + 0.5 * x.square()
            return normal(x)

        key, query, value = features(k[h]), features(q[h]), normal(scaled(v[h]))
        eta = gates["eta"][h]
        alpha = gates["alpha"][h] if "alpha" in gates else torch.ones_like(eta)
        beta = gates["beta"][h] if momentum else torch.zeros_like(eta)
        # Pairs before the first token are zeros of no weight.
        past = window - 1
        zero = torch.zeros(past, D, dtype=torch.float64)
        nothing = torch.zeros(past, dtype=torch.float64)
        keys, values = torch.cat([zero, key]), torch.cat([zero, value])
        rates = torch.cat([nothing, eta])
        weight = rates
        if window > 1:
            weight = window * torch.cat([nothing, gates["omega"][h]]) * rates
        for start in range(0, T, CHUNK):
            stop = min(start + CHUNK, T)
            frozen = simplex(stored) if kl else stored
            frozen = [w.clone().requires_grad_() for w in frozen]
            pairs = range(start, stop + past)  # in padded numbering; the chunk's own come last
            gain = []
            for j in pairs:
                b = beta[max(j - past, start)]
                g = 1 / (1 + 1e-4 - b) if momentum else torch.tensor(1.0)
                if objective == "lp":
                    e = answer(frozen, keys[j], activation).detach() - values[j]
                    g = g * (6 * (e.square() + 1e-6).sqrt().max()).clamp(min=1)
                gain.append(g)
            inputs = [hidden_inputs(frozen, keys[j], activation) for j in pairs]
            grads = [
                torch.autograd.grad(
                    loss(objective, answer(frozen, keys[j], activation), values[j], layer), frozen
                )
                for j in pairs
            ]
            for t in range(start, stop):
                for layer_index in range(len(stored)):
                    own = [x[layer_index].detach() for x in inputs]
                    steps = damped([weight[j] for j in pairs], own, gain, CHUNK + past)
                    step = 0
                    for index, j in enumerate(pairs):
                        if not t <= j <= t + past:
                            continue
                        if window > 1:
                            share = eta[t] * steps[index] / (window * rates[j]).clamp(min=1e-20)
                        else:
                            share = steps[index]
                        step = step - share * grads[index][layer_index]
                        if rule == "dgd":
                            a = own[index]
                            step_decay = share * torch.outer(stored[layer_index] @ a, a)
                    S[layer_index] = beta[t] * S[layer_index] + step
                    W = alpha[t] * stored[layer_index] + S[layer_index]
                    stored[layer_index] = W - step_decay if rule == "dgd" else W
                seen = stored if layer.spec.readout == "token" else frozen
                torch.testing.assert_close(out[h, t], answer(seen, query[t], activation))
            if kl:
                stored = [torch.log_softmax(a, -1).clamp(min=-30) for a in stored]
    assert state.position == (T,)


def heads_first(x):
    return x.transpose(1, 2)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("preset", LINEAR)
def test_against_flash_linear_attention(preset):
    """fla's naive functions compute the same read-outs and states."""
    ops = (
        "fla.ops."
        + {
            "linear_attention": "linear_attn",
            "retnet": "retention",
            "deltanet": "delta_rule",
            "gated_deltanet": "gated_delta_rule",
            "comba": "comba",
        }[preset]
    )
    naive = pytest.importorskip(ops + ".naive")
    from nestlearn.rules import apply_rule

    q, k = (F.normalize(torch.randn(2, 3, 64, 8), dim=-1) for _ in range(2))
    v = torch.randn(2, 3, 64, 8)
    eta, alpha, ones = torch.rand(2, 3, 64), torch.rand(2, 3, 64) * 0.2 + 0.8, torch.ones(2, 3, 64)
    M = torch.randn(2, 3, 8, 8)
    root = 8**0.5  # their queries are divided by sqrt(d)
    if preset == "retnet":
        alpha = (1 - torch.exp2(-5 - torch.arange(3.0)))[:, None] * ones
        ours, _ = apply_rule("hebbian", torch.zeros_like(M), q, k, v, ones, alpha, chunk=16)
        theirs, final = naive.naive_retention(q * root, k, v), None
    elif preset == "linear_attention":
        ours, mine = apply_rule("hebbian", M, q, k, v, ones, ones, chunk=16)
        theirs, final = naive.naive_recurrent_linear_attn(
            *map(heads_first, (q, k, v)), scale=1.0, initial_state=M.mT, output_final_state=True
        )
        theirs = heads_first(theirs)
    elif preset == "deltanet":
        ours, mine = apply_rule("delta", M, q, k, v, eta, ones, chunk=16)
        theirs, final = naive.delta_rule_recurrence(q * root, k, v, eta, M.mT)
    elif preset == "comba":
        ours, mine = apply_rule("delta", M, q, k, v, eta, alpha, 0.7 * alpha * eta, chunk=16)
        args = [*map(heads_first, (q, k, v, 0.7 * k)), *map(heads_first, (eta, alpha.log()))]
        theirs, final = naive.naive_recurrent_comba(
            *args, scale=1.0, initial_state=M.mT, output_final_state=True
        )
        theirs = heads_first(theirs)
    else:
        ours, mine = apply_rule("delta", M, q, k, v, eta, alpha, gated=True, chunk=16)
        args = [*map(heads_first, (q, k, v)), *map(heads_first, (alpha.log(), eta))]
        theirs, final = naive.naive_chunk_gated_delta_rule(
            *args, chunk_size=16, scale=1.0, initial_state=M.mT, output_final_state=True
        )
        theirs = heads_first(theirs)
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)
    if final is not None:
        torch.testing.assert_close(mine.mT, final, atol=2e-5, rtol=1e-4)
