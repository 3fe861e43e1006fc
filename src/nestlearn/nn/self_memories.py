"""The memories inside self-modifying Titans: groups and roles (SPEC §5)."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nestlearn.memory.state import MemoryState
from nestlearn.memory.structures import weight_shapes
from nestlearn.nn import native
from nestlearn.nn.gates import LR_SCALE, Gates
from nestlearn.nn.native import ROLES, VECTORS
from nestlearn.nn.pointwise import guard_rows
from nestlearn.nn.scan import Run
from nestlearn.nn.self_write import (
    Tensors,
    WriteRule,
    Written,
    chunk_writes,
    finish_write,
    respond,
    respond_after,
    respond_per_token,
    write,
)
from nestlearn.rules.chunk import ChunkWrite

# Rows start inside their bound: at the bound, rounding would decide which gradient they get.
ROOM = 1.5
# What a memory adds to its input before training, where it generates a vector.
QUIET = 0.1
# What M_mem adds to a query before training, of an answer of norm 1: a memory that holds next to
# nothing shows what is written into it (docs/results.md "Recall").
FAINT = 0.01
# The momentum's decay before training, as a logit: 0.05. A write replaces what its key had, so one
# that goes on for 1 / (1 - beta) tokens overshoots (docs/results.md, Table 6).
MOMENTUM_START = -3.0


def source_of(role: str) -> str:
    """The stream x that a role's memory reads: a vector's own, and v's for η and α."""
    return role if role in VECTORS else "v"


