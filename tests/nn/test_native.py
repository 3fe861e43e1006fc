"""The CPU kernel against the PyTorch operations it stands for (which tests/equations compare with
an independent token loop): outputs, final memories and all outer gradients."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings

import pytest
import torch

from nestlearn.nn import SelfModifyingTitans, native, self_memories
from nestlearn.nn.native import build, kernel

ALL = ("k", "v", "q", "eta", "alpha")
needs_kernel = pytest.mark.skipif(native.load()[0] is None, reason=f"no kernel: {native.load()[1]}")

VARIANTS = [
    *(
        {"memory_depth": depth, "objective": objective, "readout": readout, "chunk": chunk}
        for depth in (1, 2, 3, 4)
        for objective in ("dot", "l2")
        for readout in ("token", "chunk")
        for chunk in (1, 4, 16)
    ),
    {"memory_chunk": 4, "projection_chunk": 8, "adaptive": ALL, "memory_width": 12},
    {"memory_chunk": 7, "projection_chunk": 5, "adaptive": ALL, "memory_width": 21},
    {"chunk": 4, "adaptive": ("k", "eta"), "weight_decay": False, "eta_max": 50.0},
    {"chunk": 4, "adaptive": ()},
    {"chunk": 4, "adaptive": (), "weight_decay": False},
    {"chunk": 33, "adaptive": ("v", "alpha")},
    {"chunk": 64, "memory_width": 48},
    {"chunk": 1, "retention": "zero"},
    {"chunk": 4, "targets": "shared", "memory_depth": 3},
    {"chunk": 4, "targets": "shared", "memory_depth": 1, "objective": "l2"},
    {"chunk": 4, "truncate": True},
    {"chunk": 1, "truncate": True, "retention": "zero", "adaptive": ALL},
    {"chunk": 16, "retention": "zero", "objective": "l2", "memory_depth": 3},
    {"chunk": 4, "retention": "zero", "memory_depth": 1, "readout": "chunk"},
    *(
        {"rule": rule, "momentum": momentum, "chunk": chunk, "memory_depth": depth}
        for rule, momentum in (("dgd", True), ("gd", True), ("gd", False))
        for depth in (1, 2, 3)
        for chunk in (1, 4, 33)
    ),
    {"chunk": 4, "write_threshold": 0.3, "eta_max": 1.0},
    {"chunk": 16, "write_threshold": 0.5, "adaptive": ("k", "v", "alpha"), "memory_depth": 1},
    {"momentum": True, "chunk": 16, "retention": "zero", "objective": "l2", "adaptive": ALL},
    {"momentum": True, "chunk": 4, "readout": "chunk", "targets": "shared"},
    {"momentum": True, "memory_chunk": 4, "projection_chunk": 7, "weight_decay": False},
    {"rule": "gd", "momentum": True, "chunk": 8, "retention": "zero", "readout": "chunk"},
]


def make(dtype=torch.float64, dim=32, heads=2, scale=1.3, **settings):
    chunk = settings.pop("chunk", None)
    if chunk:
        settings |= {"memory_chunk": chunk, "projection_chunk": chunk}
    layer = SelfModifyingTitans(dim, heads, **settings).to(dtype)
    with torch.no_grad():
        for name, p in layer.named_parameters():  # no symmetry, no zero
            p.mul_(scale).add_(0.1 * torch.randn_like(p))
            if name.endswith("momentum_logit"):  # a decay that shows
                p.uniform_(-1, 1)
    length = 3 * layer.memory.chunk + 2
    return layer, 2 * torch.randn(3, length, dim, dtype=dtype)


def everything(layer, x):
    """Outputs, final memories, and gradients by input and parameters, by name."""
    x = x.clone().requires_grad_()
    y, state = layer(x)
    states = {f"state.{n}": t for n, t in state.flatten().items() if t.is_floating_point()}
    found = {"y": y, **states}
    weights = torch.Generator().manual_seed(5)
    loss = sum(
        (t * torch.randn(t.shape, generator=weights, dtype=torch.float64).to(t.dtype)).sum()
        for t in found.values()
        if t.requires_grad
    )
    names, parameters = zip(*layer.named_parameters(), strict=True)
    grads = torch.autograd.grad(loss, [x, *parameters], allow_unused=True)
    grads = dict(zip(("x", *names), grads, strict=True))
    return found | {f"grad of {n}": g for n, g in grads.items() if g is not None}


def assert_same(layer, x, tolerance):
    kernels = everything(layer, x)
    with native.disabled():
        torchs = everything(layer, x)
    assert kernels.keys() == torchs.keys()
    for name, want in torchs.items():
        error = (kernels[name] - want).norm() / want.norm().clamp(min=1e-12)
        assert error < tolerance, f"{name}: {error:.1e}"


@needs_kernel
@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_equals_the_torch_operations(settings):
    assert_same(*make(**settings), 1e-10)


@needs_kernel
@pytest.mark.parametrize("momentum", [False, True])
@pytest.mark.parametrize("chunk", [1, 16, 64])
def test_float32(chunk, momentum):
    assert_same(*make(torch.float32, chunk=chunk, momentum=momentum), 1e-4)


@needs_kernel
@pytest.mark.parametrize("depth", [1, 2])
def test_rows_at_their_bound(depth, monkeypatch):
    monkeypatch.setattr(self_memories, "ROOM", 0.5)
    layer, x = make(memory_depth=depth, chunk=4, eta_max=20.0)
    state = layer.init_state(3)
    with torch.no_grad():
        for group in (layer.projections, layer.memory):
            for w in group.initial:
                w.mul_(0.02)  # the bound stays 0.5; large steps carry rows there
        layer.gates.eta_bias.fill_(6.0)
        _, state = layer(x)
    weights = state.memory.weights + state.projections.weights
    bounds = layer.memory.bounds(x.dtype) + layer.projections.bounds(x.dtype)
    at_bound = [
        (w.norm(dim=-1, keepdim=True) > b - 1e-9).any()
        for w, b in zip(weights, bounds, strict=True)
    ]
    assert any(at_bound)
    assert_same(layer, x, 1e-9)


@needs_kernel
@pytest.mark.parametrize("momentum", [False, True])
def test_retention_of_exactly_zero_and_one(momentum):
    layer, x = make(chunk=4, adaptive=("k", "v", "eta"), momentum=momentum)
    for value in (-2000.0, 2000.0):
        with torch.no_grad():
            layer.gates.alpha_bias.fill_(value)
        assert_same(layer, x, 1e-9)


@needs_kernel
def test_number_of_threads_changes_nothing():
    layer, x = make(torch.float32, chunk=4)
    one = everything(layer, x)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        three = everything(layer, x)
    finally:
        torch.set_num_threads(threads)
    for name, value in one.items():
        torch.testing.assert_close(three[name], value, rtol=1e-5, atol=1e-5)
    assert torch.equal(one["state.memory.weights.0"], three["state.memory.weights.0"])


@needs_kernel
def test_not_a_number_is_not_hidden():
    layer, x = make(torch.float32, chunk=4)
    x[1, 5] = torch.nan
    y, state = layer(x)
    assert y[1, 8:].isnan().any() and state.memory.weights[0][1].isnan().any()
    assert y[[0, 2]].isfinite().all() and state.memory.weights[0][[0, 2]].isfinite().all()


@needs_kernel
def test_only_what_it_can_do_goes_there():
    plain = make(chunk=4)[0].memory
    weights = plain.initial_weights(torch.float32)
    assert plain.runner(weights) is not None
    assert plain.runner(tuple(w.to(torch.bfloat16) for w in weights)) is None
    assert plain.runner(tuple(w.to("meta") for w in weights)) is None
    with native.disabled():
        assert plain.runner(weights) is None


@needs_kernel
def test_second_derivatives_are_refused_with_the_way_out():
    layer, x = make(chunk=4, dim=8)
    x.requires_grad_()
    (g,) = torch.autograd.grad(layer(x)[0].sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        g.sum().backward()


def fresh(code: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | env, capture_output=True, text=True
    )


RUN = """
import torch, nestlearn as nl
layer = nl.nn.SelfModifyingTitans(8, 2, memory_chunk=2, projection_chunk=2)
print(layer(torch.zeros(1, 4, 8))[0].shape)
"""


def test_without_a_compiler_it_says_so_and_runs(tmp_path):
    done = fresh(RUN, PATH=str(tmp_path), CXX="")
    assert done.returncode == 0, done.stderr
    assert "[1, 4, 8]" in done.stdout
    assert "no C++ compiler found" in done.stderr and "NESTLEARN_NATIVE=0" in done.stderr


def test_a_compiler_that_fails_is_named(tmp_path):
    broken = tmp_path / "c++broken"
    broken.write_text("#!/bin/sh\necho unsupported machine >&2\nexit 1\n")
    broken.chmod(0o755)
    done = fresh(RUN, CXX=str(broken))
    assert done.returncode == 0 and "unsupported machine" in done.stderr


def test_turned_off_is_silent():
    done = fresh(RUN, NESTLEARN_NATIVE="0")
    assert done.returncode == 0 and "Warning" not in done.stderr


@needs_kernel
def test_compiled_once_into_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NESTLEARN_CACHE", str(tmp_path / "new" / "cache"))
    first = build._compile(build._compiler())
    stamp = first.stat().st_mtime_ns
    assert build._compile(build._compiler()) == first and first.stat().st_mtime_ns == stamp
    assert [p.name for p in first.parent.iterdir()] == [first.name]  # no scratch is left behind


@needs_kernel
def test_usable_warns_of_nothing_when_there_is_a_kernel():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert kernel.usable((torch.zeros(1),))


@needs_kernel
def test_vanishing_rates_leave_no_denormal_numbers():
    layer, x = make(torch.float32, chunk=16, adaptive=("k", "v", "alpha"))
    with torch.no_grad():
        layer.gates.eta_bias.fill_(-87.0)  # eta about 1e-38
    smallest = torch.finfo(torch.float32).tiny
    found = everything(layer, x)
    for name in ("state.memory.weights.0", "grad of memory.initial.0"):
        size = found[name].abs()
        assert size.max() > 0.1 and size[size > 0].min() >= smallest
