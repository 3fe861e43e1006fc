"""Where an added memory gets its keys: places that have something to be learned."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nestlearn.adaptation.adapted import Adaptation
from nestlearn.adaptation.added import KEYS, SAME, Seen, memory_of, refresh
from nestlearn.adaptation.keys import rounded
from nestlearn.adaptation.level_weights import LevelWeights
from nestlearn.adaptation.memory import WRITTEN, Memory, used_rows, with_rows

ENERGY = 0.98
"""Share of the squared gradient that the places with keys must hold."""


@torch.no_grad()
def write_keys(
    handle: Adaptation, memory: Memory, weights: LevelWeights, seen: dict[str, Seen],
    errors: dict[str, Tensor],
) -> None:  # fmt: skip
    """Give free slots to places where the loss depends most on what a memory would answer.

    A place gets a slot if it is among those that hold most of the squared error, and no key
    resembles it yet. When all slots are taken, the ones whose values are weakest are overwritten.

    Args:
        handle: the adapted model.
        memory, weights: what was learned, and its levels' parameters.
        seen: memory -> what passed it, N places.
        errors: memory -> ``dL/d(answer)``, ``(N, D)``.
    """
    written = memory.changes.setdefault(WRITTEN, {})
    for name, one in seen.items():
        target = handle.targets[name + KEYS]
        slots, rank = target.weight.shape
        before = written.get(name + KEYS)
        if before is None:
            before = torch.zeros(0, rank, device=target.weight.device)
        new = _new_keys(one, errors[name], before[: used_rows(before)], slots)
        if not len(new):
            continue
        keys = with_rows(before, weights.make_room(name, used_rows(before) + len(new)))
        rows = (~keys.any(-1)).nonzero()[: len(new), 0]
        if len(rows) < len(new):
            rows = _weakest(keys, memory.total(name))[: len(new)]
        if len(keys) <= len(before):
            keys = keys.clone()  # snapshots may hold the tensor of before
        keys[rows] = new
        written[name + KEYS] = keys
        weights.clear(name, rows)
        refresh(target, [keys])
        memory_of(target).prepare(len(keys))
        handle.holds = True


def _weakest(keys: Tensor, total: Tensor | None) -> Tensor:
    """Slots, those with the least influence first."""
    strength = keys.norm(dim=-1)
    if total is not None:
        # A slot that was given away and whose level was not due yet must not go at once.
        strength = strength * (1e-6 + with_rows(total, len(keys)).norm(dim=-1).to(strength))
    return strength.argsort(stable=True)


def _new_keys(seen: Seen, error: Tensor, keys: Tensor, most: int) -> Tensor:
    """Keys for the places that need one, most important first; ``(m, r)``, m at most ``most``."""
    energy = error.float().square().sum(-1)
    order = energy.argsort(descending=True, stable=True)
    held = energy[order].cumsum(0)
    if not held[-1] > 0:
        return keys[:0]
    chosen = order[: int((held < ENERGY * held[-1]).sum()) + 1]
    candidates = rounded((seen.key[chosen].float() * seen.size).cpu()).to(keys)
    unit = F.normalize(candidates, dim=-1)
    known = (unit @ F.normalize(keys, dim=-1).mT > SAME).any(-1)
    alike = (unit @ unit.mT > SAME).tril(-1).any(-1)  # of two alike, the more important stays
    return candidates[~(known | alike)][:most]
