"""Table 1: needles in a haystack, for models that are trained from scratch.

The paper asks language models of 760 M parameters. Here one model per system is trained on the six
tasks together, on prompts of up to the training length, and writes answers to longer ones. Training
text and test text are different books. A prompt asks for little, so that training on long ones from
the start finds nothing; a curriculum begins with one needle in a short text (docs/results.md).
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nestlearn.evals.harness.experiment import Scale, Table, beside
from nestlearn.evals.harness.results import Results
from nestlearn.evals.harness.systems import SYSTEMS, Size
from nestlearn.evals.harness.task import IGNORE, TRAIN, VALIDATION, Batch, Task, score
from nestlearn.evals.harness.trained import Plan, Trained, to
from nestlearn.evals.haystack import NOISE, Haystack, encode, training_texts
from nestlearn.evals.needles import (
    TASKS,
    Example,
    Generator,
    TooLong,
    evaluate,
    framed,
    value,
    words,
)
from nestlearn.train.tokenizers import train_bpe

ROOM = 64
"""Tokens that may be written: twice the longest right answer."""
SINGLE = ("niah_single_1", "niah_single_2")
FIRST = 0.18
"""Share of the training that has one needle a prompt."""
TRIES = 50
"""Examples that are drawn until one fits into a short prompt of training."""


def tokenizer_for(texts: list[str], vocab_size: int) -> Any:
    """A BPE of the haystacks and the sentences of the tasks; every digit is a token."""
    rng = np.random.default_rng(0)
    lines = []
    for i in range(3_000):
        key = words(1, rng)[0]
        needle = f" One of the special magic numbers for {key} is: {value(i % 3 == 0, rng)}."
        lines.append(needle.join(framed("numbers", [key], i % 2 == 0)))
    return train_bpe([*texts, *NOISE, *lines], vocab_size, digits=True)


def fitting(made: Generator, task: str, length: int, rng: np.random.Generator) -> Example:
    """A training example; needles of many tokens are drawn again where the prompt is too short.

    Raises:
        TooLong: none of many fitted.
    """
    for _ in range(TRIES - 1):
        try:
            return made.draw(task, length, rng)
        except TooLong:
            continue
    return made.draw(task, length, rng)


@dataclasses.dataclass(frozen=True)
class Lesson:
    """What is taught at a time.

    Attributes:
        until: share of the training steps after which the next lesson begins.
        tasks: names. lengths: of prompts, in tokens.
    """

    until: float
    tasks: tuple[str, ...]
    lengths: tuple[int, ...]


def curriculum(trained: tuple[int, ...]) -> tuple[Lesson, ...]:
    """Lessons over ascending lengths of prompts: in the shortest one needle, in noise and then in
    text; then all tasks, a length and the one before it at a time.

    Example:
        >>> [(round(l.until, 2), len(l.tasks), l.lengths) for l in curriculum((128, 256, 512))]
        [(0.09, 1, (128,)), (0.18, 2, (128,)), (0.59, 6, (256,)), (1.0, 6, (256, 512))]
    """
    first, *rest = trained
    if not rest:
        return (Lesson(1.0, tuple(TASKS), trained),)
    early = (Lesson(FIRST / 2, SINGLE[:1], (first,)), Lesson(FIRST, SINGLE, (first,)))
    later = (
        Lesson(FIRST + (1 - FIRST) * (i + 1) / len(rest), tuple(TASKS),
               tuple(rest[max(0, i - 1) : i + 1]))
        for i in range(len(rest))
    )  # fmt: skip
    return (*early, *later)


class NeedleMixture(Task):
    """The six tasks together.

    Args:
        trained: lengths of training prompts, in tokens, ascending.
        tested: lengths of test prompts.
        vocab_size: of the tokenizer, which is trained on the training books.
        characters: of text in the training haystack.

    A training batch has prompts of one length, drawn from those of the `curriculum`'s lesson (the
    last one but for `at`), and the shorter they are the more of them, so that each batch has about
    the same number of tokens.
    """

    name = "niah"
    metric = "contained"

    def __init__(
        self, trained: tuple[int, ...], tested: tuple[int, ...], vocab_size: int, characters: int
    ) -> None:
        self.trained, self.tested = trained, tested
        self.vocab_size, self.characters = vocab_size, characters
        self.length = max(*trained, *tested) + ROOM
        self.splits = tuple(f"{task}@{length}" for length in tested for task in TASKS)
        self.lessons = curriculum(trained)
        self.lesson = self.lessons[-1]
        self._made: tuple[Any, Generator, Haystack] | None = None

    def at(self, progress: float) -> NeedleMixture:
        """With the lesson of that time."""
        self.materials()  # shared with the copy
        taught = copy.copy(self)
        taught.lesson = next(lesson for lesson in self.lessons if progress < lesson.until)
        return taught

    def materials(self) -> tuple[Any, Generator, Haystack]:
        """Tokenizer, generator of training examples, haystack for testing; made when needed."""
        if self._made is None:
            tokenizer = tokenizer_for(training_texts(1_600_000), self.vocab_size)
            read = Haystack.books(tokenizer, None, self.characters, "train")
            held = Haystack.books(tokenizer, None, self.characters, "test")
            self._made = tokenizer, Generator(tokenizer, read), held
        return self._made

    def draw(self, split: str, count: int, generator: torch.Generator) -> Batch:
        """Prompts with their answers; validation has test text and the longest training length.

        Raises:
            ValueError: a test split: its answers are written, not given.
        """
        if split not in (TRAIN, VALIDATION):
            raise ValueError(f"split {split!r} is tested by writing; use scores()")
        tokenizer, made, held = self.materials()
        rng = np.random.default_rng(int(torch.randint(2**62, (1,), generator=generator)))
        longest = self.trained[-1]
        length = longest
        if split == TRAIN:
            length = int(rng.choice(self.lesson.lengths))
            count *= longest // length
        else:
            made = Generator(tokenizer, held)
        names = self.lesson.tasks if split == TRAIN else tuple(TASKS)
        chosen = rng.integers(len(names), size=count)
        examples = [fitting(made, names[i], length, rng) for i in chosen]
        replies = encode(tokenizer, [e.reply for e in examples])
        replies = [[*r, tokenizer.eos_token_id] for r in replies]
        columns = length + max(map(len, replies)) - 1
        inputs = torch.full((count, columns), tokenizer.eos_token_id)
        targets = torch.full((count, columns), IGNORE)
        for row, (example, reply) in enumerate(zip(examples, replies, strict=True)):
            whole = torch.tensor([*example.prompt.tolist(), *reply])
            inputs[row, : len(whole) - 1] = whole[:-1]
            targets[row, length - 1 : len(whole) - 1] = whole[length:]
        return Batch.of(inputs, targets)


@dataclasses.dataclass(frozen=True)
class NeedlePlan(Plan):
    """A plan with the lengths of prompts.

    Attributes:
        trained, tested: in training and in testing. ``batch`` counts prompts of the longest.
        vocab_size: of the tokenizer.
        characters: in a haystack.
    """

    trained: tuple[int, ...] = (128, 256, 512, 1024)
    tested: tuple[int, ...] = (1024, 2048, 4096)
    vocab_size: int = 1024
    characters: int = 1_000_000


PAPER_LENGTHS = ("4k", "8k", "16k")
PAPER: Mapping[str, tuple[tuple[float, float, float], ...]] = {
    "hope": ((100, 100, 100), (99.2, 88.4, 78.2), (73.2, 46.2, 24.8), (29.4, 24.8, 14.8),
             (31.4, 17.2, 11.4), (31.7, 24.8, 14.2)),
    "titans": ((100, 100, 100), (99.6, 84.6, 75.4), (74.2, 42.8, 21.2), (26.4, 23.6, 8.2),
               (24.6, 15.1, 8.2), (22.8, 19.8, 9.4)),
    "transformer": ((88.6, 76.4, 79.8), (100, 98.8, 94.2), (78, 69.2, 40.8), (79.4, 83, 61.4),
                    (37.5, 34.1, 21.5), (58.9, 48, 29.8)),
}  # fmt: skip
"""By system and task (in the order of `TASKS`): at 4k, 8k and 16k tokens, in percent."""


class NeedlesTrained(Trained):
    """Which systems find needles, at the lengths of training and beyond."""

    name = "table1"
    item = "Table 1"
    title = "needle in a haystack"
    question = (
        "Which systems find needles in a haystack, also in one longer than those of training?"
    )
    plans: Mapping[Scale, NeedlePlan] = {
        "tiny": NeedlePlan(
            Size(64, 2, 2), steps=5_000, batch=2, lrs=(3e-3,), weight_decays=(0.0,), seeds=2,
            systems=("transformer", "gated_deltanet", "titans", "hope"), examples=20,
            trained=(128, 256, 512, 1024),
        ),
        "small": NeedlePlan(
            Size(256, 4, 4), steps=8_000, batch=8, lrs=(1e-3, 3e-3), weight_decays=(0.0,),
            seeds=1, systems=("transformer", "gated_deltanet", "titans", "hope"), examples=50,
            trained=(128, 256, 512, 1024, 2048), tested=(2048, 4096, 8192), vocab_size=4096,
            characters=8_000_000,
        ),
        "paper": NeedlePlan(
            Size(1536, 24, 16), steps=30_000, batch=64, lrs=(3e-4, 1e-3), examples=500,
            trained=(128, 256, 512, 1024, 2048, 4096), tested=(4096, 8192, 16384),
            vocab_size=32_000, characters=64_000_000,
        ),
    }  # fmt: skip

    def __init__(self, scale: Scale = "tiny") -> None:
        super().__init__(scale)
        plan = self.plans[self.scale]
        self._task = NeedleMixture(plan.trained, plan.tested, plan.vocab_size, plan.characters)

    def tasks(self) -> dict[str, Task]:
        """The mixture; its splits are the table's columns."""
        return {self._task.name: self._task}

    def scores(self, model: Any, task: Task, plan: Plan, split: str, seed: int) -> dict[str, Any]:
        """Share of the answers contained in what the model writes."""
        tokenizer, _, held = self._task.materials()
        count, rows = self.plan.examples, 8
        was_training = model.training
        model.eval()

        def written(name: str, length: int, count: int) -> float:
            return evaluate(model, tokenizer, name, length, count, seed, text=held,
                            batch=rows, new_tokens=ROOM)  # fmt: skip

        if split == VALIDATION:
            found = [written(n, self._task.trained[-1], max(1, count // 4)) for n in TASKS]
            batch = task.draw(split, count, torch.Generator().manual_seed(seed))
            scored = dataclasses.asdict(score(model, to(batch, str(model.device)), rows))
            result = {**scored, "contained": sum(found) / len(found)}
        else:
            name, length = split.split("@")
            result = {"contained": written(name, int(length), count)}
        model.train(was_training)
        return result

    def tables(self, results: Results) -> list[Table]:
        """One table per length, the paper's in brackets."""
        found = []
        for i, length in enumerate(self._task.tested):
            rows = []
            for system in self.systems(results):
                paper = PAPER.get(system)
                rows.append((SYSTEMS[system].label, *(
                    beside(self.mean(results, "niah", system, f"{task}@{length}"),
                           None if paper is None or i > 2 else paper[k][i])
                    for k, task in enumerate(TASKS)
                )))  # fmt: skip
            theirs = PAPER_LENGTHS[min(i, 2)]
            note = (f"In brackets: the paper's at {theirs} tokens (760 M parameters, trained as "
                    f"language models). Trained on prompts of up to "
                    f"{self._task.trained[-1]:,} tokens.")  # fmt: skip
            title = f"prompts of {length:,} tokens, % of answers found"
            found.append(Table(title, ("system", *TASKS), tuple(rows), note))
        return found

    def plot(self, results: Results, path: Path) -> bool:
        """Score against length, one panel a task."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt

        systems = self.systems(results)
        if not systems:
            return False
        figure, axes = plt.subplots(2, 3, figsize=(12, 6), sharex=True, sharey=True)
        lengths = self._task.tested
        for axis, task in zip(axes.flat, TASKS, strict=True):
            for system in systems:
                means = [self.mean(results, "niah", system, f"{task}@{n}") for n in lengths]
                axis.plot(lengths, means, "o-", label=SYSTEMS[system].label)
            axis.set(title=task, xscale="log", ylim=(-4, 104))
            axis.set_xticks(lengths, [f"{n:,}" for n in lengths])
            axis.minorticks_off()
        for axis in axes[:, 0]:
            axis.set_ylabel("answers found, %")
        for axis in axes[1]:
            axis.set_xlabel("tokens of the prompt")
        axes[0, 0].legend(fontsize=8)
        figure.tight_layout()
        figure.savefig(path, dpi=110)
        plt.close(figure)
        return True

    def summary(self, row: dict[str, Any]) -> str:
        """Mean score at every length, and the loss of the last steps."""
        said = [f"validation {100 * row[VALIDATION]['contained']:.0f}"]
        for length in self._task.tested:
            scores = [row[f"{t}@{length}"]["contained"] for t in TASKS if f"{t}@{length}" in row]
            if scores:
                said.append(f"{length}: " + " ".join(f"{100 * s:.0f}" for s in scores))
        return f"{', '.join(said)}, loss {row['loss'][-1]:.3f}, {row['train_seconds']:.0f} s"
