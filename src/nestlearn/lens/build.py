"""Putting a nested system together from what was found in a model and its optimizers."""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from nestlearn.lens.findings import FastBox, Memory, SlowBox, Unknown
from nestlearn.lens.names import Kind, MemoryKey, alike, compressed, distinct, memory_name, total
from nestlearn.lens.optimizers import Update, updates_of
from nestlearn.lens.system import InspectedSystem
from nestlearn.lens.walk import Survey
from nestlearn.levels.clock import NEVER
from nestlearn.levels.system import Box, Frequency
from nestlearn.levels.transfer import (
    Backpropagation,
    DirectNonParametric,
    DirectParametric,
    Generation,
    Initialisation,
    Transfer,
)

WEIGHTS = "weights"


class Builder:
    """Puts a system together; the steps are in the order of the methods."""

    def __init__(
        self,
        model: nn.Module,
        found: Survey,
        optimizers: tuple[Optimizer, ...],
        tokens: int,
        objective: str,
    ) -> None:
        self.model, self.found, self.tokens, self.objective = model, found, tokens, objective
        self.training = bool(optimizers)
        self.names: dict[Tensor, str] = {p: n for n, p in model.named_parameters()}
        self.updates = updates_of(optimizers)
        foreign = sum(p not in self.names for p in self.updates)
        if foreign:
            raise ValueError(
                f"{foreign} of the optimizer's {len(self.updates)} parameters are not the model's; "
                "give the optimizer that trains this model"
            )
        self.by_sample = self.training or any(box.per == "sample" for box in found.fast)
        self.boxes: dict[str, Box] = {}
        self.transfers: list[Transfer] = []
        self.notes: dict[str, None] = dict(found.notes)
        self.unknown: list[Unknown] = list(found.unknowns())
        self.owner: dict[Tensor, str] = {}
        self.groups: dict[str, tuple[Kind, list[Tensor]]] = {}

    def system(self) -> InspectedSystem:
        """Everything."""
        self._slow_boxes()
        self._optimizer_boxes()
        feeding = self._fast_boxes()
        self._dependencies(feeding)
        self._slow_transfers()
        if not self.boxes:
            raise ValueError(
                f"{type(self.model).__name__} has no parameters and nothing that is updated"
            )
        unit = "one sample"
        if any(box.per == "token" for box in self.found.fast):
            unit = f"one sequence of {self.tokens:,} tokens" if self.by_sample else "one token"
        unit += ", one optimizer step" if self.training else ""
        return InspectedSystem(
            list(self.boxes.values()), self._valid(), type(self.model).__name__, unit=unit,
            unknown=tuple(self.unknown), notes=tuple(self.notes),
        )  # fmt: skip

    # -- the weights --------------------------------------------------------------------------

    def _slow_boxes(self) -> None:
        labels: dict[Tensor, SlowBox] = {}
        for box in self.found.slow:
            for p in box.parameters:
                labels.setdefault(p, box)
        kinds: dict[Kind, list[Tensor]] = {}
        wishes: dict[str, tuple[int, int]] = {}
        idle = 0
        for p in self.names:
            label, update = labels.get(p), self.updates.get(p)
            period = NEVER if update is None or not p.requires_grad else update.period
            idle += self.training and p.requires_grad and update is None
            name = WEIGHTS if label is None else label.name
            stated = None if label is None else label.objective
            rule = None if update is None or period == NEVER else update.rule
            if stated is None and rule is not None:
                stated = rule.objective
            kind = Kind(
                name,
                self.objective if stated is None else stated,
                period,
                update.optimizer if update is not None and period != NEVER else "",
                "unknown" if rule is None else rule.solver,
                () if rule is None else tuple(m.name for m in rule.memories),
            )
            kinds.setdefault(kind, []).append(p)
            wish = None if label is None else label.period
            if self.training and wish is not None and wish != period != NEVER:
                wishes[name] = (wish, period)
        for name, (wish, period) in wishes.items():
            self.notes[
                f"{name} is meant to be updated every {wish:,} steps, but the optimizer does so "
                f"every {period:,}: give it groups with periods, "
                "nl.optim.MultiRate(nl.optim.level_groups(model, lr))"
            ] = None
        if idle:
            self.notes[f"{idle} parameters get gradients that no optimizer uses"] = None
        for kind, parameters in kinds.items():
            name = distinct(kind, kinds)
            self.groups[name] = (kind, parameters)
            self.owner |= dict.fromkeys(parameters, name)
            self.boxes[name] = self._slow_box(name, kind, parameters)

    def _slow_box(self, name: str, kind: Kind, parameters: list[Tensor]) -> Box:
        still = kind.period == NEVER
        if not self.training:
            solver, context = "not updated: no optimizer", "what it was trained on"
        elif still:
            solver, context = "frozen", "what it was trained on"
        else:
            solver = f"{kind.solver} ({kind.optimizer})"
            context = "training data"
            if kind.period > 1:
                context += f", gradients of {kind.period:,} steps gathered"
        flops = [self.found.flops.get(p, 0.0) for p in parameters]
        counted = [f for f in flops if f is not None]
        gathered = sum(self.updates[p].accumulated for p in parameters if p in self.updates)
        return Box(
            name,
            kind.objective,
            context,
            compressed([self.names[p] for p in parameters]),
            0 if still else Fraction(1, kind.period),
            solver,
            differentiated="no" if still else "yes: the backpropagated loss is its own",
            parameter_bytes=sum(p.numel() * p.element_size() for p in parameters),
            state_bytes=gathered,
            flops_per_token=round(sum(counted)) if len(counted) == len(flops) else None,
        )

    # -- what the optimizer remembers -----------------------------------------------------------

    def _optimizer_boxes(self) -> None:
        merged: dict[MemoryKey, list[tuple[Memory, Update, Tensor, str]]] = {}
        strangers: dict[str, dict[str, int]] = {}
        for p, update in self.updates.items():
            slow = self.owner[p]
            if self.boxes[slow].frequency == 0:
                continue
            if update.rule is None:
                held = strangers.setdefault(update.optimizer, {})
                for entry, value in update.state.items():
                    if isinstance(value, Tensor):
                        held[entry] = held.get(entry, 0) + value.numel() * value.element_size()
                continue
            for memory in update.rule.memories:
                place = (memory.name, update.optimizer, update.period, memory.period)
                merged.setdefault(place, []).append((memory, update, p, slow))
        self._strange(strangers)
        names = {key: memory_name(key, list(merged)) for key in merged}
        for key, entries in merged.items():
            memory, update = entries[0][0], entries[0][1]
            users = list(dict.fromkeys(slow for *_, slow in entries))
            own = {k[0]: n for k, n in names.items() if k[1:3] == key[1:3]}
            flops = sum(m.flops for m, *_ in entries) / self.tokens
            box = Box(
                names[key],
                memory.objective,
                "gradients of " + ", ".join(users) + _summed(memory.period),
                memory.state,
                Fraction(1, update.period * memory.period),
                memory.solver,
                tuple(own[n] for n in memory.needs if n in own),
                memory.differentiated or "no",
                parameter_bytes=0,
                state_bytes=sum(u.size(m, p) for m, u, p, _ in entries),
                flops_per_token=round(flops),
            )
            self.boxes[box.name] = box
            for slow in users:
                self._need(slow, box.name)
                self.transfers.append(Generation(slow, box.name, generates="context"))
                faster = box.frequency >= self.boxes[slow].frequency
                # A slower memory is no faster box that conditions: it makes a part of the step.
                back: Transfer = Generation(box.name, slow, generates="weights")
                self.transfers.append(DirectParametric(box.name, slow) if faster else back)

    def _strange(self, strangers: dict[str, dict[str, int]]) -> None:
        for name, keys in strangers.items():
            held = ", ".join(f"{k} ({n:,} bytes)" for k, n in keys.items()) or "nothing yet"
            self.unknown.append(
                Unknown(name, ("the optimizer",), f"no recogniser for it; it keeps {held}")
            )

    # -- what the model writes ------------------------------------------------------------------

    def _fast_boxes(self) -> set[str]:
        """Makes the boxes; returns the names of those that a slow forward pass uses."""
        merged: dict[str, list[FastBox]] = {}
        for fast in self.found.fast:
            merged.setdefault(fast.name, []).append(fast)
        feeding: set[str] = set()
        for name, parts in merged.items():
            for i, same in enumerate(alike(parts)):
                title = name if i == 0 else f"{name} {i + 1}"
                if self._fast_box(title, same):
                    feeding.add(title)
        return feeding

    def _fast_box(self, name: str, parts: list[FastBox]) -> bool:
        first = parts[0]
        frequency: Frequency = first.rate
        if first.rate != math.inf and self.by_sample and first.per == "token":
            frequency = Fraction(first.rate) * self.tokens
        if name in self.boxes:
            raise ValueError(f"two kinds of box are named {name!r}; rename one of them")
        period = 0 if first.rate in (0, math.inf) else 1 / Fraction(first.rate)
        if first.per == "token" and self.by_sample and period > self.tokens:
            self.notes[
                f"{name} is updated every {period} tokens: a sequence of {self.tokens:,} is "
                "shorter, so it only changes if its state is carried on to the next"
            ] = None
        self.boxes[name] = Box(
            name,
            first.objective,
            first.context + (f" ({len(parts)} layers)" if len(parts) > 1 else ""),
            first.learns,
            frequency,
            first.solver,
            first.needs,
            first.differentiated if self.training else "",
            parameter_bytes=0,
            state_bytes=total([part.state_bytes for part in parts]),
            flops_per_token=total([part.flops for part in parts]),
        )
        users = self._owners(p for part in parts for p in part.slow)
        direct = DirectNonParametric if not first.learns else DirectParametric
        self.transfers += [direct(name, slow) for slow in users]
        for slow in self._owners(p for part in parts for p in part.initial):
            self.transfers.append(Initialisation(slow, name))
        if self.training and first.flow and first.learns:
            moving = [slow for slow in users if self.boxes[slow].frequency]
            self.transfers += [Backpropagation(slow, name) for slow in moving]
        self.transfers += list(dict.fromkeys(t for part in parts for t in part.transfers))
        links = (DirectParametric, DirectNonParametric)
        slow_names = set(self.groups)
        return bool(users) or any(
            isinstance(t, links) and t.target in slow_names for t in first.transfers
        )

    def _owners(self, parameters: Any) -> list[str]:
        return list(dict.fromkeys(self.owner[p] for p in parameters if p in self.owner))

    # -- order and links ------------------------------------------------------------------------

    def _need(self, name: str, other: str) -> None:
        box = self.boxes[name]
        if other not in box.needs:
            self.boxes[name] = dataclasses.replace(box, needs=(*box.needs, other))

    def _dependencies(self, feeding: set[str]) -> None:
        """The gradient of a step needs what fast boxes have become in it."""
        if not self.training and not any(b.per == "sample" for b in self.found.fast):
            return
        fast_names = {box.name for box in self.found.fast}
        for name, box in list(self.boxes.items()):
            is_fast = name in fast_names or name in feeding
            if is_fast or box.frequency == 0:
                continue
            for other in feeding:
                if self.boxes[other].frequency == box.frequency:
                    self._need(name, other)

    def _slow_transfers(self) -> None:
        """One gradient flow reaches slow boxes of different frequencies."""
        for box in self.found.slow:
            for transfer in box.transfers:
                if transfer not in self.transfers:
                    self.transfers.append(transfer)
        by_frequency: dict[Frequency, list[str]] = {}
        for name in self.groups:
            if self.boxes[name].frequency:
                by_frequency.setdefault(self.boxes[name].frequency, []).append(name)
        chain = [by_frequency[f] for f in sorted(by_frequency)]
        for slower, faster in zip(chain, chain[1:], strict=False):
            self.transfers += [Backpropagation(a, b) for a in slower for b in faster]

    def _valid(self) -> list[Transfer]:
        """Without those whose ends share a level here, are not in this system, or are the wrong way
        round for their kind (a memory that is written more rarely than the weights)."""
        trial = InspectedSystem(list(self.boxes.values()))

        def fits(t: Transfer) -> bool:
            if t.source not in self.boxes or t.target not in self.boxes:
                return False
            if t.faster is None:
                return trial.level_of(t.source) != trial.level_of(t.target)
            ends = (t.source, t.target) if t.faster == "source" else (t.target, t.source)
            return trial.faster(*ends)

        return [t for t in dict.fromkeys(self.transfers) if fits(t)]


def _summed(period: int) -> str:
    return f", summed over {period:,} steps" if period > 1 else ""
