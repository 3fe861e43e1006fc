"""The optimizer benchmarks' own arithmetic: landscapes, searches, scores, timing, interpolation."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def _on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(sys, "argv", ["benchmarks/example.py", "--quick"])


@pytest.mark.parametrize("shape", [(1.0, 1.0, 1.0), (20.0, 0.3, 5.0)])
def test_the_landscape_and_its_gradient(shape: tuple[float, float, float]) -> None:
    from optimizers_toy import gradient, psi

    kappa, a, omega = shape
    r, theta = torch.tensor([-3.5, 2.0], dtype=torch.float64).requires_grad_().unbind()
    height = r**2 + kappa * (r - theta + a * torch.sin(omega * r)) ** 2
    assert psi(-3.5, 2.0, shape) == pytest.approx(height.item())
    slopes = torch.autograd.grad(height, (r, theta))
    assert gradient(-3.5, 2.0, shape) == pytest.approx([g.item() for g in slopes])
    assert psi(0.0, 0.0, shape) == 0 and gradient(0.0, 0.0, shape) == (0, 0)


def test_reaching_the_minimum_means_staying_there() -> None:
    from optimizers_toy import HOLD, TOLERANCE, descend, psi

    def sgd(points: list[torch.Tensor], lr: float) -> torch.optim.Optimizer:
        return torch.optim.SGD(points, lr=lr)

    shape = (1.0, 1.0, 1.0)
    steps, path = descend(sgd, 0.1, shape, 1000)
    assert steps is not None
    heights = [psi(*point, shape) for point in path]
    assert heights[steps - 1] > TOLERANCE
    assert max(heights[steps : steps + HOLD]) <= TOLERANCE
    assert descend(sgd, 0.1, shape, steps + HOLD - 1)[0] is None  # seen too shortly
    assert descend(sgd, 10.0, shape, 1000)[0] is None  # diverges


def test_the_search_takes_the_best_rate_and_setting() -> None:
    from optimizer_zoo import Entry, search
    from optimizers_toy import LANDSCAPES, descend
    from optimizers_toy import search as toy_search

    asked: list[tuple[float, dict]] = []

    def measure(lr: float, setting: dict) -> float:
        asked.append((lr, setting))
        return abs(math.log2(lr) - (3 if setting else 5)) - 3 * len(setting)

    entry = Entry(torch.optim.SGD, (1.0, 2.0, 4.0), ({"nesterov": True}, {}))
    assert search(entry, measure) == (8.0, {"nesterov": True})
    assert (64.0, {}) in asked  # the grid grew until its best was inside
    plain = [("", lambda ps, lr: torch.optim.SGD(ps, lr=lr, momentum=0.9))]
    best = toy_search(plain, LANDSCAPES["round"], 300)
    assert best is not None
    steps, _ = descend(plain[0][1], best["lr"], LANDSCAPES["round"], 300)
    assert steps == best["steps"]


def test_every_parameter_has_one_optimizer() -> None:
    from optimizer_zoo import build
    from optimizers_loss import VisionTransformer

    model = VisionTransformer(8, 1, 2)
    for name in ("AdamW", "Muon", "M3"):
        matrices, rest = build(name, model, 1e-3, 2e-3, {})
        owned = [
            [id(p) for group in o.param_groups for p in group["params"]] for o in (matrices, rest)
        ]
        assert sorted(owned[0] + owned[1]) == sorted(id(p) for p in model.parameters())
        assert {id(p) for p in owned_matrices(model)} == set(owned[0])
        assert {group["lr"] for group in rest.param_groups} == {2e-3}


def owned_matrices(model: nn.Module) -> list[torch.Tensor]:
    """Weights of the hidden linear maps."""
    kept = ("embed", "blocks")
    return [p for n, p in model.named_parameters() if n.startswith(kept) and p.ndim == 2]


def test_the_rate_follows_warm_up_and_cosine() -> None:
    from optimizer_zoo import schedule

    shares = [schedule(t, 5, 105) for t in range(106)]
    assert shares[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert shares[55] == pytest.approx(0.55)
    assert shares[105] == pytest.approx(0.1)
    assert shares[5:] == sorted(shares[5:], reverse=True)


def test_cells_of_another_search_are_not_taken() -> None:
    from optimizers_loss import same, thinned

    row = {"lr": 0.1, "rest_lr": 0.2, "setting": {"betas": [0.9, 0.95]}}
    assert same(row, 0.1, 0.2, {"betas": (0.9, 0.95)})
    assert not same(row, 0.1, 0.4, {"betas": (0.9, 0.95)})
    assert not same(row, 0.1, 0.2, {})
    assert not same(None, 0.1, 0.2, {})
    assert thinned([1.0, 2.0, 3.0, 4.0, 9.0], 2) == [1.5, 3.5, 9.0]


def test_digits_are_shifted_by_up_to_a_pixel() -> None:
    from optimizers_loss import image_batches

    image = torch.zeros(1, 8, 8)
    image[0, 4, 4] = 1.0
    places = set()
    data = image_batches(image, torch.tensor([7]), 2, seed=0)
    for _ in range(100):
        images, labels = next(data)
        assert labels.tolist() == [7, 7]
        places |= {tuple(place) for place in images[0].nonzero().tolist()}
    assert places == {(r, c) for r in (3, 4, 5) for c in (3, 4, 5)}


def test_tasks_live_in_orthogonal_subspaces() -> None:
    pytest.importorskip("sklearn")
    from optimizers_continual import TASKS, WIDTH, Tasks

    tasks = Tasks(0)
    whole = tasks.bases.flatten(0, 1)
    assert torch.allclose(whole @ whole.T, torch.eye(TASKS * WIDTH), atol=1e-5)
    first, labels = tasks.split(0, "test")
    second, others = tasks.split(1, "test")
    assert (first @ second.T).abs().max() < 1e-4
    assert first.norm() > 1
    assert not torch.equal(labels, others)
    assert sorted(tasks.orders[0].tolist()) == list(range(10))


def test_forgetting_is_what_was_learned_and_lost() -> None:
    from optimizers_continual import least_forgetting, scores

    found = scores([[0.9, 0.1, 0.1], [0.5, 0.8, 0.1], [0.3, 0.7, 1.0]])
    assert found["learned"] == pytest.approx(0.9)
    assert found["final"] == pytest.approx(2 / 3)
    assert found["forgetting"] == pytest.approx((0.6 + 0.1) / 2)
    rows = [{"learned": 0.9, "forgetting": 0.2}, {"learned": 0.5, "forgetting": 0.0}]
    assert least_forgetting(rows, 0.8) == 0.2
    assert least_forgetting(rows, 0.95) is None


def test_turns_are_taken_step_by_step() -> None:
    from optimizers_speed import ratios, turns

    order: list[str] = []
    steps = {name: lambda name=name: order.append(name) for name in ("a", "b", "slow")}
    found = turns(steps, blocks=2, block=2, every={"slow": 2})
    assert order == ["a", "b", "slow", *["a", "b", "slow", "a", "b"] * 2]
    assert {name: len(blocks) for name, blocks in found.items()} == {"a": 2, "b": 2, "slow": 2}
    times = {"a": [[3.0, 1.0], [1.0, 1.0]], "b": [[2.0, 1.0], [4.0, 1.0]]}
    assert ratios(times, "a", "b") == [1.5, 0.25]


def test_optimizers_are_compared_at_one_recall() -> None:
    from learner_optimizers import at_recall

    rows = [
        {"lr": 1.0, "recall": -3.0, "forgetting": 0.1},
        {"lr": 2.0, "recall": -2.0, "forgetting": 0.3},
        {"lr": 4.0, "recall": -2.6, "forgetting": 0.9},  # too large a rate recalls less again
    ]
    assert at_recall(rows, -2.5, "forgetting") == pytest.approx(0.2)
    assert at_recall(rows, -1.0, "forgetting") is None
    assert at_recall(rows[:1], -3.0, "forgetting") is None
