"""The hot path of gradient writes against the plain chunk form and numerical gradients."""

from __future__ import annotations

import pytest
import torch

from nestlearn.rules.chunk import gradient_chunk, steady, window_weights
from nestlearn.rules.gradient_write import ChunkGates, GradientWrite, damped_terms

F64 = torch.float64
LEAD, CHUNK = (2, 3), 7
CASES = ["plain", "retention", "momentum", "both", "window", "window both"]
EVERY = pytest.mark.parametrize("case", CASES)


def problem(case, length=5, out=4, width=3):
    """Tensors by name: memory, momentum, inputs, gradients, queries and the gates of the case."""
    past = 3 if "window" in case else 0

    def gate(tokens):
        return 0.1 + 0.9 * torch.rand(*LEAD, tokens, dtype=F64)

    tensors = {
        "memory": torch.randn(*LEAD, out, width, dtype=F64),
        "inputs": torch.randn(*LEAD, past + length, width, dtype=F64),
        "grad": torch.randn(*LEAD, past + length, out, dtype=F64),
        "queries": torch.randn(*LEAD, length, width, dtype=F64),
        "eta": gate(length),
        "gain": 1 + gate(past + length),
    }
    if case in ("retention", "both", "window both"):
        tensors["alpha"] = gate(length)
    if case in ("momentum", "both", "window both"):
        tensors["beta"] = gate(length)
        tensors["momentum"] = torch.randn(*LEAD, out, width, dtype=F64)
    if past:
        tensors["rate"] = gate(past + length)
        tensors["share"] = gate(past + length)
    return {n: t.requires_grad_() for n, t in tensors.items()}


def fast(memory, inputs, grad, queries, eta, gain, alpha=None, beta=None, momentum=None,
         rate=None, share=None, first=0):  # fmt: skip
    count, length = inputs.shape[-2], eta.shape[-1]
    weights = None
    if rate is not None:
        ones = torch.ones(*LEAD, count, dtype=F64)
        weights = eta[..., None] * window_weights(length, count - length, ones)
    gates = ChunkGates.of(eta, alpha, beta, weights)
    bend = gain * (CHUNK + count - length) / torch.arange(1, count + 1, dtype=F64)
    u = damped_terms(inputs, grad, eta if rate is None else rate, bend, share)
    write = GradientWrite(memory, momentum, inputs, u, gates)
    read = write.read(queries[..., first:, :], first)
    return tuple(t for t in (*write.finish(), read) if t is not None)


def plain(memory, inputs, grad, queries, eta, gain, alpha=None, beta=None, momentum=None,
          rate=None, share=None, first=0):  # fmt: skip
    past = inputs.shape[-2] - eta.shape[-1]
    alpha = torch.ones_like(eta) if alpha is None else alpha
    step, weights = eta, None
    if rate is None:
        step = steady(eta, inputs, CHUNK, gain)
    else:
        each = steady(rate, inputs, CHUNK, gain, past) * share / rate
        weights = window_weights(eta.shape[-1], past, each)
    write = gradient_chunk(
        memory, inputs, grad, step, alpha, S=momentum, beta=beta, weights=weights
    )
    read = write.read(queries[..., first:, :], first)
    return tuple(t for t in (*write.finish(), read) if t is not None)


@EVERY
@pytest.mark.parametrize("length", [1, 5])
@pytest.mark.parametrize("first", [0, -1])
def test_equals_the_chunk_form(case, length, first):
    tensors = problem(case, length)
    first %= length
    ours, theirs = fast(**tensors, first=first), plain(**tensors, first=first)
    weights = [torch.randn_like(t) for t in ours]
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11)
    grads = [
        torch.autograd.grad(
            sum((t * w).sum() for t, w in zip(out, weights, strict=True)), list(tensors.values())
        )
        for out in (ours, theirs)
    ]
    for name, one, other in zip(tensors, *grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10, msg=name)


@EVERY
def test_gradcheck(case):
    tensors = problem(case, 3, 2, 2)
    names = list(tensors)
    assert torch.autograd.gradcheck(
        lambda *values: fast(**dict(zip(names, values, strict=True))),
        tuple(tensors.values()),
        fast_mode=True,
    )


def test_final_memory_needs_no_mix():
    tensors = problem("both")
    gates = ChunkGates.of(tensors["eta"], tensors["alpha"], tensors["beta"], tokens=False)
    full = ChunkGates.of(tensors["eta"], tensors["alpha"], tensors["beta"])
    for name in ("last", "total", "gain_last", "own_last", "own_total"):
        torch.testing.assert_close(getattr(gates, name), getattr(full, name))
    write = GradientWrite(tensors["memory"], None, tensors["inputs"], tensors["grad"], gates)
    with pytest.raises(ValueError, match="tokens=True"):
        write.read(tensors["queries"])
