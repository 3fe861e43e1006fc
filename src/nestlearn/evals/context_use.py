"""Figure 10: how far back a model makes use of what it has read.

Long stretches of held-out documents are read once, from the initial state; the loss is averaged
within ranges of positions. A system that uses distant context predicts late positions better.
"""

from __future__ import annotations

import math
import statistics
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nestlearn.evals.harness.experiment import Table
from nestlearn.evals.harness.results import Results
from nestlearn.evals.language_models import LanguageModels

SPAN = 16
"""The longest context is this many training sequences."""


def edges(longest: int, first: int = 64) -> list[int]:
    """Limits of the ranges of positions: 0, ``first``, then doubling up to ``longest``.

    Example:
        >>> edges(1000)
        [0, 64, 128, 256, 512, 1000]
    """
    found = [0]
    limit = first
    while limit < longest:
        found.append(limit)
        limit *= 2
    return [*found, longest]


@torch.no_grad()
def losses_by_position(model: Any, rows: Tensor, segment: int = 512) -> Tensor:
    """Loss at every position, ``(B, T - 1)``, read in segments with the state handed on.

    Args:
        model: a causal language model. rows: ``(B, T)`` tokens.
    """
    model.eval()
    state, parts = None, []
    for start in range(0, rows.shape[1] - 1, segment):
        part = rows[:, start : min(start + segment, rows.shape[1] - 1)]
        out = model(input_ids=part, past_key_values=state, use_cache=True)
        state = out.past_key_values
        right = rows[:, start + 1 : start + 1 + part.shape[1]]
        parts.append(F.cross_entropy(out.logits.float().transpose(1, 2), right, reduction="none"))
    return torch.cat(parts, 1).double()


class ContextUse(LanguageModels):
    """Perplexity against the number of tokens read before."""

    name = "fig10"
    item = "Figure 10"
    title = "perplexity against context length"
    question = "Which systems predict text better the more of it they have read?"

    def settings(self) -> dict[str, Any]:
        """Of the training, and the longest context."""
        return {**super().settings(), "span": SPAN}

    def examine(self, model: Any, cell: dict[str, Any]) -> dict[str, Any]:
        """Mean loss within ranges of positions."""
        rows = self.stretches().to(cell["device"])
        losses = [losses_by_position(model, part) for part in rows.split(4)]
        by_position = torch.cat(losses).mean(0)
        limits = edges(len(by_position))
        return {
            "edges": limits,
            "losses": [float(by_position[a:b].mean()) for a, b in pairwise(limits)],
        }

    def stretches(self) -> Tensor:
        """Long stretches of held-out text, ``(B, T)``, the same for all systems."""
        from nestlearn.evals.language_models import CorpusWindows
        from nestlearn.evals.text import Windows

        task, length = self.tasks()["text"], SPAN * self.plan.length
        count = max(4, self.plan.examples // 8)
        if isinstance(task, CorpusWindows):
            tokens = torch.from_numpy(
                task.blocks.held_out.tokens[-count * length :].astype("int64")
            )
            return tokens.view(-1, length)
        return Windows(task.name, length).draw("test", count, torch.Generator()).inputs

    def tables(self, results: Results) -> list[Table]:
        """Perplexity per range of positions."""
        rows, limits = [], None
        for system in self.systems(results):
            finals = self.finals(results, "text", system)
            if not finals:
                continue
            limits = finals[0]["edges"]
            means = self._losses(finals)
            rows.append((self.compared[system].label, *(math.exp(v) for v in means)))
        names = [f"{a}-{b}" for a, b in pairwise(limits or [0, 0])]
        note = (
            f"Perplexity per token (a byte at scale tiny) at positions of a stretch; trained on "
            f"sequences of {self.plan.length}. The paper shows curves without numbers that could "
            "be put beside these."
        )
        return [Table(self.title, ("system", *names), tuple(rows), note)]

    def _losses(self, finals: list[dict[str, Any]]) -> list[float]:
        return [statistics.fmean(v) for v in zip(*(r["losses"] for r in finals), strict=True)]

    def plot(self, results: Results, path: Path) -> bool:
        """Curves over positions; a line where training sequences end."""
        systems = [s for s in self.systems(results) if self.finals(results, "text", s)]
        if not systems:
            return False
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt

        free = [s for s in systems if not self.compared[s].attention]
        # Attention beyond its length hides what differs between the others: once more without it.
        panels = [systems, free] if 0 < len(free) < len(systems) else [systems]
        figure, axes = plt.subplots(
            1, len(panels), figsize=(1.5 + 5.5 * len(panels), 4.2), squeeze=False
        )
        for axis, shown in zip(axes[0], panels, strict=True):
            for system in shown:
                finals = self.finals(results, "text", system)
                ends, values = finals[0]["edges"][1:], map(math.exp, self._losses(finals))
                color, label = f"C{systems.index(system)}", self.compared[system].label
                axis.plot(ends, [*values], "o-", color=color, label=label)
            axis.axvline(self.plan.length, color="grey", linestyle=":", label="length in training")
            axis.set_xscale("log", base=2)
            axis.set(xlabel="tokens read", title="without attention" if shown is free else "all")
        axes[0, 0].set_ylabel("perplexity")
        axes[0, 0].legend(fontsize=8)
        figure.suptitle(self.title)
        figure.tight_layout()
        figure.savefig(path, dpi=110)
        plt.close(figure)
        return True
