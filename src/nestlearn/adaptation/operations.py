"""Operations on memories: compare, merge, prune. All are linear in what was learned."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from nestlearn.adaptation.memory import Changes, Memory


@dataclasses.dataclass(frozen=True)
class Difference:
    """How two memories differ in one level.

    Attributes:
        level: its name.
        first, second: norms of the level's changes in both.
        distance: norm of their difference.
        cosine: of the angle between them; NaN where one is zero.
    """

    level: str
    first: float
    second: float
    distance: float
    cosine: float


def diff(first: Memory, second: Memory) -> list[Difference]:
    """Compare two memories, level by level.

    Raises:
        ValueError: they belong to different models or layouts.
    """
    _require_same([first, second])
    rows = []
    for name in dict.fromkeys((*first.changes, *second.changes)):
        a, b = first.changes.get(name, {}), second.changes.get(name, {})
        squares = {"aa": 0.0, "bb": 0.0, "ab": 0.0}
        for target in {*a, *b}:
            x, y = a.get(target), b.get(target)
            squares["aa"] += _dot(x, x)
            squares["bb"] += _dot(y, y)
            squares["ab"] += _dot(x, y)
        norms = math.sqrt(squares["aa"]), math.sqrt(squares["bb"])
        distance = math.sqrt(max(0.0, squares["aa"] + squares["bb"] - 2 * squares["ab"]))
        cosine = squares["ab"] / (norms[0] * norms[1]) if min(norms) > 0 else math.nan
        rows.append(Difference(name, *norms, distance, cosine))
    return rows


def merge(memories: Sequence[Memory], weights: Sequence[float] | None = None) -> Memory:
    """The weighted sum of what memories learned, level by level.

    The sum of everything is what a model has learned that read all of it in parallel. Momenta and
    snapshots are not merged.

    Args:
        memories: of one base model and layout, with the same levels.
        weights: one for each, default 1.

    Raises:
        ValueError: nothing to merge, different layouts or levels, or a wrong number of weights.
    """
    if len(memories) < 2:
        raise ValueError(f"merging needs two memories or more, got {len(memories)}")
    _require_same(memories)
    if any(m.names != memories[0].names for m in memories):
        raise ValueError(f"the levels differ: {', '.join(str(list(m.names)) for m in memories)}")
    shares = [1.0] * len(memories) if weights is None else list(weights)
    if len(shares) != len(memories) or not all(map(math.isfinite, shares)):
        raise ValueError(f"{len(memories)} memories need as many finite weights, got {shares}")
    changes: Changes = {name: {} for name in memories[0].names}
    for memory, share in zip(memories, shares, strict=True):
        for name, own in memory.changes.items():
            for target, tensor in own.items():
                sums = changes[name]
                scaled = share * tensor
                sums[target] = sums[target] + scaled if target in sums else scaled
    counts: dict[str, int] = {}
    for memory in memories:
        for key, count in memory.counts.items():
            counts[key] = counts.get(key, 0) + count
    first = memories[0]
    return Memory(first.layout, first.levels, dict(first.keys), changes, counts, model=first.model)


def prune(
    memory: Memory,
    *,
    snapshots: int | None = None,
    momenta: bool = False,
    levels: Collection[str] = (),
) -> Memory:
    """A smaller memory.

    Args:
        memory: stays as it is.
        snapshots: keep only so many of the newest.
        momenta: drop the optimizers' states but for the clocks.
        levels: names of levels whose knowledge is dropped.

    Raises:
        ValueError: a level that the memory does not have.
    """
    unknown = set(levels) - set(memory.names)
    if unknown:
        raise ValueError(f"no level {sorted(unknown)[0]!r}; there are: {', '.join(memory.names)}")
    result = memory.copy()
    if snapshots is not None:
        if snapshots < 0:
            raise ValueError(f"snapshots must be 0 or more, got {snapshots}")
        del result.snapshots[: max(0, len(result.snapshots) - snapshots)]
    for name in levels:
        result.changes[name] = {}
    if result.optimizer is not None:
        state = {} if momenta else result.optimizer["state"]
        kept = {k: v for k, v in state.items() if k.split("/")[0] not in levels}
        result.optimizer = {**result.optimizer, "state": kept}
    return result


def _require_same(memories: Sequence[Memory]) -> None:
    for i, memory in enumerate(memories[1:], 2):
        why = memories[0].layout.difference(memory.layout)
        if why is not None:
            raise ValueError(f"memory {i} cannot be compared with the first: {why}")


def _dot(x: Tensor | None, y: Tensor | None) -> float:
    if x is None or y is None:
        return 0.0
    return torch.dot(x.flatten().double().cpu(), y.flatten().double().cpu()).item()
