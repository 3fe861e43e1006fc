"""Optimizers: learning rules applied to gradients, each level on its own clock."""

from nestlearn.optim.associative import AssociativeMomentum
from nestlearn.optim.deep import DeepMomentum
from nestlearn.optim.delta import DeltaMomentum
from nestlearn.optim.generalized import DGD, GeneralizedGD
from nestlearn.optim.groups import describe_levels, level_groups
from nestlearn.optim.m3 import M3
from nestlearn.optim.multirate import MultiRate, OptimizerLevel
from nestlearn.optim.newton_schulz import newton_schulz, orthogonalise
from nestlearn.optim.parameters import ParameterSplit, split_parameters
from nestlearn.optim.presets import PRESETS, Design

__all__ = [
    "DGD",
    "AssociativeMomentum",
    "DeepMomentum",
    "DeltaMomentum",
    "GeneralizedGD",
    "M3",
    "PRESETS",
    "Design",
    "MultiRate",
    "OptimizerLevel",
    "ParameterSplit",
    "describe_levels",
    "level_groups",
    "newton_schulz",
    "orthogonalise",
    "split_parameters",
]
