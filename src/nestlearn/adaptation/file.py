"""The memory file: one safetensors file with all that was learned (docs/memory-file.md).

Nothing in it is executed: it is numbers, and JSON that is checked field by field. What was cut off,
altered or made for another model is refused before anything is changed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nestlearn.adaptation.added import KEYS
from nestlearn.adaptation.codec import decode, encode, part_names, rank_of, size_of
from nestlearn.adaptation.completions import COMPLETIONS, check_rows
from nestlearn.adaptation.fingerprint import fingerprint
from nestlearn.adaptation.keys import quantise
from nestlearn.adaptation.memory import Changes, Layout, Memory, Snapshot
from nestlearn.files import pack, save_tensors, unpack
from nestlearn.levels.level import Level

FORMAT = "nestlearn-memory"
VERSION = 1
SUFFIX = ".nlmem"
_NAME = re.compile(r"[\w .:+-]{1,100}")
_TARGET = re.compile(r"[\w.]{1,300}")
_LARGEST = 1 << 31  # numbers in one tensor
_MOST = 1 << 33  # numbers in all tensors of a file
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
    plan = _plan(memory, max_bytes)
    while True:
        tensors, content = _content(memory, plan)
        text = json.dumps(content, separators=(",", ":"))
        metadata = {"format": FORMAT, "version": str(VERSION), "content": text}
        metadata["sha256"] = _digest(text, tensors)
        size = sum(t.nbytes for t in tensors.values()) + len(json.dumps(metadata)) + 8
        size += sum(len(n) + 90 for n in tensors)
        if max_bytes is None or size <= max_bytes:
            break
        plan = _smaller(plan, max_bytes)  # names and counts took more than was kept free
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
            if _digest(file.metadata()["content"], stored) != file.metadata().get("sha256"):
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


# -- what is stored ---------------------------------------------------------------------------


def _plan(memory: Memory, limit: int | None) -> Stored:
    """The most faithful way to store that fits."""
    for plan in _plans(memory):
        if limit is None or plan.nbytes + _ROOM <= limit:
            return plan
    least = list(_plans(memory))[-1]
    raise ValueError(
        f"this memory needs at least {least.nbytes + _ROOM} bytes ({least.storage}), the budget is "
        f"{limit}; adapt with fewer blocks, a smaller rank or fewer levels"
    )


def _smaller(plan: Stored, limit: int) -> Stored:
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

    def size(storage: str, snapshots: int) -> int:
        kept = [s.changes for s in memory.snapshots[count - snapshots :]]
        shapes = [
            tuple(_cut(t).shape)
            for changes in (memory.changes, *kept)
            for own in changes.values()
            for t in own.values()
        ]
        return fixed + sum(size_of(shape, storage) for shape in shapes)

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


def _content(memory: Memory, plan: Stored) -> tuple[dict[str, Tensor], dict[str, Any]]:
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


def _padded(tensor: Tensor, rows: int) -> Tensor:
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
            cut = _cut(tensor)
            rows[level][target] = len(cut)
            for part, stored in encode(cut, storage).items():
                tensors[_key(prefix, i, target, part)] = stored
    return rows


def _key(prefix: str, level: int, target: str, part: str) -> str:
    return f"{prefix}/{level}/{target}" + (f"/{part}" if part else "")


def _digest(text: str, tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        if tensor.numel():
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


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
                own[key] = _padded(value, rows)
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
            if type(rows) is not int or not 1 <= rows <= shape[0]:
                raise ValueError(f"{target} has {rows!r:.20} rows")
            parts = {n: stored[_key(prefix, i, target, n)] for n in part_names(storage)}
            own[target] = decode(parts, storage, (rows, *shape[1:]))
            if not layout.in_slots(target):  # else slots without rows are free
                own[target] = _padded(own[target], shape[0])
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
