"""The compared classifiers: what each learns and how each chooses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import nestlearn as nl
from nestlearn.adaptation.examples import Example, batches, completion_loss
from nestlearn.evals.classifiers import InCA, InContext, Taught, Tuned, Writing, tokens
from nestlearn.evals.labels import write_labels
from nestlearn.evals.methods import FineTuning
from tests.adaptation.conftest import tiny_model

NAMES = ["red", "blue", "green"]
TASK = [Example(f"{a} {n} {b}:", f" {n}\n") for n in NAMES for a in "pqr" for b in "xy"]
PROMPTS = [f"s {n} z:" for n in NAMES]
LABELS = [f" {n}\n" for n in NAMES]


def test_inca_is_linear_discriminant_analysis(tokenizer: Any) -> None:
    model = tiny_model()
    method = InCA(model, tokenizer, top=1, layer=2, shrinkage=0.2)
    method.learn(TASK[:12])
    method.learn(TASK[12:])

    def embed(text: str) -> np.ndarray:
        row = torch.tensor([tokens(tokenizer, text)])
        h = model(row, output_hidden_states=True).hidden_states[2][0]
        return h.detach().double()[1:].mean(0).numpy()

    X = np.stack([embed(e.prompt) for e in TASK])
    y = np.array([LABELS.index(e.completion) for e in TASK])
    means = np.stack([X[y == c].mean(0) for c in range(3)])
    cov = (X - means[y]).T @ (X - means[y]) / (len(X) - 3)
    cov = 0.8 * cov + 0.2 * np.trace(cov) / len(cov) * np.eye(len(cov))
    new = np.stack([embed(p) for p in PROMPTS])
    scores = np.array([[-0.5 * (x - m) @ np.linalg.solve(cov, x - m) for m in means] for x in new])
    found = method.log_likelihoods(PROMPTS, LABELS).numpy()
    np.testing.assert_allclose(found - found[:, :1], scores - scores[:, :1], rtol=1e-4, atol=1e-4)
    assert method.classify(PROMPTS, LABELS) == scores.argmax(1).tolist()


def test_inca_lets_the_model_choose_among_the_likeliest(tokenizer: Any) -> None:
    model = tiny_model()
    method = InCA(model, tokenizer, top=2)
    method.learn(TASK)
    scores = method.log_likelihoods(PROMPTS, LABELS)
    expected = []
    for prompt, row in zip(PROMPTS, scores, strict=True):
        first, second = row.topk(2).indices.tolist()
        shown = [e for e in TASK if e.completion in (LABELS[first], LABELS[second])]
        text = method._shown[LABELS[second]] + method._shown[LABELS[first]] + prompt
        assert all(method._shown[e.completion] in {x.prompt + x.completion for x in shown}
                   for e in shown)  # fmt: skip
        labels = [tokens(tokenizer, LABELS[c], False) for c in (first, second)]
        written = write_labels(model, [tokens(tokenizer, text)], labels)[0]
        expected.append((first, second)[written])
    assert method.classify(PROMPTS, LABELS) == expected


def test_in_context_shows_what_fits_evenly(tokenizer: Any) -> None:
    model = tiny_model()
    method = InContext(model, tokenizer, context=120)
    method.learn(TASK[:6])
    method.learn(TASK[6:])
    length = method._prefix.get_seq_length()
    assert 105 <= length <= 120 and method.shown == 7  # examples have 14 to 16 tokens
    everything = InContext(model, tokenizer, context=10_000)
    everything.learn(TASK)
    assert everything.shown == len(TASK)
    first = everything.classify(PROMPTS, LABELS)
    assert first == everything.classify(PROMPTS, LABELS)


def test_examples_are_fine_tuned_in_mini_batches(tokenizer: Any) -> None:
    method = FineTuning(tiny_model(), tokenizer, lr=1e-3, batch=4, repeats=2, clip=1e9, seed=5)
    method.learn_examples(TASK[:6])
    import random

    model, order = tiny_model(), random.Random(5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0)
    for _ in range(2):
        turn = order.sample(range(6), 6)
        for batch in batches([TASK[i] for i in turn], tokenizer, 4):
            optimizer.zero_grad()
            completion_loss(model, batch).backward()
            optimizer.step()
    for a, b in zip(method.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_replay_keeps_its_share(tokenizer: Any) -> None:
    method = FineTuning(tiny_model(), tokenizer, lr=1e-3, replay=0.5)
    method.learn_examples(TASK[:6])
    kept = list(method._kept)
    method.learn_examples(TASK[6:])
    assert len(kept) == 3 and len(method._kept) == 9 and method._kept[:3] == kept
    encoded = [e.encode(tokenizer) for e in TASK[:6]]
    assert all(pair in encoded for pair in kept)


def test_elastic_weights_hold_after_a_task(tokenizer: Any) -> None:
    anchor = torch.randint(256, (2, 8), generator=torch.Generator().manual_seed(0))
    method = FineTuning(tiny_model(), tokenizer, lr=1e-3, ewc=1.0, anchor=anchor)
    before = [f.clone() for f in method._fisher or []]
    method.learn_examples(TASK[:4])
    assert any((f > b).any() for f, b in zip(method._fisher or [], before, strict=True))
    assert all(torch.equal(a, c) for a, c in zip(method._anchors, method.copies, strict=True))


@pytest.mark.parametrize("kind", ["readout", "added", "naive"])
def test_all_learn_to_classify(tokenizer: Any, kind: str) -> None:
    model = tiny_model()
    # With random weights memories recall what was written; the model knows nothing alike.
    prompts = PROMPTS if kind == "naive" else [f"q {n} y:" for n in NAMES]
    untaught = Writing(model, tokenizer).classify(prompts, LABELS)
    assert untaught != [0, 1, 2]
    if kind == "naive":
        method: Any = Tuned(FineTuning(model, tokenizer, lr=3e-3, repeats=20, batch=6))
    elif kind == "added":
        nl.adapt(model, [nl.Level(period=8)], rank=32, slots=256, calibration=None)
        method = Taught(nl.Learner(model, tokenizer, lr=0.5, repeats=10))
    else:
        nl.adapt(model, method="readout", rank=64, calibration=None)
        method = Taught(nl.Learner(model, tokenizer))
    method.learn(TASK)
    assert method.classify(prompts, LABELS) == [0, 1, 2]
