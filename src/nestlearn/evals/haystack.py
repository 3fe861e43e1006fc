"""Long background texts in which facts are hidden, in the tokens of any tokenizer."""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nestlearn.evals.harness.data import data_path

NOISE = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.",
)
"""RULER's haystack without content: this line again and again."""
TEST_BOOKS = (
    "Stevenson_Treasure_1883", "Conrad_Nostromo_1904", "Gaskell_Ruth_1855", "James_Ambassadors_1903"
)  # fmt: skip
"""Books of the novels that are kept for testing."""
_SENTENCE = re.compile(r"(?<=[.!?])[\"')\]]*\s+(?=[\"'(A-Z])")
_ANCHOR = "a"


def encode(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Tokens of texts as they are in the middle of a longer one, without special tokens.

    Some tokenizers put a mark in front of whatever they are given; each text is therefore
    tokenised behind a letter, whose tokens are then taken off.

    Example:
        >>> encode(tokenizer, ["hi", ""])
        [[104, 105], []]
    """
    if not texts:
        return []
    ahead = tokenizer(_ANCHOR, add_special_tokens=False).input_ids
    joined = tokenizer([_ANCHOR + t for t in texts], add_special_tokens=False).input_ids
    found = []
    for text, ids in zip(texts, joined, strict=True):
        if ids[: len(ahead)] != ahead:  # the letter and the text became one token
            ids = ahead + tokenizer(text, add_special_tokens=False).input_ids
        found.append([int(i) for i in ids[len(ahead) :]])
    return found


def begin(tokenizer: Any) -> list[int]:
    """The special token that the tokenizer puts before a text, if it does.

    Example:
        >>> begin(tokenizer)
        []
    """
    first = tokenizer("").input_ids[:1]
    return first if first and first[0] == tokenizer.bos_token_id else []


class Haystack:
    """Sentences one behind the other, from which windows of any length are cut.

    Args:
        tokenizer: any Hugging Face tokenizer.
        sentences: of the text, in order.
        joint: put before every sentence.

    Raises:
        ValueError: there are no sentences.

    Example:
        >>> hay = Haystack(tokenizer, ["One.", "Two."])
        >>> tokens, places = hay.window(12, np.random.default_rng(0))
        >>> tokenizer.decode(tokens), places.tolist()
        ('e. Two. One.', [2, 7, 12])
    """

    def __init__(self, tokenizer: Any, sentences: Iterable[str], joint: str = " ") -> None:
        texts = list(sentences)
        pieces = encode(tokenizer, [joint + s for s in texts])
        self.sentences = [s for s, p in zip(texts, pieces, strict=True) if p]
        pieces = [p for p in pieces if p]
        if not pieces:
            raise ValueError("the haystack has no sentences; give it some text")
        self.joint = joint
        self.tokens = np.concatenate([np.asarray(p, dtype=np.int32) for p in pieces])
        self.starts = np.cumsum([0, *(len(p) for p in pieces[:-1])])

    @classmethod
    def noise(cls, tokenizer: Any) -> Haystack:
        """The text that says nothing."""
        return cls(tokenizer, NOISE, joint="\n")

    @classmethod
    def books(
        cls,
        tokenizer: Any,
        folder: str | Path | None = None,
        characters: int = 2_000_000,
        split: str = "test",
    ) -> Haystack:
        """Text of a folder, of every file an equally long part.

        Args:
            tokenizer: any.
            folder: ``.txt`` and ``.txt.gz`` files. Default: the English novels of the data sets.
            characters: about how many are read.
            split: ``"train"``, ``"test"`` or ``"all"``: which of the novels. Other folders have no
                such split.

        Raises:
            ValueError: no such folder or split, or no text in it.
        """
        paths = books_in(folder, split)
        part = -(-characters // len(paths))
        texts = (read_text(path, part) for path in paths)
        return cls(tokenizer, (s for text in texts for s in sentences_of(text)))

    def __len__(self) -> int:
        return len(self.tokens)

    def containing(self, phrases: Sequence[str]) -> np.ndarray:
        """The numbers of the sentences that have one of the phrases in them, as whole words.

        Example:
            >>> hay = Haystack(tokenizer, ["We saw the parks.", "He went to the park."])
            >>> hay.containing(["the park"])
            array([1])
        """
        if not phrases:
            return np.zeros(0, dtype=np.int64)
        any_of = re.compile(rf"\b(?:{'|'.join(map(re.escape, phrases))})\b")
        return np.flatnonzero([any_of.search(s) is not None for s in self.sentences])

    def window(
        self, length: int, rng: np.random.Generator, around: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Exactly ``length`` tokens, ending where a sentence ends; the text goes round.

        Args:
            length: in tokens.
            rng: chooses where.
            around: sentences, by number. One of them lies in the window, anywhere, if it fits.

        Returns:
            The tokens, and the places between sentences, from the first to ``length``.
        """
        stop = int(rng.choice(self.starts))
        if length == 0:
            return self.tokens[:0], np.zeros(1, dtype=np.int64)
        if around is not None and len(around):
            first = int(self.starts[rng.choice(around)])
            ends = np.concatenate([self.starts, self.starts + len(self)])
            ends = ends[(ends > first) & (ends <= first + length)]
            stop = int(rng.choice(ends)) if len(ends) else stop
        first = stop - length
        rounds = range(first // len(self), -(-stop // len(self)) + 1)
        places = np.concatenate([self.starts + r * len(self) for r in rounds]) - first
        tokens = self.tokens.take(np.arange(first, stop), mode="wrap")
        return tokens, places[(places >= 0) & (places <= length)]


def insert(
    tokens: np.ndarray, places: Sequence[int], pieces: Sequence[Sequence[int]]
) -> list[np.ndarray]:
    """The tokens cut at ``places`` (ascending), with one of the pieces in every cut.

    Example:
        >>> [p.tolist() for p in insert(np.arange(4), [1, 4], [[7], [8, 9]])]
        [[0], [7], [1, 2, 3], [8, 9], []]
    """
    found, before = [], 0
    for place, piece in zip(places, pieces, strict=True):
        found += [tokens[before:place], np.asarray(piece, dtype=np.int32)]
        before = place
    return [*found, tokens[before:]]


def texts_in(folder: Path) -> list[Path]:
    """Text files of a folder, in a fixed order.

    Raises:
        ValueError: there are none.
    """
    paths = sorted(p for p in folder.rglob("*") if p.name.endswith((".txt", ".txt.gz")))
    if not paths:
        raise ValueError(f"no .txt or .txt.gz files in {folder}: name a folder that has some")
    return paths


def books_in(folder: str | Path | None = None, split: str = "test") -> list[Path]:
    """Text files of a folder, or those of the novels that a split has.

    Raises:
        ValueError: no such folder or split, or no text in it.
    """
    paths = texts_in(data_path("english_novels") if folder is None else Path(folder))
    if split not in ("train", "test", "all"):
        raise ValueError(f"split must be 'train', 'test' or 'all', got {split!r}")
    if folder is None and split != "all":
        kept = [p for p in paths if (p.name.split(".")[0] in TEST_BOOKS) == (split == "test")]
        paths = kept or paths
    return paths


def training_texts(characters: int) -> list[str]:
    """Beginnings of the novels that are not for testing."""
    paths = [
        p for p in texts_in(data_path("english_novels")) if p.name.split(".")[0] not in TEST_BOOKS
    ]
    return [read_text(p, characters // len(paths)) for p in paths]


def read_text(path: Path, characters: int = -1) -> str:
    """The beginning of a text file that may be gzipped."""
    if path.suffix == ".gz":
        with gzip.open(path, "rt", encoding="utf-8") as file:
            return file.read(characters)
    with path.open(encoding="utf-8") as file:
        return file.read(characters)


def sentences_of(text: str) -> Iterator[str]:
    """Sentences, each on one line.

    Example:
        >>> list(sentences_of("He came.  She saw;\\nand left! (So."))
        ['He came.', 'She saw; and left!', '(So.']
    """
    start = 0
    for match in _SENTENCE.finditer(text):
        end = match.start() + len(match.group().rstrip())
        if sentence := " ".join(text[start:end].split()):
            yield sentence
        start = match.end()
    if sentence := " ".join(text[start:].split()):
        yield sentence
