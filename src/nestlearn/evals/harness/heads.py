"""Other ways in and out of a system than tokens: what is read are points, what is told comes from
the last hidden state."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from nestlearn.nn.norm import RMSNorm


class AutoEncoder(nn.Module):
    """Tells a whole sequence from the hidden state of its last token (Poli et al. 2024).

        logits_t = U norm(f(h_T + p_t)),    f = gelu . linear . norm . gelu . linear . norm

    with ``p_t`` the sinusoids of position t. Nothing but ``h_T`` goes from the system to ``f``.

    Args:
        system: a `HopeForCausalLM`; its own head is not used.
        length: longest sequence.

    Example:
        >>> from nestlearn.evals.harness.systems import Size, build
        >>> coder = AutoEncoder(build("transformer", Size(32, 1, 2), 16, 8), 8)
        >>> coder(torch.randint(16, (2, 8))).logits.shape
        torch.Size([2, 8, 16])
    """

    positions: Tensor

    def __init__(self, system: Any, length: int) -> None:
        super().__init__()
        self.system = system.model
        width = system.config.hidden_size
        self.register_buffer("positions", sinusoids(length, width), persistent=False)
        self.decoder = nn.Sequential(
            RMSNorm(width), nn.Linear(width, width), nn.GELU(),
            RMSNorm(width), nn.Linear(width, width), nn.GELU(),
            RMSNorm(width), nn.Linear(width, system.config.vocab_size),
        )  # fmt: skip

    def forward(self, inputs: Tensor, use_cache: bool = False) -> CausalLMOutputWithPast:
        """``inputs (B, T)`` are token numbers; ``.logits`` is ``(B, T, vocab_size)``."""
        hidden = self.system(inputs, use_cache=use_cache).last_hidden_state[:, -1:]
        logits = self.decoder(hidden + self.positions[: inputs.shape[1]])
        return CausalLMOutputWithPast(logits=logits)


class PointReader(nn.Module):
    """Reads points instead of tokens: their linear images take the place of embeddings.

    Args:
        system: a `HopeForCausalLM`, whose vocabulary is the answers.
        features: numbers in a point.

    Example:
        >>> from nestlearn.evals.harness.systems import Size, build
        >>> reader = PointReader(build("transformer", Size(32, 1, 2), 3, 8), 5)
        >>> reader(torch.randn(2, 8, 5)).logits.shape
        torch.Size([2, 8, 3])
    """

    def __init__(self, system: Any, features: int) -> None:
        super().__init__()
        self.system = system
        self.projection = nn.Linear(features, system.config.hidden_size)

    def forward(self, inputs: Tensor, use_cache: bool = False) -> CausalLMOutputWithPast:
        """``inputs (B, T, features)``; ``.logits`` is ``(B, T, answers)``."""
        output: CausalLMOutputWithPast = self.system(
            inputs_embeds=self.projection(inputs), use_cache=use_cache
        )
        return output


def sinusoids(length: int, width: int) -> Tensor:
    """``(length, width)``: sines, then cosines, of positions at frequencies from 1 to 1/10,000.

    Raises:
        ValueError: ``width`` is odd.

    Example:
        >>> sinusoids(2, 4)[0]
        tensor([0., 0., 1., 1.])
    """
    if width % 2:
        raise ValueError(f"the width must be even to hold sines and cosines, got {width}")
    frequencies = torch.exp(-math.log(10_000) * torch.arange(width // 2) / max(1, width // 2 - 1))
    angles = torch.arange(length)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], 1)
