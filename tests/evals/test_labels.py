"""Constrained label decoding against `generate` and against plain recomputation."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nestlearn.evals.labels import Trie, write_labels
from tests.adaptation.conftest import tiny_model

LABELS = [list(b"card\n"), list(b"card lost\n"), list(b"car\n"), list(b"pay\n"), list(b"pin\n")]
PROMPTS = [[256, *f"{w} now:".encode()] for w in ("a", "the one", "x", "nothing at all", "yes")]


def generated(model: Any, prompt: list[int], labels: list[list[int]]) -> int:
    """Transformers' own constrained greedy decoding."""

    def allowed(batch: int, ids: torch.Tensor) -> list[int]:
        done = ids[len(prompt) :].tolist()
        following = [x[len(done)] for x in labels if x[: len(done)] == done and len(x) > len(done)]
        return following or [257]

    out = model.generate(
        torch.tensor([prompt]), max_new_tokens=12, do_sample=False, pad_token_id=0,
        prefix_allowed_tokens_fn=allowed, eos_token_id=257,
    )  # fmt: skip
    text = [t for t in out[0, len(prompt) :].tolist() if t != 257]
    return labels.index(text)


@pytest.mark.parametrize("family", ["Llama", "GPT2", "OPT"])
def test_it_is_constrained_greedy_decoding(family: str) -> None:
    found = set()
    for seed in range(3):
        model = tiny_model(family, seed=seed)
        expected = [generated(model, p, LABELS) for p in PROMPTS]
        assert write_labels(model, PROMPTS, LABELS) == expected
        assert write_labels(model, PROMPTS, LABELS, batch=2) == expected
        found |= set(expected)
    assert len(found) > 1


def test_choices_and_prefix() -> None:
    model = tiny_model()
    choices = [[0, 3], [4, 2], [1, 4], [3, 0], [2, 3]]
    expected = [
        own[generated(model, p, [LABELS[c] for c in own])]
        for p, own in zip(PROMPTS, choices, strict=True)
    ]
    assert write_labels(model, PROMPTS, LABELS, choices=choices) == expected
    before = [256, *b"card: pay\n"]
    cache = model(torch.tensor([before]), use_cache=True).past_key_values
    plain = [p[1:] for p in PROMPTS]
    expected = [generated(model, before + p, LABELS) for p in plain]
    for _ in range(2):  # the cache is not changed
        assert write_labels(model, plain, LABELS, prefix=cache, batch=3) == expected


def test_a_walk_ends_where_one_label_is_left() -> None:
    walk = Trie(LABELS).walk()
    assert set(walk.options) == {ord("c"), ord("p")} and walk.label is None
    walk.take(ord("p"))
    walk.take(ord("i"))
    assert walk.label == 4


@pytest.mark.parametrize("labels", [[[1, 2], [1]], [[1], [1, 2]], [[1], [1]], [[]]])
def test_labels_that_begin_others_are_refused(labels: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="begin"):
        Trie(labels)
