"""Table 6: Hope without each of its parts.

The paper's Hope has delta gradient descent, momentum and weight decay in its memories, a continuum
memory of several levels, and keys, values and queries that are memories themselves. Every row
leaves one out; equal parameters, each variant with the best learning rate of the same grid.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from pathlib import Path
from typing import Any

from nestlearn.evals.harness.experiment import Scale, Table, beside
from nestlearn.evals.harness.results import Results
from nestlearn.evals.harness.systems import SYSTEMS, System
from nestlearn.evals.language_models import PLANS, LanguageModels, TextPlan

FULL = SYSTEMS["hope"].but(
    "Hope, all parts",
    memory_rule="dgd",
    memory_momentum=True,
    memory_weight_decay=True,
    memory_adaptive=("k", "v", "q", "eta", "alpha"),
)
VARIANTS: dict[str, System] = {
    "full": FULL,
    "no_dgd": FULL.but("w/o DGD", memory_rule="gd"),
    "no_momentum": FULL.but("w/o momentum", memory_momentum=False),
    "no_weight_decay": FULL.but("w/o weight decay", memory_weight_decay=False),
    "no_cms": FULL.but("w/o CMS", cms_periods=(1,)),
    "no_adaptive_k": FULL.but("w/o adaptive k", memory_adaptive=("v", "q", "eta", "alpha")),
    "no_adaptive_v": FULL.but("w/o adaptive v", memory_adaptive=("k", "q", "eta", "alpha")),
    "no_adaptive_q": FULL.but("w/o adaptive q", memory_adaptive=("k", "v", "eta", "alpha")),
    "hope": SYSTEMS["hope"].but("Hope as it comes (w/o momentum, adaptive q)"),
}
"""Name -> what is left out of the first."""

# Perplexity, accuracy in percent.
PAPER: dict[str, tuple[float, float]] = {
    "full": (12.24, 58.1),
    "no_dgd": (13.41, 56.5),
    "no_momentum": (13.58, 56.9),
    "no_weight_decay": (13.71, 57.2),
    "no_cms": (13.04, 57.3),
    "no_adaptive_k": (13.77, 56.9),
    "no_adaptive_v": (13.90, 55.1),
    "no_adaptive_q": (12.19, 57.4),
}


def _plan(plan: TextPlan, **changes: Any) -> TextPlan:
    return dataclasses.replace(plan, systems=tuple(VARIANTS), **changes)


class Ablation(LanguageModels):
    """Which part of Hope does how much."""

    name = "table6"
    item = "Table 6"
    title = "Hope without each of its parts"
    question = "What does each part of Hope do for perplexity and accuracy?"
    compared = VARIANTS
    plans: dict[Scale, TextPlan] = {
        # Differences between variants are small: three seeds.
        "tiny": _plan(PLANS["tiny"], steps=200, batch=8, lrs=(6e-3,), seeds=3),
        "small": _plan(PLANS["small"]),
        "paper": _plan(PLANS["paper"]),
    }

    def tables(self, results: Results) -> list[Table]:
        """Perplexity and next-token accuracy, differences from the first row, and whether their
        signs are the paper's."""
        base = self._measured(results, "full")
        rows: list[tuple[Any, ...]] = []
        for variant in self.systems(results):
            ours, theirs = self._measured(results, variant), PAPER.get(variant)
            if ours is None:
                continue
            cells: list[Any] = [
                self.compared[variant].label,
                beside(ours[0], theirs and theirs[0], 3),
                beside(ours[1], theirs and theirs[1], 2),
            ]
            for i in (0, 1):
                if base is None or variant == "full":
                    cells += [None, None]
                    continue
                paper = None if theirs is None else theirs[i] - PAPER["full"][i]
                change = ours[i] - base[i]
                cells.append(f"{change:+.3f}" + ("" if paper is None else f" ({paper:+.2f})"))
                cells.append(None if paper is None else change * paper > 0)
            rows.append((*cells, self.spread(results, variant)))
        columns = ("variant", "perplexity", "accuracy, %", "Δ perplexity", "sign as in the paper",
                   "Δ accuracy", "sign as in the paper", "± ppl over seeds")  # fmt: skip
        note = (
            "In brackets: the paper's. Perplexity per token of held-out text (a byte at scale "
            "tiny). Accuracy: share of held-out tokens that the model finds likeliest; the paper's "
            "is the mean over common-sense tasks."
        )
        return [Table(self.title, columns, tuple(rows), note)]

    def _measured(self, results: Results, variant: str) -> tuple[float, float] | None:
        rows = self.finals(results, "text", variant)
        perplexity = self.perplexity(results, variant)
        if perplexity is None:
            return None
        return perplexity, 100 * sum(r["test"]["tokens"] for r in rows) / len(rows)

    def spread(self, results: Results, variant: str) -> float | None:
        """Standard deviation of the perplexity over seeds; None with fewer than two."""
        found = [math.exp(r["test"]["loss"]) for r in self.finals(results, "text", variant)]
        return statistics.stdev(found) if len(found) > 1 else None

    def plot(self, results: Results, path: Path) -> bool:
        """Bars: change of perplexity when a part is left out, ours and the paper's."""
        base = self._measured(results, "full")
        shown = [v for v in self.systems(results) if v in PAPER and v != "full"]
        if base is None or not shown:
            return False
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt

        figure, axes = plt.subplots(1, 2, figsize=(11, 3.6), sharey=True)
        labels = [self.compared[v].label for v in shown]
        ours = [100 * ((self._measured(results, v) or base)[0] / base[0] - 1) for v in shown]
        paper = [100 * (PAPER[v][0] / PAPER["full"][0] - 1) for v in shown]
        for axis, values, title in zip(axes, (ours, paper), ("ours", "paper"), strict=True):
            axis.barh(labels[::-1], values[::-1])
            axis.axvline(0, color="black", linewidth=0.8)
            axis.set(title=title, xlabel="perplexity without the part, change in %")
        figure.tight_layout()
        figure.savefig(path, dpi=110)
        plt.close(figure)
        return True
