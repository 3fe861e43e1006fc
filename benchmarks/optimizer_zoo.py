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
            its own rates, again until the best is inside. As many for every optimizer.
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
    """The rate and setting with the least value of ``measure``, by the procedure of `Entry`.

    Example:
        >>> entry = Entry(_adamw, (1.0, 2.0, 4.0), ({"b": 1}, {"b": 2}))
        >>> search(entry, lambda lr, setting: abs(lr - 16) - setting.get("b", 0))
        (16.0, {'b': 2})
    """

    def climb(rates: tuple[float, ...], setting: Setting) -> tuple[float, float, Setting]:
        values = {lr: measure(lr, setting) for lr in rates}
        for _ in range(4):
            best = min(values, key=lambda lr: values[lr])
            if best not in (min(values), max(values)):
                break
            further = best / 2 if best == min(values) else best * 2
            values[further] = measure(further, setting)
        best = min(values, key=lambda lr: values[lr])
        return values[best], best, setting

    found = [climb(entry.rates, {})]
    lr = found[0][1]
    found += [(measure(lr, setting), lr, setting) for setting in entry.variants]
    _, lr, setting = min(found, key=lambda item: item[0])
    if setting:
        found.append(climb((lr / 2, lr, lr * 2), setting))
    _, lr, setting = min(found, key=lambda item: item[0])
    return lr, setting
