"""Self-modifying (self-referential) Titans: a layer that learns how to learn (SPEC §5, Eq. 79-97)."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nestlearn.memory.state import MemoryState, State
from nestlearn.memory.structures import weight_shapes
from nestlearn.nn.conv import CausalConv
from nestlearn.nn.pointwise import guard_rows, unit
from nestlearn.nn.ragged import run_ragged
from nestlearn.nn.scan import scan
from nestlearn.nn.self_write import (
    Tensors,
    WriteRule,
    chunk_writes,
    finish_write,
    respond,
    respond_per_token,
    write,
)
from nestlearn.rules.chunk import ChunkWrite
from nestlearn.rules.decay import wide

VECTORS = ("k", "v", "q")
ROLES = ("k", "v", "q", "eta", "alpha")


@dataclasses.dataclass
class SelfModifyingState(State):
    """State of one `SelfModifyingTitans` layer.

    Attributes:
        history: last inputs of the convolution, ``(B, W-1, D)``.
        projections: the memories M_k, M_v, … in the order of ``adaptive``; None if there are none.
        memory: the main memory M_mem.
    """

    history: Tensor
    projections: MemoryState | None
    memory: MemoryState

    @property
    def position(self) -> tuple[int, ...]:
        """Tokens read per row."""
        return self.memory.position

    def freeze(self, frozen: bool = True) -> SelfModifyingState:
        """Memories read-only (or writable again); the convolution's window always moves."""
        projections = self.projections and self.projections.freeze(frozen)
        memory = self.memory.freeze(frozen)
        return dataclasses.replace(self, projections=projections, memory=memory)


class MemoryGroup(nn.Module):
    """N memories per head that share their keys: meta-learned initial states (the slow level) and
    the chunked write of `nestlearn.nn.self_write`.

    Args:
        heads, count, size: H, N and the width d of a head.
        depth, width: layers of a memory and their hidden size.
        chunk: tokens per write, C.
        rule: objective and kind of write.
        momentum: keep a momentum per weight, its decay learned per head.
    """

    def __init__(
        self,
        heads: int,
        count: int,
        size: int,
        depth: int,
        width: int,
        chunk: int,
        rule: WriteRule,
        momentum: bool,
    ):
        super().__init__()
        self.chunk, self.rule, self.size = chunk, rule, size
        shapes = weight_shapes(size, size, depth, width)
        self.initial = nn.ParameterList(
            [nn.Parameter(torch.empty(heads, count, out, n)) for out, n in shapes]
        )
        self.momentum_logit = nn.Parameter(torch.empty(heads)) if momentum else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Hidden layers see inputs of unit scale; the last layer's answer starts at norm ~ 1."""
        last = len(self.initial) - 1
        with torch.no_grad():
            for layer, w in enumerate(self.initial):
                fan_in = w.shape[-1]
                if last == 0:
                    w.normal_(0, fan_in**-0.5)
                elif layer == 0:
                    w.normal_(0, 1.0)  # keys have norm 1: the entries of W k are ~ N(0, 1)
                elif layer < last:
                    w.normal_(0, 1.6 / math.sqrt(fan_in))  # silu keeps about 1 / 1.6 of the scale
                else:
                    w.normal_(0, 1.6 / math.sqrt(fan_in * self.size))
            if self.momentum_logit is not None:
                self.momentum_logit.zero_()

    def bounds(self, dtype: torch.dtype) -> Tensors:
        """Row-norm bounds of the fast weights: the initial norm, at least 1."""
        return tuple(
            w.detach().to(dtype).norm(dim=-1, keepdim=True).clamp(min=1.0) for w in self.initial
        )

    def init_state(self, batch: int, dtype: torch.dtype) -> MemoryState:
        """Every row starts from the meta-learned initial state; pending: k, v, eta, alpha."""
        weights = tuple(w.to(dtype).expand(batch, *w.shape) for w in self.initial)
        extra = () if self.momentum_logit is None else tuple(torch.zeros_like(w) for w in weights)
        heads, device = self.initial[0].shape[0], self.initial[0].device
        room = (batch, heads, self.chunk - 1)
        vector = torch.zeros(*room, self.size, dtype=dtype, device=device)
        scalar = torch.zeros(room, dtype=dtype, device=device)
        return MemoryState(weights, extra, (vector, vector, scalar, scalar), (0,) * batch)

    def writes(self, memory: Tensors, written: Tensors) -> list[ChunkWrite]:
        """The chunk writes of ``written = (k, v, eta, alpha)``, layer by layer."""
        eta = written[2]
        beta = None
        if self.momentum_logit is not None:
            beta = self.momentum_logit.to(eta.dtype).sigmoid()[:, None].expand_as(eta)
        split = len(self.initial)
        return chunk_writes(self.rule, memory[:split], memory[split:], *written, beta)

    def write(self, memory: Tensors, written: Tensors) -> Tensors:
        """The memories after one full chunk."""
        weights, momenta = memory[: len(self.initial)], ()
        if self.rule.delta and self.momentum_logit is None:
            new = write(self.rule, weights, *written)
        else:
            new, momenta = finish_write(self.writes(memory, written), weights)
        bounds = self.bounds(new[0].dtype)
        return tuple(guard_rows(w, b) for w, b in zip(new, bounds, strict=True)) + momenta


