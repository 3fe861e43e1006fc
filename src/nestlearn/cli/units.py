"""Sizes that people write: 500kB, 8MB, 1.5GiB."""

from __future__ import annotations

import re

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


def parse_bytes(text: str) -> int:
    """Bytes of ``"8MB"``, ``"1.5 GiB"`` or ``"4096"``.

    Raises:
        ValueError: anything else.

    Example:
        >>> parse_bytes("8MB"), parse_bytes("1.5KiB")
        (8000000, 1536)
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]?i?)b?\s*", text.lower())
    if match is None or match[2] not in _UNITS:
        raise ValueError(f"a size is a number with kB, MB, GB, KiB, MiB or GiB, got {text!r}")
    return int(float(match[1]) * _UNITS[match[2]])
