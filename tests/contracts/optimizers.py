"""The optimizers of the contract battery, built from a model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from nestlearn.optim import (
    DGD,
    M3,
    AssociativeMomentum,
    DeepMomentum,
    DeltaMomentum,
    GeneralizedGD,
    MultiRate,
)


class Problem(nn.Module):
    """A linear layer, a free matrix and a free vector: every optimizer has something to do."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.layer = nn.Linear(4, 3)
        self.matrix = nn.Parameter(torch.zeros(2, 3))
        self.vector = nn.Parameter(torch.tensor([-1.2, 1.0]))
        with torch.no_grad():
            self.layer.weight.copy_(torch.randn(3, 4, generator=generator))
            self.layer.bias.zero_()
            self.matrix.copy_(torch.randn(2, 3, generator=generator))
        self.to(dtype)

    def convex(self) -> Tensor:
        """Least squares of the layer and a quadratic bowl each for matrix and vector."""
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(16, 4, generator=generator).to(self.vector.dtype)
        target = x @ torch.randn(4, 3, generator=generator).to(x.dtype)
        fit = (self.layer(x) - target).square().sum(-1).mean()
        return fit + (self.matrix - 1).square().sum() + (self.vector - 2).square().sum()

    def rosenbrock(self) -> Tensor:
        """(1 - a)^2 + 10 (b - a^2)^2 in the vector, and in each column of the matrix."""
        a, b = torch.stack([self.vector, *self.matrix.unbind(1)], dim=1)
        return ((1 - a).square() + 10 * (b - a.square()).square()).mean()


Make = Callable[..., torch.optim.Optimizer]


def associative(preset: str, **options) -> Make:
    return lambda model, **common: AssociativeMomentum(model, preset, **{**options, **common})


def matrices_only(preset: str, **options) -> Make:
    """A design for matrices; vectors in a group of their own, without Newton-Schulz."""

    def make(model: nn.Module, **common) -> torch.optim.Optimizer:
        named = list(model.named_parameters())
        groups = [
            {"params": [(n, p) for n, p in named if p.ndim > 1]},
            {"params": [(n, p) for n, p in named if p.ndim < 2], "output": "identity",
             "scale": None},
        ]  # fmt: skip
        return AssociativeMomentum(groups, preset, **{**options, **common})

    return make


def multirate(model: nn.Module, **common) -> torch.optim.Optimizer:
    lr = common.pop("lr", 0.02)
    options = {"lr": lr, "delta": 0.1, **common}
    return MultiRate(model.parameters(), inner=lambda g: DeltaMomentum(g, **options))


OPTIMIZERS: dict[str, Make] = {
    "sgd": associative("sgd", lr=0.01),
    "nesterov": associative("nesterov", lr=0.01),
    "signsgd": associative("signsgd", lr=0.05),
    "signum": associative("signum", lr=0.05),
    "lion": associative("lion", lr=0.05),
    "adagrad": associative("adagrad", lr=0.5),
    "adagrad_full": associative("adagrad_full", lr=0.5),
    "shampoo": associative("shampoo", lr=0.5),
    "rmsprop": associative("rmsprop", lr=0.05),
    "adam": associative("adam", lr=0.1),
    "adamw": associative("adamw", lr=0.1),
    "nadam": associative("nadam", lr=0.1),
    "muon": matrices_only("muon", lr=0.05, ns_dtype=None),
    "adamuon": matrices_only("adamuon", lr=0.2, ns_dtype=None),
    "delta": associative("delta", lr=0.2),
    "huber": associative("sgd", lr=0.2, objective="huber", retention=0.8),
    "feature": associative("sgd", lr=0.05, feature="unit", rate=0.1),
    "DeltaMomentum": lambda m, **k: DeltaMomentum(m, **{"lr": 0.02, "delta": 0.1, **k}),
    "DeepMomentum": lambda m, **k: DeepMomentum(m, **{"lr": 0.01, **k}),
    "DeepMomentum-l2": lambda m, **k: DeepMomentum(
        m, **{"lr": 0.05, "objective": "l2", "inner_lr": 0.5, "retention": 1.0, **k}
    ),
    "M3": lambda m, **k: M3(m, **{"lr": 0.2, "weight_decay": 0.0, "frequency": 4,
                                  "ns_dtype": None, **k}),
    "M3-paper": lambda m, **k: M3(m, **{"lr": 0.4, "weight_decay": 0.0, "form": "paper",
                                        "frequency": 4, "eps": 1e-8, "ns_dtype": None,
                                        "adamw_lr": 0.1, **k}),
    "DGD": lambda m, **k: DGD(m, **{"lr": 0.02, "momentum": 0.9, **k}),
    "GeneralizedGD": lambda m, **k: GeneralizedGD(
        m, **{"lr": 0.02, "momentum": 0.9, "objective": "dot", **k}
    ),
    "MultiRate": multirate,
}  # fmt: skip

OURS = [name for name in OPTIMIZERS if name != "MultiRate"]
