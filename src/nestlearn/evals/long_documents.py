"""Questions about long documents: needles with several keys, papers, stories, patient files."""

from __future__ import annotations

import dataclasses
import gzip
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nestlearn.evals.harness.data import data_path, data_root
from nestlearn.evals.haystack import Haystack, encode
from nestlearn.evals.knowledge import greedy, token_f1
from nestlearn.evals.needles import Generator, contained


@dataclasses.dataclass(frozen=True)
class Question:
    """A question about a document.

    Attributes:
        prompt: what is asked, up to where the answer begins.
        answer: the right one; of choices: its letter.
        metric: ``"contained"``, ``"f1"`` (of tokens, as QASPER) or ``"choice"``.
        letters: of the choices.
    """

    prompt: str
    answer: str
    metric: str
    letters: str = ""


@dataclasses.dataclass(frozen=True)
class Document:
    """A text and what is asked about it."""

    text: str
    questions: tuple[Question, ...]


def asked(question: str, answer: str) -> Question:
    """A question with a free answer."""
    return Question(f"\n\nQuestion: {question}\nAnswer:", answer, "f1")


def chosen(question: str, choices: dict[str, str], letter: str) -> Question:
    """A question with choices by letter.

    Raises:
        ValueError: the right letter is not among them.
    """
    if letter not in choices:
        raise ValueError(f"the right choice {letter!r} is not among {', '.join(choices)}")
    listed = "\n".join(f"({name}) {text}" for name, text in choices.items())
    prompt = f"\n\nQuestion: {question}\n{listed}\nAnswer: ("
    return Question(prompt, letter, "choice", "".join(choices))


# -- loaders --------------------------------------------------------------------------------------


def load_leval(path: Path) -> list[Document]:
    """Documents in L-Eval's form: rows with ``input``, ``instructions`` and ``outputs``.

    Questions whose text lists ``(A) ... (D)`` become choices. Unanswerable ones are left out.
    """
    found = []
    for row in _rows(path):
        questions = []
        for question, answer in zip(row["instructions"], row["outputs"], strict=True):
            options = re.split(r"\(([A-E])\)", question)
            letter = re.match(r"\s*\(([A-E])\)", answer)
            if len(options) > 4 and letter:
                pairs = zip(options[1::2], options[2::2], strict=True)
                choices = {name: " ".join(text.split()) for name, text in pairs}
                questions.append(chosen(options[0].strip(), choices, letter.group(1)))
            elif "unanswerable" not in answer.lower():
                questions.append(asked(question.strip(), answer.strip()))
        found.append(Document(row["input"].strip(), tuple(questions)))
    return found


def load_qasper(path: Path) -> list[Document]:
    """Papers in QASPER's own form; the first answer of each question that has one."""
    found = []
    for paper in json.loads(_text(path)).values():
        parts = [paper["title"], paper["abstract"]]
        for section in paper["full_text"]:
            parts += [section["section_name"] or "", *section["paragraphs"]]
        questions = []
        for item in paper["qas"]:
            answers = [text for a in item["answers"] if (text := _qasper_answer(a["answer"]))]
            if answers:
                questions.append(asked(item["question"].strip(), answers[0]))
        found.append(Document("\n\n".join(p for p in parts if p), tuple(questions)))
    return found


def _qasper_answer(answer: dict[str, Any]) -> str:
    if answer["unanswerable"]:
        return ""
    if answer["yes_no"] is not None:
        return "Yes" if answer["yes_no"] else "No"
    return answer["free_form_answer"] or ", ".join(answer["extractive_spans"])


def load_longhealth(path: Path) -> list[Document]:
    """Patient files in LongHealth's own form: all texts of a patient, questions with choices."""
    found = []
    for patient in json.loads(_text(path)).values():
        questions = []
        for item in patient["questions"]:
            choices = {
                key[-1].upper(): item[key]
                for key in sorted(item)
                if re.fullmatch("answer_[a-e]", key)
            }
            letter = next(name for name, text in choices.items() if text == item["correct"])
            questions.append(chosen(item["question"], choices, letter))
        found.append(Document("\n\n".join(patient["texts"].values()), tuple(questions)))
    return found


