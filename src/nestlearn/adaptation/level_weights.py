"""What the levels of an adapted model change, as parameters, and the optimizers that write it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nestlearn.adaptation.added import refresh
from nestlearn.adaptation.attach import Adaptation
from nestlearn.adaptation.memory import Memory, level_name
from nestlearn.levels.clock import NEVER
from nestlearn.levels.level import Level
from nestlearn.optim.multirate import InnerFactory, MultiRate


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
        self.parameters: dict[str, dict[str, nn.Parameter]] = {}
        groups = []
        for level in handle.levels:
            name = level_name(level)
            own = memory.changes.setdefault(name, {})
            if level.eta == 0 or level.period == NEVER:
                continue
            learned = self.parameters[name] = {}
            for target, spec in handle.targets.items():
                if name not in spec.levels:
                    continue
                change = own.get(target)
                if change is None:
                    change = torch.zeros(spec.weight.shape, dtype=torch.float32)
                learned[target] = nn.Parameter(change.to(spec.weight.device))
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
    def update(
        self, gradients: Mapping[str, Tensor], tokens: int, roots: Mapping[str, Tensor]
    ) -> tuple[str, ...]:
        """One optimizer step; levels that are due are updated, and what the model computes with.

        Args:
            gradients: target -> gradient summed over ``tokens`` tokens, multiplied by Q.
            tokens: how far the clocks advance.
            roots: target -> Q that the optimizer's step is multiplied by; 1 where there is none.

        Returns:
            names of the levels that were updated.
        """
        before: dict[nn.Parameter, Tensor] = {}
        for i, (name, own) in enumerate(self.parameters.items()):
            due = self.optimizer.levels[name]
            stepping = due.clock.boundaries(due.steps, due.steps + tokens)
            for target, parameter in own.items():
                parameter.grad = None if i and self._sums else gradients.get(target)
                if stepping and target in roots:
                    before[parameter] = parameter.detach().clone()
        self.optimizer.step(units=tokens)
        for own in self.parameters.values():
            for target, parameter in own.items():
                parameter.grad = None
                if parameter in before:
                    step = parameter.sub_(before[parameter]).to(roots[target])
                    torch.add(before[parameter], roots[target] @ step, out=parameter.data)
        fired = self.optimizer.fired
        faster: Level | None = None
        for level in self._handle.levels:
            if level_name(level) in fired:
                self._retain_and_consolidate(level, faster)
            faster = level
        for target in {t for name in fired for t in self.parameters[name]}:
            parts: list[Tensor] = [own[target] for own in self.parameters.values() if target in own]
            refresh(self._handle.targets[target], parts)
        return fired

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
            inner = self.optimizer.levels[name].optimizer
            for target, p in own.items():
                entries = {**inner.state.get(p, {}), **self.optimizer.state.get(p, {})}
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
                        if value.ndim and value.shape != p.shape:
                            raise ValueError(
                                f"state {key} of {target} has shape {tuple(value.shape)}"
                            )
                        value = value.to(p.device if value.ndim else "cpu", copy=True)
                    holder = self.optimizer if key == "accumulated" else level.optimizer
                    holder.state[p][key] = value
