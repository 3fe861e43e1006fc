"""Training speed, side by side in one run: ours, a plain Transformer, and the peers from PyPI.

A training step is forward, backward and AdamW, fp32, on random bytes. Each cell has a process of
its own, ended when the cell is done, and takes turns with its reference (the plain Transformer for
whole models, titans-pytorch's NeuralMemory or FLA's naive code for layers): reference, cell,
reference, cell, ..., reference. The ratio is the median over the rounds. Peak memory is the rise of
the process's high-water mark above what it holds before the model is built. A row is written when
its cell is done; a run that was cut off goes on with the cells that are missing or failed.

    python benchmarks/train_speed.py                          # everything (the issue's targets)
    python benchmarks/train_speed.py --list                   # the cells
    python benchmarks/train_speed.py --only t1024 'layers/*c16_d2*'
    python benchmarks/train_speed.py --no-peers               # without the peers' environment
"""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import closing
from fnmatch import fnmatchcase
from typing import Any

import peers
from common import HERE, Results, arguments, out_path, table, verdict
from serve import Deadline, Failed, Pace, Timed, Worker, side_by_side

Cell = dict[str, Any]


def ours(name: str, builder: str, **options: Any) -> Cell:
    """A cell of our worker."""
    return {"name": name, "where": "ours", "builder": builder, "options": options}


def theirs(name: str, builder: str, **options: Any) -> Cell:
    """A cell of the peers' worker."""
    return {"name": name, "where": "peers", "builder": builder, "options": options}


def beside(reference: str, cells: list[Cell]) -> list[Cell]:
    """The cells, each to be timed in turn with the one of them called ``reference``."""
    return [{**cell, "reference": reference} for cell in cells]


def groups(quick: bool) -> dict[str, list[Cell]]:
    """All groups of cells."""
    width = {"dim": 64, "layers": 2, "heads": 2} if quick else {"dim": 256, "layers": 4, "heads": 4}
    t, long, short = (128, 256, 64) if quick else (1024, 16384, 512)
    main = {**width, "batch": 1 if quick else 4, "length": t}
    one = {**width, "batch": 1, "length": short}
    far = {**width, "batch": 1, "length": long}
    single = {"dim": width["dim"], "batch": main["batch"], "length": t}
    heads = width["heads"]
    head = width["dim"] // heads
    sm = {"mixer": "self_modifying"}
    found: dict[str, list[Cell]] = {
        "t1024": beside("transformer", [
            ours("transformer", "transformer", **main),
            ours("hope", "model", **main, **sm),
            ours("hope_eager", "model", **main, **sm, native=False),
            ours("hope_attention", "model", **main, mixer="attention"),
            ours("gated_deltanet", "model", **main, mixer="gated_deltanet"),
            theirs("titans_mac", "titans_mac", **main),
            theirs("titans_mac_chunk16", "titans_mac", **main, chunk=16),
            theirs("nested_learning_not_writing", "nested_learning", **main, write=False),
        ]),
        "writing": beside("transformer", [
            ours("transformer", "transformer", **one),
            ours("hope", "model", **one, **sm),
            theirs("nested_learning_writing", "nested_learning", **one, write=True),
            theirs(
                "nested_learning_writing_8_64", "nested_learning", **one, write=True, chunk=8,
                memory_chunk=64,
            ),
            theirs("nested_learning_not_writing", "nested_learning", **one, write=False),
        ]),
        "t16384": beside("transformer", [
            ours("transformer", "transformer", **far),
            ours("hope", "model", **far, **sm),
            ours("hope_checkpointed", "model", **far, **sm, save=True),
            ours("hope_attention", "model", **far, mixer="attention"),
            ours("gated_deltanet", "model", **far, mixer="gated_deltanet"),
        ]),
        "compiled": beside("transformer_compiled", [
            ours("transformer_compiled", "transformer", **main, compiled=True),
            ours("transformer", "transformer", **main),
            ours("hope_compiled", "model", **main, **sm, native=False, compiled=True),
            ours("hope", "model", **main, **sm),
        ]),
        "layers": [],
        "linear": beside("fla_naive_layer", [
            theirs("fla_naive_layer", "fla_layer", **single, heads=heads, chunk=64),
            ours("gated_deltanet_layer", "layer", **single, heads=heads, kind="gated_deltanet"),
            theirs("fla_naive_rule_alone", "fla_rule", **single, heads=heads, chunk=64),
            ours("gated_deltanet_rule_alone", "rule", **single, heads=heads),
        ]),
        "memory": [],
    }  # fmt: skip
    for chunk in (16, 64):
        for depth, expansion in ((2, 1), (2, 4), (3, 1)):
            same = f"c{chunk}_d{depth}_x{expansion}"
            memory = {"heads": heads, "depth": depth, "expansion": float(expansion), "chunk": chunk}
            found["layers"] += beside(f"titans_memory_{same}", [
                theirs(f"titans_memory_{same}", "titans_memory", **single, **memory),
                ours(
                    f"self_modifying_{same}", "layer", **single, heads=heads, memory_depth=depth,
                    memory_width=expansion * head, memory_chunk=chunk, projection_chunk=chunk,
                ),
                theirs(
                    f"titans_memory_renewed_{same}", "titans_memory", **single, **memory, renew=True
                ),
            ])  # fmt: skip
        found["layers"] += beside(f"titans_memory_c{chunk}_default", [
            theirs(f"titans_memory_c{chunk}_default", "titans_memory", **single, chunk=chunk),
            ours(
                f"self_modifying_c{chunk}_default", "layer", **single, heads=heads,
                memory_chunk=chunk, projection_chunk=chunk,
            ),
        ])  # fmt: skip
    for batch in (4, 1):  # the larger one may need more than the machine has: then the smaller
        many = {**far, "batch": batch}
        found["memory"] += [
            ours(f"transformer_b{batch}", "transformer", **many),
            ours(f"transformer_checkpointed_b{batch}", "transformer", **many, save=True),
            ours(f"hope_checkpointed_b{batch}", "model", **many, **sm, save=True),
        ]
    found["memory"] += [ours("hope_b1", "model", **far, **sm)]
    return found


