"""Kalamang, a Papuan language of some 130 speakers, with its English.

Sentences of the dictionary and narratives that Eline Visser recorded (Visser 2020, Dictionaria 13;
Visser 2023, Multi-CAST Kalamang; CC BY 4.0). It is the language of the benchmark "machine
translation from one book" (Tanzer et al. 2023), but not its split: that benchmark's sentences come
from the grammar, which is not here.
"""

from __future__ import annotations

import csv
import gzip
import random
import re
from pathlib import Path


def split(
    folder: Path, train: int | None, test: int, words: int = 12, seed: int = 0
) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Pairs to learn and pairs to be asked: example sentences of the dictionary; where these do not
    suffice, utterances of the narratives are learned, too.

    No sentence that is asked, nor one with the same English, is learned.

    Args:
        folder: of the data set.
        train, test: sentences; ``train`` None: all there are.
        words: of the longest sentence.
        seed: which sentences are asked.

    Raises:
        ValueError: fewer sentences than asked for.
    """
    pairs = [p for p in example_sentences(folder) if _fits(p, words)]
    draw = random.Random(seed)
    draw.shuffle(pairs)
    if test >= len(pairs):
        raise ValueError(f"Kalamang has {len(pairs)} sentences of {words} words, {test} were asked")
    asked = pairs[:test]
    taken = {_plain(side) for pair in asked for side in pair}
    told = [p for p in narratives(folder) if _fits(p, words)]
    learned = [p for p in (*pairs[test:], *told) if not {_plain(p[0]), _plain(p[1])} & taken]
    if train is not None and train > len(learned):
        raise ValueError(f"Kalamang has {len(learned)} sentences to learn, {train} were asked for")
    return learned[:train], asked


def example_sentences(folder: Path) -> list[tuple[str, str]]:
    """(Kalamang, English) of the dictionary, each once. The English is usually the first of two
    translations, the Indonesian the second; a few rows have them the other way round."""
    found: dict[tuple[str, str], None] = {}
    for row in _table(folder / "dictionaria_examples.csv.gz"):
        first, second = row["Translated_Text"], row["alt_translation1"]
        english = second if second and _indonesian(first) > _indonesian(second) else first
        pair = (_clean(row["Primary_Text"]), _clean(english))
        if all(pair) and _indonesian(pair[1]) <= 0:
            found[pair] = None
    return list(found)


def narratives(folder: Path) -> list[tuple[str, str]]:
    """(Kalamang, English) of the narratives, without marks, stage notes and unclear utterances."""
    found: dict[tuple[str, str], None] = {}
    for row in _table(folder / "multicast_utterances.csv.gz"):
        pair = tuple(
            _clean(re.sub(r"\[[^]]*\]|#\S*", " ", row[key]))
            for key in ("Primary_Text", "Translated_Text")
        )
        if all(pair) and "[" not in "".join(pair):
            found[pair[0], pair[1]] = None
    return list(found)


_ENGLISH = frozenset({
    "the", "a", "an", "is", "are", "was", "were", "he", "she", "it", "they", "we", "you", "i",
    "his", "her", "my", "your", "their", "of", "to", "and", "not", "in", "on", "at", "don't",
    "that", "this", "there", "when", "then", "with", "for", "from", "who", "what", "has", "have",
    "had",
})  # fmt: skip
_INDONESIAN = frozenset({
    "di", "ke", "dari", "itu", "ini", "dia", "pu", "pi", "saya", "kau", "kitong", "dorang",
    "dong", "yang", "tidak", "sudah", "ada", "sama", "dengan", "mau", "bikin", "kasih", "satu",
    "lagi", "juga", "orang", "kalau", "untuk", "pergi", "mereka",
})  # fmt: skip


def _indonesian(text: str) -> int:
    """How many more words are Indonesian than English, of those that are frequent."""
    words = re.findall(r"[\w']+", text.lower())
    return sum(w in _INDONESIAN for w in words) - sum(w in _ENGLISH for w in words)


def _table(path: Path) -> list[dict[str, str]]:
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _clean(text: str) -> str:
    """Single spaces, no brackets around words that were filled in."""
    return " ".join(text.replace("[", "").replace("]", "").split())


def _plain(text: str) -> str:
    return " ".join(re.findall(r"[\w']+", text.lower()))


def _fits(pair: tuple[str, str], words: int) -> bool:
    return all(1 <= len(side.split()) <= words for side in pair)
