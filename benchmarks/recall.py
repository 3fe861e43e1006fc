"""Recall and how a layer starts: how fast do models learn to give back what followed what?

Multi-query associative recall of 8 to 48 pairs, width 64, two layers, 800 steps: short, so that it
shows who leaves the plateau of guessing among all values seen. Hope's layer starts as a memory of
what followed what (`SelfModifyingTitans.reset_parameters`); "random start" undoes that, and the
start given to gated DeltaNet, whose convolution then has to be behind its maps, is the control.

    python benchmarks/recall.py --jobs 2
"""

from __future__ import annotations

import statistics
import sys
from typing import Any

import torch
import torch.nn.functional as F
from common import Results, arguments, out_path, table
from torch import Tensor, nn

from nestlearn.evals.harness.fitting import fit
from nestlearn.evals.harness.parallel import in_parallel
from nestlearn.evals.harness.systems import Size, build
from nestlearn.evals.harness.task import score
from nestlearn.evals.harness.trained import Plan, training
from nestlearn.evals.mqar import AssociativeRecall
from nestlearn.nn import NeuralMemory, SelfModifyingTitans
from nestlearn.nn.conv import CausalConv
from nestlearn.nn.neural_memory import NeuralMemoryState
from nestlearn.nn.self_modifying import look_back

SYSTEMS = {
    "gated_deltanet": ("gated_deltanet", "random"),
    "gated_deltanet, convolution behind the maps": ("gated_deltanet", "behind"),
    "gated_deltanet, Hope's start": ("gated_deltanet", "start"),
    "hope, random start": ("hope", "random"),
    "hope": ("hope", "start"),
}


class ConvolvedBehind(NeuralMemory):
    """A memory layer whose convolution comes behind the maps to q, k and v."""

    def begin(self, as_hope: bool) -> None:
        """Give it the convolution, and perhaps Hope's start."""
        self.conv = CausalConv(3 * self.dim, self.spec.conv_size)
        if as_hope:
            queries, keys = slice(self.dim), slice(self.dim, 2 * self.dim)
            maps = self.in_proj.weight
            with torch.no_grad():
                look_back(self.conv.weight[keys], maps[keys], maps[queries])

    def _forward(
        self, x: Tensor, state: NeuralMemoryState | None
    ) -> tuple[Tensor, NeuralMemoryState]:
        state = self.init_state(x.shape[0], x.device, x.dtype) if state is None else state
        mapped, gate, scalars = self.in_proj(x).tensor_split((3 * self.dim, 4 * self.dim), -1)
        mapped, history = self.conv(mapped, state.history)
        q, k, v = mapped.chunk(3, -1)
        out, memory = self._remember(q, k, v, scalars, state.memory)
        out = self.gain * F.rms_norm(out, (out.shape[-1],), eps=1e-6)
        out = out.transpose(1, 2).flatten(2)
        return self.out_proj(out * F.silu(gate)), NeuralMemoryState(history, memory)


def begin(model: nn.Module, how: str) -> None:
    """Change how the memory layers of a model start."""
    for layer in list(model.modules()):
        if isinstance(layer, NeuralMemory) and how != "random":
            layer.__class__ = ConvolvedBehind
            layer.begin(how == "start")  # type: ignore[operator]
        if isinstance(layer, SelfModifyingTitans) and how == "random":
            layer.conv.reset_parameters()
            with torch.no_grad():
                nn.init.normal_(layer.in_proj.weight, std=float(layer.in_proj.weight.std()))


def run_cell(system: str, seed: int, plan: dict[str, Any]) -> dict[str, Any]:
    """Train one model and test it."""
    torch.manual_seed(seed)
    name, how = SYSTEMS[system]
    task = AssociativeRecall(pairs=tuple(plan["pairs"]), vocab_size=plan["vocab_size"])
    size = Size(plan["width"], 2, plan["width"] // 32)
    model = build(name, size, task.vocab_size, task.length)
    begin(model, how)
    generator = torch.Generator().manual_seed(1 + seed)
    data = training(task, Plan(size, plan["steps"], plan["batch"], (plan["lr"],)), generator, "cpu")
    found = fit(model, data, plan["lr"], plan["steps"])
    right = {
        split: score(
            model, task.draw(split, plan["tested"], torch.Generator().manual_seed(7))
        ).tokens
        for split in task.splits
    }
    return {
        "system": system,
        "seed": seed,
        "right": right,
        "loss": found["loss"][:: max(1, plan["steps"] // 40)],
        "loss_at_the_end": statistics.fmean(found["loss"][-50:]),
        "seconds": found["seconds"],
    }


def main() -> None:
    """Measure what is missing, print and store."""
    parser = arguments(__doc__, "recall", threads=1)
    parser.add_argument("--systems", nargs="*", default=list(SYSTEMS), choices=list(SYSTEMS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="cells at a time, one thread each")
    args = parser.parse_args()
    plan = {
        "pairs": [8, 16, 32, 48], "vocab_size": 256, "width": 64, "batch": 16, "lr": 3e-3,
        "steps": 5 if args.quick else 800, "tested": 8 if args.quick else 100,
    }  # fmt: skip
    results = Results(
        out_path(args),
        question="How fast do models learn to give back what followed what, by their start?",
        settings=plan,
        seeds=list(range(args.seeds)),
        threads=1,
        fresh=args.fresh,
    )
    cells = {
        f"{system}/seed{seed}": (system, seed, plan)
        for seed in range(args.seeds)
        for system in args.systems
        if not results.done(f"{system}/seed{seed}")
    }

    def done(cell: str, row: dict[str, Any]) -> None:
        results.add(cell, row)
        print(f"  {cell}: {row.get('error') or row['right']}", file=sys.stderr, flush=True)

    in_parallel(run_cell, cells, args.jobs, done)
    rows, summary = [], {}
    for system in SYSTEMS:
        measured = [r for r in results.rows(system=system) if "error" not in r]
        if not measured:
            continue
        means = {n: statistics.fmean(r["right"][n] for r in measured) for n in measured[0]["right"]}
        loss = statistics.fmean(r["loss_at_the_end"] for r in measured)
        summary[system] = {"right": means, "loss_at_the_end": loss, "seeds": len(measured)}
        rows.append((system, loss, *means.values(), len(measured)))
    results.summarise(summary)
    heads = ("system", "loss", *(f"{n} pairs" for n in plan["pairs"]), "seeds")  # type: ignore[attr-defined]
    table("Values right (by chance 0.008), mean over seeds", heads, rows)


if __name__ == "__main__":
    main()
