"""BABILong: texts, search, streams, and the recurrent-memory baselines."""

from __future__ import annotations

import collections
import dataclasses
import gzip
import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nestlearn.evals import babilong_trained
from nestlearn.evals.babilong import (
    Sample,
    Scatterer,
    Story,
    accuracy,
    endings_of,
    load_stories,
    parse_stories,
    read_stream,
    search,
)
from nestlearn.evals.babilong_trained import WRITE_COST, BabiLong, BabiPlan
from nestlearn.evals.harness.experiment import Request
from nestlearn.evals.harness.results import Results
from nestlearn.evals.harness.systems import Size
from nestlearn.evals.harness.task import IGNORE, TRAIN
from nestlearn.evals.harness.trained import training
from nestlearn.evals.haystack import Haystack
from nestlearn.evals.recurrent_memory import AssociativeMemory, RecurrentMemoryTransformer, phi
from nestlearn.train.tokenizers import train_bpe

BOOK = [f"Sentence {'x' * (i % 7)} number {i} is here." for i in range(60)]
PLACES = ("garden", "kitchen", "office")


def babi(people: str) -> str:
    """A file in bAbI's form: two facts, one question, four facts, another."""
    lines = []
    for i in range(40):
        a, b = PLACES[i % 3], PLACES[(i + 1) % 3]
        lines += [f"1 {people} went to the {a}.", f"2 Bob went to the {b}.",
                  f"3 Where is {people}? \t{a}\t1", f"4 {people} went to the {b}.",
                  "5 Bob slept.", f"6 Where is {people}? \t{b}\t4"]  # fmt: skip
    return "\n".join(lines) + "\n"


def test_stories_have_all_the_facts_before_their_question() -> None:
    first, second, *_ = parse_stories(babi("Ann").splitlines())
    assert first == Story(
        ("Ann went to the garden.", "Bob went to the kitchen."), "Where is Ann?", "garden"
    )
    assert second.facts == (*first.facts, "Ann went to the kitchen.", "Bob slept.")
    assert second.answer == "kitchen"


def test_real_stories(shared_data: Any) -> None:
    path = shared_data / "babi" / "en-10k" / "qa1_single-supporting-fact_test.txt.gz"
    if not path.is_file():
        pytest.skip("no bAbI data")
    stories = load_stories(path)
    assert len(stories) == 1_000
    for story in stories:  # qa1: the last fact about the person asked for says where she is
        person = re.fullmatch(r"Where is (\w+)\?", story.question)
        assert person
        last = [f for f in story.facts if person.group(1) in f][-1]
        assert last.endswith(f"the {story.answer}.")


