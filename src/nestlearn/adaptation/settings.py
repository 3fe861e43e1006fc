"""What a learner is set to: optimizers by name, and how much of a text it sees."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from nestlearn.optim.multirate import InnerFactory
from nestlearn.optim.row_adam import RowAdam

OPTIMIZERS: dict[str, InnerFactory] = {
    "rowadam": RowAdam,
    "adamw": functools.partial(torch.optim.AdamW, betas=(0.9, 0.99), weight_decay=0.0),
    "sgd": functools.partial(torch.optim.SGD, momentum=0.9),
}
"""Inner optimizers by name; any ``torch.optim`` class can be given instead."""
DEFAULTS: dict[str, tuple[float, str]] = {
    "added": (0.2, "rowadam"),
    "placement": (1e-4, "adamw"),
    "readout": (1.0, "sgd"),
}
"""Learning rate and optimizer by method."""


def factories(given: Any) -> Any:
    if isinstance(given, Mapping):
        return {name: factories(one) for name, one in given.items()}
    if isinstance(given, str):
        if given not in OPTIMIZERS:
            raise ValueError(
                f"optimizer must be {', '.join(OPTIMIZERS)} or a factory, got {given!r}"
            )
        return OPTIMIZERS[given]
    if not callable(given):
        raise ValueError(f"optimizer must be a name or a factory, got {given!r}")
    return given


def limit_of(model: nn.Module) -> int:
    """Tokens that the model can attend to."""
    config = getattr(model, "config", None)
    return getattr(config, "max_position_embeddings", None) or 1 << 30


def context_of(limit: int, given: int | None, segment: int) -> int:
    context = min(1024, limit) if given is None else given
    if context > limit:
        raise ValueError(f"context is {context}, but the model reads at most {limit} tokens")
    if context < segment:
        raise ValueError(
            f"the fastest level's period is {segment} tokens, more than the context of {context}; "
            "give a larger context or a shorter period"
        )
    return context


def name_of(model: nn.Module) -> str:
    return str(getattr(getattr(model, "config", None), "name_or_path", "") or "")[-200:]
