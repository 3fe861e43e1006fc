"""Tasks at a length: what they ask, how it is scored, and `nestlearn eval` end to end."""

from __future__ import annotations

import gzip
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from nestlearn import HopeConfig, HopeForCausalLM
from nestlearn.cli.main import main
from nestlearn.evals import by_length, needles, reading
from nestlearn.evals.by_length import NAMES, check_data, measure, only, parse
from nestlearn.evals.harness.results import read
from nestlearn.train.tokenizers import ByteTokenizer
from tests.adaptation.conftest import tiny_model
from tests.evals.test_babilong import BOOK, babi


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of data: bAbI, a document with questions, books."""
    data = tmp_path / "data"
    for name, text in (
        ("babi/en-10k/qa1_single_test.txt.gz", babi("Ann")),
        ("english_novels/Conrad_Nostromo_1904.txt.gz", " ".join(BOOK)),
        ("english_novels/Other_Book_1900.txt.gz", "Not held out. " * 40),
        ("leval_longdoc/quality.jsonl.gz", json.dumps({
            "input": "The fox was red. " * 20,
            "instructions": ["Which colour? (A) red (B) green (C) blue", "Who? (A) fox (B) dog"],
            "outputs": ["(A) red", "(A) fox"],
        })),
        ("leval_longdoc/scientific_qa.jsonl.gz", json.dumps({
            "input": "We measured 5 apples. " * 20,
            "instructions": ["How many?"], "outputs": ["5 apples"],
        })),
    ):  # fmt: skip
        path = data / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(text.encode()))
    monkeypatch.setenv("NESTLEARN_DATA", str(data))
    return data


class Reader:
    """Writes what a function finds in the prompt; keeps the prompts."""

    device = torch.device("cpu")

    def __init__(self, find: Any) -> None:
        self.find, self.prompts = find, []

    def generate(self, ids: torch.Tensor, **settings: Any) -> torch.Tensor:
        rows = []
        for row in ids:
            self.prompts.append(bytes(t for t in row.tolist() if t < 256).decode())
            rows.append(list(self.find(self.prompts[-1]).encode()))
        longest = max(map(len, rows))
        said = torch.tensor([r + [32] * (longest - len(r)) for r in rows])
        return torch.cat([ids, said], 1)


def needle_of(prompt: str) -> str:
    text, _, question = prompt.rpartition("\nWhat ")
    keys = re.findall(r"\w+-\w+", question.split(" mentioned ")[0])
    return " ".join(v for k in keys for v in re.findall(rf"for {k} is: ([\w-]+)\.", text))


def place_of(prompt: str) -> str:
    """The last fact about whom the last question names, after the solved stories."""
    (who,) = re.findall(r"Where is (\w+)\?", prompt.rsplit("\n\n", 1)[-1])
    return " " + re.findall(rf"{who} went to the (\w+)\.", prompt)[-1] + ".\nAnd more"


@pytest.mark.parametrize("name", needles.TASKS)
def test_who_reads_finds_all_needles(name: str, folder: Path) -> None:
    reader = Reader(needle_of)
    row = measure(reader, ByteTokenizer(), parse(f"{name}@900"), limit=5)
    assert row["metrics"] == {"contains": 1.0} and row["errors"] == {"contains": 0.0}
    assert row["examples"] == 5 and {len(p) for p in reader.prompts} == {900}
    blind = measure(Reader(lambda prompt: "no"), ByteTokenizer(), parse(f"{name}@900"), limit=5)
    assert blind["metrics"] == {"contains": 0.0}
    half = iter([True, False, True, False])
    row = measure(
        Reader(lambda p: needle_of(p) if next(half) else ""), ByteTokenizer(),
        parse(f"{name}@900"), limit=4, batch_tokens=1,
    )  # fmt: skip
    assert row["metrics"]["contains"] == 0.5
    assert row["errors"]["contains"] == pytest.approx(np.std([1, 0, 1, 0], ddof=1) / 2)


def test_who_reads_answers_babilong(folder: Path) -> None:
    reader = Reader(place_of)
    row = measure(reader, ByteTokenizer(), parse("babilong_qa1@1k"), limit=8)
    assert row["metrics"] == {"acc": 1.0} and row["task"] == "babilong_qa1@1024"
    assert {len(p) for p in reader.prompts} == {1024}
    for prompt in reader.prompts:  # two solved stories, a text, the question
        assert len(re.findall(r"\nAnswer: \w+\n\n", prompt)) == 2
        assert prompt.endswith("?\nAnswer:") and "is here. " in prompt
    none = Reader(place_of)
    measure(none, ByteTokenizer(), parse("babilong_qa1@1k"), limit=3, shots=0)
    assert all("\nAnswer: " not in p for p in none.prompts)


def test_an_answer_is_alone_in_the_first_line() -> None:
    places = ["garden", "kitchen", "hall"]
    assert only(" Kitchen", "kitchen", places)
    assert not only("kitchen or garden", "kitchen", places)
    assert not only("\n\ngarden\nkitchen", "kitchen", places)
    assert not only("hallway", "hall", places)


def test_babilong_that_never_fits_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="hardly any story fits .* fewer --shots"):
        measure(Reader(place_of), ByteTokenizer(), parse("babilong_qa1@200"), limit=2)


def test_context_is_the_perplexity_of_held_out_books(folder: Path) -> None:
    model, tokenizer = tiny_model(), ByteTokenizer()
    row = measure(model, tokenizer, parse("context@200"), limit=3)
    text = gzip.decompress((folder / "english_novels/Conrad_Nostromo_1904.txt.gz").read_bytes())
    rows = torch.tensor([list(text[i * 200 : (i + 1) * 200]) for i in range(3)])
    with torch.no_grad():
        logits = model(input_ids=rows).logits[:, :-1]
    losses = F.cross_entropy(logits.transpose(1, 2), rows[:, 1:], reduction="none")
    metrics = row["metrics"]
    assert list(metrics) == ["perplexity", "0-64", "64-128", "128-199"]
    assert metrics["0-64"] == pytest.approx(math.exp(float(losses[:, :64].mean())), rel=1e-4)
    assert metrics["perplexity"] == pytest.approx(math.exp(float(losses[:, 128:].mean())), rel=1e-4)
    spread = float(losses[:, 128:].mean(1).std()) / 3**0.5
    assert row["errors"]["perplexity"] == pytest.approx(metrics["perplexity"] * spread, rel=1e-3)
    with pytest.raises(ValueError, match="no text of 90000 tokens"):
        measure(model, tokenizer, parse("context@90000"))


def test_documents_are_asked_with_what_fits(folder: Path) -> None:
    reader = Reader(lambda prompt: " The 5 apples\nmore" if "5 apples" in prompt else " no")
    row = measure(reader, ByteTokenizer(), parse("qasper@100"))
    assert row["metrics"] == {"f1": 1.0} and row["examples"] == 1
    assert reader.prompts == [("We measured 5 apples. " * 5)[:100] + "\n\nQuestion: How many?\n"
                              "Answer:"]  # fmt: skip
    said: list[str] = []
    measure(
        reader, ByteTokenizer(), parse("qasper@100"), max_length=110, overflow="cut",
        notify=said.append,
    )  # fmt: skip
    # 32 are written, the question has 28 and room for a beginning.
    assert len(reader.prompts[-1]) == 110 - 32 - 1 and said and "cut from the left" in said[0]
    measure(reader, ByteTokenizer(), parse("qasper@100"), max_length=50, overflow="cut")
    assert reader.prompts[-1] == "Question: How many?\nAnswer:"  # no room for the document
    row = measure(tiny_model(), ByteTokenizer(), parse("quality@50"))
    assert row["examples"] == 2 and row["metrics"]["acc"] in (0.0, 0.5, 1.0)


def test_what_does_not_fit_is_refused_or_cut(folder: Path) -> None:
    ours = {"limit": 2, "max_length": 600}
    with pytest.raises(ValueError, match="900 tokens and 128 to be written .* --overflow cut"):
        measure(Reader(needle_of), ByteTokenizer(), parse("niah_single_1@900"), **ours)
    with pytest.raises(ValueError, match="smaller length or a larger --max-length"):
        measure(tiny_model(), ByteTokenizer(), parse("context@900"), overflow="cut", **ours)
    reader, said = Reader(needle_of), []
    measure(
        reader, ByteTokenizer(), parse("niah_single_1@900"), overflow="cut", notify=said.append,
        **ours,
    )  # fmt: skip
    assert {len(p) for p in reader.prompts} == {472} and len(said) == 1
    assert all(p.endswith(" is") for p in reader.prompts)


@pytest.mark.parametrize("mixer", ["self_modifying", "attention"])
def test_reading_in_pieces_changes_nothing(mixer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = HopeForCausalLM(HopeConfig.preset("tiny", mixer=mixer)).eval()
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 256, 150).astype(np.int32) for _ in range(2)]
    whole = needles.answer(model, ByteTokenizer(), prompts, 12)
    calls = []
    monkeypatch.setattr(needles, "PIECE", 32)
    monkeypatch.setattr(needles, "read", lambda *a: calls.append(a) or reading.read(*a, piece=32))
    assert needles.answer(model, ByteTokenizer(), prompts, 12) == whole
    assert len(calls) == 1 and calls[0][1].shape == (2, 149)


def test_reading_in_pieces_changes_nothing_of_a_transformers_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model()
    prompts = [np.arange(150, dtype=np.int32) % 200]
    whole = needles.answer(model, ByteTokenizer(), prompts, 12)
    monkeypatch.setattr(needles, "PIECE", 32)
    monkeypatch.setattr(needles, "read", lambda *a: reading.read(*a, piece=32))
    assert needles.answer(model, ByteTokenizer(), prompts, 12) == whole


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("niah_single_9@4k", "choose one of niah_single_1, "),
        ("piqa@4k", "no task 'piqa' at a length"),
        ("context@long", "must be tokens"),
        ("context@0", "must be tokens"),
        ("context@", "must be tokens"),
    ],
)
def test_names_are_checked(name: str, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        parse(name)


def test_missing_data_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NESTLEARN_DATA", str(tmp_path))
    check_data(parse("niah_single_1@1k"))
    for name in NAMES:
        if name != "niah_single_1":
            with pytest.raises(ValueError, match=r"NESTLEARN_DATA \(or --data\)"):
                check_data(parse(f"{name}@1k"))
    with pytest.raises(ValueError, match="with --text"):
        check_data(parse("context@1k"))
    with pytest.raises(ValueError, match=r"no \.txt or \.txt\.gz files"):
        check_data(parse("context@1k"), tmp_path)
    (tmp_path / "a.txt").write_text("Some text. " * 50)
    check_data(parse("niah_single_2@1k"), tmp_path)
    assert set(by_length.NUMBERS) == set(NAMES)


def test_eval_without_lm_eval(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)  # its import fails
    saved, out = tmp_path / "model", tmp_path / "r.json"
    torch.manual_seed(0)
    HopeForCausalLM(HopeConfig.preset("tiny")).save_pretrained(saved)
    ByteTokenizer().save_pretrained(saved)
    common = ["eval", str(saved), "--limit", "1", "--out", str(out), "--tasks"]
    assert main([*common, "niah_single_1@0.4k"]) == 1
    assert "must be tokens" in capsys.readouterr().err
    assert main([*common, "niah_single_1@400", "context@300"]) == 0
    assert [row["cell"] for row in read(out)["rows"]] == ["niah_single_1@400", "context@300"]
    assert main([*common, "context@300", "piqa"]) == 1
    assert "nestlearn[eval]" in capsys.readouterr().err
    assert main([*common, "quality@1k"]) == 0
    assert main([*common[:-1], "--text", "nowhere", "--tasks", "context@300"]) == 1
    assert "--text: no folder nowhere" in capsys.readouterr().err
    books = tmp_path / "books"
    books.mkdir()
    (books / "a.txt").write_text("A sentence of a book. " * 100)
    other = ["--text", str(books), "--out", str(tmp_path / "s.json")]
    assert main([*common[:4], *other, "--tasks", "niah_multikey_1@700"]) == 0
    assert read(tmp_path / "s.json")["settings"]["text"] == str(books)
