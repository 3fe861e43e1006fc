"""Levels for a model that exists: where they are attached, and how they are taken off again."""

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
from nestlearn.adaptation.calibration import Calibration
from nestlearn.adaptation.completions import COMPLETIONS
from nestlearn.adaptation.fingerprint import fingerprint
from nestlearn.adaptation.memory import WRITTEN, Layout, Memory, level_name
from nestlearn.adaptation.readout import (
    RANK,
    TARGET,
    Readout,
    attach_readout,
    solved_rows,
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


def adapt(
    model: nn.Module,
    levels: Sequence[Level] | None = None,
    *,
    method: str = "added",
    rank: int | None = None,
    slots: int = 4096,
    memories: int = 1,
    frozen: float | None = None,
    sites: Sequence[str] | None = None,
    calibration: Tensor | str | None = "generate",
    seed: int = 0,
) -> Any:
    """Give a pre-trained language model levels that go on learning (§7.3, Eq. 70-74).

    The model is changed in place and stays what it was: a Hugging Face model with ``generate``,
    usable with Trainer, peft and ``torch.compile``. Its logits are the same bits until something
    is learned, and again after `unadapt`.

    - ``method="added"`` (Eq. 74, independent levels): beside an MLP an associative memory of keys
      and values (`nestlearn.adaptation.added.AddedMemory`). Keys are written where there is
      something to learn, values are learned: V is the sum of what the levels learned, which share
      the keys. Text that resembles nothing that was read is left alone; memory files are small.
    - ``method="placement"`` (the paper's §7.3): the MLPs themselves are the levels, shared out by
      depth, the fastest next to the output. No new parameters, large memory files.
    - ``method="readout"``: one memory at the model's end, the exact solution of everything learned,
      in any order (`nestlearn.adaptation.readout`). Made for examples, above all for classes that
      come one after the other, which it learns as whole completions; no backward passes.

    Args:
        model: a decoder-only causal language model.
        levels: their periods are counted in tokens; default 64, 512 and 4,096, and one of period
            1 for a readout (where the fastest is written, and slower ones take over from it).
        method: see above.
        rank: numbers in a key, r (default 256; of a readout 3,072).
        slots: keys per added memory; when all are taken, the weakest are overwritten. Of a readout:
            how many different completions it can learn.
        memories: how many blocks get an added memory, evenly spaced from the lowest that is not
            frozen.
        frozen: share of the blocks, from the input up, that learn nothing. No backward work is
            done in them. Default: 0.85 for added memories, 0.5 for placement.
        sites: paths of the MLPs' last linear maps, where the structure is not recognised.
        calibration: what keys are fitted to (see `nestlearn.adaptation.keys`):
            ``"generate"``, a text that the model generates (some seconds); tokens ``(B, T)`` of
            general text; or None, random projections.
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
    for name, count in (("slots", slots), ("memories", memories)):
        if method != "placement" and not (isinstance(count, int) and count >= 1):
            raise ValueError(f"{name} must be 1 or more, got {count!r}")
    if frozen is not None and not 0 <= frozen < 1:
        raise ValueError(f"frozen is a share of the blocks, 0 or more and below 1, got {frozen!r}")
    periods = (1,) if method == "readout" else PERIODS
    chosen = _levels([Level(period=p) for p in periods] if levels is None else levels)
    found = find_sites(model, sites)
    first = _first(len(found), method, frozen, len(chosen))
    learning = found[first:]
    if method == "added":
        if memories > len(learning):
            raise ValueError(
                f"{memories} memories do not fit beside {len(learning)} blocks; freeze less"
            )
        learning = tuple(learning[i * len(learning) // memories] for i in range(memories))
    if method == "placement" and len(chosen) > len(learning):
        raise ValueError(
            f"{len(chosen)} levels cannot be placed on {len(learning)} blocks; use fewer levels or "
            "freeze less"
        )
    base = _fingerprint(model, found)
    fitted = Calibration(model, learning, base, calibration)
    fixed = {}
    if method == "added":
        fixed = fitted.projections(rank, seed)
    elif method == "readout":
        fixed = fitted.readout(rank)
    others = tuple(site for site in found if site not in learning)
    size = 0 if method == "placement" else slots
    handle = Adaptation(model, method, chosen, learning, others, fixed, size, base)
    setattr(model, _HANDLE, handle)
    return model


def adapt_to(model: nn.Module, memory: Memory) -> Any:
    """Adapt a model as a memory needs it: its method, levels, blocks and keys.

    Args:
        model: the memory's base model, not adapted.
        memory: see `nestlearn.adaptation.read_memory`.

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
        found = find_sites(model, [n for n in layout.shapes if not n.endswith(KEYS)])
    names = {name for name in layout.shapes if not name.endswith(KEYS)}
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
    slots = 0
    if layout.method != "placement":
        slots = next(shape[0] for name, shape in layout.shapes.items() if name.endswith(KEYS))
    handle = Adaptation(
        model, layout.method, memory.levels, learning, frozen, memory.fixed, slots, base
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


def _first(blocks: int, method: str, frozen: float | None, levels: int) -> int:
    """The lowest block that learns."""
    if frozen is not None:
        return int(blocks * frozen)
    share, least = {"added": (0.85, 2), "placement": (0.5, levels)}.get(method, (0.0, 0))
    return max(0, min(int(blocks * share), blocks - least))


def _levels(levels: Sequence[Level]) -> tuple[Level, ...]:
    if not levels or not all(isinstance(level, Level) for level in levels):
        raise ValueError("levels must be a list of nl.Level, e.g. [nl.Level(period=64)]")
    chosen = sorted((level.with_error("online") for level in levels), key=lambda lv: lv.period)
    names = [level_name(level) for level in chosen]
    if WRITTEN in names:
        raise ValueError(f"a level cannot be named {WRITTEN!r}; choose another name")
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
