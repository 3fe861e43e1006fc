"""The self-referential weight matrix: one matrix that answers and rewrites itself."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor, nn

from nestlearn.memory.state import MemoryState
from nestlearn.nn.recurrent import RecurrentMixer, check_heads, join_heads, split_heads
from nestlearn.rules.decay import wide

RATES = 4  # of the rows that make y, q, k, and of the rates' own


def srwm_step(W: Tensor, x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """One token: the output ``y`` and the rewritten matrix.

        [y, q, k, beta] = W x
        W <- W + s(beta) (W f(q) - W f(k)) f(k)^T,        f = softmax, s = sigmoid

    Args:
        W: ``(..., 3d + 4, d)``.
        x: ``(..., d)``.
        rows: which of the four rates each row of W learns with, ``(3d + 4,)``.
    """
    d = W.shape[-1]
    made = (W @ x[..., None])[..., 0]
    y, q, k, beta = made.split([d, d, d, RATES], -1)
    q, k = torch.softmax(q, -1), torch.softmax(k, -1)
    change = (W @ (q - k)[..., None])[..., 0] * torch.sigmoid(beta)[..., rows]
    return y, W + change[..., :, None] * k[..., None, :]


class SelfReferentialMatrix(RecurrentMixer):
    """Self-referential weight matrix (Irie et al. 2022, arXiv 2202.05780): the SRWM of Tab. 5.

    Per head, one matrix makes the output, the query, the key and four learning rates, and is then
    rewritten, all of it, by the delta rule: what it answers to the key becomes what it answers to
    the query.

        [y_t, q_t, k_t, beta_t] = W_{t-1} x_t
        W_t = W_{t-1} + s(beta_t) (W_{t-1} f(q_t) - W_{t-1} f(k_t)) f(k_t)^T

    with f = softmax, s = sigmoid and one rate each for the rows of y, q, k and beta. ``W_0`` is
    learned; the layer's output is ``W_o y_t``. The keys depend on what was written, so nothing is
    parallel over tokens. A change of W that would lengthen its rows beyond ``row_limit`` times
    the largest row of ``W_0`` is scaled back (**our choice**: nothing else bounds W over a long
    stream).

    Args:
        dim: width D of the layer.
        heads: matrices per layer; must divide ``dim``.
        row_limit: bound on the norm of the rows of W, in units of the largest of ``W_0``; 0: none.

    Shapes: ``forward(x (B, T, D), state=None, mask=None (B, T)) -> (y (B, T, D), state)``;
    ``state.weights[0]`` is W, ``(B, H, 3d + 4, d)`` with d = D/H, in at least float32.

    Raises:
        ValueError: ``dim`` not divisible, or a negative limit.

    Example:
        >>> layer = SelfReferentialMatrix(64, heads=2)
        >>> y, state = layer(torch.randn(1, 40, 64))
        >>> y, state = layer(torch.randn(1, 5, 64), state)
        >>> state.position
        (45,)
    """

    def __init__(self, dim: int, heads: int = 4, row_limit: float = 4.0):
        super().__init__()
        check_heads(dim, heads)
        if row_limit < 0:
            raise ValueError(f"row_limit must be >= 0, got {row_limit}")
        self.dim, self.heads, self.head_dim = dim, heads, dim // heads
        self.row_limit = row_limit
        self.initial = nn.Parameter(torch.empty(heads, 3 * self.head_dim + RATES, self.head_dim))
        self.out_proj = nn.Linear(dim, dim, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The published start: normal of variance 1/d, the rates' rows around -1."""
        with torch.no_grad():
            self.initial.normal_(0, 1 / math.sqrt(self.head_dim))
            self.initial[:, -RATES:] -= 1.0

    def init_state(
        self,
        batch_size: int,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> MemoryState:
        """The state before the first token, every row at the learned initial matrix."""
        kind = wide(dtype or self.initial.dtype)
        start = self.initial.to(device or self.initial.device, kind)
        weights = (start.expand(batch_size, *start.shape).contiguous(),)
        return MemoryState(weights, position=(0,) * batch_size)

    def _forward(self, x: Tensor, state: MemoryState) -> tuple[Tensor, MemoryState]:
        W = state.weights[0]
        d, heads = self.head_dim, self.heads
        with torch.autocast(x.device.type, enabled=False):
            tokens = split_heads(x.to(W.dtype), heads)
            if state.frozen:
                y = tokens @ W[:, :, :d].mT
            else:
                y, W = self._rewrite(W, tokens)
        y = self.out_proj(join_heads(y).to(x.dtype))
        if state.frozen:
            return y, state
        position = tuple(p + x.shape[1] for p in state.position)
        return y, dataclasses.replace(state, weights=(W,), position=position)

    def _rewrite(self, W: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Token by token, all rows and heads at once; ``tokens (B, H, T, d)``."""
        sizes = [self.head_dim] * 3 + [RATES]
        count = torch.tensor(sizes, device=W.device)
        rows = torch.arange(RATES, device=W.device).repeat_interleave(count, output_size=sum(sizes))
        bound = None
        if self.row_limit:
            norm = torch.linalg.vector_norm(self.initial.detach().to(W.dtype), dim=-1)
            bound = self.row_limit * norm.amax(-1, keepdim=True)[..., None]
        outputs = []
        for x in tokens.unbind(2):
            y, W = srwm_step(W, x, rows)
            if bound is not None:
                norm = torch.linalg.vector_norm(W.detach(), dim=-1, keepdim=True)
                W = W * (bound / torch.maximum(norm, bound))
            outputs.append(y)
        return torch.stack(outputs, 2), W
