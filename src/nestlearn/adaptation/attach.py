"""Levels for a model that exists: where they are attached, and how they are taken off again."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nestlearn.adaptation.added import CHILD, AddedMemory, Hook, Target, refresh, stack_rows
from nestlearn.adaptation.calibration import Calibration
from nestlearn.adaptation.fingerprint import fingerprint
from nestlearn.adaptation.memory import Layout, Memory, level_name
from nestlearn.adaptation.reader import reading
from nestlearn.adaptation.readout import (
    RANK,
    TARGET,
    Readout,
    ReadoutRows,
    attach_readout,
    readout_prior,
)
from nestlearn.adaptation.sites import Site, contiguous_head, find_sites, linear_shape
from nestlearn.levels.clock import NEVER
from nestlearn.levels.level import Level

METHODS = ("added", "placement", "readout")
PERIODS = (64, 512, 4096)
"""Periods of the default levels, in tokens."""

_HANDLE = "_nestlearn"


class Adaptation:
    """What `adapt` did to a model; found again with `adaptation_of`.

    Attributes:
        method: ``"added"``, ``"placement"`` or ``"readout"``.
        levels: fastest first.
        sites: the blocks that learn.
        frozen_sites: the blocks that do not.
        targets: name -> weight that is learned.
        keys: of added memories, float32.
        base: fingerprint of the base model's weights.
        calibration: what keys and preconditioners are fitted to.
        active: whether added memories take part in the forward pass.
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
        keys: dict[str, Tensor],
        base: str,
        calibration: Calibration,
    ) -> None:
        self.method, self.levels = method, levels
        self.base, self.calibration = base, calibration
        self._preconditioners: dict[str, Tensor] | None = None
        self.sites, self.frozen_sites, self.keys = sites, frozen_sites, keys
        self.targets: dict[str, Target] = {}
        self.active = True
        self.in_rows: dict[str, Any] | None = None  # Rows, or ReadoutRows
        self.readout: Readout
        self._hooks: list[Any] = []
        self._required = {p: p.requires_grad for p in model.parameters()}
        for p in self._required:
            p.requires_grad_(False)
        getattr(self, f"_attach_{method}")(model)
        self._hooks.append(contiguous_head(model))

    # -- attaching ----------------------------------------------------------------------------

    def _attach_added(self, model: nn.Module) -> None:
        names = tuple(level_name(level) for level in self.levels)
        for site in self.sites:
            module = model.get_submodule(site.output)
            memory = AddedMemory(self.keys[site.output], site.width, _floating(module, site.output))
            module.add_module(CHILD, memory)
            self.targets[site.output] = Target(memory.values, None, names, module)
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

    def remove(self) -> None:
        """Take everything off; the base weights are back, bit for bit."""
        for hook in self._hooks:
            hook.remove()
        for target in self.targets.values():
            if target.base is None:
                del target.module._modules[CHILD]
            else:
                with torch.no_grad():
                    target.weight.copy_(target.base)
        for p, required in self._required.items():
            p.requires_grad_(required)

    def preconditioners(self) -> dict[str, Tensor]:
        """P^(1/2) of every added memory (`nestlearn.adaptation.keys.preconditioners`), made when
        first asked for.

        Empty for placement, and where the keys are not calibrated.
        """
        if self._preconditioners is None:
            with self.inactive():
                made = self.calibration.preconditioners() if self.method == "added" else {}
            self._preconditioners = {n: p.to(self.targets[n].weight) for n, p in made.items()}
        return self._preconditioners

    # -- memories -----------------------------------------------------------------------------

    @functools.cached_property
    def layout(self) -> Layout:
        """What memories of this model must fit."""
        shapes = {name: tuple(t.weight.shape) for name, t in self.targets.items()}
        rank = len(next(iter(self.keys.values()))) if self.keys else 0
        keys = fingerprint(self.keys) if self.keys else ""
        return Layout(self.base, self.method, rank, keys, shapes)

    def new_memory(self, model_name: str = "") -> Memory:
        """A memory in which nothing was learned yet."""
        changes: dict[str, dict[str, Tensor]] = {level_name(level): {} for level in self.levels}
        keys = {n: k.clone() for n, k in self.keys.items()}
        return Memory(self.layout, self.levels, keys, changes, model=model_name)

    @torch.no_grad()
    def show(self, memory: Memory | None) -> None:
        """Let the model compute with what a memory holds; None: with the base weights alone."""
        for name, target in self.targets.items():
            change = None if memory is None else memory.total(name)
            refresh(target, [] if change is None else [change])

    @contextlib.contextmanager
    def inactive(self) -> Iterator[None]:
        """Within it, the model is the base model (added memories cost nothing then)."""
        before, self.active = self.active, False
        weights = None
        if self.method == "placement":
            weights = {n: t.weight.detach().clone() for n, t in self.targets.items()}
            self.show(None)
        try:
            yield
        finally:
            self.active = before
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
            # Keys may differ from row to row; all else must fit.
            same = memory and dataclasses.replace(memory.layout, keys=layout.keys)
            if same and (why := layout.difference(same)) is not None:
                raise ValueError(f"memory {i} does not fit this model: {why}")
        stacked: dict[str, Any] = {}
        for name, target in self.targets.items():
            own = self.method == "readout"
            stacked[name] = (
                ReadoutRows(self.readout, memories) if own else stack_rows(name, target, memories)
            )
        before, self.in_rows = self.in_rows, stacked
        try:
            with self.inactive():
                yield
        finally:
            self.in_rows = before