class MemoryGroup(nn.Module):
    """N memories per head that share their keys: meta-learned initial states (the slow level) and
    the chunked write of `nestlearn.nn.self_write`.

    Args:
        heads, count, size: H, N and the width d of a head.
        depth, width: layers of a memory and their hidden size.
        chunk: tokens per write, C.
        rule: objective and kind of write.
        momentum: keep a momentum per weight, its decay learned per head.
        truncate: let no outer gradient pass a chunk's boundary, but for the initial states.
    """

    lr_scale = LR_SCALE

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
        truncate: bool = False,
    ):
        super().__init__()
        self.chunk, self.rule, self.size, self.truncate = chunk, rule, size, truncate
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
                    w.normal_(0, fan_in**-0.5)  # times sqrt(d), see initial_weights
                elif layer < last:
                    w.normal_(0, 1.6 / math.sqrt(fan_in))  # silu keeps about 1 / 1.6 of the scale
                else:
                    w.normal_(0, 1.6 / math.sqrt(fan_in * self.size))
            if self.momentum_logit is not None:
                self.momentum_logit.fill_(MOMENTUM_START)

    def initial_weights(self, dtype: torch.dtype) -> Tensors:
        """The initial states, ``(H, N, out, in)`` per layer.

        Keys have norm 1, so a hidden layer's input weights have entries of size 1. As parameters
        they are kept smaller by sqrt(d), the size of all others, so that one outer learning rate
        fits all.
        """
        weights = [w.to(dtype) for w in self.initial]
        if len(weights) > 1:
            weights[0] = weights[0] * self.size**0.5
        return tuple(weights)

    def anchors(self, dtype: torch.dtype) -> Tensors | None:
        """What retention pulls to: the initial states, or None for zero."""
        return self.initial_weights(dtype) if self.rule.retention == "initial" else None

    def at_start(self, memory: Tensors) -> Tensors:
        """The memory as a chunk sees it: with ``truncate``, initial states plus a constant."""
        if not self.truncate:
            return memory
        initial = self.initial_weights(memory[0].dtype)
        return tuple(i + (w - i).detach() for i, w in zip(initial, memory, strict=True))

    def bounds(self, dtype: torch.dtype) -> Tensors:
        """Row-norm bounds of the fast weights: ROOM times the initial norm, or ROOM."""
        return tuple(
            ROOM * w.detach().norm(dim=-1, keepdim=True).clamp(min=1.0)
            for w in self.initial_weights(dtype)
        )

    def init_state(self, batch: int, dtype: torch.dtype) -> MemoryState:
        """Every row starts from the meta-learned initial state; pending: k, v, eta, alpha."""
        weights = tuple(w.expand(batch, *w.shape) for w in self.initial_weights(dtype))
        extra = () if self.momentum_logit is None else tuple(torch.zeros_like(w) for w in weights)
        heads, device = self.initial[0].shape[0], self.initial[0].device
        room = (batch, heads, self.chunk - 1)
        vector = torch.zeros(*room, self.size, dtype=dtype, device=device)
        scalar = torch.zeros(room, dtype=dtype, device=device)
        return MemoryState(weights, extra, (vector, vector, scalar, scalar), (0,) * batch)

    @property
    def is_plain(self) -> bool:
        """DGD without momentum: the hot path of the PyTorch operations."""
        return self.rule.delta and self.momentum_logit is None

    def runs_native(self, memory: Tensors) -> bool:
        """Whether the CPU kernel can run on these weights."""
        return len(self.initial) <= native.MAX_DEPTH and native.usable(memory)

    def plan(self, **more: Any) -> native.Plan:
        """What the CPU kernel has to know of this group."""
        return native.Plan(
            objective=self.rule.objective,
            anchored=self.rule.retention == "initial",
            generated_targets=self.rule.targets == "generated",
            truncate=self.truncate,
            delta=self.rule.delta,
            momentum=self.momentum_logit is not None,
            **more,
        )

    def momentum_decay(self, dtype: torch.dtype) -> Tensor | None:
        """β of every head, ``(H,)``; None without momentum."""
        return None if self.momentum_logit is None else self.momentum_logit.to(dtype).sigmoid()

    def chunk_writes(self, memory: Tensors, written: Tensors) -> list[ChunkWrite]:
        """The chunk writes of ``written = (k, v, eta, alpha)``, layer by layer."""
        k, v, eta, alpha = written
        beta = self.momentum_decay(eta.dtype)
        beta = None if beta is None else beta[:, None].expand_as(eta)
        split = len(self.initial)
        anchors = self.anchors(eta.dtype)
        weights, momenta = memory[:split], memory[split:]
        return chunk_writes(self.rule, weights, momenta, k, v, eta, alpha, beta, anchors)

    def write(self, memory: Tensors, written: Tensors) -> Tensors:
        """The memories after one full chunk."""
        memory = self.at_start(memory)
        if self.is_plain:
            return self.guard(self._write(memory, written).weights)
        return self.finish(self.chunk_writes(memory, written), memory)

    def _write(self, memory: Tensors, written: Tensors) -> Written:
        k, v, eta, alpha = written
        return write(self.rule, memory, k, v, eta, alpha, self.anchors(eta.dtype))

    def finish(self, writes: list[ChunkWrite], memory: Tensors) -> Tensors:
        """Guarded weights and momenta after a chunk."""
        weights = memory[: len(self.initial)]
        weights, momenta = finish_write(writes, weights, self.anchors(weights[0].dtype))
        return self.guard(weights) + momenta

    def guard(self, weights: Tensors) -> Tensors:
        """Row norms bounded."""
        bounds = self.bounds(weights[0].dtype)
        return tuple(guard_rows(w, b) for w, b in zip(weights, bounds, strict=True))


