"""The invented language: one reading a sentence, agreement, nothing of a test in training."""

from __future__ import annotations

import dataclasses
import random
import re

import pytest

from nestlearn.evals.invented_language import (
    ADJECTIVES,
    INTRANSITIVE,
    NOUNS,
    PLACES,
    RELATIONS,
    TENSES,
    TRANSITIVE,
    InventedLanguage,
    Meaning,
    Phrase,
    draw_meaning,
    english,
    sentences,
    split,
)

SEEDS = range(6)
VERBS = [forms[0] for forms in (*TRANSITIVE, *INTRANSITIVE)]


def read(language: InventedLanguage, sentence: str) -> Meaning:
    """The meaning of a sentence, by cutting its words up: an account of the grammar that shares
    nothing with the writer but its tables. Raises where a word does not agree."""
    meant = {stem: word for word, stem in language.stems.items()}
    marks = {affix: mark for mark, affix in language.suffixes.items()}
    words = sentence[:-1].lower().split()
    roles = {}
    phrases: list[tuple[str, Phrase]] = []
    agreed: tuple[int, bool] | None = None
    nouns = {singular for singular, _ in NOUNS}
    tokens = []
    for word in words:
        if word in meant and meant[word] == "not":
            tokens.append(("not", None, []))
        elif word[2:7] in meant and meant[word[2:7]] in VERBS and len(word) == 9:
            tokens.append(("verb", meant[word[2:7]], [word[:2], marks[word[7:]]]))
        else:
            endings = [marks[e] for e in re.findall("..", word[5:])]
            tokens.append(("word", meant[word[:5]], endings))
    for i, (kind, stem, endings) in enumerate(tokens):
        if kind == "not":
            beside = tokens[i + 1] if language.negation_first else tokens[i - 1]
            assert beside[0] == "verb"
            roles["negated"] = True
        elif kind == "verb":
            agreed = {v: k for k, v in language.prefixes.items()}[endings[0]]
            roles |= {"verb": stem, "tense": endings[1]}
            phrases.append(("V", Phrase("")))
        elif stem in PLACES:
            assert i == (0 if language.place_first else len(tokens) - 1)
            roles["place"] = (endings[0], stem)
        elif stem in nouns:
            plural = endings[:1] == ["plural"]
            case = endings[int(plural) :]
            adjective = None
            near = i - 1 if language.adjective_first else i + 1
            if 0 <= near < len(tokens) and tokens[near][1] in ADJECTIVES:
                adjective = tokens[near][1]
                assert tokens[near][2] == [(language.classes[stem], plural)]
            role = "O" if case == ["object"] else "S"
            assert case in ([], ["object"])
            phrases.append((role, Phrase(stem, plural, adjective)))
        else:
            assert stem in ADJECTIVES
    assert [role for role, _ in phrases] == [r for r in language.order if r in dict(phrases)]
    subject = dict(phrases)["S"]
    assert agreed == (language.classes[subject.noun], subject.plural)
    return Meaning(subject, object=dict(phrases).get("O"), **roles)


def meanings(count: int, seed: int) -> list[Meaning]:
    draw = random.Random(seed)
    return [draw_meaning(draw) for _ in range(count)]


@pytest.mark.parametrize("seed", SEEDS)
def test_every_sentence_has_one_reading_in_which_all_words_agree(seed: int) -> None:
    language = InventedLanguage(seed)
    for meaning in meanings(300, seed):
        assert read(language, language.write(meaning)) == meaning


def test_a_word_that_does_not_agree_is_noticed() -> None:
    language = InventedLanguage(0)
    subject = Phrase("dog", adjective="old")
    sentence = language.write(Meaning(subject, "sleep"))
    right = language.suffixes[language.classes["dog"], False]
    wrong = language.suffixes[(language.classes["dog"] + 1) % 3, False]
    stem = language.stems["old"]
    lower = sentence.lower()
    assert stem + right in lower
    with pytest.raises(AssertionError):
        read(language, lower.replace(stem + right, stem + wrong))


def test_a_seed_decides_everything() -> None:
    some = meanings(50, 3)
    assert sentences(InventedLanguage(1), some) == sentences(InventedLanguage(1), some)
    written = [tuple(s for s, _ in sentences(InventedLanguage(seed), some)) for seed in SEEDS]
    assert len(set(written)) == len(SEEDS)
    assert len({InventedLanguage(s).name for s in SEEDS}) == len(SEEDS)
    # Not all of a kind either: the drawn rules differ between seeds.
    assert len({InventedLanguage(s).order for s in range(30)}) == 5
    assert {InventedLanguage(s).adjective_first for s in SEEDS} == {True, False}


def test_stems_and_affixes_are_different_and_no_english() -> None:
    for seed in SEEDS:
        language = InventedLanguage(seed)
        stems = list(language.stems.values())
        assert len(set(stems)) == len(stems)
        assert all(re.fullmatch("[^aeiou][aeiou][^aeiou][aeiou][^aeiou]", s) for s in stems)
        suffixes = list(language.suffixes.values())
        assert len(set(suffixes)) == len(suffixes) == 2 + len(RELATIONS) + len(TENSES) + 6
        assert len(set(language.prefixes.values())) == 6
        assert not set(stems) & set(language.stems)
        assert ("dog" in dict(map(reversed, language.lexicon()))) is True


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, "The woman sees the mouse."),
        ({"subject": Phrase("woman", True, "tall")}, "The tall women see the mouse."),
        ({"tense": "past"}, "The woman saw the mouse."),
        ({"tense": "past", "negated": True}, "The woman did not see the mouse."),
        ({"negated": True}, "The woman does not see the mouse."),
        ({"negated": True, "subject": Phrase("man", True)}, "The men do not see the mouse."),
        ({"tense": "future"}, "The woman will see the mouse."),
        ({"tense": "future", "negated": True}, "The woman will not see the mouse."),
        ({"object": Phrase("mouse", True)}, "The woman sees the mice."),
        ({"place": ("in", "house")}, "The woman sees the mouse in the house."),
    ],
)
def test_english(change: dict, expected: str) -> None:
    meaning = Meaning(Phrase("woman"), "see", Phrase("mouse"))
    assert english(dataclasses.replace(meaning, **change)) == expected


def test_english_says_as_much_as_the_meaning() -> None:
    some = set(meanings(3000, 0))
    assert len({english(m) for m in some}) == len(some)


def test_training_and_test_share_words_but_no_sentence() -> None:
    learned, asked = split(200, 60, seed=4)
    assert (len(learned), len(asked)) == (200, 60)
    language = InventedLanguage(4)
    for side in (0, 1):
        train = {pair[side] for pair in sentences(language, learned)}
        test = {pair[side] for pair in sentences(language, asked)}
        assert len(train) == 200 and len(test) == 60 and not train & test
    known = set().union(*(m.words() for m in learned))
    assert all(m.words() <= known for m in asked)
    assert split(200, 60, seed=4) == (learned, asked)
    assert split(200, 60, seed=5) != (learned, asked)


def test_splits_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="1 or more"):
        split(0, 5)
    with pytest.raises(ValueError, match="too few words"):
        split(1, 50)
