"""Reading a document in segments, with what came before in the attention cache."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@contextlib.contextmanager
def reading(model: nn.Module) -> Iterator[None]:
    """Within it the model reads without dropout; every module's mode is put back afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


class Reader:
    """Reads a document piece by piece; what was read is in the attention cache."""

    def __init__(self, model: nn.Module, context: int) -> None:
        self.model, self.context = model, context
        self.begin()

    def begin(self) -> None:
        """A new document."""
        self.cache: Any = None
        self.tail: Tensor | None = None
        self.length = 0

    def loss(self, ids: Tensor) -> tuple[Tensor, Any]:
        """Mean next-token loss of ``ids (1, n + 1)``, and the cache with its first n tokens."""
        count = ids.shape[1] - 1
        if self.length + count > self.context:
            self._shorten(self.context // 2)
        out = self.model(input_ids=ids[:, :-1], past_key_values=_fork(self.cache), use_cache=True)
        loss = F.cross_entropy(out.logits[0].float(), ids[0, 1:])
        return loss, out.past_key_values

    def keep(self, cache: Any, ids: Tensor) -> None:
        """Go on behind ``ids``."""
        self.cache = _detach(cache)
        self.length += ids.shape[1] - 1
        tail = ids[:, :-1] if self.tail is None else torch.cat([self.tail, ids[:, :-1]], 1)
        self.tail = tail[:, -self.context :]

    @torch.no_grad()
    def _shorten(self, count: int) -> None:
        """Start the cache anew with the last ``count`` tokens, at positions from 0."""
        self.cache, self.length = None, 0
        if self.tail is not None and count:
            tail = self.tail[:, -count:]
            out = self.model(input_ids=tail, use_cache=True)
            self.cache, self.length = out.past_key_values, tail.shape[1]


def _fork(cache: Any) -> Any:
    """A cache that can grow without the one it comes from: layers replace their tensors."""
    if cache is None:
        return None
    forked = copy.copy(cache)
    forked.layers = [copy.copy(layer) for layer in cache.layers]
    return forked


def _detach(cache: Any) -> Any:
    for layer in cache.layers:
        for name, value in vars(layer).items():
            if isinstance(value, Tensor) and value.requires_grad:
                setattr(layer, name, value.detach())
    return cache


def segments(
    pieces: Iterator[tuple[list[int], bool, bool]], length: int
) -> Iterator[tuple[list[int], bool]]:
    """Segments of ``length`` tokens and the one before, and whether a document begins.

    Each token of a document but its first is predicted exactly once.
    """
    held: list[int] = []
    fresh = True
    for ids, begins, ends in pieces:
        if begins:
            held, fresh = [], True
        held += ids
        place = 0
        while len(held) - place > length:
            yield held[place : place + length + 1], fresh
            place, fresh = place + length, False
        held = held[place:]
        if ends and (len(held) > 1 or fresh):
            yield held, fresh
