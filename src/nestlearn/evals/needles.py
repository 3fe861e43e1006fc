"""Needles in a haystack, by RULER's definitions (Hsieh et al. 2024), for any causal model.

Sentences that tie a magic number (or UUID) to a word are hidden in a long text; the text ends with
a question for some of the words. The score is the share of the right answers that are contained in
what the model writes.

| task | haystack | value | needles | asked for |
|---|---|---|---|---|
| ``niah_single_1`` | noise | 7 digits | 1 | 1 |
| ``niah_single_2`` | text | 7 digits | 1 | 1 |
| ``niah_single_3`` | text | UUID | 1 | 1 |
| ``niah_multikey_1`` | text | 7 digits | 4 words | 1 word |
| ``niah_multivalue`` | text | 7 digits | 1 word, 4 values | 4 values |
| ``niah_multiquery`` | text | 7 digits | 4 words | 4 words |

The text is a folder's (RULER: essays; here by default novels). A prompt is exactly as long as asked
for: the haystack begins in the middle of a sentence.
"""

from __future__ import annotations

import dataclasses
import statistics
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nestlearn.evals.haystack import Haystack, begin, encode, insert
from nestlearn.evals.reading import PIECE, read

_ADJECTIVES = (
    "able amber brave brisk calm clever cold curly deep dusty eager early faint fierce gentle "
    "giant grand happy hollow humble icy jolly keen kind lazy lively lonely loud lucky mellow "
    "mighty narrow noble odd pale plain proud quick quiet rapid rough rusty shiny silent smooth "
    "steady stormy tender tidy vivid warm wild wise young"
)
_NOUNS = (
    "anchor apple arrow badge barrel basket beacon bottle bridge bucket candle carpet castle "
    "cellar chimney circle copper cradle curtain desert engine falcon feather forest garden "
    "hammer harbor island jacket kettle ladder lantern lemon marble market meadow mirror monkey "
    "needle orchard paddle pencil pepper pillow planet pocket rabbit ribbon saddle shadow spider "
    "table ticket tunnel turtle valley violin wagon window winter"
)
ADJECTIVES, NOUNS = tuple(_ADJECTIVES.split()), tuple(_NOUNS.split())
"""A key is one of each."""


@dataclasses.dataclass(frozen=True)
class Needles:
    """What is hidden and what is asked.

    Attributes:
        text: hidden in real text, not in noise.
        uuids: values are UUIDs, not numbers of seven digits.
        keys, values: words, and values of each.
        queries: how many of the words are asked for.
    """

    text: bool = True
    uuids: bool = False
    keys: int = 1
    values: int = 1
    queries: int = 1

    @property
    def answers(self) -> int:
        """How many values are asked for."""
        return self.queries * self.values


TASKS: dict[str, Needles] = {
    "niah_single_1": Needles(text=False),
    "niah_single_2": Needles(),
    "niah_single_3": Needles(uuids=True),
    "niah_multikey_1": Needles(keys=4),
    "niah_multivalue": Needles(values=4),
    "niah_multiquery": Needles(keys=4, queries=4),
}


class TooLong(ValueError):
    """The needles and the sentences around them do not fit into the prompt."""


@dataclasses.dataclass(frozen=True)
class Example:
    """A prompt and the answers it asks for.

    Attributes:
        prompt: ``(length,)`` tokens.
        answers: in the order of the words asked for; values of one word as they are in the text.
    """

    prompt: np.ndarray
    answers: tuple[str, ...]

    @property
    def reply(self) -> str:
        """A right answer, as it goes on from the prompt."""
        return " " + ", ".join(self.answers) + "."


def check_task(name: str) -> Needles:
    """The task called ``name``.

    Raises:
        ValueError: there is none; the message lists all.
    """
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}; choose one of {', '.join(TASKS)}")
    return TASKS[name]