class ProjectionMemories(MemoryGroup):
    """The memories that generate k, v, η, α (and q), in the order of ``roles`` (Eq. 84, 86)."""

    def __init__(self, roles: tuple[str, ...], **group: Any):
        super().__init__(count=len(roles), **group)
        self.roles = roles
        heads, size = group["heads"], group["size"]
        # The answer of a scalar role's memory is a vector; this reads one number off it.
        self.readout = nn.ParameterDict(
            {
                role: nn.Parameter(torch.randn(heads, size) / size**0.5)
                for role in roles
                if role not in VECTORS
            }
        )

    def answer(self, memory: Tensors, x: Tensor) -> dict[str, Tensor]:
        """Raw roles of ``x (B, H, C, d)``: vectors ``(B, H, C, d)``, scalars ``(B, H, C)``."""
        raw = {}
        answers = respond(memory[: len(self.initial)], x.mT).unbind(2)
        for role, answer in zip(self.roles, answers, strict=True):
            if role in VECTORS:
                raw[role] = answer.mT
            else:
                weight = self.readout[role].to(answer.dtype)
                raw[role] = (weight.unsqueeze(1) @ answer).squeeze(2)
        return raw


@dataclasses.dataclass
class ProjectionCell:
    """Scan cell of the projection memories. Inputs: ``x (B, H, C, d)`` of norm 1, then the raw
    values of the ``fixed`` roles, which have no memory. Outputs: all five roles."""

    memories: ProjectionMemories
    gates: Gates
    fixed: tuple[str, ...]

    @property
    def chunk(self) -> int:
        """Tokens per write."""
        return self.memories.chunk

    def read(self, memory: Tensors, inputs: Tensors, pending: Tensors) -> tuple[Tensors, Tensors]:
        """Generate the roles of every token from the memories at the chunk's start."""
        raw = self.memories.answer(memory, inputs[0])
        k, v, q, eta, alpha = self.gates(raw | dict(zip(self.fixed, inputs[1:], strict=True)))
        return (k, v, q, eta, alpha), (k, v, eta, alpha)

    def write(self, memory: Tensors, written: Tensors) -> Tensors:
        """The memories after one full chunk."""
        return self.memories.write(memory, written)


class MainMemory(MemoryGroup):
    """M_mem, the memory that is read with q: one scan cell (Eq. 83, 87)."""

    def __init__(self, readout: str, **group: Any):
        super().__init__(count=1, **group)
        self.readout = readout

    def read(self, memory: Tensors, inputs: Tensors, pending: Tensors) -> tuple[Tensors, Tensors]:
        """``o_t = M_mem(q_t)`` at the chunk's start, or after each token's own write."""
        k, v, q, eta, alpha = inputs
        written = (k, v, eta, alpha)
        if self.readout == "chunk":
            return (respond(memory[: len(self.initial)], q.mT).squeeze(2).mT,), written
        rows = written
        if pending:
            rows = tuple(torch.cat(pair, 2) for pair in zip(pending, written, strict=True))
            q = F.pad(q, (0, 0, rows[0].shape[2] - q.shape[2], 0))
        out = respond_per_token(self.writes(memory, rows), q)
        return (out[:, :, -k.shape[2] :],), written


class Gates(nn.Module):
    """From raw answers to roles: unit vectors, ``η = η_max sigmoid(·)``, ``α = sigmoid(·)``.

    Retention starts near 1, spread over heads: a memory that starts at α = 0.5 is erased within
    eight tokens (FINDINGS §6).
    """

    def __init__(self, heads: int, eta_max: float, weight_decay: bool):
        super().__init__()
        self.eta_max, self.weight_decay, self.heads = eta_max, weight_decay, heads
        self.eta_bias = nn.Parameter(torch.empty(heads))
        self.alpha_bias = nn.Parameter(torch.empty(heads)) if weight_decay else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """η starts at a fifth of its maximum, the memories' half-lives at 100 to 10,000 tokens."""
        with torch.no_grad():
            self.eta_bias.fill_(math.log(0.2 / 0.8))
            if self.alpha_bias is not None:
                forget = torch.logspace(-2, -4, self.heads) * math.log(2)
                self.alpha_bias.copy_(torch.log((1 - forget) / forget))

    def forward(self, raw: dict[str, Tensor]) -> Tensors:
        """k, v, q ``(B, H, C, d)`` and η, α ``(B, H, C)``."""
        k, v, q = (unit(raw[role]) for role in VECTORS)
        bias = self.eta_bias.to(k.dtype)[:, None]
        eta = self.eta_max * torch.sigmoid(raw["eta"] + bias)
        if self.alpha_bias is None:
            return k, v, q, eta, torch.ones_like(eta)
        return k, v, q, eta, torch.sigmoid(raw["alpha"] + self.alpha_bias.to(k.dtype)[:, None])


