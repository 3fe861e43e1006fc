"""Streaming driver of memories that are written in chunks.

A memory with chunk size C is read at every token and written once per C tokens. Between two writes
the tokens wait in a ``pending`` buffer, which is part of the state, so any split of a sequence into
calls (whole, halves, token by token) computes the same thing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nestlearn.memory.state import MemoryState

Tensors = tuple[Tensor, ...]
Run = Callable[[Tensors, Tensors], tuple[Tensors, Tensors]]
TOKENS = 2  # the token axis of everything a cell sees: (B, H, T, ...)


class Cell(Protocol):
    """What the driver needs to know about a memory. Token tensors are ``(B, H, T, ...)``."""

    chunk: int

    def read(self, memory: Tensors, inputs: Tensors, pending: Tensors) -> tuple[Tensors, Tensors]:
        """Read ``inputs`` (within one chunk); ``pending`` came before them in the same chunk.

        Returns what the layer gets (outputs) and what the next write needs (written)."""
        ...

    def write(self, memory: Tensors, written: Tensors) -> Tensors:
        """The memory after one full chunk."""
        ...

    # A cell may also have
    #   step(memory, inputs) -> (outputs, memory): one whole chunk, sharing work of read and write;
    #   runner(memory) -> None or a function (memory, inputs) -> (outputs, memory) that does any
    #   number of whole chunks at once on such a memory.


def scan(
    cell: Cell, state: MemoryState, inputs: Tensors, checkpoint_chunks: int = 0
) -> tuple[Tensors, MemoryState]:
    """Run ``cell`` over ``inputs``, continuing from ``state``; all rows share one position.

    Args:
        cell: the memory's read and write.
        state: its weights, extra recurrent tensors and pending tokens.
        inputs: token tensors ``(B, H, T, ...)``.
        checkpoint_chunks: > 0: recompute activations in the backward pass in groups of that many
            chunks, so that training memory grows by one memory state per group, not per token.

    Returns:
        The outputs, joined over all tokens, and the new state.
    """
    chunk, total = cell.chunk, inputs[0].shape[TOKENS]
    fill = state.position[0] % chunk
    memory = state.weights + state.extra
    pending = tuple(p.narrow(TOKENS, 0, fill) for p in state.pending)
    group = chunk * checkpoint_chunks if torch.is_grad_enabled() else 0
    at_once = _runner(cell, memory) is not None
    sizes = [total] if state.frozen else _segment_sizes(total, chunk, fill, group, at_once)
    pieces: list[Tensors] = []
    for length, segment in zip(sizes, _split(inputs, sizes), strict=True):
        if group and fill == 0 and length == group and not state.frozen:
            outputs, memory = checkpoint(
                _whole_chunks, cell, memory, segment, use_reentrant=False, preserve_rng_state=False
            )
        elif length % chunk == 0 and fill == 0 and not state.frozen:
            outputs, memory = _whole_chunks(cell, memory, segment)
        else:
            outputs, written = cell.read(memory, segment, pending)
            if not state.frozen:
                pending = _join(pending, written) if fill else written
                fill += length
                if fill == chunk:
                    memory = cell.write(memory, pending)
                    pending, fill = (), 0
        pieces.append(outputs)
    out = tuple(torch.cat(p, TOKENS) if len(p) > 1 else p[0] for p in zip(*pieces, strict=True))
    if state.frozen:
        return out, state
    split = len(state.weights)
    new = dataclasses.replace(
        state,
        weights=memory[:split],
        extra=memory[split:],
        pending=_store(state.pending, pending, fill),
        position=tuple(p + total for p in state.position),
    )
    return out, new


def _whole_chunks(cell: Cell, memory: Tensors, inputs: Tensors) -> tuple[Tensors, Tensors]:
    run = _runner(cell, memory)
    if run is not None:
        return run(memory, inputs)
    pieces = []
    count = inputs[0].shape[TOKENS] // cell.chunk
    for segment in _split(inputs, [cell.chunk] * count):
        outputs, memory = _step(cell, memory, segment)
        pieces.append(outputs)
    return tuple(torch.cat(p, TOKENS) for p in zip(*pieces, strict=True)), memory


def _runner(cell: Cell, memory: Tensors) -> Run | None:
    return cell.runner(memory) if hasattr(cell, "runner") else None


def _step(cell: Cell, memory: Tensors, inputs: Tensors) -> tuple[Tensors, Tensors]:
    """One whole chunk; a cell with a ``step`` of its own shares work between read and write."""
    if hasattr(cell, "step"):
        return cell.step(memory, inputs)
    outputs, written = cell.read(memory, inputs, ())
    return outputs, cell.write(memory, written)


def _segment_sizes(total: int, chunk: int, fill: int, group: int, at_once: bool) -> list[int]:
    """Up to the next boundary, then whole groups of chunks, whole chunks (one by one, or all
    ``at_once``), and the rest."""
    sizes = [min(chunk - fill, total)] if fill else []
    rest = total - sum(sizes)
    for size in (group, rest // chunk * chunk if at_once and not group else chunk):
        if size:
            sizes += [size] * (rest // size)
            rest %= size
    return sizes + [rest] if rest else sizes


def _split(tensors: Tensors, sizes: list[int]) -> list[Tensors]:
    # One split, not a slice per chunk: a slice's backward fills a tensor of full length.
    return list(zip(*(t.split(sizes, TOKENS) for t in tensors), strict=True))


def _join(first: Tensors, second: Tensors) -> Tensors:
    return tuple(torch.cat(pair, TOKENS) for pair in zip(first, second, strict=True))


def _store(buffers: Tensors, pending: Tensors, fill: int) -> Tensors:
    """Pending tokens at the front of buffers of fixed size (C - 1 tokens)."""
    if fill == 0:
        return tuple(torch.zeros_like(b) for b in buffers)
    stored = []
    for buffer, value in zip(buffers, pending, strict=True):
        rest = buffer.new_zeros(
            (*buffer.shape[:TOKENS], buffer.shape[TOKENS] - fill, *buffer.shape[TOKENS + 1 :])
        )
        stored.append(torch.cat([value.to(buffer.dtype), rest], TOKENS))
    return tuple(stored)
