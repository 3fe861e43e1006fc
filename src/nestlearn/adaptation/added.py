"""What is added to a model: associative memories beside its MLPs, and rows of a batch of their own.

A memory holds pairs of keys and values. The keys are written while the model reads: what an MLP's
hidden activation looked like where something was to be learned. A value is added to the MLP's
output wherever the activation looks alike again, and nowhere else: text that resembles nothing
that was read is computed as before.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nestlearn.adaptation.memory import WRITTEN, Memory, sum_of, used_rows, with_rows

if TYPE_CHECKING:
    from nestlearn.adaptation.adapted import Adaptation

CHILD = "nestlearn"
"""Name of an added memory within the linear map that it is beside."""
KEYS = ".keys"
"""Suffix of the target that a memory's keys are, beside its values."""
NEAR = 0.6
"""Cosine above which a key answers."""
SAME = 0.95
"""Cosine above which two places share a slot."""


class AddedMemory(nn.Module):
    """An associative memory beside the last linear map of an MLP (Eq. 74).

        k = P h / |P h|
        a_i = max(0, cos(k, K_i) - c) / (1 - c),   a <- a / max(1, sum a)
        y + sum_i a_i |K_i| V_i

    h is the MLP's hidden activation, P a fixed map that turns down what all text has in common
    (`nestlearn.adaptation.keys`), K_i a key that was written, V_i the value that is learned for it:
    the sum of all levels' values, which share the keys. A key's length is the size of the MLP's
    output where it was written, so that a value of 1 in every entry changes y by its own size.
    A slot whose key is zero is free.

    Args:
        projection: P ``(r, H)``.
        slots: n, keys at most.
        width: D.
        like: type and device come from this weight.
    """

    projection: Tensor

    def __init__(self, projection: Tensor, slots: int, width: int, like: Tensor) -> None:
        super().__init__()
        # Not in the model's own files: they belong to the memory and are stored with it.
        self.register_buffer("projection", projection.to(like), persistent=False)
        # Zeros take no memory on a CPU until they are written to.
        empty: dict[str, Any] = {"dtype": like.dtype, "device": like.device}
        keys = torch.zeros(slots, len(projection), **empty)
        self.keys = nn.Parameter(keys, requires_grad=False)
        self.values = nn.Parameter(torch.zeros(slots, width, **empty))
        self.prepare()

    @torch.no_grad()
    def prepare(self, rows: int | None = None) -> None:
        """To be called when the keys have changed: directions and lengths of those in use, which
        are among the first ``rows`` (default: anywhere)."""
        used = used_rows(self.keys[:rows])
        self.directions = F.normalize(self.keys[:used], dim=-1)
        self.lengths = self.keys[:used].norm(dim=-1)

    def key(self, h: Tensor) -> Tensor:
        """k: ``(..., H)`` to ``(..., r)``, of length 1."""
        return F.normalize(F.linear(h, self.projection), dim=-1)

    def forward(self, h: Tensor) -> Tensor:
        """What is added: ``(..., H)`` to ``(..., D)``."""
        return self.answers(self.key(h)) @ self.values[: len(self.lengths)]

    def answers(self, key: Tensor) -> Tensor:
        """``a_i |K_i|`` of the slots up to the last one in use: ``(..., r)`` to ``(..., used)``."""
        return answers(key, self.directions, self.lengths)

    def gradient(self, key: Tensor, error: Tensor) -> Tensor:
        """``dL/dV = sum_t a(k_t) |K| (dL/dy_t)^T`` of the slots up to the last one in use:
        ``(N, r)`` and ``(N, D)`` to ``(used, D)``."""
        return self.answers(key).mT.float() @ error.float()


def answers(key: Tensor, directions: Tensor, lengths: Tensor) -> Tensor:
    """``a_i |K_i|`` for keys ``(..., r)``, directions ``(..., n, r)`` and lengths ``(..., n)``."""
    near = ((key @ directions.mT - NEAR) / (1 - NEAR)).clamp(min=0)
    near = near / near.sum(-1, keepdim=True).clamp(min=1)
    return near * (lengths if lengths.ndim == 1 else lengths[:, None])


@dataclasses.dataclass
class Target:
    """A tensor that memories hold changes of: ``W = W_0 + sum of the levels' changes``.

    Attributes:
        weight: W, what the model computes with.
        base: W_0, or None for zero.
        levels: names of the levels that change it.
        module: the module it belongs to.
        in_slots: whether its rows are slots that are filled one by one: a change may have fewer.
    """

    weight: nn.Parameter
    base: Tensor | None
    levels: tuple[str, ...]
    module: nn.Module
    in_slots: bool = False


