"""What every benchmark script shares: flags, places of results, verdicts, sizes of states."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
RESULTS = HERE / "results"
if str(ROOT / "src") not in sys.path:
    sys.path.insert(0, str(ROOT / "src"))

from nestlearn.evals.harness.data import data_root  # noqa: E402
from nestlearn.evals.harness.results import Results, median, table  # noqa: E402

__all__ = [
    "HERE",
    "RESULTS",
    "ROOT",
    "Results",
    "arguments",
    "data_root",
    "median",
    "out_path",
    "state_bytes",
    "table",
    "verdict",
]


def arguments(description: str | None, name: str, threads: int = 2) -> argparse.ArgumentParser:
    """The flags every script has: ``--quick``, ``--out``, ``--fresh``, ``--threads``."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="toy sizes: only shows that it runs")
    parser.add_argument(
        "--out", type=Path, help=f"result file (default benchmarks/results/{name}.json)"
    )
    parser.add_argument("--fresh", action="store_true", help="drop earlier cells of the file")
    parser.add_argument("--threads", type=int, default=threads, help="CPU threads per measurement")
    parser.set_defaults(name=name)
    return parser


def out_path(args: argparse.Namespace) -> Path:
    """``--out``, or the default: quick runs are kept apart from real results."""
    if args.out is not None:
        return args.out
    return RESULTS / ("quick" if args.quick else "") / f"{args.name}.json"


def verdict(value: float | None, target: float, at_most: bool = False) -> str:
    """PASS, or how far short: ``verdict(0.3, 0.4)`` is ``short (0.75 of target)``."""
    if value is None or not math.isfinite(value):
        return "not measured"
    if (value <= target) if at_most else (value >= target):
        return "PASS"
    share = target / value if at_most else value / target
    return f"short ({share:.2f} of target)"


def state_bytes(value: Any) -> tuple[int, int]:
    """Bytes of all tensors reachable from a cache or state, and of the storages behind them (a view
    of a large tensor keeps all of it alive)."""
    import torch

    seen: set[int] = set()
    storages: dict[int, int] = {}
    total = 0

    def walk(item: Any) -> None:
        nonlocal total
        if id(item) in seen:
            return
        seen.add(id(item))
        if isinstance(item, torch.nn.Module):
            return
        if isinstance(item, torch.Tensor):
            total += item.numel() * item.element_size()
            storage = item.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(item, dict):
            for part in item.values():
                walk(part)
        elif isinstance(item, list | tuple | set):
            for part in item:
                walk(part)
        elif hasattr(item, "__dict__"):
            walk(vars(item))

    walk(value)
    return total, sum(storages.values())
