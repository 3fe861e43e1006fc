"""Fig. 11 at our scale: loss after equal steps, M3 beside AdamW, Muon and AdaMuon.

Two tasks: a byte language model (0.47 M parameters, English novels split by book) and a small
vision Transformer on scikit-learn's digits (the last images, of other writers, are held out). Rate
and one more setting of every optimizer are searched by the same procedure and number of trials
(`optimizer_zoo`) on a seed of its own, by loss on *validation* data; then three seeds, judged on
*test* data. All see the same batches in the same order, the same warm-up and cosine. AdaMuon is
that of PyPI `pytorch-optimizer`. Embeddings, norms, biases and the head are AdamW's at AdamW's best
rate, for all.

    python benchmarks/optimizers_loss.py                # both tasks (resumes run by run)
    python benchmarks/optimizers_loss.py --tasks vit
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import Results, arguments, out_path, table
from learn import batches, default_text, text
from optimizer_zoo import ZOO, Setting, build, schedule, search
from torch import Tensor, nn
from transformer import Transformer

TUNING_SEED = 1000
WARM = 0.05
PLANS: dict[str, dict[str, Any]] = {
    "lm": {"dim": 96, "layers": 4, "heads": 2, "length": 128, "batch": 8, "steps": 200},
    "vit": {"dim": 64, "layers": 3, "heads": 4, "batch": 64, "steps": 150},
}
QUICK: dict[str, dict[str, Any]] = {
    "lm": {"dim": 16, "layers": 1, "heads": 2, "length": 32, "batch": 4, "steps": 6},
    "vit": {"dim": 16, "layers": 1, "heads": 2, "batch": 16, "steps": 6},
}


class VisionBlock(nn.Module):
    """``x + attention(norm x)``, then ``x + MLP(norm x)``; all tokens see each other."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*heads)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class VisionTransformer(nn.Module):
    """8 x 8 images in 16 patches of 2 x 2, mean of the tokens, ten classes."""

    def __init__(self, dim: int, layers: int, heads: int) -> None:
        super().__init__()
        self.embed = nn.Linear(4, dim)
        self.position = nn.Parameter(0.02 * torch.randn(16, dim))
        self.blocks = nn.Sequential(*(VisionBlock(dim, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 10)

    def forward(self, images: Tensor) -> Tensor:
        patches = images.unfold(1, 2, 2).unfold(2, 2, 2).flatten(3).flatten(1, 2)
        return self.head(self.norm(self.blocks(self.embed(patches) + self.position)).mean(1))


def digits() -> dict[str, tuple[Tensor, Tensor]]:
    """scikit-learn's 1,797 images in the data set's order, which is by writer."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32) / 16
    labels = torch.tensor(found.target)
    cuts = {"train": slice(0, 1097), "validation": slice(1097, 1437), "test": slice(1437, None)}
    return {name: (images[cut], labels[cut]) for name, cut in cuts.items()}


def image_batches(
    images: Tensor, labels: Tensor, batch: int, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless random batches, each shifted by up to one pixel."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        rows = torch.randint(len(images), (batch,), generator=generator)
        down, right = torch.randint(0, 3, (2,), generator=generator).tolist()
        padded = F.pad(images[rows], (1, 1, 1, 1))
        yield padded[:, down : down + 8, right : right + 8], labels[rows]


Loss = Callable[[nn.Module, Any], Tensor]
Judge = Callable[[nn.Module, str], dict[str, float]]


def language_task(plan: dict[str, Any], seed: int) -> tuple[nn.Module, Iterable, Loss, Judge]:
    """(model, batches, loss of a batch, judge of a split)."""
    books = text(default_text())
    length, windows = plan["length"], 2 if plan["steps"] < 50 else 48

    def loss(model: nn.Module, rows: Tensor) -> Tensor:
        return model(rows)

    def judge(model: nn.Module, split: str) -> dict[str, float]:
        found = []
        for document in books[split]:
            places = torch.linspace(0, len(document) - length - 1, windows).long().tolist()
            rows = torch.stack([document[p : p + length + 1] for p in places]).long()
            found.append(float(loss(model, rows)))
        return {"loss": statistics.fmean(found)}

    model = Transformer(256, plan["dim"], plan["layers"], plan["heads"])
    return model, batches(books["train"], plan["batch"], length, seed), loss, judge


def vision_task(plan: dict[str, Any], seed: int) -> tuple[nn.Module, Iterable, Loss, Judge]:
    """(model, batches, loss of a batch, judge of a split)."""
    data = digits()

    def loss(model: nn.Module, rows: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(rows[0]), rows[1])

    def judge(model: nn.Module, split: str) -> dict[str, float]:
        scores, labels = model(data[split][0]), data[split][1]
        right = (scores.argmax(-1) == labels).float().mean()
        return {"loss": float(F.cross_entropy(scores, labels)), "accuracy": float(right)}

    model = VisionTransformer(plan["dim"], plan["layers"], plan["heads"])
    return model, image_batches(*data["train"], plan["batch"], seed), loss, judge


TASKS = {"lm": language_task, "vit": vision_task}


def run_cell(
    task: str, plan: dict[str, Any], name: str, lr: float, rest_lr: float, setting: Setting,
    seed: int, split: str,
) -> dict[str, Any]:  # fmt: skip
    """Train once and judge on a split."""
    torch.manual_seed(seed)
    model, data, loss_of, judge = TASKS[task](plan, seed)
    optimizers = build(name, model, lr, rest_lr, setting)
    steps, ramp = plan["steps"], max(1, round(WARM * plan["steps"]))
    rates = [
        torch.optim.lr_scheduler.LambdaLR(o, lambda t: schedule(t, ramp, steps)) for o in optimizers
    ]
    losses: list[float] = []
    start = time.process_time()
    for rows in islice(data, steps):
        loss = loss_of(model, rows)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, rate in zip(optimizers, rates, strict=True):
            optimizer.step()
            rate.step()
            optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
    seconds = time.process_time() - start
    model.eval()
    with torch.inference_mode():
        judged = judge(model, split)
    return {
        "task": task, "optimizer": name, "lr": lr, "rest_lr": rest_lr, "setting": setting,
        "seed": seed, "split": split, "curve": thinned(losses),
        "train_loss": statistics.fmean(losses[-max(1, steps // 10) :]),
        **{f"{split}_{k}": v for k, v in judged.items()}, "cpu_seconds": seconds,
    }  # fmt: skip


def thinned(losses: list[float], window: int = 5) -> list[float]:
    """Means of ``window`` steps.

    Example:
        >>> thinned([1.0, 3.0, 5.0], window=2)
        [2.0, 5.0]
    """
    pieces = [losses[i : i + window] for i in range(0, len(losses), window)]
    return [round(statistics.fmean(piece), 4) for piece in pieces]


def tune(results: Results, task: str, plan: dict[str, Any], name: str, rest: float | None) -> tuple:
    """Search an optimizer's rate and setting, cell by cell."""

    def measure(lr: float, setting: Setting) -> float:
        cell = f"tune/{task}/{name}/{lr:g}/{json.dumps(setting)}"
        rest_lr = lr if rest is None else rest
        if not same(results.get(cell), lr, rest_lr, setting):
            row = run_cell(task, plan, name, lr, rest_lr, setting, TUNING_SEED, "validation")
            results.add(cell, row | {"tuning": True})
            print(f"  {cell}: {row['validation_loss']:.4f}", file=sys.stderr, flush=True)
        found = results.get(cell)
        assert found is not None
        value = found["validation_loss"]
        return value if isinstance(value, float) else math.inf  # NaN is stored as a string

    return search(ZOO[name], measure)


def same(row: dict[str, Any] | None, lr: float, rest_lr: float, setting: Setting) -> bool:
    """Whether a row was measured with these (the search may choose others when it goes on)."""
    wanted = [lr, rest_lr, json.loads(json.dumps(setting))]
    return row is not None and [row.get(k) for k in ("lr", "rest_lr", "setting")] == wanted


def summarise(results: Results, tasks: Iterable[str]) -> dict[str, Any]:
    """Mean and spread over seeds; steps to AdamW's last training loss."""
    summary: dict[str, Any] = {}
    for task in tasks:
        for name in ZOO:
            rows = results.rows(task=task, optimizer=name, tuning=False)
            if not rows:
                continue
            keys = [k for k in ("train_loss", "test_loss", "test_accuracy") if k in rows[0]]
            found = {k: statistics.fmean(r[k] for r in rows) for k in keys}
            found |= {f"{k}_seeds": [r[k] for r in rows] for k in keys}
            tried = len(results.rows(task=task, optimizer=name, tuning=True))
            found |= {"lr": rows[0]["lr"], "setting": rows[0]["setting"], "trials": tried}
            summary[f"{task}/{name}"] = found
    return summary


def plot(results: Results, tasks: list[str], path: Path) -> None:
    """Training loss over steps: mean of the seeds, smoothed over 15 steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(tasks), figsize=(6 * len(tasks), 4.4), squeeze=False)
    titles = {"lm": "byte LM on novels (nats per byte)", "vit": "ViT on digits (nats)"}
    for axis, task in zip(axes[0], tasks, strict=True):
        for name in ZOO:
            curves = [r["curve"] for r in results.rows(task=task, optimizer=name, tuning=False)]
            if not curves:
                continue
            mean = [statistics.fmean(values) for values in zip(*curves, strict=True)]
            smooth = [statistics.fmean(mean[max(0, i - 2) : i + 1]) for i in range(len(mean))]
            axis.plot([5 * (i + 1) for i in range(len(smooth))], smooth, label=name)
        axis.set(xlabel="step", ylabel="training loss", title=titles[task])
        if task == "lm":
            axis.set_ylim(top=3.2)
        else:
            axis.set_yscale("log")
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Tune, train, print and store."""
    parser = arguments(__doc__, "optimizers_loss", threads=1)
    parser.add_argument("--tasks", nargs="*", choices=tuple(TASKS), default=list(TASKS))
    parser.add_argument("--optimizers", nargs="*", choices=tuple(ZOO), default=list(ZOO))
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    plans = QUICK if args.quick else PLANS
    results = Results(
        out_path(args),
        question="Which optimizer has the least loss after equal steps?",
        settings={"plans": plans, "text": default_text(), "warm": WARM,
                  "tuning_seed": TUNING_SEED},
        seeds=list(range(args.seeds)),
        threads=args.threads,
        fresh=args.fresh,
    )  # fmt: skip
    for task in args.tasks:
        plan = plans[task]
        best = {"AdamW": tune(results, task, plan, "AdamW", None)}
        rest = best["AdamW"][0]
        for name in args.optimizers:
            best[name] = best.get(name) or tune(results, task, plan, name, rest)
        for seed in range(args.seeds):
            for name in args.optimizers:
                lr, setting = best[name]
                cell = f"final/{task}/{name}/seed{seed}"
                if same(results.get(cell), lr, rest, setting):
                    continue
                row = run_cell(task, plan, name, lr, rest, setting, seed, "test")
                results.add(cell, row | {"tuning": False})
                print(f"  {cell}: {row['test_loss']:.4f}", file=sys.stderr, flush=True)
        results.summarise(summarise(results, PLANS))
    summary = summarise(results, PLANS)
    table(
        "Loss after equal steps (means; test of every seed)",
        ("task / optimizer", "train", "test", "accuracy", "seeds", "rate", "setting", "trials"),
        [
            (key, s["train_loss"], s["test_loss"], s.get("test_accuracy"),
             " ".join(f"{v:.3f}" for v in s["test_loss_seeds"]), s["lr"], json.dumps(s["setting"]),
             s["trials"])
            for key, s in summary.items()
        ],
    )  # fmt: skip
    shown = [t for t in PLANS if any(key.startswith(t) for key in summary)]
    if shown and not args.quick:
        plot(results, shown, out_path(args).with_suffix(".png"))


if __name__ == "__main__":
    main()
