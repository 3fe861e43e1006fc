"""Levels of an optimizer: each parameter group is updated at its own frequency.

The continuum memory system (SPEC §6, Eq. 70-71) updates level l every C steps with the error it
gathered since its last update:

    theta <- theta - sum_{t in chunk} eta_t f(theta; x_t)    if step = 0 mod C, else unchanged

`MultiRate` is that line for any inner optimizer f. It is the only place where levels and
optimizers meet, so a training loop stays the usual ``backward(); step(); zero_grad()``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from nestlearn.levels.clock import NEVER, Clock

InnerFactory = Callable[[list[dict[str, Any]]], Optimizer]

_OWN_KEYS = ("level", "period", "accumulate")
_CLOCK_KEYS = ("steps", "updates", "offset")
_ACCUMULATE = ("sum", "mean")


@dataclasses.dataclass
class OptimizerLevel:
    """One update frequency: its clock, the steps it has seen and the optimizer that fires.

    Attributes:
        name: name of the level.
        clock: decides at which steps the level is due.
        accumulate: ``"sum"`` or ``"mean"`` of the gradients since the last update.
        optimizer: the inner optimizer, holding exactly this level's parameter groups.
        steps: optimizer steps seen so far (also those at which nothing was due).
        updates: how often the inner optimizer has fired.
    """

    name: str
    clock: Clock
    accumulate: str
    optimizer: Optimizer
    steps: int = 0
    updates: int = 0

    @property
    def period(self) -> int:
        """Optimizer steps between two updates."""
        return self.clock.period

    def parameters(self) -> list[Tensor]:
        """All parameters of the level."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]