class ProjectionMemories(MemoryGroup):
    """The memories that generate k, v, η, α (and q), in the order of ``roles`` (Eq. 84, 86)."""

    def __init__(self, roles: tuple[str, ...], **group: Any):
        self.roles = roles
        super().__init__(count=len(roles), **group)
        heads, size = group["heads"], group["size"]
        # The answer of a scalar role's memory is a vector; this reads one number off it.
        self.readout = nn.ParameterDict(
            {
                role: nn.Parameter(torch.randn(heads, size) / size**0.5)
                for role in roles
                if role not in VECTORS
            }
        )

    def reset_parameters(self) -> None:
        """Memories that generate a vector start close to the identity."""
        super().reset_parameters()
        vectors = [i for i, role in enumerate(self.roles) if role in VECTORS]
        with torch.no_grad():
            last = self.initial[-1]
            last[:, vectors] *= QUIET
            if len(self.initial) == 1:
                last[:, vectors] += torch.eye(self.size)

    @property
    def sources(self) -> tuple[str, ...]:
        """The streams x that are read, each once."""
        return tuple(dict.fromkeys(source_of(role) for role in self.roles))

    def answer(self, memory: Tensors, x: dict[str, Tensor]) -> dict[str, Tensor]:
        """Raw roles of the streams ``x``, ``(B, H, C, d)`` each: vectors ``(B, H, C, d)``, scalars
        ``(B, H, C)``."""
        raw = {}
        own = torch.stack([x[source_of(role)].mT for role in self.roles], 2)
        answers = respond(memory[: len(self.initial)], own)
        for role, answer in zip(self.roles, answers.unbind(2), strict=True):
            if role in VECTORS:
                raw[role] = answer.mT
            else:
                weight = self.readout[role].to(answer.dtype)
                raw[role] = (weight.unsqueeze(1) @ answer).squeeze(2)
        return raw


