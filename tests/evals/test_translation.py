"""Figure 8: data without leaks, prompts, the metric, the stages of a cell, tables."""

from __future__ import annotations

import csv
import gzip
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from nestlearn.cli import pretrained
from nestlearn.evals import kalamang, knowledge, translation
from nestlearn.evals.harness.experiment import Request
from nestlearn.evals.harness.results import Results
from nestlearn.evals.translation import Corpus, Plan, Translation, chrf, prompt, similar, translate
from tests.adaptation.conftest import tiny_model

PAIRS = [
    ("Ma bot.", "He goes.", "Dia pi."),
    ("An muap.", "I eat the fish.", "Saya makan ikan."),
    ("Mu tolma.", "They [will] cut it.", "Dorang potong itu."),
    ("Ma he kararak.", "He was already dry.", ""),
    ("Tumun reidak.", "Anak-anak itu banyak di sana.", "There are many children."),  # swapped
    ("Wat me.", "Kelapa itu dia pu.", ""),  # no English at all
    ("Ma bot.", "He goes.", "Dia pi."),  # twice
    ("Ma " + 12 * "he " + "bot.", "They go.", ""),  # too long
]  # fmt: skip
UTTERANCES = [
    ("e mama...", "Hey mama..."),
    ("[AUDIENCE] palan #1 palan e.", "[AUDIENCE] Take it easy."),
    ("[UNCLEAR]", "[UNCLEAR]"),
    ("ma bot he", "He goes."),  # the English of a dictionary sentence
]


