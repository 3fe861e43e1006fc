"""What `adapt` did to a model: the handle that memories are shown and taken off with."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nestlearn.adaptation.added import (
    CHILD,
    KEYS,
    AddedMemory,
    Hook,
    Seen,
    Target,
    clear,
    memory_of,
    refresh,
    stack_rows,
)
from nestlearn.adaptation.completions import COMPLETIONS
from nestlearn.adaptation.fingerprint import fingerprint
from nestlearn.adaptation.memory import WRITTEN, Layout, Memory, level_name
from nestlearn.adaptation.readout import (
    TARGET,
    Readout,
    attach_readout,
    solved_rows,
)
from nestlearn.adaptation.sites import Site, contiguous_head, linear_shape
from nestlearn.levels.level import Level

HANDLE = "_nestlearn"
"""Attribute of an adapted model."""


class Adaptation:
    """What `adapt` did to a model; found again with `adaptation_of`.

    Attributes:
        method: ``"added"``, ``"placement"`` or ``"readout"``.
        levels: fastest first.
        sites: the blocks that learn.
        frozen_sites: the blocks that do not.
        targets: name -> weight that is learned.
        fixed: what the memories need and never change, float32: projections of added memories.
        slots: keys per added memory, or completions of a readout, at most; else 0.
        base: fingerprint of the base model's weights.
        active: whether added memories take part in the forward pass.
        holds: whether there is anything in them.
        seen: what passes the added memories is noted here, unless it is None.
        in_rows: what `rows` adds to each target's output, while it is in force.
        readout: the memory at the model's end, if that is the method.
    """

    def __init__(
        self,
        model: nn.Module,
        method: str,
        levels: tuple[Level, ...],
        sites: tuple[Site, ...],
        frozen_sites: tuple[Site, ...],
        fixed: dict[str, Tensor],
        slots: int,
        base: str,
    ) -> None:
        self.method, self.levels = method, levels
        self.base, self.slots = base, slots
        self.sites, self.frozen_sites, self.fixed = sites, frozen_sites, fixed
        self.targets: dict[str, Target] = {}
        self.active = True
        self.holds = False
        self.seen: dict[str, Seen] | None = None
        self.in_rows: dict[str, Any] | None = None  # Rows, or a readout's Shown
        self.readout: Readout
        self._hooks: list[Any] = []
        self._required = {p: p.requires_grad for p in model.parameters()}
        for p in self._required:
            p.requires_grad_(False)
        getattr(self, f"_attach_{method}")(model)
        self._hooks.append(contiguous_head(model))

    @property
    def reads(self) -> bool:
        """Whether a readout's keys are made in a pass."""
        shown = self.active and self.readout.values is not None
        return shown or self.readout.watched or self.in_rows is not None

    # -- attaching ----------------------------------------------------------------------------

    def _attach_added(self, model: nn.Module) -> None:
        names = tuple(level_name(level) for level in self.levels)
        for site in self.sites:
            module = model.get_submodule(site.output)
            weight = _floating(module, site.output)
            memory = AddedMemory(self.fixed[site.output], self.slots, site.width, weight)
            module.add_module(CHILD, memory)
            self.targets[site.output] = Target(memory.values, None, names, module, True)
            self.targets[site.output + KEYS] = Target(memory.keys, None, (WRITTEN,), module, True)
            self._hooks.append(module.register_forward_hook(Hook(self, site.output)))

    def _attach_placement(self, model: nn.Module) -> None:
        """Blocks are shared out by depth: the fastest level gets those next to the output."""
        count = len(self.sites)
        for i, site in enumerate(self.sites):
            level = self.levels[len(self.levels) - 1 - i * len(self.levels) // count]
            for name in site.linears:
                module = model.get_submodule(name)
                weight = _floating(module, name)
                weight.requires_grad_()
                base = weight.detach().clone()
                self.targets[name] = Target(weight, base, (level_name(level),), module)
                self._hooks.append(module.register_forward_hook(Hook(self, name)))

    def _attach_readout(self, model: nn.Module) -> None:
        names = tuple(level_name(level) for level in self.levels)
        self.readout, body, self._hooks = attach_readout(self, model)
        self.targets[TARGET] = Target(self.readout.sums, None, names, body)
        self.targets[COMPLETIONS] = Target(self.readout.rows, None, names, body, True)
        tokens = Target(self.readout.tokens, None, (WRITTEN,), body, True)
        self.targets[COMPLETIONS + KEYS] = tokens

    def remove(self) -> None:
        """Take everything off; the base weights are back, bit for bit."""
        for hook in self._hooks:
            hook.remove()
        for target in self.targets.values():
            if target.base is None:
                target.module._modules.pop(CHILD, None)
            else:
                with torch.no_grad():
                    target.weight.copy_(target.base)
        self._require(self._required)

    def _require(self, required: dict[nn.Parameter, bool]) -> None:
        for p, wanted in required.items():
            if p.requires_grad != wanted:
                p.requires_grad_(wanted)

    # -- memories -----------------------------------------------------------------------------

    @functools.cached_property
    def layout(self) -> Layout:
        """What memories of this model must fit."""
        shapes = {name: tuple(t.weight.shape) for name, t in self.targets.items()}
        rank = len(next(iter(self.fixed.values()))) if self.fixed else 0
        fixed = fingerprint(self.fixed) if self.fixed else ""
        return Layout(self.base, self.method, rank, fixed, shapes)

    def new_memory(self, model_name: str = "") -> Memory:
        """A memory in which nothing was learned yet."""
        changes: dict[str, dict[str, Tensor]] = {level_name(level): {} for level in self.levels}
        fixed = {n: t.clone() for n, t in self.fixed.items()}
        return Memory(self.layout, self.levels, fixed, changes, model=model_name)

    @torch.no_grad()
    def show(self, memory: Memory | None) -> None:
        """Let the model compute with what a memory holds; None: with the base weights alone."""
        for name, target in self.targets.items():
            change = None if memory is None else memory.total(name)
            if target.in_slots and change is not None:
                clear(target.weight[len(change) :])
            refresh(target, [] if change is None else [change])
            if self.method == "added" and target.levels == (WRITTEN,):
                memory_of(target).prepare(0 if change is None else len(change))
        self.holds = memory is not None and not memory.is_empty

    @contextlib.contextmanager
    def watching(self) -> Iterator[dict[str, Seen]]:
        """Within it, what passes every added memory is noted, and the output can be differentiated
        by what the memory adds."""
        seen: dict[str, Seen] = {}
        self.seen = seen
        try:
            yield seen
        finally:
            self.seen = None

    @contextlib.contextmanager
    def inactive(self) -> Iterator[None]:
        """Within it, the model is the base model, and added memories cost nothing.

        Its weights require gradients as they did before `adapt`, which decides how PyTorch computes
        with them.
        """
        before, self.active = self.active, False
        required = {p: p.requires_grad for p in self._required}
        self._require(self._required)
        weights = None
        if self.method == "placement":
            weights = {n: t.weight.detach().clone() for n, t in self.targets.items()}
            self.show(None)
        try:
            yield
        finally:
            self.active = before
            self._require(required)
            if weights is not None:
                with torch.no_grad():
                    for name, weight in weights.items():
                        self.targets[name].weight.copy_(weight)

    @contextlib.contextmanager
    def rows(self, memories: Sequence[Memory | None]) -> Iterator[None]:
        """Within it, row i of every batch is computed with the i-th memory (None: base model).

        What the model itself was showing takes no part. The batch must have as many rows.

        Raises:
            ValueError: a memory that does not fit the model, or a batch of another size.
        """
        layout = self.layout
        for i, memory in enumerate(memories):
            # Projections may differ from row to row; all else must fit.
            same = memory and dataclasses.replace(memory.layout, fixed=layout.fixed)
            if same and (why := layout.difference(same)) is not None:
                raise ValueError(f"memory {i} does not fit this model: {why}")
        stacked: dict[str, Any] = {}
        if self.method == "readout":
            stacked[TARGET] = solved_rows(self.readout, memories)
        for name, target in self.targets.items():
            if self.method != "readout" and target.levels != (WRITTEN,):
                stacked[name] = stack_rows(name, self.targets, memories)
        before, self.in_rows = self.in_rows, stacked
        try:
            with self.inactive():
                yield
        finally:
            self.in_rows = before


def adaptation_of(model: nn.Module) -> Adaptation:
    """What `adapt` did to this model, or to the one that peft or ``torch.compile`` wrapped.

    Raises:
        ValueError: nothing.
    """
    for holder in holders(model):
        return getattr(holder, HANDLE)
    raise ValueError("the model is not adapted; call nl.adapt(model) first")


def holders(model: nn.Module) -> list[nn.Module]:
    """The modules of a model that are adapted, itself first."""
    return [m for m in model.modules() if HANDLE in m.__dict__]


def _floating(module: nn.Module, name: str) -> nn.Parameter:
    weight = module.weight
    if not isinstance(weight, nn.Parameter) or not weight.is_floating_point():
        raise ValueError(
            f"{name} ({type(module).__name__}) is quantised; load the model in bfloat16 or float32"
        )
    assert linear_shape(module) is not None
    return weight
