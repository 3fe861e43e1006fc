"""The gated delta rule without its layer: inputs and step, for our worker and the peers'."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from serve import Trial
from torch import Tensor


def rule_trial(rule: Callable[..., Tensor], dim: int, heads: int, batch: int, length: int) -> Trial:
    """Forward, and backward to all inputs, of ``rule(q, k, v, g, beta)``: q, k, v
    ``(batch, length, heads, width)``, log decay and step size ``(batch, length, heads)``."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, batch, length, heads, dim // heads, generator=generator).unbind(0)
    g, beta = torch.randn(2, batch, length, heads, generator=generator).unbind(0)
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    inputs = [q, k, v, F.logsigmoid(g + 4), beta.sigmoid()]

    def step() -> float:
        loss = rule(*(copy.copy(t).detach().requires_grad_() for t in inputs)).square().mean()
        loss.backward()
        return float(loss.detach())

    return Trial(step, batch * length, 0)
