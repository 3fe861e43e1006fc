"""Models of ours that several benchmarks build."""

from __future__ import annotations

from typing import Any

import common  # noqa: F401  (puts src/ on the path)
from torch import nn

VOCAB = 256


def hope(
    dim: int = 256,
    layers: int = 4,
    heads: int = 4,
    length: int = 1024,
    vocab: int = VOCAB,
    **more: Any,
) -> nn.Module:
    """A ``HopeForCausalLM`` with tied head and a CMS of the parameters of one MLP."""
    from nestlearn.models.hope import HopeConfig, HopeForCausalLM

    settings: dict[str, Any] = {
        "vocab_size": vocab,
        "hidden_size": dim,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 4 * dim,
        "max_position_embeddings": max(length, 1024),
        "tie_word_embeddings": True,
    }
    return HopeForCausalLM(HopeConfig(**{**settings, **more}))


def size(module: nn.Module) -> int:
    """Number of parameters, shared ones once."""
    return sum({id(p): p.numel() for p in module.parameters()}.values())
