"""Few-shot episodes: how they are read, what their references say, and the experiment."""

from __future__ import annotations

import math
from itertools import combinations
from typing import Any

import pytest
import torch

from nestlearn.evals.episodes import FAMILIES, NOISE, Functions, Prototypes, Values
from nestlearn.evals.few_shot import FewShot
from nestlearn.evals.harness.experiment import Request
from nestlearn.evals.harness.results import Results
from nestlearn.evals.harness.systems import Size
from nestlearn.evals.harness.trained import Plan


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("split", ["train", "2"])
def test_sequences_of_functions_alternate_points_and_answers(split: str) -> None:
    task = Functions("linear", 3, (1, 2, 4))
    x, y = task.episodes(split, 5, seeded())
    batch = task.draw(split, 5, seeded())
    assert isinstance(batch, Values)
    n = 2 if split == "2" else 4
    assert batch.inputs.shape == (5, 2 * n + 1, 5) and task.length == 9
    for i in range(n + 1):
        assert torch.equal(batch.inputs[:, 2 * i, :3], x[:, i])
        assert (batch.inputs[:, 2 * i, 3:] == 0).all()
        asked = split == "train" or i == n
        assert (batch.asked[:, 2 * i] == asked).all()
        assert not asked or torch.equal(batch.targets[:, 2 * i], y[:, i])
        if i < n:
            answer = batch.inputs[:, 2 * i + 1]
            assert torch.equal(answer[:, 3], y[:, i]) and not batch.asked[:, 2 * i + 1].any()
            assert (answer[:, :3] == 0).all() and (answer[:, 4] == 1).all()


def test_sequences_of_classes() -> None:
    task = Prototypes(3, (1, 2), classes=4)
    x, y = task.episodes("2", 50, seeded())
    assert x.shape == (50, 9, 3)
    for row in y.tolist():
        assert sorted(row[:-1]) == sorted([*range(4)] * 2)  # two of every class
    assert set(y[:, -1].tolist()) == {0, 1, 2, 3}
    batch = task.draw("2", 50, seeded())
    assert batch.inputs.shape == (50, 17, 8) and batch.asked.sum(1).tolist() == [1] * 50
    assert torch.equal(batch.targets[:, -1], y[:, -1])
    assert torch.equal(batch.inputs[:, 1::2, 3:7].argmax(2), y[:, :-1])
    assert task.draw("train", 2, seeded()).asked[:, ::2].all()


@pytest.mark.parametrize("name", FAMILIES)
def test_functions_have_mean_square_one_and_differ(name: str) -> None:
    task = Functions(name, 5, (1, 4))
    x = torch.randn(4_000, 8, 5, generator=seeded())
    y = task.values(x, seeded(1))
    assert float((y**2).mean()) == pytest.approx(1, abs=0.12)
    same = task.values(x[:1].expand(50, -1, -1), seeded(2))
    assert (same.std(0) > 0.3).all()  # one set of points, many functions
    noisy = task.sample(4_000, 8, False, seeded(3))[1]
    assert float((noisy**2).mean()) == pytest.approx(1 + NOISE**2, abs=0.12)


def test_a_tree_is_a_function_of_few_signs() -> None:
    task = Functions("tree", 4, (1,), depth=2)
    x = torch.randn(30, 200, 4, generator=seeded())
    y = task.values(x, seeded(1))
    assert torch.equal(y, task.values(x.sign(), seeded(1)))
    assert all(2 <= len(row.unique()) <= 4 for row in y)


def test_a_sparse_function_depends_on_its_features_alone() -> None:
    task = Functions("sparse", 5, (1,), active=2)
    eye = torch.eye(5).expand(60, -1, -1)
    assert ((task.values(eye, seeded()) != 0).sum(1) == 2).all()


def gaussian_log(y: torch.Tensor, covariance: torch.Tensor) -> float:
    return float(
        torch.distributions.MultivariateNormal(torch.zeros_like(y), covariance).log_prob(y)
    )


def test_ridge_is_the_posterior_mean() -> None:
    # Of jointly normal values: Cov(y*, y) Cov(y)^-1 y, with Cov from the prior of the weights.
    task = Functions("linear", 4, (6,))
    x, y = (t.double() for t in task.episodes("6", 20, seeded()))
    said = task.references(x, y)["ridge (exact)"]
    for i in range(20):
        cover = x[i] @ x[i].T / 4 + NOISE**2 * torch.eye(7).double()
        expected = cover[-1, :-1] @ torch.linalg.solve(cover[:-1, :-1], y[i, :-1])
        assert float(said[i]) == pytest.approx(float(expected), abs=1e-8)


def test_supports_are_weighted_by_their_evidence() -> None:
    task = Functions("sparse", 4, (3,), active=2)
    x, y = (t.double() for t in task.episodes("3", 20, seeded()))
    said = task.references(x, y)["all supports (exact)"]
    for i in range(20):
        logs, means = [], []
        for support in combinations(range(4), 2):
            part = x[i][:, list(support)]
            cover = part @ part.T / 2 + NOISE**2 * torch.eye(4).double()
            logs.append(gaussian_log(y[i, :-1], cover[:-1, :-1]))
            means.append(float(cover[-1, :-1] @ torch.linalg.solve(cover[:-1, :-1], y[i, :-1])))
        weights = torch.tensor(logs).double().softmax(0)
        assert float(said[i]) == pytest.approx(float(weights @ torch.tensor(means).double()))


