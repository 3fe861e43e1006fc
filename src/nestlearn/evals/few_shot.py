"""Few-shot generalisation: how well a system knows a task it never saw after k examples of it.

Classes around new prototypes, and values of new functions, beside what is the best that anyone can
say (Bayes' rule, ridge regression) and beside simple methods (nearest mean, nearest points).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from nestlearn.evals.episodes import FAMILIES, NOISE, Episodes, Functions, Prototypes
from nestlearn.evals.harness.experiment import Request, Table
from nestlearn.evals.harness.heads import PointReader
from nestlearn.evals.harness.results import Results
from nestlearn.evals.harness.systems import SYSTEMS, Size
from nestlearn.evals.harness.task import Task
from nestlearn.evals.harness.trained import Plan, Trained, seed_of

SHOTS = (1, 2, 4, 8, 16, 32, 64)
"""Examples of a function."""
CLASS_SHOTS = (1, 2, 4, 8, 16)
"""Examples of every class."""


class FewShot(Trained):
    """Error against the number of examples, for tasks that are new in every sequence."""

    name = "few_shot"
    item = "Few-shot"
    title = "few-shot classification and regression in context"
    question = "How well do systems know an unseen task after k examples, and how near is the best?"
    plans = {
        "tiny": Plan(
            Size(64, 2, 2), steps=2_000, batch=16, lrs=(3e-3,), weight_decays=(0.1,), seeds=1,
            systems=("transformer", "gated_deltanet", "titans", "hope"), examples=1_000,
        ),
        "small": Plan(
            Size(128, 4, 4), steps=5_000, batch=64, lrs=(1e-3,), weight_decays=(0.1,), seeds=1,
            systems=("transformer", "deltanet", "gated_deltanet", "titans", "hope_attention",
                     "hope"),
            examples=2_000,
        ),
        "paper": Plan(
            Size(256, 12, 8), steps=100_000, batch=64, lrs=(1e-4, 3e-4, 1e-3),
            weight_decays=(0.1,), seeds=3, examples=5_000,
        ),
    }  # fmt: skip

    def tasks(self) -> dict[str, Task]:
        """Classification and four kinds of functions."""
        return dict(self.episodes())

    def episodes(self) -> dict[str, Episodes]:
        """The tasks, as what they are."""
        wide = self.scale != "tiny"
        sizes = {"active": 3, "hidden": 100} if wide else {"active": 2, "hidden": 32}
        features = 20 if wide else 6
        found: list[Episodes] = [Prototypes(features, CLASS_SHOTS)]
        found += [Functions(name, features, SHOTS, **sizes) for name in FAMILIES]
        return {task.name: task for task in found}

    def model(self, system: str, task: Task, plan: Plan) -> nn.Module:
        """Points are projected to the width of the system."""
        assert isinstance(task, Episodes)
        return PointReader(super().model(system, task, plan), task.token_size)

    # -- references ---------------------------------------------------------------------------

    def due(self, results: Results, request: Request) -> dict[str, dict[str, Any]]:
        """The references of every task, and what is trained."""
        names = request.pick("tasks", tuple(self.tasks()))
        cells = {f"reference/{n}": {"task": n, "reference": True} for n in names}
        open_ = {name: cell for name, cell in cells.items() if results.get(name) is None}
        return {**open_, **super().due(results, request)}

    def measure(self, cell: dict[str, Any]) -> dict[str, Any]:
        """A trained model, or what methods without training reach on the same test examples."""
        if not cell.get("reference"):
            return super().measure(cell)
        task = self.episodes()[cell["task"]]
        found: dict[str, dict[str, float]] = {}
        for split in task.splits:
            generator = torch.Generator().manual_seed(seed_of(task, split))
            x, y = task.episodes(split, self.plan.examples, generator)
            for name, said in task.references(x, y).items():
                if task.metric == "loss":
                    value = float(((said - y[:, -1]) ** 2).mean())
                else:
                    value = float((said.argmax(1) == y[:, -1]).double().mean())
                found.setdefault(name, {})[split] = value
        return {**cell, "scores": found}

    def summary(self, row: dict[str, Any]) -> str:
        """Of references: their names and last scores."""
        if not row.get("reference"):
            return super().summary(row)
        return ", ".join(f"{k} {list(v.values())[-1]:.3g}" for k, v in row["scores"].items())

    def references(self, results: Results, task: Task) -> dict[str, dict[str, float]]:
        """Method -> split -> error of a function, or share of right classes in percent."""
        rows = [r for r in results.rows(task=task.name, reference=True) if "error" not in r]
        scale = 1 if task.metric == "loss" else 100
        scores = rows[0]["scores"] if rows else {}
        return {m: {k: scale * v for k, v in curve.items()} for m, curve in scores.items()}

    # -- what is shown ------------------------------------------------------------------------

    def curves(self, results: Results, task: Task) -> dict[str, dict[str, float]]:
        """Label of a system -> split -> mean over seeds."""
        found = {}
        for system in self.systems(results):
            means = {k: self.mean(results, task.name, system, k) for k in task.splits}
            curve = {k: mean for k, mean in means.items() if mean is not None}
            if curve:
                found[SYSTEMS[system].label] = curve
        return found

    def tables(self, results: Results) -> list[Table]:
        """A table for every task: systems, then references, by the number of examples."""
        found = []
        for name, task in self.episodes().items():
            curves = {**self.curves(results, task), **self.references(results, task)}
            if not curves:
                continue
            rows = tuple((k, *(curve[n] for n in task.splits)) for k, curve in curves.items())
            heads = ("system", *(f"k = {n}" for n in task.splits))
            if task.metric == "loss":
                title = f"{name} functions: squared error after k examples"
                note = f"Values have mean square 1; noise alone is {NOISE**2:g}."
            else:
                title = f"{name}: right after k examples of each of {task.ways} classes, %"
                note = "No one can be right more often than Bayes' rule but by chance."
            found.append(Table(title, heads, rows, note))
        return found

    def plot(self, results: Results, path: Path) -> bool:
        """A panel for every task; references are dotted."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt

        tasks = {n: t for n, t in self.episodes().items() if self.curves(results, t)}
        if not tasks:
            return False
        size = (3.6 * len(tasks) + 1.5, 3.8)
        figure, axes = plt.subplots(1, len(tasks), figsize=size, squeeze=False)
        for axis, (name, task) in zip(axes[0], tasks.items(), strict=True):
            places = list(task.shots)
            for label, curve in self.curves(results, task).items():
                axis.plot(places, [curve[k] for k in task.splits], "-", marker="o", label=label)
            for i, (label, curve) in enumerate(self.references(results, task).items()):
                style = {"color": "black" if i == 0 else "gray", "linestyle": ":"}
                axis.plot(places, [curve[k] for k in task.splits], label=label, **style)
            axis.set_xscale("log", base=2)
            axis.set_xticks(places, task.splits)
            axis.set(title=name, xlabel="examples" + (" per class" if task.ways > 1 else ""))
            axis.set_ylabel("squared error" if task.metric == "loss" else "right, %")
            if task.metric == "loss":
                axis.set_yscale("log")
            axis.legend(fontsize=7)
        figure.tight_layout()
        figure.savefig(path, dpi=110)
        plt.close(figure)
        return True