@dataclasses.dataclass
class Seen:
    """What passed an added memory.

    Attributes:
        key: k ``(N, r)`` of every place.
        size: root mean square of the MLP's output, a number or ``()``.
        answer: zeros that were added to the output, ``(..., D)``; the loss is differentiated by
            them.
    """

    key: Tensor
    size: Tensor | float
    answer: Tensor


class Hook:
    """What is added to a linear map's output; a class, so that models can be copied and pickled."""

    def __init__(self, handle: Adaptation, name: str) -> None:
        self.handle, self.name = handle, name

    def __call__(
        self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor
    ) -> Tensor | None:
        rows = self.handle.in_rows
        if rows is not None:
            own = rows[self.name]
            assert isinstance(own, Rows)
            return output + own(inputs[0])
        memory = module._modules.get(CHILD)
        if not isinstance(memory, AddedMemory) or not self.handle.active:
            return None
        if self.handle.seen is not None:
            answer = torch.zeros_like(output, requires_grad=True)
            size = output.detach().float().square().mean().sqrt()
            key = memory.key(inputs[0].detach()).flatten(0, -2)
            self.handle.seen[self.name] = Seen(key, size, answer)
            output = output + answer
        elif not self.handle.holds and not torch.is_grad_enabled():
            return None
        return output + memory(inputs[0])


class Rows:
    """Changes of one target, a row each: ``x (B, T, in)`` to ``(B, T, out)``."""

    def __init__(
        self,
        changes: Tensor,
        transposed: bool,
        keys: Tensor | None = None,
        projections: Tensor | None = None,
    ) -> None:
        self.changes, self.transposed = changes, transposed
        self.keys, self.projections = keys, projections

    def __call__(self, x: Tensor) -> Tensor:
        flat = x if x.ndim == 3 else x.reshape(len(self.changes), -1, x.shape[-1])
        if len(flat) != len(self.changes):
            raise ValueError(
                f"rows() was given {len(self.changes)} memories, the batch has {len(flat)} rows"
            )
        if self.keys is not None and self.projections is not None:
            key = F.normalize(flat @ self.projections.mT, dim=-1)
            flat = answers(key, F.normalize(self.keys, dim=-1), self.keys.norm(dim=-1))
        y = flat @ (self.changes if self.transposed else self.changes.mT)
        return y.reshape(*x.shape[:-1], y.shape[-1])


def stack_rows(name: str, targets: dict[str, Target], memories: Sequence[Memory | None]) -> Rows:
    """What `Rows` needs for a target, row i from the i-th memory (None: no change)."""
    target = targets[name]

    def stack(part: str, rows: int) -> Tensor:
        weight = targets[part].weight
        empty = weight.new_zeros(rows, *weight.shape[1:])
        found = [None if m is None else m.total(part) for m in memories]
        return torch.stack([empty if t is None else with_rows(t.to(weight), rows) for t in found])

    if not target.in_slots:
        return Rows(stack(name, len(target.weight)), not isinstance(target.module, nn.Linear))
    written = [m.changes.get(WRITTEN, {}).get(name + KEYS) for m in memories if m is not None]
    used = max((used_rows(keys) for keys in written if keys is not None), default=0)
    own = memory_of(target).projection
    projections = [own if m is None else m.fixed[name].to(own) for m in memories]
    return Rows(stack(name, used), True, stack(name + KEYS, used), torch.stack(projections))


def memory_of(target: Target) -> AddedMemory:
    """The added memory that a target is part of."""
    memory = target.module._modules[CHILD]
    assert isinstance(memory, AddedMemory)
    return memory


def refresh(target: Target, changes: Sequence[Tensor]) -> None:
    """``W = W_0 + sum(changes)``, summed in float32 and rounded once.

    Of an added memory only the rows that the changes have are written.
    """
    weight = target.weight
    if not changes:
        if target.base is None:
            clear(weight)
        else:
            weight.copy_(target.base)
        return
    total = sum_of(changes)
    if target.base is not None:
        total = target.base.to(total) + total.to(target.base.device)
    weight[: len(total)].copy_(total)


def clear(weight: Tensor) -> None:
    """Set to zero what is not: zeros that were never written to take no memory."""
    if weight.any():
        weight.zero_()
