"""What a cell has reached, kept on disk: a run that was cut off goes on in the middle of it."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

import nestlearn
from nestlearn.files import checksum, pack, unpack, write_file

EVERY = 60.0
"""Seconds between two writes, at least; and twenty times what the last one took."""


class Kept:
    """Parts of a cell's state in one safetensors file, by name.

    Args:
        path: the file; None keeps nothing.
        stamp: what the parts belong to. A file with another stamp counts as none.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "cell"
        >>> Kept(path, "a").put("scores", lambda: {"test": 0.5}, now=True)
        True
        >>> Kept(path, "a").get("scores"), Kept(path, "b").get("scores")
        ({'test': 0.5}, None)
    """

    def __init__(self, path: Path | None = None, stamp: str = "") -> None:
        self.path, self.stamp = path, stamp
        self._parts: dict[str, Any] = {}
        self._next = monotonic() + EVERY
        if path is None or not path.is_file():
            return
        try:
            with safe_open(path, "pt") as file:
                words = file.metadata()
                if words["stamp"] == stamp:
                    tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                    self._parts = unpack(json.loads(words["parts"]), tensors)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            warnings.warn(f"{path.name} cannot be read; the cell starts again", stacklevel=2)

    def get(self, part: str) -> Any:
        """What was put last; None if nothing was."""
        return self._parts.get(part)

    def put(self, part: str, value: Callable[[], Any], now: bool = False) -> bool:
        """Replace a part and write the file, if it is time to, or ``now``; whether it was done.

        Parts are what `nestlearn.files.pack` can hold.
        """
        began = monotonic()
        if self.path is None or (not now and began < self._next):
            return False
        self._parts[part] = value()
        tensors: dict[str, Tensor] = {}
        words = {"stamp": self.stamp, "parts": json.dumps(pack(self._parts, tensors))}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_file(self.path, lambda new: save_file(tensors, new, words))
        end = monotonic()
        self._next = end + max(EVERY, 20 * (end - began))
        return True


def kept_file(results: Path, cell: str) -> Path:
    """Where a cell of a result file is kept while it is measured."""
    name = hashlib.sha256(cell.encode()).hexdigest()[:16]
    return results.with_name(f".{results.stem}.unfinished") / f"{name}.safetensors"


def code() -> str:
    """Checksum of the package's files and PyTorch's version: with others a step may be another."""
    folder = Path(nestlearn.__file__).parent
    files = sorted(p for p in folder.rglob("*") if p.suffix in (".py", ".cpp", ".h"))
    sums = [f"{p.relative_to(folder).as_posix()} {checksum(p)}" for p in files]
    return hashlib.sha256("\n".join([torch.__version__, *sums]).encode()).hexdigest()
