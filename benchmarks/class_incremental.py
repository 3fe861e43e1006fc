"""Class-incremental classification with a language model: task after task of new classes (Fig. 6).

CLINC150 (10 tasks of 15 intents) or DBpedia (7 tasks of 2). A method reads the examples of one task
after the other, once; after each it is asked for the labels of all tasks so far, told nothing but
the labels seen. The model writes the label, constrained to them. Every method's settings are chosen
on a grid, on the first tasks of a stream of its own (tuning seed, other order, validation split).
A seed draws the examples of the subset, and decides which classes come together, in which order,
and the order of examples: the same for all methods.

    python benchmarks/class_incremental.py --model FOLDER               # subset for a CPU, resumes
    python benchmarks/class_incremental.py --model FOLDER --scale full  # everything, for a GPU
    python benchmarks/class_incremental.py --model FOLDER --data dbpedia14
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from common import Results, arguments, data_root, out_path, table

TUNING_SEED = 1000
SCALES: dict[str, dict[str, Any]] = {
    "quick": {"train": 2, "test": 1, "tasks": 2, "tuning_tasks": 2, "context": 256},
    "cpu": {"train": 5, "test": 4, "tasks": None, "tuning_tasks": 3, "context": 2048},
    "full": {"train": None, "test": None, "tasks": None, "tuning_tasks": 3, "context": None},
}
RATES = [{"lr": 5e-5}, {"lr": 1e-4}, {"lr": 2e-4}, {"lr": 4e-4}, {"lr": 8e-4}]
GRIDS: dict[str, list[dict[str, Any]]] = {
    "frozen": [{}],
    "icl": [{}],
    "inca": [
        *({"top": 1, "layer": layer} for layer in (6, 9, 12, 15, 18, -1)),
        *({"top": 1, "layer": layer, "shrinkage": 0.3} for layer in (9, 12, 15)),
        {"top": 3, "layer": 12},
    ],
    "nestlearn": [{}],
    "naive": RATES,
    "joint": RATES,
    "replay_5": RATES,
    "ewc": [
        *({"lr": 1e-4, "ewc": weight} for weight in (1e2, 1e4)),
        *({"lr": rate, "ewc": 1e3} for rate in (2e-4, 4e-4, 8e-4)),
    ],
    "lora": [{"lr": rate} for rate in (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)],
    "nestlearn_gradient": [{"lr": 5e-4}, {"lr": 1e-3}, {"lr": 2e-3}],
    "replay_1": RATES,
    "joint_4_passes": RATES,
}
TOGETHER = ("joint", "joint_4_passes")
"""Methods that see all tasks at once."""
ASKED = ("end", "own", "all")
"""What is asked: everything after the last task; also every task when it was learned; after every
task about all tasks so far."""
KNOWN_FROM = {"end": (), "own": ("forgetting_since_learned", "backward_transfer")}
"""The metrics that need less than a whole matrix, beside the average accuracy."""


def asking(method: str, tuning: bool, ask: str) -> str:
    """What a cell is asked: tuning, and methods that see all tasks at once, only at the end."""
    return "end" if tuning or method in TOGETHER else ask


def make(method: str, settings: dict[str, Any], model: Any, tokenizer: Any, plan: Any) -> Any:
    """The method as a `nestlearn.evals.classifiers.Classifier`."""
    import nestlearn as nl
    from nestlearn.adaptation.keys import generate_text
    from nestlearn.evals import classifiers as methods
    from nestlearn.evals.methods import FineTuning

    seed = plan["seed"]
    if method == "frozen":
        nl.adapt(model, method="readout", calibration=None)  # nothing is learned with it
        return methods.Writing(model, tokenizer)
    if method == "icl":
        limit = model.config.max_position_embeddings - 256
        context = min(limit, plan["context"] or limit)
        return methods.InContext(model, tokenizer, context=context, seed=seed)
    if method == "inca":
        return methods.InCA(model, tokenizer, **settings)
    if method == "nestlearn":
        nl.adapt(model, method="readout", seed=seed)
        return methods.Taught(nl.Learner(model, tokenizer, snapshots=0))
    if method == "nestlearn_gradient":
        nl.adapt(model, frozen=0.5, seed=seed)
        return methods.Taught(nl.Learner(model, tokenizer, lr=settings["lr"], snapshots=0))
    more: dict[str, Any] = {
        "lora": {"lora": 16},
        "replay_1": {"replay": 0.01},
        "replay_5": {"replay": 0.05},
        "joint_4_passes": {"repeats": 4},
    }.get(method, {})
    if method == "ewc":
        more = {"anchor": generate_text(model, rows=16, seed=seed)}
    return methods.Tuned(FineTuning(model, tokenizer, seed=seed, **settings, **more))


def run_cell(
    method: str, settings: dict[str, Any], seed: int, plan: dict[str, Any], tuning: bool
) -> dict[str, Any]:
    """One method on one stream."""
    from nestlearn.cli.pretrained import load_pretrained
    from nestlearn.evals.forgetting import METRICS
    from nestlearn.evals.streams import STREAMS

    torch.manual_seed(seed)
    options = {"tasks": plan["tuning_tasks"] if tuning else plan["tasks"]}
    stream = STREAMS[plan["data"]](
        data_root() / plan["data"], train=plan["train"], test=plan["test"], seed=seed,
        validation=tuning, **{k: v for k, v in options.items() if v},
    )  # fmt: skip
    model, tokenizer = load_pretrained(plan["model_path"])
    began = time.perf_counter()
    taught = make(method, settings, model, tokenizer, plan | {"seed": seed})
    setup, learning = time.perf_counter() - began, 0.0
    last = len(stream.tasks) - 1
    ask = asking(method, tuning, plan["ask"])
    matrix: list[list[Any]] = []  # None: not asked
    for i in range(last + 1):
        examples = stream.examples(i)
        if method in TOGETHER:
            if i < last:
                continue
            examples = [e for j in range(last + 1) for e in stream.examples(j)]
            random.Random(seed).shuffle(examples)
        start = time.perf_counter()
        taught.learn(examples)
        learning += time.perf_counter() - start
        if ask == "end" and i < last:
            continue
        labels, first = stream.seen(i), i if ask == "own" and i < last else 0
        asked = [
            (j, text, label) for j in range(first, i + 1) for text, label in stream.tasks[j].test
        ]
        given = taught.classify(
            [stream.prompt(text) for _, text, _ in asked], [stream.completion(c) for c in labels]
        )
        right = [labels[g] == label for g, (_, _, label) in zip(given, asked, strict=True)]
        matrix.append([None] * first + [
            statistics.fmean(r for r, (j, _, _) in zip(right, asked, strict=True) if j == k)
            for k in range(first, i + 1)
        ])  # fmt: skip
    row: dict[str, Any] = {
        "method": method, "settings": settings, "seed": seed, "tuning": tuning,
        "tuned": tuning or plan["tuned"], "asked": ask,
        "average_accuracy": statistics.fmean(matrix[-1]), "accuracy_matrix": matrix,
        "classes": len(stream.seen(last)), "asked_at_the_end": len(asked),
        "setup_seconds": setup, "learning_seconds": learning,
        "seconds": time.perf_counter() - began, "dtype": str(model.dtype),
    }  # fmt: skip
    if last > 0:
        row |= {name: METRICS[name](matrix) for name in KNOWN_FROM.get(ask, METRICS)}
    if method == "icl":
        row["examples_shown"] = taught.shown
    return row


def best(results: Results, method: str) -> dict[str, Any] | None:
    """The settings with the highest accuracy at the end of the tuning stream."""
    rows = [r for r in results.rows(method=method, tuning=True) if "error" not in r]
    return max(rows, key=lambda r: r["average_accuracy"])["settings"] if rows else None


def summarise(results: Results) -> dict[str, Any]:
    """Means over seeds, and spread."""
    from nestlearn.evals.forgetting import METRICS

    summary: dict[str, Any] = {}
    for method in GRIDS:
        rows = [r for r in results.rows(method=method, tuning=False) if "error" not in r]
        if not rows:
            continue
        summary[method] = {
            name: statistics.fmean(found)
            for name in METRICS
            if (found := [r[name] for r in rows if name in r])
        }
        spread = [r["average_accuracy"] for r in rows]
        summary[method] |= {
            "average_accuracy_sd": statistics.stdev(spread) if len(rows) > 1 else 0.0,
            "learning_seconds": statistics.fmean(r["learning_seconds"] for r in rows),
            "seeds": len(rows),
            "settings": rows[-1]["settings"],
        }
    return summary


def plot(results: Results, path: Path) -> None:
    """Average accuracy on the classes seen, after each task where that was asked; a square: at the
    end, of all seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5))
    for method in GRIDS:
        rows = [r for r in results.rows(method=method, tuning=False) if "error" not in r]
        if not rows:
            continue
        matrices = [r["accuracy_matrix"] for r in rows]
        whole = [m for m in matrices if len(m) > 1 and None not in m[-2]]
        end = statistics.fmean(statistics.fmean(m[-1]) for m in matrices)
        if method in TOGETHER:
            axes.axhline(end, linestyle="--", color="grey", linewidth=1)
            axes.annotate(method, (1, end), fontsize=8)
            continue
        curve = [
            statistics.fmean(statistics.fmean(m[i]) for m in whole)
            for i in range(len(whole[0]) if whole else 0)
        ]
        (line,) = axes.plot(range(1, len(curve) + 1), curve, marker="o")
        label, tasks = f"{method} ({len(rows)})", len(matrices[0][-1])
        axes.plot([tasks], [end], "s", color=line.get_color(), label=label)
    axes.set(xlabel="tasks learned", ylabel="average accuracy on the tasks seen", ylim=(0, 1))
    axes.set_xlim(left=0.7)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def report(results: Results, path: Path) -> None:
    """Tables, summary and plot."""
    summary = summarise(results)
    results.summarise(summary)
    table(
        "Tuning",
        ("method", "settings", "accuracy", "seconds"),
        [
            (r["method"], str(r["settings"]), r["average_accuracy"], r["seconds"])
            for r in results.rows(tuning=True)
            if "error" not in r
        ],
    )
    if summary:
        plot(results, path.with_suffix(".png"))
        columns = ("average_accuracy", "average_accuracy_sd", "average_incremental_accuracy",
                   "forgetting_from_best", "forgetting_since_learned", "backward_transfer",
                   "learning_seconds", "seeds")  # fmt: skip
        heads = ("accuracy", "sd", "incremental", "forg. best", "forg. learned", "back. tr.",
                 "learning s", "n")  # fmt: skip
        rows = [(m, *(s.get(c) for c in columns)) for m, s in summary.items()]
        table("After the last task (means over seeds)", ("method", *heads), rows)


