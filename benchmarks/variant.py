"""One system of a table with other fields or another plan: what would it have with them?

Trains a variant of a system as the table trains its systems, and scores it on the validation split
(or on the test splits that are named). The tables choose settings with seed 1000 and report seeds
0, 1, 2, so choose with other seeds than those. Rows are collected in one file.

    python benchmarks/variant.py fig9 hope_sparse --seed 12 --set write_cost=2e-4 --splits 65536
    python benchmarks/variant.py table5 hope_counters --task parity --set counters=4 --seed 11
    python benchmarks/variant.py fig9 gated_deltanet --set conv_size=4 --splits 4096 65536
    python benchmarks/variant.py fig9 hope_sparse --plan distractors=0 steps=3200 --splits 65536
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from common import Results, arguments, out_path

from nestlearn.evals.harness.experiment import Scale
from nestlearn.evals.harness.task import VALIDATION
from nestlearn.evals.harness.trained import TUNING_SEED, Trained, named
from nestlearn.evals.registry import experiment

NAME = "variant"


def assignment(text: str) -> tuple[str, Any]:
    """``FIELD=VALUE`` of `HopeConfig` or of a plan; a value that is no Python literal is a word.

    Example:
        >>> assignment("memory_half_lives=10,1e25"), assignment("memory_rule=gd")
        (('memory_half_lives', (10, 1e+25)), ('memory_rule', 'gd'))
    """
    name, sign, value = text.partition("=")
    if not (name.isidentifier() and sign and value):
        raise argparse.ArgumentTypeError(f"expected FIELD=VALUE, got {text!r}")
    try:
        return name, ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return name, value


def only(made: Trained, splits: Sequence[str]) -> None:
    """Let an experiment score these splits alone; the others are left empty."""
    scores = made.scores

    def chosen(model: Any, task: Any, plan: Any, split: str, seed: int) -> dict[str, Any]:
        return scores(model, task, plan, split, seed) if split in splits else {}

    made.scores = chosen  # type: ignore[method-assign]


def planned(made: Trained, scale: Scale, changes: dict[str, Any]) -> Trained:
    """The experiment with other fields of its plan.

    Raises:
        ValueError: its plan has no such field.
    """
    known = [field.name for field in dataclasses.fields(made.plan)]
    if unknown := [name for name in changes if name not in known]:
        raise ValueError(f"the plan has no {', '.join(unknown)}: {', '.join(known)}")
    plans = {scale: dataclasses.replace(made.plan, **changes)}
    # Tasks are made of the plan when an experiment is, so this one is made anew.
    return type(type(made).__name__, (type(made),), {"plans": plans})(scale)


def run(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """The name and the row of the variant that the flags describe.

    Raises:
        ValueError: the table trains no systems, or has no such system, task, split or field.
    """
    made, fields, changes = experiment(args.table, args.scale), dict(args.set), dict(args.plan)
    if not isinstance(made, Trained):
        raise ValueError(f"{args.table} does not train systems from scratch")
    made = planned(made, args.scale, changes)
    tasks = made.tasks()
    task = args.task or next(iter(tasks))
    for what, given, known in (("system", args.system, made.compared), ("task", task, tasks)):
        if given not in known:
            raise ValueError(f"{args.table} has no {what} {given!r}: {', '.join(known)}")
    splits = [VALIDATION, *args.splits]
    if unknown := set(splits) - {VALIDATION, *tasks[task].splits}:
        has = ", ".join(tasks[task].splits)
        raise ValueError(f"{args.table} has no split {', '.join(sorted(unknown))}: {has}")
    made.compared = {**made.compared, NAME: made.compared[args.system].but(**fields)}
    only(made, splits)
    plan = made.plan_of(task)
    setting = {
        "lr": args.lr or plan.lrs[0],
        "weight_decay": plan.weight_decays[0],
        "seed": args.seed,
        "steps": plan.steps,
    }
    cell = {"task": task, "system": NAME, **setting, "device": "cpu", "tuning": not args.splits}
    with tempfile.TemporaryDirectory() as folder:
        row = made.measure({**cell, "folder": folder})
    row = {name: value for name, value in row.items() if name != "folder" and value != {}}
    row |= {"table": args.table, "system": args.system, "fields": fields, "splits": splits}
    row |= {"plan": changes} if changes else {}
    words = [args.table, args.scale, task, args.system, named(fields), named(setting)]
    return "/".join([*words, *([named(changes)] if changes else []), *args.splits]), row


def main() -> None:
    """Measure one variant, print it and store it."""
    parser = arguments(__doc__, NAME, threads=1)
    parser.add_argument("table", help="as in `nestlearn reproduce --list`")
    parser.add_argument("system", help="of the table")
    parser.add_argument("--task", help="of the table (default: its first)")
    parser.add_argument("--scale", default="tiny", choices=("tiny", "small", "paper"))
    parser.add_argument(
        "--set", nargs="+", type=assignment, default=[], metavar="FIELD=VALUE",
        help="fields of HopeConfig, in the place of the system's",
    )  # fmt: skip
    parser.add_argument(
        "--plan", nargs="+", type=assignment, default=[], metavar="FIELD=VALUE",
        help="fields of the table's plan, such as steps=3200 or tested=10485760,",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=TUNING_SEED)
    parser.add_argument("--lr", type=float, help="default: the first of the table's grid")
    parser.add_argument(
        "--splits", nargs="+", default=[], help="test splits to score, beside the validation split"
    )
    args = parser.parse_args()
    if args.quick:
        args.plan = [*args.plan, ("steps", 2)]
    torch.set_num_threads(args.threads)
    results = Results(
        out_path(args),
        question="What would a system of a table have with other fields?",
        settings={},
        seeds=(),
        threads=args.threads,
        fresh=args.fresh,
    )
    try:
        cell, row = run(args)
    except ValueError as error:
        parser.error(str(error))
    results.add(cell, row)
    print(cell)
    for split in row["splits"]:
        print(f"  {split}: {named(row[split])}")


if __name__ == "__main__":
    main()
