"""What boxes are called, and which of the things that were found are one box."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Sequence
from typing import Any

from nestlearn.lens.findings import FastBox
from nestlearn.levels.clock import NEVER
from nestlearn.levels.system import SHOWN

MemoryKey = tuple[str, str, int, int]
"""Of an optimizer's memory: name, optimizer, the optimizer's period, its own period."""


@dataclasses.dataclass(frozen=True)
class Kind:
    """Parameters with one of these are one box: all that is said of them is the same."""

    name: str
    objective: str
    period: int
    optimizer: str
    solver: str
    memories: tuple[str, ...]


def distinct(kind: Kind, kinds: Collection[Kind]) -> str:
    """The kind's name, with as much more as it takes to tell it from the others."""

    def said(k: Kind) -> tuple[str, ...]:
        kept = "with " + (", ".join(k.memories) or "no memory")
        return every(k.period), k.optimizer, kept, k.solver, k.objective

    same = [k for k in kinds if k.name == kind.name]
    words = []
    for i, word in enumerate(said(kind)):
        if any(said(k)[i] != word for k in same):
            words.append(word)
            same = [k for k in same if said(k)[i] == word]
    return f"{kind.name} ({', '.join(w for w in words if w)})" if words else kind.name


def memory_name(key: MemoryKey, keys: Sequence[MemoryKey]) -> str:
    name, optimizer, period, _ = key
    same = [k for k in keys if k[0] == name]
    words = []
    if len({k[1] for k in same}) > 1:
        words.append(optimizer)
    if len({k[2] for k in same if k[1] == optimizer}) > 1:
        words.append(every(period))
    return f"{name} ({', '.join(words)})" if words else name


def every(period: int) -> str:
    if period == NEVER:
        return "frozen"
    return f"every {period:,} steps" if period > 1 else "every step"


def alike(parts: list[FastBox]) -> list[list[FastBox]]:
    """Parts that differ in nothing but sizes and layers, together."""
    groups: dict[Any, list[FastBox]] = {}
    for part in parts:
        key = (part.objective, part.context, part.learns, part.rate, part.solver)
        groups.setdefault(key, []).append(part)
    return list(groups.values())


def total(numbers: Sequence[int | float | None]) -> int | None:
    known = [n for n in numbers if n is not None]
    return round(sum(known)) if len(known) == len(numbers) else None


def compressed(names: list[str]) -> tuple[str, ...]:
    """Of many names, those that differ in a layer's number only become one with a star.

    Example:
        >>> compressed([*(f"layers.{i}.up" for i in range(12)), "head"])
        ('layers.*.up', 'head')
    """
    if len(names) <= SHOWN:
        return tuple(names)
    patterns: dict[str, list[str]] = {}
    for name in names:
        pattern = re.sub(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.)", "*", name)
        patterns.setdefault(pattern, []).append(name)
    return tuple(p if len(own) > 1 else own[0] for p, own in patterns.items())
