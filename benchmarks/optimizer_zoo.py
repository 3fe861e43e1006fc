"""The optimizers whose training losses are compared: ours, torch's and a peer's, built alike.

All of them get the hidden matrices of a model. Everything else (embeddings, head, norms, biases)
goes to AdamW at one and the same rate, because that is how Muon, AdaMuon and M3 are meant to be
used, and so that the comparison is about one thing.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from peers import use_optimizers
from torch import Tensor, nn

DECAY = 0.1  # decoupled weight decay of the matrices, for all
Setting = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Entry:
    """An optimizer for matrices and what is searched.

    Attributes:
        build: ``(matrices, lr, **setting) -> optimizer``.
        rates: first grid of rates; it grows by factors of 2 while the best is at its edge.
        variants: other settings than the default, tried at the best rate; the best of all then gets
            the two neighbouring rates. The same number for every optimizer.
    """

    build: Callable[..., torch.optim.Optimizer]
    rates: tuple[float, ...]
    variants: tuple[Setting, ...]


def _adamw(matrices: list[Tensor], lr: float, **setting: Any) -> torch.optim.Optimizer:
    given = {"betas": (0.9, 0.95)} | setting
    return torch.optim.AdamW(matrices, lr=lr, weight_decay=DECAY, **given)


def _muon(matrices: list[Tensor], lr: float, **setting: Any) -> torch.optim.Optimizer:
    given = {"adjust_lr_fn": "match_rms_adamw"} | setting
    return torch.optim.Muon(matrices, lr=lr, weight_decay=DECAY, **given)


def _adamuon(matrices: list[Tensor], lr: float, **setting: Any) -> torch.optim.Optimizer:
    use_optimizers()
    from pytorch_optimizer import AdaMuon

    given = {"betas": (0.95, 0.95)} | setting
    return AdaMuon([{"params": matrices, "use_muon": True}], lr=lr, weight_decay=DECAY, **given)


def _m3(matrices: list[Tensor], lr: float, **setting: Any) -> torch.optim.Optimizer:
    from nestlearn.optim import M3

    group = {"params": matrices, "algorithm": "m3"}
    return M3([group], lr=lr, weight_decay=DECAY, **setting)


ZOO: dict[str, Entry] = {
    "AdamW": Entry(
        _adamw,
        (2e-3, 4e-3, 8e-3),
        ({"betas": (0.9, 0.99)}, {"betas": (0.8, 0.95)}),
    ),
    "Muon": Entry(
        _muon,
        (4e-3, 8e-3, 1.6e-2),
        ({"momentum": 0.9}, {"momentum": 0.8}),
    ),
    "AdaMuon": Entry(
        _adamuon,
        (4e-3, 8e-3, 1.6e-2),
        ({"betas": (0.9, 0.95)}, {"betas": (0.8, 0.95)}),
    ),
    "M3": Entry(
        _m3,
        (4e-3, 8e-3, 1.6e-2),
        ({"betas": (0.9, 0.95, 0.9)}, {"betas": (0.8, 0.95, 0.9)}),
    ),
}


def build(
    name: str, model: nn.Module, lr: float, rest_lr: float, setting: Setting
) -> list[torch.optim.Optimizer]:
    """The optimizers of a model: one for its matrices, AdamW for the rest."""
    from nestlearn.optim import split_parameters

    split = split_parameters(model)
    matrices = [p for _, p in split.matrices]
    rest = [p for _, p in (*split.kernels, *split.embeddings, *split.vectors)]
    plain = torch.optim.AdamW(rest, lr=rest_lr, betas=(0.9, 0.95), weight_decay=0.0)
    return [ZOO[name].build(matrices, lr, **setting), plain]


def schedule(step: int, ramp: int, steps: int) -> float:
    """Share of the rate at a step: linear warm-up, then a cosine down to a tenth.

    Example:
        >>> [round(schedule(t, 2, 6), 3) for t in (0, 1, 2, 4, 6)]
        [0.5, 1.0, 1.0, 0.55, 0.1]
    """
    if step < ramp:
        return (step + 1) / ramp
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - ramp) / max(1, steps - ramp)))


def search(entry: Entry, measure: Callable[[float, Setting], float]) -> tuple[float, Setting]:
    """The rate and setting with the least value of ``measure``, by the procedure of `Entry`."""
    values = {lr: measure(lr, {}) for lr in entry.rates}
    while len(values) < len(entry.rates) + 4:
        best = min(values, key=lambda lr: values[lr])
        if best == min(values):
            values[best / 2] = measure(best / 2, {})
        elif best == max(values):
            values[best * 2] = measure(best * 2, {})
        else:
            break
    lr = min(values, key=lambda lr: values[lr])
    found = [(values[lr], lr, {}), *((measure(lr, v), lr, v) for v in entry.variants)]
    _, _, setting = min(found, key=lambda item: item[0])
    if setting:
        found += [(measure(r, setting), r, setting) for r in (lr / 2, lr * 2)]
    _, lr, setting = min(found, key=lambda item: item[0])
    return lr, setting
