"""Fig. 9: BABILong (Kuratov et al. 2024), bAbI facts scattered in the text of books.

The facts of a bAbI story stand in their order between sentences of novels, anywhere; the question
about them comes at the end. Systems are trained on short texts and answer at the end of ever longer
ones, which they read as a stream: in pieces, with state of constant size. What cannot do so, a
Transformer, reads the end of the text (its window), or the sentences that a search finds for the
question (BM25). An answer is one word; right is what the model finds most likely of all tokens.
"""

from __future__ import annotations

import copy
import dataclasses
import gzip
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nestlearn.evals.harness.data import data_path
from nestlearn.evals.harness.task import IGNORE, TRAIN, VALIDATION, Batch, Task
from nestlearn.evals.haystack import Haystack, encode, insert, training_texts
from nestlearn.evals.reading import PIECE, read
from nestlearn.train.tokenizers import train_bpe

SHORT = 64
"""About how many tokens a story has that nothing surrounds."""
FOUND = 8
"""Sentences that the search hands over."""


@dataclasses.dataclass(frozen=True)
class Story:
    """Facts, a question about them, its answer."""

    facts: tuple[str, ...]
    question: str
    answer: str


def load_stories(path: Path) -> list[Story]:
    """The questions of a bAbI file, each with all facts of its story before it."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return list(parse_stories(file))


def parse_stories(lines: Iterator[str] | Sequence[str]) -> Iterator[Story]:
    """Questions of bAbI lines.

    Example:
        >>> lines = ["1 Mary went home.", "2 Where is Mary? \\thome\\t1", "1 Bob left."]
        >>> list(parse_stories(lines))
        [Story(facts=('Mary went home.',), question='Where is Mary?', answer='home')]
    """
    facts: list[str] = []
    for line in lines:
        number, _, rest = line.strip().partition(" ")
        if number == "1":
            facts = []
        question, *answered = rest.split("\t")
        if answered:
            yield Story(tuple(facts), question.strip(), answered[0].strip())
        elif rest:
            facts.append(rest.strip())


def endings_of(stories: Sequence[Story], words: int = 3) -> list[str]:
    """How the facts of stories end: their last words, without the full stop.

    Example:
        >>> endings_of([Story(("Mary went to the hall.", "Bob slept."), "Where is Mary?", "hall")])
        ['to the hall']
    """
    facts = {f.rstrip(".") for s in stories for f in s.facts}
    return sorted({" ".join(f.split()[-words:]) for f in facts if len(f.split()) > words})


def babi_file(task: str, part: str) -> Path:
    """The file of a task, ``part`` being train or test.

    Raises:
        ValueError: there is none.
    """
    folder = data_path("babi", "en-10k")
    paths = [p for p in folder.glob(f"{task}_*") if re.search(rf"_{part}\.txt\.gz$", p.name)]
    if len(paths) != 1:
        raise ValueError(f"no file {task}_*_{part}.txt.gz among the bAbI data (en-10k)")
    return paths[0]


@dataclasses.dataclass(frozen=True)
class Sample:
    """A text with a question at its end.

    Attributes:
        tokens: all of it.
        sentences: where sentences begin; the last is the question.
        answer: the token that is right.
    """

    tokens: np.ndarray
    sentences: np.ndarray
    answer: int


def scattered(
    tokenizer: Any,
    background: Haystack,
    story: Story,
    length: int,
    rng: np.random.Generator,
    around: np.ndarray | None = None,
    share: float = 1.0,
) -> tuple[np.ndarray, np.ndarray] | None:
    """A story in a text of ``length`` tokens, up to where the answer begins.

    Args:
        tokenizer: any. background: the haystack.
        length: in tokens; 0: no text but the story.
        around: sentences of the haystack; one of them is in a ``share`` of the texts.

    Returns:
        Tokens, and where sentences begin (the last is the question); None: it does not fit.
    """
    texts = [*(f" {f}" for f in story.facts), f"\nQuestion: {story.question}\nAnswer:"]
    *facts, question = encode(tokenizer, texts)
    rest = length - len(question) - sum(map(len, facts)) if length else 0
    if rest < 0:
        return None
    if around is not None and rng.random() >= share:
        around = None
    tokens, places = background.window(rest, rng, around)
    chosen = sorted(int(p) for p in rng.choice(places, len(facts)))
    pieces = [*insert(tokens, chosen, facts), np.asarray(question, dtype=np.int32)]
    # Every old sentence moves on by the facts that are now before it.
    sizes = np.cumsum([0, *map(len, facts)])
    moved = places + sizes[np.searchsorted(chosen, places, side="right")]
    ends = np.cumsum([0, *map(len, pieces)])
    return np.concatenate(pieces), np.unique(np.concatenate([[0], moved, ends[1:-1]]))


class Scatterer:
    """Puts stories into a haystack, in the tokens of one tokenizer.

    Args:
        tokenizer: any.
        background: the haystack.
        answers: all words that are answers.
        distractors: share of the texts whose haystack has a sentence with one of the ``endings``.
        endings: how facts end, see `endings_of`.

    Raises:
        ValueError: two answers begin with the same token.
    """

    def __init__(
        self,
        tokenizer: Any,
        background: Haystack,
        answers: Sequence[str],
        distractors: float = 0.0,
        endings: Sequence[str] = (),
    ) -> None:
        self.tokenizer, self.background = tokenizer, background
        self.distractors = distractors
        self.alike = background.containing(endings) if distractors else None
        firsts = [ids[0] for ids in encode(tokenizer, [f" {a}" for a in answers])]
        if len(set(firsts)) != len(firsts):
            raise ValueError(
                "with this tokenizer answers begin alike; use one that knows the words"
            )
        self.answers = dict(zip(answers, firsts, strict=True))

    def scatter(self, story: Story, length: int, rng: np.random.Generator) -> Sample | None:
        """The story in a text of ``length`` tokens (0: without any other text); None: it does not
        fit."""
        made = scattered(
            self.tokenizer, self.background, story, length, rng, self.alike, self.distractors
        )
        return None if made is None else Sample(*made, self.answers[story.answer])


class Scattered(Task):
    """One bAbI task in texts of several lengths.

    Args:
        name: ``"qa1"`` ... ``"qa5"``.
        trained, tested: ascending lengths of texts, in tokens; 0: only the facts.
        vocab_size, characters: of the tokenizer, and read into each haystack.
        distractors: share of the training texts with a sentence of the books that ends as a fact
            does ("At noon I went to the office."). Books have one in some 120,000
            tokens: short training texts show hardly any, a long test text several.
    """

    def __init__(
        self,
        name: str,
        trained: tuple[int, ...],
        tested: tuple[int, ...],
        vocab_size: int,
        characters: int,
        distractors: float = 0.0,
    ) -> None:
        self.name, self.trained, self.tested = name, trained, tested
        self.vocab_size, self.characters = vocab_size, characters
        self.distractors = distractors
        self.lengths = trained  # those a training batch has one of
        self.length = trained[-1]
        self.splits = tuple(map(str, tested))
        self._made: tuple[dict[str, list[Story]], dict[str, Scatterer]] | None = None

    def at(self, progress: float) -> Scattered:
        """Texts grow: the shortest, then every length with the one before it."""
        self.materials()  # shared with the copy
        taught, last = copy.copy(self), int(progress * len(self.trained))
        taught.lengths = self.trained[max(0, last - 1) : last + 1]
        return taught

    def materials(self) -> tuple[dict[str, list[Story]], dict[str, Scatterer]]:
        """Stories and scatterers, by split (`TRAIN`, `VALIDATION`, ``"test"``)."""
        if self._made is None:
            known = load_stories(babi_file(self.name, "train"))
            kept = len(known) // 10
            stories = {TRAIN: known[:-kept], VALIDATION: known[-kept:],
                       "test": load_stories(babi_file(self.name, "test"))}  # fmt: skip
            lines = [" ".join((*s.facts, s.question, s.answer)) for s in known[:2_000]]
            tokenizer = train_bpe([*training_texts(1_600_000), *lines], self.vocab_size)
            answers = sorted({s.answer for part in stories.values() for s in part})
            read = Haystack.books(tokenizer, None, self.characters, "train")
            held = Haystack.books(tokenizer, None, self.characters, "test")
            endings = endings_of(stories[TRAIN])
            self._made = (
                stories,
                {
                    TRAIN: Scatterer(tokenizer, read, answers, self.distractors, endings),
                    VALIDATION: Scatterer(tokenizer, read, answers),
                    "test": Scatterer(tokenizer, held, answers),
                },
            )
        return self._made

    def samples(
        self, split: str, count: int, length: int, rng: np.random.Generator
    ) -> list[Sample]:
        """Texts of one length; of stories that fit into it."""
        stories, scatterers = self.materials()
        pool, found = stories[split], []
        for _ in range(100 * count):
            story = pool[int(rng.integers(len(pool)))]
            sample = scatterers[split].scatter(story, length, rng)
            if sample is not None:
                found.append(sample)
            if len(found) == count:
                return found
        raise ValueError(f"hardly any story of {self.name} fits into {length} tokens")

    def draw(self, split: str, count: int, generator: torch.Generator) -> Batch:
        """Texts of one training length: the shorter, the more of them."""
        rng = np.random.default_rng(int(torch.randint(2**62, (1,), generator=generator)))
        length = self.trained[-1]
        if split == TRAIN:
            length = int(rng.choice(self.lengths))
            count *= max(1, self.trained[-1] // max(length, SHORT))
        part = split if split in (TRAIN, VALIDATION) else "test"
        samples = self.samples(part, count, length, rng)
        columns = max(len(s.tokens) for s in samples)
        inputs = torch.zeros(len(samples), columns, dtype=torch.long)
        targets = torch.full((len(samples), columns), IGNORE)
        for row, sample in enumerate(samples):
            inputs[row, : len(sample.tokens)] = torch.from_numpy(sample.tokens)
            targets[row, len(sample.tokens) - 1] = sample.answer
        return Batch.of(inputs, targets)


@torch.no_grad()
def read_stream(model: Any, rows: Sequence[np.ndarray], piece: int = PIECE) -> torch.Tensor:
    """Most likely next token after texts of one length, read in pieces: ``(B,)``.

    Args:
        model: takes and hands back its state as ``past_key_values``.
        rows: token numbers.
        piece: tokens read at once.
    """
    out = read(model, torch.from_numpy(np.stack(rows)).long(), piece)
    found: torch.Tensor = out.logits[:, -1].argmax(-1).cpu()
    return found


def search(sample: Sample, top: int = FOUND, k1: float = 1.5, b: float = 0.75) -> np.ndarray:
    """The sentences that fit the question best by BM25, in their order, and the question.

    ``score(s) = sum over tokens t of the question: idf(t) f (k1 + 1) / (f + k1 (1 - b + b |s| /
    mean |s|))``, ``f`` being how often t is in s, and ``idf = ln(1 + (n - n_t + 1/2) / (n_t +
    1/2))``, with n sentences of which n_t have t.
    """
    starts, question = sample.sentences[:-1], int(sample.sentences[-1])
    text, query = sample.tokens[:question], sample.tokens[question:]
    if len(starts) <= top:
        return sample.tokens
    lengths = np.diff([*starts, question])
    scale = k1 * (1 - b + b * lengths / lengths.mean())
    scores = np.zeros(len(starts))
    for token in np.unique(query):
        counts = np.add.reduceat(text == token, starts, dtype=np.int64)
        having = int((counts > 0).sum())
        idf = math.log(1 + (len(starts) - having + 0.5) / (having + 0.5))
        scores += idf * counts * (k1 + 1) / (counts + scale)
    best = np.sort(np.argsort(-scores, kind="stable")[:top])
    parts = [text[starts[i] : starts[i] + lengths[i]] for i in best]
    return np.concatenate([*parts, query])


def accuracy(model: Any, samples: Sequence[Sample], texts: Sequence[np.ndarray]) -> float:
    """Share of right answers; texts of one length are read together."""
    right = 0
    by_length: dict[int, list[tuple[np.ndarray, int]]] = {}
    for sample, text in zip(samples, texts, strict=True):
        by_length.setdefault(len(text), []).append((text, sample.answer))
    for group in by_length.values():
        for start in range(0, len(group), 8):
            part = group[start : start + 8]
            said = read_stream(model, [text for text, _ in part])
            right += sum(int(s) == answer for s, (_, answer) in zip(said, part, strict=True))
    return right / len(samples)
