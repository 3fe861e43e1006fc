"""nestlearn learn, chat and memory, as a person uses them, on a tiny model."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from nestlearn.adaptation import read_memory
from nestlearn.cli.main import main
from nestlearn.cli.units import parse_bytes
from nestlearn.train.tokenizers import ByteTokenizer
from tests.adaptation.conftest import tiny_model

TEXT = "Irma Quell built the lighthouse of Ostrava Bay in 1893, and kept its lamp for forty years. "


@pytest.fixture(scope="module")
def base(tmp_path_factory: Any) -> str:
    """A saved model with its tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    tiny_model().save_pretrained(folder)
    ByteTokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def book(tmp_path: Path) -> str:
    (tmp_path / "book.txt").write_text(TEXT * 3)
    return str(tmp_path / "book.txt")


def learn(base: str, memory: Path, *rest: str) -> int:
    settings = ["--levels", "8", "32", "--slots", "64", "--lr", "0.1", "--repeats", "1"]
    return main(["learn", "--model", base, "--memory", str(memory), *settings, *rest])


def test_learn_makes_and_continues_a_memory(
    base: str, book: str, tmp_path: Path, capsys: Any
) -> None:
    memory = tmp_path / "me.nlmem"
    weights = (Path(base) / "model.safetensors").read_bytes()
    assert learn(base, memory, book, "--held-out", book) == 0
    out = capsys.readouterr().out
    assert "new memory" in out and "learned 273 tokens of 1 documents" in out
    assert "held-out perplexity before" in out and "held-out perplexity changed by -" in out
    first = read_memory(memory)
    assert first.counts["tokens"] == 273 and first.optimizer["clocks"]["every 8"] == [273, 34]
    assert learn(base, memory, book) == 0
    second = read_memory(memory)
    assert second.optimizer["clocks"]["every 8"] == [546, 68]  # the clock stood between two updates
    assert [s.counts.get("tokens", 0) for s in second.snapshots] == [0, 273]
    assert (Path(base) / "model.safetensors").read_bytes() == weights


def test_learn_reads_examples_into_a_readout(base: str, tmp_path: Path, capsys: Any) -> None:
    rows = [{"prompt": f"{w} fish?", "completion": f" {w[::-1]}\n"} for w in ("red", "old")]
    path, memory = tmp_path / "rows.jsonl", tmp_path / "me.nlmem"
    path.write_text("\n".join(map(json.dumps, rows)))
    command = ["learn", "--model", base, "--memory", str(memory), str(path)]
    assert main([*command, "--method", "readout", "--rank", "512", "--held-out", str(path)]) == 0
    out = capsys.readouterr().out
    assert "learned 10 tokens of 2 documents" in out and "perplexity changed by -" in out
    found = read_memory(memory)
    assert found.layout.method == "readout" and found.names == ("every 1",)
    assert main(["memory", "show", str(memory)]) == 0
    assert "readout" in capsys.readouterr().out


def test_learn_reads_pipes_and_data_sets(
    base: str, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    memory = tmp_path / "me.nlmem"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("Grüße\n".encode() * 30)))
    assert learn(base, memory, "-") == 0
    (tmp_path / "rows.jsonl").write_text(json.dumps({"body": TEXT}) + "\n")
    assert learn(base, memory, str(tmp_path / "rows.jsonl"), "--text-column", "body") == 0
    assert read_memory(memory).counts["documents"] == 2
    capsys.readouterr()
    before = memory.read_bytes()
    assert learn(base, memory, str(tmp_path / "rows.jsonl")) == 1
    err = capsys.readouterr().err
    assert "no column 'text'; there are: body" in err
    assert "saved" not in err and memory.read_bytes() == before  # nothing was learned
    more = [{"text": TEXT}, {"body": TEXT}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in more))
    assert learn(base, memory, str(tmp_path / "rows.jsonl")) == 1
    assert "saved what was learned so far" in capsys.readouterr().err
    assert read_memory(memory).counts["documents"] == 3


