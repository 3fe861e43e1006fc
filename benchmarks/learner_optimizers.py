"""Which optimizer of a level forgets least at equal recall, in a model that keeps learning?

SmolLM2 with three added levels reads passages (SQuAD) once, one after the other, with the levels'
optimizers exchanged. Every optimizer has a grid of rates; per rate: recall (mean log-probability of
cloze answers), damage (perplexity of WikiText-2), forgetting (by how many nats per token the
surprise about the first passages rose from right after they were read to the end), and that
surprise itself: an optimizer that had hardly learned the first passages when they had been read has
nothing to forget. As more learning costs more, optimizers are compared at one recall, between the
rates of their grid (`at_recall`), each on the seeds that it was run with.

DGD is not among them: it needs the layers that own the weights, and what a level learns is a change
beside them.

    python benchmarks/learner_optimizers.py --model FOLDER      # resumes cell by cell
"""

from __future__ import annotations

import functools
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from common import Results, arguments, data_root, out_path, table
from knowledge import SLOTS, unrelated
from torch import Tensor

from nestlearn.evals.harness.parallel import in_parallel

FIRST = 4  # passages that forgetting is measured on
PERIODS = (64, 512, 4096)
RATES = (0.1, 0.2, 0.4)
SGD_RATES = (100.0, 200.0, 400.0)  # a value's gradient is far below 1
LEARNERS_OWN = "RowAdam", 0.2  # whose recall is the one to compare at
AT = ("perplexity", "forgetting", "surprise_end")


def choices() -> dict[str, tuple[Any, tuple[float, ...]]]:
    """Name -> (what `nl.Learner` takes as ``optimizer``, rates)."""
    from nestlearn.optim import M3, DeltaMomentum, RowAdam

    def matrix(**setting: Any) -> Callable[..., torch.optim.Optimizer]:
        return functools.partial(M3, weight_decay=0.0, **setting)

    delta = functools.partial(DeltaMomentum, momentum=0.9, normalize=True)
    fast = f"every {PERIODS[0]}"
    return {
        "RowAdam": ("rowadam", RATES),  # the learner's own
        "AdamW": ("adamw", (0.025, 0.05, 0.1)),
        "SGD momentum": ("sgd", SGD_RATES),
        "DeltaMomentum": (delta, SGD_RATES),
        "M3": (matrix(), RATES),
        "Muon (M3 without slow and second moment)": (
            matrix(alpha=0.0, second_moment=False),
            RATES,
        ),
        "RowAdam fast, M3 slow": ({fast: RowAdam, "*": matrix()}, RATES),
        "M3 fast, RowAdam slow": ({fast: matrix(), "*": RowAdam}, RATES),
    }


def surprise(model: Any, tokenizer: Any, texts: Sequence[str]) -> float:
    """Mean nats per token of texts, each read alone."""
    total = count = 0.0
    for each in texts:
        ids = [tokenizer.bos_token_id, *tokenizer(each).input_ids]
        row: Tensor = torch.tensor([ids])
        with torch.no_grad():
            loss = model(input_ids=row, labels=row, use_cache=False).loss.item()
        total, count = total + loss * (len(ids) - 1), count + len(ids) - 1
    return total / count


def run_cell(name: str, lr: float, seed: int, plan: dict[str, Any]) -> dict[str, Any]:
    """Read the passages with one optimizer and one rate, then ask."""
    import nestlearn as nl
    from nestlearn.cli.pretrained import load_pretrained
    from nestlearn.evals import knowledge as task

    torch.manual_seed(seed)
    model, tokenizer = load_pretrained(plan["model_path"])
    data = data_root() / "squad_knowledge" / "squad_val.json.gz"
    passages = task.load_passages(data, plan["passages"], seed)
    nl.adapt(model, [nl.Level(period=p) for p in PERIODS], slots=SLOTS, seed=seed)
    learner = nl.Learner(
        model, tokenizer, lr=lr, repeats=plan["repeats"], optimizer=choices()[name][0], snapshots=0
    )
    first = [p.document for p in passages[:FIRST]]
    before = surprise(model, tokenizer, first)
    start = time.process_time()
    after = before
    for i, passage in enumerate(passages, 1):
        learner.learn(passage.document)
        if i == FIRST:
            after = surprise(model, tokenizer, first)
    learning = time.process_time() - start
    end = surprise(model, tokenizer, first)
    recall = task.cloze_scores(model, tokenizer, [item for p in passages for item in p.cloze])
    other = unrelated(tokenizer, plan["unrelated_tokens"])
    return {
        "optimizer": name, "lr": lr, "seed": seed, "recall": recall["log_prob"],
        "accuracy": recall["accuracy"],
        "perplexity": task.perplexity(model, other), "surprise_before": before,
        "surprise_read": after, "surprise_end": end, "forgetting": end - after,
        "learning_cpu_seconds": learning,
    }  # fmt: skip


def at_recall(rows: Sequence[dict[str, Any]], recall: float, key: str) -> float | None:
    """``key`` of ``rows`` where recall is the one given: on the straight line between the two
    rates that enclose it, the smaller one where several pairs do; None where none does. Rates
    above that of the best recall do not count: they cost more and recall less.

    Example:
        >>> at_recall([{"recall": -3.0, "x": 1.0}, {"recall": -2.0, "x": 3.0}], -2.5, "x")
        2.0
    """
    ordered = sorted(rows, key=lambda row: row["lr"] if "lr" in row else row["recall"])
    best = max(range(len(ordered)), key=lambda i: ordered[i]["recall"], default=-1)
    ordered = ordered[: best + 1]
    found = []
    for a, b in zip(ordered, ordered[1:], strict=False):
        low, high = sorted((a["recall"], b["recall"]))
        if low <= recall <= high and high > low:
            share = (recall - a["recall"]) / (b["recall"] - a["recall"])
            found.append(a[key] + share * (b[key] - a[key]))
    return min(found, default=None)


