"""Whole completions: the Gaussians, what their words say, and what comes next."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

import nestlearn as nl
from nestlearn.adaptation import completions as module
from nestlearn.adaptation import read_memory
from nestlearn.adaptation.adapted import adaptation_of
from nestlearn.adaptation.completions import (
    COMPLETIONS,
    LONGEST,
    MOST,
    Completions,
    as_row,
    check_rows,
    following,
    means,
    mixed,
    within,
)
from nestlearn.adaptation.file import write_memory
from nestlearn.adaptation.operations import merge
from nestlearn.adaptation.readout_keys import Read
from tests.adaptation.conftest import tiny_model

R = 12


def sums_of(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Rows and scatter of examples x of classes y, whose completions' means are z."""
    rows = torch.zeros(len(z), 2 * R + 1)
    rows.index_add_(0, y, torch.cat([x, z[y], torch.ones(len(x), 1)], 1))
    return rows, x.mT @ x


def examples(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    y = torch.tensor([0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 3, 3, 3, 3, 3])
    mu = 2 * torch.randn(4, R, generator=generator)
    return 3 + mu[y] + torch.randn(len(y), R, generator=generator), y


TOKENS = torch.tensor([as_row(t) for t in ([5, 6], [5, 7, 8], [9], [5, 6, 1])])


def test_they_are_linear_discriminants(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FEW", 0.0)
    x, y = examples()
    rows, scatter = sums_of(x, y, torch.zeros(4, R))  # the words say nothing
    found = Completions(TOKENS, rows, scatter, 0.3)
    lda = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=0.3).fit(x.numpy(), y.numpy())
    # It divides by N where an unbiased covariance has N - C.
    share = (len(x) - 4) / len(x)
    weight, bias = torch.tensor(lda.coef_) * share, torch.tensor(lda.intercept_)
    prior = torch.bincount(y).double().log()
    bias = (bias - (prior - prior.logsumexp(0))) * share + prior
    new, _ = examples(1)
    right = (new.double() @ weight.mT + bias).log_softmax(-1)
    torch.testing.assert_close(found.log_probabilities(new).double(), right, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("noise", [2.0, 2000.0])
def test_what_words_say_is_weighed_without_their_own_examples(noise: float) -> None:
    generator = torch.Generator().manual_seed(0)
    C = 9
    z = torch.randn(C, R, generator=generator, dtype=torch.float64)
    mu = z @ torch.randn(R, R, generator=generator, dtype=torch.float64) + 1.0
    n = torch.tensor([1.0, 2, 3, 4, 5, 1, 2, 3, 4], dtype=torch.float64)
    size = (z - z.mean(0)).square().sum(1).mean()

    def predicted(rows: list[int], ridge: float, of: torch.Tensor) -> torch.Tensor:
        x, y = z[rows].mean(0), mu[rows].mean(0)
        A, B = z[rows] - x, mu[rows] - y
        P = torch.linalg.solve(A.mT @ A + ridge * size * torch.eye(R), A.mT @ B)
        return y + (of - x) @ P

    least, best = float("inf"), mu
    for ridge in module.RIDGES:
        alone = [predicted([i for i in range(C) if i != c], ridge, z[c]) for c in range(C)]
        error = (torch.stack(alone) - mu).square().sum(1).mean().item()
        if error < least:
            least, best = error, predicted(list(range(C)), ridge, z)
    noises = torch.tensor(noise, dtype=torch.float64)
    kappa = noise / (least - (noise / n).mean())
    assert (0 < kappa < 2) == (noise == 2.0)
    kappa = kappa if noise == 2.0 else 2.0
    right = (n[:, None] * mu + kappa * best) / (n[:, None] + kappa)
    torch.testing.assert_close(means(mu, z, n, noises), right)
    assert torch.equal(means(mu[:2], z[:2], n[:2], noises), mu[:2])
    assert torch.equal(means(mu, z * 0, n, noises), mu)


@pytest.mark.parametrize("shots", [1, 3])
def test_words_that_say_little_hide_no_class(shots: int) -> None:
    """With one example of each, their weight cannot be told from the examples."""
    C = 12
    tokens = torch.tensor([as_row([c]) for c in range(C)])
    generator = torch.Generator().manual_seed(shots)
    mu = 3 * torch.randn(C, R, generator=generator)
    y = torch.arange(C).repeat(shots)
    x = mu[y] + torch.randn(len(y), R, generator=generator)
    rows, scatter = sums_of(x, y, mu + 6 * torch.randn(C, R, generator=generator))
    found = Completions(tokens, rows, scatter, 0.6)
    new = mu.repeat(20, 1) + torch.randn(20 * C, R, generator=generator)
    right = found.log_probabilities(new).argmax(1) == torch.arange(C).repeat(20)
    assert right.float().mean() > 0.9


def test_one_example_each_is_enough() -> None:
    x, _ = examples()
    x, y = x[:4], torch.arange(4)
    rows, scatter = sums_of(x, y, torch.zeros(4, R))
    cov, _ = within(scatter.double(), x.double(), torch.ones(4).double(), 0.6)
    assert torch.linalg.eigvalsh(cov).min() > 0
    found = Completions(TOKENS, rows, scatter, 0.6)
    assert found.log_probabilities(x).argmax(1).tolist() == [0, 1, 2, 3]


def read_of(tokens: list[int], gates: list[float], new: int) -> Read:
    total = len(tokens)
    return Read(
        torch.zeros(1, new, R), torch.zeros(1, total, R), torch.ones(1, total),
        torch.tensor([tokens]), torch.tensor([gates]),
    )  # fmt: skip


def known(chances: list[float]) -> Completions:
    """Completions whose probabilities are given, whatever the prompt."""
    rows, scatter = sums_of(*examples(), torch.zeros(4, R))
    made = Completions(TOKENS, rows, scatter, 0.6)
    made.weight.zero_()
    made.bias = torch.tensor(chances).log()
    return made


def as_dict(one: Any) -> dict[int, float]:
    total: dict[int, float] = {}
    for token, chance in zip(one.tokens.tolist(), one.chances.tolist(), strict=True):
        total[token] = total.get(token, 0.0) + chance
    return total


def test_nothing_is_decided_too_early() -> None:
    memory = known([0.25, 0.25, 0.4, 0.1])
    text, gates = [3, 2, 5, 6, 4], [0.0, 0.7, 0.0, 0.0, 0.0]
    found = {one.place: one for one in following(read_of(text, gates, 5), 0, memory)}
    # 9 is the likeliest completion, but more of them begin with 5.
    assert as_dict(found[1]) == pytest.approx({5: 0.6, 9: 0.4})
    assert as_dict(found[2]) == pytest.approx({6: 0.35 / 0.6, 7: 0.25 / 0.6})
    assert as_dict(found[3]) == pytest.approx({1: 1.0})  # the other one is complete
    assert set(found) == {1, 2, 3}
    assert found[2].weight == pytest.approx(0.7)
    # The same behind a cache, and the earliest beginning counts.
    for new in range(1, 5):
        part = following(read_of(text, gates, new), 0, memory)
        assert {one.place + 5 - new for one in part} == {p for p in found if p >= 5 - new}
    again = following(read_of(text, [0.0, 0.7, 0.9, 0.9, 0.0], 5), 0, memory)
    assert {one.place: one.weight for one in again}[2] == pytest.approx(0.7)


def test_probabilities_are_mixed_exactly() -> None:
    memory = known([0.25, 0.25, 0.4, 0.1])
    logits = torch.randn(1, 2, 12, generator=torch.Generator().manual_seed(0))
    nexts = following(read_of([3, 2, 5], [0.0, 0.7, 1.0], 3), 0, memory)
    found = mixed(logits, nexts, 3).softmax(-1)
    right = logits.softmax(-1)
    right[0] *= 0.3
    right[0, 0, [5, 9]] += 0.7 * torch.tensor([0.6, 0.4])
    right[0, 1, [6, 7]] += 0.7 * torch.tensor([0.35, 0.25]) / 0.6
    torch.testing.assert_close(found, right)
    sure = following(read_of([3], [1.0], 1), 0, memory)
    found = mixed(logits[:, :1], sure, 1)
    assert found.isfinite().all() and sure[0].weight == MOST
    assert mixed(logits, [], 3) is logits


def learner_of(tokenizer: Any, slots: int = 16, rank: int = 64) -> nl.Learner:
    model = nl.adapt(tiny_model(), method="readout", rank=rank, slots=slots, calibration=None)
    return nl.Learner(model, tokenizer)


def row(i: int) -> dict[str, str]:
    return {"prompt": f"{i} fish?", "completion": f" {i * 7}\n"}


def test_there_is_room_for_as_many_as_there_are_slots(tokenizer: Any) -> None:
    learner = learner_of(tokenizer, slots=4)
    learner.learn([row(i) for i in range(4)])
    learner.learn({"prompt": "again?", "completion": row(2)["completion"]})
    held = learner.memory.changes["every 1"][COMPLETIONS][:, -1]
    assert held.tolist() == [1, 1, 2, 1]
    with pytest.raises(ValueError, match="room for 4 different completions"):
        learner.learn(row(5))
    other = learner_of(tokenizer, slots=4)
    other.learn(row(6))
    with pytest.raises(ValueError, match="room for 4"):
        merge([learner.memory, other.memory])


def test_long_completions_are_learned_token_by_token(tokenizer: Any) -> None:
    learner = learner_of(tokenizer, rank=256)
    text = " the boat is red and the sea is blue and the fish is wet and so is the old man"
    rows = [row(1), {"prompt": "what?", "completion": text}]
    assert len(text) > LONGEST
    before = learner.evaluate(rows)["loss"]
    learner.learn(rows)
    assert adaptation_of(learner.model).readout.rows.any(1).sum() == 1
    assert learner.evaluate(rows)["loss"] < 0.7 * before  # no completion begins within the text
    assert learner.evaluate(rows[0])["loss"] < 0.5


def test_embeddings_in_place_of_tokens_begin_completions(tokenizer: Any) -> None:
    learner = learner_of(tokenizer)
    learner.learn([row(i) for i in range(4)])
    ids = torch.tensor([[256, *b"2 fish?"]])
    with torch.no_grad():
        logits = learner.model(inputs_embeds=learner.model.get_input_embeddings()(ids)).logits
    assert logits.isfinite().all()


@pytest.mark.parametrize(
    "rows", [[[1.5, 0.0]], [[-1.0, 0.0]], [[0.0, 3.0]], [[2.0, 0.0], [2.0, 0.0]], [[2.0**25, 0.0]]]
)
def test_damaged_completions_are_refused(rows: list[list[float]]) -> None:
    with pytest.raises(ValueError, match="completions"):
        check_rows(torch.tensor(rows))
    check_rows(torch.tensor([[2.0, 3.0], [0.0, 0.0], [2.0, 0.0]]))


def test_a_file_with_damaged_completions_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    learner = learner_of(tokenizer)
    learner.learn([row(i) for i in range(4)])
    learner.save(tmp_path / "a.nlmem")
    assert read_memory(tmp_path / "a.nlmem").total(COMPLETIONS) is not None
    memory = learner.memory.copy()
    memory.changes["keys"][COMPLETIONS + ".keys"][0, 0] = 0.5
    write_memory(memory, tmp_path / "b.nlmem")
    with pytest.raises(ValueError, match="damaged"):
        read_memory(tmp_path / "b.nlmem")
    memory.changes["keys"][COMPLETIONS + ".keys"][0, 0] = 1000.0
    learner.use(memory)
    with pytest.raises(ValueError, match="tokens that the model has not"):
        learner.model(torch.tensor([[256, 1]]))
