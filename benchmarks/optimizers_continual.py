"""§4.3: what each optimizer forgets while orthogonal tasks are learned one after another.

Five tasks from scikit-learn's digits: each puts the images' twelve leading principal components
into a subspace of its own of a 60-dimensional input (the subspaces are orthogonal) and has its own
order of the ten labels. One network for all of them learns each for a number of steps, once. Two
networks:

- ``linear``: one matrix. The tasks' gradients live in orthogonal subspaces, so plain gradient
  descent cannot forget anything; whatever is forgotten is the optimizer's doing;
- ``mlp``: one hidden layer. The second matrix is shared, so gradients interfere.

Rate and settings are the best of a grid on a tuning seed: highest mean accuracy over all tasks at
the end, on validation images (of other writers). Three further seeds, test images. Reported:
accuracy right after a task was learned, accuracy at the end, forgetting = their mean difference
over all tasks but the last. As learning less is the easy way of forgetting less, the picture has
every rate of the grid.

    python benchmarks/optimizers_continual.py
"""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import Results, arguments, out_path, table
from optimizers_loss import digits
from torch import Tensor, nn

TUNING_SEED = 1000
TASKS, WIDTH, HIDDEN, CLASSES, BATCH = 5, 12, 16, 10, 32
NETWORKS = ("linear", "mlp")
Setting = dict[str, Any]
M3_SETTING: Setting = {"betas": (0.9, 0.95, 0.9), "alpha": 0.2, "eps": 0.1}


class Tasks:
    """The tasks of a seed.

    Attributes:
        bases: ``(tasks, WIDTH, TASKS * WIDTH)``: orthonormal rows, orthogonal between tasks.
        orders: ``(tasks, CLASSES)``: a task's name of each label.
    """

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        square = torch.randn(TASKS * WIDTH, TASKS * WIDTH, generator=generator)
        self.bases = torch.linalg.qr(square)[0].view(TASKS, WIDTH, TASKS * WIDTH)
        self.orders = torch.stack(
            [torch.randperm(CLASSES, generator=generator) for _ in range(TASKS)]
        )
        data = digits()
        flat = {name: images.flatten(1) for name, (images, _) in data.items()}
        mean = flat["train"].mean(0)
        axes = torch.linalg.svd(flat["train"] - mean, full_matrices=False)[2][:WIDTH]
        scale = ((flat["train"] - mean) @ axes.T).std()
        self.inputs = {name: (x - mean) @ axes.T / scale for name, x in flat.items()}
        self.labels = {name: labels for name, (_, labels) in data.items()}

    def split(self, task: int, name: str) -> tuple[Tensor, Tensor]:
        """A task's inputs and labels of a split."""
        return self.inputs[name] @ self.bases[task], self.orders[task][self.labels[name]]


def network(kind: str) -> nn.Module:
    """Linear maps without biases, so that every parameter is a matrix."""
    if kind == "linear":
        model: nn.Module = nn.Linear(TASKS * WIDTH, CLASSES, bias=False)
        nn.init.zeros_(model.weight)  # type: ignore[arg-type]
        return nn.Sequential(model)
    return nn.Sequential(
        nn.Linear(TASKS * WIDTH, HIDDEN, bias=False),
        nn.ReLU(),
        nn.Linear(HIDDEN, CLASSES, bias=False),
    )


Make = Callable[..., torch.optim.Optimizer]