class Generator:
    """Draws examples of the tasks in the tokens of one tokenizer.

    Args:
        tokenizer: any Hugging Face tokenizer.
        text: the haystack of the tasks that need real text; None: only ``niah_single_1`` works.

    Example:
        >>> example = Generator(tokenizer).draw("niah_single_1", 1_000, np.random.default_rng(0))
        >>> len(example.prompt), example.answers
        (1000, ('6732655',))
    """

    def __init__(self, tokenizer: Any, text: Haystack | None = None) -> None:
        self.tokenizer, self.text = tokenizer, text
        self.noise = Haystack.noise(tokenizer)
        self.begin = begin(tokenizer)

    def draw(self, task: str, length: int, rng: np.random.Generator) -> Example:
        """One example whose prompt has ``length`` tokens.

        Raises:
            ValueError: no such task, or no text for it.
            TooLong: these needles do not fit into the length; others of the task may.
        """
        needles = check_task(task)
        hay = self.text if needles.text else self.noise
        if hay is None:
            raise ValueError(f"{task} hides its needles in text: pass a Haystack")
        keys = words(needles.keys, rng)
        values = [[value(needles.uuids, rng) for _ in range(needles.values)] for _ in keys]
        asked = [int(i) for i in rng.permutation(needles.keys)[: needles.queries]]
        kind = "uuids" if needles.uuids else "numbers"
        hidden = [
            f"{hay.joint}One of the special magic {kind} for {keys[k]} is: {v}."
            for k in range(needles.keys)
            for v in values[k]
        ]
        order = rng.permutation(len(hidden))
        head, tail = framed(kind, [keys[i] for i in asked], needles.answers > 1)
        head_, tail_, *pieces = encode(self.tokenizer, [head, tail, *(hidden[i] for i in order)])
        head_ = self.begin + head_
        rest = length - len(head_) - len(tail_) - sum(map(len, pieces))
        if rest < 0:
            raise TooLong(
                f"{task} does not fit into {length} tokens: with this tokenizer it needs at least "
                f"{length - rest}"
            )
        tokens, places = hay.window(rest, rng)
        chosen = sorted(int(p) for p in rng.choice(places, len(pieces)))
        prompt = np.concatenate([
            np.asarray(head_, dtype=np.int32), *insert(tokens, chosen, pieces),
            np.asarray(tail_, dtype=np.int32),
        ])  # fmt: skip
        placed = [(i // needles.values, i % needles.values) for i in map(int, order)]
        answers = [values[k][v] for asked_for in asked for k, v in placed if k == asked_for]
        return Example(prompt, tuple(answers))


def framed(kind: str, keys: Sequence[str], several: bool) -> tuple[str, str]:
    """What RULER says before the haystack and after it, up to where the answer begins."""
    query = keys[0] if len(keys) == 1 else ", ".join(keys[:-1]) + ", and " + keys[-1]
    some, are_all, are = ("Some", "are all", "are") if several else ("A", "is", "is")
    kind = kind if several else kind[:-1]
    head = (
        f"{some} special magic {kind} {'are' if several else 'is'} hidden within the following "
        f"text. Make sure to memorize it. I will quiz you about the {kind} afterwards.\n"
    )
    tail = (
        f"\nWhat {are_all} the special magic {kind} for {query} mentioned in the provided text? "
        f"The special magic {kind} for {query} mentioned in the provided text {are}"
    )
    return head, tail


def words(count: int, rng: np.random.Generator) -> list[str]:
    """Different words of the form adjective-noun."""
    chosen = rng.choice(len(ADJECTIVES) * len(NOUNS), count, replace=False)
    return [f"{ADJECTIVES[i // len(NOUNS)]}-{NOUNS[i % len(NOUNS)]}" for i in map(int, chosen)]


def value(as_uuid: bool, rng: np.random.Generator) -> str:
    """A random number of seven digits, or UUID."""
    if as_uuid:
        return str(uuid.UUID(bytes=rng.bytes(16), version=4))
    return str(int(rng.integers(10**6, 10**7)))


def contained(text: str, answers: Sequence[str]) -> float:
    """Share of the answers that are in a text.

    Example:
        >>> contained("They are 1234567 and 7654321.", ["7654321", "1111111"])
        0.5
    """
    return sum(a.lower() in text.lower() for a in answers) / len(answers)


@torch.no_grad()
def answer(
    model: Any, tokenizer: Any, prompts: Sequence[np.ndarray], new_tokens: int, batch: int = 0
) -> list[str]:
    """What a model writes after prompts of one length, most likely token by token; ``batch`` of
    them at a time (0: all). Long prompts are read in pieces."""
    rows, end = torch.from_numpy(np.stack(prompts)).long(), tokenizer.eos_token_id
    found: list[str] = []
    for part in rows.split(batch or len(rows)):
        ids = part.to(model.device)
        before = read(model, ids[:, :-1]).past_key_values if ids.shape[1] > PIECE else None
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=before,
            max_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=end,
            pad_token_id=end if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        )
        found += tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
    return found


def evaluate(
    model: Any,
    tokenizer: Any,
    task: str,
    length: int,
    count: int = 100,
    seed: int = 0,
    **settings: Any,
) -> float:
    """Share of answers found, over ``count`` prompts of ``length`` tokens (RULER's score / 100).

    Arguments and errors are those of `scores`.

    Example:
        >>> evaluate(model, tokenizer, "niah_single_1", 400, count=1, new_tokens=4)
        0.0
    """
    return statistics.fmean(scores(model, tokenizer, task, length, count, seed, **settings))


def scores(
    model: Any,
    tokenizer: Any,
    task: str,
    length: int,
    count: int = 100,
    seed: int = 0,
    *,
    text: Haystack | str | Path | None = None,
    batch: int = 1,
    new_tokens: int = 128,
    keep: int | None = None,
) -> list[float]:
    """Share of answers found, of every prompt.

    Args:
        model: any causal language model with ``generate``, in evaluation mode.
        tokenizer: the model's.
        task: one of `TASKS`.
        length: tokens of the prompt, all included; ``new_tokens`` (RULER: 128) are written behind.
        count, seed: how many examples, and which.
        text: haystack of the tasks in real text: a `Haystack`, a folder, or None for the novels of
            the data sets.
        batch: prompts at a time.
        keep: the model sees that many of the last tokens; None: all.

    Raises:
        ValueError: no such task, or prompts too short for it; values below 1.
    """
    for name, given in (("count", count), ("batch", batch), ("new_tokens", new_tokens)):
        if given < 1:
            raise ValueError(f"{name} must be 1 or more, got {given}")
    if check_task(task).text and not isinstance(text, Haystack):
        text = Haystack.books(tokenizer, text, max(2_000_000, 8 * length))
    generator = Generator(tokenizer, text if isinstance(text, Haystack) else None)
    rng = np.random.default_rng(seed)
    examples = [generator.draw(task, length, rng) for _ in range(count)]
    prompts = [e.prompt[-(keep or length) :] for e in examples]
    written = answer(model, tokenizer, prompts, new_tokens, batch)
    return [contained(w, e.answers) for w, e in zip(written, examples, strict=True)]
