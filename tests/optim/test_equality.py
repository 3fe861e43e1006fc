"""Presets of `AssociativeMomentum` beside the optimizers they are named after: 100 steps of a real
model, float64, to rounding (SPEC §3.1). What torch has is compared with torch, the rest with its
published update written out here."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from nestlearn.optim import PRESETS, AssociativeMomentum, split_parameters

from .models import distance, tiny_lm, train

STEPS = 100
TORCH: dict[str, tuple[Callable, dict, dict]] = {
    "sgd": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}, {}),
    "sgd-l2": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}, {}),
    "sgd-dampened": (torch.optim.SGD, {"lr": 0.5, "momentum": 0.8}, {"rate": 0.2}),
    "nesterov": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}, {}),
    "adam": (torch.optim.Adam, {"lr": 1e-2}, {}),
    "adam-l2": (torch.optim.Adam, {"lr": 1e-2, "weight_decay": 0.01}, {}),
    "adamw": (torch.optim.AdamW, {"lr": 1e-2, "weight_decay": 0.1}, {}),
    "adagrad": (torch.optim.Adagrad, {"lr": 0.1, "weight_decay": 0.01}, {}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 1e-2}, {}),
    "rmsprop-momentum": (
        torch.optim.RMSprop, {"lr": 1e-2, "momentum": 0.9}, {"retention": 0.9},
    ),
    "nadam": (torch.optim.NAdam, {"lr": 1e-2}, {}),
}  # fmt: skip


class Written(torch.optim.Optimizer):
    """An optimizer from its published update: ``(w, g, state, t) -> None``, in place."""

    def __init__(self, params, update: Callable[[Tensor, Tensor, dict, int], None]) -> None:
        super().__init__(params, {})
        self.update, self.time = update, 0

    @torch.no_grad()
    def step(self) -> None:
        self.time += 1
        for group in self.param_groups:
            for p in group["params"]:
                self.update(p, p.grad, self.state[p], self.time)


def compare(name: str, theirs, ours, pick=lambda m: list(m.parameters())) -> None:
    a, b = tiny_lm(), tiny_lm()
    start = tiny_lm()
    rest = [[p for p in m.parameters() if not any(p is q for q in pick(m))] for m in (a, b)]
    others = [[torch.optim.SGD(r, lr=0.05)] if r else [] for r in rest]
    train(a, [theirs(pick(a)), *others[0]], STEPS)
    train(b, [ours(pick(b)), *others[1]], STEPS)
    moved = max((x - y).abs().max().item() for x, y in zip(pick(b), pick(start), strict=True))
    assert moved > 1e-2, "both must have moved"
    assert distance(a, b) < 1e-9, f"{name}: {distance(a, b)} apart after {STEPS} steps"


CASES = [(name, True) for name in TORCH] + [(name, False) for name in TORCH if "-" not in name]


@pytest.mark.parametrize(("name", "foreach"), CASES)
def test_equals_torch(name: str, foreach: bool) -> None:
    optimizer, options, design = TORCH[name]
    changes = {"weight_decay": options.get("weight_decay", 0.0), **design, "foreach": foreach}
    if name == "sgd-dampened":
        options = {**options, "dampening": 0.8}
        # torch's first step is not dampened; ours starts from zero. Start torch from the same.
        compare(name, lambda p: _damped(p, options), lambda p: AssociativeMomentum(
            p, preset="sgd", lr=options["lr"], retention=0.8, **changes))  # fmt: skip
        return
    preset = name.split("-")[0]
    compare(
        name,
        lambda p: optimizer(p, **options),
        lambda p: AssociativeMomentum(p, preset=preset, lr=options["lr"], **changes),
    )


def _damped(params: list[Tensor], options: dict) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD(params, **options)
    for p in params:
        optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return optimizer


def matrices(model: nn.Module) -> list[Tensor]:
    return [p for _, p in split_parameters(model).matrices]


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("scale", ["original", "match_rms_adamw"])
def test_muon_equals_torch(nesterov: bool, scale: str) -> None:
    """Both in bfloat16 Newton-Schulz: the same operations, so the same bits."""
    compare(
        "muon",
        lambda p: torch.optim.Muon(
            p, lr=0.02, weight_decay=0.1, nesterov=nesterov, adjust_lr_fn=scale
        ),
        lambda p: AssociativeMomentum(
            p, preset="muon", lr=0.02, weight_decay=0.1, scale=scale,
            readout="nesterov" if nesterov else "memory",
        ),
        matrices,
    )  # fmt: skip


def signsgd(w, g, state, t) -> None:
    w -= 0.002 * g.sign()


def signum(w, g, state, t) -> None:
    m = state.setdefault("m", torch.zeros_like(w))
    m.copy_(0.9 * m + 0.1 * g)
    w -= 0.002 * m.sign()


def lion(w, g, state, t) -> None:
    """Chen et al. 2023, algorithm 2: interpolate, sign, decay, then the slower average."""
    m = state.setdefault("m", torch.zeros_like(w))
    c = 0.9 * m + 0.1 * g
    w -= 0.002 * (c.sign() + 0.1 * w)
    m.copy_(0.99 * m + 0.01 * g)


def adagrad_full(w, g, state, t) -> None:
    """Duchi et al. 2011: G <- G + g g^T,  w <- w - lr (G + eps I)^{-1/2} g."""
    flat = g.flatten()
    G = state.setdefault("G", torch.zeros(len(flat), len(flat), dtype=w.dtype))
    G += torch.outer(flat, flat)
    u, s, _ = torch.linalg.svd(G)
    w -= 0.05 * ((u * (s + 1e-6).rsqrt()) @ (u.T @ flat)).view_as(w)


def shampoo(w, g, state, t) -> None:
    """Gupta et al. 2018: L <- L + G G^T, R <- R + G^T G, W <- W - lr L^{-1/4} G R^{-1/4}."""
    L = state.setdefault("L", 1e-4 * torch.eye(w.shape[0], dtype=w.dtype))
    L += g @ g.T if w.ndim > 1 else torch.outer(g, g)
    u, s, _ = torch.linalg.svd(L)
    if w.ndim == 1:
        w -= 0.05 * (u * s**-0.5) @ (u.T @ g)
        return
    R = state.setdefault("R", 1e-4 * torch.eye(w.shape[1], dtype=w.dtype))
    R += g.T @ g
    a, b, _ = torch.linalg.svd(R)
    w -= 0.05 * ((u * s**-0.25) @ u.T) @ g @ ((a * b**-0.25) @ a.T)


def adamuon(w, g, state, t) -> None:
    """Si et al. 2025, as their published code computes it (Newton-Schulz in float64 here)."""
    m = state.setdefault("m", torch.zeros_like(w))
    v = state.setdefault("v", torch.zeros_like(w))
    m.lerp_(g, 0.05)
    x = g.lerp(m, 0.95)
    x = x.T if w.shape[0] > w.shape[1] else x
    x = x / x.norm()
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.775 * a + 2.0315 * a @ a) @ x
    x = x.T if w.shape[0] > w.shape[1] else x
    v.copy_(0.999 * v + 0.001 * x**2)
    x = x / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
    x = x * min(w.shape) ** 0.5 / (x.norm() + 1e-8)
    w *= 1 - 0.01 * 0.1
    w -= 0.01 * 0.2 * max(w.shape) ** 0.5 * x


def small(model: nn.Module) -> list[Tensor]:
    """Tensors whose outer product with themselves is small."""
    return [p for p in model.parameters() if p.numel() <= 64]


PUBLISHED: dict[str, tuple[Callable, dict, Callable]] = {
    "signsgd": (signsgd, {"lr": 0.002}, lambda m: list(m.parameters())),
    "signum": (signum, {"lr": 0.002}, lambda m: list(m.parameters())),
    "lion": (lion, {"lr": 0.002, "weight_decay": 0.1}, lambda m: list(m.parameters())),
    "adagrad_full": (adagrad_full, {"lr": 0.05}, small),
    "shampoo": (shampoo, {"lr": 0.05}, lambda m: [p for p in m.parameters() if p.shape[0] <= 24]),
    "adamuon": (adamuon, {"lr": 0.01, "weight_decay": 0.1, "ns_dtype": None}, matrices),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_equals_its_published_update(name: str) -> None:
    update, options, pick = PUBLISHED[name]
    compare(
        name,
        lambda p: Written(p, update),
        lambda p: AssociativeMomentum(p, preset=name, **options),
        pick,
    )


def test_every_preset_is_compared() -> None:
    compared = {name.split("-")[0] for name in TORCH} | set(PUBLISHED) | {"muon"}
    assert compared == set(PRESETS) - {"delta"}
