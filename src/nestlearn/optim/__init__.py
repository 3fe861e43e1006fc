"""Optimizers: learning rules applied to gradients, each level on its own clock."""

from nestlearn.optim.groups import describe_levels, level_groups
from nestlearn.optim.multirate import MultiRate, OptimizerLevel

__all__ = ["MultiRate", "OptimizerLevel", "describe_levels", "level_groups"]
