"""Mamba-2: a selective state space, which is a decayed Hebbian memory (Samba's recurrent half)."""

from __future__ import annotations

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nestlearn.memory.state import MemoryState
from nestlearn.nn.conv import CausalConv
from nestlearn.nn.neural_memory import NeuralMemoryState
from nestlearn.nn.recurrent import RecurrentMixer, check_heads, join_heads, split_heads
from nestlearn.rules.decay import wide
from nestlearn.rules.dispatch import apply_rule

SMALLEST_STEP, LARGEST_STEP = 1e-3, 1e-1  # dt before training
RATES = (1.0, 16.0)  # -A before training


class Mamba2(RecurrentMixer):
    """Mamba-2 (Dao & Gu 2024, arXiv 2405.21060): state-space duality with a scalar decay per head.

        h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T        y_t = h_t C_t + D x_t

    is the Hebbian rule (Eq. 64) with value x, key B, query C, retention ``exp(dt A)`` and step dt,
    all per head but for B and C, which the heads share. ``dt = softplus(W x + b)``, ``A < 0``
    and D are learned; x, B and C pass a causal convolution and SiLU; the output is
    ``W_o norm(y * silu(z))``. The inner width is twice D.

    Args:
        dim: width D of the layer.
        heads: memories per layer; must divide ``dim``.
        state_size: length N of B and C; None: ``dim / heads``.
        chunk: tokens per chunk of the parallel form (speed only).
        conv_size: window of the convolution.

    Shapes: ``forward(x (B, T, D), state=None, mask=None (B, T)) -> (y (B, T, D), state)``. The
    memory, of ``2D/H x N`` per head, starts at zero and is kept in at least float32.

    Raises:
        ValueError: ``dim`` not divisible, or sizes below 1.

    Example:
        >>> layer = Mamba2(64, heads=2)
        >>> y, state = layer(torch.randn(1, 40, 64))
        >>> y, state = layer(torch.randn(1, 5, 64), state)
        >>> state.position
        (45,)
    """

    def __init__(
        self,
        dim: int,
        heads: int = 4,
        state_size: int | None = None,
        chunk: int = 64,
        conv_size: int = 4,
    ):
        super().__init__()
        check_heads(dim, heads)
        state_size = dim // heads if state_size is None else state_size
        if state_size < 1 or chunk < 1:
            raise ValueError(f"state_size and chunk must be >= 1, got {state_size} and {chunk}")
        self.dim, self.heads, self.inner = dim, heads, 2 * dim
        self.state_size, self.chunk = state_size, chunk
        self.conv = CausalConv(self.inner + 2 * state_size, conv_size)
        self.in_proj = nn.Linear(dim, 2 * self.inner + 2 * state_size + heads, bias=False)
        self.step_bias = nn.Parameter(torch.empty(heads))
        self.log_rate = nn.Parameter(torch.empty(heads))
        self.skip = nn.Parameter(torch.empty(heads))
        self.norm = nn.RMSNorm(self.inner, eps=1e-6)
        self.out_proj = nn.Linear(self.inner, dim, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start values that are the layer's own: steps and rates, spread over the heads."""
        low, high = math.log(SMALLEST_STEP), math.log(LARGEST_STEP)
        with torch.no_grad():
            step = torch.empty(self.heads).uniform_(low, high).exp()
            self.step_bias.copy_(step + torch.log(-torch.expm1(-step)))  # inverse of softplus
            self.log_rate.uniform_(*RATES).log_()
            self.skip.fill_(1.0)

    def init_state(
        self,
        batch_size: int,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> NeuralMemoryState:
        """The state before the first token: memory and convolution window are zero."""
        device, dtype = device or self.skip.device, dtype or self.skip.dtype
        size = (batch_size, self.heads, self.inner // self.heads, self.state_size)
        memory = torch.zeros(size, device=device, dtype=wide(dtype))
        history = self.conv.init_history(batch_size, device, dtype)
        return NeuralMemoryState(history, MemoryState((memory,), position=(0,) * batch_size))

    def _forward(self, x: Tensor, state: NeuralMemoryState) -> tuple[Tensor, NeuralMemoryState]:
        shared = self.inner + 2 * self.state_size
        z, u, step = self.in_proj(x).split([self.inner, shared, self.heads], -1)
        u, history = self.conv(u, state.history)
        kind = wide(x.dtype)
        u = F.silu(u).to(kind)
        with torch.autocast(x.device.type, enabled=False):
            value, key, query = u.split([self.inner, self.state_size, self.state_size], -1)
            value = split_heads(value, self.heads)
            dt = F.softplus(step.to(kind) + self.step_bias.to(kind)).transpose(1, 2)
            out, memory = self._remember(query, key, value, dt, state.memory)
            out = join_heads(out + self.skip.to(kind)[:, None, None] * value)
        y = self.out_proj(self.norm(out.to(z.dtype) * F.silu(z)))
        return y, NeuralMemoryState(history.to(state.history.dtype), memory)

    def _remember(
        self, query: Tensor, key: Tensor, value: Tensor, dt: Tensor, state: MemoryState
    ) -> tuple[Tensor, MemoryState]:
        """Write and read: outputs ``(B, H, T, 2D/H)`` and the new state."""
        memory = state.weights[0]
        query, key = (t[:, None].expand(-1, self.heads, -1, -1) for t in (query, key))
        if state.frozen:
            return query @ memory.mT, state
        alpha = torch.exp(-dt * self.log_rate.to(dt.dtype).exp()[:, None])
        out, memory = apply_rule("hebbian", memory, query, key, value, dt, alpha, chunk=self.chunk)
        position = tuple(p + dt.shape[2] for p in state.position)
        return out, dataclasses.replace(state, weights=(memory,), position=position)
