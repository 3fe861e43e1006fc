"""Titans' three wirings of a neural memory and attention (Behrouz et al. 2025, arXiv 2501.00663).

The memory alone (LMM) is the preset "titans" of `NeuralMemory`. Here it works beside attention:
as context (MAC), as gate (MAG), as layer (MAL). Persistent tokens, learned and independent of the
input, are seen by every query of the attention.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nestlearn.memory.state import State
from nestlearn.nn.attention import AttentionState, CausalSelfAttention
from nestlearn.nn.neural_memory import NeuralMemory, NeuralMemoryState
from nestlearn.nn.ragged import check_input

PERSISTENT = 4


@dataclasses.dataclass
class TitansState(State):
    """State of `TitansGate` and `TitansLayer`.

    Attributes:
        attention: keys and values within the window.
        memory: the neural memory.
    """

    attention: AttentionState
    memory: NeuralMemoryState

    @property
    def position(self) -> tuple[int, ...]:
        """Tokens read per row."""
        return self.attention.position

    def freeze(self, frozen: bool = True) -> TitansState:
        """Memory read-only (or writable again); attention always reads on."""
        return dataclasses.replace(self, memory=self.memory.freeze(frozen))


class _Wired(nn.Module):
    """A neural memory and sliding-window attention; subclasses connect them."""

    def __init__(
        self,
        dim: int,
        heads: int = 4,
        window: int = 64,
        persistent: int = PERSISTENT,
        chunk: int = 64,
        conv_size: int = 4,
        rope_theta: float = 10_000.0,
        expansion: float = 2.0,
    ):
        super().__init__()
        self.dim = dim
        self.attention = CausalSelfAttention(
            dim, heads, rope_theta, window=window, persistent=persistent
        )
        self.memory = NeuralMemory(
            dim, heads, "titans", chunk=chunk, conv_size=conv_size, expansion=expansion
        )
        self.memory_norm = nn.RMSNorm(dim, eps=1e-6)

    @property
    def checkpoint_chunks(self) -> int:
        """Chunks of the memory that the backward pass recomputes together; 0: none."""
        return self.memory.checkpoint_chunks

    @checkpoint_chunks.setter
    def checkpoint_chunks(self, chunks: int) -> None:
        self.memory.checkpoint_chunks = chunks

    def init_state(
        self,
        batch_size: int,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> TitansState:
        """The state before the first token."""
        return TitansState(
            self.attention.init_state(batch_size, device, dtype),
            self.memory.init_state(batch_size, device, dtype),
        )

    def forward(
        self, x: Tensor, state: TitansState | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, TitansState]:
        """Read ``x (B, T, D)``, continuing from ``state``; ``mask`` is True at real tokens."""
        check_input(x, state, mask, self.dim)
        if state is None:
            state = self.init_state(x.shape[0], x.device, x.dtype)
        return self._connect(x, state, mask)

    def _connect(
        self, x: Tensor, state: TitansState, mask: Tensor | None
    ) -> tuple[Tensor, TitansState]:
        raise NotImplementedError


class TitansGate(_Wired):
    """Memory as gate (MAG): ``o = W_o (norm(Attn(x)) * silu(norm(M(x))))``.

    Attention sees the persistent tokens and the latest ``window`` tokens, the memory everything.
    The printed gate is ``Attn(x) * M(x)``, both normalised, then a non-linearity that is not named.

    Args:
        dim: width D; heads: of attention and memory.
        window: tokens that attention sees; persistent: learned tokens it sees besides.
        chunk: tokens per write of the memory; conv_size: window of the memory's convolution.
        rope_theta: base of the rotation frequencies.
        expansion: hidden width of the memory in units of the head size.

    Shapes: ``forward(x (B, T, D), state=None, mask=None (B, T)) -> (y (B, T, D), state)``.

    Raises:
        ValueError: sizes that do not divide or are below 1.

    Example:
        >>> layer = TitansGate(64, heads=2, window=8)
        >>> y, state = layer(torch.randn(1, 40, 64))
        >>> state.position
        (40,)
    """

    def __init__(self, dim: int, heads: int = 4, **settings):
        super().__init__(dim, heads, **settings)
        self.attention_norm = nn.RMSNorm(dim, eps=1e-6)
        self.out_proj = nn.Linear(dim, dim, bias=False)

    def _connect(
        self, x: Tensor, state: TitansState, mask: Tensor | None
    ) -> tuple[Tensor, TitansState]:
        seen, attention = self.attention(x, state.attention, mask)
        told, memory = self.memory(x, state.memory, mask)
        y = self.attention_norm(seen) * F.silu(self.memory_norm(told))
        return self.out_proj(y), TitansState(attention, memory)


class TitansLayer(_Wired):
    """Memory as layer (MAL): ``o = Attn(norm(M(x)))``, sliding-window attention on what the memory
    answers. Arguments, shapes and errors as in `TitansGate`.

    Example:
        >>> layer = TitansLayer(64, heads=2, window=8)
        >>> y, state = layer(torch.randn(1, 40, 64))
        >>> state.position
        (40,)
    """

    def _connect(
        self, x: Tensor, state: TitansState, mask: Tensor | None
    ) -> tuple[Tensor, TitansState]:
        told, memory = self.memory(x, state.memory, mask)
        y, attention = self.attention(self.memory_norm(told), state.attention, mask)
        return y, TitansState(attention, memory)
