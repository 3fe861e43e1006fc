"""The generalised delta rule: chunked form, token form, and flash-linear-attention's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from nestlearn.rules.diagonal import (
    LARGEST_CHUNK,
    LOWEST_LOG,
    diagonal_sequence,
    diagonal_step,
)
from nestlearn.rules.reference import delta, read


def inputs(length=21, dtype=torch.float64):
    def random(*shape):
        return torch.randn(2, 3, *shape, dtype=dtype)

    key = F.normalize(random(length, 5), dim=-1)
    rate = torch.rand(2, 3, length, 5, dtype=dtype)
    found = {
        "M": random(4, 5), "Q": random(length, 5), "K": random(length, 5), "V": random(length, 4),
        "log_w": LOWEST_LOG * torch.rand(2, 3, length, 5, dtype=dtype),
        "A": -key, "B": key * rate,
    }  # fmt: skip
    return {name: x.requires_grad_() for name, x in found.items()}


def token_loop(M, Q, K, V, log_w, A, B):
    outputs = []
    for t in range(Q.shape[2]):
        M = diagonal_step(M, *(x[:, :, t] for x in (K, V, log_w, A, B)))
        outputs.append(read(M, Q[:, :, t]))
    return torch.stack(outputs, 2), M


@pytest.mark.parametrize("chunk", [1, 4, 7, 64])
def test_chunked_form_equals_the_token_loop(chunk):
    given = inputs()
    expected, last = token_loop(**given)
    out, memory = diagonal_sequence(**given, chunk=chunk)
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(memory, last, atol=1e-12, rtol=1e-10)
    weights = torch.randn_like(out), torch.randn_like(memory)
    grads = [
        torch.autograd.grad((o * weights[0]).sum() + (m * weights[1]).sum(), list(given.values()))
        for o, m in ((expected, last), (out, memory))
    ]
    for name, one, two in zip(given, *grads, strict=True):
        torch.testing.assert_close(one, two, atol=1e-11, rtol=1e-9, msg=name)


def test_the_strongest_decay_fits_into_the_longest_chunk():
    given = {n: x.detach() for n, x in inputs(200, torch.float32).items()}
    given["log_w"] = torch.full_like(given["log_w"], LOWEST_LOG)
    exact, _ = token_loop(**{n: x.double() for n, x in given.items()})
    out, _ = diagonal_sequence(**given, chunk=LARGEST_CHUNK)
    torch.testing.assert_close(out, exact.float(), atol=2e-5, rtol=1e-4)


def test_gated_delta_rule_is_a_special_case():
    M, k, v = torch.randn(4, 5), torch.randn(5), torch.randn(4)
    alpha, eta = torch.tensor(0.8), torch.tensor(0.3)
    log_w = alpha.log().expand(5)
    step = diagonal_step(M, k, eta * v, log_w, k, -alpha * eta * k)
    torch.testing.assert_close(step, delta(M, k, v, eta, alpha, alpha * eta))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_against_flash_linear_attention():
    naive = pytest.importorskip("fla.ops.generalized_delta_rule.dplr.naive")
    given = {n: x.detach() for n, x in inputs(32, torch.float32).items()}
    out, memory = diagonal_sequence(**given, chunk=8)
    expected, last = naive.dplr_recurrence(
        given["Q"] * 5**0.5, given["K"], given["V"], given["A"], given["B"], given["log_w"],
        initial_state=given["M"].mT,
    )  # fmt: skip
    torch.testing.assert_close(out, expected, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(memory, last.mT, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("chunk", [0, 65])
def test_the_chunk_is_bounded(chunk):
    with pytest.raises(ValueError, match="chunk must be 1 to 64"):
        diagonal_sequence(**inputs(3), chunk=chunk)
