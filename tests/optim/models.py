"""A small model and its data, the same for every optimizer test."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TinyLM(nn.Module):
    """Embedding, one attention block with an MLP, norms and a head: every kind of parameter."""

    def __init__(self, vocabulary: int = 11, width: int = 8) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.norm = nn.LayerNorm(width)
        # Without bias: that of the keys has no gradient but rounding, whose sign is chance.
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        q, k, v = self.qkv(self.norm(x)).unsqueeze(1).chunk(3, -1)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).squeeze(1))
        return self.head(x + self.down(F.gelu(self.up(x))))


def tiny_lm(seed: int = 0, dtype: torch.dtype = torch.float64) -> TinyLM:
    torch.manual_seed(seed)
    return TinyLM().to(dtype)


def loss_of(model: nn.Module, step: int) -> Tensor:
    """Next-token loss on a counting sequence with noise, another one at every step."""
    generator = torch.Generator().manual_seed(step)
    start = torch.randint(0, 11, (4, 1), generator=generator)
    ids = (start + torch.arange(7)) % 11
    return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


def train(
    model: nn.Module, optimizers: torch.optim.Optimizer | list, steps: range | int = 100
) -> list[float]:
    """Losses of a plain training loop."""
    optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
    losses = []
    for step in steps if isinstance(steps, range) else range(steps):
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = loss_of(model, step)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.item())
    return losses


def distance(a: nn.Module, b: nn.Module) -> float:
    """Largest difference between the parameters of two models."""
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return max((x - y).abs().max().item() for x, y in pairs)


def same_bits(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
