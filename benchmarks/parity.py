"""State tracking: parity of a bit string, at every position, far beyond the training length.

One layer, width 64, trained on random strings of at most 40 bits (one length per batch, shares of
ones from 0 to 1), tested on fair coins, 41 to 256 bits. A string counts only if all its positions
are right.

    python benchmarks/parity.py --jobs 2
"""

from __future__ import annotations

import math
import sys
import time
from typing import Any

import torch
import torch.nn.functional as F
from common import Results, arguments, out_path, table
from models import hope, size
from torch import Tensor

from nestlearn.evals.harness.parallel import in_parallel

SYSTEMS: dict[str, dict[str, Any]] = {
    "self_modifying": {"mixer": "self_modifying", "memory_chunk": 1, "projection_chunk": 1},
    "attention": {"mixer": "attention"},
    "gated_deltanet": {"mixer": "gated_deltanet"},
    "gated_deltanet_neg": {"mixer": "gated_deltanet", "allow_neg_eigval": True},
    "lstm": {"mixer": "lstm"},
    "srwm": {"mixer": "srwm"},
}


def strings(
    count: int, length: int, generator: torch.Generator, mixed: bool = False
) -> tuple[Tensor, Tensor]:
    """Random bits and the parity of every prefix, both ``(count, length)``. ``mixed``: every string
    has a share of ones of its own, so that short strings too have the runs that long ones have."""
    share = torch.rand(count, 1, generator=generator) if mixed else 0.5
    bits = (torch.rand(count, length, generator=generator) < share).long()
    return bits, bits.cumsum(1) % 2


def exact(model: Any, count: int, length: int, generator: torch.Generator) -> tuple[float, float]:
    """Share of strings with every position right, and share of positions right."""
    bits, parity = strings(count, length, generator)
    model.eval()
    with torch.inference_mode():
        right = model(input_ids=bits, use_cache=False).logits.argmax(-1) == parity
    model.train()
    return float(right.all(1).float().mean()), float(right.float().mean())


def run_cell(system: str, seed: int, plan: dict[str, Any]) -> dict[str, Any]:
    """Train one model and test it."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(1000 + seed)
    model: Any = hope(64, 1, plan["heads"], vocab=2, **SYSTEMS[system])
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=plan["lr"], betas=(0.9, 0.95), weight_decay=0.0
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1.0, (step + 1) / 50) * (1 + math.cos(math.pi * step / plan["steps"])) / 2,
    )
    began = time.perf_counter()
    losses: list[float] = []
    for _ in range(plan["steps"]):
        length = int(torch.randint(2, plan["train_length"] + 1, (1,), generator=generator))
        bits, parity = strings(plan["batch"], length, generator, mixed=True)
        logits = model(input_ids=bits).logits
        loss = F.cross_entropy(logits.flatten(0, 1), parity.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
    trained = time.perf_counter() - began
    test = torch.Generator().manual_seed(77)
    lengths = (
        torch.linspace(*plan["test_lengths"], plan["lengths"]).round().long().unique().tolist()
    )
    scores = [exact(model, plan["strings"], length, test) for length in lengths]
    return {
        "parameters": size(model),
        "steps": len(losses),
        "train_seconds": trained,
        "seconds": time.perf_counter() - began,
        "last_loss": sum(losses[-20:]) / len(losses[-20:]),
        "exact_at_train_length": exact(model, 200, plan["train_length"], test)[0],
        "exact": sum(s[0] for s in scores) / len(scores),
        "positions": sum(s[1] for s in scores) / len(scores),
        "exact_by_length": dict(zip(map(str, lengths), [s[0] for s in scores], strict=True)),
        "loss": losses[::10],
    }


def main() -> None:
    """Command line."""
    parser = arguments(__doc__, "parity", threads=1)
    parser.add_argument("--jobs", type=int, default=2, help="models at a time, one thread each")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--heads", type=int, default=2)
    args = parser.parse_args()
    plan = {
        "steps": args.steps, "lr": args.lr, "batch": args.batch, "heads": args.heads,
        "train_length": 40, "test_lengths": [41, 256], "lengths": 40, "strings": 50,
    }  # fmt: skip
    if args.quick:
        plan |= {"steps": 5, "batch": 8, "lengths": 3, "strings": 4}
        args.seeds = args.seeds[:1]
    results = Results(
        out_path(args),
        "Which mixers track parity beyond the length they were trained on?",
        plan,
        seeds=args.seeds,
        threads=1,
        fresh=args.fresh,
    )
    cells = {f"{s}/seed{n}": (s, n, plan) for n in args.seeds for s in args.systems}
    cells = {name: cell for name, cell in cells.items() if not results.done(name)}

    def done(name: str, row: dict[str, Any]) -> None:
        results.add(name, {"system": cells[name][0], "seed": cells[name][1], **row})
        print(f"  {name}: {row.get('error') or row['exact']}", file=sys.stderr, flush=True)

    in_parallel(run_cell, cells, args.jobs, done)
    rows = sorted(results.record["rows"], key=lambda r: r["cell"])
    columns = ["parameters", "steps", "last_loss", "exact_at_train_length", "exact", "positions"]
    table(
        "Parity, lengths 41 to 256 (exact: whole strings right)",
        ["cell", *columns, "s"],
        [[r["cell"], *(r.get(c) for c in columns), r.get("seconds")] for r in rows],
    )
    results.summarise(
        {
            system: {
                "exact_mean": sum(found) / len(found),
                "exact_min": min(found),
                "seeds": len(found),
            }
            for system in SYSTEMS
            if (found := [r["exact"] for r in rows if r["system"] == system and "exact" in r])
        }
    )


if __name__ == "__main__":
    main()