@pytest.mark.parametrize("length", [0, 70, 200, 3_000])
def test_a_text_is_the_book_with_the_facts_between_its_sentences(length: int) -> None:
    tokenizer = train_bpe([babi("Ann"), *BOOK], 330)
    scatterer = Scatterer(tokenizer, Haystack(tokenizer, BOOK), PLACES)
    story = next(parse_stories(babi("Ann").splitlines()))
    depths = set()
    for seed in range(10):
        sample = scatterer.scatter(story, length, np.random.default_rng(seed))
        assert sample is not None
        if length:
            assert len(sample.tokens) == length
        text = tokenizer.decode(sample.tokens)
        assert text.endswith("\nQuestion: Where is Ann?\nAnswer:")
        at = [text.index(f" {fact}") for fact in story.facts]
        assert at == sorted(at)
        depths.add(at[0] * 4 // len(text))
        assert " garden".startswith(tokenizer.decode([sample.answer]))
        rest = text
        for fact in story.facts:
            rest = rest.replace(f" {fact}", "", 1)
        assert rest.removesuffix("\nQuestion: Where is Ann?\nAnswer:") in " " + " ".join(BOOK * 9)
        # Pieces between the starts are whole sentences; the first may have lost its beginning.
        pieces = np.split(sample.tokens, sample.sentences[1:])
        whole = {f" {s}" for s in (*BOOK, *story.facts)}
        assert {tokenizer.decode(p) for p in pieces[1:-1]} <= whole
        assert any(s.endswith(tokenizer.decode(pieces[0])) for s in whole)
        assert tokenizer.decode(pieces[-1]).startswith("\nQuestion")
    assert length < 3_000 or len(depths) > 2
    assert scatterer.scatter(story, 12, np.random.default_rng(0)) is None


def test_distractors_are_sentences_of_the_book_that_end_as_facts_do() -> None:
    tokenizer = train_bpe([babi("Ann"), *BOOK], 330)
    book = [*BOOK[:40], "I went to the garden, at last!", *BOOK[40:]]
    stories = list(parse_stories(babi("Ann").splitlines()))
    assert endings_of(stories) == [f"to the {place}" for place in PLACES]
    hay = Haystack(tokenizer, book)
    found = {}
    for share in (0.0, 0.5, 1.0):
        made = Scatterer(tokenizer, hay, PLACES, share, endings_of(stories))
        rng = np.random.default_rng(0)
        samples = [made.scatter(stories[0], 150, rng) for _ in range(200)]
        assert all(s is not None and len(s.tokens) == 150 for s in samples)
        texts = [tokenizer.decode(s.tokens) for s in samples if s is not None]
        found[share] = sum(" I went to the garden, at last!" in t for t in texts) / 200
        if share:  # anywhere in the text, before facts and behind them
            first = [t.index(" I went") < t.index(" Ann went") for t in texts if " I went" in t]
            assert 0.2 < np.mean(first) < 0.8
    assert found[0.0] < 0.3
    assert found[1.0] == 1.0
    assert found[0.0] + 0.2 < found[0.5] < 0.8
    assert len(Haystack(tokenizer, BOOK).containing(endings_of(stories))) == 0
    assert Scatterer(tokenizer, Haystack(tokenizer, BOOK), PLACES, 1.0, ["to the sea"]).scatter(
        stories[0], 150, np.random.default_rng(0)
    )  # a book without any is no error


def test_answers_must_differ_in_their_first_token(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="begin alike"):
        Scatterer(tokenizer, Haystack(tokenizer, BOOK), PLACES)


def test_search_is_bm25() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        sentences = [rng.integers(0, 12, size=rng.integers(1, 9)).tolist() for _ in range(30)]
        query = rng.integers(0, 12, size=4).tolist()
        tokens = np.array([t for s in [*sentences, query] for t in s])
        starts = np.cumsum([0, *map(len, sentences)])
        found = search(Sample(tokens, starts, 0), top=5)
        mean = sum(map(len, sentences)) / 30
        scores = []
        for s in sentences:
            counts, score = collections.Counter(s), 0.0
            for t in set(query):
                having = sum(t in other for other in sentences)
                idf = math.log(1 + (30 - having + 0.5) / (having + 0.5))
                norm = 1.5 * (1 - 0.75 + 0.75 * len(s) / mean)
                score += idf * counts[t] * 2.5 / (counts[t] + norm)
            scores.append(score)
        best = sorted(sorted(range(30), key=lambda i: -scores[i])[:5])
        assert found.tolist() == [t for i in best for t in sentences[i]] + query


@pytest.mark.parametrize("system", ["hope", "gated_deltanet", "rmt", "armt"])
def test_a_stream_is_one_pass(system: str) -> None:
    plan = BabiPlan(Size(32, 2, 2), 1, 1, (1e-3,), segment=16)
    experiment = BabiLong("tiny")
    experiment.plans = {"tiny": plan}
    torch.manual_seed(1)
    task = experiment.tasks()["qa1"]
    task.vocab_size = 40
    model = experiment.model(system, task, experiment.plan).eval()
    for parameter in model.parameters():  # memories that are read as zero would hide mistakes
        if parameter.ndim == 2 and parameter.detach().abs().sum() == 0:
            torch.nn.init.normal_(parameter, std=0.2)
    rows = [np.random.default_rng(i).integers(0, 40, size=150) for i in range(6)]
    whole = model(input_ids=torch.from_numpy(np.stack(rows)), use_cache=False).logits[:, -1]
    assert read_stream(model, rows, piece=32).tolist() == whole.argmax(-1).tolist()
    state = None
    for start in range(0, 150, 32):
        part = torch.from_numpy(np.stack(rows))[:, start : start + 32]
        out = model(input_ids=part, past_key_values=state, use_cache=True, logits_to_keep=1)
        state = out.past_key_values
    torch.testing.assert_close(out.logits[:, -1], whole, atol=2e-5, rtol=1e-4)


class Repeats(torch.nn.Module):
    """Says the first token of the text again: it must carry it over all pieces."""

    device = torch.device("cpu")

    def forward(self, input_ids: Tensor, past_key_values: Any, **_: Any) -> Any:
        first = input_ids[:, 0] if past_key_values is None else past_key_values
        logits = torch.nn.functional.one_hot(first, 50)[:, None].float()
        return type("Out", (), {"logits": logits, "past_key_values": first})


def test_accuracy_keeps_texts_and_answers_together() -> None:
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, 50, size=int(n)) for n in rng.integers(3, 6, size=30)]
    right = [Sample(t, np.zeros(1), int(t[0])) for t in texts]
    wrong = [Sample(t, np.zeros(1), int(t[0]) + 1) for t in texts]
    assert accuracy(Repeats(), right, texts) == 1.0
    mixed = right[:12] + wrong[12:]
    assert accuracy(Repeats(), mixed, texts) == pytest.approx(12 / 30)


