"""Levels for a model that exists: put on it, and taken off again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from nestlearn.adaptation.adapted import HANDLE, Adaptation, adaptation_of, holders
from nestlearn.adaptation.added import KEYS
from nestlearn.adaptation.calibration import Calibration
from nestlearn.adaptation.fingerprint import fingerprint
from nestlearn.adaptation.memory import WRITTEN, Memory, level_name
from nestlearn.adaptation.readout import RANK
from nestlearn.adaptation.sites import Site, find_sites
from nestlearn.levels.clock import NEVER
from nestlearn.levels.level import Level

METHODS = ("added", "placement", "readout")
PERIODS = (64, 512, 4096)
"""Periods of the default levels, in tokens."""


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
    if getattr(model, HANDLE, None) is not None:
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
    setattr(model, HANDLE, handle)
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
    if getattr(model, HANDLE, None) is not None:
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
    setattr(model, HANDLE, handle)
    return model


def unadapt(model: nn.Module) -> Any:
    """Take the levels off again; weights and logits are those of before `adapt`, bit for bit.

    Raises:
        ValueError: the model is not adapted.
    """
    adaptation_of(model).remove()
    for holder in holders(model):
        holder.__dict__.pop(HANDLE, None)
    return model


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