def write(path: Path, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    with gzip.open(path, "wt", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([columns, *rows])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    found = tmp_path / "kalamang"
    found.mkdir()
    write(
        found / "dictionaria_examples.csv.gz",
        ("Primary_Text", "Translated_Text", "alt_translation1"),
        PAIRS,
    )
    columns = ("Primary_Text", "Translated_Text")
    write(found / "multicast_utterances.csv.gz", columns, UTTERANCES)
    return found


def test_the_english_is_found_wherever_it_stands(folder: Path) -> None:
    assert kalamang.example_sentences(folder)[:5] == [
        ("Ma bot.", "He goes."),
        ("An muap.", "I eat the fish."),
        ("Mu tolma.", "They will cut it."),
        ("Ma he kararak.", "He was already dry."),
        ("Tumun reidak.", "There are many children."),
    ]
    assert len(kalamang.example_sentences(folder)) == 6
    assert kalamang.narratives(folder) == [
        ("e mama...", "Hey mama..."),
        ("palan palan e.", "Take it easy."),
        ("ma bot he", "He goes."),
    ]


@pytest.mark.parametrize("seed", range(4))
def test_nothing_that_is_asked_is_learned(folder: Path, seed: int) -> None:
    train, test = kalamang.split(folder, None, 2, seed=seed)
    assert len(test) == 2 and not {a for a, _ in train} & {a for a, _ in test}
    assert not {b.lower() for _, b in train} & {b.lower() for _, b in test}
    # 5 short sentences of the dictionary, 3 utterances; one of these says what a sentence says.
    assert len(train) == 8 - 2 - (("Ma bot.", "He goes.") in test)
    assert all(len(side.split()) <= 12 for pair in (*train, *test) for side in pair)


def test_too_much_is_asked_for(folder: Path) -> None:
    with pytest.raises(ValueError, match="5 sentences of 12 words, 5 were asked"):
        kalamang.split(folder, 1, 5)
    with pytest.raises(ValueError, match="sentences to learn, 100 were asked for"):
        kalamang.split(folder, 100, 2)


def test_the_real_sentences(shared_data: Path) -> None:
    if not (shared_data / "kalamang").is_dir():
        pytest.skip("the data folder has no kalamang")
    train, test = kalamang.split(shared_data / "kalamang", None, 200, words=30)
    assert len(train) > 2000 and len(test) == 200
    sides = [{pair[i].lower() for pair in part} for i in (0, 1) for part in (train, test)]
    assert not sides[0] & sides[1] and not sides[2] & sides[3]
    indonesian = [b for _, b in (*train, *test) if {"dorang", "dong"} & set(b.lower().split())]
    assert len(indonesian) < 5


def test_prompts_are_what_was_learned(tokenizer: Any) -> None:
    pair = ("Ma bot.", "He goes.")
    learned = translation.example("Kalamang", pair)
    assert prompt("Kalamang", pair[0]) == learned["prompt"]
    shown = prompt("Bereb", "Zib.", [("Kalamang", pair)])
    assert shown == f"{learned['prompt']}{learned['completion']}\nBereb: Zib.\nEnglish:"


def test_similar_pairs_by_brute_force() -> None:
    words = ["abc", "abd", "xyz", "abcd", "zzz", "bcd"]
    read = [("L", (word, str(i))) for i, word in enumerate(words)]

    def share(a: str, b: str) -> float:
        grams = [{f"  {w} "[i : i + 3] for i in range(len(w) + 1)} for w in (a, b)]
        return len(grams[0] & grams[1]) / len(grams[0] | grams[1])

    order = sorted(range(6), key=lambda i: share("abcd", words[i]))
    assert [int(e) for _, (_, e) in similar("ABCD", read, 2)] == order[-2:] == [0, 3]
    assert similar("abcd", read, 0) == [] and len(similar("abcd", read, 9)) == 6


def f_score(hypothesis: str, reference: str, beta: float = 2.0) -> float:
    """ChrF by its definition: mean precision and recall of character n-grams up to 6."""
    shares: list[tuple[float, float]] = []
    for n in range(1, 7):
        counts = [
            Counter(t[i : i + n] for i in range(len(t) - n + 1))
            for t in (hypothesis.replace(" ", ""), reference.replace(" ", ""))
        ]
        if not counts[0] or not counts[1]:
            continue
        both = sum((counts[0] & counts[1]).values())
        shares.append((both / counts[0].total(), both / counts[1].total()))
    if not shares:
        return 0.0
    precision, recall = (sum(s[i] for s in shares) / len(shares) for i in (0, 1))
    if not precision + recall:
        return 0.0
    return 100 * (1 + beta**2) * precision * recall / (beta**2 * precision + recall)


def test_chrf_is_its_definition_and_recall_weighs_more() -> None:
    pytest.importorskip("sacrebleu", reason="ChrF is computed by sacrebleu")
    short, long = "the old women", "the old women did not see the dog"
    assert chrf([short], [long]) == pytest.approx(f_score(short, long), abs=0.05)
    assert chrf([long], [short]) == pytest.approx(f_score(long, short), abs=0.05)
    assert chrf([short], [long]) < chrf([long], [short])
    assert chrf([long], [long]) == 100.0
    assert chrf(["xyz"], ["abcabc"]) == 0.0


def test_without_sacrebleu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    with pytest.raises(ValueError, match="ChrF needs sacrebleu: pip install"):
        chrf(["a"], ["a"])


TINY = Plan(train=3, test=2, shots=2, new_tokens=4, slots=64, seeds=1)


def test_ways_of_asking(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the prompts hold; a model that always says the right thing gets 100."""
    asked: list[list[str]] = []

    def answers(
        model: Any, tokenizer: Any, prompts: list[str], *_: Any, line: bool = False, **__: Any
    ) -> list[str]:
        asked.append(prompts)
        return [" He goes." + ("" if line else "\n\nBereb: more"), " I eat."]

    monkeypatch.setattr(knowledge, "greedy", answers)
    monkeypatch.setattr(translation, "chrf", lambda a, b: 100.0 * (list(a) == list(b)))
    corpus = Corpus("Kalamang", (), (("Ma bot.", "He goes."), ("An muap.", "I eat.")))
    read = [("Kalamang", ("Ma boty.", "A")), ("Bereb", ("Zib.", "B")), ("Bereb", ("Tak.", "C"))]
    found = translate(None, None, corpus, read, TINY)
    assert {way: score for way, (score, _) in found.items()} == dict.fromkeys(found, 100.0)
    assert found["closed"][1][0] == ["Ma bot.", "He goes.", "He goes."]
    closed, recent, close = (prompts[0] for prompts in asked)
    assert closed == "Kalamang: Ma bot.\nEnglish:"
    assert "Zib." in recent and "Tak." in recent and "boty" not in recent
    assert close.index("boty") < close.index("Ma bot.\n") and close.count("English:") == 3


def test_systems_have_the_levels_of_their_names() -> None:
    for name, (levels, method, lr) in translation.SYSTEMS.items():
        assert name.split("_")[1] == str(levels) and (lr > 0) == (levels > 0)
        assert method == ("added" if name.endswith("added") else "placement")


@pytest.fixture
def measured(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: Any, tmp_path: Path
) -> Results:
    """Cells of two systems, with a small model."""
    monkeypatch.setenv("NESTLEARN_DATA", str(folder.parent))
    monkeypatch.setattr(Translation, "plans", {"tiny": TINY})
    monkeypatch.setattr(translation, "chrf", lambda a, b: sum(map(f_score, a, b)) / len(a))
    monkeypatch.setattr(
        pretrained, "load_pretrained", lambda name, device: (tiny_model().to(device), tokenizer)
    )
    # The invented language needs more sentences than this until all its words were read.
    known = Corpus("Bereb", (("Zib tak.", "The dog sleeps."),) * 3, (("Zib.", "The dog."),) * 2)
    monkeypatch.setattr(translation, "invented", lambda train, test: known)
    toy = Translation()
    results = Results(tmp_path / "fig8.json", toy.question, toy.settings())
    request = Request(systems=("hope_0", "hope_3_added"), model="small")
    for name, cell in toy.due(results, request).items():
        results.add(name, {**toy.measure({**cell, "model": "small"}), "seconds": 1.0})
    assert toy.due(results, request) == {}
    return results


def test_stages_tables_and_plot(measured: Results, tmp_path: Path) -> None:
    toy = Translation()
    rows = measured.record["rows"]
    assert len(rows) == 4
    for row in rows:
        first, second = row["stages"]
        assert list(first["chrf"]) == [row["first"]]
        assert list(second["chrf"]) == [row["first"], second["learned"]]
        assert (row["learning_seconds"] > 0) == (row["system"] != "hope_0")
        assert "after kalamang" in toy.summary(row)
    # A model that learns nothing forgets nothing where the prompt is the same.
    frozen = [r for r in rows if r["system"] == "hope_0" and r["first"] == "kalamang"][0]
    before, after = (stage["chrf"]["kalamang"]["closed"] for stage in frozen["stages"])
    assert before == after
    tables = toy.tables(measured)
    assert [t.title for t in tables] == ["ChrF, closed", "ChrF, recent", "ChrF, similar"]
    assert [row[:2] for row in tables[0].rows] == [
        (s, lang) for lang in ("kalamang", "invented") for s in ("hope_0", "hope_3_added")
    ]
    _, _, alone, kept, forgotten, second = tables[0].rows[0]
    assert (alone, kept, forgotten) == (before, after, 0.0)
    assert second == [
        r["stages"][1]["chrf"]["kalamang"]["closed"]
        for r in rows if r["system"] == "hope_0" and r["first"] == "invented"
    ][0]  # fmt: skip
    assert "The paper" in tables[-1].note
    pytest.importorskip("matplotlib")
    assert toy.plot(measured, tmp_path / "p.png") and (tmp_path / "p.png").stat().st_size > 1000


def test_what_is_missing_is_said_before_any_work(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("NESTLEARN_DATA", str(tmp_path))
    results = Results(tmp_path / "r.json", "?", {})
    with pytest.raises(ValueError, match="no data set 'kalamang': set NESTLEARN_DATA"):
        Translation().due(results, Request())
    with pytest.raises(ValueError, match="--systems: hope_9 not among hope_0"):
        monkeypatch.setattr(translation, "data_path", lambda *_: None)
        monkeypatch.setattr(translation, "chrf", lambda *_: 0.0)
        Translation().due(results, Request(systems=("hope_9",)))


def test_a_language_is_learned(tokenizer: Any) -> None:
    """A model with levels learns the pairs it reads; one without says what it said."""
    import nestlearn as nl

    model = nl.adapt(tiny_model(), [nl.Level(period=16)], slots=256, calibration=None)
    learner = nl.Learner(model, tokenizer, lr=0.5, snapshots=0)
    pairs = [translation.example("Bereb", p) for p in (("zib", "dog"), ("tak", "fish"))]
    before = learner.evaluate(pairs)["loss"]
    for _ in range(3):
        learner.learn(pairs)
    assert learner.evaluate(pairs)["loss"] < 0.7 * before
    assert torch.isfinite(torch.tensor(before))
