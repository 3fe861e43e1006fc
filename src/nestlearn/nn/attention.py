"""Causal softmax attention: the mixer of Hope-Attention and of the Transformer baseline.

In the paper's terms (SPEC §1, Eq. 62-63) softmax attention is the non-parametric solution of an l2
regression over the context, so its memory is the context itself: the state grows with every token
(or up to the window), where a parametric memory keeps its size.
"""

from __future__ import annotations

import dataclasses
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nestlearn.memory.state import State
from nestlearn.nn.ragged import check_input, padding_spans


@dataclasses.dataclass
class AttentionState(State):
    """Keys and values of the tokens read so far.

    Slots are aligned to the right: row b's tokens are in its last ``min(position[b], S)`` slots,
    the slots before them are empty. Rows of different length can so share one tensor.

    Attributes:
        keys: rotated keys ``(B, H, S, d)``.
        values: values ``(B, H, S, d)``.
        position: tokens read per row (may exceed S when a window drops old tokens).
    """

    keys: Tensor
    values: Tensor
    position: tuple[int, ...]

    @property
    def slots(self) -> int:
        """Token slots S of every row."""
        return self.keys.shape[2]

    @property
    def full(self) -> bool:
        """Whether no row has an empty slot."""
        return min(self.position) >= self.slots

    @property
    def valid(self) -> Tensor:
        """``(B, S)``, True where a slot holds a token."""
        filled = torch.tensor(self.position, device=self.keys.device)[:, None]
        return torch.arange(self.slots, 0, -1, device=self.keys.device) <= filled

    def trim(self, limit: int | None = None) -> AttentionState:
        """Drop slots that are empty in every row, and all but the newest ``limit``."""
        keep = min(self.slots, max(self.position))
        keep = keep if limit is None else min(keep, limit)
        if keep == self.slots:
            return self
        start = self.slots - keep
        return AttentionState(self.keys[:, :, start:], self.values[:, :, start:], self.position)

    def index(self, rows: Tensor | list[int]) -> AttentionState:  # type: ignore[override]
        """Select (or repeat, or reorder) batch rows."""
        return super().index(rows).trim()

    @classmethod
    def cat(cls, states):
        """Join states along the batch axis; shorter ones get empty slots on the left."""
        slots = max(s.slots for s in states)
        return super().cat([s._widen(slots) for s in states])

    def _widen(self, slots: int) -> AttentionState:
        pad = (0, 0, slots - self.slots, 0)
        return AttentionState(F.pad(self.keys, pad), F.pad(self.values, pad), self.position)

    def unflatten(self, flat: dict[str, Tensor], prefix: str = "") -> AttentionState:
        """See ``State.unflatten``; the number of slots comes from the stored tensors."""
        stored = flat.get(f"{prefix}keys")
        if stored is None:
            return super().unflatten(flat, prefix)
        shape = (*self.keys.shape[:2], stored.shape[2], self.keys.shape[3])
        empty = AttentionState(
            self.keys.new_empty(shape), self.values.new_empty(shape), self.position
        )
        return State.unflatten(empty, flat, prefix)


