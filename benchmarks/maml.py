"""Few-shot regression of sinusoids (Finn et al. 2017): MAML beside joint pre-training.

Tasks are y = a sin(x - p), amplitude a in [0.1, 5], phase p in [0, pi], x in [-5, 5]; the network
is an MLP with two hidden layers of 40. Every system sees as many tasks and points in training. It
then gets K = 10 points of a task it has not seen, takes gradient steps on them, and is asked for
the curve. MAML steps with the learning rate it was trained with; for the others the rate is chosen
on validation tasks of their own.

The mean over tasks says little once a single task diverges (MAML is trained for one step, nothing
bounds the tenth), so the median is reported too, and how many tasks diverged.

    python benchmarks/maml.py
"""

from __future__ import annotations

import functools
import math
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from common import Results, arguments, out_path, table
from torch import Tensor, nn
from torch.func import vmap

from nestlearn.levels import Backpropagation, Initialisation, InnerLoop, TwoLevel

SYSTEMS = ("MAML", "first-order MAML", "pre-trained", "random weights")
RATES = (0.001, 0.003, 0.01, 0.02, 0.03, 0.05)
Points = tuple[Tensor, Tensor]


def tasks(count: int, generator: torch.Generator) -> Callable[[Tensor], Tensor]:
    """Sinusoids of random amplitude and phase, as a function of ``x (count, points, 1)``."""
    draw = functools.partial(torch.rand, count, 1, 1, generator=generator)
    amplitude, phase = 0.1 + 4.9 * draw(), math.pi * draw()
    return lambda x: amplitude * torch.sin(x - phase)


def points(count: int, shots: int, generator: torch.Generator) -> Tensor:
    """Inputs, uniform in [-5, 5]."""
    return 10 * torch.rand(count, shots, 1, generator=generator) - 5


def network() -> nn.Module:
    """1-40-40-1."""
    hidden = (nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU())
    return nn.Sequential(*hidden, nn.Linear(40, 1))


