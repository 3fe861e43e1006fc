"""How a memory is written: learning rules as token steps and as exact chunk-parallel forms."""

from nestlearn.rules.chunk import (
    ChunkWrite,
    Factor,
    delta_chunk,
    dgd_chunk,
    dgd_factor,
    gradient_chunk,
    hebbian_chunk,
    kl_chunk,
    oja_chunk,
    proximal,
    window_weights,
)
from nestlearn.rules.decay import decay_matrix, log_cumulative
from nestlearn.rules.dispatch import Path, apply_rule, available_paths
from nestlearn.rules.linear import LINEAR_RULES, linear_sequence

__all__ = [
    "LINEAR_RULES",
    "ChunkWrite",
    "Factor",
    "Path",
    "apply_rule",
    "available_paths",
    "decay_matrix",
    "delta_chunk",
    "dgd_chunk",
    "dgd_factor",
    "gradient_chunk",
    "hebbian_chunk",
    "kl_chunk",
    "linear_sequence",
    "log_cumulative",
    "oja_chunk",
    "proximal",
    "window_weights",
]
