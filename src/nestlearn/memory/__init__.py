"""What is stored: inner objectives, memory structures and the explicit state of a memory."""

from nestlearn.memory.objectives import OBJECTIVES, Objective, get_objective
from nestlearn.memory.state import MemoryState, State
from nestlearn.memory.structures import ACTIVATIONS, forward, layer_gradients, weight_shapes

__all__ = [
    "ACTIVATIONS",
    "OBJECTIVES",
    "MemoryState",
    "Objective",
    "State",
    "forward",
    "get_objective",
    "layer_gradients",
    "weight_shapes",
]
