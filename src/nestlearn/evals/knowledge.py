"""Knowledge incorporation: passages read once in a stream, then asked for with the book closed.

Metrics, all on text that is not in the training stream as such or that must not have changed:

- **cloze**: a sentence of a passage is cut before an answer; right if greedy decoding gives exactly
  the answer. It measures recall of what was written.
- **questions**: the passage's own questions (never read); right if the answer is contained in a
  short greedy answer, both normalised as SQuAD does. Asked as plain text, or in the form that a
  model tuned for chat was trained with.
- **log-probability** per token of both kinds of answers, which moves before accuracy does.
- **perplexity** of unrelated text, and of passages read earlier (the forgetting curve).
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import math
import random
import re
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Passage:
    """A text to read, and what can be asked about it.

    Attributes:
        title, text: what is read is `document`.
        cloze: beginnings of sentences and how they go on.
        questions: questions and answers.
    """

    title: str
    text: str
    cloze: tuple[tuple[str, str], ...]
    questions: tuple[tuple[str, str], ...]

    @property
    def document(self) -> str:
        """What is read."""
        return f"{self.title}\n{self.text}"


def load_passages(path: Path, count: int, seed: int = 0, per_passage: int = 3) -> list[Passage]:
    """A random choice of passages in random order.

    Args:
        path: JSON (may be gzipped): a list of ``{"title", "context", "questions": [{"question",
            "answer"}]}``, as SQuAD in the layout of SEAL.
        count: how many; those without a usable question are not chosen.
        seed: of choice and order.
        per_passage: questions of a passage at most, with different answers.

    Raises:
        ValueError: fewer passages than asked for.
    """
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        rows = json.load(file)
    found = [p for p in (_passage(row, per_passage) for row in rows) if p.questions]
    if len(found) < count:
        raise ValueError(f"{path} has {len(found)} usable passages, {count} were asked for")
    return random.Random(seed).sample(found, count)


def _passage(row: dict[str, Any], limit: int) -> Passage:
    text = row["context"]
    chosen: dict[str, str] = {}
    for entry in row["questions"]:
        if entry["answer"] in text and entry["answer"] not in chosen and len(chosen) < limit:
            chosen[entry["answer"]] = entry["question"]
    cloze = []
    for answer in chosen:
        place = text.find(answer)
        start = text.rfind(". ", 0, place) + 2 if ". " in text[:place] else 0
        # Enough of the sentence to say what is asked for, and a new word after it.
        if place - start >= 15 and text[place - 1] == " ":
            cloze.append((text[start:place].rstrip(), " " + answer))
    questions = tuple((question, answer) for answer, question in chosen.items())
    return Passage(row["title"], text, tuple(cloze), questions)


@torch.no_grad()
def cloze_scores(
    model: Any, tokenizer: Any, items: Sequence[tuple[str, str]], batch: int = 16
) -> dict[str, float]:
    """``accuracy`` (greedy decoding gives the whole answer) and mean ``log_prob`` per token."""
    rows = [
        (_ids(tokenizer, prompt, True), _ids(tokenizer, answer, False)) for prompt, answer in items
    ]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]) + len(rows[i][1]))
    right, total = 0, 0.0
    pad = tokenizer.pad_token_id or 0
    for start in range(0, len(order), batch):
        chosen = [rows[i] for i in order[start : start + batch]]
        length = max(len(p) + len(a) for p, a in chosen)
        ids = torch.full((len(chosen), length), pad)
        mask = torch.zeros_like(ids)
        for r, (prompt, answer) in enumerate(chosen):
            ids[r, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
            mask[r, : len(prompt) + len(answer)] = 1
        # Logits only where answers can be: from the shortest prompt on.
        first = min(len(p) for p, _ in chosen) - 1
        out = model(ids, attention_mask=mask, logits_to_keep=length - first)
        for r, (prompt, answer) in enumerate(chosen):
            place = len(prompt) - 1 - first
            logits = out.logits[r, place : place + len(answer)].float().log_softmax(-1)
            target = torch.tensor(answer)
            right += int((logits.argmax(-1) == target).all())
            total += logits.gather(1, target[:, None]).mean().item()
    return {"accuracy": right / len(rows), "log_prob": total / len(rows)}


@torch.no_grad()
def question_scores(
    model: Any,
    tokenizer: Any,
    items: Sequence[tuple[str, str]],
    max_new_tokens: int = 24,
    batch: int = 32,
    *,
    passages: Sequence[str] | None = None,
    chat: bool = False,
) -> dict[str, float]:
    """``accuracy`` (contained), token ``f1``, and ``log_prob`` of the answer after the question.

    Args:
        model, tokenizer: what is asked.
        items: questions and answers.
        max_new_tokens, batch: of the greedy answers.
        passages: what stands before each question (the book is open then).
        chat: ask as a user of the tokenizer's chat template would, instead of as plain text
            (``Question: ... Answer:``).
    """
    before = [f"{passage}\n\n" for passage in passages] if passages else [""] * len(items)
    prompts = [f"{b}Question: {question}" for b, (question, _) in zip(before, items, strict=True)]
    if chat:
        prompts = [user_turn(tokenizer, f"{p}\nAnswer in a few words.") for p in prompts]
    else:
        prompts = [f"{p}\nAnswer:" for p in prompts]
    answers = greedy(model, tokenizer, prompts, max_new_tokens, batch, line=True)
    pairs = list(zip(answers, (answer for _, answer in items), strict=True))
    begins = "" if chat else " "
    likely = cloze_scores(
        model, tokenizer, [(p, begins + a) for p, (_, a) in zip(prompts, items, strict=True)]
    )
    return {
        "accuracy": sum(contains(given, right) for given, right in pairs) / len(pairs),
        "f1": sum(token_f1(given, right) for given, right in pairs) / len(pairs),
        "log_prob": likely["log_prob"],
    }


@torch.no_grad()
def greedy(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    max_new_tokens: int,
    batch: int = 32,
    *,
    line: bool = False,
) -> list[str]:
    """Greedy continuations, one a prompt; with ``line`` only their first line, and a batch ends
    when all have one."""
    from transformers import StoppingCriteriaList

    rows = [_ids(tokenizer, p, True) for p in prompts]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    result = [""] * len(rows)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        length = max(len(rows[i]) for i in chosen)
        ids = torch.full((len(chosen), length), pad)
        mask = torch.zeros_like(ids)
        for r, i in enumerate(chosen):  # padded on the left, so that all go on at the end
            ids[r, length - len(rows[i]) :] = torch.tensor(rows[i])
            mask[r, length - len(rows[i]) :] = 1
        out = model.generate(
            ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=pad,
            stopping_criteria=StoppingCriteriaList([_Line(tokenizer, length)] if line else []),
        )
        for r, i in enumerate(chosen):
            written = tokenizer.decode(out[r, length:], skip_special_tokens=True)
            result[i] = written.split("\n")[0] if line else written
    return result


class _Line:
    """Stops the rows whose text after ``start`` tokens has the end of a line."""

    def __init__(self, tokenizer: Any, start: int) -> None:
        self.tokenizer, self.start = tokenizer, start

    def __call__(self, ids: Tensor, scores: Any, **_: Any) -> Tensor:
        written = self.tokenizer.batch_decode(ids[:, self.start :])
        return torch.tensor(["\n" in text for text in written], device=ids.device)


@torch.no_grad()
def perplexity(model: Any, ids: Tensor, length: int = 512, batch: int = 4) -> float:
    """Perplexity of a long text ``(N,)``, in windows of ``length`` tokens that start anew."""
    windows = ids[: len(ids) // length * length].view(-1, length)
    if not len(windows):
        raise ValueError(f"the text has {len(ids)} tokens, fewer than one window of {length}")
    total = 0.0
    for rows in windows.split(batch):
        logits = model(rows, use_cache=False).logits[:, :-1].float()
        total += F.cross_entropy(
            logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="sum"
        ).item()
    return math.exp(total / (len(windows) * (length - 1)))


def contains(given: str, right: str) -> bool:
    """Whether the right answer is in the given one, as whole words, normalised."""
    return f" {normalise(right)} " in f" {normalise(given)} "


def token_f1(given: str, right: str) -> float:
    """SQuAD's F1: overlap of words, normalised."""
    a, b = normalise(given).split(), normalise(right).split()
    common = sum(min(a.count(w), b.count(w)) for w in set(a))
    return 2 * common / (len(a) + len(b)) if common else 0.0


def normalise(text: str) -> str:
    """Lower case, without punctuation and articles, single spaces (SQuAD's normalisation)."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def user_turn(tokenizer: Any, text: str) -> str:
    """A user's turn in the tokenizer's chat template, up to where the model answers."""
    turn = [{"role": "user", "content": text}]
    made: str = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    return made


def _ids(tokenizer: Any, text: str, begins: bool) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    first = tokenizer.bos_token_id
    # A chat template writes it itself.
    return [first, *ids] if begins and first is not None and ids[:1] != [first] else ids
