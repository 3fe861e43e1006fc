"""The training loop, with its levels in plain sight.

    every step:   gradient of this step's batch, clipped
    every level:  gather that gradient; if the level's clock is due, update its parameters

The second line is ``optimizer.step()`` of `MultiRate` (SPEC §6, Eq. 70-71).
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nestlearn.interrupt import Interrupt
from nestlearn.nn.compiled import compile_model
from nestlearn.optim.groups import describe_levels, level_groups
from nestlearn.optim.multirate import MultiRate
from nestlearn.train.checkpoint import (
    find_checkpoint,
    load_checkpoint,
    random_state,
    save_checkpoint,
    save_model,
    set_random_state,
)
from nestlearn.train.config import TrainConfig
from nestlearn.train.data import Blocks
from nestlearn.train.distributed import Distributed
from nestlearn.train.logging import RunLog
from nestlearn.train.nested import NestedLevels
from nestlearn.train.progress import Progress
from nestlearn.train.tokenizers import token_bytes

_MAX_SKIPPED = 10


class TrainingStopped(ValueError):
    """Training cannot go on; the message says why and what to do."""


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Attributes:
        step: last step done. interrupted: stopped by a signal, after saving.
        losses: training loss of each step of this call (nats per token).
        val_loss: held-out loss (nats per token) at the last evaluation, None if there was none;
            best its smallest value.
        checkpoint: last checkpoint written or continued from.
    """

    step: int
    interrupted: bool
    losses: list[float]
    val_loss: float | None
    best: float | None
    checkpoint: Path | None


