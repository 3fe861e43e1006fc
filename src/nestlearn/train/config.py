"""Settings of a training run."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

SINKS = ("tensorboard", "trackio", "wandb")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a run besides the model and the data.

    Attributes:
        out: folder for checkpoints, log and final model.
        steps: optimizer steps (one step = one update of the fastest level).
        batch_size: sequences per optimizer step, over all processes and micro-batches.
        seq_len: tokens per sequence.
        accumulate: micro-batches per step and process (splits ``batch_size`` to save memory).
        lr: peak learning rate; it rises linearly over ``warmup`` steps, then falls as a cosine to
            ``lr * min_lr``. warmup None: 5% of the steps.
        weight_decay, betas: AdamW's, in every level.
        clip: largest gradient norm.
        dtype: ``"fp32"`` or ``"bf16"`` (autocast; weights and optimizer stay fp32).
        compile: run the model through ``torch.compile``.
        device: ``"auto"``, ``"cpu"``, ``"cuda"``, ...
        seed: of initialisation, shuffling and everything random.
        eval_every, save_every: steps between two evaluations, two checkpoints; None: ten of each
            per run. eval_sequences: held-out sequences per evaluation.
        keep: checkpoints kept (the best model is kept besides).
        log_every: steps between two log records.
        log: further sinks, of tensorboard, trackio, wandb.
        resume: ``"auto"`` (continue if ``out`` has checkpoints), ``"never"`` or a path.
        nonfinite: ``"skip"`` leaves out a step whose loss or gradient is not finite (at most ten
            in a row), ``"stop"`` ends the run at the first; either prints one line.

    Raises:
        ValueError: a value that makes no sense, saying which do.

    Example:
        >>> TrainConfig(out="runs/a", steps=200).warmup_steps
        10
    """

    out: str
    steps: int = 1000
    batch_size: int = 16
    seq_len: int = 256
    accumulate: int = 1
    lr: float = 2e-3
    min_lr: float = 0.1
    warmup: int | None = None
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    dtype: str = "fp32"
    compile: bool = False
    device: str = "auto"
    seed: int = 0
    eval_every: int | None = None
    eval_sequences: int = 64
    save_every: int | None = None
    keep: int = 2
    log_every: int = 10
    log: tuple[str, ...] = ()
    resume: str = "auto"
    nonfinite: str = "skip"

    def __post_init__(self) -> None:
        for name in [
            "steps",
            "batch_size",
            "accumulate",
            "eval_every",
            "eval_sequences",
            "save_every",
            "keep",
            "log_every",
        ]:
            value = getattr(self, name)
            optional = name in ("eval_every", "save_every")
            _require((optional and value is None) or _whole(value, 1), name, value, "a number >= 1")
        _require(_whole(self.seq_len, 2), "seq_len", self.seq_len, "a number >= 2")
        _require(self.warmup is None or _whole(self.warmup, 0), "warmup", self.warmup, "at least 0")
        for name in ("lr", "clip"):
            value = getattr(self, name)
            _require(math.isfinite(value) and value > 0, name, value, "a number above 0")
        _require(0 <= self.min_lr <= 1, "min_lr", self.min_lr, "between 0 and 1 (a part of lr)")
        _require(self.weight_decay >= 0, "weight_decay", self.weight_decay, "at least 0")
        _require(all(0 <= b < 1 for b in self.betas), "betas", self.betas, "two numbers in [0, 1)")
        _require(self.dtype in ("fp32", "bf16"), "dtype", self.dtype, "fp32 or bf16")
        _require(self.nonfinite in ("skip", "stop"), "nonfinite", self.nonfinite, "skip or stop")
        for sink in self.log:
            _require(sink in SINKS, "log", sink, f"taken from {', '.join(SINKS)}")
        _require(bool(self.out), "out", self.out, "a folder")
        _require(bool(self.resume), "resume", self.resume, "auto, never or a checkpoint's path")
        _require(
            self.batch_size % self.accumulate == 0,
            "batch_size",
            self.batch_size,
            f"a multiple of accumulate={self.accumulate}",
        )

    @property
    def warmup_steps(self) -> int:
        """Steps over which the learning rate rises."""
        return self.warmup if self.warmup is not None else self.steps // 20

    @property
    def eval_interval(self) -> int:
        """Steps between two evaluations."""
        return self.eval_every or max(1, self.steps // 10)

    @property
    def save_interval(self) -> int:
        """Steps between two checkpoints."""
        return self.save_every or max(1, self.steps // 10)

    def learning_rate(self, step: int) -> float:
        """Learning rate of step 1, 2, ...: linear warm-up, then cosine to ``lr * min_lr``."""
        if step <= self.warmup_steps:
            return self.lr * step / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        return self.lr * (self.min_lr + (1 - self.min_lr) * cosine)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return dataclasses.asdict(self)


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _require(ok: bool, name: str, value: Any, expected: str) -> None:
    if not ok:
        raise ValueError(f"{name} must be {expected}, got {value!r}")
