"""What a readout's memory takes from what is read: sums, and completions it has not met before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nestlearn.adaptation.adapted import Adaptation
from nestlearn.adaptation.added import KEYS, refresh
from nestlearn.adaptation.completions import COMPLETIONS, LONGEST, as_row
from nestlearn.adaptation.examples import Batch
from nestlearn.adaptation.level_weights import LevelWeights
from nestlearn.adaptation.memory import WRITTEN, Memory, used_rows, with_rows
from nestlearn.adaptation.reader import Segment
from nestlearn.adaptation.readout import TARGET


class Writer:
    """Turns what a pass has read into sums; the values of tokens are made once.

    Args:
        model: the adapted model.
        handle: what `nestlearn.adapt` did to it.
        begin: the token that begins texts, if there is one.
    """

    def __init__(self, model: Any, handle: Adaptation, begin: int | None) -> None:
        self.model, self.handle, self.readout = model, handle, handle.readout
        self.begin = [] if begin is None else [begin]
        self.weight: Tensor = model.get_output_embeddings().weight
        width = self.weight.shape[1]
        total = torch.zeros(width, width, device=self.weight.device)
        for rows in self.weight.detach().split(8192):
            total += rows.float().mT @ rows.float()
        total.diagonal().add_(1e-4 * total.diagonal().mean())
        self.inverse = torch.linalg.inv(total.double()).float()

    @torch.no_grad()
    def sums(self, item: Segment | Batch, memory: Memory, weights: LevelWeights) -> dict[str, Any]:
        """What the last pass adds to the targets; new completions get their rows at once.

        Raises:
            ValueError: more completions than there is room for.
        """
        if isinstance(item, Segment):
            assert self.readout.read is not None
            [key], tokens = item.pick([self.readout.read.key])
            return {TARGET: self._of_tokens(key, tokens)}
        return self._of_examples(item, memory, weights)

    def _of_tokens(self, key: Tensor, tokens: Tensor) -> Tensor:
        """``[sum k k^T; sum [t_y; 1; 0] k^T; 0]`` of keys ``(N, r)`` and tokens y ``(N,)``."""
        directions = self.weight[tokens.to(self.weight.device)].float()
        values = directions @ self.inverse
        values *= self.readout.gain / (values * directions).sum(-1, keepdim=True)
        once = key.new_tensor([[1.0, 0.0]]).expand(len(key), 2)
        values = torch.cat([values, once], 1)
        return torch.cat([_gram(key), values.mT @ key, key.new_zeros(key.shape[1], key.shape[1])])

    def _of_starts(self, key: Tensor, x: Tensor) -> Tensor:
        """``[sum k k^T; sum [0; 0; 1] k^T; sum x x^T]`` of keys and means ``(N, r)``."""
        nothing = key.new_zeros(self.weight.shape[1] + 1, key.shape[1])
        return torch.cat([_gram(key), nothing, key.sum(0, keepdim=True), _gram(x)])

    def _of_examples(
        self, batch: Batch, memory: Memory, weights: LevelWeights
    ) -> dict[str, Tensor]:
        """The same of the places where completions begin, and the completions' rows."""
        read = self.readout.read
        assert read is not None
        found = [[t for t in row if t >= 0] for row in batch.labels.tolist()]
        short = [i for i, tokens in enumerate(found) if len(tokens) <= LONGEST]
        length = batch.ids.shape[1]
        starts = torch.tensor([length - len(found[i]) - 1 for i in short], dtype=torch.long)
        rows = torch.tensor(short, dtype=torch.long)
        x, key = read.mean(rows, starts), read.key[rows, starts]
        total = self._of_starts(key, x)
        for i, tokens in enumerate(found):
            if len(tokens) > LONGEST:
                own = read.key[i, -len(tokens) - 1 : -1]
                total += self._of_tokens(own, torch.tensor(tokens))
        if not short:
            return {TARGET: total}
        given = [as_row(found[i]) for i in short]
        places = self._places(given, memory, weights)
        count = max(places) + 1
        more = x.new_zeros(count, 2 * self.readout.rank + 1)
        entries = torch.cat([x, self._alone([found[i] for i in short]), x.new_ones(len(x), 1)], 1)
        more.index_add_(0, torch.tensor(places, device=x.device), entries)
        return {TARGET: total, COMPLETIONS: more}

    def _places(
        self, given: Sequence[tuple[float, ...]], memory: Memory, weights: LevelWeights
    ) -> list[int]:
        """The row of each completion; new ones get one."""
        target = self.handle.targets[COMPLETIONS + KEYS]
        written = memory.changes.setdefault(WRITTEN, {})
        before = written.get(COMPLETIONS + KEYS)
        if before is None:
            before = torch.zeros(0, LONGEST, device=target.weight.device)
        held = [tuple(row) for row in before[: used_rows(before)].tolist()]
        index = {row: i for i, row in enumerate(held) if any(row)}
        free = [i for i, row in enumerate(held) if not any(row)]
        new = [row for row in dict.fromkeys(given) if row not in index]
        places = (free + list(range(len(held), len(held) + len(new))))[: len(new)]
        if new:
            most = max(places) + 1
            if most > len(target.weight):
                raise ValueError(
                    f"the readout has room for {len(target.weight)} different completions; "
                    "adapt with more slots"
                )
            keys = with_rows(before, weights.make_room(COMPLETIONS, most)).clone()
            keys[places] = torch.tensor(new, device=keys.device)
            written[COMPLETIONS + KEYS] = keys
            weights.clear(COMPLETIONS, torch.tensor(places, device=keys.device))
            refresh(target, [keys])
            index.update(zip(new, places, strict=True))
        return [index[row] for row in given]

    def _alone(self, completions: Sequence[Sequence[int]]) -> Tensor:
        """Mean states of completions that are read by themselves, ``(N, r)``."""
        texts = list(dict.fromkeys((*self.begin, *tokens) for tokens in completions))
        length = max(map(len, texts))
        ids = torch.zeros(len(texts), length, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, text in enumerate(texts):
            ids[i, length - len(text) :] = torch.tensor(text)
            mask[i, length - len(text) :] = 1
        device = self.weight.device
        self.model(
            input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0).to(device), logits_to_keep=1,
        )  # fmt: skip
        read = self.readout.read
        assert read is not None
        x = read.mean(slice(None), -1)
        return x[[texts.index((*self.begin, *tokens)) for tokens in completions]]


def _gram(rows: Tensor) -> Tensor:
    """Sum of ``x x^T`` over rows, symmetric to the last bit: files hold one triangle."""
    product = rows.mT @ rows
    return product.tril() + product.tril(-1).mT
