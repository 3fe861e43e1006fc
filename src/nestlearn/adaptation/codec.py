"""How a memory's tensors are stored: exactly, or in fewer bytes where a budget asks for it.

| storage    | a tensor (m, n) is stored as                                | bytes       |
|------------|-------------------------------------------------------------|-------------|
| `float32`  | itself                                                      | 4 mn        |
| `bfloat16` | itself, rounded to 8 bits of precision                      | 2 mn        |
| `int8`     | integers -127..127 and a float32 scale per row              | mn + 4 m    |
| `rank:k`   | its best approximation of rank k, two factors stored int8   | ~ k (m + n) |
"""

from __future__ import annotations

import math
import re

import torch
from torch import Tensor

_RANK = re.compile(r"rank:([1-9]\d{0,4})")


def encode(tensor: Tensor, storage: str) -> dict[str, Tensor]:
    """The stored parts of a tensor, part name (`""` for a tensor that is stored whole) -> tensor.

    Raises:
        ValueError: an unknown storage.
    """
    tensor = tensor.detach().cpu()
    if storage == "float32":
        return {"": tensor.to(torch.float32)}
    if storage == "bfloat16":
        return {"": tensor.to(torch.bfloat16)}
    if storage == "int8":
        rows, scale = _quantise(tensor)
        return {"int8": rows, "scale": scale}
    left, right = _factors(tensor.float(), rank_of(storage))
    parts = {}
    for name, factor in (("left", left.mT), ("right", right)):
        parts[name], parts[f"{name}.scale"] = _quantise(factor)
    return parts


def decode(parts: dict[str, Tensor], storage: str, shape: tuple[int, ...]) -> Tensor:
    """The tensor that `encode` was given, as float32.

    Raises:
        ValueError: parts that do not make a tensor of this shape.
    """
    rows = tuple(shape[:-1])
    if storage in ("float32", "bfloat16"):
        dtype = torch.float32 if storage == "float32" else torch.bfloat16
        return _part(parts, "", shape, dtype).to(torch.float32)
    if storage == "int8":
        return _restore(parts, "int8", "scale", tuple(shape))
    if len(shape) != 2:
        raise ValueError(f"{storage} is for matrices, not for shape {shape}")
    rank = rank_of(storage)
    left = _restore(parts, "left", "left.scale", (rank, *rows))
    right = _restore(parts, "right", "right.scale", (rank, shape[1]))
    return left.mT @ right


def part_names(storage: str) -> tuple[str, ...]:
    """Names of the parts that `encode` makes."""
    if storage in ("float32", "bfloat16"):
        return ("",)
    if storage == "int8":
        return ("int8", "scale")
    rank_of(storage)  # refuses what is unknown
    return ("left", "left.scale", "right", "right.scale")


def rank_of(storage: str) -> int:
    """k of ``rank:k``."""
    match = _RANK.fullmatch(storage)
    if match is None:
        raise ValueError(f"unknown storage {storage!r}: float32, bfloat16, int8 or rank:<k>")
    return int(match[1])


def size_of(shape: tuple[int, ...], storage: str) -> int:
    """Bytes of a stored tensor."""
    numbers = math.prod(shape)
    rows = numbers // shape[-1] if shape else 1
    if storage == "float32":
        return 4 * numbers
    if storage == "bfloat16":
        return 2 * numbers
    if storage == "int8":
        return numbers + 4 * rows
    return rank_of(storage) * (sum(shape) + 8)


def _quantise(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Rows as integers, and their scales."""
    scale = tensor.float().abs().amax(-1, keepdim=True) / 127
    safe = torch.where(scale > 0, scale, 1)
    return (tensor.float() / safe).round().to(torch.int8), scale


def _factors(tensor: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Best factors ``(m, k)``, ``(k, n)``; the singular values are shared equally, which keeps the
    rounding of both small."""
    u, s, v = torch.linalg.svd(tensor.double(), full_matrices=False)
    root = s[:rank].sqrt()
    short = rank - len(root)
    left, right = (u[:, :rank] * root).float(), (root[:, None] * v[:rank]).float()
    if short > 0:
        left = torch.nn.functional.pad(left, (0, short))
        right = torch.nn.functional.pad(right, (0, 0, 0, short))
    return left, right


def _restore(parts: dict[str, Tensor], name: str, scale: str, shape: tuple[int, ...]) -> Tensor:
    integers = _part(parts, name, shape, torch.int8)
    return integers.float() * _part(parts, scale, (*shape[:-1], 1), torch.float32)


def _part(
    parts: dict[str, Tensor], name: str, shape: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    part = parts.get(name)
    if part is None:
        raise ValueError(f"the part {name!r} is missing")
    if tuple(part.shape) != tuple(shape) or part.dtype != dtype:
        raise ValueError(
            f"part {name!r} has shape {tuple(part.shape)} and type {part.dtype}, expected "
            f"{tuple(shape)} and {dtype}"
        )
    return part
