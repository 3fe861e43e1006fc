"""What the tests of nested systems state by hand: levels of boxes, and transfers between them."""

from __future__ import annotations

import math
from typing import Any

from nestlearn.levels import NestedSystem

T = 512
INF = math.inf


def levels(system: NestedSystem) -> list[dict[str, Any]]:
    return [{box.name: box.frequency for box in level} for level in system.levels]


def links(system: NestedSystem) -> set[tuple[str, str, str]]:
    return {(t.kind, t.source, t.target) for t in system.transfers}


def both_ways(weights: str, *memories: str) -> set[tuple[str, str, str]]:
    """Gradients are the memory's context; what it holds conditions the weights' update."""
    return {("generation", weights, m) for m in memories} | {
        ("direct parametric", m, weights) for m in memories
    }


def in_context(memory: str, weights: str = "weights") -> set[tuple[str, str, str]]:
    """A memory with a learned initial state, whose writes are differentiated through."""
    return {
        ("initialisation", weights, memory),
        ("backpropagation", weights, memory),
        ("direct parametric", memory, weights),
    }


ADAM = both_ways("weights", "first moment", "second moment")
MOMENTUM = both_ways("weights", "momentum")
