"""Optimizers: learning rules applied to gradients, each level on its own clock."""

from nestlearn.optim.groups import describe_levels, level_groups
from nestlearn.optim.multirate import MultiRate, OptimizerLevel
from nestlearn.optim.row_adam import RowAdam

__all__ = ["MultiRate", "OptimizerLevel", "RowAdam", "describe_levels", "level_groups"]