def grids() -> dict[str, tuple[Make, tuple[float, ...], tuple[Setting, ...]]]:
    """Optimizer -> (build from the model, rates, settings); every pair of the two is tried."""
    from nestlearn import optim as own

    def sized(middle: float) -> tuple[float, ...]:
        return tuple(middle * 2.0**i for i in range(-4, 4))

    def of_parameters(make: Callable[..., torch.optim.Optimizer], **fixed: Any) -> Make:
        return lambda model, lr, **setting: make(model.parameters(), lr=lr, **fixed, **setting)

    sgd, adamw, muon = torch.optim.SGD, torch.optim.AdamW, torch.optim.Muon
    momenta = tuple({"momentum": b} for b in (0.8, 0.9, 0.95))
    matched = {"adjust_lr_fn": "match_rms_adamw", "weight_decay": 0.0}
    return {
        "SGD": (of_parameters(sgd), sized(0.8), ({},)),
        "momentum": (of_parameters(sgd), sized(0.1), momenta),
        "AdamW": (
            of_parameters(adamw, weight_decay=0.0),
            sized(8e-3),
            ({"betas": (0.9, 0.99)}, {"betas": (0.9, 0.999)}, {"betas": (0.8, 0.95)}),
        ),
        "Muon": (of_parameters(muon, **matched), sized(1.6e-2), momenta),
        "delta momentum": (
            of_parameters(own.DeltaMomentum),
            sized(0.1),
            tuple(
                {"momentum": b, "delta": d, "normalize": True}
                for b in (0.8, 0.9, 0.95)
                for d in (0.1, 1.0)
            ),
        ),
        "deep momentum": (
            of_parameters(own.DeepMomentum),
            sized(0.4),
            tuple(
                {"objective": objective, "retention": alpha}
                for objective in ("dot", "l2")
                for alpha in (0.9, 0.99)
            ),
        ),
        "DGD": (
            lambda model, lr, **setting: own.DGD(model, lr=lr, **setting),
            sized(0.4),
            ({}, {"momentum": 0.8}, {"momentum": 0.9}),
        ),
        "M3": (
            of_parameters(own.M3, weight_decay=0.0),
            sized(1.6e-2),
            tuple(M3_SETTING | more for more in ({}, {"alpha": 0.0}, {"betas": (0.8, 0.95, 0.9)})),
        ),
    }


def run_cell(
    kind: str, make: Make, lr: float, setting: Setting, seed: int, split: str, steps: int
) -> dict[str, Any]:
    """Learn the tasks in order; accuracies on a split after each."""
    torch.manual_seed(seed)
    tasks, model = Tasks(seed), network(kind)
    optimizer = make(model, lr, **setting)
    generator = torch.Generator().manual_seed(seed)
    matrix: list[list[float]] = []
    for task in range(TASKS):
        inputs, labels = tasks.split(task, "train")
        for _ in range(steps):
            rows = torch.randint(len(inputs), (BATCH,), generator=generator)
            loss = F.cross_entropy(model(inputs[rows]), labels[rows])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            matrix.append([accuracy(model, *tasks.split(t, split)) for t in range(TASKS)])
        model.train()
    return {"kind": kind, "lr": lr, "setting": setting, "seed": seed, "split": split,
            "matrix": matrix, **scores(matrix)}  # fmt: skip


def accuracy(model: nn.Module, inputs: Tensor, labels: Tensor) -> float:
    """Share of labels that are right."""
    return float((model(inputs).argmax(-1) == labels).float().mean())


def scores(matrix: list[list[float]]) -> dict[str, float]:
    """Summary of ``matrix[i][j]``: accuracy on task j after learning task i.

    Example:
        >>> scores([[1.0, 0.0], [0.5, 0.75]])
        {'learned': 0.875, 'final': 0.625, 'forgetting': 0.5}
    """
    learned = [row[i] for i, row in enumerate(matrix)]
    lost = [learned[j] - matrix[-1][j] for j in range(len(matrix) - 1)]
    return {
        "learned": statistics.fmean(learned),
        "final": statistics.fmean(matrix[-1]),
        "forgetting": statistics.fmean(lost),
    }


def least_forgetting(rows: list[dict[str, Any]], learned: float) -> float | None:
    """Least forgetting among the rows that learned at least this well."""
    enough = [row["forgetting"] for row in rows if row["learned"] >= learned]
    return min(enough, default=None)


