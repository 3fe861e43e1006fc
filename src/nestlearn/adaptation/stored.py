"""What a memory file stores, and in how few bytes: plans that fit a budget, and their tensors."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from nestlearn.adaptation.codec import encode, rank_of, size_of
from nestlearn.adaptation.keys import quantise
from nestlearn.adaptation.memory import Changes, Memory
from nestlearn.adaptation.readout import TARGET as READOUT
from nestlearn.files import pack

_ROOM = 16384  # bytes kept free for the header when a budget is met
_RANKS = (64, 48, 32, 24, 16, 12, 8, 6, 4, 3, 2, 1)


@dataclasses.dataclass(frozen=True)
class Stored:
    """How a file was written, and what it left out to stay within its budget.

    Attributes:
        storage: of the levels' changes.
        optimizer: whether momenta and open accumulators are in it.
        snapshots: how many.
        nbytes: size of the file.
    """

    storage: str
    optimizer: bool
    snapshots: int
    nbytes: int

    def __str__(self) -> str:
        parts = [f"{self.nbytes / 1e6:.2f} MB", self.storage]
        parts.append("with momenta" if self.optimizer else "without momenta")
        parts.append(f"{self.snapshots} snapshot{'s' if self.snapshots != 1 else ''}")
        return ", ".join(parts)


def plan_for(memory: Memory, limit: int | None) -> Stored:
    """The most faithful way to store that fits."""
    for plan in _plans(memory):
        if limit is None or plan.nbytes + _ROOM <= limit:
            return plan
    least = list(_plans(memory))[-1]
    raise ValueError(
        f"this memory needs at least {least.nbytes + _ROOM} bytes ({least.storage}), the budget is "
        f"{limit}; adapt with fewer blocks, a smaller rank or fewer levels"
    )


def smaller(plan: Stored, limit: int) -> Stored:
    """The next smaller rank, where names and counts took more room than expected."""
    if plan.storage == "rank:1":
        raise ValueError(f"this memory does not fit into {limit} bytes even at rank 1")
    rank = rank_of(plan.storage) if plan.storage.startswith("rank:") else _RANKS[0] + 1
    following = next(r for r in _RANKS if r < rank)
    return dataclasses.replace(plan, storage=f"rank:{following}", optimizer=False, snapshots=0)


def _plans(memory: Memory) -> Iterator[Stored]:
    """Ways to store, from the most faithful to the smallest, with their sizes."""
    tensors: dict[str, Tensor] = {}
    pack(_cut_state(memory.optimizer), tensors)
    momenta = sum(t.nbytes for t in tensors.values())
    count = len(memory.snapshots)

    fixed = sum(k.numel() + 4 * len(k) for k in memory.fixed.values())
    # Of what is there now, and of the snapshots, oldest first.
    current, *earlier = (
        [tuple(_trimmed(target, t).shape) for own in changes.values() for target, t in own.items()]
        for changes in (memory.changes, *(s.changes for s in memory.snapshots))
    )

    def size(storage: str, snapshots: int) -> int:
        kept = (current, *earlier[count - snapshots :])
        return fixed + sum(size_of(shape, storage) for shapes in kept for shape in shapes)

    if memory.layout.method == "readout":  # rounded sums would have no exact solution
        for kept in range(count, -1, -1):
            yield Stored("float32", True, kept, size("float32", kept) + momenta)
        return
    for storage in ("float32", "bfloat16"):
        yield Stored(storage, True, count, size(storage, count) + momenta)
    yield Stored("bfloat16", False, count, size("bfloat16", count))
    for kept in range(count, -1, -1):
        yield Stored("int8", False, kept, size("int8", kept))
    for rank in _RANKS:
        yield Stored(f"rank:{rank}", False, 0, size(f"rank:{rank}", 0))


def content_of(memory: Memory, plan: Stored) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a file, and the description of what they are."""
    tensors: dict[str, Tensor] = {}
    kept = memory.snapshots[len(memory.snapshots) - plan.snapshots :]
    optimizer = _cut_state(memory.optimizer) if plan.optimizer else _no_state(memory.optimizer)
    content = {
        "model": memory.model,
        "created": memory.created,
        "layout": {
            **dataclasses.asdict(memory.layout),
            "shapes": {n: list(s) for n, s in memory.layout.shapes.items()},
        },
        "levels": [dataclasses.asdict(level) for level in memory.levels],
        "counts": memory.counts,
        "storage": plan.storage,
        "fixed": list(memory.fixed),
        "changes": _store(memory.changes, "changes", plan.storage, tensors),
        "snapshots": [
            {
                "label": s.label,
                "created": s.created,
                "counts": s.counts,
                "changes": _store(s.changes, f"snapshots.{i}", plan.storage, tensors),
            }
            for i, s in enumerate(kept)
        ],
    }
    for name, one in memory.fixed.items():
        tensors[f"fixed/{name}"], tensors[f"fixed/{name}/scale"] = quantise(one.cpu())
    content["optimizer"] = pack(optimizer, tensors, "optimizer.")
    return tensors, content


