"""Training speed, side by side in one run: ours, a plain Transformer, and the peers from PyPI.

A training step is forward, backward and AdamW, fp32, on random bytes. The cells of a group are
timed in turn, round after round (A B C A B C ...), ours in one long-lived process and the peers' in
another; a figure is the median over the rounds of a round's median step. Peak memory is the rise of
the process's high-water mark over a small warm-up step, one fresh process per cell.

    python benchmarks/train_speed.py                      # everything (the issue's targets)
    python benchmarks/train_speed.py --only t1024 layers  # some groups
    python benchmarks/train_speed.py --no-peers           # without the peers' environment
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import peers
from common import HERE, Results, arguments, median, out_path, table, verdict
from serve import Worker

Cell = dict[str, Any]


def ours(name: str, builder: str, **options: Any) -> Cell:
    """A cell of our worker."""
    return {"name": name, "where": "ours", "builder": builder, "options": options}


def theirs(name: str, builder: str, **options: Any) -> Cell:
    """A cell of the peers' worker."""
    return {"name": name, "where": "peers", "builder": builder, "options": options}


def groups(quick: bool) -> dict[str, list[Cell]]:
    """All groups; the cells of one are timed in turn."""
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
        "t1024": [
            ours("transformer", "transformer", **main),
            ours("hope", "model", **main, **sm),
            ours("hope_attention", "model", **main, mixer="attention"),
            ours("gated_deltanet", "model", **main, mixer="gated_deltanet"),
            theirs("titans_mac", "titans_mac", **main),
            theirs("titans_mac_chunk16", "titans_mac", **main, chunk=16),
            theirs("nested_learning_not_writing", "nested_learning", **main, write=False),
        ],
        "writing": [
            ours("hope", "model", **one, **sm),
            theirs("nested_learning_writing", "nested_learning", **one, write=True),
            theirs(
                "nested_learning_writing_8_64", "nested_learning", **one, write=True, chunk=8,
                memory_chunk=64,
            ),
            theirs("nested_learning_not_writing", "nested_learning", **one, write=False),
        ],
        "t16384": [
            ours("transformer", "transformer", **far),
            ours("hope", "model", **far, **sm),
            ours("hope_checkpointed", "model", **far, **sm, save=True),
            ours("hope_attention", "model", **far, mixer="attention"),
            ours("gated_deltanet", "model", **far, mixer="gated_deltanet"),
        ],
    }  # fmt: skip
    found["compiled"] = [
        {**ours(f"{name}{'_compiled' if on else ''}", builder, **main, **more, compiled=on),
         "where": "compiled" if on else "ours"}
        for name, builder, more in (("transformer", "transformer", {}), ("hope", "model", sm))
        for on in (False, True)
    ]  # fmt: skip
    layers = []
    for chunk in (16, 64):
        for depth, expansion in ((2, 1), (2, 4), (3, 1)):
            same = f"c{chunk}_d{depth}_x{expansion}"
            layers += [
                ours(
                    f"self_modifying_{same}", "layer", **single, heads=heads, memory_depth=depth,
                    memory_width=expansion * head, memory_chunk=chunk, projection_chunk=chunk,
                ),
                theirs(
                    f"titans_memory_{same}", "titans_memory", **single, heads=heads, depth=depth,
                    expansion=float(expansion), chunk=chunk,
                ),
                theirs(
                    f"titans_memory_renewed_{same}", "titans_memory", **single, heads=heads,
                    depth=depth, expansion=float(expansion), chunk=chunk, renew=True,
                ),
            ]  # fmt: skip
        layers += [
            ours(
                f"self_modifying_c{chunk}_default", "layer", **single, heads=heads,
                memory_chunk=chunk, projection_chunk=chunk,
            ),
            theirs(f"titans_memory_c{chunk}_default", "titans_memory", **single, chunk=chunk),
        ]  # fmt: skip
    found["layers"] = layers
    found["linear"] = [
        ours("gated_deltanet_layer", "layer", **single, heads=heads, kind="gated_deltanet"),
        theirs("fla_naive_layer", "fla_layer", **single, heads=heads, chunk=64),
        theirs("fla_naive_rule_alone", "fla_rule", **single, heads=heads, chunk=64),
    ]
    return found


def memory_cells(quick: bool) -> list[Cell]:
    """Peak memory of one step at the long length."""
    far = [c for c in groups(quick)["t16384"] if c["name"] in ("transformer", "hope")]
    cells = []
    for cell in far:
        for save in (False, True):
            name = f"{cell['name']}{'_checkpointed' if save else ''}"
            cells.append(ours(name, cell["builder"], **{**cell["options"], "save": save}))
    return cells


