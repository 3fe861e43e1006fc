"""Class-incremental streams: texts of new classes, task after task (Fig. 6)."""

from __future__ import annotations

import dataclasses
import gzip
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nestlearn.adaptation.examples import Example


@dataclasses.dataclass(frozen=True)
class Task:
    """Classes that come together.

    Attributes:
        labels: their names, as the model is to write them.
        train, test: (text, label).
    """

    labels: tuple[str, ...]
    train: tuple[tuple[str, str], ...]
    test: tuple[tuple[str, str], ...]


@dataclasses.dataclass(frozen=True)
class Stream:
    """Tasks in order, and how they are put to a language model.

    Attributes:
        tasks: no class is in two of them.
        question: follows the text; the label follows it.
    """

    tasks: tuple[Task, ...]
    question: str

    def prompt(self, text: str) -> str:
        """The one prompt of all methods. Nothing in it tells the task."""
        return f"{text}\n{self.question}:"

    def completion(self, label: str) -> str:
        """What the model is to write: the label, and the end of the line."""
        return f" {label}\n"

    def examples(self, task: int) -> list[Example]:
        """The examples to learn in a task."""
        return [
            Example(self.prompt(text), self.completion(label))
            for text, label in self.tasks[task].train
        ]

    def seen(self, task: int) -> list[str]:
        """Labels of all tasks up to this one."""
        return [label for t in self.tasks[: task + 1] for label in t.labels]


def clinc150(
    folder: Path, *, tasks: int = 10, train: int | None = None, test: int | None = None,
    seed: int = 0, validation: bool = False,
) -> Stream:  # fmt: skip
    """CLINC150 (Larson et al. 2019): 150 intents in ``tasks`` tasks of 15.

    Args:
        folder: has ``data_full.json.gz``.
        tasks: the first so many of the ten.
        train, test: examples of a class, drawn with ``seed``; None: all.
        seed: draws the subset, shuffles the classes into tasks and the examples within them.
        validation: test on the validation split.

    Raises:
        ValueError: fewer examples than asked for.
    """
    with gzip.open(folder / "data_full.json.gz", "rt", encoding="utf-8") as file:
        data = json.load(file)
    parts = [
        [(text, label.replace("_", " ")) for text, label in data[split]]
        for split in ("train", "val" if validation else "test")
    ]
    return _stream(parts, 15, tasks, (train, test), seed, "Intent")


def dbpedia14(
    folder: Path, *, tasks: int = 7, train: int | None = None, test: int | None = None,
    seed: int = 0, validation: bool = False,
) -> Stream:  # fmt: skip
    """DBpedia's 14 classes in ``tasks`` tasks of two; arguments as for `clinc150`.

    Validation examples are the last 75 of a class in the training file, which no training set has.
    """
    parts = []
    for split in ("train", "test"):
        with gzip.open(folder / f"{split}.jsonl.gz", "rt", encoding="utf-8") as file:
            rows: list[dict[str, Any]] = [json.loads(line) for line in file]
        parts.append([(row["text"], row["label"]) for row in rows])
    kept: list[tuple[str, str]] = []
    held: list[tuple[str, str]] = []
    counts: dict[str, int] = {}
    for pair in reversed(parts[0]):
        counts[pair[1]] = counts.get(pair[1], 0) + 1
        (held if counts[pair[1]] <= 75 else kept).append(pair)
    return _stream(
        [kept[::-1], held if validation else parts[1]], 2, tasks, (train, test), seed, "Category"
    )


STREAMS = {"clinc150": clinc150, "dbpedia14": dbpedia14}


def _stream(
    parts: Sequence[Sequence[tuple[str, str]]],
    size: int,
    count: int,
    limits: tuple[int | None, int | None],
    seed: int,
    question: str,
) -> Stream:
    names = sorted({label for _, label in parts[0]})
    if not 1 <= count <= len(names) // size:
        raise ValueError(f"tasks must be 1 to {len(names) // size}, got {count}")
    chosen = [_subset(part, names, n, seed) for part, n in zip(parts, limits, strict=True)]
    generator = random.Random(seed)
    generator.shuffle(names)
    tasks = []
    for i in range(count):
        labels = tuple(names[i * size : (i + 1) * size])
        train = [pair for label in labels for pair in chosen[0][label]]
        generator.shuffle(train)
        test = tuple(pair for label in labels for pair in chosen[1][label])
        tasks.append(Task(labels, tuple(train), test))
    return Stream(tuple(tasks), question)


def _subset(
    part: Sequence[tuple[str, str]], names: Sequence[str], limit: int | None, seed: int
) -> dict[str, list[tuple[str, str]]]:
    """Examples by label; ``limit`` of each, drawn with ``seed``."""
    generator = random.Random(seed)
    result = {}
    for name in names:
        found = [pair for pair in part if pair[1] == name]
        if limit is not None and not 1 <= limit <= len(found):
            raise ValueError(f"class {name!r} has {len(found)} examples, {limit} were asked for")
        result[name] = found if limit is None else generator.sample(found, limit)
    return result
