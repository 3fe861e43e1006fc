"""The lens: which levels a model and its optimizer have, what each costs, what passes between."""

from nestlearn.lens import associative, baselines, blocks, loops, memories  # noqa: F401  (they register their recognisers)
from nestlearn.lens.adapted import AdaptedSystem
from nestlearn.lens.blocks import attention_box, plain
from nestlearn.lens.findings import (
    FastBox,
    Found,
    Memory,
    Rule,
    Scope,
    SlowBox,
    Unknown,
    matrix_flops,
)
from nestlearn.lens.inspection import inspect
from nestlearn.lens.registry import register_module, register_optimizer
from nestlearn.lens.system import InspectedSystem

__all__ = [
    "AdaptedSystem",
    "FastBox",
    "Found",
    "InspectedSystem",
    "Memory",
    "Rule",
    "Scope",
    "SlowBox",
    "Unknown",
    "attention_box",
    "inspect",
    "matrix_flops",
    "plain",
    "register_module",
    "register_optimizer",
]
