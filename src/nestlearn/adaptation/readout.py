"""A memory beside a model's output that is written exactly: what is read later erases nothing.

Its keys hold still, as nothing that is learned changes them (`nestlearn.adaptation.readout_keys`).
That is what lets the values be the least-squares solution of all pairs so far
(`nestlearn.rules.least_squares`), whatever their order.

    h <- h + g(f) V k,   f = v k                             h: the model's last hidden state
    [V; v] = (sum [t_y; 1] k^T) (A_0 + sum k k^T)^{-1}       over the tokens y that were learned
    g(f) = min(1, max(0, f - c) / (1 - c))

The value ``t_y`` is the change of h that raises the logit of token y by ``gain`` and all others, in
the least-squares sense, by nothing. ``A_0`` says that general text, which the model generates
itself, needs no change. f tells what was learned from general text, one for the first and zero for
the second: a regression of its own, with the same sums. Where it is below c nothing is added, so
that text that resembles nothing learned is computed as before.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nestlearn.adaptation.added import CHILD
from nestlearn.adaptation.keys import quantise
from nestlearn.adaptation.memory import Memory
from nestlearn.adaptation.readout_keys import ReadoutKeys
from nestlearn.adaptation.sites import find_attention
from nestlearn.rules.least_squares import solve

if TYPE_CHECKING:
    from nestlearn.adaptation.attach import Adaptation

TARGET = "readout"
RANK = 3072
"""Numbers in a key, r, unless something else is asked for."""
RIDGE, GENERAL, GAIN = 0.01, 100.0, 100.0
FAMILIAR = 0.6
"""c, below which a place counts as general text."""


class Readout(nn.Module):
    """``h + g(f) V k`` at the end of a model (see the module's text).

    Args:
        blocks: L.
        width: D.
        factor: R in ``A_0 = R^T R``, ``(r, r)``.

    Attributes:
        keys: makes the keys.
        key: keys ``(B, T, r)`` of the last pass, kept within `watching`.
        sums: ``[sum k k^T; sum t k^T; sum k^T]``, ``(r + D + 1, r)``, float32; V and v are solved
            from it when they are next needed.
        gain: logits that a learned token gains.
    """

    prior: Tensor

    def __init__(self, blocks: int, width: int, factor: Tensor, device: torch.device) -> None:
        super().__init__()
        self.rank, self.width, self.gain = len(factor), width, GAIN
        factor = factor.float().to(device)
        self.register_buffer("prior", factor.mT @ factor, persistent=False)
        self.keys = ReadoutKeys(blocks, width, self.rank, device)
        sums = torch.zeros(self.rank + width + 1, self.rank, device=device)
        self.sums = nn.Parameter(sums, requires_grad=False)
        self.key: Tensor | None = None
        self.watched = False
        self._held = False
        self._solved: tuple[int, Tensor | None] = (-1, None)

    @property
    def values(self) -> Tensor | None:
        """``[V; v]``, ``(D + 1, r)``; None while nothing was learned."""
        version = self.sums._version
        if self._solved[0] != version and not (self._held and self._solved[0] >= 0):
            self._solved = (version, self.solve(self.sums))
        return self._solved[1]

    @torch.no_grad()
    def solve(self, sums: Tensor) -> Tensor | None:
        """``[V; v]`` of given sums; None where they hold nothing."""
        cross = sums[self.rank :]
        if not cross.any():
            return None
        return solve(sums[: self.rank], cross, self.prior)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Within it `key` stays after a pass; V stays what it was, too."""
        _ = self.values
        self._held = self.watched = True
        try:
            yield
        finally:
            self._held = self.watched = False
            self.key = None

    def forward(self, h: Tensor, key: Tensor) -> Tensor:
        """``h + g(f) V k``; h itself while nothing was learned."""
        values = self.values
        return h if values is None else h + gated(nn.functional.linear(key, values)).to(h)


def gated(answer: Tensor) -> Tensor:
    """``[V k; f] (..., D + 1)`` to ``g(f) V k (..., D)``."""
    answer, familiar = answer[..., :-1], answer[..., -1:]
    return answer * ((familiar - FAMILIAR) / (1 - FAMILIAR)).clamp(0, 1)


class Writer:
    """Turns what a pass has read into sums; the values of tokens are made once.

    Args:
        model: the adapted model.
        readout: its `Readout`.
    """

    def __init__(self, model: Any, readout: Readout) -> None:
        self.readout = readout
        self.weight: Tensor = model.get_output_embeddings().weight
        count, width = self.weight.shape
        total = torch.zeros(width, width, device=self.weight.device)
        for rows in self.weight.detach().split(8192):
            total += rows.float().mT @ rows.float()
        total.diagonal().add_(1e-4 * total.diagonal().mean())
        self.inverse = torch.linalg.inv(total.double()).float()

    @torch.no_grad()
    def sums(self, key: Tensor, tokens: Tensor) -> Tensor:
        """``[sum k k^T; sum t_y k^T; sum k^T]`` of keys ``(N, r)`` and tokens y ``(N,)``."""
        directions = self.weight[tokens].float()
        values = directions @ self.inverse
        values *= self.readout.gain / (values * directions).sum(-1, keepdim=True)
        return torch.cat([key.mT @ key, values.mT @ key, key.sum(0, keepdim=True)])


class _Ends:
    """Adds the memory's answer to the last hidden state."""

    def __init__(self, handle: Adaptation) -> None:
        self.handle = handle

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        handle, readout = self.handle, self.handle.readout
        if not handle.reads:
            return None
        key = readout.keys.finish(getattr(output, "past_key_values", None))
        if readout.watched:
            readout.key = key
        h = output[0]
        if handle.in_rows is not None:
            rows = handle.in_rows[TARGET]
            assert isinstance(rows, ReadoutRows)
            h = rows(h, key)
        elif handle.active:
            h = readout(h, key)
        if isinstance(output, tuple):
            return (h, *output[1:])
        output[next(iter(output))] = h
        return output


class ReadoutRows:
    """Values of several memories, one a row of the batch."""

    def __init__(self, readout: Readout, memories: Sequence[Memory | None]) -> None:
        totals = [None if m is None else m.total(TARGET) for m in memories]
        made = [None if t is None else readout.solve(t.to(readout.sums)) for t in totals]
        width = len(readout.sums) - readout.rank
        empty = readout.sums.new_zeros(width, readout.rank)
        self.values = torch.stack([empty if v is None else v for v in made])

    def __call__(self, h: Tensor, key: Tensor) -> Tensor:
        """``h + g(f) V k``, row by row."""
        if len(h) != len(self.values):
            raise ValueError(
                f"rows() was given {len(self.values)} memories, the batch has {len(h)} rows"
            )
        return h + gated(key @ self.values.mT).to(h)


def attach_readout(handle: Adaptation, model: Any) -> tuple[Readout, nn.Module, list[Any]]:
    """Put a readout on a model; returns it, the module it is part of and the hooks."""
    width = handle.sites[0].width
    body = model.get_decoder()
    device = model.get_output_embeddings().weight.device
    readout = Readout(len(find_attention(model)), width, handle.fixed[TARGET], device)
    body.add_module(CHILD, readout)
    hooks = readout.keys.watch(model, handle)
    hooks.append(body.register_forward_hook(_Ends(handle)))
    return readout, body, hooks


class _Always:
    reads = True


@torch.no_grad()
def readout_prior(model: Any, width: int, tokens: Tensor | None, rank: int) -> Tensor:
    """Factor of ``A_0 = RIDGE + GENERAL * E[k k^T]`` over general text ``(B, T)``, ``(r, r)``.

    It is rounded to what memory files hold (`nestlearn.adaptation.keys.quantise`).
    """
    total = torch.zeros(rank, rank, dtype=torch.float64)
    if tokens is not None and GENERAL:
        device = model.get_input_embeddings().weight.device
        keys = ReadoutKeys(len(find_attention(model)), width, rank, device)
        hooks = keys.watch(model, _Always())
        try:
            for rows in tokens.split(8):
                model(input_ids=rows.to(device), use_cache=False, logits_to_keep=1)
                key = keys.finish(None).flatten(0, 1).cpu()
                total += key.mT @ key
        finally:
            for hook in hooks:
                hook.remove()
        total *= GENERAL / tokens.numel()
    total.diagonal().add_(RIDGE)
    integers, scale = quantise(torch.linalg.cholesky(total).mT.float())
    return integers * scale
