"""From a model to the parameter groups of its levels."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from nestlearn.levels.clock import NEVER

_UNDECAYED = ("norm", "bias", "gain", "logit", "initial")


def level_groups(model: nn.Module, lr: float, weight_decay: float = 0.1) -> list[dict[str, Any]]:
    """Parameter groups for `MultiRate`: one level per update period found in the model (SPEC §6).

    Every module that offers ``level_parameters() -> {name: parameters}`` and ``levels`` (each with
    ``name``, ``period`` in optimizer steps and ``lr_scale``; `nestlearn.nn.ContinuumMemory` does)
    has its parameters put on their level's period; everything else has period 1. Equal periods are
    one level, whatever layer they come from (Def. 2: a level is a frequency).

    Within a level, weight decay is applied to matrices only. Not decayed: tensors of fewer than two
    dimensions, embeddings and a head tied to them (rows of rare tokens would shrink between their
    updates), and what is named a norm, bias, gain, logit or initial state: gains are a scale even
    where they have a head axis, and what a memory's meta-learned initial state forgets is decided
    by its own retention alpha.

    A module with a number ``lr_scale`` has its own share of the learning rate for its parameters:
    the meta-learned initial states and gates of self-modifying memories learn at a quarter.

    Args:
        model: any module; frozen parameters and levels of period ``NEVER`` are left out.
        lr: learning rate of a level whose ``lr_scale`` is 1.
        weight_decay: decay of the groups that have any.

    Returns:
        Groups ``{"params", "level", "period", "lr", "weight_decay"}``, fastest level first.

    Raises:
        ValueError: one parameter on two periods, or no trainable parameter.

    Example:
        >>> groups = level_groups(nn.Linear(2, 2), lr=1e-3)
        >>> [(g["level"], g["weight_decay"]) for g in groups]
        [('every 1', 0.1), ('every 1', 0.0)]
    """
    clocks = _clocks(model)
    embeddings = {
        p for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters(False)
    }
    slower = {
        p: share
        for module in model.modules()
        if isinstance(share := getattr(module, "lr_scale", None), float)
        for p in module.parameters()
    }
    groups: dict[tuple[int, float, bool], list[Tensor]] = {}
    for name, p in model.named_parameters():
        period, scale = clocks.get(p, (1, 1.0))
        scale *= slower.get(p, 1.0)
        if p.requires_grad and period != NEVER:
            plain = p.ndim < 2 or p in embeddings or any(word in name for word in _UNDECAYED)
            groups.setdefault((period, scale, plain), []).append(p)
    if not groups:
        raise ValueError("the model has no trainable parameter; set requires_grad on some")
    return [
        {
            "params": groups[period, scale, plain],
            "level": f"every {period}",
            "period": period,
            "lr": lr * scale,
            "weight_decay": 0.0 if plain else weight_decay,
        }
        for period, scale, plain in sorted(groups)
    ]


def _clocks(model: nn.Module) -> dict[Tensor, tuple[int, float]]:
    """Parameter to (period, learning-rate scale), for those that are on a level of their own."""
    clocks: dict[Tensor, tuple[int, float]] = {}
    for name, module in model.named_modules():
        offers = getattr(module, "level_parameters", None)
        if not callable(offers) or not hasattr(module, "levels"):
            continue
        levels: Any = module.levels
        own = {level.name: (level.period, level.lr_scale) for level in levels}
        for level_name, parameters in offers().items():
            for p in parameters:
                if clocks.setdefault(p, own[level_name])[0] != own[level_name][0]:
                    raise ValueError(
                        f"a parameter of {name or 'the model'} is on period {clocks[p][0]} and on "
                        f"period {own[level_name][0]}; a parameter belongs to one level"
                    )
    return clocks


def describe_levels(groups: list[dict[str, Any]]) -> str:
    """One line that says how much of the model is updated how often.

    Example:
        >>> describe_levels(level_groups(nn.Linear(2, 2), lr=1e-3))
        'levels: every step 6 parameters'
    """
    sizes: dict[int, int] = {}
    for group in groups:
        period = group["period"]
        sizes[period] = sizes.get(period, 0) + sum(p.numel() for p in group["params"])
    parts = [
        f"every {f'{period} steps' if period > 1 else 'step'} {size:,} parameters"
        for period, size in sorted(sizes.items())
    ]
    return "levels: " + ", ".join(parts)