class SelfModifyingTitans(nn.Module):
    """Self-modifying Titans: every projection is a memory that rewrites itself (Eq. 83-93).

    With memories M_□ for □ in k, v, η, α, mem (each starts from a meta-learned initial state):

        k_t = M_k(x_t)   v_t = M_v(x_t)   η_t = M_η(x_t)   α_t = M_α(x_t)   q_t = W_q x_t
        o_t = M_mem(q_t)                  v̂_□ = M_□(v_t)   (each memory makes its own target)
        M_□ ← M_□ (α_t I − η_t k_t k_tᵀ) − η_t ∇L(M_□; k_t, v̂_□)

    k, v, q and v̂ are of norm 1 and the step is proximal, η/(1 + η ‖input‖²), per layer (SPEC §5,
    Choice). The outer gradient goes through all writes.

    Args:
        dim: width D, divisible by ``heads``.
        heads: H; memories act on heads of d = D/H channels.
        memory_depth: layers of a memory, 1 to 4; 1 is ``M(x) = W x``.
        memory_width: hidden size of a memory; d if None.
        memory_chunk: tokens per write of M_mem; 1 is the exact recurrence.
        projection_chunk: tokens per write of the other memories.
        objective: ``"dot"`` or ``"l2"`` (SPEC §2).
        readout: ``"chunk"`` reads M_mem at the chunk's start, ``"token"`` after each token's write.
        rule: ``"dgd"``, or ``"gd"`` (plain gradient descent: Tab. 6 "w/o DGD").
        momentum: ``S ← β S − η ∇L`` in the place of the gradient (Tab. 6), β learned per head.
        weight_decay: False fixes α = 1 (Tab. 6).
        adaptive: roles among k, v, q, eta, alpha that have a memory; others are linear maps.
        eta_max: largest inner learning rate.
        conv_size: window of the causal convolution before the projections.
        checkpoint_chunks: > 0: recompute activations in the backward pass, that many chunks at once.

    Shapes: ``forward(x (B, T, D), state=None, mask=None) -> (y (B, T, D), state)``; ``mask (B, T)``
    is True at real tokens (left or right padding). The memories compute in float32 (float64 for
    float64 input), everything else in the type of x.

    Raises:
        ValueError: a setting is out of range.

    Source: SPEC §5; paper §8.1.

    Example:
        >>> layer = SelfModifyingTitans(32, heads=2, memory_chunk=4, projection_chunk=4)
        >>> y, state = layer(torch.randn(1, 10, 32))
        >>> more, state = layer(torch.randn(1, 3, 32), state)
        >>> state.position
        (13,)
    """

    def __init__(
        self,
        dim: int,
        heads: int = 4,
        *,
        memory_depth: int = 2,
        memory_width: int | None = None,
        memory_chunk: int = 64,
        projection_chunk: int = 64,
        objective: str = "dot",
        readout: str = "chunk",
        rule: str = "dgd",
        momentum: bool = False,
        weight_decay: bool = True,
        adaptive: tuple[str, ...] = ("k", "v", "eta", "alpha"),
        eta_max: float = 1.0,
        conv_size: int = 4,
        checkpoint_chunks: int = 0,
    ):
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"dim {dim} must be a multiple of heads {heads}")
        _choose("objective", objective, ("dot", "l2"))
        _choose("readout", readout, ("chunk", "token"))
        _choose("rule", rule, ("dgd", "gd"))
        for role in adaptive:
            _choose("adaptive role", role, ROLES)
        for name, chunk in (("memory_chunk", memory_chunk), ("projection_chunk", projection_chunk)):
            if chunk < 1:
                raise ValueError(f"{name} must be at least 1, got {chunk}")
        if not eta_max > 0:
            raise ValueError(f"eta_max must be positive, got {eta_max}")
        self.dim, self.heads, self.conv_size = dim, heads, conv_size
        self.checkpoint_chunks = checkpoint_chunks
        self.adaptive = tuple(
            r for r in ROLES if r in adaptive and (r != "alpha" or weight_decay)
        )
        size = dim // heads
        group = dict(
            heads=heads,
            size=size,
            depth=memory_depth,
            width=memory_width or size,
            rule=WriteRule(objective, rule == "dgd"),
            momentum=momentum,
        )
        self.conv = CausalConv(dim, conv_size)
        fixed_vectors = [r for r in VECTORS if r not in self.adaptive]
        scalars = ("eta", "alpha") if weight_decay else ("eta",)
        self.fixed_scalars = [r for r in scalars if r not in self.adaptive]
        self.streams = (["x"] if self.adaptive else []) + fixed_vectors
        self.in_proj = nn.Linear(dim, dim * (len(self.streams) + 1), bias=False)
        self.scalar_proj = (
            nn.Linear(dim, heads * len(self.fixed_scalars), bias=False)
            if self.fixed_scalars
            else None
        )
        self.gates = Gates(heads, eta_max, weight_decay)
        self.projections = (
            ProjectionMemories(self.adaptive, chunk=projection_chunk, **group)
            if self.adaptive
            else None
        )
        self.memory = MainMemory(readout, chunk=memory_chunk, **group)
        self.norm_weight = nn.Parameter(torch.ones(heads, size))
        self.out_proj = nn.Linear(dim, dim, bias=False)

    def init_state(
        self,
        batch_size: int,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> SelfModifyingState:
        """State before the first token. ``device`` and ``dtype`` default to the parameters'."""
        dtype = dtype or self.in_proj.weight.dtype
        projections = self.projections and self.projections.init_state(batch_size, wide(dtype))
        state = SelfModifyingState(
            self.conv.init_history(batch_size, dtype=dtype),
            projections,
            self.memory.init_state(batch_size, wide(dtype)),
        )
        return state if device is None else state.to(device)

    def forward(
        self, x: Tensor, state: SelfModifyingState | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, SelfModifyingState]:
        """Read ``x``, writing the memories on the way; see the class for shapes."""
        return run_ragged(self._forward, x, state, mask, self._fresh_state(x))

    def _fresh_state(self, x: Tensor):
        return lambda batch: self.init_state(batch, dtype=x.dtype)

    def _forward(
        self, x: Tensor, state: SelfModifyingState | None
    ) -> tuple[Tensor, SelfModifyingState]:
        batch, length, _ = x.shape
        state = self.init_state(batch, dtype=x.dtype) if state is None else state
        conv, history = self.conv(x, state.history)
        *streams, gate = self.in_proj(conv).chunk(len(self.streams) + 1, -1)
        # Fast weights are accumulated sums: float32 at least, whatever the layer runs in.
        with torch.autocast(x.device.type, enabled=False):
            inputs = {n: self._heads(s) for n, s in zip(self.streams, streams, strict=True)}
            if self.scalar_proj is not None:
                scalars = self.scalar_proj(conv.to(self.scalar_proj.weight.dtype))
                scalars = scalars.to(wide(x.dtype)).mT.unflatten(1, (-1, self.heads))
                inputs |= dict(zip(self.fixed_scalars, scalars.unbind(1), strict=True))
            out, projections, memory = self._memories(inputs, state)
            out = F.rms_norm(out, (out.shape[-1],), eps=1e-6) * self.norm_weight.to(out.dtype)[:, None]
            out = out.transpose(1, 2).flatten(2).to(gate.dtype)
        y = self.out_proj(out * F.silu(gate))
        return y.to(x.dtype), SelfModifyingState(history, projections, memory)

    def _memories(
        self, inputs: dict[str, Tensor], state: SelfModifyingState
    ) -> tuple[Tensor, MemoryState | None, MemoryState]:
        """Generate the roles, then read and write M_mem: two scans, each with its own chunk size."""
        if self.projections is None:
            roles, projections = self.gates(inputs), None
        else:
            x = unit(inputs.pop("x"))
            cell = ProjectionCell(self.projections, self.gates, tuple(inputs))
            tokens = (x, *inputs.values())
            roles, projections = scan(cell, state.projections, tokens, self.checkpoint_chunks)
        (out,), memory = scan(self.memory, state.memory, roles, self.checkpoint_chunks)
        return out, projections, memory

    def _heads(self, x: Tensor) -> Tensor:
        """``(B, T, D) -> (B, H, T, d)`` in the memories' type."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2).to(wide(x.dtype))

    def extra_repr(self) -> str:
        """Shown by ``print(layer)``."""
        return f"dim={self.dim}, heads={self.heads}, adaptive={self.adaptive}"


def _choose(what: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"unknown {what} {value!r}; choose one of {', '.join(allowed)}")
