"""What memories know of a model beforehand: a general text, and what is fitted to it.

The text is what the model itself generates. That takes some seconds, so it is kept in a file per
base model (`nestlearn.files.cache_folder`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from nestlearn.adaptation.keys import LENGTH, ROWS, generate_text, projections
from nestlearn.adaptation.reader import reading
from nestlearn.adaptation.readout import TARGET, readout_prior
from nestlearn.adaptation.sites import Site
from nestlearn.files import cache_folder, save_tensors

SMALLEST = 1 << 20  # numbers of a model whose text is worth keeping


class Calibration:
    """A general text of a model, and what is fitted to it.

    Args:
        model: a causal language model without memories.
        sites: where memories will be.
        base: fingerprint of the model's weights.
        given: ``"generate"``, a text that the model generates; tokens ``(B, T)`` of general text;
            or None: nothing is fitted.

    Raises:
        ValueError: another ``given``.
    """

    def __init__(
        self, model: nn.Module, sites: Sequence[Site], base: str, given: Tensor | str | None
    ) -> None:
        if isinstance(given, str) and given != "generate":
            raise ValueError(
                f"calibration must be 'generate', tokens (B, T) or None, got {given!r}"
            )
        self._model, self._sites = model, tuple(sites)
        self._text = given if isinstance(given, Tensor) else None
        if isinstance(given, str):
            with reading(model):
                self._text = general_text(model, base)

    def projections(self, rank: int, seed: int = 0) -> dict[str, Tensor]:
        """P ``(rank, H)`` of every site, drawn with ``seed``."""
        with reading(self._model):
            return projections(self._model, self._sites, self._text, rank, seed)

    def readout(self, rank: int) -> dict[str, Tensor]:
        """What a memory at the model's end begins with (`nestlearn.adaptation.readout`)."""
        with reading(self._model):
            return {TARGET: readout_prior(self._model, self._sites[0].width, self._text, rank)}


def general_text(model: nn.Module, base: str) -> Tensor:
    """The text that a model generates, from the file if it was generated before.

    Args:
        model: a causal language model, in evaluation mode.
        base: fingerprint of its weights.

    Returns:
        tokens ``(ROWS, LENGTH)``.
    """
    path = _path(base) if sum(p.numel() for p in model.parameters()) >= SMALLEST else None
    if path is not None and (found := _read(path, model)) is not None:
        return found
    tokens = generate_text(model)
    if path is not None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_tensors({"tokens": tokens}, path)
        except OSError:  # a read-only home directory costs time, nothing else
            pass
    return tokens


def _path(base: str) -> Path:
    name = hashlib.sha256(repr([base, ROWS, LENGTH]).encode()).hexdigest()[:32]
    return cache_folder() / "calibration" / f"{name}.safetensors"


def _read(path: Path, model: Any) -> Tensor | None:
    """The tokens in a file, if it is whole and of such a model."""
    try:
        tokens = load_file(path)["tokens"]
    except (OSError, SafetensorError, KeyError):
        return None
    count = model.get_input_embeddings().weight.shape[0]
    fits = tokens.dtype == torch.long and tuple(tokens.shape) == (ROWS, LENGTH)
    return tokens if fits and tokens.min() >= 0 and tokens.max() < count else None
