"""Tasks whose texts are as long as one asks for, on any causal language model: ``NAME@TOKENS``.

| task | text | score |
|---|---|---|
| ``niah_...`` | needles in a haystack (`nestlearn.evals.needles`) | share of the answers written |
| ``babilong_qa1`` ... ``qa5`` | bAbI facts between sentences of books | the answer and no other |
| ``qasper``, ``quality``, ``longhealth`` | documents, cut to the length | F1; choices right |
| ``context`` | long stretches of books | perplexity, by how much was read |

Lengths are tokens of the model's own tokenizer and count everything before the answer, but for
documents, whose questions come on top. Every text is read from the initial state; what does not
fit into a model's context is refused, or cut from the left.
"""

from __future__ import annotations

import dataclasses
import math
import re
import statistics
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nestlearn.evals import babilong, long_documents, needles
from nestlearn.evals.context_use import edges, losses_by_position
from nestlearn.evals.haystack import Haystack, begin, books_in, encode, read_text

BABILONG = tuple(f"qa{n}" for n in range(1, 6))
NAMES = (
    *needles.TASKS, *(f"babilong_{name}" for name in BABILONG), *long_documents.FILES, "context",
)  # fmt: skip
"""All tasks there are."""
EXAMPLES = 100
"""Of a task, unless it is said how many."""
STRETCHES = 16
"""Of text for ``context``."""
SHOTS = 2
"""Solved stories before those of BABILong."""
NUMBERS = {name: 128 for name in needles.TASKS} | {
    f"babilong_{name}": 8 for name in BABILONG
} | {name: 32 for name in long_documents.FILES} | {"context": 0}  # fmt: skip
"""Tokens that a model may write (needles: RULER's number)."""
_UNITS = {"": 1, "k": 2**10, "m": 2**20}


@dataclasses.dataclass(frozen=True)
class Sized:
    """A task at a length.

    Attributes:
        name: one of `NAMES`. length: in tokens.
    """

    name: str
    length: int

    def __str__(self) -> str:
        return f"{self.name}@{self.length}"


def parse(text: str) -> Sized | None:
    """The task that ``NAME@TOKENS`` means; None where there is no ``@``.

    Raises:
        ValueError: no such task, or no length.

    Example:
        >>> parse("niah_single_2@4k"), parse("piqa")
        (Sized(name='niah_single_2', length=4096), None)
    """
    name, mark, length = text.partition("@")
    if not mark:
        return None
    if name not in NAMES:
        raise ValueError(f"no task {name!r} at a length; choose one of {', '.join(NAMES)}")
    found = re.fullmatch(r"(\d+)([km]?)", length.lower())
    if found is None or int(found[1]) < 1:
        raise ValueError(f"{text}: the length must be tokens, such as 4096, 4k or 1M")
    return Sized(name, int(found[1]) * _UNITS[found[2]])


def check_data(task: Sized, text: Path | None = None) -> None:
    """Raises:
    ValueError: what the task reads is not there; ``text`` is the folder of its books.
    """
    if task.name in long_documents.FILES:
        long_documents.path_of(task.name)
        return
    if task.name.startswith("babilong_"):
        babilong.babi_file(task.name.removeprefix("babilong_"), "test")
    needle = needles.TASKS.get(task.name)
    if needle is None or needle.text:
        _books(text)


