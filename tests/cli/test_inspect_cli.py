"""``nestlearn inspect``: folders, training runs and ids, as tree, table, JSON and picture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import nestlearn as nl
from nestlearn.cli.main import main
from tests.adaptation.conftest import tiny_model


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    tiny_model().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Looks like a run of ``nestlearn train``: the model is inside."""
    folder = tmp_path_factory.mktemp("run")
    config = nl.HopeConfig.preset("tiny", cms_periods=[1, 4])
    nl.HopeForCausalLM(config).save_pretrained(folder / "final")
    return folder


def test_a_pretrained_model_in_use(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(llama)]) == 0
    text = capsys.readouterr().out
    assert "LlamaForCausalLM: 2 levels" in text
    assert "attention: no parameters" in text and "frequency ∞" in text


def test_json_is_what_the_library_says(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(llama), "--json", "--tokens", "32"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data == json.loads(nl.inspect(tiny_model(), tokens=32).to_json())


def test_weights_are_not_needed(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text((llama / "config.json").read_text())
    assert main(["inspect", str(tmp_path)]) == 0
    assert "LlamaForCausalLM" in capsys.readouterr().out


def test_a_run_of_hope_in_training(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(run), "--optimizer", "momentum", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    found = [[(b["name"], b["frequency"]) for b in level["boxes"]] for level in data["levels"]]
    assert found == [
        [("CMS level2", "1/4")],
        [("momentum (every 4 steps)", "1/4")],
        [("weights", "1"), ("CMS level1", "1")],
        [("momentum (every step)", "1")],
        [("memory", "16"), ("projection memories", "16")],  # 1,024 tokens, written every 64
    ]
    assert data["notes"] == [] and data["unknown"] == []


def test_table_and_picture(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "hope.png"
    assert main(["inspect", str(run), "--table", "--picture", str(picture)]) == 0
    out = capsys.readouterr().out
    assert "frequency" in out and "CMS level2" in out
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["./nothing"], "no folder ./nothing"),
        (["no.gguf"], "no file no.gguf"),
        (["MODEL", "--tokens", "0"], "--tokens"),
        (["MODEL", "--json", "--table"], "not both"),
        (["MODEL", "--picture", "no/such/x.png"], "no folder"),
        (["EMPTY"], "no model"),
    ],
)
def test_mistakes_are_one_line(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    flags: list[str], message: str, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.delenv("NESTLEARN_DEBUG", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    places = {"MODEL": str(llama), "EMPTY": str(tmp_path / "empty")}
    assert main(["inspect", *(places.get(f, f) for f in flags)]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
