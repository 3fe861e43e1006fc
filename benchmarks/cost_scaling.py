"""Cost per token: training as the sequence grows, streaming as the past grows.

Training: one step at T 1,024, 4,096 and 16,384, timed in turn; per token relative to T 1,024, once
at batch 1 and once at equal tokens per step. Streaming: a model reads up to a million tokens in
segments of 512; states are values, so the ones at 10,000, 100,000 and 1,000,000 tokens are kept,
and single tokens and segments are timed from each of them in turn.

    python benchmarks/cost_scaling.py
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

import torch
from common import Results, arguments, median, out_path, state_bytes, table, verdict
from models import VOCAB, hope, size
from serve import Trial, training_step
from torch import Tensor

SEGMENT = 512


def training_trial(length: int, batch: int, shape: dict[str, Any]) -> Trial:
    """One training step of Hope at this length."""
    model: Any = hope(length=length, **shape).train()
    data = torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(0))
    step = training_step(model, lambda: model(input_ids=data, labels=data).loss)
    return Trial(step, batch * length, size(model))


def measure_training(args: argparse.Namespace, shape: dict[str, Any], results: Results) -> None:
    """Rows ``train/...``: seconds per token by length."""
    lengths = [64, 128, 256] if args.quick else [1024, 4096, 16384]
    plans = {f"train/T{t}_batch1": (t, 1) for t in lengths}
    plans |= {f"train/T{t}_equal_tokens": (t, lengths[-1] // t) for t in lengths[:-1]}
    if all(results.done(cell) for cell in plans):
        return
    trials = {cell: training_trial(t, batch, shape) for cell, (t, batch) in plans.items()}
    times: dict[str, list[float]] = {cell: [] for cell in plans}
    for trial in trials.values():
        trial.step()
    for turn in range(args.rounds):
        for cell, trial in trials.items():
            repeats = max(1, plans[f"train/T{lengths[-1]}_batch1"][0] // trial.tokens)
            start = time.perf_counter()
            for _ in range(repeats):
                trial.step()
            times[cell].append((time.perf_counter() - start) / repeats / trial.tokens)
        print(f"  training, turn {turn + 1} of {args.rounds}", file=sys.stderr, flush=True)
    for cell, (length, batch) in plans.items():
        results.add(
            cell,
            {
                "length": length,
                "batch": batch,
                "parameters": trials[cell].parameters,
                "us_per_token": 1e6 * median(times[cell]),
                "us_per_token_rounds": [1e6 * t for t in times[cell]],
            },
        )


def measure_streaming(args: argparse.Namespace, shape: dict[str, Any], results: Results) -> None:
    """Rows ``stream/...``: time per token and state bytes by position."""
    places = [1024, 2048, 4096] if args.quick else [10_240, 102_400, 1_000_448]
    cells = [f"stream/{place}" for place in places]
    if all(results.done(cell) for cell in cells):
        return
    torch.manual_seed(0)
    model: Any = hope(**shape).eval()
    generator = torch.Generator().manual_seed(0)
    kept: dict[int, Any] = {}
    cache: Any = None
    began = time.perf_counter()
    with torch.inference_mode():
        for position in range(SEGMENT, places[-1] + 1, SEGMENT):
            cache = read(model, _bytes(SEGMENT, generator), cache)
            if position in places:
                kept[position] = cache.copy()
                print(
                    f"  {position:,} tokens after {time.perf_counter() - began:.0f} s",
                    file=sys.stderr,
                    flush=True,
                )
        reading = time.perf_counter() - began
        single: dict[int, list[float]] = {place: [] for place in places}
        segment: dict[int, list[float]] = {place: [] for place in places}
        tokens = [_bytes(1, generator) for _ in range(args.tokens)]
        block = _bytes(SEGMENT, generator)
        for _ in range(args.rounds + 1):
            for place in places:
                cache = kept[place].copy()
                start = time.perf_counter()
                for token in tokens:
                    cache = read(model, token, cache)
                single[place].append((time.perf_counter() - start) / len(tokens))
                cache = kept[place].copy()
                start = time.perf_counter()
                read(model, block, cache)
                segment[place].append((time.perf_counter() - start) / SEGMENT)
    for place, cell in zip(places, cells, strict=True):
        held, storage = state_bytes(kept[place].states)
        results.add(
            cell,
            {
                "position": place,
                "state_bytes": held,
                "storage_bytes": storage,
                "ms_per_single_token": 1e3 * median(single[place][1:]),
                "ms_per_single_token_rounds": [1e3 * t for t in single[place][1:]],
                "us_per_token_in_segments": 1e6 * median(segment[place][1:]),
                "mean_us_per_token_up_to_the_last_position": 1e6 * reading / places[-1],
                "finite": all(t.isfinite().all().item() for t in _tensors(kept[place])),
            },
        )


def read(model: Any, tokens: Tensor, cache: Any) -> Any:
    """Read tokens after ``cache`` and return the cache after them."""
    out = model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return out.past_key_values


def _bytes(count: int, generator: torch.Generator) -> Tensor:
    return torch.randint(VOCAB, (1, count), generator=generator)


def _tensors(cache: Any) -> list[Tensor]:
    return [t for pair in cache.states for state in pair if state for t in state.tensors()]


def show(results: Results) -> None:
    """Print the tables, and store the summary with the targets."""
    training = [r for r in results.record["rows"] if r["cell"].startswith("train/")]
    streaming = [r for r in results.record["rows"] if r["cell"].startswith("stream/")]
    training.sort(key=lambda r: (r["batch"], r["length"]))
    streaming.sort(key=lambda r: r["position"])
    ones = [r for r in training if r["cell"].endswith("_batch1")]
    equal = sorted((r for r in training if r not in ones[:-1]), key=lambda r: r["length"])
    table(
        "Training cost",
        ["cell", "us/token", "relative to the shortest at batch 1"],
        [
            [r["cell"], r["us_per_token"], r["us_per_token"] / ones[0]["us_per_token"]]
            for r in training
        ],
    )
    table(
        "Streaming cost",
        ["position", "ms per single token", "us per token (segments)", "state bytes", "storage"],
        [
            [f"{r['position']:,}", r["ms_per_single_token"], r["us_per_token_in_segments"],
             r["state_bytes"], r["storage_bytes"]]
            for r in streaming
        ],
    )  # fmt: skip
    first, last = streaming[0], streaming[-1]
    lines = [
        ("training per token, longest / shortest, batch 1",
         ones[-1]["us_per_token"] / ones[0]["us_per_token"], 1.15),
        ("training per token, longest / shortest, equal tokens per step",
         equal[-1]["us_per_token"] / equal[0]["us_per_token"], 1.15),
        ("time per single token, last position / first",
         last["ms_per_single_token"] / first["ms_per_single_token"], 1.1),
        ("time per token in segments, last position / first",
         last["us_per_token_in_segments"] / first["us_per_token_in_segments"], 1.1),
        ("state bytes, last position / first", last["state_bytes"] / first["state_bytes"], 1.0),
        ("storage bytes, last position / first",
         last["storage_bytes"] / first["storage_bytes"], 1.0),
    ]  # fmt: skip
    table(
        "Targets",
        ["ratio", "ours", "target", "verdict"],
        [[what, value, f"<= {t}", verdict(value, t, at_most=True)] for what, value, t in lines],
    )
    results.summarise(
        {
            "targets": [
                {"what": w, "value": v, "target": t, "verdict": verdict(v, t, at_most=True)}
                for w, v, t in lines
            ]
        }
    )


def main() -> None:
    """Command line."""
    parser = arguments(__doc__, "cost_scaling")
    parser.add_argument("--rounds", type=int, default=5, help="turns of every timing")
    parser.add_argument("--tokens", type=int, default=256, help="single tokens per timing")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    shape: dict[str, Any] = {"dim": 256, "layers": 4, "heads": 4, "mixer": "self_modifying"}
    if args.quick:
        args.rounds, args.tokens = 2, 70
        shape |= {"dim": 32, "layers": 2, "heads": 2}
    results = Results(
        out_path(args),
        "Does Hope's cost per token stay flat with sequence length and with position?",
        {"quick": args.quick, "rounds": args.rounds, "tokens": args.tokens, **shape},
        threads=args.threads,
        fresh=args.fresh,
    )
    measure_training(args, shape, results)
    measure_streaming(args, shape, results)
    show(results)


if __name__ == "__main__":
    main()