def time_group(
    name: str, cells: list[Cell], workers: dict[str, Worker | None], plan: argparse.Namespace,
    results: Results,
) -> None:  # fmt: skip
    """Time the cells of a group in turn and put their rows into the file."""
    if all(results.done(f"{name}/{cell['name']}") for cell in cells):
        return
    times: dict[str, list[list[float]]] = {}
    facts: dict[str, dict[str, Any]] = {}
    for cell in cells:
        worker = workers[cell["where"]]
        key = f"{name}/{cell['name']}"
        answer = (
            {"error": "left out"}
            if worker is None
            else worker.ask(
                op="prepare",
                cell=key,
                builder=cell["builder"],
                options=cell["options"],
                limit_s=plan.limit,
            )
        )
        facts[key] = answer
        print(f"  {key}: {answer.get('error') or 'ready'}", file=sys.stderr, flush=True)
        if "error" not in answer:
            times[key] = []
    for turn in range(plan.rounds):
        for cell in cells:
            key = f"{name}/{cell['name']}"
            if key not in times:
                continue
            slow = facts[key]["first_step_s"] > plan.slow
            worker = workers[cell["where"]]
            assert worker is not None
            answer = worker.ask(
                op="time", cell=key, steps=1 if slow else 3, seconds=0.0 if slow else plan.seconds,
                warm=not slow or turn == 0,
            )  # fmt: skip
            if "error" in answer:
                facts[key] = answer
                times.pop(key)
            else:
                times[key].append(answer["times"])
    for cell in cells:
        key = f"{name}/{cell['name']}"
        row = {"group": name, "name": cell["name"], "options": cell["options"], **facts[key]}
        if key in times:
            medians = [median(t) for t in times[key]]
            row |= {
                "seconds_per_step": median(medians),
                "tokens_per_s": facts[key]["tokens"] / median(medians),
                "tokens_per_s_range": [facts[key]["tokens"] / f(medians) for f in (max, min)],
                "round_seconds": times[key],
            }
        results.add(key, row)
        worker = workers[cell["where"]]
        if worker is not None:
            worker.ask(op="drop", cell=key)


def measure_memory(cells: list[Cell], threads: int, results: Results) -> None:
    """Peak memory of each cell, each in a fresh process."""
    for cell in cells:
        key = f"memory/{cell['name']}"
        if results.done(key):
            continue
        worker = Worker(sys.executable, HERE / "worker_ours.py", threads)
        answer = worker.ask(
            op="peak", builder=cell["builder"], options=cell["options"], baseline={"length": 64}
        )
        worker.close()
        results.add(
            key, {"group": "memory", "name": cell["name"], "options": cell["options"], **answer}
        )
        print(f"  {key}: {answer}", file=sys.stderr, flush=True)


def targets(results: Results) -> list[dict[str, Any]]:
    """The issue's ratios and what was reached."""

    def speed(cell: str) -> float | None:
        return (results.get(cell) or {}).get("tokens_per_s")

    def ratio(a: float | None, b: float | None) -> float | None:
        return a / b if a and b else None

    def step_bytes(name: str) -> float | None:
        return (results.get(f"memory/{name}") or {}).get("step_bytes")

    lines: list[tuple[str, float | None, float, bool]] = []
    for group, kind, label, target in (
        ("t1024", "", "T 1,024", 0.40),
        ("t16384", "", "T 16,384", 1.5),
        ("compiled", "_compiled", "T 1,024, both compiled", 0.40),
    ):
        value = ratio(speed(f"{group}/hope{kind}"), speed(f"{group}/transformer{kind}"))
        lines.append((f"Hope / Transformer, {label}", value, target, False))
    hope = speed("t1024/hope")
    lines += [
        ("Hope / titans-pytorch MAC", ratio(hope, speed("t1024/titans_mac")), 4, False),
        (
            "Hope / titans-pytorch MAC, chunk 16",
            ratio(hope, speed("t1024/titans_mac_chunk16")), 4, False,
        ),
        (
            "Hope / nested-learning writing (batch 1, T 512)",
            ratio(speed("writing/hope"), speed("writing/nested_learning_writing")), 40, False,
        ),
        (
            "Hope / nested-learning writing in chunks of 8 and 64 (batch 1, T 512)",
            ratio(speed("writing/hope"), speed("writing/nested_learning_writing_8_64")), 40, False,
        ),
    ]  # fmt: skip
    for chunk in (16, 64):
        for kind in ("d2_x1", "d2_x4", "d3_x1", "default"):
            name = f"c{chunk}_{kind}"
            lines.append(
                (
                    f"layer / NeuralMemory, chunk {chunk}, {_kind(kind)}",
                    ratio(
                        speed(f"layers/self_modifying_{name}"),
                        speed(f"layers/titans_memory_{name}"),
                    ),
                    1.5,
                    False,
                )
            )
    lines += [
        (
            "gated DeltaNet layer / FLA naive layer",
            ratio(speed("linear/gated_deltanet_layer"), speed("linear/fla_naive_layer")), 3, False,
        ),
        (
            "peak memory T 16,384, Hope / Transformer, both checkpointed",
            ratio(step_bytes("hope_checkpointed"), step_bytes("transformer_checkpointed")), 2, True,
        ),
        (
            "peak memory T 16,384, Hope checkpointed / Transformer plain",
            ratio(step_bytes("hope_checkpointed"), step_bytes("transformer")), 2, True,
        ),
    ]  # fmt: skip
    return [
        {"what": w, "value": v, "target": t, "at_most": m, "verdict": verdict(v, t, m)}
        for w, v, t, m in lines
    ]


