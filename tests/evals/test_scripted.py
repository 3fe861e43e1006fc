"""Experiments that scripts measure: what is run, what is read, what is said where it cannot be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from nestlearn.evals import registry, scripted
from nestlearn.evals.harness import run as running
from nestlearn.evals.harness.experiment import SCALES, Request
from nestlearn.evals.harness.run import open_results, run
from nestlearn.evals.scripted import Part, Scripted
from tests.evals.toy import here

REPOSITORY = Path(__file__).parents[2]
NAMES = [name for name, place in registry.EXPERIMENTS.items() if "scripted" in place]
ECHO = """
import argparse, json, sys
parser = argparse.ArgumentParser()
parser.add_argument("--out")
parser.add_argument("--threads", type=int)
parser.add_argument("--seeds", type=int, default=2)
parser.add_argument("--only", nargs="*", default=["a", "b"])
parser.add_argument("--fresh", action="store_true")
args = parser.parse_args()
if "bad" in args.only:
    sys.exit(3)
summary = {name: {"score": args.seeds, "fresh": args.fresh} for name in args.only}
json.dump({"rows": [1, 2, 3], "summary": summary, "command": "echo", "commit": "c", "date": "d",
           "hardware": {"gpu": None, "cpu": "x", "cores": args.threads, "torch": "2"}},
          open(args.out, "w"))
"""


class Echo(Scripted):
    """Runs a script that writes down its flags."""

    name = "echo"
    item = "Table 0"
    title = "flags"
    question = "Which flags?"
    script = "echo"
    selector = "--only"
    claim = "The paper: nothing."
    parts = {
        "one": Part("echo_one", {"tiny": ("--seeds", "1")}),
        "two": Part("echo_two", {"small": ()}),
    }
    scales = ("tiny", "small")

    def read(self, record: dict[str, Any]) -> tuple:
        return scripted._summary(record, "name", {"score": "score", "fresh": "fresh"})


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with that script."""
    root = tmp_path / "checkout"
    (root / "benchmarks" / "results").mkdir(parents=True)
    (root / "benchmarks" / "echo.py").write_text(ECHO)
    monkeypatch.setattr(scripted, "ROOT", root)
    monkeypatch.setattr(running, "in_parallel", here)
    monkeypatch.setitem(registry.EXPERIMENTS, "echo", "tests.evals.test_scripted:Echo")
    return root


def test_a_script_is_run_once_with_its_flags(checkout: Path, tmp_path: Path) -> None:
    path = tmp_path / "out" / "tiny" / "echo.json"
    path.parent.mkdir(parents=True)
    results = open_results(Echo(), path, Request(), 1)
    assert run(Echo(), results, Request(), report=lambda line: None) == 0
    assert [r["cell"] for r in results.record["rows"]] == ["one: echo.py --seeds 1"]
    assert results.record["rows"][0]["rows"] == 3
    table = Echo().tables(results)[0]
    assert table.title == "one" and table.rows == (("a", 1, False), ("b", 1, False))
    assert table.note.startswith("The paper: nothing. Measured (this machine) with `echo`")
    assert f"x, {torch.get_num_threads()} cores" in table.note
    assert Echo().due(results, Request()) == {}
    request = Request(systems=("b",), seeds=5, fresh=True)
    assert run(Echo(), results, request, report=lambda line: None) == 0
    assert Echo().tables(results)[0].rows == (("b", 5, True),)
    with pytest.raises(ValueError, match="--tasks: two not among one"):
        Echo().due(results, Request(tasks=("two",)))


def test_a_script_that_fails(checkout: Path, tmp_path: Path) -> None:
    results = open_results(Echo(), tmp_path / "echo.json", Request(), 1)
    assert run(Echo(), results, Request(systems=("bad",)), report=lambda line: None) == 1
    assert "echo.py ended with status 3" in results.record["rows"][0]["error"]
    assert Echo().tables(results) == []


def test_what_is_committed_is_shown_until_something_is_measured(
    checkout: Path, tmp_path: Path
) -> None:
    results = open_results(Echo(), tmp_path / "echo.json", Request(), 1)
    record = {"rows": [], "summary": {"a": {"score": 7}}, "command": "c", "commit": "c",
              "date": "d", "hardware": {"gpu": "G", "cpu": "x", "cores": 2, "torch": "2"},
              }  # fmt: skip
    (checkout / "benchmarks" / "results" / "echo_one.json").write_text(json.dumps(record))
    (checkout / "benchmarks" / "results" / "echo_one.png").write_bytes(b"picture")
    table = Echo().tables(results)[0]
    assert table.title == "one, committed result" and table.rows == (("a", 7, None),)
    assert "Measured (benchmarks/results)" in table.note and table.note.endswith("G; PyTorch 2.")
    assert Echo().plot(results, tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes() == b"picture"
    run(Echo(), results, Request(), report=lambda line: None)
    assert Echo().tables(results)[0].title == "one"
    assert not Echo().plot(results, tmp_path / "q.png") or (tmp_path / "q.png").exists()


def test_outside_a_checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(scripted, "ROOT", tmp_path)
    made = registry.experiment("fig4")
    with pytest.raises(ValueError, match="benchmarks/optimizers_toy.py.*checkout"):
        made.due(open_results(made, tmp_path / "r.json", Request(), 1), Request())


@pytest.mark.parametrize("name", NAMES)
def test_real_scripts_know_the_flags_they_get(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for scale in SCALES:
        cls = type(registry.experiment(name))
        if scale not in cls.scales:
            continue
        made = registry.experiment(name, scale)
        request = Request(seeds=1 if made.has_seeds else None,
                          systems=() if made.selector else None)  # fmt: skip
        cells = made.due(open_results(made, tmp_path / f"{scale}.json", request, 1), request)
        assert cells
        source = (REPOSITORY / "benchmarks" / f"{made.script}.py").read_text()
        shared = {"--out", "--threads", "--fresh", *(["--model"] if made.needs_model else [])}
        for cell in cells.values():
            for flag in {f for f in cell["flags"] if f.startswith("--")} - shared:
                assert f'"{flag}"' in source, flag


@pytest.mark.parametrize("name", NAMES)
def test_committed_results_are_read(name: str, tmp_path: Path) -> None:
    made = registry.experiment(name)
    results = open_results(made, tmp_path / "r.json", Request(), 1)
    tables = made.tables(results)
    assert tables, "no result is committed"
    for table in tables:
        assert table.rows and all(len(row) == len(table.columns) for row in table.rows)
        numbers = [v for row in table.rows for v in row[1:] if isinstance(v, int | float)]
        assert len(numbers) >= len(table.rows)


def test_a_choice_that_a_script_does_not_have(tmp_path: Path) -> None:
    made = registry.experiment("fig4")
    results = open_results(made, tmp_path / "r.json", Request(), 1)
    with pytest.raises(ValueError, match="--systems: fig4 has no systems"):
        made.due(results, Request(systems=("a",)))
    with pytest.raises(ValueError, match="--seeds: fig4 has no seeds"):
        made.due(results, Request(seeds=2))
