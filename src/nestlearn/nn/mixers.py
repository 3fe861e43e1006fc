"""The sequence layers a block can be built with, by name.

A mixer is ``nn.Module`` with ``forward(x, state=None, mask=None) -> (y, state)`` and
``init_state(batch_size)``. Hope, Hope-Attention and every baseline differ only in the mixer, so a
comparison is one flag. Layers are imported when they are built.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

NEURAL_MEMORY_PRESETS = (
    "linear_attention",
    "retnet",
    "deltanet",
    "gated_deltanet",
    "comba",
    "ttt_linear",
    "ttt_mlp",
    "titans",
    "dla",
    "atlas",
    "moneta",
    "yaad",
    "memora",
)


def _self_modifying(config: Any) -> nn.Module:
    from nestlearn.nn.self_modifying import SelfModifyingTitans

    return SelfModifyingTitans(
        config.hidden_size,
        config.num_attention_heads,
        memory_depth=config.memory_depth,
        memory_width=config.memory_width,
        memory_chunk=config.memory_chunk,
        projection_chunk=config.projection_chunk,
        objective=config.memory_objective,
        readout=config.memory_readout,
        rule=config.memory_rule,
        momentum=config.memory_momentum,
        weight_decay=config.memory_weight_decay,
        retention=config.memory_retention,
        targets=config.memory_targets,
        truncate=config.memory_truncate,
        half_lives=tuple(config.memory_half_lives),
        adaptive=tuple(config.memory_adaptive),
        eta_max=config.eta_max,
        write_threshold=config.write_threshold,
        counters=config.counters,
        counter_noise=config.counter_noise,
        conv_size=config.conv_size,
    )


def _attention(config: Any) -> nn.Module:
    from nestlearn.nn.attention import CausalSelfAttention

    return CausalSelfAttention(
        config.hidden_size,
        config.num_attention_heads,
        rope_theta=config.rope_theta,
        max_position_embeddings=config.max_position_embeddings,
        window=config.sliding_window,
    )


def _expansion(config: Any) -> dict[str, Any]:
    """Of a neural memory whose width is given; shallow ones have none (`HopeConfig` refuses it)."""
    if config.memory_width is None:
        return {}
    return {"expansion": config.memory_width * config.num_attention_heads / config.hidden_size}


def _neural_memory(preset: str) -> Callable[[Any], nn.Module]:
    def build(config: Any) -> nn.Module:
        from nestlearn.nn.neural_memory import NeuralMemory

        reflecting: dict[str, Any] = {}
        if preset in DELTA_RULE and config.allow_neg_eigval:
            reflecting["eta_max"] = 2.0
        return NeuralMemory(
            config.hidden_size,
            config.num_attention_heads,
            preset=preset,
            chunk=config.memory_chunk,
            conv_size=config.conv_size,
            **reflecting,
            **_expansion(config),
        )

    return build


def _rwkv7(config: Any) -> nn.Module:
    from nestlearn.nn.rwkv7 import RWKV7

    return RWKV7(config.hidden_size, config.num_attention_heads, chunk=config.memory_chunk)


def _mamba2(config: Any) -> nn.Module:
    from nestlearn.nn.mamba2 import Mamba2

    return Mamba2(
        config.hidden_size,
        config.num_attention_heads,
        chunk=config.memory_chunk,
        conv_size=config.conv_size,
    )


def _lstm(config: Any) -> nn.Module:
    from nestlearn.nn.lstm import LSTM

    return LSTM(config.hidden_size)


def _srwm(config: Any) -> nn.Module:
    from nestlearn.nn.self_referential import SelfReferentialMatrix

    return SelfReferentialMatrix(config.hidden_size, config.num_attention_heads)


def _titans(wiring: str) -> Callable[[Any], nn.Module]:
    def build(config: Any) -> nn.Module:
        from nestlearn.nn.titans import TitansGate, TitansLayer
        from nestlearn.nn.titans_context import TitansContext

        settings = {
            "chunk": config.memory_chunk,
            "conv_size": config.conv_size,
            "rope_theta": config.rope_theta,
            **_expansion(config),
        }
        dim, heads = config.hidden_size, config.num_attention_heads
        if wiring == "context":
            return TitansContext(dim, heads, **settings)
        kind = TitansGate if wiring == "gate" else TitansLayer
        # A window is what makes the memory carry the rest.
        window = config.sliding_window or max(1, config.max_position_embeddings // 2)
        return kind(dim, heads, window=window, **settings)

    return build


MIXERS: dict[str, Callable[[Any], nn.Module]] = {
    "self_modifying": _self_modifying,
    "attention": _attention,
    **{name: _neural_memory(name) for name in NEURAL_MEMORY_PRESETS},
    "rwkv7": _rwkv7,
    "mamba2": _mamba2,
    "lstm": _lstm,
    "srwm": _srwm,
    "titans_mac": _titans("context"),
    "titans_mag": _titans("gate"),
    "titans_mal": _titans("layer"),
}
WINDOWED = ("attention", "titans_mag", "titans_mal")
"""Mixers that read ``sliding_window``."""
DEEP_MEMORIES = ("ttt_mlp", "titans", "dla", "atlas", "moneta", "yaad", "memora",
                 "titans_mac", "titans_mag", "titans_mal")  # fmt: skip
"""Mixers besides Hope's that read ``memory_width``."""
DELTA_RULE = ("deltanet", "gated_deltanet", "comba")
"""Mixers that read ``allow_neg_eigval``."""

