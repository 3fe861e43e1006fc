"""What mixers with a state of fixed size share: calls, padding, start states."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nestlearn.nn.ragged import check_input, run_ragged


class RecurrentMixer(nn.Module):
    """A sequence layer whose rows run in step: subclasses say how un-padded rows are read.

    A subclass has ``self.dim`` and defines ``init_state(batch_size, device, dtype)`` and
    ``_forward(x (B, T, D), state) -> (y, state)``, which may assume that all rows have read the
    same number of tokens.
    """

    dim: int

    def init_state(
        self,
        batch_size: int,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> Any:
        """The state before the first token."""
        raise NotImplementedError

    def _forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        raise NotImplementedError

    def forward(
        self, x: Tensor, state: Any = None, mask: Tensor | None = None
    ) -> tuple[Tensor, Any]:
        """Read ``x (B, T, D)``, continuing from ``state``; ``mask`` is True at real tokens."""
        check_input(x, state, mask, self.dim)

        def fresh(rows: int) -> Any:
            return self.init_state(rows, x.device, x.dtype)

        def run(part: Tensor, held: Any) -> tuple[Tensor, Any]:
            return self._forward(part, fresh(part.shape[0]) if held is None else held)

        return run_ragged(run, x, state, mask, fresh)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """``(B, T, H d) -> (B, H, T, d)``."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2).contiguous()


def join_heads(x: Tensor) -> Tensor:
    """``(B, H, T, d) -> (B, T, H d)``."""
    return x.transpose(1, 2).flatten(2)


def check_heads(dim: int, heads: int) -> None:
    """Refuse a width that does not divide into heads."""
    if heads < 1 or dim % heads:
        raise ValueError(f"dim must be a multiple of heads, got dim={dim} and heads={heads}")