def adapt(
    model: nn.Module,
    levels: Sequence[Level] | None = None,
    *,
    method: str = "added",
    rank: int | None = None,
    frozen: float = 0.0,
    sites: Sequence[str] | None = None,
    calibration: Tensor | str | None = "generate",
    seed: int = 0,
) -> Any:
    """Give a pre-trained language model levels that go on learning (§7.3, Eq. 70-74).

    The model is changed in place and stays what it was: a Hugging Face model with ``generate``,
    usable with Trainer, peft and ``torch.compile``. Its logits are the same bits until something
    is learned, and again after `unadapt`.

    - ``method="added"`` (Eq. 74, independent levels): beside every MLP a zero-initialised memory
      ``y + V K h`` on the MLP's hidden activation h. All levels share the keys K and the memory's
      work; V is the sum of what the levels learned. Memory files are small.
    - ``method="placement"`` (the paper's §7.3): the MLPs themselves are the levels, shared out by
      depth, the fastest next to the output. No new parameters, large memory files.
    - ``method="readout"``: one memory at the model's end, whose values are the exact least-squares
      solution of everything learned, in any order (`nestlearn.adaptation.readout`). Made for
      examples, above all for classes that come one after the other; no backward passes.

    Args:
        model: a decoder-only causal language model.
        levels: their periods are counted in tokens; default 64, 512 and 4,096, and one of period
            1 for a readout (where the fastest is written, and slower ones take over from it).
        method: see above.
        rank: keys per added memory, r (default 256); numbers in a readout's key (default 3,072).
        frozen: share of the blocks, from the input up, that learn nothing. No backward work is
            done in them.
        sites: paths of the MLPs' last linear maps, where the structure is not recognised.
        calibration: what the added memories' keys are fitted to (see `nestlearn.adaptation.keys`):
            ``"generate"``, a text that the model generates (some seconds); tokens ``(B, T)`` of
            general text; or None, random keys.
        seed: of the keys.

    Returns:
        ``model``.

    Raises:
        ValueError: a model whose MLPs are not found, one that is adapted already, or settings out
            of range.

    Example:
        >>> model = nl.adapt(model, levels=[nl.Level(period=64), nl.Level(period=512)])
    """
    if getattr(model, _HANDLE, None) is not None:
        raise ValueError("the model is adapted already; nl.unadapt(model) takes the levels off")
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if rank is None:
        rank = RANK if method == "readout" else 256
    if method != "placement" and not (isinstance(rank, int) and rank >= 1):
        raise ValueError(f"rank must be 1 or more, got {rank!r}")
    if not 0 <= frozen < 1:
        raise ValueError(f"frozen is a share of the blocks, 0 or more and below 1, got {frozen!r}")
    periods = (1,) if method == "readout" else PERIODS
    chosen = _levels([Level(period=p) for p in periods] if levels is None else levels)
    found = find_sites(model, sites)
    first = int(len(found) * frozen)
    learning = found[first:]
    if method == "placement" and len(chosen) > len(learning):
        raise ValueError(
            f"{len(chosen)} levels cannot be placed on {len(learning)} blocks; use fewer levels or "
            "freeze less"
        )
    base = _fingerprint(model, found)
    fitted = Calibration(model, learning, base, calibration)
    keys = {}
    if method == "added":
        keys = fitted.keys(rank, seed)
    elif method == "readout":
        with reading(model):
            keys = {TARGET: readout_prior(model, found[0].width, fitted.text(), rank)}
    handle = Adaptation(model, method, chosen, learning, found[:first], keys, base, fitted)
    setattr(model, _HANDLE, handle)
    return model