PATTERNS: dict[str, tuple[str, ...]] = {"samba": ("mamba2", "attention")}
"""Names of patterns that layers take turns in. Samba (Ren et al. 2024, arXiv 2406.07522): a
selective state space, then sliding-window attention."""


def layer_mixers(mixer: str | Sequence[str], layers: int) -> list[str]:
    """The mixer of every layer: a name, a pattern's name, or a list that layers take turns in.

    Raises:
        ValueError: an unknown name, or an empty list.

    Example:
        >>> layer_mixers("samba", 3)
        ['mamba2', 'attention', 'mamba2']
    """
    cycle = PATTERNS.get(mixer, (mixer,)) if isinstance(mixer, str) else tuple(mixer)
    if not cycle:
        raise ValueError("mixer must be a name or a list of names, got an empty list")
    for name in cycle:
        check_mixer(name)
    return [cycle[layer % len(cycle)] for layer in range(layers)]


def least_layers(mixer: str | Sequence[str]) -> int:
    """Layers a model needs at least: as many as a named pattern has.

    Example:
        >>> least_layers("samba"), least_layers("titans")
        (2, 1)
    """
    return len(PATTERNS.get(mixer, (mixer,))) if isinstance(mixer, str) else 1


def default_chunk(name: str) -> int:
    """Tokens per write that the literature (or SPEC §5) uses for a mixer."""
    if name not in NEURAL_MEMORY_PRESETS:
        return {"rwkv7": 32}.get(name, 64)
    from nestlearn.nn.presets import get_spec

    return get_spec(name).chunk


def check_mixer(name: str) -> None:
    """Raise a ``ValueError`` that lists the mixers (and the nearest) if ``name`` is none."""
    if name in MIXERS:
        return
    if name in PATTERNS:
        raise ValueError(f"{name!r} is a pattern of layers; in a list, name its mixers instead")
    known = [*MIXERS, *PATTERNS]
    near = difflib.get_close_matches(str(name), known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"unknown mixer {name!r}; choose one of {', '.join(known)}{hint}")


def build_mixer(name: str, config: Any) -> nn.Module:
    """Build the mixer ``name`` in the size that ``config`` (a ``HopeConfig``) describes.

    Raises:
        ValueError: no mixer has this name.

    Example:
        >>> import torch
        >>> from nestlearn.models.hope import HopeConfig
        >>> layer = build_mixer("attention", HopeConfig.preset("tiny"))
        >>> y, state = layer(torch.randn(1, 3, 64))
    """
    check_mixer(name)
    return MIXERS[name](config)