def chosen(plan: argparse.Namespace) -> list[tuple[str, Cell]]:
    """(group, cell) of those that ``--only`` names and no flag leaves out.

    Raises:
        ValueError: a pattern fits no cell.
    """
    every = {
        f"{group}/{cell['name']}": (group, cell)
        for group, cells in groups(plan.quick).items()
        for cell in cells
    }
    picked = set()
    for pattern in plan.only or ["*"]:
        fitting = {key for key in every if fnmatchcase(key, pattern)}
        fitting |= {key for key, (group, _) in every.items() if fnmatchcase(group, pattern)}
        if not fitting:
            raise ValueError(f"--only {pattern!r} fits no cell; --list prints them")
        picked |= fitting
    return [
        (group, cell)
        for key, (group, cell) in every.items()
        if key in picked
        and not (plan.no_peers and cell["where"] == "peers")
        and not (plan.no_compile and group == "compiled")
    ]


class Measurement:
    """One run: starts a process per cell and keeps the reference of the latest cell alive."""

    def __init__(self, plan: argparse.Namespace, results: Results):
        self.plan, self.results = plan, results
        self.pace = Pace(plan.rounds, plan.seconds, plan.slow)
        self.log = results.path.with_suffix(".workers.log")
        self._alive: tuple[str, Timed] | None = None
        self._failed: dict[str, str] = {}

    def worker(self, cell: Cell) -> Worker:
        """A fresh process for the cell."""
        try:
            python = peers.python() if cell["where"] == "peers" else sys.executable
        except (RuntimeError, OSError) as error:
            raise Failed(f"no environment for the peers: {error}") from None
        script = HERE / f"worker_{cell['where']}.py"
        return Worker(python, script, self.plan.threads, self.log, self.plan.cell_memory)

    def timed(self, cell: Cell, until: Deadline) -> Timed:
        """The cell in a fresh process, warmed up."""
        return Timed(self.worker(cell), cell["builder"], cell["options"], self.pace, until)

    def reference(self, group: str, name: str) -> Timed:
        """The group's reference cell, started unless it is the one alive.

        Raises:
            Failed: it cannot be had (found out once in a run).
        """
        key = f"{group}/{name}"
        if self._alive and self._alive[0] == key and self._alive[1].worker.alive:
            return self._alive[1]
        self.end()
        try:
            if key in self._failed:
                raise Failed(self._failed[key])
            (cell,) = (c for c in groups(self.plan.quick)[group] if c["name"] == name)
            if self.plan.no_peers and cell["where"] == "peers":
                raise Failed("--no-peers")
            found = self.timed(cell, Deadline(self.plan.cell_limit))
        except Failed as error:
            self._failed[key] = str(error)
            raise Failed(f"no reference ({name}): {error}") from None
        found.role = " (in the reference)"
        self._alive = (key, found)
        return found

    def end(self) -> None:
        """End the reference's process."""
        if self._alive:
            self._alive[1].worker.close()
        self._alive = None

    def time(self, group: str, cell: Cell) -> dict[str, Any]:
        """The row of a cell, beside its reference; alone, and with an ``error``, without one."""
        row: dict[str, Any] = {"reference": cell["reference"]}
        reference = None
        if cell["name"] != cell["reference"]:
            try:
                reference = self.reference(group, cell["reference"])
            except Failed as error:
                row["error"] = str(error)
        until = Deadline(self.plan.cell_limit)
        try:
            mine = self.timed(cell, until)
            with closing(mine.worker):
                row |= side_by_side(mine, reference, self.plan.rounds, until)
                if cell["where"] == "peers":
                    row |= until.ask(mine.worker, op="versions", packages=peers.PACKAGES)
        except Failed as error:
            row["error"] = str(error)
        return row

    def peak(self, cell: Cell) -> dict[str, Any]:
        """The row of a cell of which the memory is measured, not the time."""
        self.end()
        request = {"builder": cell["builder"], "options": cell["options"]}
        try:
            with closing(self.worker(cell)) as worker:
                until = Deadline(self.plan.cell_limit)
                return until.ask(worker, op="peak", **request, baseline={"length": 64})
        except Failed as error:
            return {"error": str(error)}

    def add(self, group: str, cell: Cell) -> None:
        """Measure a cell and write its row."""
        key = f"{group}/{cell['name']}"
        load = os.getloadavg()[0]
        row = self.peak(cell) if group == "memory" else self.time(group, cell)
        facts = {"group": group, "name": cell["name"], "options": cell["options"], "load": load}
        self.results.add(key, {**facts, **row})
        said = [f"{k} {row[k]:,.4g}" for k in ("tokens_per_s", "ratio", "step_bytes") if k in row]
        said += [row[k] for k in ("error", "note") if k in row]
        print(f"  {key}: {', '.join(said)}", file=sys.stderr, flush=True)