def adapt_to(
    model: nn.Module, memory: Memory, calibration: Tensor | str | None = "generate"
) -> Any:
    """Adapt a model as a memory needs it: its method, levels, blocks and keys.

    Args:
        model: the memory's base model, not adapted.
        memory: see `nestlearn.adaptation.read_memory`.
        calibration: as for `adapt`; used when learning goes on, not for loading.

    Returns:
        ``model``, still computing what it did; `nestlearn.Learner` takes the memory.

    Raises:
        ValueError: another base model, or one that is adapted already; it is unchanged then.
    """
    if getattr(model, _HANDLE, None) is not None:
        raise ValueError("the model is adapted already; nl.unadapt(model) takes the levels off")
    layout = memory.layout
    try:
        found = find_sites(model)
    except ValueError:
        if layout.method != "added":
            raise
        found = find_sites(model, list(layout.shapes))
    names = set(layout.shapes)
    if layout.method == "readout":
        names = {site.output for site in found}
    learning = tuple(s for s in found if names & {s.output, *s.linears})
    frozen = tuple(s for s in found if s not in learning)
    missing = names - {n for s in learning for n in s.linears}
    if missing or not learning:
        raise ValueError(
            "the memory does not fit this model, which has no "
            f"{sorted(missing)[0] if missing else 'blocks to learn'}: another base model"
        )
    base = _fingerprint(model, found)
    fitted = Calibration(model, learning, base, calibration)
    handle = Adaptation(
        model, layout.method, memory.levels, learning, frozen, memory.keys, base, fitted
    )
    why = handle.layout.difference(layout)
    if why is not None:
        handle.remove()
        raise ValueError(f"the memory does not fit this model: {why}")
    setattr(model, _HANDLE, handle)
    return model


def unadapt(model: nn.Module) -> Any:
    """Take the levels off again; weights and logits are those of before `adapt`, bit for bit.

    Raises:
        ValueError: the model is not adapted.
    """
    adaptation_of(model).remove()
    for holder in _holders(model):
        holder.__dict__.pop(_HANDLE, None)
    return model


def adaptation_of(model: nn.Module) -> Adaptation:
    """What `adapt` did to this model, or to the one that peft or ``torch.compile`` wrapped.

    Raises:
        ValueError: nothing.
    """
    for holder in _holders(model):
        return getattr(holder, _HANDLE)
    raise ValueError("the model is not adapted; call nl.adapt(model) first")


def _holders(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if _HANDLE in m.__dict__]


def _levels(levels: Sequence[Level]) -> tuple[Level, ...]:
    if not levels or not all(isinstance(level, Level) for level in levels):
        raise ValueError("levels must be a list of nl.Level, e.g. [nl.Level(period=64)]")
    chosen = sorted((level.with_error("online") for level in levels), key=lambda lv: lv.period)
    names = [level_name(level) for level in chosen]
    if len(set(names)) != len(names):
        raise ValueError(f"levels must have different names or periods, got {names}")
    if chosen[0].period == NEVER:
        raise ValueError("no level ever learns: give one a period below nl.levels.NEVER")
    return tuple(chosen)


def _fingerprint(model: nn.Module, sites: Sequence[Site]) -> str:
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    weights = {n: _weight(model, n) for site in sites for n in site.linears}
    return fingerprint({"embeddings": embeddings.weight, **weights})


def _weight(model: nn.Module, name: str) -> Tensor:
    weight = model.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    return weight


def _floating(module: nn.Module, name: str) -> nn.Parameter:
    weight = module.weight
    if not isinstance(weight, nn.Parameter) or not weight.is_floating_point():
        raise ValueError(
            f"{name} ({type(module).__name__}) is quantised; load the model in bfloat16 or float32"
        )
    assert linear_shape(module) is not None
    return weight
