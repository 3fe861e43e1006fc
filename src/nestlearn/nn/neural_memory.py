"""A sequence layer around one associative memory: Titans, TTT, DeltaNet, RetNet … (SPEC §2)."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nestlearn.memory.objectives import get_objective
from nestlearn.memory.state import MemoryState, State
from nestlearn.memory.structures import weight_shapes
from nestlearn.nn.conv import CausalConv
from nestlearn.nn.memory_cell import GradientCell, Tensors, feature_map, feature_size
from nestlearn.nn.pointwise import unit
from nestlearn.nn.presets import MemorySpec, get_spec
from nestlearn.nn.ragged import run_ragged
from nestlearn.nn.scan import scan
from nestlearn.rules.decay import wide
from nestlearn.rules.dispatch import apply_rule

SHORTEST_HORIZON, LONGEST_HORIZON = 64.0, 1024.0
FEEDBACK, CORRECTION = 1.0, 0.02  # Comba: logit of b, and d, before training


@dataclasses.dataclass
class NeuralMemoryState(State):
    """State of one `NeuralMemory` layer.

    Attributes:
        history: last inputs of the convolution, ``(B, W-1, D)``.
        memory: the memory's weights, recurrent extras and pending tokens.
    """

    history: Tensor
    memory: MemoryState

    @property
    def position(self) -> tuple[int, ...]:
        """Tokens read per row."""
        return self.memory.position

    def freeze(self, frozen: bool = True) -> NeuralMemoryState:
        """Memory read-only (or writable again); the convolution's window always moves."""
        return dataclasses.replace(self, memory=self.memory.freeze(frozen))