def test_bayes_rule_of_classes() -> None:
    # P(label | all) from the joint densities of each class's points with and without the last one.
    task = Prototypes(2, (2,), classes=3, spread=1.5)
    x, y = task.episodes("2", 10, seeded())
    said = task.references(x, y)["Bayes (exact)"].softmax(1)
    for i in range(10):
        logs = []
        for c in range(3):
            total = 0.0
            for other in range(3):
                points = x[i, :-1][y[i, :-1] == other].double()
                if other == c:
                    points = torch.cat([points, x[i, -1:].double()])
                n = len(points)
                cover = 2.25 * torch.ones(n, n).double() + torch.eye(n).double()
                total += sum(gaussian_log(points[:, f], cover) for f in range(2))
            logs.append(total)
        expected = torch.tensor(logs).double().softmax(0)
        assert torch.allclose(said[i], expected, atol=1e-9)


def test_the_nearest_are_found_by_hand() -> None:
    x = torch.tensor([[[0.0, 0], [1, 0], [5, 5], [0, 1], [0.1, 0]]])
    y = torch.tensor([[1.0, 2, 100, 3, 0]])
    assert float(Functions("tree", 2, (4,)).references(x, y)["3 nearest points"]) == 2.0
    labels = torch.tensor([[0, 1, 1, 0, 0]])
    scores = Prototypes(2, (2,), classes=2).references(x, labels)["nearest mean"]
    # Means (0, 0.5) and (3, 2.5) to (0.1, 0).
    assert scores[0].tolist() == pytest.approx([-(0.01 + 0.25), -(2.9**2 + 2.5**2)])


def test_values_are_scored_by_squared_error() -> None:
    asked = torch.tensor([[True, False, True]])
    batch = Values(torch.zeros(1, 3, 2), torch.tensor([[1.0, 9.0, 2.0]]), asked)
    logits = torch.tensor([[[1.05], [0.0], [2.5]]])
    assert float(batch.loss(logits)) == pytest.approx((0.05**2 + 0.5**2) / 2)
    assert batch.correct(logits).tolist() == [[True, True, False]]
    assert isinstance(batch.rows(slice(0, 1)), Values)


@pytest.mark.parametrize("wrong", [{"name": "cubic"}, {"active": 9}, {"active": 0}])
def test_bad_values(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="unknown functions|active"):
        Functions(**{"name": "sparse", "features": 4, "shots": (1,), **wrong})


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> FewShot:
    plan = Plan(Size(16, 1, 2), 2, 4, (1e-3, 1e-2), (0.0,), 1, ("transformer", "hope"), 30)
    monkeypatch.setattr(FewShot, "plans", {"tiny": plan})
    tasks = [Prototypes(2, (1, 2), 2), Functions("linear", 2, (1, 2))]
    monkeypatch.setattr(FewShot, "episodes", lambda self: {t.name: t for t in tasks})
    return FewShot("tiny")


def test_systems_stand_beside_references(toy: FewShot, tmp_path: Any) -> None:
    results = Results(tmp_path / "r.json", toy.question, toy.settings())
    while cells := toy.due(results, Request()):
        for name, cell in cells.items():
            results.add(name, {**toy.measure(cell), "seconds": 0.0})
    tuned = {s: toy.chosen(results, "linear", s) for s in ("transformer", "hope")}
    for system, best in tuned.items():  # functions are chosen by their error alone
        rows = results.rows(task="linear", system=system, tuning=True)
        least = min(rows, key=lambda r: r["validation"]["loss"])
        assert best is not None and best["lr"] == least["lr"]
    classes, linear = toy.tables(results)
    assert [row[0] for row in linear.rows] == ["Transformer", "Hope", "ridge (exact)"]
    assert [row[0] for row in classes.rows][2:] == ["Bayes (exact)", "nearest mean"]
    measured = results.rows(task="linear", system="hope", tuning=False)[0]
    assert linear.rows[1][1] == measured["1"]["loss"]
    assert classes.rows[1][1] == 100 * results.rows(
        task="classification", system="hope", tuning=False
    )[0]["1"]["tokens"]  # fmt: skip
    assert toy.plot(results, tmp_path / "p.png")
    assert all(toy.summary(row) for row in results.record["rows"])


@pytest.mark.parametrize("scale", ["tiny", "small"])
def test_tasks_of_all_scales(scale: Any) -> None:
    for task in FewShot(scale).tasks().values():
        x = task.draw("1", 2, seeded()).inputs
        assert x.shape[1] <= task.length == 129 and math.isfinite(float(x.sum()))


def test_a_system_learns_to_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Plan(Size(32, 1, 2), 120, 32, (1e-2,), (0.0,), 1, ("gated_deltanet",), 300)
    monkeypatch.setattr(FewShot, "plans", {"tiny": plan})
    task = Functions("linear", 1, (1, 8))
    monkeypatch.setattr(FewShot, "episodes", lambda self: {"linear": task})
    cell = {"task": "linear", "system": "gated_deltanet", "seed": 0, "device": "cpu"}
    row = FewShot("tiny").measure({**cell, "lr": 1e-2, "weight_decay": 0.0, "tuning": False})
    assert row["8"]["loss"] < 0.5 * row["1"]["loss"] and row["8"]["loss"] < 0.35
