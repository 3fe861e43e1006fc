"""Effect of levels: recall against forgetting with one to four levels, at an equal budget.

A pre-trained model reads passages once in a stream, as in `knowledge.py`. A level of period C
with Adam travels one learning rate every C tokens, so level l of L gets the rate
``lr * C_l / (64 L)``: every level travels as far per token as every other one, and all of them
together as far as a single level of period 64 would with ``lr``. What differs is only how the way
is shared out between fast and slow levels. Two learning rates show recall and forgetting as a
curve, not as a point. Added memories and the paper's placement (blocks shared out to levels by
depth) are measured alike; rates of placement are fine-tuning's.

    python benchmarks/levels.py --model FOLDER            # everything (resumes)
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from common import Results, arguments, out_path, table
from knowledge import run

PERIODS: tuple[tuple[int, ...], ...] = (
    (64,),
    (256,),
    (64, 512),
    (64, 4096),
    (64, 256, 1024),
    (64, 512, 4096),
    (64, 256, 1024, 4096),
)
BASE = 64  # the period that `lr` is meant for
RATES = {"added": (0.2, 0.1), "placement": (1e-4, 5e-5)}
COLUMNS = ("cloze_accuracy", "cloze_log_prob", "perplexity_unrelated", "forgotten_nats")


def setting(periods: tuple[int, ...], lr: float, method: str) -> dict[str, Any]:
    """What `knowledge.run_cell` needs: a learning-rate scale per level, see above."""
    scales = [p / (BASE * len(periods)) for p in periods]
    kind = {} if method == "added" else {"method": method}
    return {"lr": lr, "periods": list(periods), "scales": scales} | kind


def main() -> None:
    """Run, print and store."""
    parser = arguments(__doc__, "levels", threads=1)
    parser.add_argument("--model", required=True, help="folder, .gguf file or hub id")
    parser.add_argument("--passages", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=4, help="gradient steps per segment")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="*", choices=list(RATES), default=list(RATES))
    parser.add_argument("--rates", type=float, nargs="*", help="only these, of the grid")
    names = {"-".join(map(str, periods)): periods for periods in PERIODS}
    parser.add_argument("--periods", nargs="*", choices=list(names), default=list(names))
    parser.add_argument("--jobs", type=int, default=2, help="cells at a time, one thread each")
    args = parser.parse_args()
    passages, tokens = (4, 2048) if args.quick else (args.passages, 16_384)
    results = Results(
        out_path(args),
        question="Do several levels recall more, or forget less, than one at the same budget?",
        settings={"passages": passages, "repeats": args.repeats, "unrelated_tokens": tokens,
                  "model": Path(args.model).name},
        seeds=list(range(args.seeds)),
        threads=1,
        fresh=args.fresh,
    )  # fmt: skip
    plan = {"repeats": args.repeats, "unrelated_tokens": tokens, "model_path": args.model,
            "passages": passages, "questions": False}  # fmt: skip
    cells = {
        f"{name}/lr={lr:g}/seed{seed}": (
            "nestlearn", setting(names[name], lr, method), seed, False,
        )
        for method in args.methods
        for lr in RATES[method]
        if not args.rates or lr in args.rates
        for seed in range(args.seeds)
        for name in args.periods
    }  # fmt: skip
    run(results, cells, plan, args.jobs)
    summary: dict[str, Any] = {}
    for method, lr, periods in (
        (method, lr, p) for method, rates in RATES.items() for lr in rates for p in PERIODS
    ):
        name = f"{method}, {'-'.join(map(str, periods))}, lr {lr:g}"
        chosen = setting(periods, lr, method)
        rows = [r for r in results.rows(setting=chosen) if "error" not in r]
        if rows:
            summary[name] = {k: statistics.fmean(r[k] for r in rows) for k in COLUMNS}
            values = [r["cloze_log_prob"] for r in rows]
            summary[name]["log_prob_sd"] = statistics.stdev(values) if len(rows) > 1 else 0.0
            summary[name]["seeds"] = len(rows)
    results.summarise(summary)
    table(
        "Levels at an equal budget",
        ("periods", "cloze", "log-prob", "unrelated", "forgotten", "n"),
        [(n, *(s[k] for k in COLUMNS), s["seeds"]) for n, s in summary.items()],
    )


if __name__ == "__main__":
    main()
