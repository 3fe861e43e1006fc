"""What added memories know of a model beforehand: a general text, and what is fitted to it.

Generating the text and measuring the model on it takes some seconds; what came out is kept in a
file per base model (`nestlearn.files.cache_folder`), so that only the first time costs them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from nestlearn.adaptation.keys import (
    LENGTH,
    ROWS,
    calibrated_keys,
    generate_text,
    preconditioners,
)
from nestlearn.adaptation.reader import reading
from nestlearn.adaptation.sites import Site
from nestlearn.files import cache_folder, save_tensors

VERSION = 1
"""Changes whenever the same text would give other preconditioners."""
SMALLEST, LARGEST = 1 << 20, 1 << 28  # bytes of a file that is worth keeping


class Calibration:
    """A general text of a model, and the keys and preconditioners that are fitted to it.

    Args:
        model: a causal language model; used while nothing that was learned is active.
        sites: where memories are.
        base: fingerprint of the model's weights.
        given: ``"generate"``, a text that the model generates; tokens ``(B, T)`` of general text;
            or None: random keys and plain gradients.

    Raises:
        ValueError: another ``given``.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[Site],
        base: str,
        given: Tensor | str | None,
    ) -> None:
        if isinstance(given, str) and given != "generate":
            raise ValueError(
                f"calibration must be 'generate', tokens (B, T) or None, got {given!r}"
            )
        self._model, self._sites, self._base = model, tuple(sites), base
        self._given = given
        self._text = given if isinstance(given, Tensor) else None

    def text(self) -> Tensor | None:
        """The general text ``(B, T)``, generated when first asked for."""
        if self._text is None and self._given is not None:
            with reading(self._model):
                self._text = generate_text(self._model)
        return self._text

    def keys(self, rank: int, seed: int = 0) -> dict[str, Tensor]:
        """Keys ``(rank, H)`` of every site, drawn with ``seed``."""
        tokens = self.text()
        with reading(self._model):
            return calibrated_keys(self._model, self._sites, tokens, rank, seed)

    def preconditioners(self) -> dict[str, Tensor]:
        """P^(1/2) of every site, float32; from the file if they were made before."""
        if self._given is None:
            return {}
        path = self._path()
        found = None if path is None else self._read(path)
        if found is not None:
            return found
        tokens = self.text()
        assert tokens is not None
        with reading(self._model):
            made = preconditioners(self._model, self._sites, tokens)
        if path is not None:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                save_tensors(made, path)
            except OSError:  # a read-only home directory costs time, nothing else
                pass
        return made

    def _path(self) -> Path | None:
        """The file; None if it would be too large, soon made again, or of a text of the caller."""
        size = sum(4 * site.width**2 for site in self._sites)
        if isinstance(self._given, Tensor) or not SMALLEST <= size <= LARGEST:
            return None
        what = [VERSION, torch.__version__, self._base, ROWS, LENGTH]
        what += [site.output for site in self._sites]
        name = hashlib.sha256(repr(what).encode()).hexdigest()[:32]
        return cache_folder() / "calibration" / f"{name}.safetensors"

    def _read(self, path: Path) -> dict[str, Tensor] | None:
        """What the file holds, if it is whole and of these sites."""
        try:
            found = load_file(path)
        except (OSError, SafetensorError):
            return None
        shapes = {name: tuple(t.shape) for name, t in found.items()}
        return found if shapes == {s.output: (s.width, s.width) for s in self._sites} else None