def measure(
    model: Any,
    tokenizer: Any,
    task: Sized,
    *,
    limit: int | None = None,
    shots: int | None = None,
    text: Path | None = None,
    max_length: int | None = None,
    overflow: str = "error",
    batch_tokens: int = 4096,
    seed: int = 0,
    notify: Callable[[str], None] = print,
) -> dict[str, Any]:
    """The row of a task: ``metrics``, ``errors`` (standard errors), ``examples``, ``seconds``.

    Args:
        model, tokenizer: a causal language model in evaluation mode.
        limit: examples; None: 100 (16 stretches of ``context``; all questions about documents).
        shots: solved stories before BABILong's text; None: 2. Other tasks have none.
        text: folder of ``.txt`` files that is the haystack; None: the novels of the data sets.
        max_length: tokens the model can see; None: no limit.
        overflow: ``"error"``, or ``"cut"`` texts from the left that are longer.
        batch_tokens: texts are read together up to so many tokens.
        seed: of the examples.
        notify: gets a line about what was cut.

    Raises:
        ValueError: data that is not there, texts that do not fit.

    Example:
        >>> from nestlearn import HopeConfig, HopeForCausalLM
        >>> model = HopeForCausalLM(HopeConfig.preset("tiny")).eval()
        >>> row = measure(model, tokenizer, parse("niah_single_1@400"), limit=1)
        >>> row["metrics"], row["examples"]
        ({'contains': 0.0}, 1)
    """
    began = time.perf_counter()
    room = _Room(task, max_length, overflow, notify)
    if task.name == "context":
        found = _context(model, tokenizer, task, limit or STRETCHES, text, room)
    else:
        if task.name in needles.TASKS:
            metric, scores = "contains", _needles(model, tokenizer, task, limit or EXAMPLES, text,
                                                  room, batch_tokens, seed)  # fmt: skip
        elif task.name in long_documents.FILES:
            metric, scores = _documents(model, tokenizer, task, limit, room, seed)
        else:
            asked = SHOTS if shots is None else shots
            metric, scores = "acc", _babilong(model, tokenizer, task, limit or EXAMPLES, asked,
                                              text, room, batch_tokens, seed)  # fmt: skip
        error = statistics.stdev(scores) / math.sqrt(len(scores)) if len(scores) > 1 else None
        found = {"metrics": {metric: statistics.fmean(scores)},
                 "errors": {} if error is None else {metric: error},
                 "examples": len(scores)}  # fmt: skip
    source = "generated" if task.name == "niah_single_1" else "local"
    return {"task": str(task), **found, "source": source, "seconds": time.perf_counter() - began}


class _Room:
    """What fits into a model's context; says once what was cut."""

    def __init__(
        self, task: Sized, limit: int | None, overflow: str, notify: Callable[[str], None]
    ) -> None:
        self.task, self.limit, self.overflow, self.notify = task, limit, overflow, notify
        self.said = False

    def keep(self, tokens: int) -> int:
        """How many of the last tokens of a prompt can stay."""
        new = NUMBERS[self.task.name]
        if self.limit is None or tokens + new <= self.limit:
            return tokens
        what = (
            f"{self.task}: {tokens} tokens and {new} to be written are more than the model's "
            f"context of {self.limit}"
        )
        left = self.limit - new
        if self.overflow != "cut" or left < 1 or self.task.name == "context":
            cure = "" if self.task.name == "context" else ", --overflow cut"
            raise ValueError(f"{what}; choose a smaller length{cure} or a larger --max-length")
        if not self.said:
            self.notify(f"{what}: cut from the left")
        self.said = True
        return left


def _books(folder: Path | None) -> list[Path]:
    try:
        return books_in(folder)
    except ValueError as error:
        cure = "" if folder is not None else "; or name a folder of .txt files with --text"
        raise ValueError(f"{error}{cure}") from error


