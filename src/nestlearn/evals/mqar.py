"""Multi-query associative recall, MQAR (Arora et al. 2023): the synthetic stand-in for Table 3.

A sequence begins with pairs of a key and a value; later every key comes once more, and its value
is asked. How many pairs a model of a given width recalls says how much its state can hold.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nestlearn.evals.harness.experiment import Table
from nestlearn.evals.harness.results import Results
from nestlearn.evals.harness.systems import SYSTEMS, Size
from nestlearn.evals.harness.task import IGNORE, TRAIN, VALIDATION, Batch, Task
from nestlearn.evals.harness.trained import Plan, Trained


class AssociativeRecall(Task):
    """Pairs, then their keys again in random places among random tokens.

    A place g = 1, 2, ... behind the pairs (every second token is one) is drawn with a probability
    proportional to g^(power - 1), without replacement. Keys are tokens of the lower half of the
    vocabulary but the first, values of the upper half; no two pairs share either.

    Training has sequences of one number of pairs, drawn for every batch; validation has all the
    numbers of training in equal shares, padded behind; every number of pairs is a test split.

    Args:
        pairs: numbers of pairs in training.
        beyond: numbers of pairs that are tested only.
        vocab_size: tokens.
        shortest: length of the sequences that have few pairs; the others have four tokens a pair.
        power: small: most keys come again soon; 1: anywhere.

    Raises:
        ValueError: too few tokens for as many keys, or no power of a distribution.

    Example:
        >>> task = AssociativeRecall(pairs=(2,), vocab_size=16, shortest=12)
        >>> batch = task.draw("2", 1, torch.Generator().manual_seed(0))
        >>> batch.inputs.shape, int(batch.asked.sum())
        (torch.Size([1, 12]), 2)
    """

    name = "mqar"

    def __init__(
        self,
        pairs: tuple[int, ...] = (4, 8, 16, 32, 64),
        beyond: tuple[int, ...] = (),
        vocab_size: int = 8_192,
        shortest: int = 64,
        power: float = 0.01,
    ) -> None:
        most = max(*pairs, *beyond, 1)
        if vocab_size // 2 - 1 < most:
            raise ValueError(
                f"a vocabulary of {vocab_size} has {vocab_size // 2 - 1} keys for {most} pairs; "
                f"make it {2 * most + 2} or more"
            )
        if not 0 < power <= 1:
            raise ValueError(f"power must be above 0 and at most 1, got {power}")
        if shortest % 2:
            raise ValueError(f"shortest must be even, got {shortest}")
        self.pairs, self.vocab_size, self.power = pairs, vocab_size, power
        self.shortest = shortest
        self.splits = tuple(str(n) for n in (*pairs, *beyond))
        self.length = self.length_of(most)

    def length_of(self, pairs: int) -> int:
        """Tokens of a sequence with so many pairs."""
        return max(self.shortest, 4 * pairs)

    def draw(self, split: str, count: int, generator: torch.Generator) -> Batch:
        """Sequences of one number of pairs; for validation of all, ``count`` in all."""
        if split == TRAIN:
            which = int(torch.randint(len(self.pairs), (1,), generator=generator))
            return self.sequences(self.pairs[which], count, generator)
        if split != VALIDATION:
            return self.sequences(int(split), count, generator)
        share = -(-count // len(self.pairs))
        parts = [self.sequences(n, share, generator) for n in self.pairs]
        longest = max(part.inputs.shape[1] for part in parts)

        def padded(name: str, value: int) -> torch.Tensor:
            tensors = (getattr(part, name) for part in parts)
            return torch.cat(
                [nn.functional.pad(t, (0, longest - t.shape[1]), value=value) for t in tensors]
            )

        return Batch.of(padded("inputs", 0), padded("targets", IGNORE))

    def sequences(self, pairs: int, count: int, generator: torch.Generator) -> Batch:
        """``count`` sequences of ``pairs`` pairs."""
        half, length = self.vocab_size // 2, self.length_of(pairs)

        def some(low: int, high: int) -> torch.Tensor:
            order = torch.rand(count, high - low, generator=generator).argsort(1)
            return order[:, :pairs] + low

        keys, values = some(1, half), some(half, self.vocab_size)
        places = torch.arange(1, (length - 2 * pairs) // 2 + 1, dtype=torch.float64)
        chances = places.pow(self.power - 1).expand(count, -1)
        drawn = torch.multinomial(chances, pairs, replacement=False, generator=generator)
        queries = 2 * (pairs + drawn)
        inputs = torch.randint(self.vocab_size, (count, length), generator=generator)
        inputs[:, : 2 * pairs] = torch.stack([keys, values], 2).flatten(1)
        inputs.scatter_(1, queries, keys)
        targets = torch.full_like(inputs, IGNORE).scatter_(1, queries, values)
        return Batch.of(inputs, targets)


class MQAR(Trained):
    """How many pairs a system recalls, by its width."""

    name = "mqar"
    item = "MQAR (in the place of Table 3)"
    title = "multi-query associative recall"
    question = "How many pairs of a key and a value do systems recall, at which width?"
    plans = {
        "tiny": Plan(
            Size(64, 2, 2), steps=3_000, batch=16, lrs=(3e-3,), weight_decays=(0.1,), seeds=1,
            systems=("transformer", "deltanet", "gated_deltanet", "titans", "hope"), examples=100,
        ),
        "small": Plan(
            Size(64, 2, 2), steps=4_000, batch=64, lrs=(1e-3, 3e-3), weight_decays=(0.1,), seeds=1,
            systems=("transformer", "deltanet", "gated_deltanet", "titans", "hope_attention",
                     "hope"),
            examples=500,
        ),
        "paper": Plan(
            Size(64, 2, 2), steps=25_000, batch=256, lrs=(3e-4, 1e-3, 3e-3, 1e-2),
            weight_decays=(0.1,), seeds=3, examples=1_000,
        ),
    }  # fmt: skip
    widths = {"tiny": (64, 128), "small": (64, 128, 256), "paper": (64, 128, 256, 512)}
    heads_of = 32
    """Width of a head, at every width of the model."""

    def tasks(self) -> dict[str, Task]:
        """One for every width; the sequences are the same."""
        if self.scale == "tiny":
            task = AssociativeRecall(beyond=(96,), vocab_size=256)
        else:
            task = AssociativeRecall(pairs=(4, 8, 16, 32, 64, 128), beyond=(256,))
        return {f"width {width}": task for width in self.widths[self.scale]}

    def settings(self) -> dict[str, Any]:
        """Those of training, and of the task."""
        task = next(iter(self.tasks().values()))
        return {**super().settings(), "splits": task.splits, "vocab_size": task.vocab_size}

    def plan_of(self, task: str) -> Plan:
        """Its width."""
        width = int(task.split()[1])
        size = Size(width, self.plan.size.layers, max(1, width // self.heads_of))
        return dataclasses.replace(self.plan, size=size)

    def tables(self, results: Results) -> list[Table]:
        """Values right in percent, a table for every width."""
        found = []
        for name, task in self.tasks().items():
            rows = tuple(
                (SYSTEMS[system].label, *(self.mean(results, name, system, n) for n in task.splits))
                for system in self.systems(results)
            )
            heads = ("system", *(f"{n} pairs" for n in task.splits))
            most = max(task.pairs) if isinstance(task, AssociativeRecall) else "?"
            note = f"Trained on up to {most} pairs; a value is right by chance once in "
            note += f"{task.vocab_size // 2}."
            found.append(Table(f"{name}: values right, %", heads, rows, note))
        return found

    def plot(self, results: Results, path: Path) -> bool:
        """Accuracy against the number of pairs, a panel for every width."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt

        systems = self.systems(results)
        if not systems:
            return False
        tasks = self.tasks()
        figure, axes = plt.subplots(
            1, len(tasks), figsize=(4.5 * len(tasks) + 1.5, 4), sharey=True, squeeze=False
        )
        for axis, (name, task) in zip(axes[0], tasks.items(), strict=True):
            for system in systems:
                means = [self.mean(results, name, system, n) for n in task.splits]
                if None not in means:
                    style = "--" if SYSTEMS[system].attention else "-"
                    label = SYSTEMS[system].label
                    axis.plot([int(n) for n in task.splits], means, style, marker="o", label=label)
            axis.set_xscale("log", base=2)
            axis.set_xticks([int(n) for n in task.splits], task.splits)
            axis.set(title=name, xlabel="pairs", ylim=(0, 104))
        axes[0, 0].set_ylabel("values right, %")
        axes[0, -1].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
        figure.tight_layout()
        figure.savefig(path, dpi=110)
        plt.close(figure)
        return True
