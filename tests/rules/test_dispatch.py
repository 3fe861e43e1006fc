"""The dispatcher says which path runs and why."""

from __future__ import annotations

import pytest
import torch

from nestlearn.rules import apply_rule, available_paths
from nestlearn.rules.dispatch import choose_form

ARGS = [torch.zeros(1, 1, 4, 4), *[torch.zeros(1, 1, 3, 4)] * 3, *[torch.ones(1, 1, 3)] * 2]


def test_paths_have_reasons():
    paths = {p.name: p for p in available_paths()}
    assert set(paths) == {"reference", "chunked", "compiled", "triton", "fla"}
    assert paths["reference"].available and paths["chunked"].available
    assert all(p.reason for p in paths.values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
@pytest.mark.parametrize("form", ["fla", "triton"])
def test_no_gpu_is_an_error_with_the_reason(form):
    with pytest.raises(ValueError, match="no CUDA device"):
        apply_rule("delta", *ARGS, gated=True, form=form)
    assert choose_form("delta", ARGS[0], ARGS[1], True) == "chunked"


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        ("huber", {}, "unknown rule"),
        ("delta", {"form": "quick"}, "unknown form"),
        ("delta", {"gated": True, "decay_eta": ARGS[4]}, "not both"),
        ("delta", {"chunk": 0}, "at least 1"),
    ],
)
def test_errors(name, more, message):
    with pytest.raises(ValueError, match=message):
        apply_rule(name, *ARGS, **more)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_fla_kernel_agrees_with_the_chunked_path():
    pytest.importorskip("fla")
    unit = torch.nn.functional.normalize
    Q, K = (unit(torch.randn(2, 2, 130, 64, device="cuda"), dim=-1) for _ in range(2))
    V = torch.randn(2, 2, 130, 64, device="cuda")
    eta, alpha = (
        torch.rand(2, 2, 130, device="cuda"),
        torch.rand(2, 2, 130, device="cuda") / 10 + 0.9,
    )
    M = torch.randn(2, 2, 64, 64, device="cuda")
    want = apply_rule("delta", M, Q, K, V, eta, alpha, gated=True, form="chunked")
    half = [x.bfloat16() for x in (Q, K, V)]
    got = apply_rule("delta", M, *half, eta, alpha, gated=True, form="fla")
    for a, b in zip(got, want, strict=True):
        assert (a - b).abs().max() < 0.02 * b.abs().max()
