"""Writing files so that a reader finds the old or the new content, never a half."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor


def cache_folder() -> Path:
    """Where what can be made again is kept: ``$NESTLEARN_CACHE``, else ``~/.cache/nestlearn``."""
    if os.environ.get("NESTLEARN_CACHE"):
        return Path(os.environ["NESTLEARN_CACHE"])
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "nestlearn"


def write_file(path: str | Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, flush it to disk, give it its name."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        _flush(temporary)
        os.replace(temporary, path)
        _flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a temporary folder, flush its files to disk, give it its name."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        write(temporary)
        for file in temporary.iterdir():
            _flush(file)
        if folder.exists():
            old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
            os.replace(folder, old)
            os.replace(temporary, folder)
            shutil.rmtree(old)
        else:
            os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def save_tensors(
    tensors: dict[str, Tensor], path: str | Path, metadata: dict[str, str] | None = None
) -> None:
    """Write tensors to a safetensors file, by `write_file`."""
    from safetensors.torch import save_file

    # Clones: safetensors refuses tensors that share storage, and states often are views.
    copies = {name: t.detach().contiguous().clone() for name, t in tensors.items()}
    write_file(path, lambda new: save_file(copies, new, metadata))


def checksum(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def pack(value: Any, tensors: dict[str, Tensor], prefix: str = "") -> Any:
    """JSON for dictionaries, lists, tuples, numbers, text and None, nested at will; tensors go into
    ``tensors``, numbered after ``prefix``, and leave their name."""
    if isinstance(value, Tensor):
        name = f"{prefix}{len(tensors)}"
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {"tensor": name}
    if isinstance(value, dict):
        pairs = value.items()
        return {"dict": [[pack(k, tensors, prefix), pack(v, tensors, prefix)] for k, v in pairs]}
    if isinstance(value, tuple):
        return {"tuple": [pack(v, tensors, prefix) for v in value]}
    if isinstance(value, list):
        return [pack(v, tensors, prefix) for v in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(f"a state file cannot hold a {type(value).__name__}: {value!r:.80}")


def unpack(value: Any, tensors: dict[str, Tensor]) -> Any:
    """What `pack` was given."""
    if isinstance(value, list):
        return [unpack(v, tensors) for v in value]
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]]
    if "tuple" in value:
        return tuple(unpack(v, tensors) for v in value["tuple"])
    return {unpack(k, tensors): unpack(v, tensors) for k, v in value["dict"]}


def _flush(path: Path) -> None:
    """fsync a file or, where the system can, a folder."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:  # Windows opens no folders
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
