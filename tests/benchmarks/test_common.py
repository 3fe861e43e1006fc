"""The benchmarks' result files: continued per cell, written atomically, honest about hardware."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def _on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(sys, "argv", ["benchmarks/example.py", "--quick"])


def test_a_run_that_was_cut_off_continues(tmp_path: Path) -> None:
    from common import Results

    path = tmp_path / "r.json"
    first = Results(path, "How fast?", {"T": 8}, seeds=(0, 1))
    first.add("a", {"seconds": 1.0})
    first.add("broken", {"error": "ValueError: no"})
    second = Results(path, "How fast?", {"T": 8}, seeds=(0, 1))
    assert second.done("a")
    assert not second.done("b")
    assert not second.done("broken")  # tried again
    second.add("b", {"seconds": 2.0})
    second.add("a", {"seconds": 3.0})
    record = json.loads(path.read_text())
    assert [(r["cell"], r.get("seconds")) for r in record["rows"]] == [
        ("broken", None),
        ("b", 2.0),
        ("a", 3.0),
    ]
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]  # no temporary file is left


def test_other_settings_are_not_mixed(tmp_path: Path) -> None:
    from common import Results

    path = tmp_path / "r.json"
    Results(path, "q", {"T": 8}).add("a", {})
    with pytest.raises(ValueError, match="T: 8 there, 16 now.*--fresh"):
        Results(path, "q", {"T": 16})
    assert not Results(path, "q", {"T": 16}, fresh=True).done("a")
    path.write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        Results(path, "q", {"T": 8})


def test_the_record_is_complete_and_plain_json(tmp_path: Path) -> None:
    from common import ROOT, Results

    path = tmp_path / "r.json"
    results = Results(path, "q", {"file": ROOT / "src"}, seeds=(3,), threads=2)
    results.add("a", {"loss": math.nan, "worst": math.inf, "by": {1: (2.0,)}})
    results.add("b", {"error": f"ImportError: no x in {ROOT}/src/y.py"})
    results.summarise({"ok": True})
    record = json.loads(path.read_text(), parse_constant=lambda c: pytest.fail(f"{c} in JSON"))
    hardware = record["hardware"]
    assert hardware["torch"] == torch.__version__
    assert hardware["threads"] == 2
    assert hardware["cores"] >= 1
    assert hardware["cpu"]
    assert {"question", "command", "commit", "date", "seeds", "settings"} <= set(record)
    assert record["command"].startswith("python ")
    assert str(ROOT) not in path.read_text()  # no machine path
    row = record["rows"][0]
    assert (row["loss"], row["worst"], row["by"]) == ("nan", "inf", {"1": [2.0]})


def test_state_bytes_counts_views_by_what_they_keep_alive() -> None:
    from common import state_bytes

    whole = torch.zeros(100)
    assert state_bytes({"a": whole[:10], "b": (whole[10:20], None)}) == (80, 400)


def test_verdict() -> None:
    from common import verdict

    assert verdict(0.5, 0.4) == "PASS"
    assert verdict(0.3, 0.4) == "short (0.75 of target)"
    assert verdict(2.0, 1.0, at_most=True) == "short (0.50 of target)"
    assert verdict(None, 1.0) == "not measured"


def test_workers_answer_and_survive_errors(tmp_path: Path) -> None:
    from serve import Worker

    script = tmp_path / "w.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r})\n"
        "from serve import Trial, serve\n"
        "def fine(n): print('noise'); return Trial(lambda: 0.0, n, 1)\n"
        "def bad(): raise ValueError('no such thing')\n"
        "serve({'fine': fine, 'bad': bad})\n"
    )
    worker = Worker(sys.executable, script, threads=1)
    answer = worker.ask(op="prepare", cell="c", builder="bad", options={})
    assert answer == {"error": "ValueError: no such thing"}
    assert worker.ask(op="prepare", cell="c", builder="fine", options={"n": 5})["tokens"] == 5
    assert len(worker.ask(op="time", cell="c", seconds=0.0, steps=3)["times"]) == 3
    worker.close()


def test_spikes_are_counted_after_the_warm_up() -> None:
    pytest.importorskip("nestlearn")
    from stability import spikes

    norms = [50.0] * 100 + [1.0] * 200 + [11.0] + [1.0] * 20
    found = spikes(norms)
    assert found["spikes_over_10x_median"] == 1
    assert found["spikes_over_10x_median_in_first_steps"] == 100
    assert found["not_finite"] == 0
    assert spikes([*norms, math.nan])["not_finite"] == 1