@dataclasses.dataclass
class ProjectionCell:
    """Scan cell of the projection memories. Inputs: their ``sources`` ``(B, H, C, d)``, of norm 1,
    then the raw values of the ``fixed`` roles, which have no memory. Outputs: all five roles."""

    memories: ProjectionMemories
    gates: Gates
    fixed: tuple[str, ...]

    def __post_init__(self) -> None:
        self.chunk = self.memories.chunk

    def read(self, memory: Tensors, inputs: Tensors, pending: Tensors) -> tuple[Tensors, Tensors]:
        """Generate the roles of every token from the memories at the chunk's start."""
        x, fixed = self._named(inputs)
        raw = self.memories.answer(self.memories.at_start(memory), x)
        k, v, q, eta, alpha = self.gates(raw | fixed)
        return (k, v, q, eta, alpha), (k, v, self.gates.inside(eta), alpha)

    def runner(self, memory: Tensors) -> Run | None:
        """`run`, where the CPU kernel can."""
        return self.run if self.memories.runs_native(memory) else None

    def _named(self, inputs: Tensors) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The streams of the memories, and the raw values of the fixed roles."""
        sources = self.memories.sources
        x = dict(zip(sources, inputs, strict=False))
        return x, dict(zip(self.fixed, inputs[len(sources) :], strict=True))

    def run(self, memory: Tensors, inputs: Tensors) -> tuple[Tensors, Tensors]:
        """Any number of whole chunks at once."""
        memories, gates = self.memories, self.gates
        dtype = memory[0].dtype
        x, fixed = self._named(inputs)
        roles = {n: gates.role(n, raw) for n, raw in fixed.items()}
        if not gates.weight_decay:
            roles["alpha"] = inputs[0].new_ones(inputs[0].shape[:-1])
        plan = memories.plan(
            chunk=self.chunk,
            generated=memories.roles,
            eta_max=gates.eta_max,
            threshold=gates.threshold,
        )
        scalars = [r for r in memories.roles if r not in VECTORS]
        given = {n: gates.inside(t) if n == "eta" else t for n, t in roles.items() if n != "q"}
        made, _, memory = native.run_chunks(
            plan,
            memory,
            memories.bounds(dtype),
            memories.initial_weights(dtype),
            given,
            x,
            {r: memories.readout[r].to(dtype) for r in scalars},
            {r: gates.bias(r, dtype) for r in scalars},
            memories.momentum_decay(dtype),
        )
        roles |= made
        return tuple(roles[n] for n in ROLES), memory

    def write(self, memory: Tensors, written: Tensors) -> Tensors:
        """The memories after one full chunk."""
        return self.memories.write(memory, written)


class MainMemory(MemoryGroup):
    """M_mem, the memory that is read with q: one scan cell (Eq. 83, 87)."""

    def __init__(self, readout: str, **group: Any):
        super().__init__(count=1, **group)
        self.readout = readout

    def reset_parameters(self) -> None:
        """The memory starts nearly empty."""
        super().reset_parameters()
        with torch.no_grad():
            self.initial[-1].mul_(FAINT)

    def read(self, memory: Tensors, inputs: Tensors, pending: Tensors) -> tuple[Tensors, Tensors]:
        """``o_t = M_mem(q_t)`` at the chunk's start, or after each token's own write."""
        k, v, q, eta, alpha = inputs
        written = (k, v, eta, alpha)
        memory = self.at_start(memory)
        if self.readout == "chunk":
            return (respond(memory[: len(self.initial)], q.mT).squeeze(2).mT,), written
        rows: Tensors = written
        if pending:
            rows = tuple(torch.cat(pair, 2) for pair in zip(pending, written, strict=True))
        return (self._read_written(memory, rows, q)[0],), written

    def step(self, memory: Tensors, inputs: Tensors) -> tuple[Tensors, Tensors]:
        """Read and write one full chunk; a token-level read-out shares the write's work."""
        k, v, q, eta, alpha = inputs
        written = (k, v, eta, alpha)
        if self.readout == "chunk":
            return self.read(memory, inputs, ())[0], self.write(memory, written)
        out, memory = self._read_written(self.at_start(memory), written, q)
        return (out,), memory

    def runner(self, memory: Tensors) -> Run | None:
        """`run`, where the CPU kernel can."""
        return self.run if self.runs_native(memory) else None

    def run(
        self, memory: Tensors, inputs: Tensors, chunk: int | None = None
    ) -> tuple[Tensors, Tensors]:
        """Any number of whole chunks at once, of ``chunk`` tokens instead of the memory's own."""
        plan = self.plan(chunk=chunk or self.chunk, token=self.readout == "token")
        roles = dict(zip(ROLES, inputs, strict=True))
        dtype = memory[0].dtype
        bounds, initial = self.bounds(dtype), self.initial_weights(dtype)
        decay = self.momentum_decay(dtype)
        _, out, memory = native.run_chunks(plan, memory, bounds, initial, roles, decay=decay)
        assert out is not None
        return (out,), memory

    def _read_written(self, memory: Tensors, rows: Tensors, q: Tensor) -> tuple[Tensor, Tensors]:
        """``M_t(q_t)`` for the last tokens of ``rows``, and the memory after all of them."""
        count, rest = q.shape[2], rows[0].shape[2] - q.shape[2]
        if self.runs_native(memory):  # rows as one chunk of their own length
            # Padded to whole vectors with tokens that write nothing: eta = 0, alpha = 1. Momentum
            # would go on with them.
            extra = 0 if self.momentum_logit is not None else -(rest + count) % native.LANES
            k, v = (F.pad(t, (0, 0, 0, extra)) for t in rows[:2])
            inputs = (
                k,
                v,
                F.pad(q, (0, 0, rest, extra)),
                F.pad(rows[2], (0, extra)),
                F.pad(rows[3], (0, extra), value=1.0),
            )
            (out,), memory = self.run(memory, inputs, k.shape[2])
            return out[:, :, rest : rest + count], memory
        if self.is_plain:
            done = self._write(memory, rows)
            return respond_after(done, q.mT).mT, self.guard(done.weights)
        writes = self.chunk_writes(memory, rows)
        padded = F.pad(q, (0, 0, rest, 0))
        out = respond_per_token(writes, padded, self.anchors(q.dtype))
        return out[:, :, -count:], self.finish(writes, memory)
