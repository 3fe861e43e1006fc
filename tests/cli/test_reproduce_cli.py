"""``nestlearn reproduce``: list, names, going on, reports, flags that cannot be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from nestlearn.cli.main import main
from nestlearn.evals import registry
from nestlearn.evals.harness import run as running
from nestlearn.evals.harness.systems import SYSTEMS
from tests.evals.toy import Copying, Squares, Taught, here


@pytest.fixture
def toys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small experiments in the place of the real ones."""
    monkeypatch.setattr(running, "in_parallel", here)
    monkeypatch.setattr(
        registry,
        "EXPERIMENTS",
        {toy.name: f"tests.evals.toy:{toy.__name__}" for toy in (Squares, Taught, Copying)},
    )
    for toy in (Squares, Taught):
        monkeypatch.setattr(toy, "measured", [])
        monkeypatch.setattr(toy, "broken", set())
    monkeypatch.setattr(Taught, "models", [])


def reproduce(*words: str) -> int:
    return main(["reproduce", *words])


def test_the_list_has_every_item_and_system(capsys: pytest.CaptureFixture[str]) -> None:
    assert reproduce("--list") == 0
    text = capsys.readouterr().out
    lines = {line.split()[0]: line for line in text.splitlines() if line.strip()}
    assert set(registry.EXPERIMENTS) <= set(lines)
    for name in registry.EXPERIMENTS:
        made = registry.experiment(name)
        assert made.item in lines[name] and made.title in lines[name]
        assert ("needs --model" in lines[name]) == made.needs_model
        assert made.name == name and made.question.endswith("?")
    assert all(system in text for system in SYSTEMS)
    assert reproduce() == 0
    assert capsys.readouterr().out == text


def test_one_item_ends_in_reports(
    toys: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert reproduce("squares", "--out", str(tmp_path), "--tasks", "2", "3") == 0
    out = capsys.readouterr().out
    assert "squares <of> numbers" in out and "square 3" in out and "written:" in out
    folder = tmp_path / "tiny"
    assert sorted(p.name for p in folder.iterdir()) == [
        "squares.html", "squares.json", "squares.md", "squares.png",
    ]  # fmt: skip
    record = json.loads((folder / "squares.json").read_text())
    assert [r["value"] for r in record["rows"]] == [4, 9, 13]
    assert "Table | 0" in (folder / "squares.md").read_text()


def test_a_run_that_was_cut_off_goes_on(
    toys: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("squares", "--out", str(tmp_path))
    Squares.broken = {3}
    assert reproduce(*flags) == 1
    assert "1 cells failed" in capsys.readouterr().out
    Squares.broken = set()
    assert reproduce(*flags) == 0
    assert Squares.measured == ["1", "2", "3", "3", "None"]
    assert reproduce(*flags) == 0
    assert len(Squares.measured) == 5
    assert reproduce(*flags, "--fresh") == 0
    assert len(Squares.measured) == 9


def test_a_report_measures_nothing(
    toys: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert reproduce("squares", "--out", str(tmp_path), "--report") == 0
    assert Squares.measured == [] and not (tmp_path / "tiny").exists()
    reproduce("squares", "--out", str(tmp_path), "--tasks", "1")
    (tmp_path / "tiny" / "squares.md").unlink()
    measured = list(Squares.measured)
    assert reproduce("squares", "--out", str(tmp_path), "--report") == 0
    assert Squares.measured == measured and (tmp_path / "tiny" / "squares.md").exists()
    assert "square 1" in capsys.readouterr().out


def test_a_pretrained_model(toys: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("taught", "--out", str(tmp_path))
    assert reproduce(*flags) == 1
    assert "taught: a pre-trained model is needed; name it with --model" in capsys.readouterr().err
    assert reproduce(*flags, "--model", "/models/small") == 0
    assert set(Taught.models) == {"/models/small"}
    assert reproduce(*flags, "--report") == 0
    assert reproduce(*flags, "--model", "/models/large") == 1
    assert "other settings" in capsys.readouterr().err


def test_all_leaves_out_what_it_has_no_model_for(
    toys: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(registry.EXPERIMENTS, "copying")
    assert reproduce("all", "--out", str(tmp_path)) == 0
    assert "left out, for want of a pre-trained model (--model): taught" in capsys.readouterr().out
    assert (tmp_path / "tiny" / "squares.json").exists()
    assert not (tmp_path / "tiny" / "taught.json").exists()


def test_training_from_the_command_line(toys: None, tmp_path: Path) -> None:
    flags = ("copying", "--out", str(tmp_path), "--tasks", "easy", "--device", "cpu")
    assert reproduce(*flags, "--seeds", "1") == 0
    rows = json.loads((tmp_path / "tiny" / "copying.json").read_text())["rows"]
    final = [r for r in rows if not r["tuning"]]
    assert len(rows) == 3 and len(final) == 1
    assert final[0]["test"]["tokens"] > 0.9


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["squaers"], "unknown experiment 'squaers'; did you mean 'squares'"),
        (["squares", "zzz"], "unknown experiment 'zzz'"),
        (["squares", "--jobs", "0"], "--jobs must be 1 or more, got 0"),
        (["squares", "--threads", "0"], "--threads must be 1 or more"),
        (["squares", "--seeds", "0"], "--seeds must be 1 or more, got 0"),
        (["squares", "--scale", "paper"], "squares has no scale 'paper'"),
        (["squares", "--tasks", "9"], "--tasks: 9 not among 1, 2, 3"),
        (["squares", "--data", "/no/such/folder"], "--data: no folder /no/such/folder"),
        (["squares", "--device", "toaster"], "--device must be cpu, cuda or auto"),
        (["copying", "--systems", "nothing"], "--systems: nothing not among"),
    ],
)
def test_bad_flags_are_said_before_any_work(
    toys: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert reproduce(*words, "--out", str(tmp_path)) == 1
    assert message in capsys.readouterr().err
    assert Squares.measured == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_no_gpu(toys: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert reproduce("squares", "--device", "cuda", "--out", str(tmp_path)) == 1
    assert "no GPU" in capsys.readouterr().err
