"""Never NaN: the self-modifying layer on hostile streams, and a long training run.

The table: objective x chunk x memory depth x type, each a stream of 65,536 tokens with carried
state. Batch rows of one stream are all combinations of input (random, constant, a repeated pattern,
alternating signs at scale 1e4), inner learning rate (0.05, 0.5 and 1 times its maximum, forced) and
retention (what the layer generates, or alpha = 1: nothing is ever forgotten).

    python benchmarks/stability.py --jobs 2     # the table (resumes where it was cut off)
    python benchmarks/stability.py --train      # 2,000 training steps, T 1,024
"""

from __future__ import annotations

import itertools
import math
import sys
import time
from typing import Any

import torch
from common import Results, arguments, median, out_path, table
from learn import batches, default_text, text, train
from models import VOCAB, size
from torch import Tensor

from nestlearn.evals.harness.parallel import in_parallel

INPUTS = ("random", "constant", "pattern", "scaled")
SHARES = (0.05, 0.5, 1.0)
RETENTIONS = ("generated", "one")
ROWS = list(itertools.product(INPUTS, SHARES, RETENTIONS))
SEGMENT = 1024


def force(layer: Any, share: float, retention: str) -> None:
    """Make the layer's gates give ``eta = share * eta_max`` (and alpha = 1) at every token."""
    readout, gates = layer.projections.readout, layer.gates
    with torch.no_grad():
        readout["eta"].zero_()
        gates.eta_bias.fill_(40.0 if share == 1.0 else math.log(share / (1 - share)))
        if retention == "one":
            readout["alpha"].zero_()
            gates.alpha_bias.fill_(40.0)  # its sigmoid is 1 in float32


def stream(dim: int, start: int, stop: int) -> Tensor:
    """Tokens ``start..stop`` of every row ``(rows, tokens, dim)``; a function of the position."""
    fixed = torch.Generator().manual_seed(1)
    constant = torch.randn(dim, generator=fixed)
    pattern = torch.randn(7, dim, generator=fixed)
    direction = torch.randn(dim, generator=fixed)
    fresh = torch.randn(stop - start, dim, generator=torch.Generator().manual_seed(start + 2))
    place = torch.arange(start, stop)
    sign = (1.0 - 2.0 * (place % 2))[:, None]
    made = {
        "random": fresh,
        "constant": constant.expand(stop - start, dim),
        "pattern": pattern[place % 7],
        "scaled": 1e4 * sign * (direction + 0.3 * fresh),
    }
    return torch.stack([made[name] for name, _, _ in ROWS])


def run_cell(
    objective: str, chunk: int, depth: int, dtype: str, tokens: int, dim: int, heads: int
) -> dict[str, Any]:
    """One stream; the largest absolute output and state, and whether all of it was finite."""
    from nestlearn.nn.self_modifying import SelfModifyingTitans

    layers = {}
    for share, retention in itertools.product(SHARES, RETENTIONS):
        torch.manual_seed(0)
        layer = SelfModifyingTitans(
            dim, heads, memory_depth=depth, memory_chunk=chunk, projection_chunk=chunk,
            objective=objective,
        ).to(getattr(torch, dtype))  # fmt: skip
        force(layer, share, retention)
        layers[share, retention] = (
            [n for n, r in enumerate(ROWS) if r[1:] == (share, retention)],
            layer,
        )
    output = torch.zeros(len(ROWS))
    weights = torch.zeros(len(ROWS))
    finite = torch.ones(len(ROWS), dtype=torch.bool)
    states: dict[Any, Any] = dict.fromkeys(layers)
    began = time.perf_counter()
    with torch.inference_mode():
        for start in range(0, tokens, SEGMENT):
            x = stream(dim, start, min(start + SEGMENT, tokens)).to(getattr(torch, dtype))
            for key, (rows, layer) in layers.items():
                y, state = layer(x[rows], states[key])
                states[key] = state
                finite[rows] &= y.isfinite().flatten(1).all(1)
                output[rows] = torch.maximum(output[rows], y.float().abs().flatten(1).amax(1))
                for w in (*state.memory.weights, *state.projections.weights):
                    finite[rows] &= w.isfinite().flatten(1).all(1)
                    weights[rows] = torch.maximum(weights[rows], w.abs().flatten(1).amax(1))
            if not finite.all():
                break
    listed = [
        {"input": i, "eta_share": s, "alpha": a, "max_output": float(output[n]),
         "max_state": float(weights[n]), "finite": bool(finite[n])}
        for n, (i, s, a) in enumerate(ROWS)
    ]  # fmt: skip
    return {
        "eta_max": layer.gates.eta_max,
        "tokens": start + x.shape[1],
        "finite": bool(finite.all()),
        "max_output": float(output.max()),
        "max_state": float(weights.max()),
        "seconds": time.perf_counter() - began,
        "streams": listed,
    }


