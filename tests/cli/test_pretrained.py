"""Loading a pre-trained model in a type that the machine is fast with."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from nestlearn.cli import machine, pretrained

OLD = {"vector units": ["AVX2"]}
NEW = {"vector units": ["AVX2", "AVX-512", "AVX-512 bf16"]}


@pytest.mark.parametrize(
    ("units", "slow"),
    [
        (["AVX2"], True),
        (["AVX2", "AVX-512"], False),
        (["AVX2", "AVX-512", "AVX-512 bf16", "AMX bf16"], False),
        (["NEON"], False),
        ([], False),
    ],
)
def test_bfloat16_is_slow_on_x86_without_avx_512(units, slow):
    assert machine.slow_with_bf16({"vector units": units}) is slow


@pytest.fixture
def model():
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(torch.bfloat16)


def test_float32_where_bfloat16_is_emulated(model, monkeypatch, capsys):
    monkeypatch.setattr(machine, "processor", lambda: OLD)
    assert pretrained._fast_type(model).dtype == torch.float32
    assert "only emulates bfloat16" in capsys.readouterr().err


def test_as_stored_where_bfloat16_is_native(model, monkeypatch, capsys):
    monkeypatch.setattr(machine, "processor", lambda: NEW)
    assert pretrained._fast_type(model).dtype == torch.bfloat16
    assert capsys.readouterr().err == ""


def test_as_stored_where_memory_is_too_small(model, monkeypatch, capsys):
    monkeypatch.setattr(machine, "processor", lambda: OLD)
    monkeypatch.setattr(machine, "memory", lambda: {"total": 1, "available": 1})
    assert pretrained._fast_type(model).dtype == torch.bfloat16
    assert "memory is too small" in capsys.readouterr().err
