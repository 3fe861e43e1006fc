"""Quality at equal parameters and equal tokens: bits per byte of Hope and what it is compared with.

Byte language models of about one million parameters, trained on English novels, split by book. The
learning rate of every system is the best of a grid on seed 0, judged on the validation books after
``--search-steps``, and the grid grows while its best is at its edge; then every system is trained
with every seed for ``--steps`` and judged on the test books. All see the same windows in the same
order.

    python benchmarks/quality.py --sizes                  # parameter counts only
    python benchmarks/quality.py --jobs 2                 # everything (resumes cell by cell)
    python benchmarks/quality.py --systems hope titans    # some systems
"""

from __future__ import annotations

import functools
import math
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from common import Results, arguments, out_path, table
from learn import batches, bits_per_byte, default_text, text, train
from models import VOCAB, hope, size

from nestlearn.evals.harness.parallel import in_parallel

# Every system is the same shell; only mixer and CMS differ.
SYSTEMS: dict[str, dict[str, Any]] = {
    "hope": {"mixer": "self_modifying", "cms": True},
    "hope_attention": {"mixer": "attention", "cms": True},
    "transformer": {"mixer": "attention", "cms": False},
    "gated_deltanet": {"mixer": "gated_deltanet", "cms": False},
    "titans": {"mixer": "titans", "cms": False},
    "ttt_mlp": {"mixer": "ttt_mlp", "cms": False},
}


def config(system: str, plan: dict[str, Any]) -> dict[str, Any]:
    """Sizes of a system: the width (in steps of 16) at which an MLP of four times the width comes
    nearest to the wanted number of parameters, then the MLP's width trimmed to match it closely."""
    return _config(system, plan["parameters"], plan["length"], tuple(plan["cms_periods"]))