def streams(args: Any) -> None:
    """The table."""
    tokens, dim, heads = (256, 16, 2) if args.quick else (65_536, 64, 2)
    results = Results(
        out_path(args),
        "Does the self-modifying layer stay finite and bounded on any stream?",
        {
            "tokens": tokens,
            "dim": dim,
            "heads": heads,
            "rows": ["/".join(map(str, r)) for r in ROWS],
        },
        threads=1,
        fresh=args.fresh,
    )
    cells = {}
    for chunk, objective, depth, dtype in itertools.product(
        (64, 16, 1), ("dot", "l2"), (2, 3, 4), ("float32", "bfloat16")
    ):
        name = f"{objective}/chunk{chunk}/depth{depth}/{dtype}"
        if not results.done(name):
            cells[name] = (objective, chunk, depth, dtype, tokens, dim, heads)
    print(f"{len(cells)} streams to run", file=sys.stderr)

    def done(name: str, row: dict[str, Any]) -> None:
        objective, chunk, depth, dtype = cells[name][:4]
        facts = {"objective": objective, "chunk": chunk, "depth": depth, "dtype": dtype}
        results.add(name, {**facts, **row})
        print(f"  {name}: {row.get('error') or row['max_state']}", file=sys.stderr, flush=True)

    in_parallel(run_cell, cells, args.jobs, done)
    rows = sorted(results.record["rows"], key=lambda r: r["cell"])
    table(
        f"{tokens:,} tokens, {len(ROWS)} streams per line",
        ["cell", "finite", "max |output|", "max |state|", "s"],
        [
            [r["cell"], r.get("finite"), r.get("max_output"), r.get("max_state"), r.get("seconds")]
            for r in rows
        ],
    )
    results.summarise(
        {
            "cells": len(rows),
            "streams": len(rows) * len(ROWS),
            "all_finite": all(r.get("finite", False) for r in rows),
            "max_state": max((r.get("max_state", math.inf) for r in rows), default=None),
        }
    )


def training(args: Any) -> None:
    """The long training run."""
    from nestlearn.models.hope import HopeConfig, HopeForCausalLM

    torch.set_num_threads(args.threads)
    steps, length, batch = (6, 64, 2) if args.quick else (args.steps, 1024, args.batch)
    torch.manual_seed(args.seed)
    preset = "tiny" if args.quick else "small"
    model = HopeForCausalLM(HopeConfig.preset(preset, vocab_size=VOCAB, mixer="self_modifying"))
    kind = "stdlib" if args.quick else default_text()
    args.name = "stability_train"
    results = Results(
        out_path(args),
        "Does training at T 1,024 stay free of NaN and of gradient-norm spikes?",
        {"preset": preset, "steps": steps, "T": length, "batch": batch, "lr": args.lr, "text": kind,
         "clip": 1.0, "parameters": size(model)},
        seeds=(args.seed,),
        threads=args.threads,
        fresh=args.fresh,
    )  # fmt: skip
    cell = f"self_modifying/seed{args.seed}"
    if not results.done(cell):

        def report(step: int, loss: float, norm: float) -> None:
            if step % 50 == 0:
                print(
                    f"  step {step}: {loss:.3f} nats, norm {norm:.3f}", file=sys.stderr, flush=True
                )

        data = batches(text(kind)["train"], batch, length - 1, args.seed)
        run = train(model, data, steps, args.lr, report=report)
        results.add(cell, {**run, **spikes(run["norm"])})
    row = results.get(cell)
    assert row is not None
    facts = {k: v for k, v in row.items() if k not in ("loss", "norm")}
    table("Training run", ["fact", "value"], facts.items())
    of_the_row = ("cell", "command", "machine", "commit", "date")
    results.summarise({k: v for k, v in facts.items() if k not in of_the_row})


def spikes(norms: list[float], skip: int = 100, window: int = 100) -> dict[str, Any]:
    """Gradient norms far above the median: of the whole run, and of the ``window`` steps before.
    The first ``skip`` steps (warm-up) are counted apart."""
    skip = min(skip, len(norms) // 2)
    finite = [n for n in norms if math.isfinite(n)]
    whole = median(finite[skip:])
    later = norms[skip:]
    running = [
        norms[i] > 10 * median(norms[max(0, i - window) : i])
        for i in range(max(skip, 1), len(norms))
    ]
    return {
        "not_finite": len(norms) - len(finite),
        "median_norm": whole,
        "max_norm": max(later, default=math.nan),
        "max_over_median": max(later, default=math.nan) / whole,
        "spikes_over_10x_median": sum(n > 10 * whole for n in later),
        "spikes_over_10x_running_median": sum(running),
        "first_steps_left_out": skip,
        "spikes_over_10x_median_in_first_steps": sum(n > 10 * whole for n in norms[:skip]),
    }


def main() -> None:
    """Command line."""
    parser = arguments(__doc__, "stability", threads=2)
    parser.add_argument("--train", action="store_true", help="the training run, not the table")
    parser.add_argument("--jobs", type=int, default=2, help="streams at a time, one thread each")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    training(args) if args.train else streams(args)


if __name__ == "__main__":
    main()
