"""Knowledge incorporation: passages read once in a stream; recall, forgetting and damage.

A pre-trained model reads passages (SQuAD), one after the other. Afterwards it is asked with the
book closed; its perplexity on unrelated text (WikiText-2 validation) and, along the stream, on the
first passages says what it lost. Learning rates are chosen on passages of their own (the tuning
seed): the best recall (log-probability of cloze answers) on the grid, for every method alike; the
rows keep all rates, so that recall against damage can be read off too.

    python benchmarks/knowledge.py --model FOLDER                       # everything (resumes)
    python benchmarks/knowledge.py --model FOLDER --methods nestlearn naive --passages 20
"""

from __future__ import annotations

import gzip
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from common import Results, arguments, data_root, out_path, table
from torch import Tensor

TUNING_SEED = 1000
TUNING_PASSAGES = 20
GRIDS: dict[str, tuple[float, ...]] = {
    "naive": (5e-5, 1e-4, 2e-4),
    "lora": (5e-4, 1e-3, 2e-3),
    "ewc": (5e-5, 1e-4, 2e-4),
    "replay": (5e-5, 1e-4, 2e-4),
    "nestlearn": (5e-4, 1e-3, 2e-3),
    "nestlearn_1_level": (5e-4, 1e-3, 2e-3),
    "nestlearn_plain": (5e-4, 1e-3, 2e-3),
    "placement": (5e-5, 1e-4, 2e-4),
    "frozen": (0.0,),
    "in_context": (0.0,),
}
CURVE = 10  # points of the forgetting curve


def unrelated(tokenizer: Any, tokens: int) -> Tensor:
    """WikiText-2 validation."""
    path = data_root() / "wikitext2" / "valid.txt.gz"
    with gzip.open(path, "rt", encoding="utf-8") as file:
        text = file.read(tokens * 6)
    for mark, plain in ((" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", ".")):
        text = text.replace(mark, plain)
    return torch.tensor(tokenizer(text, add_special_tokens=False).input_ids[:tokens])


def teacher(method: str, model: Any, tokenizer: Any, lr: float, repeats: int, seed: int) -> Any:
    """(model to ask, function that reads a document)."""
    import nestlearn as nl
    from nestlearn.adaptation.keys import generate_text
    from nestlearn.evals.methods import FineTuning

    if method in ("frozen", "in_context"):
        return model, lambda text: None
    if method.startswith("nestlearn") or method == "placement":
        periods = (64,) if method == "nestlearn_1_level" else (64, 512, 4096)
        kind = "placement" if method == "placement" else "added"
        levels = [nl.Level(period=p) for p in periods]
        nl.adapt(model, levels, frozen=0.5, method=kind, seed=seed)
        learner = nl.Learner(
            model, tokenizer, lr=lr, repeats=repeats, precondition=method != "nestlearn_plain",
            snapshots=0,
        )  # fmt: skip
        return model, learner.learn
    settings: dict[str, Any] = {"lora": {"lora": 16}, "replay": {"replay": 0.5}}.get(method, {})
    if method == "ewc":
        settings = {"ewc": 1e3, "anchor": generate_text(model, seed=seed)}
    taught = FineTuning(model, tokenizer, lr=lr, repeats=repeats, seed=seed, **settings)
    return taught.model, taught.learn


