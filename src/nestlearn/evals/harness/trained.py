"""Experiments in which every system is trained from scratch on every task."""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from nestlearn.evals.harness.experiment import Experiment, Request, Scale
from nestlearn.evals.harness.fitting import fit
from nestlearn.evals.harness.results import Results, plain
from nestlearn.evals.harness.systems import SYSTEMS, Size, System, build
from nestlearn.evals.harness.task import TRAIN, VALIDATION, Batch, Task, score
from nestlearn.train.distributed import Distributed

TUNING_SEED = 1000
"""Settings are chosen with this seed; the final runs have seeds 0, 1, 2, ..."""
Losses = Iterable[Callable[[Any], torch.Tensor]]
"""Per step, from the model to the loss of the step's batch."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """How systems are trained at a scale.

    Attributes:
        size: of every system.
        steps, batch: optimizer steps, sequences in each.
        lrs, weight_decays: the grid every system is tuned on, for every task.
        seeds: final runs.
        systems: those compared by default.
        examples: in every test split and for validation.
        pool: training examples there are; None: new ones at every step.
        fields: of `HopeConfig`, for every system that knows them.
    """

    size: Size
    steps: int
    batch: int
    lrs: tuple[float, ...]
    weight_decays: tuple[float, ...] = (0.1,)
    seeds: int = 3
    systems: tuple[str, ...] = tuple(SYSTEMS)
    examples: int = 500
    pool: int | None = None
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class Trained(Experiment):
    """Tasks x systems: tuned on a validation split of a seed of its own, then run with others.

    A setting is chosen by the task's metric on the validation split, then by the loss there. Where
    the best learning rate is the smallest or largest of the grid, the table says so.

    Attributes:
        compared: the systems there are, by name.
    """

    compared: Mapping[str, System] = SYSTEMS
    shares_cells = True

    plans: Mapping[Scale, Plan]

    @property
    def plan(self) -> Plan:
        """Of this scale."""
        return self.plans[self.scale]

    @abstractmethod
    def tasks(self) -> dict[str, Task]:
        """The tasks of this scale, by name."""

    def plan_of(self, task: str) -> Plan:
        """The plan of one task, where it differs from the others' in size, steps or examples."""
        return self.plan

    def model(self, system: str, task: Task, plan: Plan) -> nn.Module:
        """A new model of a system: ``model(inputs, use_cache=False).logits`` are its answers."""
        fields = self.fields(system, plan)
        made: nn.Module = build(
            self.compared[system], plan.size, task.vocab_size, task.length, **fields
        )
        return made

    def fields(self, system: str, plan: Plan) -> dict[str, Any]:
        """What a system sets in `HopeConfig` here."""
        return {**plan.fields, **self.compared[system].fields}

    def settings(self) -> dict[str, Any]:
        """Everything but what may grow (systems, seeds, learning rates); what a system is made of
        stands in its rows."""
        plan = dataclasses.asdict(self.plan)
        for name in ("systems", "seeds", "lrs"):
            del plan[name]
        return plan

    # -- cells --------------------------------------------------------------------------------

    def stale(self, row: dict[str, Any]) -> bool:
        """Whether a system has other fields now than it was measured with, or is not compared."""
        if "system" not in row or "error" in row:
            return False
        if row["system"] not in self.compared:
            return True
        fields = self.fields(row["system"], self.plan_of(row["task"]))
        return bool(row.get("fields") != plain(fields))

    def due(self, results: Results, request: Request) -> dict[str, dict[str, Any]]:
        """Tuning of every system and task first; each one's final runs once it is tuned."""
        plan = self.plan
        tasks = request.pick("tasks", tuple(self.tasks()))
        systems = plan.systems
        if request.systems is not None:
            systems = request.pick("systems", tuple(self.compared))
        seeds = range(plan.seeds if request.seeds is None else request.seeds)
        grid = [{"lr": lr, "weight_decay": w} for lr in plan.lrs for w in plan.weight_decays]
        cells: dict[str, dict[str, Any]] = {}
        for task in tasks:
            for system in systems:
                fields = self.fields(system, self.plan_of(task))
                own = {"task": task, "system": system, "fields": fields, "device": request.device}
                open_ = {}
                for setting in grid if len(grid) > 1 else ():
                    name = f"tune/{task}/{system}/{named(setting)}"
                    if results.get(name) is None:
                        open_[name] = {**own, **setting, "seed": TUNING_SEED, "tuning": True}
                cells |= open_
                if open_:
                    continue
                best = self.chosen(results, task, system) if len(grid) > 1 else grid[0]
                if best is None:
                    continue
                for seed in seeds:
                    name = f"final/{task}/{system}/{named(best)}/seed{seed}"
                    if results.get(name) is None:
                        cells[name] = {**own, **best, "seed": seed, "tuning": False}
        return cells

    def measure(self, cell: dict[str, Any]) -> dict[str, Any]:
        """Train one model, and score it on every split."""
        plan, task = self.plan_of(cell["task"]), self.tasks()[cell["task"]]
        device = cell["device"]
        torch.manual_seed(cell["seed"])
        model = self.model(cell["system"], task, plan).to(device)
        found = self.train(model, task, cell)
        splits = (VALIDATION,) if cell["tuning"] else (VALIDATION, *task.splits)
        row: dict[str, Any] = {k: v for k, v in cell.items() if k != "device"}
        scored = self.kept.get("scores") or {"splits": {}, "seconds": 0.0}
        began = time.perf_counter() - scored["seconds"]
        for split in splits:
            if split not in scored["splits"]:
                seed = seed_of(task, split)
                scored["splits"][split] = self.scores(model, task, plan, split, seed)
                scored["seconds"] = time.perf_counter() - began
                self.kept.put("scores", lambda: scored, now=True)
        row |= scored["splits"]
        if not cell["tuning"]:
            row |= self.examine(model, cell)
        losses = found["loss"]
        return row | {
            "parameters": sum({id(p): p.numel() for p in model.parameters()}.values()),
            "loss": losses[:: max(1, len(losses) // 50)],
            "train_seconds": found["seconds"],
            "test_seconds": time.perf_counter() - began,
        }

    def train(self, model: Any, task: Task, cell: dict[str, Any]) -> dict[str, Any]:
        """Train a model in place; ``loss`` per step and ``seconds``."""
        plan, generator = self.plan_of(cell["task"]), torch.Generator().manual_seed(cell["seed"])
        together = Distributed.start(cell["device"])
        data = training(task, plan, generator, cell["device"], together)
        data = self.guided(model, cell, plan, data)
        decay = cell["weight_decay"]
        return fit(
            model, data, cell["lr"], plan.steps, weight_decay=decay, together=together,
            kept=self.kept,
        )  # fmt: skip

    def guided(self, model: Any, cell: dict[str, Any], plan: Plan, data: Losses) -> Losses:
        """The losses of training, of a system whose settings change on the way."""
        return data

    def scores(self, model: Any, task: Task, plan: Plan, split: str, seed: int) -> dict[str, Any]:
        """Scores of a model on a split; the task's metric is among them."""
        batch = task.draw(split, plan.examples, torch.Generator().manual_seed(seed))
        device = next(model.parameters()).device
        return dataclasses.asdict(score(model, to(batch, str(device))))

    def examine(self, model: Any, cell: dict[str, Any]) -> dict[str, Any]:
        """What else the row of a final run says about the trained model."""
        return {}

    def summary(self, row: dict[str, Any]) -> str:
        """Scores of the splits."""
        metric = self.tasks()[row["task"]].metric
        found = {k: v[metric] for k, v in row.items() if isinstance(v, dict) and metric in v}
        if metric == "loss":
            return ", ".join(f"{k} {v:.3f} nats" for k, v in found.items())
        return ", ".join(f"{k} {100 * v:.1f}" for k, v in found.items())

    # -- reading results ----------------------------------------------------------------------

    def chosen(self, results: Results, task: str, system: str) -> dict[str, Any] | None:
        """The best setting of a system on a task; None if none was measured."""
        metric = self.tasks()[task].metric
        rows = [
            r
            for r in results.rows(task=task, system=system, tuning=True)
            if "error" not in r and r["lr"] in self.plan.lrs
        ]
        if not rows:
            return None
        sign = -1 if metric == "loss" else 1
        best = max(rows, key=lambda r: (sign * r[VALIDATION][metric], -r[VALIDATION]["loss"]))
        return {"lr": best["lr"], "weight_decay": best["weight_decay"]}

    def finals(self, results: Results, task: str, system: str) -> list[dict[str, Any]]:
        """Final rows of the setting that is best now."""
        rows = [r for r in results.rows(task=task, system=system, tuning=False)
                if "error" not in r]  # fmt: skip
        best = self.chosen(results, task, system)
        if best is not None:
            rows = [r for r in rows if all(r[k] == v for k, v in best.items())]
        return rows

    def mean(self, results: Results, task: str, system: str, split: str) -> float | None:
        """Mean over seeds of the task's metric on a split, in percent (a loss as it is)."""
        metric = self.tasks()[task].metric
        rows = self.finals(results, task, system)
        scale = 1 if metric == "loss" else 100
        return scale * statistics.fmean(r[split][metric] for r in rows) if rows else None

    def systems(self, results: Results) -> list[str]:
        """Those with final rows, in the order of the paper's tables."""
        return [s for s in self.compared if results.rows(system=s, tuning=False)]


def seed_of(task: Task, split: str) -> int:
    """Validation and test examples are the same for all systems and seeds."""
    return 10_000 + (VALIDATION, *task.splits).index(split)


def training(
    task: Task,
    plan: Plan,
    generator: torch.Generator,
    device: str,
    together: Distributed | None = None,
) -> Losses:
    """Losses of a plan's batches: new examples, or rows of a pool in a new order at every pass.

    Of several processes each has its rows of the batch that one process would have, with a loss
    whose mean over processes is the batch's.
    """
    together = together or Distributed()
    pool = None if plan.pool is None else task.draw(TRAIN, plan.pool, generator)
    order = torch.empty(0, dtype=torch.long)
    for step in range(plan.steps):
        if pool is None:
            batch = task.at(step / plan.steps).draw(TRAIN, plan.batch, generator)
        else:
            while len(order) < plan.batch:
                order = torch.cat([order, torch.randperm(len(pool), generator=generator)])
            rows, order = order[: plan.batch], order[plan.batch :]
            batch = pool.rows(rows)
        own = batch.rows(together.share(len(batch))) if together.world > 1 else batch
        weight = together.world * int(own.asked.sum()) / max(1, int(batch.asked.sum()))
        yield functools.partial(_loss, to(own, device), weight)


def _loss(batch: Batch, weight: float, model: Any) -> torch.Tensor:
    out = model(batch.inputs, use_cache=False)
    if not weight:
        return out.logits.sum() * 0.0
    loss = batch.loss(out.logits)
    more = getattr(out, "write_loss", None)
    return (loss if more is None else loss + more / batch.asked.sum()) * weight


def to(batch: Batch, device: str) -> Batch:
    """The batch on a device."""
    return batch.each(lambda part: part.to(device))


def named(setting: Mapping[str, Any]) -> str:
    """A setting as part of a cell's name.

    Example:
        >>> named({"lr": 0.001, "weight_decay": 0.1})
        'lr=0.001 weight_decay=0.1'
    """
    return " ".join(f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}"
                    for k, v in setting.items()) or "-"  # fmt: skip