def test_associative_memory_is_its_equations_token_by_token() -> None:
    memory = AssociativeMemory(5, 3).double()
    torch.nn.init.normal_(memory.v.weight)
    matrix, norm = memory.start(2)
    matrix, norm = torch.randn_like(matrix.double()), torch.rand_like(norm.double())
    m, x = torch.randn(2, 3, 5).double(), torch.randn(2, 4, 5).double()
    new, new_norm = memory.write(m, (matrix, norm))
    for row in range(2):
        a, z = matrix[row].clone(), norm[row].clone()
        for token in m[row]:
            k = phi(memory.k.weight @ token)
            k = k / (k @ k).sqrt()
            value = memory.v.weight @ token - matrix[row] @ k / (norm[row] @ k + 1e-5)
            b = torch.sigmoid(memory.b.weight[0] @ token + memory.b.bias[0])
            a = a + b * torch.outer(value, k)
            z = z + (1 - norm[row] @ k).clamp(0, 1) * k
        torch.testing.assert_close(new[row], a)
        torch.testing.assert_close(new_norm[row], z)
        q = phi(memory.q.weight @ x[row, 2])
        q = q / (q @ q).sqrt()
        expected = new[row] @ q / (new_norm[row] @ q + 1e-5)
        torch.testing.assert_close(memory.read(x, (new, new_norm))[row, 2], expected)


def test_an_associative_memory_stands_tokens_of_any_size() -> None:
    memory = AssociativeMemory(8, 8)
    torch.nn.init.normal_(memory.v.weight)
    state = memory.start(2)
    x = torch.randn(2, 16, 8, requires_grad=True)
    for size in (1.0, 1e4, 1e-4, 1.0):  # DPFP squares them
        state = memory.write(size * x, state)
    out = memory.read(1e4 * x, state)
    (grad,) = torch.autograd.grad(out.square().mean(), x)
    assert out.isfinite().all() and grad.isfinite().all()
    assert all(part.isfinite().all() for part in state)


@pytest.mark.parametrize("associative", [False, True])
def test_what_was_read_reaches_later_segments_and_only_through_the_state(
    associative: bool,
) -> None:
    torch.manual_seed(0)
    model = RecurrentMemoryTransformer(Size(16, 2, 2), 20, 4, 2, associative).double()
    for name, parameter in model.named_parameters():
        if name.endswith("v.weight") or name == "memory":
            torch.nn.init.normal_(parameter)
    ids = torch.randint(20, (1, 12))
    other = ids.clone()
    other[0, 1] = (ids[0, 1] + 1) % 20
    a, b = (model(input_ids=i).logits[0] for i in (ids, other))
    assert torch.equal(a[0], b[0])  # causal
    assert (a[-1] - b[-1]).abs().max() > 1e-9
    first = model(input_ids=ids[:, :4], use_cache=True).past_key_values
    torch.testing.assert_close(model(input_ids=ids[:, 4:], past_key_values=first).logits[0], a[4:])
    last = model(input_ids=ids, logits_to_keep=2).logits[0]
    torch.testing.assert_close(last, a[-2:])


@pytest.mark.parametrize("given", [{"segment": 0}, {"memory_tokens": 0}])
def test_sizes_are_checked(given: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(given))):
        RecurrentMemoryTransformer(Size(16, 1, 2), 20, **given)


