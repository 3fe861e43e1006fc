"""Self-modifying (self-referential) Titans: a layer that learns how to learn (SPEC §5)."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nestlearn.memory.state import MemoryState, State
from nestlearn.nn.conv import CausalConv
from nestlearn.nn.counting import count
from nestlearn.nn.gates import Gates
from nestlearn.nn.native import ROLES, VECTORS
from nestlearn.nn.pointwise import unit
from nestlearn.nn.ragged import run_ragged
from nestlearn.nn.scan import scan
from nestlearn.nn.self_memories import MainMemory, ProjectionCell, ProjectionMemories
from nestlearn.nn.self_write import WriteRule
from nestlearn.nn.write_cost import record
from nestlearn.rules.decay import wide


@dataclasses.dataclass
class SelfModifyingState(State):
    """State of one `SelfModifyingTitans` layer.

    Attributes:
        history: last inputs of the convolutions, ``(B, W-1, ·)``: x and the streams, side by side.
        projections: the memories M_k, M_v, … in the order of ``adaptive``; None if there are none.
        memory: the main memory M_mem.
        sums: of the counters, ``(B, counters)``; None if there are none.
    """

    history: Tensor
    projections: MemoryState | None
    memory: MemoryState
    sums: Tensor | None = None

    @property
    def position(self) -> tuple[int, ...]:
        """Tokens read per row."""
        return self.memory.position

    def freeze(self, frozen: bool = True) -> SelfModifyingState:
        """Memories read-only (or writable again); the convolution's window always moves."""
        projections = self.projections and self.projections.freeze(frozen)
        memory = self.memory.freeze(frozen)
        return dataclasses.replace(self, projections=projections, memory=memory)


