"""Local data sets give lm-eval's prompts and metrics; `nestlearn eval` end to end."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

import nestlearn as nl
from nestlearn.cli.main import main
from nestlearn.evals.harness.results import read
from nestlearn.evals.lm.tasks import LANGUAGE, LOCAL, METRIC, expand, where
from nestlearn.train.tokenizers import ByteTokenizer
from tests.adaptation.conftest import tiny_model
from tests.evals.conftest import COMMONSENSE

pytest.importorskip("lm_eval", reason="pip install 'nestlearn[eval]'")
from lm_eval.tasks import TaskManager  # noqa: E402

from nestlearn.evals.lm.measure import _manager, check_data, measure_tasks  # noqa: E402
from nestlearn.evals.lm.tasks import load_task  # noqa: E402


@pytest.fixture(scope="module")
def manager() -> TaskManager:
    return _manager()


# Prompt and choices of the first row, written out from the published prompts of the tasks.
PROMPTS: dict[str, tuple[str, list[str], int]] = {
    "piqa": ("Question: open a tin\nAnswer:", ["use an opener", "sing"], 0),
    "hellaswag": (
        "Cooking: A man cuts a carrot. The man",
        ["sleeps.", "puts it into a pot.", "flies.", "is a car."],
        1,
    ),
    "arc_easy": ("Question: What is wet?\nAnswer:", ["sand", "rain", "a"], 1),
    "arc_challenge": ("Question: Two and two?\nAnswer:", ["4", "5"], 0),
    "social_iqa": ("Q: Ann fell. How is Ann?\nA:", ["well", "hurt", "rich"], 1),
    "boolq": ("Rain -- Rain is wet.\nQuestion: is rain wet?\nAnswer:", ["no", "yes"], 1),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts(name: str, data_folder: Path, manager: TaskManager) -> None:
    (task,) = load_task(name, "local", manager)
    row = task.eval_docs[0]
    found = task.doc_to_text(row), task.doc_to_choice(row), int(task.doc_to_target(row))
    assert found == PROMPTS[name]


def test_a_finished_context_has_no_second_part(data_folder: Path, manager: TaskManager) -> None:
    (task,) = load_task("hellaswag", "local", manager)
    assert task.doc_to_text(task.eval_docs[1]) == "Home: Buy a pot. Clean it."


def test_winogrande_asks_for_what_follows_both_names(
    data_folder: Path, manager: TaskManager
) -> None:
    (task,) = load_task("winogrande", "local", manager)
    row = task.eval_docs[0]
    assert task.doc_to_choice(row) == ["Ann fed Eve as Ann", "Ann fed Eve as Eve"]
    assert task.doc_to_target(row) == "was hungry."
    assert task.doc_to_text(row) == 1


def test_articles_begin_at_first_headings(data_folder: Path) -> None:
    rows = list(LOCAL["wikitext"].rows(data_folder / LOCAL["wikitext"].file))
    assert [row["page"].count("\n") for row in rows] == [6, 2]
    assert "".join(row["page"] for row in rows).startswith(" \n = One = \n")


def test_a_question_has_its_answer_in_the_passage(data_folder: Path) -> None:
    rows = list(LOCAL["squad"].rows(data_folder / LOCAL["squad"].file))
    assert [(row["question"], row["value"]) for row in rows] == [("Who?", "Ann")]


def test_where_data_comes_from(data_folder: Path) -> None:
    assert where("piqa", "auto") == where("squad", "hub") == "local"
    assert where("piqa", "hub") == where("openbookqa", "auto") == where("fda", "auto") == "hub"
    with pytest.raises(ValueError, match="NESTLEARN_DATA"):
        where("openbookqa", "local")
    with pytest.raises(ValueError, match="no local data"):
        where("fda", "local")
    assert expand(("table2", "piqa", "fda")) == (*LANGUAGE, "fda")
    assert set(LANGUAGE) <= set(METRIC)


def test_unknown_tasks_are_refused(data_folder: Path) -> None:
    with pytest.raises(ValueError, match="did you mean .*piqa"):
        check_data(("piqaa",))


def test_metrics_by_hand(data_folder: Path) -> None:
    """Accuracy, normalised accuracy, perplexities from likelihoods computed here."""
    import torch

    model, tokenizer = tiny_model(seed=3), ByteTokenizer()

    def likelihood(context: bytes, answer: bytes) -> float:
        with torch.no_grad():
            logits = model(torch.tensor([list(context + answer)])).logits[0].double()
        logs = logits.log_softmax(-1)
        first = len(context) - 1
        return sum(float(logs[first + i, a]) for i, a in enumerate(answer))

    rows = dict(
        measure_tasks(model, tokenizer, ("piqa", "lambada_openai", "wikitext"), source="local")
    )
    right = normalised = 0
    for row in COMMONSENSE["piqa_valid"]:
        prompt = f"Question: {row['question']}\nAnswer:".encode()
        found = [likelihood(prompt, f" {c}".encode()) for c in row["choices"]]
        lengths = [len(c) for c in row["choices"]]
        right += max((0, 1), key=lambda i: found[i]) == row["label"]
        normalised += max((0, 1), key=lambda i: found[i] / lengths[i]) == row["label"]
    assert rows["piqa"]["metrics"] == {"acc": right / 2, "acc_norm": normalised / 2}
    share = right / 2
    assert rows["piqa"]["errors"]["acc"] == pytest.approx(math.sqrt(share * (1 - share) / 1))
    value = likelihood(b"The cat sat on the mat and slept on the", b" mat")
    found = rows["lambada_openai"]["metrics"]["perplexity"]
    assert found == pytest.approx(math.exp(-value), rel=1e-3)
    pages = [r["page"] for r in LOCAL["wikitext"].rows(data_folder / LOCAL["wikitext"].file)]
    assert rows["wikitext"]["examples"] == len(pages) == 2
    metrics = rows["wikitext"]["metrics"]
    size = sum(len(p.encode()) for p in pages)
    words = sum(len(p.split()) + 2 for p in pages)  # lm-eval counts the empty ends, too
    assert metrics["bits_per_byte"] == pytest.approx(math.log2(metrics["byte_perplexity"]))
    assert math.log(metrics["word_perplexity"]) * words == pytest.approx(
        math.log(metrics["byte_perplexity"]) * size
    )


def test_eval_command_goes_on_where_it_stood(
    data_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    tiny_model().save_pretrained(folder)
    ByteTokenizer().save_pretrained(folder)
    out = tmp_path / "r.json"
    common = ["eval", str(folder), "--limit", "1", "--out", str(out), "--tasks"]
    assert main([*common, "piqa", "squad"]) == 0
    first = read(out)
    assert [row["cell"] for row in first["rows"]] == ["piqa", "squad"]
    assert first["settings"]["state"] == "reset per request"
    assert "reset per request" in capsys.readouterr().out
    assert main([*common, "piqa", "boolq", "squad"]) == 0
    again = read(out)
    assert [row["cell"] for row in again["rows"]] == ["piqa", "squad", "boolq"]
    assert again["rows"][:2] == first["rows"]
    json.dumps(again, allow_nan=False)
    assert main([*common[:-1], "--shots", "1", "--tasks", "piqa"]) == 1
    assert "other settings" in capsys.readouterr().err


def test_eval_with_a_memory(
    data_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, file = tmp_path / "model", tmp_path / "me.nlmem"
    tiny_model().save_pretrained(folder)
    ByteTokenizer().save_pretrained(folder)
    learner = nl.Learner(nl.adapt(tiny_model(), calibration=None), ByteTokenizer())
    for row in LOCAL["wikitext"].rows(data_folder / LOCAL["wikitext"].file):
        learner.learn(row["page"])
    learner.save(file)
    content = file.read_bytes()

    def bits(name: str, *flags: str) -> float:
        out = tmp_path / f"{name}.json"
        found = ["eval", str(folder), "--tasks", "wikitext", "--out", str(out), *flags]
        assert main(found) == 0
        return float(read(out)["rows"][0]["metrics"]["bits_per_byte"])

    assert bits("with", "--memory", str(file)) < 0.99 * bits("without")
    assert file.read_bytes() == content
    assert read(tmp_path / "with.json")["settings"]["memory"].startswith("me.nlmem (")
    learner.reset()
    learner.learn("Another text.")
    learner.save(file)
    again = ["eval", str(folder), "--tasks", "wikitext", "--out", str(tmp_path / "with.json")]
    assert main([*again, "--memory", str(file)]) == 1
    assert "other settings" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--memory", "nowhere.nlmem"], "no file nowhere.nlmem"),
        (["--limit", "0"], "--limit must be 1"),
        (["--tasks", "fda", "--source", "local"], "no local data"),
        (["--data", "nowhere"], "no folder nowhere"),
    ],
)
def test_eval_refuses(
    flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", str(tmp_path), *flags]) == 1
    assert message in capsys.readouterr().err


def test_real_files_are_complete(shared_data: Path) -> None:
    """As many rows as the published splits; every label is one of the choices."""
    counts = {
        "piqa": 1838, "hellaswag": 10042, "winogrande": 1267, "arc_easy": 2376,
        "arc_challenge": 1172, "social_iqa": 1954, "boolq": 3270, "lambada_openai": 5153,
        "openbookqa": 500, "wikitext": 60,
    }  # fmt: skip
    for name, count in counts.items():
        path = shared_data / LOCAL[name].file
        if not path.is_file():
            pytest.skip(f"no {path}")
        rows: list[dict[str, Any]] = list(LOCAL[name].rows(path))
        assert abs(len(rows) - count) <= (2 if name == "wikitext" else 0), name