def main() -> None:
    """Tune, run, print and store."""
    parser: argparse.ArgumentParser = arguments(__doc__, "class_incremental")
    parser.add_argument("--model", required=True, help="folder, .gguf file or hub id")
    parser.add_argument("--data", default="clinc150", choices=("clinc150", "dbpedia14"))
    parser.add_argument("--scale", default="cpu", choices=list(SCALES))
    parser.add_argument("--methods", nargs="*", default=list(GRIDS), choices=list(GRIDS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--skip-tuning", action="store_true",
        help="take the middle of the grid where nothing was tuned; a later run measures such cells "
        "again if tuning chooses something else",
    )  # fmt: skip
    parser.add_argument(
        "--ask", default="all", choices=ASKED,
        help="end: after the last task (no forgetting); own: also each task when it was learned "
        "(a third of the questions of CLINC150); all: after each task all so far (default)",
    )  # fmt: skip
    parser.add_argument("--report", action="store_true", help="only print what was measured")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    scale = "quick" if args.quick else args.scale
    args.name += f"_{args.data}" + ("_full" if scale == "full" else "")
    plan: dict[str, Any] = {"data": args.data, **SCALES[scale]}
    if scale == "cpu" and args.data == "dbpedia14":
        plan["test"] = 10  # a tenth of CLINC150's classes: with 4 questions each, noise decides
    path = out_path(args)
    results = Results(
        path,
        question="How well are classes told apart that come in tasks, and what is forgotten?",
        settings={**plan, "model": Path(args.model).name, "passes": 1, "tuning_seed": TUNING_SEED},
        seeds=list(range(args.seeds)),
        threads=args.threads,
        fresh=args.fresh,
    )
    plan |= {"model_path": args.model, "ask": args.ask}

    def run(cell: str, method: str, settings: dict[str, Any], seed: int, tuning: bool) -> None:
        known = results.get(cell) if results.done(cell) else None
        if known and known["settings"] == settings:
            wanted = ASKED.index(asking(method, tuning, args.ask))
            if ASKED.index(known.get("asked", "all")) >= wanted:
                return
        more = {"tuned": len(GRIDS[method]) == 1 or best(results, method) is not None}
        row = run_cell(method, settings, seed, plan | more, tuning)
        results.add(cell, row)
        print(
            f"  {cell}: accuracy {row['average_accuracy']:.3f}, {row['seconds']:.0f} s",
            file=sys.stderr, flush=True,
        )  # fmt: skip

    if not args.report:
        for method in args.methods:
            grid = GRIDS[method]
            tuned = len(grid) > 1 and not args.skip_tuning
            for i, settings in enumerate(grid if tuned else []):
                run(f"tune/{method}/{i}", method, settings, TUNING_SEED, True)
        for seed in range(args.seeds):
            for method in args.methods:
                grid = GRIDS[method]
                settings = best(results, method) or grid[len(grid) // 2]
                run(f"final/{method}/seed{seed}", method, settings, seed, False)
    report(results, path)


if __name__ == "__main__":
    main()