class SelfModifyingTitans(nn.Module):
    """Self-modifying Titans: every projection is a memory that rewrites itself (Eq. 83-93).

    With memories M_□ for □ in k, v, η, α, mem (each starts from a meta-learned initial state):

        k_t = M_k(x_t)   v_t = M_v(x_t)   η_t = M_η(x_t)   α_t = M_α(x_t)   q_t = W_q x_t
        o_t = M_mem(q_t)                  v̂_□ = M_□(v_t)   (each memory makes its own target)
        M_□ ← M_□ (α_t I − η_t k_t k_tᵀ) − η_t ∇L(M_□; k_t, v̂_□)

    k, v, q and v̂ are of norm 1 and the step is proximal, η/(1 + η ‖input‖²), per layer (SPEC §5,
    Choice). The outer gradient goes through all writes. Our reading: memories act on heads, and x_t
    is mapped to heads of norm 1 first, between two causal convolutions (`in_conv` before the maps,
    `conv` behind them): by a map of its own for each of k, v and q; M_η and M_α read what M_v
    reads. An untrained layer is a memory of what followed what: see `reset_parameters`.

    Args:
        dim: width D, divisible by ``heads``.
        heads: H; memories act on heads of d = D/H channels.
        memory_depth: layers of a memory, 1 to 4; 1 is ``M(x) = W x``.
        memory_width: hidden size of a memory; d if None.
        memory_chunk: tokens per write of M_mem; 1 is the exact recurrence.
        projection_chunk: tokens per write of the other memories.
        objective: ``"dot"`` or ``"l2"`` (SPEC §2).
        readout: ``"token"`` reads M_mem after each token's write, ``"chunk"`` at the chunk's start
            (SPEC §4), which is a little cheaper and sees the last tokens only through the
            convolution.
        rule: ``"dgd"``, or ``"gd"`` (plain gradient descent: Tab. 6 "w/o DGD").
        momentum: ``S ← β S − η ∇L`` in the place of the gradient (Tab. 6), β learned per head, 0.05
            before training.
        weight_decay: False fixes α = 1 (Tab. 6).
        retention: what α pulls a memory to: ``"initial"``, its meta-learned initial state M_0, so
            that α M reads M_0 + α (M - M_0) above; ``"zero"``, the literal form.
        half_lives: tokens after which what was written has faded to a half, before training: in
            the first head and in the last, with the others between them.
        targets: ``"generated"``: as above; ``"shared"``: v_t for all memories (Eq. 79-82).
        truncate: True lets no outer gradient pass a chunk's boundary, but for that of the initial
            states (truncated backpropagation); False: the gradient goes through all writes.
        adaptive: roles among k, v, q, eta, alpha that have a memory; others are linear maps.
        eta_max: largest inner learning rate. Above 1 a write may turn an answer round (the proximal
            step exceeds 1/2), which helps to track a state such as a parity.
        write_threshold: c in [0, 1): a token whose gate, the sigmoid in η, is not above c writes
            exactly nothing, so that any number of such tokens leaves the memories as they are but
            for α; ``η = η_max max(0, gate - c) / (1 - c)``. The outer gradient of M_mem's writes
            ignores the max: training can open a gate again. **Our choice**, off by default.
        conv_size: window of the causal convolutions before and behind the maps to heads.
        counters: channels beside the heads that are plain sums, ``M_t = M_{t-1} + v_t``
            (`nestlearn.nn.counting`): they count further than they were trained to, where memories
            that are bounded saturate. v_t is a map of x_t itself (`count_proj`), without
            `in_conv`. **Our choice**, off by default.
        counter_noise: in training every value that is counted is off by a normal number of this
            standard deviation; 0.05 makes counts hold further beyond the lengths of training.
        checkpoint_chunks: > 0: recompute activations in the backward pass, so many chunks at once.

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
        readout: str = "token",
        rule: str = "dgd",
        momentum: bool = False,
        weight_decay: bool = True,
        retention: str = "initial",
        half_lives: tuple[float, float] = (100, 10_000),
        targets: str = "generated",
        truncate: bool = False,
        adaptive: tuple[str, ...] = ("k", "v", "eta", "alpha"),
        eta_max: float = 8.0,
        write_threshold: float = 0.0,
        conv_size: int = 4,
        counters: int = 0,
        counter_noise: float = 0.0,
        checkpoint_chunks: int = 0,
    ):
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"dim {dim} must be a multiple of heads {heads}")
        _choose("objective", objective, ("dot", "l2"))
        _choose("readout", readout, ("chunk", "token"))
        _choose("rule", rule, ("dgd", "gd"))
        _choose("targets", targets, ("generated", "shared"))
        _choose("retention", retention, ("initial", "zero"))
        for role in adaptive:
            _choose("adaptive role", role, ROLES)
        for name, chunk in (("memory_chunk", memory_chunk), ("projection_chunk", projection_chunk)):
            if chunk < 1:
                raise ValueError(f"{name} must be at least 1, got {chunk}")
        if len(half_lives) != 2 or not 0 < half_lives[0] <= half_lives[1] < float("inf"):
            raise ValueError(f"half_lives must be (shortest, longest), > 0, got {half_lives}")
        if truncate and (readout == "chunk" or momentum):
            raise ValueError(
                "truncate needs readout 'token' and momentum False: what acts only after a chunk's "
                "end would get no gradient"
            )
        if not eta_max > 0:
            raise ValueError(f"eta_max must be positive, got {eta_max}")
        if not 0 <= write_threshold < 1:
            raise ValueError(f"write_threshold must be in [0, 1), got {write_threshold}")
        if counters < 0:
            raise ValueError(f"counters must be at least 0, got {counters}")
        if not 0 <= counter_noise < float("inf"):
            raise ValueError(f"counter_noise must be a number >= 0, got {counter_noise}")
        if counter_noise and not counters:
            raise ValueError(f"counter_noise {counter_noise} acts on counters: there are none")
        self.dim, self.heads, self.conv_size = dim, heads, conv_size
        self.counters, self.counter_noise = counters, counter_noise
        self.checkpoint_chunks = checkpoint_chunks
        self.adaptive = tuple(r for r in ROLES if r in adaptive and (r != "alpha" or weight_decay))
        size = dim // heads
        # What the token is mapped to: the channels of ``conv``.
        self.widths = {**dict.fromkeys(VECTORS, dim), "gate": dim + counters}
        if counters:
            self.widths["count"] = counters
        group = dict(
            heads=heads,
            size=size,
            depth=memory_depth,
            width=memory_width or size,
            rule=WriteRule(objective, rule == "dgd", retention, targets),
            momentum=momentum,
            truncate=truncate,
        )
        scalars = ("eta", "alpha") if weight_decay else ("eta",)
        self.fixed_scalars = [r for r in scalars if r not in self.adaptive]
        self.in_conv = CausalConv(dim, conv_size)
        self.in_proj = nn.Linear(dim, 4 * dim + counters, bias=False)
        self.count_proj = nn.Linear(dim, counters, bias=False) if counters else None
        self.conv = CausalConv(sum(self.widths.values()), conv_size)
        self.scalar_proj = (
            nn.Linear(dim, heads * len(self.fixed_scalars), bias=False)
            if self.fixed_scalars
            else None
        )
        lives = (half_lives[0], half_lives[1])
        self.gates = Gates(heads, eta_max, weight_decay, lives, write_threshold)
        self.projections = (
            ProjectionMemories(self.adaptive, chunk=projection_chunk, **group)
            if self.adaptive
            else None
        )
        self.memory = MainMemory(readout, chunk=memory_chunk, **group)
        self.norm_weight = nn.Parameter(torch.ones(heads, size))
        self.count_weight = nn.Parameter(torch.ones(counters)) if counters else None
        self.out_proj = nn.Linear(dim + counters, dim, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start as a memory of what followed what.

        Keys are made of the token before, values of the token itself; queries are projected as
        keys are, but from the token itself. So the memory answers a token with what came after it
        the last time. From unrelated random projections training finds this recall late or not at
        all (docs/results.md). The gate begins with a wider mixture of the last tokens than the
        convolution's own.
        """
        if self.conv_size < 2:
            return
        taps = self._streams(self.conv.weight, 0)
        key_map, _, query_map = self.in_proj.weight[: 3 * self.dim].chunk(3)
        taps["gate"][..., :-1].uniform_(-0.5, 0.5)
        look_back(taps["k"], key_map, query_map)

    def init_state(
        self,
        batch_size: int,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> SelfModifyingState:
        """State before the first token. ``device`` and ``dtype`` default to the parameters'."""
        dtype = dtype or self.in_proj.weight.dtype
        convs = (self.in_conv, self.conv)
        state = SelfModifyingState(
            torch.cat([conv.init_history(batch_size, dtype=dtype) for conv in convs], -1),
            None
            if self.projections is None
            else self.projections.init_state(batch_size, wide(dtype)),
            self.memory.init_state(batch_size, wide(dtype)),
            self.in_proj.weight.new_zeros((batch_size, self.counters), dtype=wide(dtype))
            if self.counters
            else None,
        )
        return state if device is None else state.to(device)

    def forward(
        self, x: Tensor, state: SelfModifyingState | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, SelfModifyingState]:
        """Read ``x``, writing the memories on the way; see the class for shapes."""
        return run_ragged(self._forward, x, state, mask, self._fresh_state(x))

    def compile_chunks(self) -> None:
        """Run read and write of a chunk through ``torch.compile`` (needs a C++ compiler on CPU)."""
        memory: Any = self.memory
        memory.step = torch.compile(memory.step, dynamic=False)
        if self.projections is not None:
            memories: Any = self.projections
            memories.write = torch.compile(memories.write, dynamic=False)
            memories.answer = torch.compile(memories.answer, dynamic=False)

    def _fresh_state(self, x: Tensor):
        return lambda batch: self.init_state(batch, dtype=x.dtype)

    def _forward(
        self, x: Tensor, state: SelfModifyingState | None
    ) -> tuple[Tensor, SelfModifyingState]:
        batch, length, _ = x.shape
        state = self.init_state(batch, dtype=x.dtype) if state is None else state
        read, mapped = state.history.split([self.dim, self.conv.dim], -1)
        mixed, read = self.in_conv(x, read)
        maps = self.in_proj(mixed)
        if self.count_proj is not None:
            maps = torch.cat([maps, self.count_proj(x)], -1)
        conv, mapped = self.conv(maps, mapped)
        history = torch.cat([read, mapped], -1)
        streams = self._streams(conv, -1)
        # Fast weights are accumulated sums: float32 at least, whatever the layer runs in.
        with torch.autocast(x.device.type, enabled=False):
            inputs = {n: self._heads(streams[n]) for n in VECTORS}
            if self.scalar_proj is not None:
                scalars = self.scalar_proj(mixed.to(self.scalar_proj.weight.dtype))
                scalars = scalars.to(wide(x.dtype)).mT.unflatten(1, (-1, self.heads))
                inputs |= dict(zip(self.fixed_scalars, scalars.unbind(1), strict=True))
            out, projections, memory = self._memories(inputs, state)
            out = F.rms_norm(out, (out.shape[-1],), eps=1e-6)
            out = out * self.norm_weight.to(out.dtype)[:, None]
            out, sums = out.transpose(1, 2).flatten(2), state.sums
            if sums is not None and self.count_weight is not None:
                noise = self.counter_noise if self.training else 0.0
                counted, sums = count(streams["count"].to(sums.dtype), sums, memory.frozen, noise)
                out = torch.cat([out, counted * self.count_weight.to(out.dtype)], -1)
            out = out.to(conv.dtype)
        y = self.out_proj(out * F.silu(streams["gate"]))
        return y.to(x.dtype), SelfModifyingState(history, projections, memory, sums)

    def _memories(
        self, inputs: dict[str, Tensor], state: SelfModifyingState
    ) -> tuple[Tensor, MemoryState | None, MemoryState]:
        """Generate the roles, then read and write M_mem: two scans, two chunk sizes."""
        projections = state.projections
        if self.projections is None or projections is None:
            roles = self.gates(inputs)
        else:
            x = [unit(inputs[n]) for n in self.projections.sources]
            fixed = {n: t for n, t in inputs.items() if n not in self.adaptive}
            cell = ProjectionCell(self.projections, self.gates, tuple(fixed))
            tokens = (*x, *fixed.values())
            roles, projections = scan(cell, projections, tokens, self.checkpoint_chunks)
        record(roles[3], roles[4])
        (out,), memory = scan(self.memory, state.memory, roles, self.checkpoint_chunks)
        return out, projections, memory

    def _streams(self, joined: Tensor, axis: int) -> dict[str, Tensor]:
        """The parts of what has the channels of ``conv`` along an axis, by name."""
        parts = joined.split(list(self.widths.values()), axis)
        return dict(zip(self.widths, parts, strict=True))

    def _heads(self, x: Tensor) -> Tensor:
        """``(B, T, D) -> (B, H, T, d)`` in the memories' type."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2).to(wide(x.dtype))

    def extra_repr(self) -> str:
        """Shown by ``print(layer)``."""
        counting = f", counters={self.counters}" if self.counters else ""
        return f"dim={self.dim}, heads={self.heads}, adaptive={self.adaptive}{counting}"


def look_back(taps: Tensor, key_map: Tensor, query_map: Tensor) -> None:
    """Make keys of the token before, projected as queries are, which are the token's own.

    Args:
        taps: of the convolution behind ``key_map``, ``(D, 1, W)``; the last two change places.
        key_map, query_map: ``(D, D)``; the second becomes the first.
    """
    taps[..., -2:] = taps.flip(-1)[..., :2].clone()
    query_map.copy_(key_map)


def _choose(what: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"unknown {what} {value!r}; choose one of {', '.join(allowed)}")