def plot(results: Results, names: list[str], path: Path) -> None:
    """Accuracy on the first task along the stream, and forgetting against learning."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(12, 8.5))
    for line, kind in zip(axes, NETWORKS, strict=True):
        for i, name in enumerate(names):
            colour = f"C{i}"
            first = results.record["summary"][f"{kind}/{name}"]["first_task"]
            line[0].plot(range(1, TASKS + 1), first, "o-", ms=3, color=colour, label=name)
            tried = results.rows(kind=kind, optimizer=name, tuning=True)
            line[1].scatter(
                [r["learned"] for r in tried], [r["forgetting"] for r in tried], s=9, color=colour
            )
        line[0].set(xlabel="tasks learned", ylabel="accuracy on the first", title=kind)
        line[1].set(xlabel="accuracy right after learning", ylabel="forgetting", xlim=(0.4, 1))
        line[1].set_title(f"{kind}: every setting of the grid")
        line[0].set_xticks(range(1, TASKS + 1))
        line[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Tune, run, print and store."""
    parser = arguments(__doc__, "optimizers_continual", threads=1)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    steps = 3 if args.quick else 100
    results = Results(
        out_path(args),
        question="What is forgotten under each optimizer while orthogonal tasks are learned?",
        settings={"tasks": TASKS, "width": WIDTH, "hidden": HIDDEN, "batch": BATCH,
                  "steps": steps, "tuning_seed": TUNING_SEED},
        seeds=list(range(args.seeds)),
        threads=args.threads,
        fresh=args.fresh,
    )  # fmt: skip
    chosen = grids()
    if args.quick:
        chosen = {name: (make, rates[:1], sets[:1]) for name, (make, rates, sets) in chosen.items()}
    summary: dict[str, Any] = {}
    for kind, (name, (make, rates, settings)) in itertools.product(NETWORKS, chosen.items()):
        for lr, setting in itertools.product(rates, settings):
            cell = f"tune/{kind}/{name}/{lr:g}/{json.dumps(setting)}"
            if not results.done(cell):
                row = run_cell(kind, make, lr, setting, TUNING_SEED, "validation", steps)
                results.add(cell, row | {"optimizer": name, "tuning": True})
        tried = results.rows(kind=kind, optimizer=name, tuning=True)
        best = max(tried, key=lambda row: row["final"])
        rows = []
        for seed in range(args.seeds):
            cell = f"final/{kind}/{name}/{best['lr']:g}/{json.dumps(best['setting'])}/seed{seed}"
            if not results.done(cell):
                row = run_cell(kind, make, best["lr"], best["setting"], seed, "test", steps)
                results.add(cell, row | {"optimizer": name, "tuning": False})
            rows.append(results.get(cell) or {})
        keys = ("learned", "final", "forgetting")
        found = {k: statistics.fmean(r[k] for r in rows) for k in keys}
        found |= {f"{k}_seeds": [r[k] for r in rows] for k in keys}
        found |= {"lr": best["lr"], "setting": best["setting"], "trials": len(tried)}
        found["forgetting_at_0.85"] = least_forgetting(tried, 0.85)
        first = zip(*(row["matrix"] for row in rows), strict=True)
        found["first_task"] = [statistics.fmean(m[0] for m in each) for each in first]
        summary[f"{kind}/{name}"] = found
    results.summarise(summary)
    table(
        "Orthogonal tasks one after another (means of the seeds; last column: tuning seed)",
        ("network / optimizer", "learned", "at the end", "forgotten", "rate", "setting",
         "least forgotten at learned >= 0.85"),
        [
            (key, s["learned"], s["final"], s["forgetting"], s["lr"], json.dumps(s["setting"]),
             s["forgetting_at_0.85"])
            for key, s in summary.items()
        ],
    )  # fmt: skip
    if not args.quick:
        plot(results, list(chosen), out_path(args).with_suffix(".png"))


if __name__ == "__main__":
    main()