@pytest.fixture
def toy(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> BabiLong:
    (tmp_path / "english_novels").mkdir()
    (tmp_path / "babi" / "en-10k").mkdir(parents=True)
    for name in ("Other_Book_1900", "Gaskell_Ruth_1855"):
        text = " ".join(BOOK if name[0] == "O" else [s.replace("here", "there") for s in BOOK])
        (tmp_path / "english_novels" / f"{name}.txt").write_text(text, encoding="utf-8")
    for part in ("train", "test"):
        path = tmp_path / "babi" / "en-10k" / f"qa1_facts_{part}.txt.gz"
        with gzip.open(path, "wt", encoding="utf-8") as file:
            file.write(babi("Ann" if part == "train" else "Eve"))
    monkeypatch.setenv("NESTLEARN_DATA", str(tmp_path))
    plan = BabiPlan(
        Size(32, 1, 2), steps=2, batch=2, lrs=(1e-3,), weight_decays=(0.0,), seeds=1,
        systems=("transformer", "armt"), examples=3, trained=(0, 64, 128), tested=(0, 300),
        segment=32, vocab_size=300, characters=20_000,
    )  # fmt: skip
    monkeypatch.setattr(BabiLong, "plans", {"tiny": plan})
    return BabiLong("tiny")


def test_training_asks_for_the_answer_at_the_end(toy: BabiLong) -> None:
    task = toy.tasks()["qa1"]
    decode = task.materials()[1][TRAIN].tokenizer.decode  # type: ignore[attr-defined]
    sizes = set()
    for seed in range(8):
        batch = task.draw(TRAIN, 2, torch.Generator().manual_seed(seed))
        assert (batch.asked.sum(1) == 1).all()
        for row, target, asked in zip(batch.inputs, batch.targets, batch.asked, strict=True):
            at = int(asked.int().argmax())
            text = decode(row[: at + 1])
            assert text.endswith("\nQuestion: Where is Ann?\nAnswer:") and "there" not in text
            answer = re.findall(r"Ann went to the (\w+)\.", text)[-1]
            assert f" {answer}".startswith(decode([int(target[at])]))
            assert (target[at + 1 :] == IGNORE).all()
        sizes.add(len(batch))
    assert sizes == {4, 2}  # as many tokens at every length


def test_texts_grow_while_training_goes_on(toy: BabiLong) -> None:
    task = toy.tasks()["qa1"]
    longest = []
    for progress in (0.0, 0.4, 0.99):
        taught = task.at(progress)
        sizes = {
            int(taught.draw(TRAIN, 1, torch.Generator().manual_seed(s)).asked[0].int().argmax()) + 1
            for s in range(12)
        }
        longest.append(sizes & {64, 128})
        assert progress > 0 or max(sizes) < 64
    assert longest == [set(), {64}, {64, 128}]


def test_writing_begins_to_cost_when_there_is_something_to_keep(toy: BabiLong) -> None:
    task, plan = toy.tasks()["qa1"], dataclasses.replace(toy.plan, steps=20)
    for system, highest in (("hope_sparse", WRITE_COST), ("hope", 0.0)):
        model: Any = toy.model(system, task, plan).train()
        cell = {"system": system, "task": "qa1"}
        data = toy.guided(model, cell, plan, training(task, plan, torch.Generator(), "cpu"))
        costs, charged = [], []
        for loss in data:
            costs.append(model.config.write_cost)
            charged.append(model(task.draw(TRAIN, 1, torch.Generator()).inputs).write_loss)
            assert loss(model).isfinite()
        peak = 13  # of 20 steps
        assert costs[:peak] == sorted(costs[:peak]) and costs[7] == 0 and charged[7] is None
        assert costs[peak] == pytest.approx(highest, rel=0.1)
        assert costs[peak + 1 :] == sorted(costs[peak + 1 :], reverse=True)
        assert costs[-1] == pytest.approx(0.24 * highest, rel=0.1)  # falling to a tenth
        assert (charged[-1] is not None) is (highest > 0)


def test_the_experiment_runs_and_reports(toy: BabiLong, tmp_path: Any) -> None:
    results = Results(tmp_path / "r.json", "?", {})
    cells = toy.due(results, Request())
    assert [c["system"] for c in cells.values()] == ["transformer", "armt"]
    for name, cell in cells.items():
        results.add(name, toy.measure(cell))
    (table,) = toy.tables(results)
    assert [row[0] for row in table.rows] == [
        "Transformer (window)", "Transformer + search (RAG)", "ARMT"
    ]  # fmt: skip

    assert all(len(row) == 3 and 0 <= row[2] <= 100 for row in table.rows)
    assert toy.plot(results, tmp_path / "r.png")
    with pytest.raises(ValueError, match="armt"):
        toy.due(results, Request(systems=("armtt",)))
    assert babilong_trained._short(10 * 2**20) == "10M"
