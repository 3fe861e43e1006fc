"""Sequence layers that learn while they read: ``y, state = layer(x, state)``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nestlearn._lazy import lazy_exports

if TYPE_CHECKING:
    from nestlearn.nn.attention import CausalSelfAttention
    from nestlearn.nn.continuum import ContinuumMemory
    from nestlearn.nn.mixers import build_mixer
    from nestlearn.nn.neural_memory import NeuralMemory
    from nestlearn.nn.self_modifying import SelfModifyingTitans

__all__ = [
    "CausalSelfAttention",
    "ContinuumMemory",
    "NeuralMemory",
    "SelfModifyingTitans",
    "build_mixer",
]

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "CausalSelfAttention": "nestlearn.nn.attention",
        "ContinuumMemory": "nestlearn.nn.continuum",
        "NeuralMemory": "nestlearn.nn.neural_memory",
        "SelfModifyingTitans": "nestlearn.nn.self_modifying",
        "build_mixer": "nestlearn.nn.mixers",
    },
)