def load_needles(tokenizer: Any, tokens: int, count: int, seed: int) -> list[Document]:
    """Texts with four keys, one of which is asked for (``niah_multikey_1``)."""
    made = Generator(tokenizer, Haystack.books(tokenizer, None, max(2_000_000, 8 * tokens)))
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        example = made.draw("niah_multikey_1", tokens, rng)
        text, mark, question = tokenizer.decode(example.prompt).rpartition("\nWhat ")
        found.append(Document(text, (Question(mark + question, example.answers[0], "contained"),)))
    return found


FILES: dict[str, dict[str, Callable[[Path], list[Document]]]] = {
    "qasper": {
        "qasper/qasper-test-v0.3.json": load_qasper,
        "leval_longdoc/scientific_qa.jsonl.gz": load_leval,
    },
    "quality": {"leval_longdoc/quality.jsonl.gz": load_leval},
    "longhealth": {"longhealth/benchmark_v5.json": load_longhealth},
}
"""Tasks that come from files: the first that is there, and how it is read."""


def path_of(task: str) -> tuple[Path, Callable[[Path], list[Document]]]:
    """The file of a task, and how it is read.

    Raises:
        ValueError: there is none.
    """
    files = FILES[task]
    name = next((n for n in files if (data_root() / n).exists()), next(iter(files)))
    return data_path(name), files[name]


TASKS = ("mk_niah", *FILES)


def load(task: str, tokenizer: Any, tokens: int, count: int, seed: int) -> list[Document]:
    """Documents of a task, each cut to ``tokens`` tokens.

    Raises:
        ValueError: no such task, or its data are not there.
    """
    if task == "mk_niah":
        return load_needles(tokenizer, tokens, count, seed)
    if task not in FILES:
        raise ValueError(f"unknown task {task!r}; choose one of {', '.join(TASKS)}")
    path, read = path_of(task)
    found = [d for d in read(path) if d.questions]
    order = np.random.default_rng(seed).permutation(len(found))[:count]
    return [_cut(found[int(i)], tokenizer, tokens) for i in order]


def _cut(document: Document, tokenizer: Any, tokens: int) -> Document:
    ids = tokenizer(document.text, add_special_tokens=False).input_ids
    if len(ids) <= tokens:
        return document
    return Document(tokenizer.decode(ids[:tokens]), document.questions)


def _text(path: Path) -> str:
    if path.suffix == ".gz":
        with gzip.open(path, "rt", encoding="utf-8") as file:
            return file.read()
    return path.read_text(encoding="utf-8")


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    for line in _text(path).splitlines():
        if line.strip():
            yield json.loads(line)


# -- asking ---------------------------------------------------------------------------------------


def score(
    model: Any, tokenizer: Any, question: Question, context: str = "", new_tokens: int = 32
) -> float:
    """How right a model's answer is, from 0 to 1.

    Args:
        model, tokenizer: a causal language model.
        question: see `Question`.
        context: stands before it: the document, or nothing.
        new_tokens: that may be written.
    """
    prompt = context + (question.prompt if context else question.prompt.lstrip())
    if question.metric == "choice":
        return float(_letter(model, tokenizer, prompt, question.letters) == question.answer)
    (written,) = greedy(model, tokenizer, [prompt], new_tokens, 1)
    if question.metric == "contained":
        return contained(written, [question.answer])
    return token_f1(written.strip().split("\n")[0], question.answer)


@torch.no_grad()
def _letter(model: Any, tokenizer: Any, prompt: str, letters: str) -> str:
    """The letter that is most likely to come next."""
    first = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    row = first + tokenizer(prompt, add_special_tokens=False).input_ids
    ids = torch.tensor([row], device=model.device)
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[0, -1]
    firsts = [ids[0] for ids in encode(tokenizer, [f"({name}" for name in letters])]
    if len(set(firsts)) < len(letters):  # the bracket is a token of its own
        firsts = [ids[-1] for ids in encode(tokenizer, [f"({name}" for name in letters])]
    return letters[int(logits[firsts].argmax())]
