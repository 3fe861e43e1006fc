"""Parameters and their optimizer state by name."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn


def named(params: Any) -> Iterable[Any]:
    """What an optimizer's ``params`` stand for; a module for its trainable parameters, named.

    Raises:
        ValueError: a module without trainable parameters.
    """
    if not isinstance(params, nn.Module):
        return params
    pairs = [(name, p) for name, p in params.named_parameters() if p.requires_grad]
    if not pairs:
        raise ValueError("the model has no trainable parameter; set requires_grad on some")
    return [{"params": pairs}]


def follow_names(
    groups: Sequence[dict[str, Any]], stored: dict[str, Any], fixed: Sequence[str]
) -> dict[str, Any]:
    """A state dict in the order and grouping of ``groups``, each parameter found by its name.

    Where a group's parameters come from one stored group (or from several that agree) it takes that
    group's options; an option on which they disagree keeps its present value.

    Args:
        groups: the optimizer's own groups.
        stored: a state dict in torch's layout; returned as it is if either side has no names.
        fixed: options on which a parameter's old and new group must agree, because they say what
            its state means.

    Raises:
        ValueError: names that only one side has, or a fixed option that differs.
    """
    old = stored["param_groups"]
    if not all("param_names" in g for g in [*groups, *old]):
        if len(old) == len(groups):
            for new, before in zip(groups, old, strict=True):
                _agree(new, before, fixed)
        return stored
    place = {
        name: (number, group)
        for group in old
        for name, number in zip(group["param_names"], group["params"], strict=True)
    }
    mine = [name for group in groups for name in group["param_names"]]
    if missing := sorted(set(mine) ^ set(place)):
        raise ValueError(
            "this state belongs to other parameters; only one of the two has "
            + ", ".join(missing[:5])
            + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        )
    result_groups: list[dict[str, Any]] = []
    state: dict[int, Any] = {}
    number = 0
    for group in groups:
        sources = list({id(place[n][1]): place[n][1] for n in group["param_names"]}.values())
        options = {k: v for k, v in group.items() if k != "params"}
        for source in sources:
            _agree(group, source, fixed)
        for key in {key for source in sources for key in source} - {"params", "param_names"}:
            values = [source.get(key) for source in sources]
            if all(value == values[0] for value in values):
                options[key] = values[0]
        numbers = []
        for name in group["param_names"]:
            if (at := place[name][0]) in stored["state"]:
                state[number] = stored["state"][at]
            numbers.append(number)
            number += 1
        result_groups.append({**options, "params": numbers})
    return {**stored, "state": state, "param_groups": result_groups}


def _agree(new: dict[str, Any], old: dict[str, Any], fixed: Sequence[str]) -> None:
    for key in fixed:
        if key in old and new.get(key) != old[key]:
            raise ValueError(
                f"the stored state is that of {key}={old[key]!r}, this optimizer has "
                f"{key}={new.get(key)!r}; build it with the same {key}"
            )
