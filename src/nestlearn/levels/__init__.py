"""Levels: clocks, level descriptions, nested systems and what is transferred between levels."""

from nestlearn.levels.clock import NEVER, Clock, segments
from nestlearn.levels.level import Level
from nestlearn.levels.system import Box, NestedSystem
from nestlearn.levels.transfer import (
    Backpropagation,
    DirectNonParametric,
    DirectParametric,
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
    "Generation",
    "Initialisation",
    "Level",
    "NestedSystem",
    "Transfer",
    "segments",
]
