"""What a readout's keys are made of: what was read so far, and what is read now.

    s_t = mean over i <= t of S_h [h_1i / |h_1i|; ...; h_Bi / |h_Bi|]    h_b: state after block b
          with weights sqrt(-log p(y_i))        y: the tokens, p: what the model expects of any text
    c_t = S_a [a_1t / |a_1t|; ...; a_Lt / |a_Lt|]                        a_l: attention of block l
    k_t = s_t / |s_t| * sign(G e_t) + LAST c_t / |c_t|, made of unit norm    e: token embedding

S are fixed count sketches to r numbers: each input is added to one of them, with a sign; the inputs
of different blocks lie over each other in different places. The mean says what the text is about
and has less noise than any one token; rare tokens say more about it (`rarity`). Binding it to the
token itself (G: random signs) makes what comes after one token a question of its own: what follows
one word does not mix with how texts begin, and hardly with other text. c adds what stands near.
Nothing that is learned changes a key: what a readout adds comes after the last block.

Of whole completions (`nestlearn.adaptation.completions`) the key is ``s_t`` itself, at the end of a
prompt: it does not depend on which token stands there.

The mean goes on behind an attention cache, as a layer of its own in it (`Sums`), so that whatever
is done to the cache (rows picked, tokens taken back) is done to the sums too. So do the tokens and
how familiar each was.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer

from nestlearn.adaptation.sites import block_paths, find_attention

POOLED = 6
"""Blocks whose states are averaged, B: evenly spaced, the last among them."""
LAST = 0.3
"""Weight of the token itself beside the mean."""


class Sums(DynamicLayer):
    """Sums ``(B, 1, T, r)`` of the tokens so far, and ``(B, 1, T, 3)`` what `Read` has beside them,
    in a cache."""


@dataclasses.dataclass(frozen=True)
class Read:
    """What a pass has read.

    Attributes:
        key: k ``(B, T, r)``, float32, of the tokens of the pass.
        sums, counts: ``(B, A, r)`` and ``(B, A)``, weighted sum and sum of weights of the tokens up
            to each of the whole text, the last T of which are of the pass.
        tokens: ``(B, A)``; -1 where embeddings were given in place of tokens.
        familiar: g ``(B, A)``; 0 at padding.
    """

    key: Tensor
    sums: Tensor
    counts: Tensor
    tokens: Tensor
    familiar: Tensor

    def mean(self, row: Any, places: Any) -> Tensor:
        """``s_t (..., r)`` at places of the whole text."""
        return self.sums[row, places] / self.counts[row, places].clamp(min=1e-6)[..., None]


class ReadoutKeys(nn.Module):
    """Makes keys (see the module's text) from what its hooks are shown in a pass.

    Args:
        blocks: L.
        width: D.
        rank: r.
        weights: of the tokens in the mean, ``(V,)``, see `rarity`.
    """

    signs: Tensor
    bind: Tensor
    weights: Tensor

    def __init__(self, blocks: int, width: int, rank: int, weights: Tensor) -> None:
        super().__init__()
        device = weights.device
        self.register_buffer("weights", weights, persistent=False)
        self.rank, self.width, self.blocks = rank, width, blocks
        count = min(POOLED, blocks)
        self.pooled = [(i + 1) * blocks // count - 1 for i in range(count)]
        """Which blocks' states are averaged, from 0."""
        signs = _signs(blocks + count + rank, width).to(device)
        self.register_buffer("signs", signs[: blocks + count], persistent=False)
        self.register_buffer("bind", signs[blocks + count :], persistent=False)
        self.begin(None, None)

    def begin(self, mask: Any, embeddings: Tensor | None) -> None:
        """A pass begins; ``mask``: its attention mask, of which only ``(B, T)`` is understood;
        ``embeddings``: the tokens', if they were given in place of tokens."""
        self.embeddings: list[Tensor] = [] if embeddings is None else [embeddings]
        self.tokens: Tensor | None = None
        self.attention: list[Tensor] = []
        self.states: list[Tensor] = []
        self.mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None

    @torch.no_grad()
    def finish(self, cache: Any, familiar: Callable[[Tensor], Tensor]) -> Read:
        """What the pass has read, which goes on in ``cache``, if any.

        Args:
            cache: the attention cache.
            familiar: keys ``(B, T, r)`` to g ``(B, T)``.
        """
        now = _unit(self._sketch(self.attention, self.signs[: self.blocks]))
        sums = self._sketch(self.states, self.signs[self.blocks :])
        rows, length = sums.shape[:2]
        mask = sums.new_ones(rows, length)
        if self.mask is not None:
            mask = self.mask[:, -length:].to(sums)
        if self.tokens is None:
            counts = mask * self.weights.mean()
        else:
            counts = mask * self.weights[self.tokens]
        sums, counts = (sums * counts[..., None]).cumsum(1), counts.cumsum(1)
        layers = getattr(cache, "layers", None)
        layer = None
        if layers is not None:
            if not (layers and isinstance(layers[-1], Sums)):
                layers.append(Sums())
            layer = layers[-1]
            if layer.get_seq_length():
                sums = sums + layer.keys[:, 0, -1:]
                counts = counts + layer.values[:, 0, -1:, 0]
        bound = torch.where(self.embeddings[0].float() @ self.bind.mT < 0, -1.0, 1.0)
        key = _unit(_unit(sums) * bound + LAST * now)
        tokens = torch.full_like(mask, -1) if self.tokens is None else self.tokens.to(mask)
        more = torch.stack([counts, tokens, familiar(key) * mask], -1)
        if layer is not None:
            sums, more = (x[:, 0] for x in layer.update(sums[:, None], more[:, None]))
        self.begin(None, None)
        return Read(key, sums, more[..., 0], more[..., 1].long(), more[..., 2])

    def _sketch(self, parts: Sequence[Tensor], signs: Tensor) -> Tensor:
        """Count sketch ``(..., r)`` of the parts' directions, each ``(..., D)``."""
        rank, width = self.rank, self.width
        laps = -(-width // rank) + 1  # the last places reach beyond r: folded back below
        made = torch.zeros(*parts[0].shape[:-1], laps * rank, device=parts[0].device)
        for i, part in enumerate(parts):
            place = i * rank // len(parts)
            made[..., place : place + width].addcmul_(_unit(part.float()), signs[i])
        return made.unflatten(-1, (laps, rank)).sum(-2)

    def watch(self, model: Any, handle: Any) -> list[Any]:
        """Hooks on the blocks; they look while ``handle.reads`` is true."""
        hooks = []
        for paths, kept in ((find_attention(model), None), (block_paths(model), self.pooled)):
            for i, path in enumerate(paths):
                if kept is None or i in kept:
                    hook = _Reads(handle, self, "attention" if kept is None else "states")
                    hooks.append(model.get_submodule(path).register_forward_hook(hook))
        embed = model.get_input_embeddings()
        hooks.append(embed.register_forward_hook(_Reads(handle, self, "embeddings")))
        hooks.append(model.get_decoder().register_forward_pre_hook(_Begins(self), with_kwargs=True))
        return hooks


class _Reads:
    """Notes what a module gives; a class, so that models can be copied and pickled."""

    def __init__(self, handle: Any, keys: ReadoutKeys, kind: str) -> None:
        self.handle, self.keys, self.kind = handle, keys, kind

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if self.handle.reads:
            found = output if isinstance(output, Tensor) else output[0]
            getattr(self.keys, self.kind).append(found.detach())
            if self.kind == "embeddings":
                self.keys.tokens = inputs[0] if inputs else None


class _Begins:
    """A new pass begins."""

    def __init__(self, keys: ReadoutKeys) -> None:
        self.keys = keys

    def __call__(self, module: nn.Module, inputs: Any, given: dict[str, Any]) -> None:
        self.keys.begin(given.get("attention_mask"), given.get("inputs_embeds"))


@torch.no_grad()
def rarity(model: Any) -> Tensor:
    """``sqrt(-log p(y))`` of every token y, ``(V,)``.

    p is what a model expects after the token that begins texts (or ends them, or else the first).

    The model must be in evaluation mode.
    """
    config = model.config
    count = len(model.get_input_embeddings().weight)
    begin = (config.bos_token_id, config.eos_token_id, 0)
    first = next(b for b in begin if isinstance(b, int) and b < count)
    ids = torch.tensor([[first]], device=model.get_input_embeddings().weight.device)
    logits = model(input_ids=ids, use_cache=False).logits[0, -1]
    weights = (-logits.float().log_softmax(-1)).clamp(min=0).sqrt()
    return torch.cat([weights, weights.new_full((max(0, count - len(weights)),), 1.0)])[:count]


def _unit(x: Tensor) -> Tensor:
    return nn.functional.normalize(x, dim=-1)


def _signs(blocks: int, width: int) -> Tensor:
    """A sign of every input ``(L, D)``: a fixed hash (splitmix64), the same on every machine."""
    z = np.arange(1, blocks * width + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ z >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ z >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    one = (z ^ z >> np.uint64(31)) & np.uint64(1)
    return torch.from_numpy(one.astype(np.float32) * 2 - 1).view(blocks, width)
