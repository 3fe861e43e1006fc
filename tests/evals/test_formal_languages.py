"""Formal languages (Table 5): words and next symbols against all strings that membership allows."""

from __future__ import annotations

import itertools
import re

import pytest
import torch

from nestlearn.evals.formal_languages import BINS, END, LANGUAGES, SYMBOLS, Language
from nestlearn.evals.harness.task import TRAIN, VALIDATION


def balanced(word: str, opening: str, closing: str) -> bool:
    kept = "".join(c for c in word if c in opening + closing)
    while opening + closing in kept:
        kept = kept.replace(opening + closing, "")
    return not kept


MEMBER = {
    "parity": lambda w: w.count("1") % 2 == 0,
    "(aa)*": lambda w: re.fullmatch("(aa)*", w) is not None,
    "(abab)*": lambda w: re.fullmatch("(abab)*", w) is not None,
    "a^nb^n": lambda w: len(w) > 0 and w == "a" * (len(w) // 2) + "b" * (len(w) // 2),
    "a^nb^nc^n": lambda w: len(w) > 0 and w == "".join(c * (len(w) // 3) for c in "abc"),
    "shuffle2": lambda w: balanced(w, "(", ")") and balanced(w, "[", "]"),
}
LONGEST = {"shuffle2": 8, "a^nb^nc^n": 9}


def text(language: Language, word: torch.Tensor) -> str:
    return "".join(language.alphabet[i - SYMBOLS] for i in word.tolist())


@pytest.mark.parametrize("name", LANGUAGES)
def test_next_symbols_are_those_that_lead_to_a_word(name: str) -> None:
    language, longest = Language(name), LONGEST.get(name, 12)
    words = {
        "".join(letters)
        for n in range(longest + 1)
        for letters in itertools.product(language.alphabet, repeat=n)
        if MEMBER[name]("".join(letters))
    }
    prefixes = {word[:i] for word in words for i in range(len(word) + 1)}
    checked = 0
    # Of prefixes up to half that length, every continuation has room to become a word.
    for word in (w for w in words if 0 < len(w) <= longest // 2):
        symbols = torch.tensor([language.alphabet.index(c) + SYMBOLS for c in word])
        allowed = language.next_symbols(symbols)
        assert allowed.shape == (len(word) + 1, language.vocab_size)
        for i, row in enumerate(allowed):
            found = {
                language.alphabet[s - SYMBOLS] for s in row.nonzero()[:, 0].tolist() if s > END
            }
            assert found == {c for c in language.alphabet if word[:i] + c in prefixes}
            assert bool(row[END]) == (word[:i] in words)
            assert not row[0]
            checked += 1
    assert checked > 3


@pytest.mark.parametrize("name", LANGUAGES)
def test_words_belong_to_the_language_and_have_the_lengths_of_their_bin(name: str) -> None:
    language = Language(name)
    for split in (TRAIN, VALIDATION, *BINS):
        batch = language.draw(split, 20, torch.Generator().manual_seed(0))
        low, high = BINS.get(split, BINS["bin0"])
        for row, asked in zip(batch.inputs, batch.asked, strict=True):
            length = int(asked.sum()) - 1
            assert low <= length <= high <= language.length
            assert MEMBER[name](text(language, row[1 : length + 1]))
            assert asked[: length + 1].all()


def test_draws_repeat_with_the_generator_and_test_splits_are_complete() -> None:
    language = Language("parity")
    a, b = (language.draw(TRAIN, 5, torch.Generator().manual_seed(3)).inputs for _ in range(2))
    assert torch.equal(a, b)
    counter = Language("a^nb^n")  # there is one word of every length: all are tested
    assert len(counter.draw("bin1", 500, torch.Generator())) == len(counter.lengths("bin1")) == 25


def test_a_set_of_symbols_counts_as_a_whole() -> None:
    batch = Language("(aa)*").draw("bin0", 1, torch.Generator())
    right = batch.targets * 2 - 1
    assert batch.correct(right).all()
    wrong = right.clone()
    wrong[0, 1, END] *= -1  # one symbol of one position
    correct = batch.correct(wrong)
    assert not correct[0, 1] and int((~correct).sum()) == 1
    assert batch.loss(right * 20) < 1e-6 < batch.loss(wrong * 20)
