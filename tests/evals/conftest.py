"""Small data folders, and experiments measured in this process."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pytest

from nestlearn.evals.harness.experiment import Experiment, Request
from nestlearn.evals.harness.run import open_results
from nestlearn.evals.text import VALIDATION, _joined, text

COMMONSENSE: dict[str, list[dict[str, Any]]] = {
    "piqa_valid": [
        {"question": "open a tin", "choices": ["use an opener", "sing"], "label": 0},
        {"question": "dry a plate", "choices": ["wet it", "use a cloth for it"], "label": 1},
    ],
    "hellaswag_val": [
        {
            "question": "Cooking: A man cuts a carrot. the man",
            "choices": ["sleeps.", "puts it into a pot.", "flies.", "is a car."],
            "label": 1,
        },
        {
            "question": "Home: Buy a pot. Clean it.",
            "choices": ["Use it.", "Burn it.", "Eat it.", "Sell it."],
            "label": 0,
        },
    ],
    "winogrande_dev": [
        {"sentence": "Ann fed Eve as _ was hungry.", "choices": ["Ann", "Eve"], "label": 1}
    ],
    "arc_easy_test": [{"question": "What is wet?", "choices": ["sand", "rain", "a"], "label": 1}],
    "arc_challenge_test": [{"question": "Two and two?", "choices": ["4", "5"], "label": 0}],
    "siqa_dev": [
        {"question": "Ann fell. How is Ann?", "choices": ["well", "hurt", "rich"], "label": 1}
    ],
    "boolq_dev": [
        {"question": "is rain wet", "passage": "Rain -- Rain is wet.", "label": True},
        {"question": "is sand wet", "passage": "Sand -- Sand is dry.", "label": False},
    ],
}


def _write(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.write(content)


@pytest.fixture
def data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a few rows of every data set, in the layout of the real one."""
    folder = tmp_path / "data"
    for name, rows in COMMONSENSE.items():
        lines = "\n".join(map(json.dumps, rows))
        _write(folder / "commonsense" / f"{name}.jsonl.gz", lines)
    passage = json.dumps({"text": "The cat sat on the mat and slept on the mat"})
    _write(folder / "lambada" / "lambada_test.jsonl.gz", passage)
    articles = " \n = One = \n \n A b , c . \n = = Part = = \n D e . \n = Two = \n F g . \n"
    _write(folder / "wikitext2" / "test.txt.gz", articles)
    questions = [{"question": "Where?", "answer": "nowhere"}, {"question": "Who?", "answer": "Ann"}]
    squad = [{"title": "Ann", "context": "Ann was here.", "questions": questions}]
    _write(folder / "squad_knowledge" / "squad_val.json.gz", json.dumps(squad))
    words = random.Random(0)
    for name in (*VALIDATION[:1], "Stevenson_Treasure_1883", "Train_Book_1800"):
        novel = " ".join(words.choice(["the", "cat", "sat", "here"]) for _ in range(800))
        _write(folder / "english_novels" / f"{name}.txt.gz", novel)
    monkeypatch.setenv("NESTLEARN_DATA", str(folder))
    text.cache_clear()
    _joined.cache_clear()
    yield folder
    text.cache_clear()
    _joined.cache_clear()


def measured(experiment: Experiment, path: Path, **request: Any) -> Any:
    """The results of all cells, measured in this process."""
    asked = Request(**request)
    results = open_results(experiment, path, asked, threads=1)
    while cells := experiment.due(results, asked):
        for name, cell in cells.items():
            results.add(name, {**experiment.measure(cell), "seconds": 0.0})
    return results