def means(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per rate: the mean over seeds.

    Example:
        >>> means([{"lr": 0.1, "x": 1.0}, {"lr": 0.1, "x": 3.0}])
        [{'lr': 0.1, 'x': 2.0}]
    """
    found = []
    for lr in sorted({row["lr"] for row in rows}):
        own = [row for row in rows if row["lr"] == lr]
        keys = [k for k, v in own[0].items() if isinstance(v, float) and k != "lr"]
        found.append({"lr": lr} | {k: statistics.fmean(row[k] for row in own) for k in keys})
    return found


def compared(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Per optimizer: what it has at the recall of `LEARNERS_OWN` on the same seeds."""
    name, rate = LEARNERS_OWN
    recall = {r["seed"]: r["recall"] for r in rows if r["optimizer"] == name and r["lr"] == rate}
    found: dict[str, Any] = {}
    for each in dict.fromkeys(row["optimizer"] for row in rows):
        own = [r for r in rows if r["optimizer"] == each]
        seeds = {r["seed"] for r in own}
        if seeds <= recall.keys():
            level = statistics.fmean(recall[seed] for seed in sorted(seeds))
            found[each] = {key: at_recall(means(own), level, key) for key in AT} | {
                "recall": level,
                "best_recall": max(r["recall"] for r in means(own)),
                "seeds": len(seeds),
            }
    return found


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Damage and forgetting over recall."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.4))
    most = max(len({r["seed"] for r in rows if r["optimizer"] == n["optimizer"]}) for n in rows)
    for name in dict.fromkeys(row["optimizer"] for row in rows):
        own = means([r for r in rows if r["optimizer"] == name])
        if len({r["seed"] for r in rows if r["optimizer"] == name}) < most:
            continue  # means over other seeds are not comparable
        for axis, key in ((left, "perplexity"), (right, "surprise_end")):
            axis.plot([r["recall"] for r in own], [r[key] for r in own], "o-", ms=3, label=name)
    left.set(xlabel="recall: log-probability of cloze answers", ylabel="perplexity of WikiText-2")
    right.set(xlabel="recall: log-probability of cloze answers")
    right.set_ylabel("surprise about the first passages at the end (nats)")
    left.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Run, print and store."""
    parser = arguments(__doc__, "learner_optimizers", threads=1)
    parser.add_argument("--model", required=True, help="folder, .gguf file or hub id")
    parser.add_argument("--optimizers", nargs="*", choices=list(choices()), default=list(choices()))
    parser.add_argument("--passages", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=4, help="gradient steps per segment")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="cells at a time, one thread each")
    args = parser.parse_args()
    passages, tokens = (5, 1024) if args.quick else (args.passages, 8192)
    results = Results(
        out_path(args),
        question="Which optimizer of a level forgets least at equal recall?",
        settings={"passages": passages, "repeats": args.repeats, "unrelated_tokens": tokens,
                  "first": FIRST, "periods": PERIODS, "model": Path(args.model).name},
        seeds=list(range(args.seeds)),
        threads=1,
        fresh=args.fresh,
    )  # fmt: skip
    plan = {"passages": passages, "repeats": args.repeats, "unrelated_tokens": tokens,
            "model_path": args.model}  # fmt: skip

    def done(cell: str, row: dict[str, Any]) -> None:
        results.add(cell, row)
        said = row.get("error") or " ".join(
            f"{key} {row[key]:.3f}" for key in ("recall", "perplexity", "forgetting")
        )
        print(f"  {cell}: {said}", file=sys.stderr, flush=True)

    cells = {
        f"{name}/{lr:g}/seed{seed}": (name, lr, seed, plan)
        for seed in range(args.seeds)
        for name in args.optimizers
        for lr in choices()[name][1]
    }
    missing = {cell: given for cell, given in cells.items() if not results.done(cell)}
    in_parallel(run_cell, missing, args.jobs, done)
    rows = results.record["rows"]
    usable = [r for r in rows if isinstance(r.get("recall"), float)]
    summary = compared(usable)
    results.summarise(summary)
    table(
        "Every rate",
        ("optimizer", "rate", "seed", "recall", "accuracy", "unrelated", "forgotten", "CPU s"),
        [
            (r["optimizer"], r["lr"], r["seed"], r["recall"], r["accuracy"], r["perplexity"],
             r["forgetting"], r["learning_cpu_seconds"])
            for r in usable
        ],
    )  # fmt: skip
    table(
        f"Where recall is that of {LEARNERS_OWN[0]} at {LEARNERS_OWN[1]:g}, means over seeds",
        ("optimizer", "recall", "unrelated", "forgotten", "surprise at the end", "best recall",
         "seeds"),
        [(n, s["recall"], *(s[k] for k in AT), s["best_recall"], s["seeds"])
         for n, s in summary.items()],
    )  # fmt: skip
    if len(usable) > 1 and not args.quick:
        plot(usable, out_path(args).with_suffix(".png"))


if __name__ == "__main__":
    main()
