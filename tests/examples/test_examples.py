"""Every example runs, in a few steps, and says what it is about."""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "examples"
EXAMPLES = sorted(FOLDER.glob("*.py"))
SAYS = {
    "maml_sinusoid": "initialisation -> task",
    "hypernetwork": "generation -> task: generates its weights",
    "inspect_models": "level 7 (fastest)",
}


def test_there_are_examples() -> None:
    assert {path.stem for path in EXAMPLES} == set(SAYS)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_run(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert 10 <= len(path.read_text().splitlines()) <= 40
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(path), "3"])
    runpy.run_path(str(path), run_name="__main__")
    assert SAYS[path.stem] in capsys.readouterr().out
    assert not os.listdir(tmp_path)


def test_the_network_of_maml_learns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """After some steps, one gradient step on ten points makes the answer better."""
    monkeypatch.setattr(sys, "argv", ["maml_sinusoid.py", "150"])
    runpy.run_path(str(FOLDER / "maml_sinusoid.py"), run_name="__main__")
    last = capsys.readouterr().out.splitlines()[-1]
    before, after = (float(w.strip(",")) for w in last.split() if w[0].isdigit())
    assert after < 0.95 * before