def ratio(results: Results, group: str, one: str, other: str) -> float | None:
    """Tokens/s of ``one`` over ``other``'s, from turns taken together or beside one reference."""
    first, second = (results.get(f"{group}/{name}") or {} for name in (one, other))
    if first.get("reference") == other:
        return first.get("ratio")
    if "ratio" in first and "ratio" in second and first["reference"] == second["reference"]:
        return first["ratio"] / second["ratio"]
    return None


def step_bytes(results: Results, one: str, other: str) -> float | None:
    """Peak memory of ``one`` over ``other``'s, at the largest batch at which both were measured."""
    for batch in (4, 1):
        cells = [results.get(f"memory/{name}_b{batch}") or {} for name in (one, other)]
        if all("step_bytes" in cell for cell in cells):
            return cells[0]["step_bytes"] / cells[1]["step_bytes"]
    return None


def targets(results: Results) -> list[dict[str, Any]]:
    """The issue's ratios and what was reached."""
    mac, writes = "Hope / titans-pytorch MAC", "Hope / nested-learning writing"
    wanted: list[tuple[str, str, str, str, float]] = [
        ("Hope / Transformer, T 1,024", "t1024", "hope", "transformer", 0.40),
        ("Hope / Transformer, T 16,384", "t16384", "hope", "transformer", 1.5),
        (
            "Hope / Transformer, T 1,024, both compiled",
            "compiled", "hope_compiled", "transformer_compiled", 0.40,
        ),
        (mac, "t1024", "hope", "titans_mac", 4),
        (f"{mac}, chunk 16", "t1024", "hope", "titans_mac_chunk16", 4),
        (f"{writes} (batch 1, T 512)", "writing", "hope", "nested_learning_writing", 40),
        (
            f"{writes} in chunks of 8 and 64 (batch 1, T 512)",
            "writing", "hope", "nested_learning_writing_8_64", 40,
        ),
        (
            "gated DeltaNet layer / FLA naive layer",
            "linear", "gated_deltanet_layer", "fla_naive_layer", 3,
        ),
        ("gated DeltaNet rule / FLA naive chunk code",
         "linear", "gated_deltanet_rule_alone", "fla_naive_rule_alone", 3),
    ]  # fmt: skip
    for chunk in (16, 64):
        for kind in ("d2_x1", "d2_x4", "d3_x1", "default"):
            label = "each at its defaults"
            if kind != "default":
                label = f"depth {kind[1]}, hidden width {kind[4]} x head"
            names = [f"{layer}_c{chunk}_{kind}" for layer in ("self_modifying", "titans_memory")]
            label = f"layer / NeuralMemory, chunk {chunk}, {label}"
            wanted.append((label, "layers", names[0], names[1], 1.5))
    lines = [(label, ratio(results, *cells), goal, False) for label, *cells, goal in wanted]
    for plain in ("transformer_checkpointed", "transformer"):
        what = "both checkpointed" if plain != "transformer" else "only Hope checkpointed"
        value = step_bytes(results, "hope_checkpointed", plain)
        lines.append((f"peak memory T 16,384, Hope / Transformer, {what}", value, 2, True))
    return [
        {"what": w, "value": v, "target": t, "at_most": m, "verdict": verdict(v, t, m)}
        for w, v, t, m in lines
    ]


