"""Online learning of a continuum memory: backpropagation through its chain, by hand (SPEC §6b)."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nestlearn.nn.continuum_block import ContinuumBlock
from nestlearn.nn.continuum_state import ContinuumState

if TYPE_CHECKING:
    from nestlearn.nn.continuum import ContinuumMemory


def learn_segment(
    layer: ContinuumMemory, both: Tensor, state: ContinuumState | None
) -> tuple[Tensor, ContinuumState]:
    """Learn from a segment on which no level is due before its last token.

    Args:
        layer: the memory.
        both: its input and the gradient at its output, side by side, ``(B, T, 2 D)``; all rows at
            one position.
        state: the state with which the input was read, None for the first segment.

    Returns:
        ``both`` (rows in step are all this function knows, see `run_ragged`) and the new state.
    """
    x, gradient = both.chunk(2, -1)
    if state is None:
        state = layer.init_state(x.shape[0], x.device, x.dtype)
    if state.frozen:
        return both, state
    chain = layer.chain
    start = state.position[0]
    stop = start + x.shape[1]
    for block in chain:
        early = block.clock.boundaries(start, stop - 1) if block.learns else range(0)
        if early:
            raise ValueError(
                f"level {block.level.name!r} is due at token {early[0]}, inside the segment "
                f"{start + 1}..{stop}: read and learn the stream in the pieces of "
                f"cut({start}, {stop})"
            )
    seen: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    levels = list(state.levels)

    def read(block: ContinuumBlock, i: int, h: Tensor) -> Tensor:
        up, down = block.weights(levels[i], h.dtype)
        z, y = block.read(h, up, down)
        seen.append((h, z, up, down))
        return y

    layer.combine(x, read)
    lowest = min(i for i, block in enumerate(chain) if block.learns)
    # Gradient at h_l, the input of level l + 1, through the levels above l. In a residual chain
    # the output also is a sum, so each level's own output gets `gradient` directly as well.
    summed = layer.kind != "independent" and layer.residual
    above = torch.zeros_like(gradient) if summed else gradient
    for i in range(len(chain) - 1, lowest - 1, -1):
        h, z, up, down = seen[i]
        if layer.kind == "independent":
            g = gradient if layer.mix is None else layer.mix[i] * gradient
        else:
            g = gradient + above if summed else above
        hidden, slope = chain[i].slope(z)
        d = (g @ down) * slope
        if layer.kind != "independent" and i > lowest:
            above = above + d @ up if summed else d @ up
        fast = levels[i]
        if fast is None:
            continue
        fast = chain[i].errors_from_outside(fast, h, hidden, g, d)
        if chain[i].clock.due(stop):
            fast = chain[i].end_of_period(chain[i].update(fast), stop)
        levels[i] = fast
    after = tuple(p + x.shape[1] for p in state.position)
    return both, dataclasses.replace(state, levels=tuple(levels), position=after)
