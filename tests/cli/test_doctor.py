"""The doctor tells what is there, for every mixer, in words and as JSON."""

from __future__ import annotations

import json
import mmap

import pytest
import torch

from nestlearn.cli import doctor, machine
from nestlearn.cli.main import main
from nestlearn.nn.mixers import MIXERS


def test_json_is_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json", "--quick"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["libraries"]["torch"] == torch.__version__
    assert set(found["mixers"]) == set(MIXERS)
    assert found["processor"]["cores"] >= 1
    for choice in found["mixers"].values():
        assert choice["path"] and choice["why"]


def test_tables_name_machine_paths_and_mixers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--quick"]) == 0
    text = capsys.readouterr().out
    for word in (
        "Python",
        "torch",
        "processor",
        "memory",
        "GPU",
        "reference",
        "chunked",
        "not tried",
    ):
        assert word in text
    for mixer in MIXERS:
        assert mixer in text


def test_compile_is_really_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def compiler(function, **options):
        calls.append(options)
        return function

    monkeypatch.setattr(torch, "compile", compiler)
    assert machine.try_compile()["usable"]
    assert calls


def test_a_broken_compiler_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def compiler(function, **options):
        raise RuntimeError("no C++ compiler\nlong story")

    monkeypatch.setattr(torch, "compile", compiler)
    found = doctor.examine()
    assert found["compile"]["reason"] == "no C++ compiler"
    [path] = [path for path in found["paths"] if path["name"] == "compiled"]
    assert not path["available"]
    assert "no C++ compiler" in path["reason"]


def test_resident_bytes_grows_with_memory_in_use() -> None:
    # Pages of its own: an allocator may hand out memory that earlier tests have touched.
    with mmap.mmap(-1, 32 * 2**20) as block:
        before = machine.resident_bytes()
        block.write(b"1" * len(block))
        assert machine.resident_bytes() - before > 16 * 2**20
