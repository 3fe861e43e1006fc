"""Tables 2 and 3: language modelling, common sense, in-context recall.

Every system is trained on the same text, then measured with lm-eval's tasks.
"""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

import torch

from nestlearn.evals.harness.experiment import Request, Table, beside
from nestlearn.evals.harness.results import Results
from nestlearn.evals.language_models import LanguageModels
from nestlearn.evals.lm.measure import check_data, main_metric, measure_tasks
from nestlearn.evals.lm.tasks import LANGUAGE, METRIC, RECALL

SHARES = tuple(name for name in LANGUAGE if name != "wikitext")
"""Tasks whose accuracies are averaged."""


class OnStandardTasks(LanguageModels):
    """Systems trained on text and measured on standard tasks.

    Attributes:
        benchmarks: names of the tasks.
    """

    benchmarks: tuple[str, ...]

    def settings(self) -> dict[str, Any]:
        """Of the training, and the tasks."""
        return {**super().settings(), "benchmarks": list(self.benchmarks)}

    def due(self, results: Results, request: Request) -> dict[str, dict[str, Any]]:
        """Cells; what tasks need is asked for before anything is trained."""
        cells = super().due(results, request)
        if cells:
            check_data(self.benchmarks)
        return cells

    def examine(self, model: Any, cell: dict[str, Any]) -> dict[str, Any]:
        """Every task's metrics."""
        limit = self.plan.limit
        cut: list[str] = []
        found: dict[str, Any] = {}
        for name in self.benchmarks:
            measured = measure_tasks(
                model,
                self.tokenizer(),
                [name],
                # Its examples are whole articles.
                limit=max(1, limit // 10) if limit and name == "wikitext" else limit,
                overflow="cut",
                notify=cut.append,
            )
            found |= {task: row for task, row in measured}
        return {"tasks": found, "cut": cut}

    def metric(
        self, results: Results, system: str, task: str, name: str | None = None
    ) -> float | None:
        """Mean over seeds of a task's metric, by default the one that tables show."""
        rows = [r["tasks"][task] for r in self.finals(results, "text", system)]
        if not rows:
            return None
        return statistics.fmean(
            main_metric(row)[1] if name is None else row["metrics"][name] for row in rows
        )

    def note(self, results: Results) -> str:
        """What a reader of the tables must know."""
        rows = [r for s in self.systems(results) for r in self.finals(results, "text", s)]
        examples = max((t["examples"] for r in rows for t in r["tasks"].values()), default=0)
        notes = {f"{t['task']}: {t['note']}" for r in rows for t in r["tasks"].values()
                 if t.get("note")}  # fmt: skip
        error = 50 / math.sqrt(examples) if examples else math.nan
        return "; ".join(
            [
                "in brackets the paper's numbers (760 million parameters, 30 billion tokens), "
                "where the specification states them",
                f"at most {examples} examples a task: a standard error of up to {error:.1f} points",
                "systems with attention see as many tokens as in training; longer requests are cut "
                "from the left",
                *sorted(notes),
            ]
        )


# Hope, Titans and Transformer++ at 760 million parameters: perplexities of WikiText and LAMBADA,
# mean accuracy in percent.
PAPER_LANGUAGE: dict[str, tuple[float | None, float | None, float | None]] = {
    "hope": (18.68, 20.07, 52.28),
    "titans": (None, None, 51.68),
    "transformer": (None, None, 50.11),
}


class Language(OnStandardTasks):
    """Which system models language best, and knows most of the world."""

    name = "table2"
    item = "Table 2"
    title = "language modelling and common sense"
    question = "Which system, trained on the same text, does best on standard language tasks?"
    benchmarks = LANGUAGE

    def tables(self, results: Results) -> list[Table]:
        """Perplexities and accuracies."""
        rows = []
        for system in self.systems(results):
            paper = PAPER_LANGUAGE.get(system, (None, None, None))
            shares = [self.metric(results, system, task) for task in SHARES]
            known = [share for share in shares if share is not None]
            rows.append((
                self.compared[system].label,
                self.perplexity(results, system),
                beside(self.metric(results, system, "wikitext"), paper[0], 2),
                beside(self.metric(results, system, "lambada_openai", "perplexity"), paper[1], 2),
                *(None if share is None else f"{share:.1f}" for share in shares),
                beside(statistics.fmean(known) if known else None, paper[2], 2),
            ))  # fmt: skip
        heads = (f"{t} {METRIC[t]}".replace("acc_norm", "acc_n") for t in SHARES)
        columns = ("system", "own text ppl", "wikitext ppl", "lambada ppl", *heads, "mean")
        return [Table(self.title, columns, tuple(rows), self.note(results))]


# In the order of RECALL: SWDE, NQ, DROP, FDA, SQuAD, TQA.
PAPER_RECALL: dict[str, tuple[float, ...]] = {
    "transformer": (71.4, 22.0, 23.9, 67.3, 39.4, 59.1),
    "titans": (60.8, 20.3, 22.0, 37.6, 31.8, 57.5),
    "hope": (65.9, 21.2, 22.8, 41.9, 33.0, 57.7),
}


class Recall(OnStandardTasks):
    """Which system finds again what stands in its context.

    At scale tiny: SQuAD on local data, and how many nats per byte a second reading of the same
    passage saves, which small models can already do something about.
    """

    name = "table3"
    item = "Table 3"
    title = "in-context recall"
    question = "Which system, trained on the same text, finds again what stands in its context?"

    @property
    def benchmarks(self) -> tuple[str, ...]:  # type: ignore[override]
        """From the hub, but at scale tiny."""
        return ("squad",) if self.scale == "tiny" else RECALL

    def examine(self, model: Any, cell: dict[str, Any]) -> dict[str, Any]:
        """The tasks, and the saving of a second reading."""
        return {**super().examine(model, cell), "second_reading": self.second_reading(model)}

    @torch.no_grad()
    def second_reading(self, model: Any) -> float:
        """Mean loss of passages at the first reading minus that at the second, directly after;
        both together are as long as a sequence of training."""
        task = self.tasks()["text"]
        batch = task.draw("test", self.plan.examples, torch.Generator().manual_seed(10_001))
        half = task.length // 2
        passages = batch.inputs[:, :half].to(model.device)
        total = 0.0
        for rows in passages.split(16):
            twice = torch.cat([rows, rows], 1)
            logits = model(input_ids=twice, use_cache=False).logits.float()
            loss = torch.nn.functional.cross_entropy(
                logits[:, :-1].transpose(1, 2), twice[:, 1:], reduction="none"
            )
            # The first token of a passage is left out: at the first reading nothing is before it.
            total += float((loss[:, : half - 1] - loss[:, half:]).mean(1).sum())
        return total / len(passages)

    def tables(self, results: Results) -> list[Table]:
        """Shares of answers that are right."""
        rows = []
        for system in self.systems(results):
            finals = self.finals(results, "text", system)
            saved = statistics.fmean(r["second_reading"] for r in finals) if finals else None
            paper = dict(zip(RECALL, PAPER_RECALL.get(system, ()), strict=False))
            rows.append((
                self.compared[system].label,
                *(beside(self.metric(results, system, t), paper.get(t)) for t in self.benchmarks),
                saved,
            ))  # fmt: skip
        columns = ("system", *(f"{t} {METRIC[t]}" for t in self.benchmarks), "second reading, nats")
        note = (
            "second reading: nats per token by which a passage is easier to predict when it is "
            "read again directly after; " + self.note(results)
        )
        return [Table(self.title, columns, tuple(rows), note)]

    def plot(self, results: Results, path: Path) -> bool:
        """Bars: the saving of a second reading."""
        systems = self.systems(results)
        if not systems:
            return False
        return _bars(
            path,
            [self.compared[s].label for s in systems],
            [statistics.fmean(r["second_reading"] for r in self.finals(results, "text", s))
             for s in systems],
            "saved by a second reading, nats per token",
        )  # fmt: skip


def _bars(path: Path, names: list[str], values: list[float], label: str) -> bool:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 3.5))
    axis.barh(names[::-1], values[::-1])
    axis.set_xlabel(label)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True
