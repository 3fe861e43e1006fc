"""The memory file: one safetensors file with all that was learned (docs/memory-file.md).

Nothing in it is executed: it is numbers, and JSON that is checked field by field. What was cut off,
altered or made for another model is refused before anything is changed.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nestlearn.adaptation.added import KEYS
from nestlearn.adaptation.codec import decode, part_names
from nestlearn.adaptation.completions import COMPLETIONS, check_rows
from nestlearn.adaptation.fingerprint import fingerprint
from nestlearn.adaptation.memory import Changes, Layout, Memory, Snapshot
from nestlearn.adaptation.stored import (
    Stored,
    content_of,
    digest,
    folded_shape,
    folds,
    key_of,
    padded,
    plan_for,
    smaller,
    unfold,
)
from nestlearn.files import save_tensors, unpack
from nestlearn.levels.level import Level

FORMAT = "nestlearn-memory"
VERSION = 1
SUFFIX = ".nlmem"
_NAME = re.compile(r"[\w .:+-]{1,100}")
_TARGET = re.compile(r"[\w.]{1,300}")
_LARGEST = 1 << 31  # numbers in one tensor
_MOST = 1 << 33  # numbers in all tensors of a file


def write_memory(memory: Memory, path: str | Path, max_bytes: int | None = None) -> Stored:
    """Write a memory file; a file that was there stays whole until the new one is.

    Args:
        memory: what to store.
        path: ``*.nlmem``.
        max_bytes: the file's largest size. Without it everything is stored exactly, and learning
            goes on bit for bit. With it, the first of these that fits is taken: everything exact;
            changes in bfloat16; without momenta; with fewer snapshots; changes in int8; changes of
            lower and lower rank. A readout is stored exactly, if need be with fewer snapshots.

    Returns:
        what was stored how.

    Raises:
        ValueError: even rank 1 does not fit, or another suffix.
        OSError: the file cannot be written; the old one is as it was.
    """
    path = Path(path)
    check_path(path)
    plan = plan_for(memory, max_bytes)
    while True:
        tensors, content = content_of(memory, plan)
        text = json.dumps(content, separators=(",", ":"))
        metadata = {"format": FORMAT, "version": str(VERSION), "content": text}
        metadata["sha256"] = digest(text, tensors)
        size = sum(t.nbytes for t in tensors.values()) + len(json.dumps(metadata)) + 8
        size += sum(len(n) + 90 for n in tensors)
        if max_bytes is None or size <= max_bytes:
            break
        plan = smaller(plan, max_bytes)  # names and counts took more than was kept free
    save_tensors(tensors, path, metadata)
    return dataclasses.replace(plan, nbytes=path.stat().st_size)


def check_path(path: Path) -> None:
    """Whether a memory file can be written there (ValueError otherwise)."""
    if path.suffix != SUFFIX:
        raise ValueError(f"a memory file is named *{SUFFIX}, got {path.name!r}")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"no folder {path.absolute().parent}; create it first")


def read_memory(path: str | Path, layout: Layout | None = None) -> Memory:
    """Read and verify a memory file.

    Args:
        path: the file.
        layout: what it must fit; checked before any of its tensors is unpacked.

    Raises:
        ValueError: no memory file, damaged, of a newer version, or not for ``layout``; the message
            says which.
        OSError: the file cannot be read.
    """
    path = Path(path)
    with path.open("rb"):  # a missing file is the system's error, with its name
        pass
    try:
        with safe_open(path, framework="pt") as file:
            content = _read_content(path, file.metadata() or {})
            stored = {name: file.get_tensor(name) for name in list(file.keys())}
            if digest(file.metadata()["content"], stored) != file.metadata().get("sha256"):
                raise ValueError(f"{path} is damaged (its checksum does not match)")
    except SafetensorError as error:
        raise ValueError(
            f"{path} is no memory file, or was cut off ({error}); nothing was loaded"
        ) from error
    try:
        return _memory(content, stored, layout)
    except _Misfit as error:
        raise ValueError(f"{path} does not fit: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RecursionError) as error:
        raise ValueError(
            f"{path} is damaged or was not written by nestlearn ({type(error).__name__}: {error}); "
            "nothing was loaded"
        ) from error


class _Misfit(Exception):
    """The file is sound, but belongs to something else."""


def _read_content(path: Path, metadata: dict[str, str]) -> dict[str, Any]:
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} is a safetensors file, but no memory file of nestlearn")
    version = metadata.get("version", "")
    if not version.isdecimal() or int(version) > VERSION:
        raise ValueError(
            f"{path} has format version {version!r:.20}, this nestlearn reads up to {VERSION}; "
            "install a newer one"
        )
    try:
        content = json.loads(metadata["content"])
    except (KeyError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged (its description cannot be read)") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged (its description is no object)")
    return content


# -- what is read -----------------------------------------------------------------------------


def _memory(content: dict[str, Any], stored: dict[str, Tensor], expected: Layout | None) -> Memory:
    layout = _layout(content["layout"])
    if expected is not None and (why := expected.difference(layout)) is not None:
        raise _Misfit(why)
    fields = {f.name for f in dataclasses.fields(Level)}
    levels = tuple(Level(**_only(own, fields)) for own in _list(content["levels"]))
    snapshots = [
        Snapshot(
            _text(s["label"]),
            _number(s["created"]),
            _changes(s["changes"], f"snapshots.{i}", content["storage"], layout, stored),
            _counts(s["counts"]),
        )
        for i, s in enumerate(_list(content["snapshots"]))
    ]
    optimizer = unpack(content["optimizer"], stored)
    if optimizer is not None and not isinstance(optimizer, dict):
        raise ValueError("the optimizer's state is no dictionary")
    for name, own in (optimizer or {"state": {}})["state"].items():
        target = name.split("/", 1)[1]
        rows = layout.shapes[target][0]
        for key, value in own.items():
            if isinstance(value, Tensor) and value.ndim and not layout.in_slots(target):
                own[key] = padded(value, rows)
    return Memory(
        layout,
        levels,
        _fixed(content["fixed"], layout, stored),
        _changes(content["changes"], "changes", content["storage"], layout, stored),
        _counts(content["counts"]),
        optimizer,
        snapshots,
        _text(content["model"]),
        _number(content["created"]),
    )


def _fixed(given: list[str], layout: Layout, stored: dict[str, Tensor]) -> dict[str, Tensor]:
    fixed = {}
    for name in _list(given):
        shape = tuple(stored[f"fixed/{name}"].shape)
        if name not in layout.shapes or len(shape) != 2 or shape[0] != layout.rank:
            raise ValueError(f"{name!r:.60} has the fixed shape {shape}")
        parts = {"int8": stored[f"fixed/{name}"], "scale": stored[f"fixed/{name}/scale"]}
        fixed[name] = decode(parts, "int8", shape)
    if (fingerprint(fixed) if fixed else "") != layout.fixed:
        raise ValueError("what never changes is not that of the layout")
    return fixed


def _layout(given: dict[str, Any]) -> Layout:
    shapes = {}
    total = 0
    for name, shape in given["shapes"].items():
        sizes = tuple(_list(shape))
        if not _TARGET.fullmatch(name) or not 1 <= len(sizes) <= 4:
            raise ValueError(f"a target {name!r:.60} of shape {shape!r:.60}")
        if not all(type(n) is int and n > 0 for n in sizes) or math.prod(sizes) > _LARGEST:
            raise ValueError(f"target {name} has the shape {shape!r:.60}")
        total += math.prod(sizes)
        shapes[name] = sizes
    if total > _MOST:
        raise ValueError(f"{total} numbers in all")
    rank = given["rank"]
    if type(rank) is not int or rank < 0:
        raise ValueError(f"rank {rank!r:.20}")
    base, method, fixed = (_text(given[field]) for field in ("base", "method", "fixed"))
    return Layout(base, method, rank, fixed, shapes)


def _changes(
    given: dict[str, dict[str, int]],
    prefix: str,
    storage: str,
    layout: Layout,
    stored: dict[str, Tensor],
) -> Changes:
    changes: Changes = {}
    for i, (level, targets) in enumerate(given.items()):
        if not _NAME.fullmatch(level):
            raise ValueError(f"a level named {level!r:.60}")
        own = changes.setdefault(level, {})
        for target, rows in targets.items():
            shape = layout.shapes[target]
            if folds(target):
                shape = folded_shape(shape)
            if type(rows) is not int or not 1 <= rows <= shape[0]:
                raise ValueError(f"{target} has {rows!r:.20} rows")
            parts = {n: stored[key_of(prefix, i, target, n)] for n in part_names(storage)}
            own[target] = decode(parts, storage, (rows, *shape[1:]))
            if not layout.in_slots(target):  # else slots without rows are free
                own[target] = padded(own[target], shape[0])
            if folds(target):
                own[target] = unfold(own[target])
            if target == COMPLETIONS + KEYS:
                check_rows(own[target])
            if not torch.isfinite(own[target]).all():
                raise ValueError(f"{target} of level {level} holds numbers that are not finite")
    return changes


def _only(given: dict[str, Any], allowed: set[str]) -> dict[str, Any]:
    unknown = set(given) - allowed
    if unknown:
        raise ValueError(f"unknown settings of a level: {sorted(unknown)!r:.80}")
    return given


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"expected a list, got {type(value).__name__}")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str) or len(value) > 1000:
        raise ValueError(f"expected text, got {value!r:.60}")
    return value


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"expected a number, got {value!r:.60}")
    return float(value)


def _counts(value: Any) -> dict[str, int]:
    if not all(type(n) is int and n >= 0 for n in value.values()):
        raise ValueError(f"expected counts, got {value!r:.60}")
    return {_text(k): n for k, n in value.items()}
