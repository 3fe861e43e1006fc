"""Which base model a memory belongs to."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

_SAMPLE = 4096  # numbers of a tensor that are hashed, evenly spaced


def fingerprint(weights: Mapping[str, Tensor]) -> str:
    """Identify weights by names, shapes and evenly spaced samples, in milliseconds.

    Samples are rounded to bfloat16, so a model loaded in float32 and in bfloat16 is the same.

    Args:
        weights: name -> tensor of any type and device.

    Returns:
        32 hexadecimal digits.

    Example:
        >>> a = {"w": torch.arange(6.0).view(2, 3)}
        >>> fingerprint(a) == fingerprint({"w": a["w"].bfloat16()})
        True
    """
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach()
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        flat = tensor.reshape(-1)
        sample = flat[:: max(1, flat.numel() // _SAMPLE)][:_SAMPLE]
        if sample.is_floating_point():
            sample = sample.to(torch.bfloat16).view(torch.int16)
        digest.update(sample.to("cpu", torch.int32).numpy().tobytes())
    return digest.hexdigest()[:32]
