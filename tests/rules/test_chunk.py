"""Chunk forms equal their recurrences: outputs, final states and all gradients, in float64."""

from __future__ import annotations

import pytest
import torch

from nestlearn.rules import (
    apply_rule,
    dgd_chunk,
    dgd_factor,
    gradient_chunk,
    kl_chunk,
    linear_sequence,
    oja_chunk,
    proximal,
    reference,
    window_weights,
)
from nestlearn.rules.chunk import delta_chunk, hebbian_chunk, steady
from nestlearn.rules.decay import decay_matrix, log_cumulative

B, H, C, D_IN, D_OUT, PAST = 2, 3, 11, 6, 5, 3


@pytest.fixture
def case():
    """Leaf tensors by name; gates in (0.1, 1)."""

    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64).requires_grad_()

    def gate(*shape):
        return torch.rand(*shape, dtype=torch.float64).mul(0.9).add(0.1).requires_grad_()

    return {
        "M": normal(B, H, D_OUT, D_IN),
        "S": normal(B, H, D_OUT, D_IN),
        "K": normal(B, H, C, D_IN),
        "V": normal(B, H, C, D_OUT),
        "Q": normal(B, H, C, D_IN),
        "past_K": normal(B, H, PAST, D_IN),
        "past_V": normal(B, H, PAST, D_OUT),
        "omega": gate(B, H, PAST + C),
        **{name: gate(B, H, C) for name in ("eta", "decay", "alpha", "beta")},
    }


def assert_same(case, ours, expected):
    """Equal values and equal gradients of a random functional with respect to every input."""
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)
    seeds = [torch.randn_like(e) for e in expected]
    leaves = list(case.values())
    grads = [
        torch.autograd.grad(sum((x * s).sum() for x, s in zip(xs, seeds, strict=True)), leaves,
                            allow_unused=True, retain_graph=True)
        for xs in (ours, expected)
    ]  # fmt: skip
    assert sum(g is not None for g in grads[1]) >= 5
    for name, a, b in zip(case, *grads, strict=True):
        assert (a is None) == (b is None), name
        if a is not None:
            torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9, msg=lambda m, n=name: n + m)


def recur(step, case):
    """Outputs and final states of a token loop; ``step(states, t) -> states``."""
    states, out = (case["M"],), []
    for t in range(C):
        states = step(states, t)
        out.append(reference.read(states[0], case["Q"][:, :, t]))
    return (torch.stack(out, 2), *states)


def at(case, t, *names):
    return [case[name][:, :, t] for name in names]


CHUNKS = {"hebbian": hebbian_chunk, "delta": delta_chunk, "oja": oja_chunk}


@pytest.mark.parametrize("name", CHUNKS)
def test_linear_rules(case, name):
    args = ("K", "V", "eta", "alpha")
    step = getattr(reference, name)
    expected = recur(lambda s, t: (step(s[0], *at(case, t, *args)),), case)
    write = CHUNKS[name](*(case[n] for n in ("M", *args)))
    assert_same(case, (write.read(case["Q"]), write.memory), expected)


@pytest.mark.parametrize("shared", [False, True])
def test_dgd(case, shared):
    args = ("K", "V", "eta", "alpha", "decay")
    expected = recur(lambda s, t: (reference.dgd(s[0], *at(case, t, *args)),), case)
    factor = dgd_factor(case["K"], case["decay"], case["alpha"]) if shared else None
    write = dgd_chunk(*(case[n] for n in ("M", *args)), factor=factor)
    assert_same(case, (write.read(case["Q"]), write.memory), expected)


@pytest.mark.parametrize("decays", [False, True])
def test_momentum(case, decays):
    zero = torch.zeros_like(case["decay"])
    decay = case["decay"] if decays else zero

    def step(states, t):
        M, S = states if len(states) == 2 else (states[0], case["S"])
        args = at(case, t, "K", "V", "eta", "alpha", "beta")
        return reference.dgd_momentum(M, S, *args, decay[:, :, t])

    expected = recur(step, case)
    args = [case[n] for n in ("M", "K", "V", "eta", "alpha")]
    more = {"S": case["S"], "beta": case["beta"]}
    write = dgd_chunk(*args, decay, **more) if decays else gradient_chunk(*args, **more)
    assert_same(case, (write.read(case["Q"]), write.memory, write.momentum), expected)


@pytest.mark.parametrize("momentum", [False, True])
def test_window(case, momentum):
    """Omega (Eq. 68) with gradients G of all pairs given: the last PAST + 1 pairs count."""
    K = torch.cat([case["past_K"], case["K"]], 2)
    G = torch.cat([case["past_V"], case["V"]], 2)

    def step(states, t):
        M, S = states if len(states) == 2 else (states[0], case["S"])
        eta, alpha, beta = (g[..., None, None] for g in at(case, t, "eta", "alpha", "beta"))
        total = sum(
            case["omega"][:, :, j, None, None] * reference.outer(G[:, :, j], K[:, :, j])
            for j in range(t, t + PAST + 1)
        )
        if not momentum:
            return (alpha * M - eta * total,)
        S = beta * S - eta * total
        return alpha * M + S, S

    weights = window_weights(C, PAST, case["omega"])
    more = {"S": case["S"], "beta": case["beta"]} if momentum else {}
    write = gradient_chunk(case["M"], K, G, case["eta"], case["alpha"], weights=weights, **more)
    ours = (write.read(case["Q"]), write.memory) + ((write.momentum,) if momentum else ())
    assert_same(case, ours, recur(step, case))


