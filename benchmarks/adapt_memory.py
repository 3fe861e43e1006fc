"""What a learner keeps in memory, and how fast memories are loaded and swapped.

- **swap**: a pre-trained model and two memories: milliseconds to read a file (with its checksums),
  to let the model compute with another memory, and to give the rows of a batch their own.
- **stream**: a small model learns from a file of one line of millions of tokens; resident memory of
  the process on the way.

    python benchmarks/adapt_memory.py --model FOLDER
    python benchmarks/adapt_memory.py --tokens 2000000          # the stream alone
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from adapt_speed import Plain
from common import Results, arguments, median, out_path, table

STORAGE = {"float32": None, "int8": 16_000_000}


def timed(work: Callable[[], Any], rounds: int) -> float:
    """Median milliseconds."""
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return 1000 * median(seconds)


def swap(name: str, rounds: int) -> dict[str, Any]:
    """Milliseconds to load and to swap memories of a model."""
    import nestlearn as nl
    from nestlearn.adaptation import adaptation_of, read_memory
    from nestlearn.cli.pretrained import load_pretrained

    model, tokenizer = load_pretrained(name)
    nl.adapt(model)
    learner = nl.Learner(model, tokenizer, snapshots=0)
    handle = adaptation_of(model)
    memories = []
    row: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for text in ("A bridge of glass. " * 10, "The tram to Velm leaves at six. " * 10):
            learner.reset()
            learner.learn(text)
            memories.append(learner.memory.copy())
        for storage, limit in STORAGE.items():
            path = Path(folder) / f"{storage}.nlmem"
            row[f"{storage}_megabytes"] = learner.save(path, limit).nbytes / 1e6
            row[f"{storage}_save_ms"] = timed(lambda p=path, n=limit: learner.save(p, n), rounds)
            row[f"{storage}_read_ms"] = timed(lambda p=path: read_memory(p, handle.layout), rounds)
    turn = iter(range(10**9))
    row["swap_ms"] = timed(lambda: handle.show(memories[next(turn) % 2]), rounds)

    def rows() -> None:
        with handle.rows([memories[0], None, memories[1], memories[0]]):
            pass

    row["rows_of_4_ms"] = timed(rows, rounds)
    return row


def write_line(path: Path, tokens: int, seed: int = 0) -> None:
    """A file of one line: token numbers in phrases that come back, so that there is something to
    learn."""
    generator = torch.Generator().manual_seed(seed)
    phrases = torch.randint(256, (64, 16), generator=generator)
    with path.open("w") as file:
        for _ in range(tokens // 512):
            chosen = torch.randint(64, (32,), generator=generator)
            file.write(" ".join(map(str, phrases[chosen].flatten().tolist())) + " ")


class Stop:
    """Ends learning after a number of tokens, and notes the process's memory on the way."""

    def __init__(self, tokens: int, every: int) -> None:
        self.tokens, self.every = tokens, every
        self.points: list[list[float]] = []
        self.done = False

    def progress(self, learned: Any) -> None:
        """Called after every segment."""
        import psutil

        if learned.tokens >= self.every * (len(self.points) + 1):
            size = psutil.Process().memory_info().rss / 2**20
            self.points.append([learned.tokens, round(size, 1), round(learned.loss, 3)])
            print(f"  {learned.tokens:,} tokens: {size:.0f} MiB", file=sys.stderr, flush=True)
        self.done = learned.tokens >= self.tokens


def stream(tokens: int) -> dict[str, Any]:
    """Resident memory while a small model learns from a long line."""
    from transformers import LlamaConfig, LlamaForCausalLM

    import nestlearn as nl

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
    )  # fmt: skip
    model = nl.adapt(LlamaForCausalLM(config), rank=32, slots=1024)
    learner = nl.Learner(model, Plain(), repeats=1, context=256)
    stop = Stop(tokens, max(1, tokens // 20))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "line.txt"
        write_line(path, tokens + 4096)
        size = path.stat().st_size
        learner.learn(path, progress=stop.progress, stop=lambda: stop.done)
    return {"points": stop.points, "tokens": tokens, "file_bytes": size}


def main() -> None:
    """Measure, print and store."""
    parser = arguments(__doc__, "adapt_memory")
    parser.add_argument(
        "--model", help="folder, .gguf file or hub id; without it: the stream alone"
    )
    parser.add_argument("--tokens", type=int, default=2_000_000)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tokens = 20_000 if args.quick else args.tokens
    results = Results(
        out_path(args),
        question="How long does loading or swapping a memory take, and does a learner grow?",
        settings={"tokens": tokens, "rounds": args.rounds},
        threads=args.threads,
        fresh=args.fresh,
    )
    if args.model and not results.done("swap"):
        results.add("swap", {"model": Path(args.model).name, **swap(args.model, args.rounds)})
    if not results.done("stream"):
        results.add("stream", stream(tokens))
    found = results.get("swap")
    if found:
        table("Memories", ("what", "value"),
              [(k, v) for k, v in found.items() if isinstance(v, float)])  # fmt: skip
    points = results.get("stream")["points"]  # type: ignore[index]
    table("Stream", ("tokens", "MiB", "nats per token"), points)
    results.summarise({"grown_mib_second_half": points[-1][1] - points[len(points) // 2][1]})


if __name__ == "__main__":
    main()
