"""What the levels of an adapted model change, as parameters, and the optimizers that write it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nestlearn.adaptation.adapted import Adaptation
from nestlearn.adaptation.added import KEYS, refresh
from nestlearn.adaptation.memory import WRITTEN, Memory, level_name, used_rows, with_rows
from nestlearn.levels.clock import NEVER
from nestlearn.levels.level import Level
from nestlearn.optim.multirate import InnerFactory, MultiRate

FEWEST = 256
"""Slots that an added memory's changes have room for at least."""


class LevelWeights:
    """A memory's changes under the optimizers of their levels (Eq. 70-71).

    The parameters are the memory's own tensors: what an optimizer writes is in the memory at once.

    Args:
        handle: the adapted model.
        memory: its changes are learned further; targets it lacks are added as zeros.
        factory: inner optimizer, or one by level name, as for `MultiRate`. None: what is handed to
            `update` is subtracted as it is, from the fastest level that learns alone (sums, of
            which slower levels take their share).
        lr: of a level whose ``lr_scale`` is 1.

    Attributes:
        parameters: level name -> target name -> change, for the levels that learn.
        optimizer: clocks count tokens; gradients are averaged over a period.
        rows: added memory -> slots that its changes have room for, see `make_room`.

    Raises:
        ValueError: the memory's optimizer state does not fit its changes.
    """

    def __init__(
        self,
        handle: Adaptation,
        memory: Memory,
        factory: InnerFactory | Mapping[str, InnerFactory] | None,
        lr: float,
    ) -> None:
        self._handle, self._sums = handle, factory is None
        self._changes = memory.changes
        self.parameters: dict[str, dict[str, nn.Parameter]] = {}
        self.rows = {
            target: _rows(memory, target, len(spec.weight))
            for target, spec in handle.targets.items()
            if spec.in_slots and spec.levels != (WRITTEN,)
        }
        groups = []
        for level in handle.levels:
            name = level_name(level)
            own = memory.changes.setdefault(name, {})
            if level.eta == 0 or level.period == NEVER:
                for target in own:
                    own[target] = own[target].to(handle.targets[target].weight.device)
                continue
            learned = self.parameters[name] = {}
            for target, spec in handle.targets.items():
                if name not in spec.levels:
                    continue
                rows = self.rows.get(target, len(spec.weight))
                change = own.get(target)
                if change is None:
                    change = torch.zeros(rows, *spec.weight.shape[1:], dtype=torch.float32)
                learned[target] = nn.Parameter(with_rows(change, rows).to(spec.weight.device))
                own[target] = learned[target].data
            groups.append(
                {
                    "params": list(learned.values()),
                    "level": name,
                    "period": level.period,
                    "lr": lr * level.lr_scale,
                }
            )
        self.optimizer = (
            MultiRate(groups, torch.optim.SGD, accumulate="sum")
            if factory is None
            else MultiRate(groups, factory, accumulate="mean")
        )
        if memory.optimizer is not None:
            self._load(memory.optimizer)

    @torch.no_grad()
    def update(self, gradients: Mapping[str, Tensor], tokens: int) -> tuple[str, ...]:
        """Hand every level the summed gradients of ``tokens`` tokens; the levels that were due
        are updated, and with them the weights that the model computes with.

        Returns:
            names of the levels that were updated.
        """
        given = {
            target: with_rows(gradient, self.rows.get(target, len(gradient)))
            for target, gradient in gradients.items()
        }
        for i, own in enumerate(self.parameters.values()):
            for target, parameter in own.items():
                parameter.grad = None if i and self._sums else given.get(target)
        self.optimizer.step(units=tokens)
        for own in self.parameters.values():
            for parameter in own.values():
                parameter.grad = None
        fired = self.optimizer.fired
        faster: Level | None = None
        for level in self._handle.levels:
            if level_name(level) in fired:
                self._retain_and_consolidate(level, faster)
            faster = level
        for target in {t for name in fired for t in self.parameters[name]}:
            parts = [own[target] for own in self._changes.values() if target in own]
            refresh(self._handle.targets[target], parts)
        return fired

    @torch.no_grad()
    def make_room(self, target: str, rows: int) -> int:
        """Let the changes of an added memory, momenta and accumulators too, have this many rows, or
        as many as there are slots.

        They grow by doubling, so that what learning costs depends on what is in use.

        Returns:
            how many there are now.
        """
        held, slots = self.rows[target], len(self._handle.targets[target].weight)
        if held >= min(rows, slots):
            return held
        self.rows[target] = more = min(slots, max(rows, 2 * held))
        for name, own in self.parameters.items():
            p = own[target]
            for state in self._states(name, p):
                for key, value in state.items():
                    if isinstance(value, Tensor) and value.shape[:1] == (held,):
                        state[key] = with_rows(value, more)
            p.data = with_rows(p.data, more)
            self._changes[name][target] = p.data
        return more

    @torch.no_grad()
    def clear(self, target: str, rows: Tensor) -> None:
        """Forget rows of a target: in every level, its momenta and accumulators."""
        for name, own in self.parameters.items():
            p = own[target]
            p[rows] = 0
            for state in self._states(name, p):
                for value in state.values():
                    if isinstance(value, Tensor) and value.shape[:1] == p.shape[:1]:
                        value[rows] = 0

    def _states(self, level: str, p: nn.Parameter) -> tuple[dict[str, Any], dict[str, Any]]:
        """What the level's optimizer keeps of a parameter, and what is accumulated for it."""
        inner = self.optimizer.levels[level].optimizer
        return inner.state.get(p, {}), self.optimizer.state.get(p, {})

    def _retain_and_consolidate(self, level: Level, faster: Level | None) -> None:
        """What happens to a level beside its update: it fades towards the slower ones, and takes
        over a share of the next faster one."""
        own = self.parameters[level_name(level)]
        if level.half_life is not None:
            torch._foreach_mul_(list(own.values()), 0.5 ** (level.period / level.half_life))
        if faster is None or not level.meta_rate:
            return
        for target, source in self.parameters.get(level_name(faster), {}).items():
            if target in own:
                own[target].add_(source, alpha=level.meta_rate)
                source.mul_(1 - level.meta_rate)

    # -- state ----------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Clocks, momenta and accumulators by name of level and target."""
        state: dict[str, Any] = {}
        for name, own in self.parameters.items():
            for target, p in own.items():
                inner, outer = self._states(name, p)
                entries = {**inner, **outer}
                if entries:
                    state[f"{name}/{target}"] = entries
        levels = self.optimizer.levels
        return {
            "names": {n: type(lv.optimizer).__name__ for n, lv in levels.items()},
            "clocks": {n: [lv.steps, lv.updates] for n, lv in levels.items()},
            "state": state,
        }

    def _load(self, stored: dict[str, Any]) -> None:
        """Restore clocks, and momenta where optimizer and shapes are the same."""
        clocks, names = stored["clocks"], stored["names"]
        for name, level in self.optimizer.levels.items():
            if name in clocks:
                steps, updates = clocks[name]
                if type(steps) is not int or type(updates) is not int or min(steps, updates) < 0:
                    raise ValueError(f"the clock of level {name} stands at {clocks[name]!r:.40}")
                level.steps, level.updates = steps, updates
            if names.get(name) != type(level.optimizer).__name__:
                continue
            for target, p in self.parameters[name].items():
                for key, value in stored["state"].get(f"{name}/{target}", {}).items():
                    if isinstance(value, Tensor):
                        if value.ndim and len(value) < len(p) and target in self.rows:
                            value = with_rows(value, len(p))
                        if value.shape not in (p.shape, p.shape[:1], torch.Size()):
                            raise ValueError(
                                f"state {key} of {target} has shape {tuple(value.shape)}"
                            )
                        value = value.to(p.device if value.ndim else "cpu", copy=True)
                    holder = self.optimizer if key == "accumulated" else level.optimizer
                    holder.state[p][key] = value


def _rows(memory: Memory, target: str, slots: int) -> int:
    """Slots that a memory's changes need room for."""
    found = [len(own[target]) for own in memory.changes.values() if target in own]
    keys = memory.changes.get(WRITTEN, {}).get(target + KEYS)
    return max(min(FEWEST, slots), *found, 0 if keys is None else used_rows(keys))