class Trainer:
    """Trains a causal language model on blocks of tokens.

    Args:
        model: a Hugging Face causal LM: ``model(input_ids=, labels=).loss``.
        blocks: training and held-out sequences.
        config: settings.
        tokenizer: saved beside the weights; gives bits per byte.
        optimizer: default `MultiRate` over the model's levels with AdamW inside. Any optimizer
            works; its groups' learning rates are set as ``lr / config.lr`` of the schedule.
        processes: default: those of ``torchrun``, or this one alone.
        progress: where lines and the progress bar go.

    Example:
        >>> trainer = Trainer(model, Blocks(corpus, 128), TrainConfig(out="runs/a", seq_len=128))
        >>> trainer.fit().val_loss
    """

    def __init__(
        self,
        model: PreTrainedModel,
        blocks: Blocks,
        config: TrainConfig,
        tokenizer: PreTrainedTokenizerBase | None = None,
        optimizer: Optimizer | None = None,
        processes: Distributed | None = None,
        progress: Progress | None = None,
    ) -> None:
        if blocks.seq_len != config.seq_len:
            raise ValueError(f"blocks have seq_len {blocks.seq_len}, config has {config.seq_len}")
        self.processes = processes or Distributed.start(config.device)
        self.rows = self.processes.share(config.batch_size)
        if (self.rows.stop - self.rows.start) % config.accumulate:
            raise ValueError(
                f"batch_size {config.batch_size} over {self.processes.world} processes cannot be "
                f"split into accumulate={config.accumulate} micro-batches; use a multiple of "
                f"{self.processes.world * config.accumulate}"
            )
        self.model = model
        nn.Module.to(model, self.processes.device)
        self.blocks, self.config, self.tokenizer = blocks, config, tokenizer
        self.progress = progress or Progress(visible=self.processes.main)
        groups = level_groups(self.model, config.lr, config.weight_decay)
        adamw = functools.partial(torch.optim.AdamW, lr=config.lr, betas=config.betas)
        self.optimizer = optimizer or MultiRate(groups, inner=adamw)
        self.nested = NestedLevels(self.model)
        self.rates = [group["lr"] / config.lr for group in self.optimizer.param_groups]
        if optimizer is None:
            self.progress.line(describe_levels(groups))
        # The module that is called: compiled and parallel around the same parameters.
        called = compile_model(self.model) if config.compile else self.model
        self.called = self.processes.wrap(called)
        self.token_bytes = None
        if tokenizer is not None:
            self.token_bytes = torch.from_numpy(token_bytes(tokenizer))
        self.out = Path(config.out)
        self.step = 0
        self.skipped = 0  # steps left out in a row
        self.best = math.inf
        self.val_loss: float | None = None
        self.checkpoint: Path | None = None

    # -- one run ------------------------------------------------------------------------------

    def fit(self) -> TrainResult:
        """Train from the start or the last checkpoint to ``config.steps``.

        Raises:
            ValueError: a checkpoint that does not fit.
            TrainingStopped: losses or gradients that are not finite (see ``config.nonfinite``).
        """
        config, losses = self.config, []
        torch.manual_seed(config.seed + self.processes.rank)
        self._resume()
        with Interrupt(self.progress.line) as interrupt, _Log(self) as log:
            self.progress.start(config.steps, self.step)
            interrupted = False
            while self.step < config.steps and not interrupted:
                began = time.perf_counter()
                self.step += 1
                rate = self._set_rates()
                loss, norm, interrupted = self._gradient(interrupt)
                losses.append(loss)
                finite = math.isfinite(loss) and math.isfinite(norm)
                if finite:
                    self.optimizer.step()  # the levels that are due are updated
                    self.nested.step()  # those nested in a slower one that was due restart
                    self.skipped = 0
                else:
                    self._nonfinite(loss, norm)
                self.model.zero_grad()

                seconds = time.perf_counter() - began
                fired = getattr(self.optimizer, "fired", ()) if finite else ()
                if self.step % config.log_every == 0 or self.step == 1 or not finite:
                    log.write(
                        "step",
                        self.step,
                        loss=loss,
                        grad_norm=norm,
                        lr=rate,
                        tokens=self.step * config.batch_size * config.seq_len,
                        tokens_per_second=config.batch_size * config.seq_len / seconds,
                        levels=list(fired),
                    )
                self.progress.update(self.step, loss, rate, fired)
                last = self.step == config.steps
                if self.step % config.eval_interval == 0 or last:
                    self._evaluate_and_keep_best(log)
                if self.step % config.save_interval == 0 or last or interrupted:
                    self._save()
            self.progress.stop()
        if self.processes.main and losses:
            save_model(self.out / "final", self.model, self.tokenizer)
        self._say_end(interrupted)
        best = None if math.isinf(self.best) else self.best
        return TrainResult(self.step, interrupted, losses, self.val_loss, best, self.checkpoint)

    def _gradient(self, interrupt: Interrupt) -> tuple[float, float, bool]:
        """Clipped gradient of this step's batch: its loss, its norm, and whether to stop after."""
        config = self.config
        first = (self.step - 1) * config.batch_size
        batch = self.blocks.train(first, config.batch_size)[self.rows]
        total = torch.zeros((), device=self.processes.device)
        micro = batch.chunk(config.accumulate)
        self.called.train()
        for i, rows in enumerate(micro):
            if isinstance(self.called, nn.parallel.DistributedDataParallel):
                self.called.require_backward_grad_sync = i == len(micro) - 1
            loss = self._loss(rows) / len(micro)
            loss.backward()
            total += loss.detach()
        learning = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = nn.utils.clip_grad_norm_(learning, config.clip)
        # One exchange: the loss of the whole batch, and whether any process was asked to stop.
        flags = torch.stack([total.float(), total.new_tensor(interrupt.requested).float()])
        mean, stop = self.processes.sum(flags).tolist()
        return mean / self.processes.world, float(norm), stop > 0

    def _loss(self, rows: Tensor) -> Tensor:
        """Mean next-token loss (nats) of sequences ``(B, T)``."""
        rows = rows.to(self.processes.device, non_blocking=True)
        with torch.autocast(
            self.processes.device.type, torch.bfloat16, enabled=self.config.dtype == "bf16"
        ):
            loss: Tensor = self.called(input_ids=rows, labels=rows, use_cache=False).loss
        return loss

    def _set_rates(self) -> float:
        rate = self.config.learning_rate(self.step)
        for group, factor in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        return rate

    def _nonfinite(self, loss: float, norm: float) -> None:
        """Leave this step out, or stop: no level is updated and no clock moves."""
        self.skipped += 1
        what = f"loss is {loss}" if not math.isfinite(loss) else f"gradient norm is {norm}"
        advice = "lower --lr, raise --warmup or use --dtype fp32"
        if self.config.nonfinite == "stop" or self.skipped > _MAX_SKIPPED:
            times = f" ({self.skipped} steps in a row)" if self.skipped > 1 else ""
            raise TrainingStopped(
                f"step {self.step}: {what}{times}; stopped, the last checkpoint is untouched; "
                f"{advice}"
            )
        self.progress.line(
            f"step {self.step}: {what}; step left out ({self.skipped} of at most {_MAX_SKIPPED} "
            f"in a row); if it happens again {advice}"
        )

    # -- evaluation ---------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Held-out loss (nats per token), perplexity and, given a tokenizer, bits per byte."""
        rows = self.blocks.val(self.config.eval_sequences)
        mine = rows[self.processes.rank :: self.processes.world]
        size = max(1, self.config.batch_size // self.processes.world // self.config.accumulate)
        called, self.called = self.called, self.model  # DDP expects a backward; not here
        self.called.eval()
        total = torch.zeros((), dtype=torch.float64)
        for part in mine.split(size):
            total += self._loss(part).double().cpu() * part[:, 1:].numel()
        self.called = called
        nats = float(self.processes.sum(total.float().reshape(1)))
        loss = nats / rows[:, 1:].numel()
        result = {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
        if self.token_bytes is not None:
            count = int(self.token_bytes[rows[:, 1:]].sum())
            result["bits_per_byte"] = nats / math.log(2) / max(1, count)
        return result

    def _evaluate_and_keep_best(self, log: RunLog) -> None:
        result = self.evaluate()
        self.val_loss = result["loss"]
        better = self.val_loss < self.best
        if better:
            self.best = self.val_loss
            if self.processes.main:
                save_model(self.out / "best", self.model, self.tokenizer)
        log.write("eval", self.step, **result, best=better)
        self.progress.evaluated(self.step, result, better)

    # -- saving and resuming ------------------------------------------------------------------

    def _save(self) -> None:
        randoms = self.processes.gather(random_state())
        if self.processes.main:
            state = {
                "step": self.step,
                "skipped": self.skipped,
                "best": self.best,
                "val_loss": self.val_loss,
                "data": self.blocks.digest,
                "batch_size": self.config.batch_size,
                "random": randoms,
                "optimizer": self.optimizer.state_dict(),
                "nested": self.nested.state_dict(),
                "config": self.config.to_dict(),
            }
            root = self.out / "checkpoints"
            self.checkpoint = save_checkpoint(
                root, self.step, state, self.model, self.tokenizer, self.config.keep
            )
        self.processes.barrier()

    def _resume(self) -> None:
        folder = find_checkpoint(self.out / "checkpoints", self.config.resume)
        if folder is None:
            return
        state = load_checkpoint(folder, self.model)
        for name, mine in {
            "data": self.blocks.digest,
            "batch_size": self.config.batch_size,
        }.items():
            if state[name] != mine:
                raise ValueError(
                    f"{folder} was trained with other {name} ({state[name]}, now {mine}): data, "
                    "tokenizer, batch size, sequence length and seed must stay the same to "
                    "continue; use another --out for a new run"
                )
        self.optimizer.load_state_dict(state["optimizer"])
        self.nested.load_state_dict(state["nested"])
        self.step, self.skipped = state["step"], state["skipped"]
        self.best, self.val_loss, self.checkpoint = state["best"], state["val_loss"], folder
        if len(state["random"]) == self.processes.world:
            set_random_state(state["random"][self.processes.rank])
        else:
            self.progress.line(
                f"{len(state['random'])} processes saved this run, {self.processes.world} continue "
                "it: their random generators start anew"
            )
        self.progress.line(f"continuing from {folder.name} of {self.config.steps} steps")
        changed = [
            f"{name} {state['config'][name]} -> {value}"
            for name, value in self.config.to_dict().items()
            if name in ("steps", "lr", "min_lr", "warmup", "weight_decay", "clip", "dtype")
            and state["config"][name] != value
        ]
        if changed:
            self.progress.line("settings changed since: " + ", ".join(changed))

    def _say_end(self, interrupted: bool) -> None:
        if interrupted:
            self.progress.line(
                f"interrupted: step {self.step} is saved in {self.checkpoint}; the same command "
                "continues there"
            )
        elif self.checkpoint is not None:
            self.progress.line(f"done: {self.step} steps, model in {self.out / 'final'}")


class _Log:
    """The run's log in rank 0, a silent one elsewhere."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._log: RunLog | None = None

    def __enter__(self) -> Any:
        t = self._trainer
        if t.processes.main:
            self._log = RunLog(t.out, t.config.log, t.config.to_dict(), t.step)
        return self

    def write(self, event: str, step: int, **values: Any) -> None:
        if self._log is not None:
            self._log.write(event, step, **values)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._log is not None:
            self._log.close()
