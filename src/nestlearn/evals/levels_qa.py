"""Fig. 7: how many levels, and how slow the slowest, beside answering in context.

A pre-trained model reads a long document. With levels (§7.3) it learns while it reads; then it is
asked, with the document still before it (*open*) and without (*closed*). In-context learning is the
same model without levels.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from nestlearn.evals import long_documents
from nestlearn.evals.harness.experiment import Experiment, Request, Scale, Table
from nestlearn.evals.harness.results import Results

WAYS = ("open", "closed")
FASTEST = 64
"""Period of the fastest of several levels, in tokens."""


def periods(levels: int, lowest: int) -> tuple[int, ...]:
    """Periods of so many levels: from `FASTEST` to ``lowest`` in equal ratios, multiples of it.

    Raises:
        ValueError: ``lowest`` is no multiple of `FASTEST`, or too low for so many levels.

    Example:
        >>> periods(1, 512), periods(2, 512), periods(4, 4096)
        ((512,), (64, 512), (64, 256, 1024, 4096))
    """
    if levels < 1 or lowest % FASTEST:
        raise ValueError(f"levels must be 1 or more and lowest a multiple of {FASTEST}")
    if levels == 1:
        return (lowest,)
    ratio = (lowest / FASTEST) ** (1 / (levels - 1))
    found = tuple(FASTEST * round(ratio**i) for i in range(levels))
    if len(set(found)) < levels or found[-1] != lowest:
        raise ValueError(f"{levels} levels do not fit between {FASTEST} and {lowest} tokens")
    return found


@dataclasses.dataclass(frozen=True)
class Plan:
    """How it is asked at a scale.

    Attributes:
        tokens: of a document at most. documents, questions: of a task, and of each document.
        levels, lowest: the grid; ``lowest`` are periods in tokens.
        tasks: see `long_documents.TASKS`.
        lr, repeats, slots: of the learner.
        new_tokens: of an answer.
        seeds: of documents, and keys.
    """

    tokens: int
    documents: int
    questions: int
    levels: tuple[int, ...]
    lowest: tuple[int, ...]
    tasks: tuple[str, ...] = ("mk_niah", "qasper", "quality")
    lr: float = 0.2
    repeats: int = 4
    slots: int = 16_384
    new_tokens: int = 24
    seeds: int = 1


class LevelsQA(Experiment):
    """Tasks x systems; every document is learned from nothing."""

    name = "fig7"
    item = "Figure 7"
    title = "levels beside in-context question answering"
    question = "Do more levels, or slower ones, help a model to answer about what it reads?"
    needs_model = True
    plans: Mapping[Scale, Plan] = {
        "tiny": Plan(1_024, documents=4, questions=3, levels=(1, 2, 3), lowest=(256, 1_024)),
        "small": Plan(4_096, documents=20, questions=6, levels=(1, 2, 3, 4), lowest=(512, 4_096)),
        "paper": Plan(
            32_768, documents=200, questions=20, levels=(1, 2, 3, 4), lowest=(512, 4_096, 32_768),
            tasks=("mk_niah", "qasper", "longhealth"), slots=131_072, seeds=3,
        ),
    }  # fmt: skip

    @property
    def plan(self) -> Plan:
        """Of this scale."""
        return self.plans[self.scale]

    def systems(self) -> dict[str, tuple[int, ...]]:
        """Name -> periods of the levels; in-context learning has none."""
        grid = {
            f"{n} levels to {lowest}": periods(n, lowest)
            for n in self.plan.levels
            for lowest in self.plan.lowest
        }
        return {"in-context": (), **grid}

    def settings(self) -> dict[str, Any]:
        """Everything but what may grow."""
        plan = dataclasses.asdict(self.plan)
        for name in ("seeds", "levels", "lowest", "tasks"):
            del plan[name]
        return plan

    def due(self, results: Results, request: Request) -> dict[str, dict[str, Any]]:
        """One cell per task, system and seed."""
        seeds = self.plan.seeds if request.seeds is None else request.seeds
        tasks = self.plan.tasks
        if request.tasks is not None:
            tasks = request.pick("tasks", long_documents.TASKS)
        return {
            name: {"task": task, "system": system, "seed": seed, "device": request.device}
            for seed in range(seeds)
            for task in tasks
            for system in request.pick("systems", tuple(self.systems()))
            if results.get(name := f"{task}/{system}/seed{seed}") is None
        }

    def measure(self, cell: dict[str, Any]) -> dict[str, Any]:
        """Read every document, ask about it, forget it."""
        import nestlearn as nl
        from nestlearn.cli.pretrained import load_pretrained

        plan, chosen, seed = self.plan, self.systems()[cell["system"]], cell["seed"]
        torch.manual_seed(seed)
        model, tokenizer = load_pretrained(cell["model"], device=cell["device"])
        documents = long_documents.load(cell["task"], tokenizer, plan.tokens, plan.documents, seed)
        learner = None
        if chosen:
            nl.adapt(model, [nl.Level(period=p) for p in chosen], slots=plan.slots, seed=seed)
            learner = nl.Learner(model, tokenizer, lr=plan.lr, repeats=plan.repeats, snapshots=0)
        found: dict[str, list[float]] = {way: [] for way in WAYS}
        learning = 0.0
        for document in documents:
            if learner is not None:
                learner.reset()
                began = time.perf_counter()
                learner.learn(document.text)
                learning += time.perf_counter() - began
            for question in document.questions[: plan.questions]:
                for way, context in zip(WAYS, (document.text, ""), strict=True):
                    right = long_documents.score(
                        model, tokenizer, question, context, plan.new_tokens
                    )
                    found[way].append(right)
        return {
            **{k: cell[k] for k in ("task", "system", "seed")},
            **{way: statistics.fmean(scores) for way, scores in found.items()},
            "periods": chosen, "documents": len(documents), "questions": len(found["open"]),
            "learning_seconds": learning,
        }  # fmt: skip

    def summary(self, row: dict[str, Any]) -> str:
        """Both scores."""
        return ", ".join(f"{way} {100 * row[way]:.1f}" for way in WAYS)

    def _mean(self, results: Results, task: str, system: str, way: str) -> float | None:
        rows = _measured(results, task=task, system=system)
        return 100 * statistics.fmean(r[way] for r in rows) if rows else None

    def _tasks(self, results: Results) -> list[str]:
        return [t for t in long_documents.TASKS if results.rows(task=t)]

    def tables(self, results: Results) -> list[Table]:
        """Scores in percent, with and without the document in the prompt."""
        tasks = self._tasks(results)
        heads = [f"{task} {way}" for task in tasks for way in WAYS]
        rows = [
            (system, *(self._mean(results, t, system, way) for t in tasks for way in WAYS))
            for system in self.systems()
        ]
        note = (
            "mk_niah: % of answers found; qasper: token F1; quality, longhealth: % of choices. "
            "open: the document stands before the question; closed: it does not. The paper draws "
            "this figure and prints no numbers: there, all levels are above in-context learning, "
            "and more of them are better."
        )
        title = f"documents of up to {self.plan.tokens:,} tokens"
        return [Table(title, ("system", *heads), tuple(rows), note)] if tasks else []

    def plot(self, results: Results, path: Path) -> bool:
        """Score against the number of levels, a line per lowest period."""
        tasks = [t for t in self._tasks(results) if _measured(results, task=t)]
        if not tasks:
            return False
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt

        figure, axes = plt.subplots(
            len(WAYS), len(tasks), figsize=(4 * len(tasks), 6), squeeze=False, sharex=True
        )
        for line, way in zip(axes, WAYS, strict=True):
            for axis, task in zip(line, tasks, strict=True):
                alone = self._mean(results, task, "in-context", way)
                if alone is not None:
                    axis.axhline(alone, color="grey", ls=":", label="in-context")
                for lowest in self.plan.lowest:
                    heights = [
                        self._mean(results, task, f"{n} levels to {lowest}", way)
                        for n in self.plan.levels
                    ]
                    points = [
                        (n, h)
                        for n, h in zip(self.plan.levels, heights, strict=True)
                        if h is not None
                    ]
                    if points:
                        axis.plot(*zip(*points, strict=True), "o-", label=f"slowest: {lowest}")
                # From zero, and never so close that noise looks like a difference.
                top = max(10.0, 1.1 * axis.get_ylim()[1])
                axis.set(title=f"{task}, {way}", xticks=self.plan.levels, ylim=(0, top))
            line[0].set_ylabel("score, %")
        for axis in axes[-1]:
            axis.set_xlabel("levels")
        axes[0][-1].legend(fontsize=8)
        figure.tight_layout()
        figure.savefig(path, dpi=110)
        plt.close(figure)
        return True


def _measured(results: Results, **match: Any) -> list[dict[str, Any]]:
    return [r for r in results.rows(**match) if "error" not in r]
