"""What the contract batteries share: small configurations and comparison of states."""

from __future__ import annotations

import shutil

import pytest
import torch

from nestlearn.models.hope import HopeConfig

CHUNK = 4  # main memory; the projection memories use half of it, so both clocks are exercised


def make_config(mixer: str, **overrides) -> HopeConfig:
    """A Hope of width 16 with two blocks and two CMS levels."""
    sizes = {
        "vocab_size": 31,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "memory_chunk": CHUNK,
        "projection_chunk": CHUNK // 2,
        "cms_periods": [1, 2],
    }
    return HopeConfig(mixer=mixer, **{**sizes, **overrides})


def compare_states(a, b, tolerance: float) -> None:
    """Equal structure, equal host integers, tensors within ``tolerance`` (0: bit-equal)."""
    left, right = a.flatten(), b.flatten()
    assert left.keys() == right.keys()
    for name, value in left.items():
        other = right[name]
        assert value.shape == other.shape, name
        if tolerance == 0 or not value.is_floating_point():
            assert torch.equal(value, other), name
        else:
            scale = max(1.0, float(value.detach().abs().max())) if value.numel() else 1.0
            torch.testing.assert_close(value, other, atol=tolerance * scale, rtol=0, msg=name)


@pytest.fixture
def config_for():
    return make_config


@pytest.fixture
def same_state():
    return compare_states


@pytest.fixture
def chunk():
    return CHUNK


@pytest.fixture
def needs_compiler() -> None:
    if not any(shutil.which(c) for c in ("g++", "clang++", "c++")):
        pytest.skip("torch.compile's CPU backend needs a C++ compiler; none on PATH")
