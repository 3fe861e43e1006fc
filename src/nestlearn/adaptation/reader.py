"""Reading a document in segments, with what came before in the attention cache."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nestlearn.adaptation.documents import sentences_of, token_pieces
from nestlearn.adaptation.examples import Batch, Example, batches

LEAD = 5
"""Tokens at the beginning of a sentence that are not learned where it stands alone: many others
could begin so."""


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

    def loss(self, ids: Tensor, lead: int = 0) -> tuple[Tensor, Any]:
        """Mean next-token loss of ``ids (1, n + 1)``, of its first ``lead`` predictions none, and
        the cache with its first n tokens."""
        count = ids.shape[1] - 1
        if self.length + count > self.context:
            self._shorten(self.context // 2)
        out = self.model(input_ids=ids[:, :-1], past_key_values=_fork(self.cache), use_cache=True)
        loss = F.cross_entropy(out.logits[0, lead:].float(), ids[0, 1 + lead :])
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


@dataclasses.dataclass(frozen=True)
class Segment:
    """A piece of a document.

    Attributes:
        ids: its tokens, after the one before.
        begun: 1 if a document begins, else 0.
        fresh: whether it is read with nothing before it.
        again: whether it was read before, as part of its document.
        lead: how many of its first predictions are not learned.
    """

    ids: list[int]
    begun: int
    fresh: bool
    again: bool = False
    lead: int = 0

    @property
    def tokens(self) -> int:
        """How many tokens are learned."""
        return max(0, len(self.ids) - 1 - self.lead)

    def row(self, device: torch.device) -> Tensor:
        """Tokens ``(1, n + 1)``."""
        return torch.tensor([self.ids], device=device)

    def pick(self, parts: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
        """Of states ``(1, n, D)``: those that predict a token, ``(n, D)``, and the tokens."""
        return [p[0, self.lead :] for p in parts], torch.tensor(self.ids[1 + self.lead :])


def work(
    documents: Iterable[tuple[str | Example, bool]],
    tokenizer: Any,
    length: int,
    batch: int,
    context: int,
    sentences: bool = False,
) -> Iterator[Segment | Batch]:
    """Documents as segments of ``length`` tokens and examples as batches, in order; with
    ``sentences`` each sentence once more, see `with_sentences`."""
    for examples, group in itertools.groupby(documents, lambda d: isinstance(d[0], Example)):
        found: Any = group
        if examples:
            yield from batches((example for example, _ in found), tokenizer, batch, context)
        elif sentences:
            yield from with_sentences(found, tokenizer, length)
        else:
            yield from segments(token_pieces(found, tokenizer), length)


def with_sentences(
    pieces: Iterable[tuple[str, bool]], tokenizer: Any, length: int
) -> Iterator[Segment]:
    """Segments of every piece, and then of each of its sentences with nothing before it.

    A document of several pieces is read anew with each.
    """
    begins = True
    for text, ends in pieces:
        for segment in segments(token_pieces([(text, True)], tokenizer), length):
            yield segment if begins else dataclasses.replace(segment, begun=0)
        for sentence in sentences_of(text):
            for segment in segments(token_pieces([(sentence, True)], tokenizer), length):
                lead = LEAD if segment.fresh else 0
                yield dataclasses.replace(segment, begun=0, again=True, lead=lead)
        begins = ends


def segments(pieces: Iterator[tuple[list[int], bool, bool]], length: int) -> Iterator[Segment]:
    """Segments of ``length`` tokens and the one before.

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
            yield Segment(held[place : place + length + 1], int(fresh), fresh)
            place, fresh = place + length, False
        held = held[place:]
        if ends and (len(held) > 1 or fresh):
            yield Segment(held, int(fresh), fresh)
