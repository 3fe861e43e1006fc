"""The lens: which levels a model has, what each costs, and what was matched."""

from nestlearn.lens.adapted import AdaptedSystem, inspect

__all__ = ["AdaptedSystem", "inspect"]
