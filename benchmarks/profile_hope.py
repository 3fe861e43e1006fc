"""Where a training step's time goes, and how far it is from the arithmetic bound.

The bound: floating-point operations of the step, counted by torch's flop counter (matrix products,
forward and backward as they run) plus the triangular solves by formula, divided by the rate that a
large matrix product reaches on the same threads. Pointwise work and memory traffic are not in it.

    python benchmarks/profile_hope.py
    python benchmarks/profile_hope.py --mixer attention
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from common import Results, arguments, median, out_path, table
from models import VOCAB, hope, size
from serve import training_step
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

PARTS = {
    "views and dispatch": (
        "autograd::",
        "as_strided",
        "slice",
        "expand",
        "transpose",
        "reshape",
        "view",
        "squeeze",
        "select",
        "split",
        "narrow",
        "flatten",
        "matmul",
        "permute",
        "chunk",
        "unbind",
        "detach",
        "empty",
        "resolve",
    ),
    "matrix products": ("mm", "bmm", "addmm", "baddbmm", "linear", "mkl"),
    "triangular solves": ("triangular", "trsm"),
    "copies and layout": ("copy_", "cat", "clone", "contiguous", "stack", "fill_", "zero_", "pad"),
    "convolution": ("conv",),
    "reductions": ("sum", "mean", "norm", "cumsum", "softmax", "rms"),
    "attention": ("attention", "flash"),
    "optimizer": ("adam", "foreach", "lerp", "addcdiv", "addcmul"),
}


def matmul_rate(seconds: float = 1.0) -> float:
    """Floating-point operations per second of a 1,024 x 1,024 x 1,024 product."""
    a, b = torch.randn(2, 1024, 1024).unbind(0)
    out = torch.empty(1024, 1024)
    times: list[float] = []
    while sum(times) < seconds:
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        times.append(time.perf_counter() - start)
    return 2 * 1024**3 / median(times)


def solve_flops(events: Any) -> float:
    """n^2 per right-hand side for every triangular solve seen by the profiler."""
    total = 0.0
    for event in events:
        if event.key == "aten::linalg_solve_triangular":
            shapes = [s for s in event.input_shapes if len(s) >= 2]
            if len(shapes) >= 2:
                matrix, right = shapes[0], shapes[1]
                count = 1
                for n in right[:-2]:
                    count *= n
                total += event.count * count * matrix[-1] ** 2 * max(right[-2:])
    return total


def part_of(name: str) -> str:
    """The line of the summary table an operation belongs to."""
    plain = name.lower()
    if plain == "aten::t":
        return "views and dispatch"
    for part, words in PARTS.items():
        if any(word in plain for word in words):
            return part
    return "pointwise and the rest"


def main() -> None:
    """Command line."""
    parser = arguments(__doc__, "profile_hope")
    parser.add_argument("--mixer", default="self_modifying")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--top", type=int, default=20, help="operations shown")
    parser.add_argument("--trace", help="also write a Chrome trace to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    shape: dict[str, Any] = {"dim": 256, "layers": 4, "heads": 4}
    if args.quick:
        shape, args.length, args.batch = {"dim": 32, "layers": 2, "heads": 2}, 128, 1
    torch.manual_seed(0)
    results = Results(
        out_path(args),
        "Where does a training step's time go, and how far is it from the arithmetic bound?",
        {"quick": args.quick, "batch": args.batch, "length": args.length, **shape},
        threads=args.threads,
        fresh=args.fresh,
    )
    row = measure(args, shape)
    results.add(args.mixer, row)
    show(args.mixer, row)
    results.summarise({r["cell"]: {k: r[k] for k in SUMMARY} for r in results.record["rows"]})


SUMMARY = ("step_s", "gflop", "matmul_gflop_per_s", "bound_s", "share_of_bound", "parts")


def measure(args: argparse.Namespace, shape: dict[str, Any]) -> dict[str, Any]:
    """Time, count and profile one training step."""
    model: Any = hope(length=args.length, mixer=args.mixer, **shape).train()
    data = torch.randint(VOCAB, (args.batch, args.length))
    step = training_step(model, lambda: model(input_ids=data, labels=data).loss)
    step()
    times = []
    for _ in range(3):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    with FlopCounterMode(display=False) as counter:
        step()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        step()
    if args.trace:
        profiler.export_chrome_trace(args.trace)
    solves = solve_flops(profiler.key_averages(group_by_input_shape=True))
    flops = counter.get_total_flops() + solves
    rate = matmul_rate(0.1 if args.quick else 1.0)
    events = [e for e in profiler.key_averages() if e.self_cpu_time_total > 0]
    events.sort(key=lambda e: e.self_cpu_time_total, reverse=True)
    total = sum(e.self_cpu_time_total for e in events)
    parts: dict[str, float] = {}
    for event in events:
        part = part_of(event.key)
        parts[part] = parts.get(part, 0.0) + event.self_cpu_time_total / total
    tokens = args.batch * args.length
    return {
        "parameters": size(model),
        "step_s": median(times),
        "tokens_per_s": tokens / median(times),
        "gflop": flops / 1e9,
        "gflop_in_solves": solves / 1e9,
        "gflop_if_6_parameters_per_token": 6 * size(model) * tokens / 1e9,
        "matmul_gflop_per_s": rate / 1e9,
        "bound_s": flops / rate,
        "share_of_bound": flops / rate / median(times),
        "parts": dict(sorted(parts.items(), key=lambda item: -item[1])),
        "operators_called": sum(e.count for e in events),
        "operations": [
            {"name": e.key, "calls": e.count, "self_ms": e.self_cpu_time_total / 1e3,
             "share": e.self_cpu_time_total / total}
            for e in events[: args.top]
        ],
    }  # fmt: skip


def show(mixer: str, row: dict[str, Any]) -> None:
    """Print what was measured."""
    table(
        f"{mixer}: one training step",
        ["operation", "calls", "self ms", "share"],
        [[o["name"], o["calls"], o["self_ms"], f"{o['share']:.1%}"] for o in row["operations"]],
    )
    table("By kind", ["kind", "share"], [[k, f"{v:.1%}"] for k, v in row["parts"].items()])
    print(
        f"step {row['step_s']:.3f} s; arithmetic {row['gflop']:.1f} GFLOP, at "
        f"{row['matmul_gflop_per_s']:.0f} GFLOP/s {row['bound_s']:.3f} s: the step reaches "
        f"{row['share_of_bound']:.0%} of the bound"
    )


if __name__ == "__main__":
    main()
