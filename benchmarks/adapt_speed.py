"""Speed of learning beside a pre-trained model: reading and learning, and generating afterwards.

Side by side in one process, in turn: the learner (three levels, an added memory); a plain
training loop over the same weights with one AdamW (the same segments; each alone, and with what was
read before in the attention cache, as the learner has it; no levels, no clipping); fine-tuning of
all weights; and ``generate`` of the base model (as loaded, and with gradients turned off, which
alone costs some per cent on a CPU), and of the adapted model with its levels inactive and active.

    python benchmarks/adapt_speed.py --model FOLDER       # any causal language model
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from common import Results, arguments, median, out_path, table, verdict
from torch import Tensor

SEGMENT = 64


class Plain:
    """A tokenizer for text that is token numbers already."""

    bos_token_id = None

    def __call__(self, text: str, add_special_tokens: bool = False) -> Any:
        return type("Ids", (), {"input_ids": [int(w) for w in text.split()]})


def load(name: str) -> Any:
    """The model, in the type its weights are stored in."""
    from nestlearn.cli.pretrained import load_pretrained

    return load_pretrained(name)[0]


def document(vocabulary: int, tokens: int) -> list[int]:
    """Token numbers that no model knows."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary, (tokens,), generator=generator).tolist()


def learner_trial(name: str, ids: list[int]) -> Callable[[], None]:
    """Read and learn the document once, with an empty memory: keys are written, too."""
    learner = learner_of(load(name), len(ids))
    text = " ".join(map(str, ids))

    def run() -> None:
        learner.reset()
        learner.learn(text)

    return run


def learner_of(model: Any, context: int) -> Any:
    """A learner with three levels, one gradient step per segment."""
    import nestlearn as nl

    nl.adapt(model, calibration=None)
    return nl.Learner(model, Plain(), lr=1e-6, repeats=1, context=context, snapshots=0)


def trim(model: Any) -> None:
    """Leave the added memories no slots but those in use: less work for a plain loop."""
    from nestlearn.adaptation.added import AddedMemory

    for memory in model.modules():
        if isinstance(memory, AddedMemory):
            memory.values.data = memory.values.data[: len(memory.lengths)].clone()


def plain_trial(
    name: str, ids: list[int], memories: bool, context: bool = False
) -> Callable[[], None]:
    """Train on the same segments with AdamW: the values of added memories, or all weights."""
    from nestlearn.adaptation.reader import Reader

    model = load(name)
    if memories:  # with the keys that the learner would write
        learner = learner_of(model, len(ids))
        learner.learn(" ".join(map(str, ids)))
        trim(model)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-7, foreach=True)
    rows = [torch.tensor([ids[i : i + SEGMENT + 1]]) for i in range(0, len(ids) - 1, SEGMENT)]
    reader = Reader(model, len(ids))

    def step() -> None:
        reader.begin()
        for row in rows:
            loss, cache = reader.loss(row)
            loss.backward()
            if context:
                reader.keep(cache, row)
            optimizer.step()
            optimizer.zero_grad()

    return step


def generate_trial(name: str, kind: str, tokens: int) -> Callable[[], None]:
    """Generate from a short prompt."""
    from nestlearn.adaptation import adaptation_of

    model = load(name)
    if kind == "frozen":
        model.requires_grad_(False)
    elif kind != "base":
        ids = document(model.config.vocab_size, 513)
        learner_of(model, 513).learn(" ".join(map(str, ids)))
    prompt: Tensor = torch.arange(5, 21)[None]

    def run() -> None:
        model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=tokens,
            min_new_tokens=tokens, do_sample=False, pad_token_id=0,
        )  # fmt: skip

    def inactive() -> None:
        with adaptation_of(model).inactive():
            run()

    return inactive if kind == "inactive" else run


def measure(
    results: Results, trials: dict[str, Callable[[], None]], tokens: int, rounds: int
) -> None:
    """Rows: tokens per second, all trials taking turns."""
    times: dict[str, list[float]] = {cell: [] for cell in trials}
    for turn in range(rounds + 1):
        for cell, trial in trials.items():
            start = time.perf_counter()
            trial()
            if turn:  # the first round warms up
                times[cell].append(tokens / (time.perf_counter() - start))
        print(f"  turn {turn} of {rounds}", file=sys.stderr, flush=True)
    for cell, values in times.items():
        row = {"tokens_per_s": median(values), "tokens_per_s_rounds": values}
        results.add(cell, row)


def main() -> None:
    """Measure, print and store."""
    parser = arguments(__doc__, "adapt_speed")
    parser.add_argument("--model", required=True, help="folder, .gguf file or hub id")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tokens = 128 if args.quick else 512
    results = Results(
        out_path(args),
        question="How fast does a pre-trained model learn and generate with levels beside it?",
        settings={"tokens": tokens, "segment": SEGMENT, "rounds": args.rounds},
        seeds=[0],
        threads=args.threads,
        fresh=args.fresh,
    )
    probe = load(args.model)
    ids = document(probe.config.vocab_size, tokens + 1)
    del probe
    learn = {
        "learn/learner": learner_trial(args.model, ids),
        "learn/plain AdamW": plain_trial(args.model, ids, True),
        "learn/plain AdamW, context": plain_trial(args.model, ids, True, True),
        "learn/AdamW, all weights": plain_trial(args.model, ids, False),
    }
    measure(results, learn, tokens, args.rounds)
    del learn
    count = 16 if args.quick else 32
    kinds = ("base", "frozen", "inactive", "active")
    trials = {f"generate/{k}": generate_trial(args.model, k, count) for k in kinds}
    measure(results, trials, count, args.rounds)

    speed = {row["cell"]: row["tokens_per_s"] for row in results.rows()}
    plain, full = speed["learn/plain AdamW"], speed["learn/AdamW, all weights"]
    summary = {
        "learner / plain steps of the same weights": speed["learn/learner"] / plain,
        "the same, both with context": speed["learn/learner"] / speed["learn/plain AdamW, context"],
        "learner / fine-tuning all weights": speed["learn/learner"] / full,
        "generate, levels inactive / base": speed["generate/inactive"] / speed["generate/base"],
        "the same, base without gradients": speed["generate/inactive"] / speed["generate/frozen"],
        "generate, levels active / base": speed["generate/active"] / speed["generate/base"],
    }
    results.summarise(summary)
    goals = dict(zip(summary, (0.9, 0.9, 1.5, 0.97, 0.97, None), strict=True))
    table("tokens per second", ("trial", "tokens/s"), list(speed.items()))
    table(
        "ratios",
        ("what", "ratio", "goal", ""),
        [
            (k, v, goals[k], "" if goals[k] is None else verdict(v, goals[k] or 0.0))
            for k, v in summary.items()
        ],
    )


if __name__ == "__main__":
    main()