def train(system: str, net: nn.Module, plan: dict[str, Any], generator: torch.Generator) -> None:
    """Change ``net`` into what the system starts a new task from."""
    if system == "random weights":
        return
    links = [Initialisation("meta", "task"), Backpropagation("meta", "task")]
    if system == "first-order MAML":
        del links[1]
    meta = TwoLevel(InnerLoop(net, nn.functional.mse_loss, lr=plan["inner_lr"]), links)
    optimizer = torch.optim.Adam(net.parameters(), lr=plan["lr"])
    count, shots = plan["tasks"], plan["shots"]
    for _ in range(plan["iterations"]):
        curve = tasks(count, generator)
        first, second = points(count, shots, generator), points(count, shots, generator)
        if system == "pre-trained":
            x = torch.cat([first, second], 1)
            loss = nn.functional.mse_loss(net(x), curve(x))
        else:
            loss = meta.loss((first, curve(first)), (second, curve(second)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def adapted_errors(
    net: nn.Module, lr: float, steps: int, shots: int, count: int, generator: torch.Generator
) -> Tensor:
    """Errors on every task's whole curve, after 0 to ``steps`` gradient steps: ``(steps + 1,
    count)``, infinite where a task diverged."""
    loop = InnerLoop(net, nn.functional.mse_loss, steps=1, lr=lr)
    curve, x = tasks(count, generator), points(count, shots, generator)
    grid = torch.linspace(-5, 5, 100)[None, :, None].expand(count, -1, -1)
    seen, answer = (x, curve(x)), curve(grid)
    learned = {n: p.expand(count, *p.shape) for n, p in loop.parameters().items()}
    errors = []
    for step in range(steps + 1):
        if step:
            learned = vmap(functools.partial(loop.learn, through=False))(learned, seen)
        made = vmap(loop.read)(learned, grid)
        errors.append((made - answer).square().mean((1, 2)))
    return torch.stack(errors).nan_to_num(nan=math.inf)


def run_cell(system: str, seed: int, plan: dict[str, Any]) -> dict[str, Any]:
    """Train one system and test it."""
    torch.manual_seed(seed)
    began = time.perf_counter()
    net = network()
    train(system, net, plan, torch.Generator().manual_seed(seed))
    trained = time.perf_counter() - began
    steps, shots = plan["steps"], plan["shots"]
    lr = plan["inner_lr"]
    if system in ("pre-trained", "random weights"):

        def final(rate: float) -> float:
            validation = torch.Generator().manual_seed(10_000 + seed)
            errors = adapted_errors(net, rate, steps, shots, plan["validation"], validation)
            return float(errors[-1].mean())

        lr = min(RATES, key=final)
    test = torch.Generator().manual_seed(20_000 + seed)
    errors = adapted_errors(net, lr, steps, shots, plan["test"], test)
    return {
        "adaptation_lr": lr,
        "mean": errors.mean(1).tolist(),
        "median": errors.quantile(0.5, 1, interpolation="nearest").tolist(),
        "diverged": float((errors[-1] > 10 * errors[0].clamp(min=1.0)).float().mean()),
        "train_seconds": trained,
        "seconds": time.perf_counter() - began,
    }


def plot(results: Results, path: Any) -> None:
    """Median error against gradient steps, a band from the lowest to the highest seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for system in SYSTEMS:
        rows = [r["median"] for r in results.rows(system=system)]
        if not rows:
            continue
        curves = torch.tensor(rows)
        steps = range(curves.shape[1])
        axes.plot(steps, curves.mean(0), marker="o", label=system)
        axes.fill_between(steps, curves.amin(0), curves.amax(0), alpha=0.2)
    shots = results.record["settings"]["shots"]
    axes.set(xlabel=f"gradient steps on {shots} points", ylabel="median squared error of the curve",
             title="Sinusoid regression, tasks not seen in training")  # fmt: skip
    axes.legend()
    figure.savefig(path, dpi=120)


def average(numbers: list[Any]) -> float:
    """Their mean; what was infinite is text in a result file."""
    return sum(map(float, numbers)) / len(numbers)


def main() -> None:
    """Command line."""
    parser = arguments(__doc__, "maml", threads=1)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--iterations", type=int, default=20_000)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    plan = {
        "iterations": args.iterations, "tasks": 25, "shots": 10, "lr": 1e-3, "inner_lr": 0.01,
        "steps": 10, "validation": 300, "test": 600,
    }  # fmt: skip
    if args.quick:
        plan |= {"iterations": 5, "validation": 4, "test": 4}
        args.seeds = args.seeds[:1]
    results = Results(
        out_path(args),
        "How well does a network know a new sinusoid after a few gradient steps on ten points?",
        plan,
        seeds=args.seeds,
        threads=args.threads,
        fresh=args.fresh,
    )
    for seed in args.seeds:
        for system in args.systems:
            cell = f"{system}/seed{seed}"
            if not results.done(cell):
                row = run_cell(system, seed, plan)
                results.add(cell, {"system": system, "seed": seed, **row})
                print(f"  {cell}: {row['median'][-1]:.3f}", file=sys.stderr, flush=True)
    summary: dict[str, Any] = {}
    for system in SYSTEMS:
        rows = results.rows(system=system)
        if not rows:
            continue
        medians = torch.tensor([r["median"] for r in rows])
        summary[system] = {
            "median_by_step": medians.mean(0).tolist(),
            "mean_after_one": [r["mean"][1] for r in rows],
            "mean_at_last": [r["mean"][-1] for r in rows],
            "diverged": [r["diverged"] for r in rows],
            "seeds": len(rows),
        }
    results.summarise(summary)
    shown = (0, 1, 5, plan["steps"])
    table(
        "Squared error on unseen sinusoids after gradient steps on ten points, mean over seeds",
        ["system", *(f"median, {n} steps" for n in shown), "mean, 1 step", "diverged at last"],
        [[s, *(v["median_by_step"][n] for n in shown), average(v["mean_after_one"]),
          average(v["diverged"])] for s, v in summary.items()],
    )  # fmt: skip
    plot(results, results.path.with_suffix(".png"))


if __name__ == "__main__":
    main()
