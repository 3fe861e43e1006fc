"""A cost on writing, so that a memory learns to write little (our choice; off by default).

Trained on short texts a memory can afford to write at every token: little of what it holds is lost
before it is asked for. On texts a hundred times as long those writes wear away what must stay. So
the training loss gets, over all layers, heads and tokens,

    c Σ_t η_t / (η_t + η₀) · λ_t / (λ_t + T),        λ_t = 1 / (1 - α_t)

with T the tokens of the text: the number of writes, in which one that is much smaller than η₀
counts in proportion to its size and one that is much larger counts as one. So small writes go, and
those that replace what was there before stay as large as they need to be (a cost in proportion to
η makes them small, too, and so does an η₀ that is not far below them). A write counts by the share
of a text for which it stays, as the head's α at that token has it: a memory for the last few tokens
is nearly free.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator

from torch import Tensor

HALF = 0.01
"""η₀: a write of this size counts one half."""
FREE, PEAK, LEFT = 0.35, 0.675, 0.1
"""Shares of the training at which the cost begins and is highest; what is left of it at the end."""


class _Records(threading.local):
    """The lists of this thread that are being filled."""

    def __init__(self) -> None:
        self.open: list[list[tuple[Tensor, Tensor]]] = []


_records = _Records()


@contextlib.contextmanager
def record_writes() -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Collect η and α ``(B, H, T)`` of every self-modifying layer that is called inside.

    Example:
        >>> import torch
        >>> from nestlearn.nn import SelfModifyingTitans
        >>> layer = SelfModifyingTitans(16, heads=2)
        >>> with record_writes() as written:
        ...     y, state = layer(torch.randn(1, 5, 16))
        >>> [eta.shape for eta, alpha in written]
        [torch.Size([1, 2, 5])]
    """
    found: list[tuple[Tensor, Tensor]] = []
    _records.open.append(found)
    try:
        yield found
    finally:
        _records.open.pop()


def record(eta: Tensor, alpha: Tensor) -> None:
    """Called by layers: hand η and α ``(B, H, T)`` to whoever collects them."""
    for found in _records.open:
        found.append((eta, alpha))


def count_writes(written: Iterable[tuple[Tensor, Tensor]]) -> Tensor | float:
    """The sum above without c, over all rows: how many lasting writes there were.

    The gradient goes to η alone: forgetting is not to be learned for the sake of this cost.
    """
    total: Tensor | float = 0.0
    for eta, alpha in written:
        forgotten = 1 - alpha.detach()
        total = total + (eta / (eta + HALF) / (1 + eta.shape[-1] * forgotten)).sum()
    return total


def cost_at(progress: float) -> float:
    """The share of the highest c after a share of the training (our choice, tried on BABILong).

    From the start a cost keeps a memory from learning to write at all, so it begins at 35% of the
    training. It closes gates, and makes the writes that are left small, so that a later one hardly
    displaces an earlier one. From 67.5% on it falls, to a tenth at the end: those writes grow back,
    most gates that no answer needs stay closed. What it brings and costs: docs/results.md, Fig. 9.

    Example:
        >>> [round(cost_at(p), 2) for p in (0.0, 0.35, 0.5, 0.675, 0.9, 1.0)]
        [0.0, 0.0, 0.46, 1.0, 0.38, 0.1]
    """
    if progress < PEAK:
        return max(0.0, (progress - FREE) / (PEAK - FREE))
    return 1 - (1 - LEFT) * (min(1.0, progress) - PEAK) / (1 - PEAK)
