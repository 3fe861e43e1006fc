"""Fig. 12: time of an optimizer step on 12.6 M parameters of matrices, and the bytes it keeps.

Four layers of width 512: per layer four 512 x 512 matrices and two of 512 x 2048. All optimizers
are in one process, on one thread, and take turns step by step (R C R C ...); gradients are shared.
A figure is the ratio of the mean step of a block to the reference's in the same block, median over
blocks. A block is 16 turns, M3's period: M3 steps in all of them, so that its slow update is paid
for; optimizers whose steps are all alike in some. Time is the process's CPU time, which other
programs on the machine disturb less than the clock; the clock's figure is kept beside it.

DGD works through hooks in the forward and backward pass, so it is timed as a whole training step of
a Transformer of these matrices beside the same step under SGD.

    python benchmarks/optimizers_speed.py
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from common import Results, arguments, out_path, state_bytes, table, verdict
from peers import use_optimizers
from torch import nn
from transformer import Transformer

BLOCK = 16
SHAPES = [(512, 512)] * 4 + [(2048, 512), (512, 2048)]  # of one layer
LAYERS = 4
# name -> (reference, largest ratio allowed)
GOALS: dict[str, tuple[str, float]] = {
    "M3": ("Muon", 1.10),
    "M3 beside nested-learning's": ("M3 of nested-learning", 1 / 3),
    "DeltaMomentum": ("SGD momentum", 1.5),
    "DeltaMomentum, bfloat16 products": ("SGD momentum", 1.5),
    "DeltaMomentum, elementwise": ("SGD momentum", 1.5),
}
STEP_GOALS: dict[str, tuple[str, float]] = {"DGD": ("SGD", 1.10)}

Params = list[nn.Parameter]


def optimizers() -> dict[str, Callable[[Params], torch.optim.Optimizer]]:
    """What is timed on gradients that are there already."""
    use_optimizers()
    from nested_learning.optim.m3 import M3 as TheirM3
    from pytorch_optimizer import AdaMuon

    from nestlearn import optim as own

    def adamuon(ps: Params) -> torch.optim.Optimizer:
        return AdaMuon([{"params": ps, "use_muon": True}], lr=1e-3, foreach=True)

    return {
        "SGD": lambda ps: torch.optim.SGD(ps, lr=1e-3),
        "SGD momentum": lambda ps: torch.optim.SGD(ps, lr=1e-3, momentum=0.9),
        "AdamW": lambda ps: torch.optim.AdamW(ps, lr=1e-3),
        "Muon": lambda ps: torch.optim.Muon(ps, lr=1e-3),
        "AdaMuon": adamuon,
        "M3": lambda ps: own.M3(ps, lr=1e-3),
        "DeltaMomentum": lambda ps: own.DeltaMomentum(ps, lr=1e-3),
        "DeltaMomentum, bfloat16 products": lambda ps: own.DeltaMomentum(
            ps, lr=1e-3, decay_dtype=torch.bfloat16
        ),
        "DeltaMomentum, elementwise": lambda ps: own.DeltaMomentum(
            ps, lr=1e-3, structure="elementwise"
        ),
        "DeepMomentum": lambda ps: own.DeepMomentum(ps, lr=1e-3),
        "M3, alpha 0": lambda ps: own.M3(ps, lr=1e-3, alpha=0.0),
        "M3 of nested-learning": lambda ps: TheirM3(ps, lr=1e-3),
        "M3 of nested-learning, 5 steps": lambda ps: TheirM3(ps, lr=1e-3, ns_steps=5),
    }


# M3 takes all steps of a block, because they differ; the others' are alike.
EVERY = {"Muon": 2, "AdaMuon": 4, "M3": 1, "M3, alpha 0": 4}
SELDOM = ("M3 of nested-learning", "M3 of nested-learning, 5 steps")  # once in a block
REFERENCES = {  # where it is not SGD
    name: ("Muon", 0.0)
    for name in (
        "AdaMuon",
        "M3, alpha 0",
        "M3 of nested-learning",
        "M3 of nested-learning, 5 steps",
    )
}


def matrices(shapes: list[tuple[int, int]], layers: int) -> tuple[Params, list[torch.Tensor]]:
    """Parameters and gradients."""
    generator = torch.Generator().manual_seed(0)
    sizes = shapes * layers
    params = [nn.Parameter(0.02 * torch.randn(s, generator=generator)) for s in sizes]
    return params, [1e-3 * torch.randn(s, generator=generator) for s in sizes]


def timed(work: Callable[[], Any]) -> tuple[float, float]:
    """(CPU seconds, seconds) of a call."""
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    return time.process_time() - cpu, time.perf_counter() - wall


def turns(
    steps: dict[str, Callable[[], Any]], blocks: int, block: int, every: dict[str, int]
) -> dict[str, list[list[float]]]:
    """name -> per block ``[CPU seconds, seconds]`` per step. All take turns, step by step; those in
    ``every`` only in the turns that their number divides."""
    for step in steps.values():
        step()
    found: dict[str, list[list[float]]] = {name: [] for name in steps}
    for _ in range(blocks):
        total = {name: [0.0, 0.0, 0] for name in steps}
        for turn in range(block):
            for name, step in steps.items():
                if turn % every.get(name, 1):
                    continue
                cpu, wall = timed(step)
                total[name] = [total[name][0] + cpu, total[name][1] + wall, total[name][2] + 1]
        for name, (cpu, wall, count) in total.items():
            found[name].append([cpu / count, wall / count])
    return found


def ratios(found: dict[str, list[list[float]]], name: str, reference: str) -> list[float]:
    """Per block: CPU time of one over that of the reference.

    Example:
        >>> ratios({"a": [[3.0, 9.0], [1.0, 9.0]], "b": [[2.0, 9.0], [2.0, 9.0]]}, "a", "b")
        [1.5, 0.5]
    """
    return [own[0] / other[0] for own, other in zip(found[name], found[reference], strict=True)]


def row_of(found: dict[str, list[list[float]]], name: str, reference: str) -> dict[str, Any]:
    """One optimizer's times."""
    share = ratios(found, name, reference)
    return {
        "optimizer": name,
        "cpu_ms": 1e3 * statistics.median(cpu for cpu, _ in found[name]),
        "wall_ms": 1e3 * statistics.median(wall for _, wall in found[name]),
        "reference": reference,
        "ratio": statistics.median(share),
        "ratios": share,
    }