def test_kl_in_log_space(case):
    """Gradients frozen: softmax(alpha log M - eta g k^T) token by token = one softmax of logits."""

    def step(states, t):
        eta, alpha = (g[..., None, None] for g in at(case, t, "eta", "alpha"))
        gradient = reference.outer(*at(case, t, "V", "K"))
        return (torch.softmax(alpha * states[0].log() - eta * gradient, -1),)

    M = torch.softmax(case["M"], -1)
    states = (M,)
    for t in range(C):
        states = step(states, t)
    write = kl_chunk(M.log(), case["K"], case["V"], case["eta"], case["alpha"])
    assert_same(case, (torch.softmax(write.memory, -1),), states)


def test_kl_at_chunk_one_is_the_reference(case):
    k, v, eta, alpha = (case[n][:, :, :1] for n in ("K", "V", "eta", "alpha"))
    M = torch.softmax(case["M"], -1)
    error = reference.read(M, k[:, :, 0]) - v[:, :, 0]
    write = kl_chunk(M.log(), k, error[:, :, None], eta, alpha)
    expected = reference.kl(M, k[:, :, 0], v[:, :, 0], eta[:, :, 0], alpha[:, :, 0])
    torch.testing.assert_close(torch.softmax(write.memory, -1), expected)


@pytest.mark.parametrize("chunk", [1, 4, C, 64])
@pytest.mark.parametrize("name", ["hebbian", "delta", "oja", "dgd"])
def test_sequence(case, name, chunk):
    args = [case[n] for n in ("M", "Q", "K", "V", "eta", "alpha")]
    more = {} if name == "hebbian" else {"decay_eta": case["decay"]}
    ours = apply_rule(name, *args, form="chunked", chunk=chunk, **more)
    assert_same(case, ours, apply_rule(name, *args, form="reference", **more))


def test_partial_read_is_the_tail_of_the_whole(case):
    write = delta_chunk(*(case[n] for n in ("M", "K", "V", "eta", "alpha")))
    whole = write.read(case["Q"])
    torch.testing.assert_close(write.read(case["Q"][:, :, 4:], 4), whole[:, :, 4:])


@pytest.mark.parametrize("alpha", [0.0, 1e-30, 1e-3, 1.0])
def test_extreme_retention_is_finite_forwards_and_backwards(alpha):
    gate = torch.full((1, 1, 128), alpha, requires_grad=True)
    K = torch.nn.functional.normalize(torch.ones(1, 1, 128, 8), dim=-1).requires_grad_()
    V, eta = torch.ones(1, 1, 128, 8), torch.ones(1, 1, 128)
    out, memory = linear_sequence("delta", torch.zeros(1, 1, 8, 8), K, K, V, eta, gate)
    (out.sum() + memory.sum()).backward()
    for x in (out, memory, gate.grad, K.grad):
        assert x.isfinite().all()
    ratio = decay_matrix(log_cumulative(gate))
    assert ratio.max() <= 1 and ratio.triu(1).abs().max() == 0


def test_steps_never_overshoot():
    keys = 100 * torch.randn(3, 40, 8, dtype=torch.float64)
    eta = torch.full((3, 40), 5.0, dtype=torch.float64)
    assert (proximal(eta, keys) * keys.square().sum(-1) < 1).all()
    torch.testing.assert_close(steady(eta[:, :1], keys[:, :1], 1), proximal(eta, keys)[:, :1])
    same = keys[:, :1].expand_as(keys)
    total = (steady(eta, same, 40) * same.square().sum(-1)).sum(-1)
    assert (total < 1).all() and (total > 0.9).all()


def test_steady_step_is_causal():
    keys = torch.randn(1, 10, 4)
    eta = torch.rand(1, 10)
    torch.testing.assert_close(steady(eta, keys, 16)[:, :6], steady(eta[:, :6], keys[:, :6], 16))
    assert steady(eta, torch.zeros_like(keys), 16).isfinite().all()


def test_errors_say_what_to_do(case):
    args = [case[n] for n in ("M", "K", "V", "eta", "alpha")]
    with pytest.raises(ValueError, match="beta"):
        dgd_chunk(*args, S=case["S"])
    with pytest.raises(ValueError, match="beta"):
        gradient_chunk(*args, S=case["S"])
    with pytest.raises(ValueError, match="needs 14 weights"):
        window_weights(C, PAST, case["eta"])
    with pytest.raises(ValueError, match="not a linear rule"):
        linear_sequence("huber", *(case[n] for n in ("M", "Q", "K", "V", "eta", "alpha")))
