"""Kept memory: how long is a training step when freed blocks stay with the process?

Forward, backward and AdamW, in fresh processes that take turns: as the C library comes, and after
`nestlearn.heap.keep_freed_memory()`. The figure is the median over rounds of the ratio.

    python benchmarks/heap.py
"""

from __future__ import annotations

import resource
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch
from common import Results, arguments, out_path, table
from models import VOCAB, hope
from serve import training_step
from transformer import Transformer

from nestlearn.heap import keep_freed_memory

TOKENS = {
    "Hope of Table 5, 32 x 49": (32, 49),
    "Hope, 4 x 1,024": (4, 1024),
    "Transformer, 4 x 1,024": (4, 1024),
}
"""Batch and length."""


def build(cell: str, length: int) -> Any:
    """The model of a cell."""
    if cell.startswith("Transformer"):
        return Transformer(VOCAB)
    if length < 64:
        fields = {"memory_chunk": 1, "projection_chunk": 1, "intermediate_size": 24}
        return hope(dim=64, layers=1, heads=2, length=length, vocab=VOCAB, **fields)
    return hope(length=length)


def measure(cell: str, kept: bool, steps: int, threads: int) -> dict[str, float]:
    """Seconds of a step, the share of processor time that the system took, the most memory."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    if kept and not keep_freed_memory():
        raise RuntimeError("this C library cannot keep freed memory, or the environment sets it")
    batch, length = TOKENS[cell]
    model = build(cell, length)
    data = torch.randint(VOCAB, (batch, length))

    def loss() -> Any:
        if isinstance(model, Transformer):
            return model(data)
        return model(input_ids=data, labels=data).loss

    step = training_step(model, loss)
    for _ in range(2):
        step()
    used, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    for _ in range(steps):
        step()
    seconds, now = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
    system, user = now.ru_stime - used.ru_stime, now.ru_utime - used.ru_utime
    return {
        "seconds": seconds / steps,
        "system_share": system / (system + user),
        "peak_mib": now.ru_maxrss / 1024,
    }


def main() -> None:
    """Measure what is missing, print and store."""
    parser = arguments(__doc__, "heap", threads=1)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    results = Results(
        out_path(args),
        question="How long is a training step when freed memory stays with the process?",
        settings={"tokens": TOKENS, "rounds": args.rounds, "quick": args.quick},
        threads=args.threads,
        fresh=args.fresh,
    )
    for cell, (batch, length) in TOKENS.items():
        if results.done(cell):
            continue
        steps = 1 if args.quick else max(5, 60_000 // (batch * length))
        turns: list[dict[str, Any]] = []
        for _ in range(args.rounds):
            turn = {}
            for kept in (False, True):
                with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                    turn[("default", "kept")[kept]] = pool.submit(
                        measure, cell, kept, steps, args.threads
                    ).result()
            turns.append(turn)
            print(f"  {cell}: {turn}", file=sys.stderr, flush=True)
        ratio = statistics.median(t["default"]["seconds"] / t["kept"]["seconds"] for t in turns)
        results.add(cell, {"turns": turns, "as_fast": ratio})
    rows = []
    for row in results.rows():
        for how in ("default", "kept"):
            medians = [
                statistics.median(turn[how][name] for turn in row["turns"])
                for name in ("seconds", "system_share", "peak_mib")
            ]
            as_fast = row["as_fast"] if how == "kept" else 1.0
            rows.append((row["cell"], how, *medians, as_fast))
    results.summarise({row["cell"]: row["as_fast"] for row in results.rows()})
    heads = ("training step", "freed memory", "seconds", "system's share", "peak MiB", "as fast")
    table("Training steps, median over rounds", heads, rows)


if __name__ == "__main__":
    main()