@functools.cache
def _config(system: str, wanted: int, length: int, periods: tuple[int, ...]) -> dict[str, Any]:
    chosen = SYSTEMS[system]
    levels = list(periods) if chosen["cms"] else [1]
    step = 4 * len(levels)

    def count(dim: int, hidden: int) -> int:
        return _count(chosen["mixer"], dim, hidden, tuple(levels))

    widths = range(16, 512, 16)
    dim = min(widths, key=lambda d: abs(count(d, 4 * d // step * step) - wanted))
    hidden = 4 * dim // step * step
    per_unit = (count(dim, hidden + step) - count(dim, hidden)) / step
    hidden += round((wanted - count(dim, hidden)) / per_unit / step) * step
    return {
        "dim": dim,
        "layers": 4,
        "heads": 4,
        "length": length,
        "mixer": chosen["mixer"],
        "cms_periods": levels,
        "intermediate_size": max(step, hidden),
    }


@functools.cache
def _count(mixer: str, dim: int, hidden: int, levels: tuple[int, ...]) -> int:
    with torch.device("meta"):
        return size(
            hope(dim, 4, 4, mixer=mixer, intermediate_size=hidden, cms_periods=list(levels))
        )


def run_cell(
    system: str, seed: int, lr: float, steps: int, split: str, plan: dict[str, Any]
) -> dict[str, Any]:
    """Train one model and judge it on the books of ``split``."""
    torch.manual_seed(seed)
    model = hope(**config(system, plan))
    documents = text(plan["text"])
    data = batches(documents["train"], plan["batch"], plan["length"] - 1, seed)
    run = train(model, data, steps, lr)
    losses = run["loss"]
    width = max(1, steps // 100)
    curve = [[i + width, statistics.fmean(losses[i : i + width])] for i in range(0, steps, width)]
    return {
        "system": system,
        "seed": seed,
        "lr": lr,
        "steps": steps,
        "split": split,
        "parameters": size(model),
        "tokens": steps * plan["batch"] * plan["length"],
        "bits_per_byte": bits_per_byte(model, documents[split], plan["length"], plan["windows"]),
        "train_bits_last_tenth": statistics.fmean(losses[-max(1, steps // 10) :]) / math.log(2),
        "not_finite": sum(not math.isfinite(v) for v in (*losses, *run["norm"])),
        "max_norm": max(run["norm"]),
        "curve_nats": curve,
        "seconds": run["seconds"],
        "tokens_per_s_one_thread": steps * plan["batch"] * plan["length"] / run["seconds"],
    }


def best_lr(results: Results, system: str) -> float | None:
    """The learning rate with the fewest validation bits; None before the search is complete."""
    found = [
        r for r in results.rows(system=system, split="validation")
        if isinstance(r.get("bits_per_byte"), float)
    ]  # fmt: skip
    return min(found, key=lambda r: r["bits_per_byte"])["lr"] if found else None


def beyond(results: Results, system: str, limits: tuple = (2e-4, 0.1)) -> list[float]:
    """The next learning rate to try, a factor 2 beyond the edge of the grid that is best so far."""
    rates = sorted({r["lr"] for r in results.rows(system=system, split="validation") if "lr" in r})
    best = best_lr(results, system)
    if best is None or best not in (rates[0], rates[-1]):
        return []
    following = best / 2 if best == rates[0] else best * 2
    return [following] if limits[0] <= following <= limits[1] else []


def run_cells(results: Results, cells: dict[str, tuple], jobs: int) -> None:
    """Run what is missing."""
    missing = {name: cell for name, cell in cells.items() if not results.done(name)}

    def done(name: str, row: dict[str, Any]) -> None:
        results.add(name, {"system": cells[name][0], "split": cells[name][4], **row})
        print(f"  {name}: {row.get('error') or row['bits_per_byte']}", file=sys.stderr, flush=True)

    in_parallel(run_cell, missing, jobs, done)


def show(results: Results, systems: list[str], picture: Path) -> None:
    """Print the table, draw the curves and store the summary."""
    summary: dict[str, Any] = {}
    for system in systems:
        rows = [r for r in results.rows(system=system, split="test") if "bits_per_byte" in r]
        if not rows:
            continue
        bits = [r["bits_per_byte"] for r in rows]
        summary[system] = {
            "parameters": rows[0]["parameters"],
            "lr": rows[0]["lr"],
            "bits_per_byte_mean": statistics.fmean(bits),
            "bits_per_byte_sd": statistics.stdev(bits) if len(bits) > 1 else 0.0,
            "seeds": len(bits),
            "not_finite": sum(r["not_finite"] for r in rows),
        }
    order = sorted(summary, key=lambda s: summary[s]["bits_per_byte_mean"])
    table(
        "Bits per byte on the test books (lower is better)",
        ["system", "bits/byte", "sd", "seeds", "parameters", "lr"],
        [
            [s, f"{e['bits_per_byte_mean']:.4f}", f"{e['bits_per_byte_sd']:.4f}", e["seeds"],
             e["parameters"], e["lr"]]
            for s in order
            for e in [summary[s]]
        ],
    )  # fmt: skip
    results.summarise({"systems": summary, "order": order})
    if summary:
        draw(results, order, picture)


def draw(results: Results, systems: list[str], picture: Path) -> None:
    """Training curves, mean over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5))
    for system in systems:
        curves = [r["curve_nats"] for r in results.rows(system=system, split="test")]
        steps = [point[0] for point in curves[0]]
        mean = [
            statistics.fmean(c[i][1] for c in curves) / math.log(2) for i in range(len(curves[0]))
        ]
        axes.plot(steps, mean, label=system)
    axes.set_xlabel("training step")
    axes.set_ylabel("training bits per byte")
    axes.set_ylim(top=min(5.0, axes.get_ylim()[1]))
    axes.legend()
    figure.tight_layout()
    figure.savefig(picture, dpi=120)
    plt.close(figure)


def main() -> None:
    """Command line."""
    parser = arguments(__doc__, "quality", threads=1)
    parser.add_argument("--jobs", type=int, default=2, help="models at a time, one thread each")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--lrs", type=float, nargs="+", default=[2e-3, 4e-3, 8e-3])
    parser.add_argument("--steps", type=int, default=300, help="training steps of the final runs")
    parser.add_argument("--search-steps", type=int, default=250, help="steps of the lr search")
    parser.add_argument("--length", type=int, default=512, help="T")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--parameters", type=int, default=1_000_000)
    parser.add_argument("--cms-periods", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--windows", type=int, default=64, help="evaluated windows per book")
    parser.add_argument("--sizes", action="store_true", help="print the sizes and stop")
    args = parser.parse_args()
    plan: dict[str, Any] = {
        "lrs": args.lrs, "steps": args.steps, "search_steps": args.search_steps,
        "length": args.length, "batch": args.batch, "parameters": args.parameters,
        "cms_periods": args.cms_periods, "windows": args.windows, "text": default_text(),
    }  # fmt: skip
    if args.quick:
        plan |= {"lrs": [2e-3, 4e-3], "steps": 6, "search_steps": 3, "length": 64, "batch": 2,
                 "parameters": 60_000, "windows": 2}  # fmt: skip
        args.seeds = args.seeds[:2]
    sizes = []
    for system in args.systems:
        chosen = config(system, plan)
        levels = tuple(chosen["cms_periods"])
        count = _count(chosen["mixer"], chosen["dim"], chosen["intermediate_size"], levels)
        sizes.append([system, count, chosen["dim"], chosen["intermediate_size"], str(list(levels))])
        if abs(count - plan["parameters"]) > 0.02 * plan["parameters"]:
            raise SystemExit(f"{system}: {count:,} parameters, off by more than 2%")
    table("Sizes", ["system", "parameters", "width", "MLP width", "CMS periods"], sizes)
    if args.sizes:
        return
    results = Results(
        out_path(args),
        "Which system predicts novels best at equal parameters and tokens?",
        plan,
        seeds=args.seeds,
        threads=1,
        fresh=args.fresh,
    )
    print(f"text: {plan['text']}; vocabulary {VOCAB} bytes", file=sys.stderr)
    tried = {system: list(plan["lrs"]) for system in args.systems}
    while any(tried.values()):
        cells = {
            f"search/{s}/lr{lr:g}": (s, 0, lr, plan["search_steps"], "validation", plan)
            for s, lrs in tried.items()
            for lr in lrs
        }
        run_cells(results, cells, args.jobs)
        # A best rate at the edge of what was tried says nothing: try the next one beyond it.
        tried = {s: beyond(results, s) for s in args.systems}
    final = {}
    for system in args.systems:
        lr = best_lr(results, system)
        if lr is not None:
            for seed in args.seeds:
                final[f"final/{system}/lr{lr:g}/seed{seed}"] = (
                    system, seed, lr, plan["steps"], "test", plan,
                )  # fmt: skip
    run_cells(results, final, args.jobs)
    show(results, list(SYSTEMS), out_path(args).with_suffix(".png"))


if __name__ == "__main__":
    main()