class NeuralMemory(nn.Module):
    """A layer whose hidden state is an associative memory, learning while it reads.

    Causal convolution, projections to q, k, v and gates, per head a memory that is written with
    (k_t, v_t) and answers q_t, normalised read-out, output gate, projection. The preset says what
    the memory is: a point of `nestlearn.nn.presets.MemorySpec` (SPEC §2, Eq. 64-68, 57, 88-91):

        M_t = Ret(M_{t-1}; alpha_t) - eta_t grad L(M; k_t, v_t)      o_t = M_t(q_t)

    Queries and keys have unit norm. The initial memory is learned with the other weights; the outer
    gradient reaches it, and all gates, through the writes.

    Args:
        dim: width D of the layer.
        heads: memories per layer; must divide ``dim``.
        preset: "linear_attention", "retnet", "deltanet", "gated_deltanet", "comba", "ttt_linear",
            "ttt_mlp", "titans", "dla", "atlas", "moneta", "yaad", "memora", or a `MemorySpec`.
        checkpoint_chunks: > 0: recompute activations in the backward pass, in groups of so many
            chunks (memories written by gradients only).
        **overrides: fields of `MemorySpec` to change, e.g. ``chunk=16``.

    Shapes: ``forward(x (B, T, D), state=None, mask=None (B, T)) -> (y (B, T, D), state)``. The
    memory and its gates are computed in float32 (float64 for float64 input).

    Raises:
        ValueError: unknown preset or field, contradicting fields, or ``dim`` not divisible.

    Example:
        >>> layer = NeuralMemory(64, heads=2, preset="titans", chunk=16)
        >>> y, state = layer(torch.randn(1, 40, 64))
        >>> y, state = layer(torch.randn(1, 5, 64), state)
        >>> state.position
        (45,)
    """

    def __init__(
        self,
        dim: int,
        heads: int = 4,
        preset: str | MemorySpec = "titans",
        *,
        checkpoint_chunks: int = 0,
        **overrides: Any,
    ):
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"dim must be a multiple of heads, got dim={dim} and heads={heads}")
        self.spec = spec = get_spec(preset, **overrides)
        self.dim, self.heads, self.head_dim = dim, heads, dim // heads
        self.checkpoint_chunks = checkpoint_chunks
        self.key_dim = feature_size(spec.feature, self.head_dim)
        self.objective = get_objective(spec.objective, p=spec.p, delta=spec.threshold)
        self.conv = CausalConv(dim, spec.conv_size)
        self.in_proj = nn.Linear(dim, 4 * dim + len(spec.gates) * heads, bias=False)
        self.gate_bias = nn.Parameter(torch.empty(len(spec.gates), heads)) if spec.gates else None
        self.feature_coefficients = (
            nn.Parameter(torch.empty(2, heads, 1, self.head_dim))
            if spec.feature == "polynomial"
            else None
        )
        self.feedback = nn.Parameter(torch.empty(heads)) if spec.closed_loop else None
        self.correction = nn.Parameter(torch.empty(heads)) if spec.closed_loop else None
        width = max(1, round(spec.expansion * self.head_dim))
        shapes = weight_shapes(self.key_dim, self.head_dim, spec.depth, width)
        self.initial = nn.ParameterList([nn.Parameter(torch.empty(heads, *s)) for s in shapes])
        self.gain = nn.Parameter(torch.ones(heads, 1, self.head_dim))
        self.out_proj = nn.Linear(dim, dim, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start values that are the layer's own: gates, initial memory, feature map, gain."""
        spec = self.spec
        start = {
            "eta": torch.full((self.heads,), _logit(spec.eta_start / spec.eta_max)),
            # 1 - alpha = 1 / horizon: retention starts near 1, heads forget at different rates.
            "alpha": torch.logspace(
                math.log10(SHORTEST_HORIZON), math.log10(LONGEST_HORIZON), self.heads
            ).log(),
            "beta": torch.zeros(self.heads),
            "omega": torch.full((self.heads,), _logit(1 / max(2, spec.window))),
        }
        last = len(self.initial) - 1
        with torch.no_grad():
            if self.gate_bias is not None:
                self.gate_bias.copy_(torch.stack([start[name] for name in spec.gates]))
            self.gain.fill_(1.0)
            if self.feedback is not None and self.correction is not None:
                self.feedback.fill_(FEEDBACK)
                self.correction.fill_(CORRECTION)
            if self.feature_coefficients is not None:
                self.feature_coefficients[0].fill_(1.0)
                self.feature_coefficients[1].fill_(0.5)
            for layer, w in enumerate(self.initial):
                fan_in = w.shape[-1]
                if spec.retention == "kl":
                    w.normal_(0, 1.0)  # logits of a row on the simplex
                elif last == 0:
                    w.zero_()
                elif layer == 0:
                    w.normal_(0, 1.0)  # keys have norm 1: entries of W k are ~ N(0, 1)
                elif layer < last:
                    w.normal_(0, 1.6 / math.sqrt(fan_in))  # silu keeps ~ 1/1.6 of the scale
                else:
                    w.normal_(0, 1.6 / math.sqrt(fan_in * self.head_dim))

    def init_state(
        self,
        batch_size: int,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> NeuralMemoryState:
        """The state before the first token, every row at the learned initial memory."""
        spec, device = self.spec, device or self.gain.device
        kind = wide(dtype or self.gain.dtype)

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(batch_size, self.heads, *shape, device=device, dtype=kind)

        weights = tuple(
            w.to(device, kind).expand(batch_size, *w.shape).contiguous() for w in self.initial
        )
        extra: Tensors = ()
        pending: Tensors = ()
        if spec.momentum:
            extra += tuple(torch.zeros_like(w) for w in weights)
        if spec.window > 1:
            past = spec.window - 1
            extra += (zeros(past, self.key_dim), zeros(past, self.head_dim))
            extra += (zeros(past), zeros(past))
        if not spec.linear:
            room = spec.chunk - 1
            pending = (zeros(room, self.key_dim), zeros(room, self.head_dim))
            pending += tuple(zeros(room) for _ in spec.gates)
        return NeuralMemoryState(
            history=self.conv.init_history(batch_size, device, dtype or self.gain.dtype),
            memory=MemoryState(weights, extra, pending, (0,) * batch_size),
        )

    def forward(
        self, x: Tensor, state: NeuralMemoryState | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, NeuralMemoryState]:
        """Read ``x (B, T, D)``, continuing from ``state``; ``mask`` is True at real tokens."""

        def fresh(rows: int) -> NeuralMemoryState:
            return self.init_state(rows, x.device, x.dtype)

        return run_ragged(self._forward, x, state, mask, fresh)

    def _forward(
        self, x: Tensor, state: NeuralMemoryState | None
    ) -> tuple[Tensor, NeuralMemoryState]:
        if state is None:
            state = self.init_state(x.shape[0], x.device, x.dtype)
        u, history = self.conv(x, state.history)
        if state.history.dtype != history.dtype:
            history = history.to(state.history.dtype)
        projected = self.in_proj(u)
        q, k, v, gate, scalars = projected.split(
            [self.dim] * 4 + [projected.shape[-1] - 4 * self.dim], -1
        )
        with torch.autocast(x.device.type, enabled=False):
            out, memory = self._remember(q, k, v, scalars, state.memory)
            out = self.gain * F.rms_norm(out, (out.shape[-1],), eps=1e-6)
        out = out.transpose(1, 2).flatten(2).to(gate.dtype)
        y = self.out_proj(out * F.silu(gate))
        return y, NeuralMemoryState(history, memory)

    def _remember(
        self, q: Tensor, k: Tensor, v: Tensor, scalars: Tensor, state: MemoryState
    ) -> tuple[Tensor, MemoryState]:
        """Write and read the memory: outputs ``(B, H, T, d)`` and the new state."""
        spec = self.spec
        query, key = (self._features(t) for t in (q, k))
        value = self._heads(v)
        if spec.normalise_values:
            value = unit(_root_mean_square(value))
        gates = self._gates(scalars)
        if not spec.linear:
            return self._scan((query, key, value, *gates.values()), state)
        memory = state.weights[0]
        if self.correction is not None:
            query = query - self.correction.to(query.dtype)[:, None, None] * key
        if state.frozen:
            return query @ memory.mT, state
        ones = query.new_ones(query.shape[:-1])
        eta = gates.get("eta", ones)
        alpha = gates.get("alpha", ones)
        if spec.retention == "fixed":
            head = torch.arange(self.heads, device=q.device, dtype=query.dtype)
            alpha = (1 - torch.exp2(-5 - head))[:, None] * ones
        decay = None
        if self.feedback is not None:
            decay = alpha * eta * torch.sigmoid(self.feedback.to(eta.dtype))[:, None]
        out, memory = apply_rule(
            spec.rule, memory, query, key, value, eta, alpha, decay,
            gated=spec.gated_decay and decay is None, chunk=spec.chunk,
        )  # fmt: skip
        position = tuple(p + q.shape[1] for p in state.position)
        return out, dataclasses.replace(state, weights=(memory,), position=position)

    def _scan(self, inputs: Tensors, state: MemoryState) -> tuple[Tensor, MemoryState]:
        cell = GradientCell(self.spec, self.objective, self._bounds(inputs[0].dtype))
        if state.frozen:
            fill = state.position[0] % self.spec.chunk
            pending = tuple(p[:, :, :fill] for p in state.pending) if fill else ()
            return cell.read_only(state.weights + state.extra, inputs[0], pending), state
        (out,), state = scan(cell, state, inputs, self.checkpoint_chunks)
        return out, state

    def _bounds(self, dtype: torch.dtype) -> Tensors:
        """Row-norm bounds of the fast weights: the initial norm, at least ``row_limit``."""
        limit = self.spec.row_limit
        if not limit or self.spec.retention == "kl":
            return ()
        return tuple(
            w.detach().to(dtype).norm(dim=-1, keepdim=True).clamp(min=limit) for w in self.initial
        )

    def _heads(self, x: Tensor) -> Tensor:
        """``(B, T, D) -> (B, H, T, d)``, at least float32."""
        x = x.to(wide(x.dtype)).unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)
        return x.contiguous()  # once here, or every product of every chunk copies it

    def _features(self, x: Tensor) -> Tensor:
        learned = self.feature_coefficients
        coefficients = None if learned is None else learned.to(wide(x.dtype))
        return feature_map(self.spec.feature, _root_mean_square(self._heads(x)), coefficients)

    def _gates(self, scalars: Tensor) -> dict[str, Tensor]:
        """Gates by name, each ``(B, H, T)``: eta in (0, eta_max), the others in (0, 1)."""
        names = self.spec.gates
        if self.gate_bias is None:
            return {}
        kind = wide(scalars.dtype)
        logits = scalars.to(kind).unflatten(-1, (len(names), self.heads)).permute(2, 0, 3, 1)
        gates = torch.sigmoid(logits + self.gate_bias.to(kind)[:, None, :, None])
        scale = {"eta": self.spec.eta_max}
        return {n: scale.get(n, 1.0) * g for n, g in zip(names, gates, strict=True)}

    def extra_repr(self) -> str:
        """The memory's settings, for ``print``."""
        return f"dim={self.dim}, heads={self.heads}, {self.spec}"


def _root_mean_square(x: Tensor) -> Tensor:
    """Heads with unit root-mean-square (no gain: the projection has one)."""
    return F.rms_norm(x, (x.shape[-1],), eps=1e-6)


def _logit(p: float) -> float:
    return math.log(p / (1 - p))