def _kind(kind: str) -> str:
    if kind == "default":
        return "each at its defaults"
    depth, expansion = kind.split("_")
    return f"depth {depth[1:]}, hidden width {expansion[1:]} x head"


def show(results: Results) -> None:
    """Print speeds and targets, and store the summary."""
    rows = [r for r in results.record["rows"] if r["group"] != "memory"]
    table(
        "Training speed (tokens/s, median of rounds)",
        ["cell", "tokens/s", "s/step", "parameters", "note"],
        [
            [r["cell"], r.get("tokens_per_s"), r.get("seconds_per_step"), r.get("parameters"),
             r.get("error", "")[:40]]
            for r in rows
        ],
    )  # fmt: skip
    memory = results.rows(group="memory")
    if memory:
        table(
            "Peak memory of one training step above the warm-up (MiB)",
            ["cell", "MiB"],
            [[r["name"], r["step_bytes"] / 2**20 if "step_bytes" in r else None] for r in memory],
        )
    reached = targets(results)
    table(
        "Targets of the issue",
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
    parser.add_argument(
        "--only", nargs="+", help="some of: t1024 writing t16384 compiled layers linear memory"
    )
    parser.add_argument("--no-peers", action="store_true", help="leave the peers' cells out")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument(
        "--limit", type=float, default=900.0, help="seconds for a first step (compilation too)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="times the cells take turns")
    parser.add_argument("--seconds", type=float, default=4.0, help="at least this long per turn")
    parser.add_argument(
        "--slow", type=float, default=15.0, help="steps slower than this: one a turn"
    )
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.seconds, args.no_compile = 2, 0.1, True
    known = [*groups(args.quick), "memory"]
    wanted = args.only or known
    if set(wanted) - set(known):
        parser.error(f"unknown group in {wanted}; choose from {', '.join(known)}")
    log = HERE / "results" / "train_speed.workers.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    workers: dict[str, Worker | None] = {
        "ours": Worker(sys.executable, HERE / "worker_ours.py", args.threads, log),
        "compiled": None
        if args.no_compile
        else Worker(sys.executable, HERE / "worker_ours.py", args.threads, log),
        "peers": None if args.no_peers else peers.start(args.threads, log),
    }
    versions = {}
    if workers["peers"] is not None:
        versions = workers["peers"].ask(op="versions", packages=peers.PACKAGES)["versions"]
    results = Results(
        out_path(args),
        "How fast does Hope train beside a plain Transformer and the peers from PyPI?",
        {"quick": args.quick, "rounds": args.rounds, "seconds": args.seconds, "dtype": "float32",
         "peers": versions, "threads": args.threads},
        threads=args.threads,
        fresh=args.fresh,
    )  # fmt: skip
    for name, cells in groups(args.quick).items():
        if name in wanted:
            print(f"{name}: {len(cells)} cells", file=sys.stderr, flush=True)
            time_group(name, cells, workers, args, results)
    for worker in workers.values():
        if worker is not None:
            worker.close()
    if "memory" in wanted:
        measure_memory(memory_cells(args.quick), args.threads, results)
    show(results)


if __name__ == "__main__":
    main()
