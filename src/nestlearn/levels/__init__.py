"""Levels: clocks, level descriptions, nested systems and what is transferred between levels."""

from nestlearn.levels.clock import NEVER, Clock, segments
from nestlearn.levels.inner_loop import InnerLoop, TwoLevel
from nestlearn.levels.level import Level
from nestlearn.levels.system import Box, NestedSystem
from nestlearn.levels.transfer import (
    Backpropagation,
    DirectNonParametric,
    DirectParametric,
    Episode,
    Generation,
    Initialisation,
    Transfer,
)

__all__ = [
    "NEVER",
    "Backpropagation",
    "Box",
    "Clock",
    "DirectNonParametric",
    "DirectParametric",
    "Episode",
    "Generation",
    "Initialisation",
    "InnerLoop",
    "Level",
    "NestedSystem",
    "Transfer",
    "TwoLevel",
    "segments",
]