def run_cell(method: str, lr: float, seed: int, plan: dict[str, Any], tuning: bool) -> dict:
    """Read the passages with one method, then ask."""
    from nestlearn.cli.pretrained import load_pretrained
    from nestlearn.evals import knowledge as task

    torch.manual_seed(seed)
    model, tokenizer = load_pretrained(plan["model_path"])
    data = data_root() / "squad_knowledge" / "squad_val.json.gz"
    passages = task.load_passages(data, plan["passages"], seed)
    other = unrelated(tokenizer, plan["unrelated_tokens"])
    asked, learn = teacher(method, model, tokenizer, lr, plan["repeats"], seed)

    def surprise(chosen: list[Any]) -> float:
        """Mean nats per token of passages, each read alone."""
        total = count = 0.0
        for passage in chosen:
            row = torch.tensor([[tokenizer.bos_token_id,
                                 *tokenizer(passage.document).input_ids]])  # fmt: skip
            with torch.no_grad():
                loss = asked(input_ids=row, labels=row, use_cache=False).loss.item()
            total, count = total + loss * (row.shape[1] - 1), count + row.shape[1] - 1
        return total / count

    first = passages[: max(1, len(passages) // CURVE)]
    curve = [[0, surprise(first)]]
    began, learning = time.perf_counter(), 0.0
    for i, passage in enumerate(passages, 1):
        start = time.perf_counter()
        learn(passage.document)
        learning += time.perf_counter() - start
        if i % len(first) == 0 and not tuning:
            curve.append([i, surprise(first)])
    row: dict[str, Any] = {"method": method, "lr": lr, "seed": seed, "tuning": tuning}
    cloze = [(p, item) for p in passages for item in p.cloze]
    questions = [(p, item) for p in passages for item in p.questions]
    if method == "in_context":
        cloze = [(p, (f"{p.document}\n\n{q}", a)) for p, (q, a) in cloze]
        questions = [(p, (f"{p.document}\n\n{q}", a)) for p, (q, a) in questions]
    found = task.cloze_scores(asked, tokenizer, [item for _, item in cloze])
    row |= {f"cloze_{k}": v for k, v in found.items()}
    if not tuning:
        found = task.question_scores(asked, tokenizer, [item for _, item in questions])
        row |= {f"questions_{k}": v for k, v in found.items()}
    row |= {
        "perplexity_unrelated": task.perplexity(asked, other),
        "forgetting_curve_nats": curve,
        "cloze_items": len(cloze),
        "questions": len(questions),
        "learning_seconds": learning,
        "seconds": time.perf_counter() - began,
    }
    return row


def best_rate(results: Results, method: str) -> float | None:
    """The rate with the best recall on the tuning passages."""
    rows = [r for r in results.rows(method=method, tuning=True) if "cloze_log_prob" in r]
    usable = [r for r in rows if isinstance(r["cloze_log_prob"], float)]
    return max(usable, key=lambda r: r["cloze_log_prob"])["lr"] if usable else None


def summarise(results: Results, methods: list[str]) -> dict[str, Any]:
    """Means over seeds."""
    summary: dict[str, Any] = {}
    keys = ("cloze_accuracy", "cloze_log_prob", "questions_accuracy", "questions_log_prob",
            "perplexity_unrelated")  # fmt: skip
    for method in methods:
        rows = [r for r in results.rows(method=method, tuning=False) if "error" not in r]
        if rows:
            summary[method] = {k: statistics.fmean(r[k] for r in rows) for k in keys}
            spread = [r["cloze_accuracy"] for r in rows]
            summary[method]["cloze_accuracy_sd"] = statistics.stdev(spread) if len(rows) > 1 else 0
            summary[method] |= {"seeds": len(rows), "lr": rows[0]["lr"]}
    return summary


def plot(results: Results, methods: list[str], path: Path) -> None:
    """Recall against damage, and forgetting curves."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    for method in methods:
        rows = [r for r in results.rows(method=method, tuning=False) if "error" not in r]
        if not rows or method == "in_context":
            continue
        damage = [r["perplexity_unrelated"] for r in rows]
        left.scatter(damage, [r["cloze_accuracy"] for r in rows], label=method)
        curves = [r["forgetting_curve_nats"] for r in rows]
        means = [statistics.fmean(c[i][1] for c in curves) for i in range(len(curves[0]))]
        right.plot([p for p, _ in curves[0]], means, label=method)
    left.set(xlabel="perplexity of unrelated text", ylabel="cloze accuracy")
    right.set(xlabel="passages read", ylabel="nats per token of the first tenth")
    left.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Tune, run, print and store."""
    parser = arguments(__doc__, "knowledge")
    parser.add_argument("--model", required=True, help="folder, .gguf file or hub id")
    parser.add_argument("--methods", nargs="*", default=list(GRIDS))
    parser.add_argument("--passages", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=4, help="gradient steps per document")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tune-only", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    passages = 4 if args.quick else args.passages
    tokens = 2048 if args.quick else 16_384
    results = Results(
        out_path(args),
        question="How much of passages read once is recalled, and what does it cost elsewhere?",
        settings={"passages": passages, "repeats": args.repeats, "unrelated_tokens": tokens,
                  "model": Path(args.model).name, "tuning_passages": TUNING_PASSAGES},
        seeds=list(range(args.seeds)),
        threads=args.threads,
        fresh=args.fresh,
    )  # fmt: skip
    plan = {"repeats": args.repeats, "unrelated_tokens": tokens, "model_path": args.model}

    def run(cell: str, method: str, lr: float, seed: int, tuning: bool) -> None:
        if results.done(cell):
            return
        count = min(passages, TUNING_PASSAGES) if tuning else passages
        row = run_cell(method, lr, seed, plan | {"passages": count}, tuning)
        results.add(cell, row)
        print(
            f"  {cell}: cloze {row['cloze_accuracy']:.3f} ({row['cloze_log_prob']:.3f}), unrelated "
            f"{row['perplexity_unrelated']:.3f}, {row['seconds']:.0f} s",
            file=sys.stderr, flush=True,
        )  # fmt: skip

    for method in args.methods:
        grid = GRIDS[method]
        for lr in grid:
            run(f"tune/{method}/{lr:g}", method, lr, TUNING_SEED, True)
    if not args.tune_only:
        for seed in range(args.seeds):
            for method in args.methods:
                lr = best_rate(results, method)
                assert lr is not None
                run(f"final/{method}/seed{seed}", method, lr, seed, False)
    summary = summarise(results, list(GRIDS))
    results.summarise(summary)
    if summary:
        plot(results, list(summary), out_path(args).with_suffix(".png"))
        columns = ("method", "cloze", "log-prob", "questions", "log-prob", "unrelated", "lr", "n")
        rows = [
            (m, s["cloze_accuracy"], s["cloze_log_prob"], s["questions_accuracy"],
             s["questions_log_prob"], s["perplexity_unrelated"], s["lr"], s["seeds"])
            for m, s in summary.items()
        ]  # fmt: skip
        table("Closed-book recall and damage", columns, rows)
    tuned = [r for r in results.rows(tuning=True) if math.isfinite(r.get("lr", math.nan))]
    table(
        "Tuning passages",
        ("method", "lr", "cloze", "log-prob", "unrelated"),
        [
            (r["method"], r["lr"], r["cloze_accuracy"], r["cloze_log_prob"],
             r["perplexity_unrelated"])
            for r in tuned
        ],
    )  # fmt: skip


if __name__ == "__main__":
    main()
