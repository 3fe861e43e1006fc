"""Optimizers: learning rules applied to gradients, each level on its own clock."""

from nestlearn.optim.groups import describe_levels, level_groups
from nestlearn.optim.m3 import M3
from nestlearn.optim.multirate import MultiRate, OptimizerLevel
from nestlearn.optim.newton_schulz import newton_schulz, orthogonalise
from nestlearn.optim.parameters import ParameterSplit, split_parameters

__all__ = [
    "M3",
    "MultiRate",
    "OptimizerLevel",
    "ParameterSplit",
    "describe_levels",
    "level_groups",
    "newton_schulz",
    "orthogonalise",
    "split_parameters",
]
