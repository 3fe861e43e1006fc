"""The README's first lines are the two commands; its Python runs; what it links to exists."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from nestlearn.cli.main import COMMANDS
from nestlearn.train.tokenizers import ByteTokenizer
from tests.adaptation.conftest import tiny_model

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
README = (ROOT / "README.md").read_text()


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def test_the_two_commands_come_first() -> None:
    first = "\n".join(README.splitlines()[:4])
    assert "make demo" in first
    assert "make test" in first


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_python_runs(document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if "my-model" in document.read_text():  # the reader's own model
        tiny_model().save_pretrained("my-model")
        ByteTokenizer().save_pretrained("my-model")
    namespace: dict[str, object] = {"__name__": "__document__"}
    for block in blocks(document.read_text(), "python"):
        exec(compile(block, document.name, "exec"), namespace)


def test_there_is_a_python_example() -> None:
    examples = blocks(README, "python")
    assert len(examples) == 2
    for example in examples:
        assert len([line for line in example.splitlines() if line.strip()]) <= 20


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    text = document.read_text()
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if not target.startswith(("http://", "https://")):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"
    named = re.findall(r"`((?:src|tests|docs|benchmarks|examples|scripts)/[\w./-]+)", text)
    for path in named:
        assert (ROOT / path).exists(), f"{document.name} names {path}"


def test_commands_named_exist() -> None:
    for name in re.findall(r"nestlearn ([a-z-]+)", "\n".join(blocks(README, "console"))):
        assert name in COMMANDS
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"make ([a-z-]+)", README):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), f"no target {target}"


def test_makefile_runs_dry() -> None:
    for target in ("setup", "test", "demo", "demo-train", "lint", "bench", "clean"):
        command = ["make", "--dry-run", "-C", str(ROOT), target]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
