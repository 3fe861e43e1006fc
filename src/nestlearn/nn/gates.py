"""The roles of self-modifying Titans' memories, from what the memories answer (SPEC §5)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nestlearn.nn.native import ROLES, VECTORS
from nestlearn.nn.pointwise import unit

# Of the outer learning rate, see optim/groups.py; measured: docs/results.md.
LR_SCALE = 0.25


class Gates(nn.Module):
    """From raw answers to roles: unit vectors, ``η = η_max max(0, sigmoid(·) - c) / (1 - c)`` with
    the threshold c, ``α = sigmoid(·)``.

    The gradient of the η that M_mem is written with is that without the max (a straight-through
    estimator, Bengio et al. 2013, arXiv 1308.3432): with the exact one, a gate that has closed
    would never open again. The projection memories' own writes have the exact one (`inside`):
    through M_η an estimate would be multiplied by itself chunk after chunk, and overflow.

    Retention starts spread over heads, so that what is written fades to a half within
    ``half_lives`` tokens, shortest in the first head and longest in the last.
    """

    lr_scale = LR_SCALE

    def __init__(
        self,
        heads: int,
        eta_max: float,
        weight_decay: bool,
        half_lives: tuple[float, float],
        threshold: float = 0.0,
    ):
        super().__init__()
        self.threshold = threshold
        self.eta_max, self.weight_decay, self.heads = eta_max, weight_decay, heads
        self.half_lives = half_lives
        self.eta_bias = nn.Parameter(torch.empty(heads))
        self.alpha_bias = nn.Parameter(torch.empty(heads)) if weight_decay else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """η starts at 0.05 (or half its maximum), α at the half-lives."""
        with torch.no_grad():
            share = min(0.05, self.eta_max / 2) / self.eta_max
            gate = self.threshold + (1 - self.threshold) * share
            self.eta_bias.fill_(-math.log(1 / gate - 1))
            if self.alpha_bias is not None:
                shortest, longest = (math.log10(t) for t in self.half_lives)
                rate = math.log(2) / torch.logspace(shortest, longest, self.heads)
                self.alpha_bias.copy_(-torch.log(torch.expm1(rate)))  # sigmoid: exp(-rate)

    def forward(self, raw: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """k, v, q ``(B, H, C, d)`` and η, α ``(B, H, C)``."""
        roles = {name: self.role(name, value) for name, value in raw.items()}
        if not self.weight_decay:
            roles["alpha"] = torch.ones_like(roles["eta"])
        return tuple(roles[name] for name in ROLES)

    def role(self, name: str, raw: Tensor) -> Tensor:
        """One role from its raw answer."""
        if name in VECTORS:
            return unit(raw)
        gate = torch.sigmoid(raw + self.bias(name, raw.dtype)[:, None])
        if name == "alpha":
            return gate
        if self.threshold:
            gate = (gate - self.threshold) / (1 - self.threshold)
            gate = gate + F.relu(-gate).detach()  # exactly 0 below, and a gradient to open again
        return self.eta_max * gate

    def inside(self, eta: Tensor) -> Tensor:
        """η with its exact gradient: none where it is 0."""
        return eta * (eta.detach() > 0) if self.threshold else eta

    def bias(self, name: str, dtype: torch.dtype) -> Tensor:
        """What is added to the raw answer of η or α, ``(H,)``."""
        bias = self.eta_bias if name == "eta" else self.alpha_bias
        assert bias is not None
        return bias.to(dtype)
