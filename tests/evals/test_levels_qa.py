"""Questions about long documents: loaders on tiny files, scores, the experiment on a toy model."""

from __future__ import annotations

import functools
import json
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import nestlearn as nl
from nestlearn.evals import levels_qa, long_documents
from nestlearn.evals.harness.experiment import Request
from nestlearn.evals.harness.results import Results
from nestlearn.evals.long_documents import (
    Question,
    asked,
    chosen,
    load,
    load_leval,
    load_longhealth,
    load_qasper,
    score,
)


def test_leval(tmp_path: Any) -> None:
    row = {
        "input": " A story. ",
        "instructions": ["Why?\n\n (A) one \n (B) two\n words \n\n Answer this?", "Who?", "When?"],
        "outputs": ["(B) two words", " Bob ", "Unanswerable"],
    }
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(row) + "\n\n" + json.dumps(row), encoding="utf-8")
    first, second = load_leval(path)
    assert first == second and first.text == "A story."
    choice, free = first.questions
    assert (choice.metric, choice.letters, choice.answer) == ("choice", "AB", "B")
    assert "(A) one\n(B) two words" in choice.prompt and choice.prompt.endswith("Answer: (")
    assert free == asked("Who?", "Bob")


def test_real_leval(shared_data: Any) -> None:
    folder = shared_data / "leval_longdoc"
    if not folder.is_dir():
        pytest.skip("no L-Eval data")
    stories = load_leval(folder / "quality.jsonl.gz")
    questions = [q for d in stories for q in d.questions]
    assert len(stories) == 15 and {q.metric for q in questions} == {"choice"}
    assert all(q.letters == "ABCD" and q.answer in q.letters for q in questions)
    papers = load_leval(folder / "scientific_qa.jsonl.gz")
    assert len(papers) == 23
    assert {q.metric for d in papers for q in d.questions} == {"f1"}


def test_qasper(tmp_path: Any) -> None:
    none = {"unanswerable": False, "yes_no": None, "free_form_answer": "", "extractive_spans": []}
    answers = [
        {**none, "unanswerable": True}, {**none, "yes_no": False},
        {**none, "extractive_spans": ["a", "b"]}, {**none, "free_form_answer": "free"},
    ]  # fmt: skip
    paper = {
        "title": "T", "abstract": "A",
        "full_text": [{"section_name": "S", "paragraphs": ["P1", "P2"]},
                      {"section_name": None, "paragraphs": ["P3"]}],
        "qas": [{"question": f"Q{i}", "answers": [{"answer": answers[0]}, {"answer": a}]}
                for i, a in enumerate(answers)],
    }  # fmt: skip
    path = tmp_path / "q.json"
    path.write_text(json.dumps({"1": paper}), encoding="utf-8")
    (document,) = load_qasper(path)
    assert document.text == "T\n\nA\n\nS\n\nP1\n\nP2\n\nP3"
    assert document.questions == (asked("Q1", "No"), asked("Q2", "a, b"), asked("Q3", "free"))


def test_longhealth(tmp_path: Any) -> None:
    question = {f"answer_{c}": f"text {c}" for c in "abcde"}
    patient = {
        "texts": {"text_0": "one", "text_1": "two"},
        "questions": [{"question": "What?", "correct": "text d", **question}],
    }
    path = tmp_path / "l.json"
    path.write_text(json.dumps({"patient_01": patient}), encoding="utf-8")
    (document,) = load_longhealth(path)
    assert document.text == "one\n\ntwo"
    (found,) = document.questions
    assert (found.answer, found.letters) == ("D", "ABCDE") and "(E) text e" in found.prompt
    with pytest.raises(ValueError, match="not among"):
        chosen("?", {"A": "x"}, "B")


class Says(torch.nn.Module):
    """Goes on with fixed bytes, whatever is asked; keeps what it was asked."""

    device = torch.device("cpu")

    def __init__(self, tokenizer: Any, text: str) -> None:
        super().__init__()
        self.ids, self.tokenizer = tokenizer(text).input_ids, tokenizer
        self.config = type("Config", (), {"eos_token_id": 257})()
        self.asked: list[str] = []

    def forward(self, input_ids: Any, **_: Any) -> Any:
        self.asked.append(self.tokenizer.decode(input_ids[0]))
        logits = torch.zeros(*input_ids.shape, 259)
        logits[..., self.ids[0]] = 1
        return type("Out", (), {"logits": logits})

    def generate(self, input_ids: Any = None, **given: Any) -> Any:
        self.asked.append(self.tokenizer.decode(input_ids[0]))
        return torch.cat([input_ids, torch.tensor([self.ids])], 1)


