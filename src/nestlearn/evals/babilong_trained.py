"""Fig. 9: accuracy on BABILong against length, for models that are trained from scratch.

The paper fine-tunes language models. Here one model per system and bAbI task is trained on short
texts alone, and read on to ever longer ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from nestlearn.evals.babilong import Scattered, accuracy, search
from nestlearn.evals.harness.experiment import Scale, Table
from nestlearn.evals.harness.results import Results
from nestlearn.evals.harness.systems import SYSTEMS, Size, System
from nestlearn.evals.harness.task import VALIDATION, Task
from nestlearn.evals.harness.trained import Losses, Plan, Trained
from nestlearn.evals.recurrent_memory import RecurrentMemoryTransformer
from nestlearn.nn.write_cost import cost_at

SPARSE = "hope_sparse"
"""Hope that writes little: no forgetting, a threshold, and a cost on writes that comes and
goes (`nestlearn.nn.write_cost.cost_at`)."""
WRITE_COST = 1e-3
"""Nats a write, at its highest."""


@dataclasses.dataclass(frozen=True)
class BabiPlan(Plan):
    """A plan with tasks and lengths.

    Attributes:
        tasks: of bAbI.
        trained, tested: lengths of texts; ``batch`` counts those of the longest training length.
        budget: tokens read at each test length; between 8 and ``examples`` texts are read.
        segment: of the recurrent-memory Transformers.
        vocab_size, characters: of the tokenizer, and read into each haystack.
        distractors: share of the training texts with a sentence of the books that ends as a fact
            does.
        fields: a convolution of 8 tokens for all that have one. Whose place is asked is more tokens
            before the answer (" John?", "Answer:") than the usual 4 (docs/results.md).
    """

    tasks: tuple[str, ...] = ("qa1",)
    trained: tuple[int, ...] = (0, 256, 1024, 4096)
    tested: tuple[int, ...] = (0, 1024, 4096, 16_384, 65_536, 262_144, 1_048_576)
    budget: int = 16 * 2**20
    segment: int = 256
    vocab_size: int = 1024
    characters: int = 16_000_000
    distractors: float = 0.5
    fields: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {"conv_size": 8})


class BabiLong(Trained):
    """Accuracy against length, far beyond the lengths of training."""

    name = "fig9"
    item = "Figure 9"
    title = "BABILong"
    question = "Which systems still know scattered facts at the end of a text of a million tokens?"
    compared = {
        **SYSTEMS,
        **{
            name: SYSTEMS[name].but(f"{SYSTEMS[name].label} (window)")
            for name in ("transformer", "hope_attention")
        },
        SPARSE: SYSTEMS["hope"].but(
            "Hope (few writes)",
            write_threshold=0.004,
            memory_half_lives=(1e25, 1e25),
            write_cost=WRITE_COST,
        ),
        "rmt": System("RMT", {}),
        "armt": System("ARMT", {}),
    }
    plans: Mapping[Scale, BabiPlan] = {
        "tiny": BabiPlan(
            Size(64, 2, 2), steps=1_600, batch=1, lrs=(3e-3,), weight_decays=(0.0,), seeds=1,
            systems=("transformer", "armt", "gated_deltanet", "titans", "hope", SPARSE),
            examples=100,
        ),
        "small": BabiPlan(
            Size(256, 4, 4), steps=5_000, batch=16, lrs=(1e-3, 3e-3), weight_decays=(0.1,), seeds=1,
            systems=("transformer", "rmt", "armt", "gated_deltanet", "titans", "hope", SPARSE),
            examples=200, tasks=("qa1", "qa2"), trained=(0, 512, 1024, 2048, 4096), segment=512,
            vocab_size=4096, budget=16 * 2**20,
        ),
        "paper": BabiPlan(
            Size(768, 12, 12), steps=30_000, batch=64, lrs=(3e-4, 1e-3), weight_decays=(0.1,),
            systems=("transformer", "rmt", "armt", "titans", "hope", SPARSE), examples=1_000,
            tasks=("qa1", "qa2", "qa4", "qa5"), trained=(0, 512, 1024, 2048, 4096, 8192, 16_384),
            tested=(0, 4096, 16_384, 65_536, 131_072, 524_288, 1_048_576, 10_485_760),
            segment=512, vocab_size=32_000, budget=10**9, characters=64_000_000,
        ),
    }  # fmt: skip

    def __init__(self, scale: Scale = "tiny") -> None:
        super().__init__(scale)
        plan = self.plans[self.scale]
        self._tasks = {
            name: Scattered(
                name, plan.trained, plan.tested, plan.vocab_size, plan.characters, plan.distractors
            )
            for name in plan.tasks
        }

    def tasks(self) -> dict[str, Task]:
        """The tasks of bAbI."""
        return dict(self._tasks)

    def model(self, system: str, task: Task, plan: Plan) -> nn.Module:
        """A model; recurrent-memory Transformers are not among the library's mixers."""
        if system not in ("rmt", "armt"):
            return super().model(system, task, plan)
        size, segment = plan.size, self.plans[self.scale].segment
        return RecurrentMemoryTransformer(
            size, task.vocab_size, segment, associative=system == "armt"
        )

    def guided(self, model: Any, cell: dict[str, Any], plan: Plan, data: Losses) -> Losses:
        """The cost on writes of a system that has one rises and falls."""
        cost = self.fields(cell["system"], plan).get("write_cost", 0.0)
        for step, loss in enumerate(data):
            if cost:
                model.config.write_cost = cost * cost_at(step / plan.steps)
            yield loss

    def scores(self, model: Any, task: Task, plan: Plan, split: str, seed: int) -> dict[str, Any]:
        """Share of right answers; of attention also with a search before it."""
        if split == VALIDATION:
            return super().scores(model, task, plan, split, seed)
        length, own = int(split), self.plans[self.scale]
        count = max(min(8, plan.examples), min(plan.examples, own.budget // max(1, length)))
        rng = np.random.default_rng(seed)
        samples = self._tasks[task.name].samples("test", count, length, rng)
        was_training = model.training
        model.eval()
        config = getattr(model, "config", None)
        windowed = config is not None and SYSTEMS["transformer"].fields["mixer"] == config.mixer
        window = own.trained[-1] if windowed else None
        found = {"tokens": accuracy(model, samples, [_end(s.tokens, window) for s in samples]),
                 "count": count}  # fmt: skip
        if windowed:
            texts = [_end(search(s), window) for s in samples]
            found["search"] = accuracy(model, samples, texts)
        model.train(was_training)
        return found

    def _curves(self, results: Results, task: str) -> Iterator[tuple[str, list[float | None]]]:
        """Names and accuracies in percent at all lengths."""
        splits = self._tasks[task].splits
        for system in self.systems(results):
            rows = self.finals(results, task, system)
            for kind, more in (("tokens", ""), ("search", " + search (RAG)")):
                if rows and kind in rows[0][splits[0]]:
                    means = [100 * sum(r[s][kind] for r in rows) / len(rows) for s in splits]
                    label = self.compared[system].label
                    yield (label.replace(" (window)", more) if more else label), [*means]

    def tables(self, results: Results) -> list[Table]:
        """Accuracy at every length, one table a task."""
        found = []
        for task, made in self._tasks.items():
            rows = tuple((label, *means) for label, means in self._curves(results, task))
            columns = ("system", *(_short(n) for n in made.tested))
            note = (f"Trained on texts of up to {made.trained[-1]:,} tokens. The paper (fine-tuned "
                    "models): Hope holds to 10M tokens, Titans and ARMT fall after 1M, GPT-4 and "
                    "Llama-8B with search fall by 128k to 256k.")  # fmt: skip
            found.append(Table(f"{task}: answers right in %, by tokens", columns, rows, note))
        return found

    def plot(self, results: Results, path: Path) -> bool:
        """Accuracy against length."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt

        curves = {task: list(self._curves(results, task)) for task in self._tasks}
        curves = {task: found for task, found in curves.items() if found}
        if not curves:
            return False
        figure, axes = plt.subplots(
            1, len(curves), figsize=(5.5 * len(curves) + 2.5, 4.5), squeeze=False
        )
        for axis, (task, found) in zip(axes[0], curves.items(), strict=True):
            tested = self._tasks[task].tested
            places = range(len(tested))
            for label, means in found:
                axis.plot(places, means, "o-", label=label)
            axis.axvline(
                sum(n <= self._tasks[task].trained[-1] for n in tested) - 0.5, color="grey", ls=":"
            )
            axis.set_xticks(places, [_short(n) for n in tested])
            axis.set(title=f"{task} (dotted: length of training)", xlabel="tokens", ylim=(-4, 104))
            axis.set_ylabel("answers right, %")
        axes[0, -1].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
        figure.tight_layout()
        figure.savefig(path, dpi=110)
        plt.close(figure)
        return True


def _end(tokens: np.ndarray, window: int | None) -> np.ndarray:
    return tokens if window is None else tokens[-window:]


def _short(tokens: int) -> str:
    if tokens >= 2**20:
        return f"{tokens / 2**20:g}M"
    return f"{tokens // 1024}k"
