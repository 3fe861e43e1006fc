"""Variants of a table's systems: what is set is trained, and only what is asked for is scored."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
FLAGS = ["table5", "hope_counters", "--plan", "steps=2", "--seed", "11"]


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run the script with some flags; the rows of its result file."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def measure(*flags: str) -> list[dict[str, Any]]:
        import variant

        out = tmp_path / "variants.json"
        monkeypatch.setattr(sys, "argv", ["benchmarks/variant.py", *flags, "--out", str(out)])
        variant.main()
        return list(json.loads(out.read_text())["rows"])

    return measure


def test_values_are_python_literals_or_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from variant import assignment

    assert assignment("memory_half_lives=10,1e25") == ("memory_half_lives", (10, 1e25))
    assert assignment("memory_rule=gd") == ("memory_rule", "gd")
    assert assignment("memory_momentum=True") == ("memory_momentum", True)
    for wrong in ("counters", "=3", "counters=", "a-b=3"):
        with pytest.raises(argparse.ArgumentTypeError, match="FIELD=VALUE"):
            assignment(wrong)


def test_a_variant_differs_in_what_is_set_alone(measured: Any) -> None:
    measured(*FLAGS)
    measured(*FLAGS, "--set", "memory_half_lives=10,10")  # what the table has anyway
    changed = measured(*FLAGS, "--set", "memory_half_lives=10,1e25", "counters=4")
    plain, same, other = changed
    assert plain["fields"] == {} and other["fields"]["memory_half_lives"] == [10, 1e25]
    assert plain["loss"] == same["loss"] != other["loss"]
    assert plain["validation"] == same["validation"]
    assert (plain["seed"], plain["steps"]) == (11, 2) and "bin1" not in plain


def test_only_the_named_splits_are_scored(measured: Any) -> None:
    (row,) = measured(*FLAGS, "--task", "(aa)*", "--splits", "bin1")
    assert row["task"] == "(aa)*" and row["bin1"]["tokens"] > 0 and "bin0" not in row
    assert "folder" not in row


def test_a_plan_changes_what_tasks_are_made_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from variant import planned

    from nestlearn.evals.registry import experiment

    table: Any = experiment("fig9", "tiny")
    made = planned(table, "tiny", {"tested": (10_485_760,), "distractors": 0.0, "steps": 7})
    (task,) = made.tasks().values()
    assert isinstance(made, type(table)) and made.plan.steps == 7
    assert task.splits == ("10485760",) and task.distractors == 0.0  # type: ignore[attr-defined]
    assert table.plan.steps != 7 and next(iter(table.tasks().values())).splits != task.splits


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["table5", "hopes"], "no system 'hopes': transformer"),
        (["table5", "hope", "--task", "parities"], "no task 'parities': parity"),
        (["table5", "hope", "--splits", "bin7"], "no split bin7: bin0, bin1"),
        (["fig11", "hope"], "does not train systems"),
        (["table5", "hope", "--set", "counters=-1"], "counters"),
        (["table55", "hope"], "did you mean 'table5'"),
        (["table5", "hope", "--plan", "step=1"], "the plan has no step: size, steps"),
    ],
)
def test_what_does_not_exist_is_named(
    flags: list[str], message: str, measured: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        measured(*flags, *([] if "--plan" in flags else ["--plan", "steps=1"]))
    assert message in capsys.readouterr().err