def _no_state(optimizer: dict[str, Any] | None) -> dict[str, Any] | None:
    return None if optimizer is None else {**optimizer, "state": {}}


def _cut(tensor: Tensor) -> Tensor:
    """Without the zero rows at the end, which slots that are free are; one row at least."""
    taken = tensor.flatten(1).any(-1) if tensor.ndim > 1 else tensor != 0
    last = int(taken.nonzero()[-1]) if taken.any() else 0
    return tensor[: last + 1]


def _cut_state(optimizer: dict[str, Any] | None) -> dict[str, Any] | None:
    if optimizer is None:
        return None
    state = {
        name: {k: _cut(v) if isinstance(v, Tensor) and v.ndim else v for k, v in own.items()}
        for name, own in optimizer["state"].items()
    }
    return {**optimizer, "state": state}


def padded(tensor: Tensor, rows: int) -> Tensor:
    """`_cut` undone."""
    if not 1 <= len(tensor) <= rows:
        raise ValueError(f"{len(tensor)} rows where there are {rows}")
    return torch.cat([tensor, tensor.new_zeros(rows - len(tensor), *tensor.shape[1:])])


def _store(
    changes: Changes, prefix: str, storage: str, tensors: dict[str, Tensor]
) -> dict[str, dict[str, int]]:
    """Put changes into ``tensors``; returns level -> target -> rows that are stored."""
    rows: dict[str, dict[str, int]] = {level: {} for level in changes}
    for i, (level, own) in enumerate(changes.items()):
        for target, tensor in own.items():
            trimmed = _trimmed(target, tensor)
            rows[level][target] = len(trimmed)
            for part, stored in encode(trimmed, storage).items():
                tensors[key_of(prefix, i, target, part)] = stored
    return rows


def _trimmed(target: str, tensor: Tensor) -> Tensor:
    """What a file has of a change: one triangle of what is symmetric, no zero rows at the end."""
    return _cut(fold(tensor) if folds(target) else tensor)


def folds(target: str) -> bool:
    """Whether a target holds two symmetric matrices, of which a file has one triangle each."""
    return target == READOUT


def fold(sums: Tensor) -> Tensor:
    """A readout's ``[A; B; C] (2r + m, r)``, A and C symmetric, as ``[A below and C above the
    diagonal; diagonal of C; B] (r + 1 + m, r)``."""
    size = sums.shape[1]
    first, between, second = sums[:size], sums[size:-size], sums[-size:]
    return torch.cat([first.tril() + second.triu(1), second.diagonal()[None], between])


def folded_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of what `fold` makes (ValueError: not of a readout)."""
    if len(shape) != 2 or shape[0] < 2 * shape[1]:
        raise ValueError(f"a readout of shape {shape}")
    return (shape[0] - shape[1] + 1, shape[1])


def unfold(folded: Tensor) -> Tensor:
    """`fold` undone."""
    size = folded.shape[1]
    lower, upper = folded[:size].tril(), folded[:size].triu(1)
    first = lower + lower.tril(-1).mT
    second = upper + upper.mT + folded[size].diag()
    return torch.cat([first, folded[size + 1 :], second])


def key_of(prefix: str, level: int, target: str, part: str) -> str:
    """Name of a stored part of a change."""
    return f"{prefix}/{level}/{target}" + (f"/{part}" if part else "")


def digest(text: str, tensors: dict[str, Tensor]) -> str:
    """Checksum over the description and all tensors, in hexadecimal digits."""
    found = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        found.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        if tensor.numel():
            found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