class MultiRate(Optimizer):
    """An optimizer whose parameter groups are levels with their own clocks (Eq. 70-71).

    At every ``step()`` each level adds its gradients to an accumulator. A level that is due
    (`Clock`, steps counted from 1) gives the accumulated gradient to its inner
    optimizer, which makes one ordinary step; a level that is not due does no optimizer work. A
    level of period 1 has no accumulator and costs nothing extra; one of period ``NEVER`` is frozen.

    **Sum or mean.** The default is the paper's *sum* over the chunk with the level's own learning
    rate. For an inner optimizer that is linear in the gradient (SGD, momentum) a level of period C
    then travels as far per C steps as one of period 1 at the same learning rate, so learning rates
    of different levels are comparable. For one that does not see the gradient's scale (Adam, Lion,
    Muon) sum and mean agree up to its epsilon, and a level of period C travels C times less per
    token at equal learning rate: slow levels are slow in both senses; give the group a larger
    ``lr`` if that is not wanted. ``accumulate="mean"`` is gradient accumulation as usually meant.
    Gradients are accumulated in at least fp32.

    Clip gradients before ``step()`` as usual: the accumulator sums clipped gradients.

    Args:
        params: parameters, or groups. A group may hold, besides the inner optimizer's own options
            (``lr``, ``weight_decay``, ...): ``period`` (an int or a `Clock`, default 1), ``level``
            (a name, default ``"every <period>"``) and ``accumulate``. Groups with one level name
            share one inner optimizer.
        inner: builds an optimizer from a list of groups, e.g. ``torch.optim.AdamW`` or
            ``functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)``; or a mapping from level
            names to such factories, with ``"*"`` for all others.
        accumulate: default of the groups.

    Attributes:
        levels: level name to `OptimizerLevel`, in the order of their first group.
        fired: names of the levels that were updated at the last ``step()``.

    ``param_groups`` are the inner optimizers' own groups, so a learning-rate scheduler works as on
    any optimizer. ``state_dict`` has torch's layout (``state`` by parameter number,
    ``param_groups``) and holds clocks and half-filled accumulators; loading is bit-exact.

    Raises:
        ValueError: periods that disagree within a level, an unknown ``accumulate``, or a state
            dict with other periods or level names than this optimizer's.

    Example:
        >>> fast, slow = torch.nn.Linear(2, 2), torch.nn.Linear(2, 1)
        >>> groups = [{"params": fast.parameters()}, {"params": slow.parameters(), "period": 4}]
        >>> optimizer = MultiRate(groups, inner=functools.partial(torch.optim.SGD, lr=0.1))
        >>> slow(fast(torch.ones(1, 2))).sum().backward()
        >>> optimizer.step(); optimizer.fired
        ('every 1',)
    """

    def __init__(
        self,
        params: Iterable[Any],
        inner: InnerFactory | Mapping[str, InnerFactory] = torch.optim.AdamW,
        accumulate: str = "sum",
    ) -> None:
        self._inner = inner
        self.levels: dict[str, OptimizerLevel] = {}
        self.fired: tuple[str, ...] = ()
        super().__init__(params, {"period": 1, "level": None, "accumulate": accumulate})
        # Schedulers look here to see which options the groups have (momentum or betas).
        for level in self.levels.values():
            self.defaults = {**level.optimizer.defaults, **self.defaults}

    # -- construction -------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; it joins the level of its name or opens a new one."""
        period = param_group.get("period", 1)
        clock = period if isinstance(period, Clock) else Clock(period)
        param_group["period"] = clock.period
        name = param_group.get("level") or f"every {clock.period}"
        param_group["level"] = str(name)
        accumulate = param_group.get("accumulate", self.defaults["accumulate"])
        if accumulate not in _ACCUMULATE:
            raise ValueError(f"accumulate must be one of {_ACCUMULATE}, got {accumulate!r}")
        level = self.levels.get(name)
        if level is not None and (level.period, level.accumulate) != (clock.period, accumulate):
            raise ValueError(
                f"level {name!r} has period {level.period} and accumulate={level.accumulate!r}; "
                f"a further group of it has {clock.period} and {accumulate!r}: give the group "
                "another level name"
            )
        given = {*param_group, "param_names", *_OWN_KEYS}
        super().add_param_group(param_group)  # checks types and duplicates, fills in our defaults
        group = {k: v for k, v in self.param_groups.pop().items() if k in given}
        if level is None:
            level = OptimizerLevel(name, clock, accumulate, self._factory(name)([group]))
            self.levels[name] = level
        else:
            level.optimizer.add_param_group(group)
        self.param_groups.append(level.optimizer.param_groups[-1])

    def _factory(self, name: str) -> InnerFactory:
        if not isinstance(self._inner, Mapping):
            return self._inner
        factory = self._inner.get(name, self._inner.get("*"))
        if factory is None:
            raise ValueError(
                f"no inner optimizer for level {name!r}: `inner` has {sorted(self._inner)}; add "
                f"{name!r} or '*' for all others"
            )
        return factory

    # -- the step -----------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, units: int = 1) -> Any:
        """One optimizer step: every level gathers its gradients, the levels that are due fire.

        ``units``: how far the clocks advance. Where periods are counted in tokens it is the number
        of tokens that the gradients come from, and a level fires (once) if it was due in between.
        """
        if units < 1:
            raise ValueError(f"units must be 1 or more, got {units}")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        fired = []
        for level in self.levels.values():
            before = level.steps
            level.steps += units
            if level.period == NEVER:
                continue
            if level.period > 1:
                self._gather(level)
            if level.clock.boundaries(before, level.steps):
                self._fire(level)
                fired.append(level.name)
        self.fired = tuple(fired)
        return loss

    def _gather(self, level: OptimizerLevel) -> None:
        """accumulated <- accumulated + gradient, for every parameter that has one."""
        sums, grads = [], []
        for p in level.parameters():
            if p.grad is None:
                continue
            state = self.state[p]
            if "accumulated" not in state:
                dtype = torch.promote_types(p.grad.dtype, torch.float32)
                state["accumulated"] = p.grad.to(dtype, copy=True)
            else:
                sums.append(state["accumulated"])
                grads.append(p.grad.to(state["accumulated"].dtype))
        if sums:
            torch._foreach_add_(sums, grads)

    def _fire(self, level: OptimizerLevel) -> None:
        """One step of the level's inner optimizer on what was accumulated."""
        own: list[tuple[Tensor, Tensor | None]] = []
        if level.period > 1:
            scale = 1.0 if level.accumulate == "sum" else 1.0 / level.period
            for p in level.parameters():
                total = self.state.pop(p, {}).get("accumulated")
                own.append((p, p.grad))
                p.grad = None if total is None else total.mul_(scale).to(p.dtype)
        try:
            level.optimizer.step()
        finally:
            for p, grad in own:
                p.grad = grad
        level.updates += 1

    # -- state --------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """All levels' states in torch's layout.

        ``state[i]`` is the inner optimizer's state of parameter i plus ``accumulated``, where a
        level is mid-period; each entry of ``param_groups`` carries its level's clock (``steps``,
        ``updates``).
        """
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        number: dict[Tensor, int] = {}
        groups: list[dict[str, Any]] = []
        for group in self.param_groups:
            for p in group["params"]:
                number.setdefault(p, len(number))
            packed = {k: v for k, v in group.items() if k != "params"}
            level = self.levels[group["level"]]
            packed |= {"steps": level.steps, "updates": level.updates}
            packed["offset"] = level.clock.offset
            packed["params"] = [number[p] for p in group["params"]]
            groups.append(packed)
        state: dict[int, dict[str, Any]] = {}
        for level in self.levels.values():
            for p in level.parameters():
                entries = {**level.optimizer.state.get(p, {}), **self.state.get(p, {})}
                if entries:
                    state[number[p]] = entries
        result: dict[str, Any] = {"state": state, "param_groups": groups}
        for post in self._optimizer_state_dict_post_hooks.values():
            changed = post(self, result)
            result = result if changed is None else changed
        return result

    @torch._disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` gave: inner states, clocks and half-filled accumulators."""
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        stored = state_dict["param_groups"]
        self._check(stored)
        state = state_dict["state"]
        owners = {id(g): i for i, g in enumerate(self.param_groups)}
        self.state.clear()
        for level in self.levels.values():
            indices = [owners[id(g)] for g in level.optimizer.param_groups]
            ids = [i for index in indices for i in stored[index]["params"]]
            local = {i: n for n, i in enumerate(ids)}
            inner_groups = []
            for index in indices:
                group = {k: v for k, v in stored[index].items() if k not in _CLOCK_KEYS}
                inner_groups.append(group | {"params": [local[i] for i in group["params"]]})
            inner_state: dict[int, dict[str, Any]] = {}
            for p, i in zip(level.parameters(), ids, strict=True):
                entries = dict(state.get(i, {}))
                accumulated = entries.pop("accumulated", None)
                if accumulated is not None:
                    self.state[p]["accumulated"] = accumulated.to(p.device, copy=True)
                if entries:
                    inner_state[local[i]] = entries
            level.optimizer.load_state_dict({"state": inner_state, "param_groups": inner_groups})
            level.steps = int(stored[indices[0]]["steps"])
            level.updates = int(stored[indices[0]]["updates"])
            level.clock = Clock(level.period, int(stored[indices[0]]["offset"]))
            # Loading made new group dictionaries; ours must stay the same objects as theirs.
            for index, group in zip(indices, level.optimizer.param_groups, strict=True):
                self.param_groups[index] = group
        for post in self._optimizer_load_state_dict_post_hooks.values():
            post(self)

    def _check(self, stored: list[dict[str, Any]]) -> None:
        mine = [(g["level"], g["period"], len(g["params"])) for g in self.param_groups]
        theirs = [(g.get("level"), g.get("period"), len(g["params"])) for g in stored]
        if mine != theirs:
            raise ValueError(
                "this optimizer state belongs to other levels: it has (level, period, parameters) "
                f"{theirs}, this optimizer has {mine}; build the optimizer with the same groups"
            )

    def __getstate__(self) -> dict[str, Any]:
        own = {"_inner": self._inner, "levels": self.levels, "fired": self.fired}
        return {**super().__getstate__(), **own}

    def __repr__(self) -> str:
        rows = [
            f"  {level.name}: period {level.period}, {len(level.parameters())} tensors, "
            f"{level.accumulate}, {type(level.optimizer).__name__}, "
            f"step {level.steps}, {level.updates} updates"
            for level in self.levels.values()
        ]
        return "MultiRate(\n" + "\n".join(rows) + "\n)"
