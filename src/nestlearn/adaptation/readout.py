"""A memory beside a model's output that is written exactly: what is read later erases nothing.

Its keys hold still, as nothing that is learned changes them (`nestlearn.adaptation.readout_keys`).
That is what lets it be the exact solution of all it was told, whatever the order
(`nestlearn.rules.least_squares`). It answers in two ways. Texts are learned token by token:

    h <- h + g(f) V k,   f = v k                                h: the model's last hidden state
    [V; v; b] = (sum [t_y; 1; 0] k^T) (A_0 + sum k k^T)^{-1}    over the tokens y that were learned
    g(f) = min(1, max(0, f - c) / (1 - c))

The value ``t_y`` is the change of h that raises the logit of token y by ``gain`` and all others, in
the least-squares sense, by nothing. Examples are learned as whole completions, whose next tokens'
probabilities are mixed with the model's own (`nestlearn.adaptation.completions`); of them only the
end of the prompt, where a completion begins, is in the sums above, with ``[0; 0; 1]``.

``A_0`` says that general text, which the model generates itself, needs no change. f tells what was
learned from general text, one for the first and zero for the second, and ``b k`` where completions
begin: regressions of their own, with the same sums. Where f is below c nothing is added, and where
``g(b k)`` is zero no completion begins, so that text that resembles nothing learned is computed as
before.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nestlearn.adaptation.added import CHILD, KEYS
from nestlearn.adaptation.completions import (
    COMPLETIONS,
    LONGEST,
    SHRINKAGE,
    Completions,
    Next,
    following,
    mixed,
)
from nestlearn.adaptation.keys import quantise
from nestlearn.adaptation.memory import WRITTEN, Memory
from nestlearn.adaptation.reader import reading
from nestlearn.adaptation.readout_keys import Read, ReadoutKeys, rarity
from nestlearn.adaptation.sites import find_attention
from nestlearn.rules.least_squares import solve

if TYPE_CHECKING:
    from nestlearn.adaptation.adapted import Adaptation

TARGET = "readout"
RANK = 3072
"""Numbers in a key, r, unless something else is asked for."""
RIDGE, GENERAL, GAIN = 0.01, 100.0, 100.0
FAMILIAR = 0.6
"""c, below which a place counts as general text."""


@dataclasses.dataclass(frozen=True)
class Solved:
    """What the sums of a memory say.

    Attributes:
        values: ``[V; v; b]``, ``(D + 2, r)``.
        completions: None while there are none.
    """

    values: Tensor
    completions: Completions | None


class Readout(nn.Module):
    """``h + g(f) V k`` at the end of a model, and its completions (see the module's text).

    Args:
        blocks: L.
        width: D.
        factor: R in ``A_0 = R^T R``, ``(r, r)``.
        slots: completions at most.
        weights: see `nestlearn.adaptation.readout_keys.rarity`.

    Attributes:
        keys: makes the keys.
        read: what the last pass has read, kept within `watching`.
        sums: ``[sum k k^T; sum [t; 1; 0] k^T or [0; 0; 1] k^T; sum x x^T]``,
            ``(2r + D + 2, r)``, float32; what they say is solved from it when it is next needed.
        rows, tokens: the completions, see `nestlearn.adaptation.completions`.
        gain: logits that a learned token gains.
        shrinkage: of the covariance within completions.
    """

    prior: Tensor

    def __init__(
        self, blocks: int, width: int, factor: Tensor, slots: int, weights: Tensor
    ) -> None:
        super().__init__()
        device = weights.device
        self.rank, self.width = len(factor), width
        self.gain, self.shrinkage = GAIN, SHRINKAGE
        factor = factor.float().to(device)
        self.register_buffer("prior", factor.mT @ factor, persistent=False)
        self.keys = ReadoutKeys(blocks, width, self.rank, weights)
        # Zeros take no memory on a CPU until they are written to.
        for name, shape in (
            ("sums", (2 * self.rank + width + 2, self.rank)),
            ("rows", (slots, 2 * self.rank + 1)),
            ("tokens", (slots, LONGEST)),
        ):
            empty = torch.zeros(*shape, device=device)
            setattr(self, name, nn.Parameter(empty, requires_grad=False))
        self.sums: nn.Parameter
        self.rows: nn.Parameter
        self.tokens: nn.Parameter
        self.read: Read | None = None
        self.nexts: list[Next] = []  # from the end of a pass to its logits
        self.places: Sequence[int] = (0, 0)
        self.watched = False
        self._held = False
        self._solved: tuple[Any, Solved | None] = (None, None)

    @property
    def solved(self) -> Solved | None:
        """What the sums say; None while nothing was learned."""
        version = (self.sums._version, self.rows._version, self.tokens._version)
        if self._solved[0] != version and not (self._held and self._solved[0] is not None):
            self._solved = (version, self.solve(self.sums, self.rows, self.tokens))
        return self._solved[1]

    @property
    def values(self) -> Tensor | None:
        """``[V; v; b]``, ``(D + 2, r)``; None while nothing was learned."""
        return None if self.solved is None else self.solved.values

    @torch.no_grad()
    def solve(self, sums: Tensor, rows: Tensor, tokens: Tensor) -> Solved | None:
        """What given sums say; None where they hold nothing."""
        r = self.rank
        gram, cross, scatter = sums[:r], sums[r:-r], sums[-r:]
        if not cross.any():
            return None
        known = None
        if scatter.any():
            if tokens.max() > len(self.keys.weights):
                raise ValueError("the readout's completions hold tokens that the model has not")
            known = Completions(tokens, rows, scatter, self.shrinkage)
        return Solved(solve(gram, cross, self.prior), known)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Within it `read` stays after a pass; what the memory says stays what it was, too."""
        _ = self.solved
        self._held = self.watched = True
        try:
            yield
        finally:
            self._held = self.watched = False
            self.read = None


def gate(familiar: Tensor) -> Tensor:
    """g(f)."""
    return ((familiar - FAMILIAR) / (1 - FAMILIAR)).clamp(0, 1)


def gated(answer: Tensor) -> Tensor:
    """``[V k; f] (..., D + 1)`` to ``g(f) V k (..., D)``."""
    return answer[..., :-1] * gate(answer[..., -1:])


class Shown:
    """What a pass is computed with.

    Args:
        solved: of one memory for all rows, or of one for each (None: an empty one).
    """

    def __init__(self, solved: Sequence[Solved | None]) -> None:
        self.solved = solved
        values = [None if one is None else one.values for one in solved]
        some = next((v for v in values if v is not None), None)
        self.values: Tensor | None = None
        if some is not None:
            filled = [torch.zeros_like(some) if v is None else v for v in values]
            self.values = filled[0] if len(filled) == 1 else torch.stack(filled)

    def answer(self, key: Tensor) -> Tensor | None:
        """``[V k; f; b k]``, ``(B, T, r)`` to ``(B, T, D + 2)``; None of empty memories."""
        if len(self.solved) not in (1, len(key)):
            raise ValueError(
                f"rows() was given {len(self.solved)} memories, the batch has {len(key)} rows"
            )
        return None if self.values is None else key @ self.values.mT

    def nexts(self, read: Read) -> list[Next]:
        """What comes next wherever a completion may have begun."""
        found: list[Next] = []
        for row in range(len(read.key)):
            one = self.solved[row if len(self.solved) > 1 else 0]
            if one is not None and one.completions is not None:
                found += following(read, row, one.completions)
        return found


class _Ends:
    """Adds the memory's answer to the last hidden state."""

    def __init__(self, handle: Adaptation) -> None:
        self.handle = handle

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        handle, readout = self.handle, self.handle.readout
        readout.nexts, readout.places = [], (0, 0)
        if not handle.reads:
            return None
        shown = handle.in_rows[TARGET] if handle.in_rows is not None else None
        if shown is None:
            shown = Shown([readout.solved if handle.active else None])
        answer: Tensor | None = None

        def familiar(key: Tensor) -> Tensor:
            nonlocal answer
            answer = shown.answer(key)
            return key.new_zeros(key.shape[:2]) if answer is None else gate(answer[..., -1])

        read = readout.keys.finish(getattr(output, "past_key_values", None), familiar)
        if readout.watched:
            readout.read = read
        if answer is None:
            return None
        readout.nexts, readout.places = shown.nexts(read), read.key.shape[:2]
        h = output[0]
        h = h + gated(answer[..., :-1]).to(h)
        if isinstance(output, tuple):
            return (h, *output[1:])
        output[next(iter(output))] = h
        return output


class _Heads:
    """Mixes what comes next into the logits of the pass before."""

    def __init__(self, handle: Adaptation) -> None:
        self.handle = handle

    def __call__(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
        readout = self.handle.readout
        nexts, (rows, length) = readout.nexts, readout.places
        readout.nexts = []
        if not nexts:
            return None
        if output.dim() != 3 or len(output) != rows or output.shape[1] > length:
            raise ValueError(
                f"a readout needs the logits of the last places of a pass ({rows}, {length}), "
                f"these are {tuple(output.shape)}"
            )
        return mixed(output, nexts, length)


def solved_rows(readout: Readout, memories: Sequence[Memory | None]) -> Shown:
    """Several memories, one a row of the batch."""
    made: list[Solved | None] = []
    for memory in memories:
        sums = None if memory is None else memory.total(TARGET)
        if memory is None or sums is None:
            made.append(None)
            continue
        rows, tokens = memory.total(COMPLETIONS), memory.changes.get(WRITTEN, {})
        found = tokens.get(COMPLETIONS + KEYS)
        made.append(
            readout.solve(
                sums.to(readout.sums),
                readout.rows[:0] if rows is None else rows.to(readout.sums),
                readout.tokens[:0] if found is None else found.to(readout.sums),
            )
        )
    return Shown(made)


def attach_readout(handle: Adaptation, model: Any) -> tuple[Readout, nn.Module, list[Any]]:
    """Put a readout on a model; returns it, the module it is part of and the hooks."""
    width = handle.sites[0].width
    body = model.get_decoder()
    head = model.get_output_embeddings()
    with reading(model):
        weights = rarity(model).to(head.weight.device)
    blocks = len(find_attention(model))
    readout = Readout(blocks, width, handle.fixed[TARGET], handle.slots, weights)
    body.add_module(CHILD, readout)
    hooks = readout.keys.watch(model, handle)
    hooks.append(body.register_forward_hook(_Ends(handle)))
    hooks.append(head.register_forward_hook(_Heads(handle)))
    return readout, body, hooks


class _Always:
    reads = True


def _unknown(key: Tensor) -> Tensor:
    return key.new_zeros(key.shape[:2])


@torch.no_grad()
def readout_prior(model: Any, width: int, tokens: Tensor | None, rank: int) -> Tensor:
    """Factor of ``A_0 = RIDGE + GENERAL * E[k k^T]`` over general text ``(B, T)``, ``(r, r)``.

    It is rounded to what memory files hold (`nestlearn.adaptation.keys.quantise`).
    """
    total = torch.zeros(rank, rank, dtype=torch.float64)
    if tokens is not None and GENERAL:
        device = model.get_input_embeddings().weight.device
        keys = ReadoutKeys(len(find_attention(model)), width, rank, rarity(model))
        hooks = keys.watch(model, _Always())
        try:
            for rows in tokens.split(8):
                model(input_ids=rows.to(device), use_cache=False, logits_to_keep=1)
                key = keys.finish(None, _unknown).key.flatten(0, 1).cpu()
                total += key.mT @ key
        finally:
            for hook in hooks:
                hook.remove()
        total *= GENERAL / tokens.numel()
    total.diagonal().add_(RIDGE)
    integers, scale = quantise(torch.linalg.cholesky(total).mT.float())
    return integers * scale