def show(results: Results) -> None:
    """Print speeds and targets, and store the summary."""
    rows = [r for r in results.record["rows"] if r["group"] != "memory"]
    table(
        "Training speed (medians of the rounds; ratio: tokens/s over the reference's)",
        ["cell", "tokens/s", "ratio", "reference", "path", "note"],
        [
            [r["cell"], r.get("tokens_per_s"), r.get("ratio"), r.get("reference"), r.get("path"),
             r.get("error", r.get("note", ""))[:40]]
            for r in rows
        ],
    )  # fmt: skip
    memory = results.rows(group="memory")
    if memory:
        table(
            "Peak memory of one training step at the long length (MiB)",
            ["cell", "MiB", "batch", "note"],
            [[r["name"], r["step_bytes"] / 2**20 if "step_bytes" in r else None,
              r["options"]["batch"], r.get("error", "")[:60]] for r in memory],
        )  # fmt: skip
    reached = targets(results)
    table(
        f"Targets of the issue{' (toy sizes)' if results.record['settings']['quick'] else ''}",
        ["ratio", "ours", "target", "verdict"],
        [
            [r["what"], r["value"], f"{'<=' if r['at_most'] else '>='} {r['target']}", r["verdict"]]
            for r in reached
        ],
    )
    results.summarise({"targets": reached})


def main() -> None:
    """Command line."""
    parser = arguments(__doc__, "train_speed")
    for flag, what in (
        ("--list", "print the cells and end"),
        ("--again", "measure the chosen cells even if the file has them"),
        ("--no-peers", "leave the peers' cells out"),
        ("--no-compile", "leave torch.compile out"),
    ):
        parser.add_argument(flag, action="store_true", help=what)
    parser.add_argument("--only", nargs="+", help="groups or group/cell, * and ? stand for any")
    for flag, value, what in (
        ("--cell-limit", 900, "seconds for a cell, turns of its reference included"),
        ("--cell-memory", 0, "GiB a cell may allocate (default: what is free, but for one)"),
        ("--seconds", 4, "at least this long per turn"),
        ("--slow", 5, "steps slower than this: one a turn"),
    ):
        parser.add_argument(flag, type=float, default=value, help=what)
    parser.add_argument("--rounds", type=int, default=5, help="turns of a cell")
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.seconds = 2, 0.1
        args.no_compile |= not args.only  # compiling takes a minute at any size
    try:
        cells = chosen(args)
    except ValueError as error:
        parser.error(str(error))
    if args.list:
        for group, cell in cells:
            other = cell.get("reference", cell["name"])
            print(f"{group}/{cell['name']}", f" beside {other}" if other != cell["name"] else "")
        return
    results = Results(
        out_path(args),
        "How fast does Hope train beside a plain Transformer and the peers from PyPI?",
        {"quick": args.quick, "dtype": "float32", "threads": args.threads},
        threads=args.threads,
        fresh=args.fresh,
    )
    results.path.parent.mkdir(parents=True, exist_ok=True)
    run = Measurement(args, results)
    try:
        for group, cell in cells:
            if args.again or not results.done(f"{group}/{cell['name']}"):
                run.add(group, cell)
        run.end()
    except KeyboardInterrupt:  # the workers end with this process
        parser.exit(130, "interrupted; the same command goes on with the cells that are missing\n")
    show(results)


if __name__ == "__main__":
    main()
