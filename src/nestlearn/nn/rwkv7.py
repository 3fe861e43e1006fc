"""RWKV-7's time mixing: the generalised delta rule with a decay and a rate per channel."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nestlearn.memory.state import MemoryState
from nestlearn.nn.neural_memory import NeuralMemoryState
from nestlearn.nn.pointwise import unit
from nestlearn.nn.recurrent import RecurrentMixer, check_heads, join_heads, split_heads
from nestlearn.rules.decay import wide
from nestlearn.rules.diagonal import LARGEST_CHUNK, LOWEST_LOG, diagonal_sequence

# How much of the previous token every projection sees: 1 - (channel / D)^power before training.
SHIFTS = {"r": 0.2, "w": 0.9, "k": 0.7, "v": 0.7, "a": 0.9, "g": 0.2}
RANK = 32


class LowRank(nn.Module):
    """``bias + B f(A x)``: a data-dependent vector from few parameters."""

    def __init__(self, dim: int, rank: int, bias: bool = True):
        super().__init__()
        self.down = nn.Linear(dim, rank, bias=False)
        self.up = nn.Linear(rank, dim, bias=bias)

    def forward(self, x: Tensor, squash=None) -> Tensor:
        """The vector at every token of ``x (B, T, D)``."""
        hidden = self.down(x)
        return self.up(hidden if squash is None else squash(hidden))


class RWKV7(RecurrentMixer):
    """RWKV-7's time-mixing layer (Peng et al. 2025, "Goose", arXiv 2503.14456).

    Per head, with ``x_t' = x_t + mu (x_{t-1} - x_t)`` for each projection (token shift):

        M_t = M_{t-1} (diag(w_t) - kh_t (a_t kh_t)^T) + v_t k_t^T        y_t = M_t r_t

    - decay per channel ``w = exp(-e^{-1/2} sigmoid(w_0 + B tanh(A x)))`` in (0.545, 1);
    - in-context learning rate per channel ``a = sigmoid(a_0 + B A x)``;
    - removal key ``kh = unit(xi * kappa)`` with ``kappa = W_k x``, replacement key
      ``k = kappa * (1 + zeta (a - 1))``;
    - output ``W_o (g * (norm(y) + (r . (rho k)) v))`` with gate ``g = B sigmoid(A x)``.

    **Left out**: the residual of values from the model's first layer (v-first), which would join
    layers outside the residual stream. The channel mixing of RWKV is the block's continuum memory.

    Args:
        dim: width D of the layer.
        heads: memories per layer; must divide ``dim``.
        chunk: tokens per chunk of the parallel form (speed only).

    Shapes: ``forward(x (B, T, D), state=None, mask=None (B, T)) -> (y (B, T, D), state)``. The
    memory, of ``D/H x D/H`` per head, starts at zero and is kept in at least float32.

    Raises:
        ValueError: ``dim`` not divisible, or a chunk out of range.

    Example:
        >>> layer = RWKV7(64, heads=2)
        >>> y, state = layer(torch.randn(1, 40, 64))
        >>> y, state = layer(torch.randn(1, 5, 64), state)
        >>> state.position
        (45,)
    """

    def __init__(self, dim: int, heads: int = 4, chunk: int = 32):
        super().__init__()
        check_heads(dim, heads)
        if chunk < 1:
            raise ValueError(f"chunk must be at least 1, got {chunk}")
        self.dim, self.heads, self.head_dim = dim, heads, dim // heads
        self.chunk = min(chunk, LARGEST_CHUNK)
        rank = min(RANK, dim)
        self.shift = nn.Parameter(torch.empty(len(SHIFTS), dim))
        self.receptance = nn.Linear(dim, dim, bias=False)
        self.key = nn.Linear(dim, dim, bias=False)
        self.value = nn.Linear(dim, dim, bias=False)
        self.decay = LowRank(dim, rank)
        self.rate = LowRank(dim, rank)
        self.gate = LowRank(dim, rank, bias=False)
        self.removal = nn.Parameter(torch.empty(dim))
        self.replacement = nn.Parameter(torch.empty(dim))
        self.bonus = nn.Parameter(torch.empty(heads, 1, self.head_dim))
        self.gain = nn.Parameter(torch.empty(heads, 1, self.head_dim))
        self.out_proj = nn.Linear(dim, dim, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start values that are the layer's own: shifts, decays from slow to fast in every head."""
        channel = torch.arange(self.dim) / self.dim
        with torch.no_grad():
            for row, power in zip(self.shift, SHIFTS.values(), strict=True):
                row.copy_(1 - channel**power)
            for part in (self.decay, self.rate):
                part.up.weight.mul_(0.1)
            self.decay.up.bias.copy_(torch.linspace(-6, 0, self.head_dim).repeat(self.heads))
            self.rate.up.bias.zero_()
            self.removal.fill_(0.7)
            self.replacement.fill_(1.0)
            self.bonus.zero_()
            self.gain.fill_(1.0)

    def init_state(
        self,
        batch_size: int,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> NeuralMemoryState:
        """The state before the first token: memory and shifted token are zero."""
        device, dtype = device or self.gain.device, dtype or self.gain.dtype
        size = (batch_size, self.heads, self.head_dim, self.head_dim)
        memory = torch.zeros(size, device=device, dtype=wide(dtype))
        history = torch.zeros(batch_size, 1, self.dim, device=device, dtype=dtype)
        return NeuralMemoryState(history, MemoryState((memory,), position=(0,) * batch_size))

    def _forward(self, x: Tensor, state: NeuralMemoryState) -> tuple[Tensor, NeuralMemoryState]:
        past = torch.cat([state.history.to(x.dtype), x], 1)
        change = past[:, :-1] - x
        shifted = dict(zip(SHIFTS, (x + mu * change for mu in self.shift.to(x.dtype)), strict=True))
        kind = wide(x.dtype)
        w = LOWEST_LOG * torch.sigmoid(self.decay(shifted["w"], torch.tanh).to(kind))
        a = torch.sigmoid(self.rate(shifted["a"]).to(kind))
        gate = self.gate(shifted["g"], torch.sigmoid)
        r, k, v = (
            part(shifted[name]).to(kind)
            for name, part in (("r", self.receptance), ("k", self.key), ("v", self.value))
        )
        with torch.autocast(x.device.type, enabled=False):
            removed = split_heads(self.removal.to(kind) * k, self.heads)
            k = k * (1 + self.replacement.to(kind) * (a - 1))
            r, k, v, w, a = (split_heads(t, self.heads) for t in (r, k, v, w, a))
            out, memory = self._remember(r, k, v, w, a, unit(removed), state.memory)
            out = self.gain * F.layer_norm(out, (self.head_dim,), eps=1e-5 * self.head_dim)
            out = out + (r * self.bonus * k).sum(-1, keepdim=True) * v
        y = self.out_proj(join_heads(out).to(gate.dtype) * gate)
        return y, NeuralMemoryState(past[:, -1:].to(state.history.dtype), memory)

    def _remember(
        self,
        r: Tensor,
        k: Tensor,
        v: Tensor,
        log_w: Tensor,
        a: Tensor,
        removed: Tensor,
        state: MemoryState,
    ) -> tuple[Tensor, MemoryState]:
        """Write and read the memory: outputs ``(B, H, T, d)`` and the new state."""
        memory = state.weights[0]
        if state.frozen:
            return r @ memory.mT, state
        out, memory = diagonal_sequence(
            memory, r, k, v, log_w, -removed, removed * a, chunk=self.chunk
        )
        position = tuple(p + r.shape[2] for p in state.position)
        return out, dataclasses.replace(state, weights=(memory,), position=position)
