"""Where an added memory gets its keys: places that have something to be learned."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nestlearn.adaptation.added import KEYS, SAME, Seen, memory_of, refresh
from nestlearn.adaptation.attach import Adaptation
from nestlearn.adaptation.keys import rounded
from nestlearn.adaptation.level_weights import LevelWeights
from nestlearn.adaptation.memory import WRITTEN, Memory

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
        before = written.get(name + KEYS)
        if before is None:
            before = torch.zeros(target.weight.shape, device=target.weight.device)
        new = _new_keys(one, errors[name], before)
        if not len(new):
            continue
        total = memory.total(name)
        strength = before.norm(dim=-1)
        if total is not None:
            # A slot that was given away and whose level was not due yet must not go at once.
            strength = strength * (1e-6 + total.norm(dim=-1).to(strength))
        rows = strength.argsort(stable=True)[: len(new)]
        keys = before.clone()  # snapshots hold the tensor of before
        keys[rows] = new[: len(rows)]
        written[name + KEYS] = keys
        weights.clear(name, rows)
        refresh(target, [keys])
        memory_of(target).prepare()
        handle.holds = True


def _new_keys(seen: Seen, error: Tensor, keys: Tensor) -> Tensor:
    """Keys for the places that need one, most important first; ``(m, r)``, m at most n."""
    energy = error.float().square().sum(-1)
    order = energy.argsort(descending=True, stable=True)
    held = energy[order].cumsum(0)
    if not held[-1] > 0:
        return keys[:0]
    chosen = order[: int((held < ENERGY * held[-1]).sum()) + 1]
    candidates = rounded(seen.key[chosen].float().cpu() * seen.size).to(keys)
    unit = F.normalize(candidates, dim=-1)
    known = (unit @ F.normalize(keys, dim=-1).mT).amax(-1) > SAME
    alike = (unit @ unit.mT > SAME).tril(-1).any(-1)  # of two alike, the more important stays
    return candidates[~(known | alike)][: len(keys)]
