"""Titans with memory as context (MAC): segments attend to what the memory recalls of the past."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nestlearn.memory.state import State
from nestlearn.nn.attention import rotate_pairs
from nestlearn.nn.conv import CausalConv
from nestlearn.nn.neural_memory import NeuralMemory, NeuralMemoryState
from nestlearn.nn.recurrent import RecurrentMixer, check_heads, join_heads, split_heads
from nestlearn.nn.titans import PERSISTENT


@dataclasses.dataclass
class TitansContextState(State):
    """State of `TitansContext`.

    Attributes:
        history: last inputs of the convolution.
        recalled, segment: keys and values of the open segment, ``(B, 2, H, C - 1, d)``: of what the
            memory recalled for its tokens, and of the tokens. The first ``position % C`` are valid.
        memory: the neural memory; its weights are those of the segment's start.
        position: tokens read per row.
    """

    history: Tensor
    recalled: Tensor
    segment: Tensor
    memory: NeuralMemoryState
    position: tuple[int, ...]

    def freeze(self, frozen: bool = True) -> TitansContextState:
        """Memory read-only (or writable again); segments always move on."""
        return dataclasses.replace(self, memory=self.memory.freeze(frozen))


class TitansContext(RecurrentMixer):
    """Memory as context (Titans, arXiv 2501.00663, §4.1), for segments S of C tokens:

        h = M_{t-1}(S W_q)        y = Attn([persistent tokens; h; S])
        M_t = the memory after writing y        o = W_o (norm(y) * silu(norm(M_t(y))))

    **Our reading**, so that the layer streams: token i sees the recalled h_j and the tokens s_j of
    its segment for j <= i only, and reads M after the writes of y_j, j <= i (the gradients of a
    segment's writes are taken at its start, Eq. 90). The printed output is ``y * M_t(y)``.

    Args:
        dim: width D; heads: of attention and memory, ``D / heads`` even.
        chunk: tokens per segment C, which is also the memory's chunk.
        persistent: learned tokens that every query sees.
        conv_size: window of the causal convolution in front.
        rope_theta: base of the rotation frequencies (positions count within the segment).
        expansion: hidden width of the memory in units of the head size.

    Shapes: ``forward(x (B, T, D), state=None, mask=None (B, T)) -> (y (B, T, D), state)``.

    Raises:
        ValueError: sizes that do not divide or are below 1.

    Example:
        >>> layer = TitansContext(64, heads=2, chunk=16)
        >>> y, state = layer(torch.randn(1, 40, 64))
        >>> y, state = layer(torch.randn(1, 5, 64), state)
        >>> state.position
        (45,)
    """

    def __init__(
        self,
        dim: int,
        heads: int = 4,
        chunk: int = 64,
        persistent: int = PERSISTENT,
        conv_size: int = 4,
        rope_theta: float = 10_000.0,
        expansion: float = 2.0,
    ):
        super().__init__()
        check_heads(dim, heads)
        if (dim // heads) % 2 or chunk < 1 or persistent < 1:
            raise ValueError(
                "TitansContext needs an even head size, chunk >= 1 and persistent >= 1; got "
                f"{dim // heads}, {chunk} and {persistent}"
            )
        self.dim, self.heads, self.head_dim, self.chunk = dim, heads, dim // heads, chunk
        self.rope_theta = rope_theta
        self.conv = CausalConv(dim, conv_size)
        self.persistent = nn.Parameter(torch.empty(persistent, dim))
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.attention_out = nn.Linear(dim, dim, bias=False)
        self.memory = NeuralMemory(
            dim, heads, "titans", chunk=chunk, conv_size=1, expansion=expansion
        )
        self.attention_norm = nn.RMSNorm(dim, eps=1e-6)
        self.memory_norm = nn.RMSNorm(dim, eps=1e-6)
        self.out_proj = nn.Linear(dim, dim, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Persistent tokens start as random tokens of unit scale."""
        with torch.no_grad():
            self.persistent.normal_()

    def init_state(
        self,
        batch_size: int,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> TitansContextState:
        """The state before the first token: an empty segment and the learned initial memory."""
        device, dtype = device or self.persistent.device, dtype or self.persistent.dtype
        size = (batch_size, 2, self.heads, self.chunk - 1, self.head_dim)
        empty = torch.zeros(size, device=device, dtype=dtype)
        return TitansContextState(
            self.conv.init_history(batch_size, device, dtype),
            empty,
            empty.clone(),
            self.memory.init_state(batch_size, device, dtype),
            (0,) * batch_size,
        )

    def _forward(self, x: Tensor, state: TitansContextState) -> tuple[Tensor, TitansContextState]:
        u, history = self.conv(x, state.history)
        fill = state.position[0] % self.chunk
        recalled, segment = (b[:, :, :, :fill].to(x.dtype) for b in (state.recalled, state.segment))
        memory, outputs = state.memory, []
        first = min(self.chunk - fill, x.shape[1])
        for piece in (u[:, :first], *u[:, first:].split(self.chunk, 1)):
            if not piece.shape[1]:
                continue
            y, recalled, segment = self._attend(piece, memory, recalled, segment)
            told, memory = self.memory(y, memory)
            outputs.append(self.attention_norm(y) * F.silu(self.memory_norm(told)))
            if segment.shape[3] == self.chunk:
                recalled, segment = recalled[:, :, :, :0], segment[:, :, :, :0]
        new = TitansContextState(
            history.to(state.history.dtype),
            self._store(recalled, state.recalled),
            self._store(segment, state.segment),
            memory,
            tuple(p + x.shape[1] for p in state.position),
        )
        return self.out_proj(torch.cat(outputs, 1)), new

    def _attend(
        self, x: Tensor, memory: NeuralMemoryState, recalled: Tensor, segment: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Attention of tokens within one segment; also the segment's keys and values after them."""
        # The memory of the segment's start: what waits to be written is not read.
        start = (memory.position[0] // self.chunk * self.chunk,) * x.shape[0]
        held = dataclasses.replace(memory.memory, position=start, frozen=True)
        h, _ = self.memory(x, dataclasses.replace(memory, memory=held))
        fill, length = segment.shape[3], x.shape[1]
        ticks = torch.arange(fill, fill + length, device=x.device)
        q, k, v = (split_heads(t, self.heads) for t in self.qkv(x).chunk(3, -1))
        key_h, value_h = (split_heads(t, self.heads) for t in self._keys_values(h))
        q, k, key_h = (rotate(t, ticks, self.rope_theta) for t in (q, k, key_h))
        segment = torch.cat([segment, torch.stack([k, v], 1)], 3)
        recalled = torch.cat([recalled, torch.stack([key_h, value_h], 1)], 3)
        tokens = self.persistent.to(x.dtype)[None]
        fixed = torch.stack([split_heads(t, self.heads) for t in self._keys_values(tokens)], 1)
        keys, values = torch.cat(
            [fixed.expand(x.shape[0], -1, -1, -1, -1), recalled, segment], 3
        ).unbind(1)
        causal = torch.arange(fill + length, device=x.device) <= ticks[:, None]
        every = causal.new_ones(length, self.persistent.shape[0])
        allowed = torch.cat([every, causal, causal], 1)
        y = F.scaled_dot_product_attention(q, keys, values, attn_mask=allowed)
        return self.attention_out(join_heads(y)), recalled, segment

    def _keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        key, value = F.linear(x, self.qkv.weight[self.dim :]).chunk(2, -1)
        return key, value

    def _store(self, kept: Tensor, buffer: Tensor) -> Tensor:
        """What is kept at the front of a buffer of fixed size."""
        return F.pad(kept, (0, 0, 0, buffer.shape[3] - kept.shape[3])).to(buffer.dtype)


def rotate(x: Tensor, ticks: Tensor, theta: float) -> Tensor:
    """Rotary positions ``ticks (T,)`` on ``x (B, H, T, d)``."""
    size = x.shape[-1]
    precise = torch.promote_types(x.dtype, torch.float32)
    even = torch.arange(0, size, 2, device=x.device, dtype=precise)
    angle = ticks[:, None].to(precise) * theta ** (-even / size)
    return rotate_pairs(x, (angle.cos().to(x.dtype), angle.sin().to(x.dtype)))
