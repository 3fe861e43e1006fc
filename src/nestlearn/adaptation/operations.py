"""Operations on memories: compare, merge, prune."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from nestlearn.adaptation.added import KEYS
from nestlearn.adaptation.completions import COMPLETIONS
from nestlearn.adaptation.memory import WRITTEN, Changes, Memory, with_rows


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
    (a_changes, b_changes), _ = _aligned([first, second])
    rows = []
    for name in dict.fromkeys((*a_changes, *b_changes)):
        a, b = a_changes.get(name, {}), b_changes.get(name, {})
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

    Added memories keep the pairs of all of them; where two have the same key its values are summed,
    and if there are more pairs than slots the weakest are left out. Readouts have what they would
    have after reading everything. Momenta and snapshots are not
    merged.

    Args:
        memories: of one base model and layout, with the same levels.
        weights: one for each, default 1.

    Raises:
        ValueError: nothing to merge, different layouts or levels, a wrong number of weights, or
            more completions than a readout has room for.
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
    aligned, keys = _aligned(memories)
    for one, share in zip(aligned, shares, strict=True):
        for name, own in one.items():
            for target, tensor in own.items():
                sums = changes[name]
                scaled = share * tensor
                sums[target] = sums[target] + scaled if target in sums else scaled
    if keys:
        _fit(changes, keys, memories[0].layout.shapes)
    counts: dict[str, int] = {}
    for memory in memories:
        for key, count in memory.counts.items():
            counts[key] = counts.get(key, 0) + count
    first = memories[0]
    return Memory(first.layout, first.levels, dict(first.fixed), changes, counts, model=first.model)


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
    for target, keys in result.changes.get(WRITTEN, {}).items():
        total = result.total(target.removesuffix(KEYS))
        if levels and (total is None or not total.any(-1).all()):
            held = keys.new_zeros(len(keys), 1) if total is None else with_rows(total, len(keys))
            taken = held.any(-1, keepdim=True)
            result.changes[WRITTEN][target] = keys * taken  # a slot without a value is free
    if result.optimizer is not None:
        state = {} if momenta else result.optimizer["state"]
        kept = {k: v for k, v in state.items() if k.split("/")[0] not in levels}
        result.optimizer = {**result.optimizer, "state": kept}
    return result


def _aligned(memories: Sequence[Memory]) -> tuple[list[Changes], dict[str, Tensor]]:
    """The levels' changes with equal keys in equal rows, and these keys.

    Values of added memories can only be compared, or summed, slot by slot of the same key. Other
    targets are as they were.
    """
    keys: dict[str, Tensor] = {}
    places: list[dict[str, Tensor]] = [{} for _ in memories]
    names = {t for m in memories for t in m.changes.get(WRITTEN, {})}
    for target in sorted(names):
        index: dict[bytes, int] = {}
        rows: list[Tensor] = []
        for memory, own in zip(memories, places, strict=True):
            written = memory.changes.get(WRITTEN, {}).get(target)
            if written is None:
                continue
            taken = written.any(-1).nonzero()[:, 0]
            found = []
            for i in taken.tolist():
                content = written[i].cpu().numpy().tobytes()
                if content not in index:
                    index[content] = len(rows)
                    rows.append(written[i])
                found.append(index[content])
            own[target] = torch.stack([taken, torch.tensor(found, dtype=torch.long)])
        keys[target] = torch.stack(rows) if rows else torch.zeros(0, 1)
    aligned: list[Changes] = []
    for memory, own in zip(memories, places, strict=True):
        changes: Changes = {}
        for level, targets in memory.changes.items():
            if level == WRITTEN:
                continue
            changes[level] = {}
            for name, tensor in targets.items():
                if name + KEYS in keys:
                    moved = tensor.new_zeros(len(keys[name + KEYS]), tensor.shape[1])
                    if name + KEYS in own:  # else it holds no pairs
                        from_rows, to_rows = own[name + KEYS]
                        held = with_rows(tensor, max(from_rows.tolist(), default=-1) + 1)
                        moved[to_rows] = held[from_rows]
                    tensor = moved
                changes[level][name] = tensor
        aligned.append(changes)
    return aligned, keys


def _fit(
    changes: Changes, keys: dict[str, Tensor], shapes: dict[str, tuple[int, ...]]
) -> None:  # fmt: skip
    """Put aligned values back into as many slots as there are, the strongest pairs first."""
    written = changes.setdefault(WRITTEN, {})
    for target, found in keys.items():
        name = target.removesuffix(KEYS)
        levels = [own for own in changes.values() if name in own]
        slots, size = shapes[target]
        if name == COMPLETIONS and len(found) > slots:
            raise ValueError(
                f"together they hold {len(found)} completions, there is room for {slots}"
            )
        strength = sum((own[name] for own in levels), torch.zeros(1, 1)).norm(dim=-1)
        if len(found):
            strength = strength.expand(len(found)) * found.norm(dim=-1)
        kept = strength[: len(found)].argsort(descending=True, stable=True)[:slots].sort().values
        written[target] = found[kept] if len(kept) else torch.zeros(1, size)
        for own in levels:
            own[name] = own[name][kept] if len(kept) else own[name].new_zeros(1, *shapes[name][1:])


def _require_same(memories: Sequence[Memory]) -> None:
    for i, memory in enumerate(memories[1:], 2):
        why = memories[0].layout.difference(memory.layout)
        if why is not None:
            raise ValueError(f"memory {i} cannot be compared with the first: {why}")


def _dot(x: Tensor | None, y: Tensor | None) -> float:
    if x is None or y is None:
        return 0.0
    return torch.dot(x.flatten().double().cpu(), y.flatten().double().cpu()).item()
