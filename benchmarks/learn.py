"""Byte language modelling for the benchmarks: a plain training loop on the package's text."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import common  # noqa: F401  (finds the package in a checkout)
from torch import Tensor

from nestlearn.evals.harness.fitting import fit
from nestlearn.evals.text import batches, bits_per_byte, default_text, text

__all__ = ["batches", "bits_per_byte", "default_text", "text", "train"]


def train(
    model: Any,
    data: Iterable[Tensor],
    steps: int,
    lr: float,
    clip: float = 1.0,
    warm: float = 0.05,
    report: Callable[[int, float, float], None] | None = None,
) -> dict[str, Any]:
    """`nestlearn.evals.harness.fitting.fit` on the next-byte loss of rows."""
    losses = (functools.partial(_next_byte, rows) for rows in data)
    return fit(model, losses, lr, steps, clip=clip, warm=warm, report=report)


def _next_byte(rows: Tensor, model: Any) -> Tensor:
    return model(input_ids=rows, labels=rows).loss
