"""Padded batches for recurrent layers.

A recurrent memory has a clock per row, so a padded row must not tick, write, or move its chunk
boundaries: it has to give exactly what it gives alone. Rows are independent, therefore the batch is
split into groups whose rows have the same real columns and the same clock, each group runs as an
un-padded batch, and the results are merged.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nestlearn.memory.state import State


def padding_spans(mask: Tensor) -> list[tuple[int, int]]:
    """First and one-past-last real column of every row of a ``(B, T)`` mask (True = real token).

    Raises:
        ValueError: a row has a hole: only left and right padding have a meaning for a stream.
    """
    if mask.ndim != 2:
        raise ValueError(f"mask must be (batch, tokens), got shape {tuple(mask.shape)}")
    real = mask.bool()
    length = mask.shape[1]
    count = real.sum(1).tolist()
    start = torch.where(real.any(1), real.int().argmax(1), 0).tolist()
    stop = torch.where(real.any(1), length - real.flip(1).int().argmax(1), 0).tolist()
    for row, (a, b, n) in enumerate(zip(start, stop, count, strict=True)):
        if b - a != n:
            raise ValueError(
                f"mask row {row} has padding between real tokens; pad on the left or on the right"
            )
    return list(zip(start, stop, strict=True))


def check_input(
    x: Tensor, state: State | None, mask: Tensor | None, dim: int | str = "dim"
) -> None:
    """Refuse what no sequence layer can read.

    Args:
        x: to be ``(B, T, D)`` with T > 0, and D = ``dim`` if that is a number.
        state: to have B rows.
        mask: to be ``(B, T)``.
    """
    if x.ndim != 3 or x.shape[1] == 0 or (isinstance(dim, int) and x.shape[2] != dim):
        raise ValueError(f"x must be (batch, tokens > 0, {dim}), got {tuple(x.shape)}")
    if mask is not None and mask.shape != x.shape[:2]:
        raise ValueError(f"mask {tuple(mask.shape)} does not fit x {tuple(x.shape)}")
    if state is not None and state.batch_size != x.shape[0]:
        raise ValueError(
            f"state has {state.batch_size} rows and x has {x.shape[0]}; select rows with "
            "state.index(...)"
        )


def run_ragged(
    forward: Callable[[Tensor, Any], tuple[Tensor, Any]],
    x: Tensor,
    state: Any,
    mask: Tensor | None,
    init_state: Callable[[int], Any],
) -> tuple[Tensor, Any]:
    """Run ``forward(x, state)``, which knows only rows in step, on rows that may not be.

    Args:
        forward: maps ``(B', T', D)`` and a state whose rows share one position to the same pair.
        x: ``(B, T, D)``.
        state: state of ``B`` rows or None.
        mask: ``(B, T)``, True at real tokens, or None.
        init_state: makes the state of ``n`` fresh rows (needed for rows without a real token).

    Returns:
        Output ``(B, T, D)``, zero at padded positions, and the new state of all rows.
    """
    check_input(x, state, mask)
    batch, length, _ = x.shape
    spans = [(0, length)] * batch if mask is None else padding_spans(mask)
    positions = (0,) * batch if state is None else state.position
    groups: dict[tuple[tuple[int, int], int], list[int]] = {}
    for row in range(batch):
        groups.setdefault((spans[row], positions[row]), []).append(row)
    if len(groups) == 1 and spans[0] == (0, length):
        return forward(x, state)

    y = x.new_zeros(x.shape)
    parts: list[State] = []
    order: list[int] = []
    for ((start, stop), _), rows in groups.items():
        part = init_state(len(rows)) if state is None else state.index(rows)
        if stop > start:
            out, part = forward(x[rows, start:stop], part)
            index = torch.tensor(rows, device=x.device)
            y = y.index_put(
                (index[:, None], torch.arange(start, stop, device=x.device)[None]), out.to(y.dtype)
            )
        parts.append(part)
        order += rows
    merged = type(parts[0]).cat(parts)
    back = sorted(range(batch), key=order.__getitem__)
    return y, merged.index(back)
