"""Text that every machine with Python has, and what simple coders make of it."""

from __future__ import annotations

import lzma
import sysconfig
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

# Tests and tools repeat themselves; encodings are tables of numbers; packages are not Python's own.
_LEFT_OUT = {
    "__pycache__",
    "dist-packages",
    "encodings",
    "ensurepip",
    "idle_test",
    "idlelib",
    "lib2to3",
    "site-packages",
    "test",
    "tests",
    "turtledemo",
}
_VALIDATION_EVERY = 20  # every 20th file


@dataclass(frozen=True)
class Corpus:
    """Bytes to learn from and bytes, of other files, to be tested on."""

    training: bytes
    validation: bytes
    training_files: int
    validation_files: int


def standard_library(
    validation_bytes: int = 98_304, training_bytes: int = 8_000_000, root: Path | None = None
) -> Corpus:
    """Sources and documentation strings of the running Python's standard library.

    Files are taken in a fixed order (a stride through the sorted list, so that a capped corpus
    still has something of everything); no file is in both parts.

    Args:
        validation_bytes, training_bytes: largest sizes.
        root: another folder of Python files.

    Raises:
        ValueError: the folder holds too little text.

    Example:
        >>> corpus = standard_library(validation_bytes=4096, training_bytes=10_000)
        >>> len(corpus.validation), len(corpus.training)
        (4096, 10000)
    """
    root = root or Path(sysconfig.get_paths()["stdlib"])
    files = [
        path
        for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).as_posix())
        if not _LEFT_OUT & set(path.relative_to(root).parts)
    ]
    stride = 37
    files = [path for start in range(stride) for path in files[start::stride]]
    held_out = files[::_VALIDATION_EVERY]
    rest = [path for i, path in enumerate(files) if i % _VALIDATION_EVERY]
    validation, validation_files = _read(held_out, validation_bytes)
    training, training_files = _read(rest, training_bytes)
    if len(validation) < 4096 or len(training) < 4096:
        raise ValueError(
            f"{root} holds {len(training) + len(validation)} bytes of Python sources; the demo "
            "needs the .py files of the standard library (some minimal installations have none)"
        )
    return Corpus(training, validation, training_files, validation_files)


def _read(files: list[Path], limit: int) -> tuple[bytes, int]:
    parts: list[bytes] = []
    size = 0
    for path in files:
        if size >= limit:
            break
        data = path.read_bytes()
        if b"\0" in data:
            continue
        parts.append(data)
        size += len(data)
    return b"".join(parts)[:limit], len(parts)


def excerpts(text: bytes, length: int) -> list[bytes]:
    """``text`` cut into pieces of ``length`` bytes; each coder starts anew with each piece."""
    return [text[i : i + length] for i in range(0, len(text), length)]


def bigram_bits(training: bytes, pieces: list[bytes]) -> float:
    """Bits per byte of a bigram model with add-one smoothing, counted on ``training``."""
    counts = np.ones((256, 256))
    seen = np.frombuffer(training, dtype=np.uint8)
    np.add.at(counts, (seen[:-1], seen[1:]), 1)
    bits = -np.log2(counts / counts.sum(axis=1, keepdims=True))
    total = 0.0
    for piece in pieces:
        text = np.frombuffer(piece, dtype=np.uint8)
        total += 8.0 + bits[text[:-1], text[1:]].sum()  # the first byte has no predecessor
    return float(total / sum(map(len, pieces)))


def zlib_bits(pieces: list[bytes]) -> float:
    """Bits per byte of zlib at its highest level, without its header and checksum."""
    total = 0
    for piece in pieces:
        coder = zlib.compressobj(9, zlib.DEFLATED, -15)
        total += len(coder.compress(piece) + coder.flush())
    return 8 * total / sum(map(len, pieces))


def lzma_bits(pieces: list[bytes]) -> float:
    """Bits per byte of lzma at its highest level, without container and checksum."""
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME}]
    total = sum(len(lzma.compress(p, lzma.FORMAT_RAW, filters=filters)) for p in pieces)
    return 8 * total / sum(map(len, pieces))