def test_scores(tokenizer: Any) -> None:
    choice = chosen("?", {"A": "x", "B": "y"}, "B")
    for letter, right in (("A", 0.0), ("B", 1.0)):
        model = Says(tokenizer, letter)
        assert score(model, tokenizer, choice, "A text.") == right
        assert model.asked == ["<|bos|>A text." + choice.prompt]
    free = asked("Who?", "the old man")
    assert score(Says(tokenizer, " old man\nmore"), tokenizer, free) == 1.0
    assert score(Says(tokenizer, " old cat"), tokenizer, free) == 0.5
    needle = Question("\nWhat is", "1234567", "contained")
    model = Says(tokenizer, " not 7654321 but 1234567.")
    assert score(model, tokenizer, needle) == 1.0
    assert model.asked == ["<|bos|>What is"]


@pytest.fixture
def novels(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "english_novels").mkdir()
    path = tmp_path / "english_novels" / "Gaskell_Ruth_1855.txt"
    path.write_text("Ruth sat. Ruth ran home. " * 60, encoding="utf-8")
    monkeypatch.setenv("NESTLEARN_DATA", str(tmp_path))


def test_needles_are_cut_before_the_question(novels: None, tokenizer: Any) -> None:
    for document in load("mk_niah", tokenizer, 900, 3, 0):
        (question,) = document.questions
        assert len(tokenizer(document.text + question.prompt).input_ids) == 900
        assert document.text.count("One of the special magic numbers for") == 4
        assert question.answer in document.text and question.prompt.startswith("\nWhat is the")
    with pytest.raises(ValueError, match="mk_niah"):
        load("niah", tokenizer, 900, 3, 0)
    with pytest.raises(ValueError, match="NESTLEARN_DATA"):
        load("longhealth", tokenizer, 900, 3, 0)


@pytest.mark.parametrize(
    ("levels", "lowest", "expected"),
    [(1, 512, (512,)), (2, 512, (64, 512)), (3, 1024, (64, 256, 1024)), (3, 256, (64, 128, 256))],
)
def test_periods(levels: int, lowest: int, expected: tuple[int, ...]) -> None:
    found = levels_qa.periods(levels, lowest)
    assert found == expected
    assert all(b % a == 0 for a, b in zip(found, found[1:], strict=False))


@pytest.mark.parametrize(("levels", "lowest"), [(0, 64), (1, 100), (3, 64)])
def test_periods_that_do_not_fit(levels: int, lowest: int) -> None:
    with pytest.raises(ValueError, match="level"):
        levels_qa.periods(levels, lowest)


def test_what_failed_has_no_panel(tmp_path: Any) -> None:
    experiment, results = levels_qa.LevelsQA("tiny"), Results(tmp_path / "r.json", "?", {})
    failed = {"task": "quality", "system": "in-context", "error": "ValueError: no data"}
    results.add("quality/in-context/seed0", failed)
    assert not experiment.plot(results, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
    row = {"task": "qasper", "system": "in-context", "open": 0.5, "closed": 0.25}
    results.add("qasper/in-context/seed0", row)
    assert experiment.plot(results, tmp_path / "one.png")
    (table,) = experiment.tables(results)
    assert table.rows[0] == ("in-context", 50.0, 25.0, None, None)


def test_the_experiment_runs_and_reports(
    novels: None, tokenizer: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=259, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=2048,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    plan = levels_qa.Plan(
        600, 1, 1, levels=(1, 2), lowest=(128,), tasks=("mk_niah",), repeats=1, slots=64,
        new_tokens=2,
    )  # fmt: skip
    monkeypatch.setattr(levels_qa.LevelsQA, "plans", {"tiny": plan})
    experiment = levels_qa.LevelsQA("tiny")
    quick = functools.partial(nl.adapt, calibration=None, rank=8)
    monkeypatch.setattr(nl, "adapt", quick)
    results = Results(tmp_path / "r.json", "?", {})
    cells = experiment.due(results, Request())
    names = ["in-context", "1 levels to 128", "2 levels to 128"]
    assert [c["system"] for c in cells.values()] == names
    read = []
    monkeypatch.setattr(
        long_documents, "score", lambda m, t, q, c="", n=0: read.append(c) or float(bool(c))
    )
    for name, cell in cells.items():
        row = experiment.measure({**cell, "model": str(tmp_path / "model")})
        assert (row["learning_seconds"] > 0) == (cell["system"] != "in-context")
        results.add(name, row)
    assert experiment.due(results, Request()) == {}
    assert [bool(c) for c in read] == [True, False] * 3
    (table,) = experiment.tables(results)
    assert table.rows == tuple((name, 100.0, 0.0) for name in names)
    assert experiment.plot(results, tmp_path / "r.png")
