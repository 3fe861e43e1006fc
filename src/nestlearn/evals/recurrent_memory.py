"""Transformers with recurrent memory: RMT (Bulatov et al. 2022), ARMT (Rodkin et al. 2024).

A text is read in segments. Attention sees one segment; what is known of the earlier ones is in

- **RMT**: memory tokens, read before a segment and written behind it;
- **ARMT**: one associative memory per layer, written with the memory tokens behind a segment by a
  delta rule, and added to the input of the layer at every token of the later segments.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nestlearn.evals.harness.systems import Size, build

Pair = tuple[Tensor, Tensor]


class AssociativeMemory(nn.Module):
    """A matrix A and a normaliser z, written by memory tokens m and read by any token x.

    ``read(x) = A q / z.q`` with ``q = phi(W_q x)``; per memory token, with ``k = phi(W_k m)``,
    ``v = W_v m``, ``b = sigmoid(w_b m)`` and ``v' = read`` at k:

        A <- A + b (v - v') k^T,      z <- z + max(0, 1 - z.k) k

    All memory tokens of a segment read the state before it. phi is DPFP of degree 3, made of norm
    1 as the authors' later code does (without it the squares overflowed in training); no gradient
    goes through the factor of k in z.

    Args:
        width: of the tokens. key: numbers in a key before phi, which makes six times as many.

    Shapes: ``A (B, width, 6 key)``, ``z (B, 6 key)``.
    """

    def __init__(self, width: int, key: int) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(width, key, bias=False), nn.Linear(width, key, bias=False)
        self.v, self.b = nn.Linear(width, width, bias=False), nn.Linear(width, 1)
        nn.init.zeros_(self.v.weight)  # at first nothing is read, as in a plain Transformer

    def start(self, rows: int) -> Pair:
        """An empty memory."""
        weight = self.v.weight
        size = 6 * self.k.out_features
        return weight.new_zeros(rows, weight.shape[0], size), weight.new_zeros(rows, size)

    def read(self, x: Tensor, state: Pair) -> Tensor:
        """``(B, T, width)``: what is known of the tokens ``x``."""
        return self._at(_features(self.q(x)), state)

    def write(self, m: Tensor, state: Pair) -> Pair:
        """The memory after the memory tokens ``m (B, n, width)``."""
        matrix, norm = state
        k = _features(self.k(m))
        change = torch.sigmoid(self.b(m)) * (self.v(m) - self._at(k, state))
        new = (1 - k @ norm[..., None]).clamp(0, 1).detach()
        return matrix + change.mT @ k, norm + (new * k).sum(1)

    @staticmethod
    def _at(k: Tensor, state: Pair) -> Tensor:
        matrix, norm = state
        return k @ matrix.mT / (k @ norm[..., None] + 1e-5)


def phi(x: Tensor, degree: int = 3) -> Tensor:
    """Deterministic parameter-free projection: products of a vector with itself, moved along.

    Example:
        >>> phi(torch.tensor([1.0, -2.0]), degree=1)
        tensor([2., 0., 0., 0.])
    """
    both = torch.cat([x.relu(), (-x).relu()], -1)
    return torch.cat([both * both.roll(i, -1) for i in range(1, degree + 1)], -1)


def _features(x: Tensor) -> Tensor:
    return F.normalize(phi(x), dim=-1)


@dataclasses.dataclass
class Carried:
    """What goes from segment to segment: memory tokens, or a memory per layer."""

    tokens: Tensor | None
    layers: list[Pair]


@dataclasses.dataclass
class Read:
    """What a call hands back, by the names of language models."""

    logits: Tensor
    past_key_values: Carried | None


class RecurrentMemoryTransformer(nn.Module):
    """A Transformer that reads segment by segment, with state of constant size.

    Args:
        size: width, layers, heads.
        vocab_size: tokens.
        segment: tokens that attention sees together.
        memory_tokens: of each segment.
        associative: ARMT; otherwise RMT.

    Raises:
        ValueError: sizes below 1.

    Example:
        >>> model = RecurrentMemoryTransformer(Size(32, 1, 2), 50, segment=8)
        >>> model(input_ids=torch.randint(50, (2, 20))).logits.shape
        torch.Size([2, 20, 50])
    """

    def __init__(
        self,
        size: Size,
        vocab_size: int,
        segment: int = 512,
        memory_tokens: int = 8,
        associative: bool = True,
    ) -> None:
        super().__init__()
        for name, value in (("segment", segment), ("memory_tokens", memory_tokens)):
            if value < 1:
                raise ValueError(f"{name} must be 1 or more, got {value}")
        self.segment, self.associative = segment, associative
        self.body = build("transformer", size, vocab_size, segment + 2 * memory_tokens)
        self.memory = nn.Parameter(0.02 * torch.randn(memory_tokens, size.width))
        count = size.layers if associative else 0
        key = max(8, size.width // 4)
        made = [AssociativeMemory(size.width, key) for _ in range(count)]
        self.memories = nn.ModuleList(made)

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.memory.device

    def forward(
        self,
        input_ids: Tensor,
        past_key_values: Carried | None = None,
        use_cache: bool = False,
        logits_to_keep: int = 0,
    ) -> Read:
        """Read tokens; every call begins a new segment.

        Args:
            input_ids: ``(B, T)``.
            past_key_values: what earlier calls handed back.
            use_cache: hand back what is to be carried on.
            logits_to_keep: logits of this many last tokens (0: all).
        """
        rows = input_ids.shape[0]
        state = past_key_values or self.start(rows)
        found = []
        for ids in input_ids.split(self.segment, 1):
            hidden, state = self._segment(ids, state)
            found.append(hidden)
        hidden = torch.cat(found, 1)[:, -logits_to_keep:]
        logits = self.body.lm_head(hidden)
        return Read(logits, state if use_cache else None)

    def start(self, rows: int) -> Carried:
        """What is carried into the first segment."""
        return Carried(None, [memory.start(rows) for memory in self._memories()])

    def _memories(self) -> list[AssociativeMemory]:
        return [m for m in self.memories if isinstance(m, AssociativeMemory)]

    def _segment(self, ids: Tensor, state: Carried) -> tuple[Tensor, Carried]:
        body = self.body.model
        learned = self.memory.expand(len(ids), -1, -1)
        known = state.tokens if state.tokens is not None else learned
        ahead = known[:, : 0 if self.associative else None]
        x = torch.cat([ahead, body.embed_tokens(ids), known], 1)
        layers, memories = [], self._memories()
        for i, block in enumerate(body.layers):
            if self.associative:
                x = x + memories[i].read(x, state.layers[i])
            x, _ = block(x)
            if self.associative:
                written = x[:, -len(self.memory) :]
                layers.append(memories[i].write(written, state.layers[i]))
        hidden = body.norm(x[:, ahead.shape[1] : ahead.shape[1] + ids.shape[1]])
        tokens = None if self.associative else x[:, -len(self.memory) :]
        return hidden, Carried(tokens, layers)