def training_steps(dim: int, layers: int, rows: int, length: int) -> dict[str, Callable[[], Any]]:
    """Whole training steps of a Transformer: SGD, and DGD with its hooks."""
    from nestlearn.optim import DGD

    def one(make: Callable[[nn.Module], torch.optim.Optimizer]) -> Callable[[], Any]:
        torch.manual_seed(0)
        model = Transformer(256, dim, layers)
        optimizer = make(model)
        tokens = torch.randint(0, 256, (rows, length))

        def step() -> None:
            model(tokens).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step

    return {
        "SGD": one(lambda m: torch.optim.SGD(m.parameters(), lr=1e-3)),
        "DGD": one(lambda m: DGD(m, lr=1e-3)),
    }


def main() -> None:
    """Time, print and store."""
    parser = arguments(__doc__, "optimizers_speed", threads=1)
    parser.add_argument("--blocks", type=int, default=4)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    blocks, block = (1, 2) if args.quick else (args.blocks, BLOCK)
    shapes = [(32, 32), (64, 32)] if args.quick else SHAPES
    layers = 1 if args.quick else LAYERS
    params, grads = matrices(shapes, layers)
    count = sum(p.numel() for p in params)
    results = Results(
        out_path(args),
        question="How long is an optimizer step on 12.6 M parameters of matrices?",
        settings={"parameters": count, "blocks": blocks, "block": block},
        threads=args.threads,
        fresh=True,  # ratios need one run
    )
    steps, kept = {}, {}
    for name, make in optimizers().items():
        own = [nn.Parameter(p.detach().clone()) for p in params]
        for p, g in zip(own, grads, strict=True):
            p.grad = g
        kept[name] = make(own)
        steps[name] = kept[name].step
    every = {name: block if name in SELDOM else EVERY.get(name, 2) for name in steps}
    found = turns(steps, blocks, block, every)
    found["M3 beside nested-learning's"], kept["M3 beside nested-learning's"] = (
        found["M3"],
        kept["M3"],
    )
    for name, optimizer in kept.items():
        row = row_of(found, name, (REFERENCES | GOALS).get(name, ("SGD", 0.0))[0])
        row["state_bytes_per_parameter"] = state_bytes(dict(optimizer.state))[0] / count
        results.add(name, row)
    del kept, steps
    size = (64, 1, 2, 16) if args.quick else (512, LAYERS, 4, 256)
    whole = turns(training_steps(*size), blocks, 2 if args.quick else 4, {})
    for name in whole:
        row = row_of(whole, name, "SGD")
        results.add(f"training step, {name}", row | {"tokens": size[2] * size[3]})
    goals = {**GOALS, **{f"training step, {k}": v for k, v in STEP_GOALS.items()}}
    rows = {row["cell"]: row for row in results.record["rows"]}
    summary = {
        name: {
            "ratio": rows[name]["ratio"],
            "reference": reference,
            "goal": goal,
            "verdict": verdict(rows[name]["ratio"], goal, at_most=True),
        }
        for name, (reference, goal) in goals.items()
    }
    results.summarise(summary)
    table(
        f"One step, {count / 1e6:.1f} M parameters, {args.threads} thread(s)",
        ("optimizer", "CPU ms", "clock ms", "state B/parameter", "of", "ratio", "goal", ""),
        [
            (name, row["cpu_ms"], row["wall_ms"], row.get("state_bytes_per_parameter"),
             row["reference"], row["ratio"], goals.get(name, (None, None))[1],
             summary.get(name, {}).get("verdict", ""))
            for name, row in rows.items()
        ],
    )  # fmt: skip


if __name__ == "__main__":
    main()
