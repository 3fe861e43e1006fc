"""What is added to a model: memories beside its MLPs, and what a row of a batch has of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nestlearn.adaptation.memory import Memory

if TYPE_CHECKING:
    from nestlearn.adaptation.attach import Adaptation

CHILD = "nestlearn"
"""Name of an added memory within the linear map that it is beside."""


class AddedMemory(nn.Module):
    """An associative memory beside the last linear map of an MLP: ``y + V K h`` (Eq. 74).

    h is the MLP's hidden activation, K are keys that stay as they are, V the values that are
    learned: the sum of all levels' values, which share the keys.

    Args:
        keys: K ``(r, H)``.
        width: D.
        like: type and device come from this weight.
    """

    keys: Tensor

    def __init__(self, keys: Tensor, width: int, like: Tensor) -> None:
        super().__init__()
        # Not in the model's own files: keys belong to the memory and are stored with it.
        self.register_buffer("keys", keys.to(like), persistent=False)
        self.values = nn.Parameter(torch.zeros(width, len(keys)).to(like))

    def forward(self, h: Tensor) -> Tensor:
        """``V K h``: ``(..., H)`` to ``(..., D)``."""
        return F.linear(F.linear(h, self.keys), self.values)


@dataclasses.dataclass
class Target:
    """A weight that levels change: ``W = W_0 + sum of the levels' changes``.

    Attributes:
        weight: W, the parameter that the model computes with.
        base: W_0, or None for zero.
        levels: names of the levels that change it.
        module: the linear map it belongs to.
    """

    weight: nn.Parameter
    base: Tensor | None
    levels: tuple[str, ...]
    module: nn.Module


class Hook:
    """What is added to a linear map's output; a class, so that models can be copied and pickled."""

    def __init__(self, handle: Adaptation, name: str) -> None:
        self.handle, self.name = handle, name

    def __call__(
        self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor
    ) -> Tensor | None:
        rows = self.handle.in_rows
        if rows is not None:
            return output + rows[self.name](inputs[0])
        memory = module._modules.get(CHILD)
        if memory is None or not self.handle.active:
            return None
        return output + memory(inputs[0])


class Rows:
    """Changes of one target, a row each: ``x (B, T, in)`` to ``(B, T, out)``."""

    def __init__(self, changes: Tensor, keys: Tensor | None, transposed: bool) -> None:
        self.changes, self.keys, self.transposed = changes, keys, transposed

    def __call__(self, x: Tensor) -> Tensor:
        flat = x if x.ndim == 3 else x.reshape(len(self.changes), -1, x.shape[-1])
        if len(flat) != len(self.changes):
            raise ValueError(
                f"rows() was given {len(self.changes)} memories, the batch has {len(flat)} rows"
            )
        if self.keys is not None:
            flat = flat @ self.keys.mT
        y = flat @ (self.changes if self.transposed else self.changes.mT)
        return y.reshape(*x.shape[:-1], y.shape[-1])


def stack_rows(name: str, target: Target, memories: Sequence[Memory | None]) -> Rows:
    weight = target.weight
    empty = torch.zeros_like(weight, requires_grad=False)

    def change(memory: Memory | None) -> Tensor:
        total = None if memory is None else memory.total(name)
        return empty if total is None else total.to(weight)

    keys = None
    if target.base is None:
        own: AddedMemory = target.module._modules[CHILD]  # type: ignore[assignment]
        keys = torch.stack([own.keys if m is None else m.keys[name].to(weight) for m in memories])
    transposed = target.base is not None and not isinstance(target.module, nn.Linear)
    return Rows(torch.stack([change(m) for m in memories]), keys, transposed)


def refresh(target: Target, changes: Sequence[Tensor]) -> None:
    """``W = W_0 + sum(changes)``, summed in float32 and rounded once."""
    weight = target.weight
    if not changes:
        if target.base is None:
            weight.zero_()
        else:
            weight.copy_(target.base)
        return
    total = changes[0] if len(changes) == 1 else torch.stack(list(changes)).sum(0)
    if target.base is not None:
        total = target.base.to(total) + total.to(target.base.device)
    weight.copy_(total)
