"""Parameters that are sharded over processes (``DTensor``: FSDP2, tensor parallelism).

Element-wise work is done on each process's own part; what needs a whole matrix gathers it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor


def is_sharded(x: Tensor) -> bool:
    """Whether x is a ``DTensor``."""
    return hasattr(x, "to_local")


def local(x: Tensor) -> Tensor:
    """This process's part of x, sharing its memory; x itself if it is not sharded."""
    part: Any = x
    return part.to_local() if is_sharded(x) else x


def like_parameter(grad: Tensor, p: Any) -> Tensor:
    """The gradient, sharded as its parameter is."""
    if is_sharded(p) and grad.placements != p.placements:  # type: ignore[attr-defined]
        return grad.redistribute(p.device_mesh, p.placements)  # type: ignore[attr-defined]
    return grad


def gather(part: Tensor, p: Any) -> Tensor:
    """The whole tensor of which ``part`` is this process's part, cut as ``p`` is."""
    if not is_sharded(p):
        return part
    from torch.distributed.tensor import DTensor

    whole = DTensor.from_local(
        part, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
    )
    return whole.full_tensor()


def own_part(whole: Tensor, p: Any) -> Tensor:
    """This process's part of a tensor that every process has, cut as ``p`` is; no exchange."""
    if not is_sharded(p):
        return whole
    from torch.distributed.tensor import DTensor, Replicate

    everywhere = [Replicate()] * p.device_mesh.ndim
    copies = DTensor.from_local(whole, p.device_mesh, everywhere, run_check=False)
    return copies.redistribute(p.device_mesh, p.placements).to_local()


def sum_over_parts(values: Tensor, like: Sequence[Any]) -> Tensor:
    """``values[i]``, computed from this process's part of ``like[i]``, summed over all parts.

    Args:
        values: one number per tensor, ``(len(like),)``.
        like: tensors, sharded or not; those that are not keep their value.
    """
    meshes: dict[Any, list[int]] = {}
    for i, p in enumerate(like):
        if is_sharded(p):
            meshes.setdefault((p.device_mesh, p.placements), []).append(i)
    if not meshes:
        return values
    from torch.distributed.tensor import DTensor, Partial, Replicate

    values = values.clone()
    for (mesh, placements), at in meshes.items():
        how = [Replicate() if p.is_replicate() else Partial() for p in placements]
        parts = DTensor.from_local(values[at], mesh, how, run_check=False)
        values[at] = parts.full_tensor()
    return values