def _needles(
    model: Any, tokenizer: Any, task: Sized, count: int, text: Path | None, room: _Room,
    batch_tokens: int, seed: int,
) -> list[float]:  # fmt: skip
    if needles.TASKS[task.name].text:
        _books(text)
    kept = room.keep(task.length)
    return needles.scores(
        model, tokenizer, task.name, task.length, count, seed, text=text,
        batch=max(1, batch_tokens // kept), new_tokens=NUMBERS[task.name], keep=kept,
    )  # fmt: skip


# -- BABILong -------------------------------------------------------------------------------------

_INTRODUCTION = (
    "Facts are hidden in a text. Answer the question at its end with one word, from the facts "
    "alone.\n\n"
)


def _solved(story: babilong.Story) -> str:
    return f"{' '.join(story.facts)}\nQuestion: {story.question}\nAnswer: {story.answer}\n\n"


def only(written: str, answer: str, answers: Sequence[str]) -> bool:
    """Whether the first line has the right answer and no other one.

    Example:
        >>> only(" The kitchen.\\nBob", "kitchen", ["kitchen", "garden"])
        True
        >>> only("kitchen or garden", "kitchen", ["kitchen", "garden"])
        False
    """
    line = written.strip().split("\n")[0].lower()
    return {a for a in answers if re.search(rf"\b{re.escape(a.lower())}\b", line)} == {answer}


def _babilong(
    model: Any, tokenizer: Any, task: Sized, count: int, shots: int, text: Path | None,
    room: _Room, batch_tokens: int, seed: int,
) -> list[float]:  # fmt: skip
    stories = babilong.load_stories(babilong.babi_file(task.name.removeprefix("babilong_"), "test"))
    answers = sorted({s.answer for s in stories})
    # Short ones, with different answers where there are some; none of them is asked.
    shown: list[babilong.Story] = []
    for story in sorted(stories, key=lambda s: len(s.facts)):
        if len(shown) < shots and story.answer not in {s.answer for s in shown}:
            shown.append(story)
    pool = [s for s in stories if s not in shown]
    intro = _INTRODUCTION + "".join(map(_solved, shown))
    head = np.asarray(begin(tokenizer) + encode(tokenizer, [intro])[0], dtype=np.int32)
    _books(text)
    hay = Haystack.books(tokenizer, text, max(2_000_000, 8 * task.length))
    rng = np.random.default_rng(seed)
    kept, asked = room.keep(task.length), []
    for _ in range(100 * count):
        story = pool[int(rng.integers(len(pool)))]
        length = task.length - len(head)
        made = babilong.scattered(tokenizer, hay, story, length, rng) if length > 0 else None
        if made is not None:
            asked.append((np.concatenate([head, made[0]])[-kept:], story.answer))
        if len(asked) == count:
            break
    else:
        raise ValueError(
            f"{task}: hardly any story fits beside {len(head)} tokens of introduction and "
            f"{len(shown)} solved ones; choose a larger length, or fewer --shots"
        )
    prompts, batch = [prompt for prompt, _ in asked], max(1, batch_tokens // kept)
    written = needles.answer(model, tokenizer, prompts, NUMBERS[task.name], batch)
    return [float(only(w, right, answers)) for w, (_, right) in zip(written, asked, strict=True)]


# -- documents and context ------------------------------------------------------------------------


def _documents(
    model: Any, tokenizer: Any, task: Sized, limit: int | None, room: _Room, seed: int
) -> tuple[str, list[float]]:
    documents = long_documents.load(task.name, tokenizer, task.length, 10**9, seed)
    asked = [(d, q) for d in documents for q in d.questions][:limit]
    new, scores = NUMBERS[task.name], []
    for document, question in asked:
        ids = tokenizer(document.text, add_special_tokens=False).input_ids
        own = len(tokenizer(question.prompt, add_special_tokens=False).input_ids) + 1
        kept = max(0, room.keep(len(ids) + own) - own)
        whole = kept >= len(ids)
        context = document.text if whole else tokenizer.decode(ids[len(ids) - kept :])
        scores.append(long_documents.score(model, tokenizer, question, context, new))
    return ("f1" if asked[0][1].metric == "f1" else "acc"), scores


def _context(
    model: Any, tokenizer: Any, task: Sized, count: int, text: Path | None, room: _Room
) -> dict[str, Any]:
    room.keep(task.length)
    rows = _stretches(tokenizer, task.length, count, text)
    losses = torch.cat([losses_by_position(model, row.to(model.device)) for row in rows.split(1)])
    means, limits = losses.double().mean(0), edges(task.length - 1)
    last = [float(row[limits[-2] :].mean()) for row in losses]
    spans = {f"{a}-{b}": math.exp(float(means[a:b].mean())) for a, b in pairwise(limits)}
    value = math.exp(statistics.fmean(last))
    # Of a mean of logarithms, carried over to the perplexity.
    error = value * statistics.stdev(last) / math.sqrt(len(last)) if len(last) > 1 else None
    return {"metrics": {"perplexity": value, **spans},
            "errors": {} if error is None else {"perplexity": error},
            "examples": len(rows)}  # fmt: skip


def _stretches(tokenizer: Any, length: int, count: int, folder: Path | None) -> torch.Tensor:
    """Stretches of texts, ``(count, length)``: the first of every text, then the second, ..."""
    paths = _books(folder)
    first = begin(tokenizer)
    size = length - len(first)
    texts = [
        tokenizer(read_text(p, 8 * size * (1 + count // len(paths))), add_special_tokens=False,
                  verbose=False).input_ids
        for p in paths
    ]  # fmt: skip
    rows = [
        first + ids[start : start + size]
        for start in range(0, max(map(len, texts)), size)
        for ids in texts
        if start + size <= len(ids)
    ]
    if size < 2 or not rows:
        raise ValueError(
            f"no text of {length} tokens in {folder or 'the novels'}: choose a smaller length"
        )
    return torch.tensor(rows[:count])
