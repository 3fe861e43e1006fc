"""Labels written by a language model, constrained to those there are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from nestlearn.adaptation.reader import reading


class Trie:
    """Token sequences of labels as a tree.

    Args:
        labels: tokens of each label; none may be the beginning of another (end them alike, e.g.
            with the end of the line).

    Raises:
        ValueError: an empty label, two alike, or one that begins another.
    """

    def __init__(self, labels: Sequence[Sequence[int]]) -> None:
        self.root: dict[int, Any] = {}
        for number, label in enumerate(labels):
            node = self.root
            for token in label[:-1]:
                node = node.setdefault(token, {})
                if isinstance(node, int):
                    raise ValueError(f"label {node} is the beginning of label {number}")
            if not label or label[-1] in node:
                raise ValueError(f"label {number} is empty, or another one begins with it")
            node[label[-1]] = number

    def walk(self) -> Walk:
        """A walk from the root."""
        return Walk(self.root)


class Walk:
    """A path down a `Trie`, as far as it is forced.

    Attributes:
        options: tokens to choose between; empty at the end.
        label: number of the label, once it is the only one left.
    """

    def __init__(self, root: dict[int, Any]) -> None:
        self._node: Any = root

    @property
    def options(self) -> list[int]:
        return [] if isinstance(self._node, int) else list(self._node)

    @property
    def label(self) -> int | None:
        node = self._node
        while isinstance(node, dict) and len(node) == 1:
            node = next(iter(node.values()))
        return node if isinstance(node, int) else None

    def take(self, token: int) -> None:
        """Go down one step."""
        self._node = self._node[token]


@torch.no_grad()
def write_labels(
    model: Any,
    prompts: Sequence[Sequence[int]],
    labels: Sequence[Sequence[int]],
    *,
    choices: Sequence[Sequence[int]] | None = None,
    prefix: Any = None,
    batch: int = 32,
) -> list[int]:
    """Greedy decoding constrained to labels: at every step the likeliest token that goes on one.

    That is what ``generate`` does with a ``prefix_allowed_tokens_fn`` for the same trie; it ends
    as soon as one label is left.

    Args:
        model: a causal language model.
        prompts: tokens of each prompt.
        labels: tokens of the labels that may be written.
        choices: numbers of the labels that each prompt has to choose from; default: all.
        prefix: attention cache ``(1, ...)`` of a text before every prompt; it is not changed.
        batch: prompts at a time, of similar length.

    Returns:
        number of the label written after each prompt.
    """
    trie = Trie(labels)
    tries = [trie] * len(prompts)
    if choices is not None:
        tries = [Trie([labels[c] for c in own]) for own in choices]
    result = [0] * len(prompts)
    with reading(model):
        for rows in _by_length(prompts, batch):
            walks = [tries[i].walk() for i in rows]
            pass_ = _Pass(model, [prompts[i] for i in rows], prefix)
            logits = pass_.begin()
            while True:
                tokens = [_choose(w, row) for w, row in zip(walks, logits, strict=True)]
                if all(w.label is not None for w in walks):
                    break
                logits = pass_.step(tokens)
            for i, walk in zip(rows, walks, strict=True):
                assert walk.label is not None
                result[i] = walk.label
    if choices is not None:
        return [own[number] for own, number in zip(choices, result, strict=True)]
    return result


def _choose(walk: Walk, logits: Tensor) -> int:
    """Take the likeliest of the possible tokens; rows that are done write anything."""
    options = walk.options
    if not options:
        return 0
    token = options[int(logits[options].argmax())] if len(options) > 1 else options[0]
    walk.take(token)
    return token


class _Pass:
    """Prompts, padded on the left, and the attention cache behind them."""

    def __init__(self, model: Any, rows: Sequence[Sequence[int]], prefix: Any) -> None:
        self.model = model
        device = model.get_input_embeddings().weight.device
        length = max(map(len, rows))
        ids = torch.zeros(len(rows), length, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for r, row in enumerate(rows):
            ids[r, length - len(row) :] = torch.tensor(list(row))
            mask[r, length - len(row) :] = 1
        self.ids, self.mask = ids.to(device), mask.to(device)
        self.cache, before = None, 0
        if prefix is not None:
            self.cache, before = _repeated(prefix, len(rows)), prefix.get_seq_length()
        self.mask = torch.cat([self.mask.new_ones(len(rows), before), self.mask], 1)

    def begin(self) -> Tensor:
        """Logits ``(B, V)`` after the prompts."""
        return self._forward(self.ids)

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Logits after one more token a row."""
        ids = torch.tensor(tokens, device=self.ids.device)[:, None]
        self.mask = torch.cat([self.mask, torch.ones_like(ids)], 1)
        return self._forward(ids)

    def _forward(self, ids: Tensor) -> Tensor:
        positions = (self.mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        out = self.model(
            input_ids=ids, attention_mask=self.mask, position_ids=positions,
            past_key_values=self.cache, use_cache=True, logits_to_keep=1,
        )  # fmt: skip
        self.cache = out.past_key_values
        return out.logits[:, -1].float().cpu()


def _repeated(cache: Any, count: int) -> Any:
    from transformers import DynamicCache

    return DynamicCache(
        [(k.expand(count, *k.shape[1:]), v.expand(count, *v.shape[1:])) for k, v in _layers(cache)]
    )


def _layers(cache: Any) -> Iterator[tuple[Tensor, Tensor]]:
    for layer in cache.layers:
        yield layer.keys, layer.values


def _by_length(rows: Sequence[Sequence[int]], batch: int) -> Iterator[list[int]]:
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for start in range(0, len(order), batch):
        yield order[start : start + batch]
