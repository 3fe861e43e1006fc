"""Effect of levels: recall against forgetting with one to four levels, at an equal budget.

A pre-trained model reads passages once in a stream, as in `knowledge.py`. What an equal budget is
depends on how a slow level's step should grow with its period C, and both readings are measured:

- `travel`: level l of L gets the rate ``lr * C_l / (64 L)``. With Adam a level travels one rate
  every C tokens, so every level travels as far per token as every other one, and all of them
  together as far as a single level of period 64 would with ``lr``.
- `root`: ``lr * sqrt(C_l / 64) / L``, the usual rule for Adam when a batch grows: the mean of more
  tokens is less noisy, but its step is of normalised size all the same.

Added memories and the paper's placement (blocks shared out to levels by depth) are measured alike;
rates of placement are fine-tuning's.

    python benchmarks/levels.py --model FOLDER            # everything (resumes)
"""

from __future__ import annotations

import itertools
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
BUDGETS = {"travel": 1.0, "root": 0.5}  # how the rate grows with the period
RATES = {"added": (0.2, 0.1), "placement": (1e-4, 5e-5)}
COLUMNS = ("cloze_accuracy", "cloze_log_prob", "perplexity_unrelated", "forgotten_nats")


def named(periods: tuple[int, ...]) -> str:
    """Periods as one word."""
    return "-".join(map(str, periods))


def setting(periods: tuple[int, ...], lr: float, method: str, budget: str) -> dict[str, Any]:
    """What `knowledge.run_cell` needs: a learning-rate scale per level, see above."""
    scales = [(p / BASE) ** BUDGETS[budget] / len(periods) for p in periods]
    kind = {} if method == "added" else {"method": method}
    return {"lr": lr, "periods": list(periods), "scales": scales} | kind


def compared() -> list[tuple[str, str, float, tuple[int, ...]]]:
    """Budget, method, rate and periods of all that is compared: budgets agree at `BASE` alone."""
    rates = [(method, lr) for method, rates in RATES.items() for lr in rates]
    return [
        (budget, method, lr, periods)
        for budget, (method, lr), periods in itertools.product(BUDGETS, rates, PERIODS)
        if budget == "travel" or periods != (BASE,)
    ]


def main() -> None:
    """Run, print and store."""
    parser = arguments(__doc__, "levels", threads=1)
    parser.add_argument("--model", required=True, help="folder, .gguf file or hub id")
    parser.add_argument("--passages", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=4, help="gradient steps per segment")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="*", choices=list(RATES), default=list(RATES))
    parser.add_argument("--rates", type=float, nargs="*", help="only these, of the grid")
    parser.add_argument("--budgets", nargs="*", choices=list(BUDGETS), default=list(BUDGETS))
    sets = [named(periods) for periods in PERIODS]
    parser.add_argument("--periods", nargs="*", choices=sets, default=sets)
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
        f"{named(periods)}/lr={lr:g}/{'' if budget == 'travel' else f'{budget}/'}seed{seed}": (
            "nestlearn", setting(periods, lr, method, budget), seed, False,
        )
        for seed in range(args.seeds)
        for budget, method, lr, periods in compared()
        if budget in args.budgets
        and method in args.methods
        and (not args.rates or lr in args.rates)
        and named(periods) in args.periods
    }  # fmt: skip
    run(results, cells, plan, args.jobs)
    summary: dict[str, Any] = {}
    for budget, method, lr, periods in compared():
        rows = results.rows(setting=setting(periods, lr, method, budget))
        rows = [r for r in rows if "error" not in r]
        if rows:
            name = f"{method}, {budget}, {named(periods)}, lr {lr:g}"
            summary[name] = {k: statistics.fmean(r[k] for r in rows) for k in COLUMNS}
            values = [r["cloze_log_prob"] for r in rows]
            summary[name]["log_prob_sd"] = statistics.stdev(values) if len(rows) > 1 else 0.0
            summary[name]["at_the_end"] = statistics.fmean(
                r["forgetting_curve_nats"][-1][1] for r in rows
            )
            summary[name]["seeds"] = len(rows)
    results.summarise(summary)
    table(
        "Levels at an equal budget",
        ("periods", "cloze", "log-prob", "unrelated", "forgotten", "at the end", "n"),
        [(n, *(s[k] for k in (*COLUMNS, "at_the_end", "seeds"))) for n, s in summary.items()],
    )


if __name__ == "__main__":
    main()
