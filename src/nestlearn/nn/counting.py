"""Channels that count: a memory with a single key, which is a plain sum (SPEC §1)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

HALF = 4.0
"""A sum of this size is read as a half."""


def count(
    values: Tensor, start: Tensor, frozen: bool = False, noise: float = 0.0
) -> tuple[Tensor, Tensor]:
    """A memory with one key, which is added to and never rewritten, read after every token.

        M_t = M_{t-1} - ∇_M (-<M, v_t>) = M_{t-1} + v_t        o_t = M_t / (4 + |M_t|)  (by element)

    The read-out tells small sums apart, where a count is decided, and is bounded: zero and one
    look the same however large another count has become. With 4 in the place of 1 (`HALF`) the
    first sums of a new layer, which are of that size, are read about as they are: training finds
    increments that cancel, where it otherwise makes them large and leaves a part of them.

    Training on short texts leaves increments that do not quite cancel, and what they leave adds up
    beyond. With ``noise`` every value is off by a normal number of that deviation, so that counts
    have to be told apart with room to spare.

    Args:
        values: v, ``(B, T, C)``; whole numbers in float32 are exact up to 2²⁴.
        start: M before the first of them, ``(B, C)``.
        frozen: read M, and do not write.
        noise: standard deviation of what is added to every value, for training.

    Returns:
        The outputs ``(B, T, C)`` and M after the last token.

    Source: **our choice**; docs/results.md Table 5.

    Example:
        >>> import torch
        >>> v = torch.tensor([1.0, 1.0, 1.0, -1.0]).view(1, 4, 1)
        >>> out, after = count(v, torch.zeros(1, 1))
        >>> [round(o, 2) for o in out.flatten().tolist()], after.item()
        ([0.2, 0.33, 0.43, 0.33], 2.0)
    """
    if noise:
        values = values + noise * torch.randn_like(values)
    before = start.unsqueeze(1)
    sums = before.expand_as(values) if frozen else before + values.cumsum(1)
    return F.softsign(sums / HALF), sums[:, -1]