class CausalSelfAttention(nn.Module):
    """Multi-head causal softmax attention with rotary positions, as a mixer with explicit state.

    ``y_t = W_o [softmax(q_t . K_{<=t} / sqrt(d)) V_{<=t}]`` per head, with q and k rotated by their
    row's own token count (RoPE), so that left padding changes nothing.

    Args:
        dim: model width D, a multiple of ``heads``.
        heads: attention heads H; D / H must be even for the rotation.
        rope_theta: base of the rotation frequencies.
        max_position_embeddings: positions the model is meant for; reading further without a window
            gives a warning (once), as rotations were never seen in training.
        window: attend to this many latest tokens only (Eq. 63), with state of that size; None: all.
        persistent: learned tokens without a position that every query sees besides (Titans).

    Shapes: ``forward(x (B, T, D), state, mask (B, T)) -> (y (B, T, D), AttentionState)``;
    ``mask`` is True at real tokens, padding only left or right of them; padded outputs are zero.

    Raises:
        ValueError: sizes that do not divide, masks with holes, a state of another batch size.

    Example:
        >>> layer = CausalSelfAttention(dim=32, heads=4)
        >>> y, state = layer(torch.randn(2, 10, 32))
        >>> y, state = layer(torch.randn(2, 1, 32), state)
        >>> state.position
        (11, 11)
    """

    def __init__(
        self,
        dim: int,
        heads: int = 4,
        rope_theta: float = 10_000.0,
        max_position_embeddings: int | None = None,
        window: int | None = None,
        persistent: int = 0,
    ):
        super().__init__()
        if heads < 1 or dim % heads or (dim // heads) % 2:
            raise ValueError(f"dim {dim} must be heads {heads} times an even head size")
        if window is not None and window < 1:
            raise ValueError(f"window must be at least 1 token or None, got {window}")
        if persistent < 0:
            raise ValueError(f"persistent must be >= 0, got {persistent}")
        if rope_theta <= 0:
            raise ValueError(f"rope_theta must be positive, got {rope_theta}")
        self.dim, self.heads, self.head_dim = dim, heads, dim // heads
        self.rope_theta, self.window = rope_theta, window
        self.max_position_embeddings = max_position_embeddings
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)
        self.persistent = nn.Parameter(torch.randn(persistent, dim)) if persistent else None
        self._warned = False

    def init_state(
        self,
        batch_size: int,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> AttentionState:
        """The state before the first token: no slots."""
        empty = torch.empty(
            batch_size,
            self.heads,
            0,
            self.head_dim,
            device=device or self.qkv.weight.device,
            dtype=dtype or self.qkv.weight.dtype,
        )
        return AttentionState(empty, empty, (0,) * batch_size)

    def forward(
        self, x: Tensor, state: AttentionState | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, AttentionState]:
        """Attend to the tokens of ``state`` and the earlier ones of ``x``."""
        check_input(x, state, mask, self.dim)
        batch, length, _ = x.shape
        read = (length,) * batch
        if mask is not None:
            read = tuple(stop - start for start, stop in padding_spans(mask))
            mask = None if min(read) == length else mask.bool()
        start = (0,) * batch if state is None else state.position
        position = tuple(p + n for p, n in zip(start, read, strict=True))
        self._check_range(position)

        new = self.qkv(x).view(batch, length, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)
        ticks = self._token_positions(start, length, mask, x.device)
        rotation = self._rotation(ticks, x.dtype)
        q, k, v = rotate_pairs(new[0], rotation), rotate_pairs(new[1], rotation), new[2]
        if state is not None and state.slots:
            k = torch.cat([state.keys.to(k.dtype), k], 2)
            v = torch.cat([state.values.to(v.dtype), v], 2)
        allowed = self._allowed(state, length, mask, x.device)
        y = self._attend(q, k, v, allowed)
        y = self.out(y.transpose(1, 2).reshape(batch, length, self.dim))
        if mask is not None:
            y = y * mask[..., None].to(y.dtype)
            k, v = self._align(k, v, state, mask)
        limit = None if self.window is None else self.window - 1
        return y, AttentionState(k, v, position).trim(limit)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None) -> Tensor:
        if self.persistent is None:
            causal = allowed is None and q.shape[2] > 1
            return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, is_causal=causal)
        count = self.persistent.shape[0]
        fixed = F.linear(self.persistent.to(q.dtype), self.qkv.weight[self.dim :])
        fixed = fixed.view(1, count, 2, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)
        k, v = (
            torch.cat([t.expand(q.shape[0], -1, -1, -1), new], 2)
            for t, new in zip(fixed, (k, v), strict=True)
        )
        if allowed is None and q.shape[2] > 1:
            allowed = q.new_ones(q.shape[2], q.shape[2], dtype=torch.bool).tril()[None, None]
        if allowed is not None:
            allowed = F.pad(allowed, (count, 0), value=True)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)

    def _check_range(self, position: tuple[int, ...]) -> None:
        limit = self.max_position_embeddings
        if limit is None or self.window is not None or self._warned or max(position) <= limit:
            return
        self._warned = True
        warnings.warn(
            f"attention reads position {max(position)}, beyond max_position_embeddings={limit}; "
            "expect worse predictions, or set a sliding window",
            stacklevel=3,
        )

    def _token_positions(
        self, start: tuple[int, ...], length: int, mask: Tensor | None, device: torch.device
    ) -> Tensor:
        """Position of every token of ``x`` in its row's own count: ``(B or 1, T)``."""
        shared = len(set(start)) == 1
        base = torch.tensor(start[:1] if shared else start, device=device)[:, None]
        if mask is None:
            return base + torch.arange(length, device=device)
        return base + (mask.cumsum(1) - 1).clamp(min=0)

    def _rotation(self, ticks: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines ``(B or 1, 1, T, d/2)``, computed in at least fp32."""
        precise = torch.float64 if dtype == torch.float64 else torch.float32
        even = torch.arange(0, self.head_dim, 2, device=ticks.device, dtype=precise)
        angle = ticks[:, None, :, None].to(precise) * self.rope_theta ** (-even / self.head_dim)
        return angle.cos().to(dtype), angle.sin().to(dtype)

    def _allowed(
        self, state: AttentionState | None, length: int, mask: Tensor | None, device: torch.device
    ) -> Tensor | None:
        """Which slots each new token may see, ``(B or 1, 1, T, S + T)``; None: the fast paths."""
        slots = 0 if state is None else state.slots
        padded = mask is not None or (state is not None and not state.full)
        windowed = self.window is not None and slots + length > self.window
        if not padded and not windowed and (slots == 0 or length == 1):
            return None
        query = torch.arange(slots, slots + length, device=device)[:, None]
        slot = torch.arange(slots + length, device=device)
        causal = slot <= query
        if not padded:
            if self.window is not None:
                causal = causal & (slot > query - self.window)
            return causal[None, None]
        real = torch.ones(1, length, dtype=torch.bool, device=device) if mask is None else mask
        if state is not None and slots:
            real = torch.cat([state.valid, real.expand(len(state.position), -1)], 1)
        allowed = causal & real[:, None]
        if self.window is not None:
            # Padding between old and new tokens does not count: measure the window in real tokens.
            count = real.cumsum(1)
            allowed = allowed & (count[:, None] > count[:, slots:, None] - self.window)
        # Padded queries see themselves: a row without any key would be NaN.
        return (allowed | (slot == query))[:, None]

    def _align(
        self, k: Tensor, v: Tensor, state: AttentionState | None, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Move the real tokens of each row to the right end, keeping their order."""
        real = mask if state is None or not state.slots else torch.cat([state.valid, mask], 1)
        order = real.int().argsort(dim=1, stable=True)
        filled = real.gather(1, order)[:, None, :, None]
        index = order[:, None, :, None].expand_as(k)
        empty = k.new_zeros(())
        return (
            torch.where(filled, k.gather(2, index), empty),
            torch.where(filled, v.gather(2, index), empty),
        )


def rotate_pairs(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the pairs (x_i, x_{i + d/2}) by their angles."""
    cos, sin = rotation
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)
