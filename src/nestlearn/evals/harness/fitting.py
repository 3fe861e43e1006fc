"""Training a model on batches: one loop for every system, with the levels' clocks."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from nestlearn.evals.harness.kept import Kept
from nestlearn.optim.groups import level_groups
from nestlearn.optim.multirate import MultiRate
from nestlearn.train.distributed import Distributed


def fit(
    model: nn.Module,
    losses: Iterable[Callable[[nn.Module], Tensor]],
    lr: float,
    steps: int,
    *,
    weight_decay: float = 0.1,
    betas: tuple[float, float] = (0.9, 0.95),
    clip: float = 1.0,
    warm: float = 0.05,
    together: Distributed | None = None,
    report: Callable[[int, float, float], None] | None = None,
    kept: Kept | None = None,
) -> dict[str, Any]:
    """AdamW through the levels' clocks, linear warm-up and cosine to a tenth of ``lr``.

    Args:
        model: trained in place.
        losses: per step, a function from the model to the loss of the step's batch.
        lr: largest learning rate, of a level whose ``lr_scale`` is 1.
        steps: optimizer steps.
        weight_decay, betas: of AdamW. clip: largest norm of the gradient.
        warm: share of the steps that the rate takes to rise.
        together: processes that have a share of every batch each, whose mean loss is the batch's.
        report: called after every step with its number, loss and gradient norm.
        kept: where training is kept from time to time, and goes on from, bit for bit. ``losses``
            begins at the first step all the same: what was done before is drawn and passed over.

    Returns:
        ``loss`` and ``norm`` (of the gradient, before clipping) per step; ``seconds``.

    Raises:
        ValueError: the loss is not finite.
    """
    together = together or Distributed()
    optimizer = MultiRate(
        level_groups(model, lr, weight_decay),
        functools.partial(torch.optim.AdamW, lr=lr, betas=betas),
    )
    ramp = max(1, round(warm * steps))

    def scale(step: int) -> float:
        if step < ramp:
            return (step + 1) / ramp
        return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - ramp) / max(1, steps - ramp)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, scale)
    found: list[float] = []
    norms: list[float] = []
    kept = kept or Kept()
    before = together.broadcast(kept.get("training") if together.main else None)
    if before is not None:
        model.load_state_dict(before["model"])
        optimizer.load_state_dict(before["optimizer"])
        schedule.load_state_dict(before["schedule"])
        found, norms = before["loss"], before["norm"]
    begun, start = len(found), time.perf_counter() - (before["seconds"] if before else 0.0)

    def reached() -> dict[str, Any]:
        return {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "schedule": schedule.state_dict(),
            "random": torch.get_rng_state(),
            "loss": found,
            "norm": norms,
            "seconds": time.perf_counter() - start,
        }

    model.train()
    for step, compute in zip(range(steps), losses, strict=False):
        if step < begun:
            continue
        if before is not None and step == begun:
            torch.set_rng_state(before["random"])
        loss = compute(model)
        loss.backward()
        total = loss.detach().clone()
        shared = [p.grad for p in model.parameters() if p.grad is not None]
        together.average([*shared, total])
        norm = nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        found.append(float(total))
        norms.append(float(norm))
        if not math.isfinite(found[-1]):
            raise ValueError(f"the loss was {found[-1]} at step {step}; use a smaller lr than {lr}")
        if report is not None:
            report(step, found[-1], norms[-1])
        if together.main:
            kept.put("training", reached, now=step == steps - 1)
    return {"loss": found, "norm": norms, "seconds": time.perf_counter() - start}
