"""A memory written by gradients, as a cell of the streaming driver (SPEC §2, §4).

Within a chunk all gradients are taken at the memory of the chunk's start (Eq. 90); the gates act
per token. Every layer of a deep memory is written with its own input (SPEC §4) and the damped step
of `nestlearn.rules.chunk.steady`, at chunk 1 the proximal ``eta / (1 + eta ||input||^2)``. The rows
of the new weights are kept within a norm bound. So neither an input nor a length makes the memory
diverge, and outer gradients stay of one size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from nestlearn.memory.objectives import Objective
from nestlearn.memory.structures import activate, forward, layer_gradients
from nestlearn.nn.pointwise import gelu_and_slope, guard_rows, silu_and_slope, unit
from nestlearn.nn.presets import MemorySpec
from nestlearn.rules.chunk import ChunkWrite, dgd_chunk, steady, window_weights
from nestlearn.rules.gradient_write import ChunkGates, GradientWrite, damped_terms

Tensors = tuple[Tensor, ...]
Write = ChunkWrite | GradientWrite
ACTIVATIONS_AND_SLOPES = {"silu": silu_and_slope, "gelu": gelu_and_slope}
LOWEST_LOGIT = -30.0
MOMENTUM_FLOOR = 1e-4


@dataclass
class GradientCell:
    """The chunked write of `MemorySpec`'s rules "gradient" and "dgd".

    Memory tensors: the weights of all layers, then their momenta (if any), then the window's past
    keys, values, weights and rates (if any). Inputs: ``q, k, v`` and the spec's gates in order.

    Attributes:
        spec: the memory.
        objective: its inner objective.
        bounds: row-norm bound per layer, ``(..., out, 1)``; empty for none.
        chunk: tokens per write, C.
    """

    spec: MemorySpec
    objective: Objective
    bounds: Tensors
    chunk: int = field(init=False)

    def __post_init__(self) -> None:
        self.chunk = self.spec.chunk

    def read(self, memory: Tensors, inputs: Tensors, pending: Tensors) -> tuple[Tensors, Tensors]:
        """Answer the queries of tokens within one chunk; ``pending`` came before them in it."""
        query, written = inputs[0], inputs[1:]
        if self.spec.readout == "chunk":
            return (self._answer(memory, query),), written
        past = pending[0].shape[2] if pending else 0
        if past:
            seen = tuple(torch.cat(p, 2) for p in zip(pending, written, strict=True))
        else:
            seen = written
        return (self._answer_after(self._writes(memory, seen), query, past),), written

    def write(self, memory: Tensors, written: Tensors) -> Tensors:
        """The memory after the tokens of ``written``."""
        return self._finish(memory, self._writes(memory, written), written)

    def step(self, memory: Tensors, inputs: Tensors) -> tuple[Tensors, Tensors]:
        """Read and write one whole chunk, computing the write once."""
        query, written = inputs[0], inputs[1:]
        writes = self._writes(memory, written)
        if self.spec.readout == "chunk":
            out = self._answer(memory, query)
        else:
            out = self._answer_after(writes, query, 0)
        return (out,), self._finish(memory, writes, written)

    def read_only(self, memory: Tensors, query: Tensor, pending: Tensors) -> Tensor:
        """Answers of a frozen memory; tokens of an unfinished chunk count if they did before."""
        if pending and self.spec.readout == "token":
            memory = tuple(w.finish()[0] for w in self._writes(memory, pending))
        return self._answer(memory, query)

    def _layers(self, memory: Tensors) -> Tensors:
        """The weights themselves (for KL retention the memory holds their logarithms)."""
        weights = memory[: self.spec.depth]
        if self.spec.retention != "kl":
            return weights
        return tuple(math.sqrt(a.shape[-1]) * torch.softmax(a, -1) for a in weights)

    def _answer(self, memory: Tensors, query: Tensor) -> Tensor:
        return forward(self._layers(memory), query, self.spec.activation)

    def _answer_after(self, writes: list[Write], query: Tensor, first: int) -> Tensor:
        """``M_t(q_t)`` through all layers, each at its state after token t."""
        hidden = query
        for write in writes[:-1]:
            hidden = activate(self.spec.activation, write.read(hidden, first))
        out = writes[-1].read(hidden, first)
        return out + query if len(writes) > 1 else out

    def _writes(self, memory: Tensors, written: Tensors) -> list[Write]:
        """The write of every layer; `nestlearn.rules.gradient_write` unless the rule is "dgd"."""
        spec, depth = self.spec, self.spec.depth
        keys, values = written[0], written[1]
        gates = dict(zip(spec.gates, written[2:], strict=True))
        eta, length = gates["eta"], keys.shape[2]
        alpha, beta = gates.get("alpha"), gates.get("beta")
        momenta = memory[depth : 2 * depth] if spec.momentum else (None,) * depth
        past = spec.window - 1
        rate, share, weights = eta, None, None
        if past:
            keys, values, omega, rates = (
                torch.cat(pair, 2)
                for pair in zip(memory[-4:], (keys, values, gates["omega"], eta), strict=True)
            )
            # Every pair is in the sums of ``window`` tokens.
            rate = spec.window * omega * rates
            share = rate / (spec.window * rates).clamp(min=1e-20)
            weights = eta[..., None] * window_weights(length, past, torch.ones_like(rate))
        inputs, grads, answers = layer_gradients(
            self._layers(memory),
            keys,
            lambda y: self.objective.grad(y, values),
            ACTIVATIONS_AND_SLOPES[spec.activation],
        )
        gain = self._gain(beta, keys, values, answers)
        layers = zip(memory[:depth], inputs, grads, momenta, strict=True)
        if spec.rule == "dgd":
            alpha = torch.ones_like(eta) if alpha is None else alpha
            return [
                dgd_chunk(w, a, g, steady(eta, a, spec.chunk, gain), alpha, S=s, beta=beta)
                for w, a, g, s in layers
            ]
        shared = ChunkGates.of(eta, alpha, beta, weights, tokens=spec.readout == "token")
        count = torch.arange(1, past + length + 1, device=eta.device, dtype=eta.dtype)
        bend = (gain * ((spec.chunk + past) / count)).expand_as(rate)
        return [
            GradientWrite(w, s, a, damped_terms(a, g, rate, bend, share), shared)
            for w, a, g, s in layers
        ]

    def _gain(
        self, beta: Tensor | None, keys: Tensor, values: Tensor, answers: Tensor
    ) -> Tensor | float:
        """What multiplies a step's curvature: momentum repeats a step ``1/(1 - beta)`` times, and
        the objective may be steeper than l2. One per pair, or 1."""
        gain: Tensor | float = 1.0
        if beta is not None:
            gain = 1 / (1 + MOMENTUM_FLOOR - beta)
            past = keys.shape[2] - beta.shape[2]
            gain = torch.cat([gain[..., :1].expand(*gain.shape[:-1], past), gain], -1)
        if self.objective.curvature is not None:
            gain = gain * self.objective.curvature(answers, values)
        return gain

    def _finish(self, memory: Tensors, writes: list[Write], written: Tensors) -> Tensors:
        spec = self.spec
        after = [w.finish() for w in writes]
        new = [m for m, _ in after]
        if spec.retention == "kl":
            new = [torch.log_softmax(a, -1).clamp(min=LOWEST_LOGIT) for a in new]
        elif self.bounds:
            new = [guard_rows(w, b) for w, b in zip(new, self.bounds, strict=True)]
        if spec.momentum:
            momenta = [s for _, s in after if s is not None]
            if self.bounds:
                momenta = [guard_rows(s, b) for s, b in zip(momenta, self.bounds, strict=True)]
            new += momenta
        if spec.window > 1:
            gates = dict(zip(spec.gates, written[2:], strict=True))
            latest = (written[0], written[1], gates["omega"], gates["eta"])
            for past, value in zip(memory[-4:], latest, strict=True):
                new.append(torch.cat([past, value], 2)[:, :, -(spec.window - 1) :])
        return tuple(new)


def feature_map(name: str, x: Tensor, coefficients: Tensor | None = None) -> Tensor:
    """Feature map of queries and keys, then unit norm (SPEC §2: feature maps are a plug-in).

    ``x (B, H, T, d)`` has unit root-mean-square; coefficients ``(2, H, 1, d)`` for "polynomial".
    """
    if name == "elu1":
        x = F.elu(x) + 1
    elif name == "polynomial" and coefficients is not None:
        x = coefficients[0] * x + coefficients[1] * x.square()
    elif name == "quadratic":
        row, column = torch.triu_indices(x.shape[-1], x.shape[-1], device=x.device)
        x = torch.cat([x, x[..., row] * x[..., column] / math.sqrt(x.shape[-1])], -1)
    return unit(x)


def feature_size(name: str, size: int) -> int:
    """Features that `feature_map` makes of ``size`` inputs."""
    return size + size * (size + 1) // 2 if name == "quadratic" else size