def test_mistakes_get_one_line_and_lose_nothing(
    base: str, book: str, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    memory = tmp_path / "me.nlmem"
    cases: list[tuple[list[str], str]] = [
        ([], "nothing to learn: name files"),
        (["-", book], "- .standard input. cannot be mixed"),
        ([str(tmp_path / "none.txt")], "no such file"),
        ([book, "--max-size", "much"], "a size is a number"),
        ([book, "--save-every", "0"], "--save-every must be more than 0"),
        ([book, "--context", "4"], "more than the context of 4"),
    ]
    for arguments, message in cases:
        assert learn(base, memory, *arguments) in (1, 2)
        err = capsys.readouterr().err
        assert message.split(".")[0] in err and "Traceback" not in err
        assert not memory.exists()
    assert main(["learn", book, "--model", "/no/folder", "--memory", str(memory)]) == 1
    assert "no folder /no/folder" in capsys.readouterr().err
    assert main(["learn", book, "--model", base, "--memory", str(tmp_path / "me.txt")]) == 1
    assert "named *.nlmem" in capsys.readouterr().err
    memory.write_bytes(b"something else")
    assert learn(base, memory, book) == 1
    assert "is no memory file" in capsys.readouterr().err
    assert memory.read_bytes() == b"something else"


def test_another_model_is_refused(base: str, book: str, tmp_path: Path, capsys: Any) -> None:
    memory = tmp_path / "me.nlmem"
    learn(base, memory, book)
    before = memory.read_bytes()
    other = tmp_path / "other"
    tiny_model(seed=3).save_pretrained(other)
    ByteTokenizer().save_pretrained(other)
    capsys.readouterr()
    assert learn(str(other), memory, book) == 1
    assert "another base model" in capsys.readouterr().err
    assert memory.read_bytes() == before


@pytest.mark.slow
def test_ctrl_c_keeps_what_was_learned(base: str, tmp_path: Path) -> None:
    long = tmp_path / "long.txt"
    long.write_text(TEXT * 3000)
    memory = tmp_path / "me.nlmem"
    process = subprocess.Popen(
        [sys.executable, "-m", "nestlearn", "learn", str(long), "--model", base, "--memory",
         str(memory), "--levels", "8", "--slots", "32", "--repeats", "1", "--save-every", "0.2"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 100
    while not memory.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "stopping" in out and "learned" in out
    assert 0 < read_memory(memory).counts["tokens"] < 270_000


def test_chat(base: str, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    memory = tmp_path / "me.nlmem"

    def talk(*lines: str, learn: bool = False) -> str:
        monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
        flags = ["--learn"] if learn else []
        settings = ["--memory", str(memory), "--max-new-tokens", "4", "--repeats", "1"]
        assert main(["chat", base, *settings, *flags]) == 0
        return capsys.readouterr().out

    text = "The lighthouse of Ostrava Bay was built by Irma Quell, a clockmaker from Bellmere."
    out = talk("/status", text, "/status", "/undo", "/undo", f"/learn {text}", "/save", learn=True)
    assert "learning; 0 tokens" in out and f"(learned {len(text)} tokens" in out
    assert "; not saved" in out and "back to: chat" in out
    assert "cannot roll back 1 snapshot" in out
    assert read_memory(memory).counts["documents"] == 1
    out = talk("/freeze", "/freeze", "/clear", "/nonsense", "hello", "/reset", "/quit", "never")
    assert "learning goes on" in out and "learning stopped" in out and "/undo" in out
    assert "not saved" in out and "forgotten" in out
    assert read_memory(memory).counts["documents"] == 1
    long = "a rather long sentence that goes on. " * 6
    assert "beginning is dropped" in talk(long, long)


def test_memory_commands(base: str, book: str, tmp_path: Path, capsys: Any) -> None:
    first, second, out = (tmp_path / f"{n}.nlmem" for n in ("a", "b", "c"))
    learn(base, first, book)
    learn(base, second, book)
    capsys.readouterr()

    def memory(*arguments: Any, status: int = 0) -> str:
        assert main(["memory", *map(str, arguments)]) == status
        captured = capsys.readouterr()
        return captured.out + captured.err

    shown = memory("show", first)
    assert "every 32" in shown and "273 tokens" in shown and "snapshot 1" in shown
    assert "1.0000" in memory("diff", first, second)
    assert "c.nlmem" in memory("merge", first, second, "--out", out, "--weights", "0.5", "0.5")
    assert "exists; --force" in memory("merge", first, second, "--out", out, status=1)
    assert "sound" in memory("verify", first, second, out, "--model", base)
    size = first.stat().st_size
    memory("prune", first, "--momenta", "--snapshots", "1")
    assert first.stat().st_size < size and len(read_memory(first).snapshots) == 1
    memory("prune", second, "--max-size", "40kB", "--out", out)
    assert out.stat().st_size <= 30_000
    assert "0 tokens" in memory("rollback", first)
    compared = memory("diff", first, second)  # nothing is left in the first: no angle to it
    assert "nan" not in compared and " - " in compared
    assert read_memory(first).is_empty
    assert "cannot roll back" in memory("rollback", first, status=1)
    out.write_bytes(b"broken")
    assert "no memory file" in memory("verify", second, out, status=1)
    assert "No such file" in memory("show", tmp_path / "none.nlmem", status=1)


def test_sizes() -> None:
    assert parse_bytes("8MB") == 8_000_000 and parse_bytes(" 1.5 KiB ") == 1536
    assert parse_bytes("17") == 17
    for text in ("", "MB", "-3kB", "3 PB", "1e6"):
        with pytest.raises(ValueError, match="a size is a number"):
            parse_bytes(text)


def test_demo_on_a_tiny_model(base: str, tmp_path: Path, capsys: Any) -> None:
    memory = tmp_path / "demo.nlmem"
    arguments = ["--model", base, "--memory", str(memory), "--passes", "1"]
    assert main(["demo", *arguments]) == 0
    out = capsys.readouterr().out
    assert "bit for bit: True" in " ".join(out.split())
    assert "of 13 after" in out and read_memory(memory).counts["documents"] == 1
    assert main(["demo", "--model", base, "--passes", "0"]) == 1
    assert "--passes must be at least 1" in capsys.readouterr().err
