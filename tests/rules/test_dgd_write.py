"""The hot path of DGD against the plain chunk form and against numerical gradients."""

from __future__ import annotations

import pytest
import torch

from nestlearn.rules.chunk import dgd_chunk
from nestlearn.rules.dgd_write import ChunkDecay, dgd_write, read_per_token

F64 = torch.float64


def problem(length=6, out=4, width=5):
    """Memory, inputs, gradient (two memories share the gates of their head), eta, alpha."""
    shape = (2, 3)
    tensors = [
        torch.randn(*shape, out, width, dtype=F64),
        torch.randn(*shape, width, length, dtype=F64),
        torch.randn(*shape, out, length, dtype=F64),
        torch.rand(2, 1, length, dtype=F64) + 0.05,
        0.5 + 0.5 * torch.rand(2, 1, length, dtype=F64),
    ]
    return [t.requires_grad_() for t in tensors]


def fast(memory, inputs, grad, eta, alpha):
    return dgd_write(memory, inputs, grad, memory @ inputs, eta, ChunkDecay.from_alpha(alpha))


def plain(memory, inputs, grad, eta, alpha):
    step = eta / (1 + eta * inputs.square().sum(-2))
    return dgd_chunk(memory, inputs.mT, grad.mT, step, alpha)


@pytest.mark.parametrize("length", [1, 2, 7])
def test_equals_the_chunk_form(length):
    tensors = problem(length)
    queries = torch.randn(2, 3, 5, length, dtype=F64)
    memory, u = fast(*tensors)
    decay = ChunkDecay.from_alpha(tensors[-1])
    read = read_per_token(tensors[0], tensors[1], u, queries, decay)
    expected = plain(*tensors)
    expected_read = expected.read(queries.mT).mT
    torch.testing.assert_close(memory, expected.memory, rtol=0, atol=1e-12)
    torch.testing.assert_close(read, expected_read, rtol=0, atol=1e-12)
    last = read_per_token(tensors[0], tensors[1], u, queries[..., -1:], decay)
    torch.testing.assert_close(last, read[..., -1:], rtol=0, atol=1e-12)

    a, b = torch.randn_like(memory), torch.randn_like(read)
    ours = torch.autograd.grad((memory * a).sum() + (read * b).sum(), tensors)
    theirs = torch.autograd.grad((expected.memory * a).sum() + (expected_read * b).sum(), tensors)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


def test_gradcheck():
    assert torch.autograd.gradcheck(fast, problem(4, 3, 3))


def test_never_overshoots_with_huge_inputs():
    memory, inputs, grad, eta, alpha = (t.detach() for t in problem())
    new, _ = fast(memory, inputs * 1e6, grad, eta * 1e3, alpha)
    assert new.isfinite().all() and new.norm() < 10 * (memory.norm() + grad.norm())
