"""Experiments: rounds of cells, failures, going on, reports; systems trained and chosen."""

from __future__ import annotations

import html.parser
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from nestlearn.evals import registry
from nestlearn.evals.harness import run as running
from nestlearn.evals.harness.experiment import Request, beside
from nestlearn.evals.harness.parallel import in_parallel
from nestlearn.evals.harness.report import as_html, as_markdown, write_report
from nestlearn.evals.harness.results import Results, read
from nestlearn.evals.harness.run import open_results, run
from nestlearn.evals.harness.systems import SYSTEMS, Size, build
from nestlearn.evals.harness.task import IGNORE, Batch, score
from tests.evals.toy import Copy, Copying, Squares, Taught, here


@pytest.fixture(autouse=True)
def _toys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "in_parallel", here)
    monkeypatch.setattr(
        registry,
        "EXPERIMENTS",
        {name: f"tests.evals.toy:{name.capitalize()}" for name in ("squares", "taught", "copying")},
    )
    for toy in (Squares, Taught):
        monkeypatch.setattr(toy, "measured", [])
        monkeypatch.setattr(toy, "broken", set())
    monkeypatch.setattr(Taught, "models", [])


def measured(toy: Any, path: Path, request: Request | None = None, **more: Any) -> tuple:
    """(results, how many failed, lines of the log)."""
    request, lines = request or Request(), []
    results = open_results(toy, path, request, 1, **more)
    failed = run(toy, results, request, report=lines.append)
    return results, failed, lines


# -- experiment, run ------------------------------------------------------------------------------


def test_rounds_follow_each_other_and_nothing_is_measured_twice(tmp_path: Path) -> None:
    path = tmp_path / "squares.json"
    results, failed, _ = measured(Squares(), path, Request(tasks=("1", "2")))
    assert failed == 0 and results.get("sum")["value"] == 5
    assert Squares.measured == ["1", "2", "None"]
    results, _, lines = measured(Squares(), path, Request(tasks=("1", "2")))
    assert Squares.measured == ["1", "2", "None"] and lines == []
    record = json.loads(path.read_text())
    assert record["settings"] == {"experiment": "squares", "scale": "tiny", "numbers": 3}
    assert all(row["seconds"] >= 0 and row["date"] for row in record["rows"])


def test_a_failed_cell_is_kept_said_and_tried_again(tmp_path: Path) -> None:
    path = tmp_path / "squares.json"
    Squares.broken = {2}
    results, failed, lines = measured(Squares(), path)
    assert failed == 1 and results.get("sum") is None
    assert results.get("square 2")["error"] == "ArithmeticError: 2 is broken"
    assert any("2 is broken" in line for line in lines)
    assert not results.done("square 2") and results.done("square 3")
    Squares.broken = set()
    results, failed, lines = measured(Squares(), path)
    assert "tried again" in lines[0] and failed == 0
    assert results.get("sum")["value"] == 14
    assert Squares.measured.count("2") == 2 and Squares.measured.count("3") == 1


def test_fresh_drops_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "squares.json"
    measured(Squares(), path)
    measured(Squares(), path, fresh=True)
    assert Squares.measured.count("1") == 2


def test_results_of_another_scale_are_not_continued(tmp_path: Path) -> None:
    path = tmp_path / "squares.json"
    measured(Squares("small"), path)
    with pytest.raises(ValueError, match="other settings .*scale.*--fresh"):
        open_results(Squares(), path, Request(), 1)


def test_unknown_scales_and_names() -> None:
    with pytest.raises(ValueError, match="squares has no scale 'paper'; choose one of tiny, small"):
        Squares("paper")
    with pytest.raises(ValueError, match="did you mean 'squares'"):
        registry.experiment("square")
    with pytest.raises(ValueError, match="choose one of squares, taught, copying"):
        registry.experiment("zzz")
    with pytest.raises(ValueError, match="--tasks: 9 not among 1, 2"):
        Request(tasks=("9",)).pick("tasks", ("1", "2"))
    assert Request().pick("systems", ("a",)) == ("a",)


def test_a_model_reaches_the_cells_and_its_place_stays_out_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "taught.json"
    toy = Taught()
    with pytest.raises(ValueError, match="needs a pre-trained model.*--model"):
        run(toy, open_results(toy, path, Request(), 1), Request())
    request = Request(model="/some/where/small", tasks=("1", "2"))
    Taught.broken = {1}
    results, failed, _ = measured(toy, path, request)
    assert set(Taught.models) == {"/some/where/small"} and failed == 1
    assert results.record["settings"]["model"] == "small"
    assert "/some/where" not in path.read_text().replace(results.record["command"], "")
    with pytest.raises(ValueError, match="model: 'small' there, 'large' now"):
        open_results(toy, path, Request(model="large"), 1)
    # To read the file no model has to be named.
    assert open_results(toy, path, Request(), 1).get("square 2")["value"] == 4


def test_cells_in_processes_of_their_own() -> None:
    """The real thing: values come back, and an error is a row."""
    found: dict[str, Any] = {}
    in_parallel(math.sqrt, {"good": (6.25,), "bad": (-1.0,)}, 1, found.__setitem__)
    assert found["good"] == 2.5 and found["bad"]["error"].startswith("ValueError")


# -- reports --------------------------------------------------------------------------------------


class Page(html.parser.HTMLParser):
    """Cells, and tags there are."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.tags: set[str] = set()
        self._within = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)
        self._within = tag in ("td", "th")
        if self._within:
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        self._within = self._within and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self._within:
            self.cells[-1] += data


def test_reports_say_the_same_and_escape_what_is_in_them(tmp_path: Path) -> None:
    results, _, _ = measured(Squares(), tmp_path / "squares.json", Request(tasks=("2",)))
    written = write_report(Squares(), results)
    assert [p.name for p in written] == ["squares.png", "squares.md", "squares.html"]
    page = Page(written[2].read_text())
    cells = ["cell | name", "value", "<b>", "square 2", "4", "a|b <i>", "sum", "4", "a|b <i>"]
    assert page.cells == cells
    assert not page.tags & {"b", "i", "of"} - {"b"}  # "b" is the report's own
    assert "squares &lt;of&gt; numbers" in written[2].read_text()
    lines = written[1].read_text().splitlines()
    assert lines[0] == "# Table | 0: squares <of> numbers"
    rows = [line for line in lines if line.startswith("|")]
    assert rows[0] == r"| cell \| name | value | <b> |" and rows[1] == "|---|---|---|"
    assert rows[2] == r"| square 2 | 4 | a\|b <i> |"
    assert "a note & more" in lines and lines[-1] == "![squares <of> numbers](squares.png)"
    for fact in ("question", "seeds", "command", "machine", "commit"):
        assert any(line.startswith(f"- {fact}") for line in lines)


def test_every_cell_keeps_what_it_was_measured_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "squares.json"

    def report(command: str, machine: str, *tasks: str) -> str:
        monkeypatch.setattr("sys.argv", command.split())
        monkeypatch.setattr("nestlearn.evals.harness.results._cpu_model", lambda: machine)
        if tasks:
            return as_markdown(Squares(), measured(Squares(), path, Request(tasks=tasks))[0], None)
        return as_markdown(Squares(), open_results(Squares(), path, Request(), 1), None)

    assert "- command: first run\n- machine: Old" in report("first run", "Old", "1")
    second = report("second run", "New", "2")
    assert "- command: first run\n- command: second run\n- machine: Old" in second
    assert " / New, " in second
    assert report("only look", "Third") == second
    record = json.loads(path.read_text())
    assert record["command"] == "second run" and record["hardware"]["cpu"] == "New"
    assert [(r["cell"], r["command"]) for r in record["rows"]] == [
        ("square 1", "first run"), ("sum", "first run"), ("square 2", "second run"),
    ]  # fmt: skip
    for row in record["rows"][:2]:  # as files once were
        del row["command"], row["machine"]
    path.write_text(json.dumps(record))
    old = report("only look", "Third")
    assert "first run" not in old and "Old" not in old and "not recorded for 2 cells" in old


def test_reports_name_the_cells_that_failed(tmp_path: Path) -> None:
    Squares.broken = {3}
    results, _, _ = measured(Squares(), tmp_path / "squares.json")
    text = as_markdown(Squares(), results, None)
    assert "3 measured, 1 failed" in text and "- failed: square 3" in text
    assert "![" not in text and "<img" not in as_html(Squares(), results, None)


def test_ours_beside_the_papers() -> None:
    assert beside(99.31, 100.0) == "99.3 (100.0)"
    assert beside(1.234, "~0", digits=2) == "1.23 (~0)"
    assert beside(None, None) is None
    assert beside(5.0, None) == "5.0"


# -- tasks and systems ----------------------------------------------------------------------------


class Says(torch.nn.Module):
    """Logits given beforehand, row by row."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits, self.asked = logits, 0

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        rows = self.logits[self.asked : self.asked + len(input_ids)]
        self.asked += len(input_ids)
        return type("Out", (), {"logits": rows})


def test_scores_by_hand() -> None:
    # Two strings of three tokens: the second position of the first is wrong, one is not asked.
    targets = torch.tensor([[0, 1, IGNORE], [1, 1, 0]])
    given = torch.tensor([[0, 0, 1], [1, 1, 0]])
    logits = torch.nn.functional.one_hot(given, 2).float() * 4
    model = Says(logits).train()
    found = score(model, Batch.of(torch.zeros(2, 3, dtype=torch.long), targets), rows=1)
    assert (found.tokens, found.strings) == (4 / 5, 1 / 2)
    right, wrong = math.log(1 + math.exp(-4)), math.log(1 + math.exp(4))
    assert found.loss == pytest.approx((4 * right + wrong) / 5)
    assert model.training


def test_sets_must_be_right_as_a_whole() -> None:
    targets = torch.tensor([[[1.0, 0, 1], [0, 1, 1]]])
    asked = torch.ones(1, 2, dtype=torch.bool)
    batch = Batch(torch.zeros(1, 2, dtype=torch.long), targets, asked)
    logits = torch.tensor([[[2.0, -1, 3], [-1, 2, -0.5]]])
    assert batch.correct(logits).tolist() == [[True, False]]
    terms = [math.log1p(math.exp(-x)) for x in (2, 1, 3, 1, 2, -0.5)]
    assert batch.loss(logits).item() == pytest.approx(sum(terms) / 6)


@pytest.mark.parametrize("name", ["transformer", "gated_deltanet", "hope"])
def test_systems_of_one_size_have_equally_many_parameters(name: str) -> None:
    sizes = [
        sum(p.numel() for p in build(n, Size(32, 1, 2), 16, 32).parameters())
        for n in ("transformer", name)
    ]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.02)
    assert name in SYSTEMS


# -- trained --------------------------------------------------------------------------------------


def test_systems_are_tuned_then_run_and_the_one_that_can_be_learned_is(tmp_path: Path) -> None:
    toy, path = Copying(), tmp_path / "copying.json"
    due = toy.due(open_results(toy, path, Request(), 1), Request())
    assert sorted(due) == [
        f"tune/{task}/transformer/lr={lr} weight_decay=0"
        for task in ("easy", "hard") for lr in ("0.0001", "0.03")
    ]  # fmt: skip
    results, failed, _ = measured(toy, path)
    assert failed == 0
    assert toy.chosen(results, "easy", "transformer")["lr"] == 3e-2
    finals = toy.finals(results, "easy", "transformer")
    assert sorted(r["seed"] for r in finals) == [0, 1]
    assert toy.mean(results, "easy", "transformer", "test") == 100.0
    assert toy.mean(results, "hard", "transformer", "test") < 50
    losses = finals[0]["loss"]
    assert losses[-1] < 0.1 * losses[0]
    assert toy.systems(results) == ["transformer"]
    # A third seed is all that is due when one more is asked for.
    more = toy.due(results, Request(seeds=3))
    assert len(more) == 2 and all(name.endswith("/seed2") for name in more)
    one = toy.due(results, Request(seeds=3, tasks=("easy",)))
    assert [cell["task"] for cell in one.values()] == ["easy"]
    with pytest.raises(ValueError, match="--systems: nothing"):
        toy.due(results, Request(systems=("nothing",)))


def test_cells_of_a_system_that_has_changed_are_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    toy, path = Copying(), tmp_path / "copying.json"
    both = Request(systems=("transformer", "deltanet"), tasks=("easy",), seeds=1)
    measured(toy, path, both)
    known = {name: SYSTEMS[name] for name in both.systems or ()}
    wider = known["deltanet"].but(conv_size=2)
    monkeypatch.setattr(Copying, "compared", {**known, "deltanet": wider})
    capsys.readouterr()
    results = open_results(toy, path, both, 1)
    assert "3 cells are of systems that have changed since" in capsys.readouterr().err
    assert toy.systems(results) == ["transformer"]  # the tables show no old row
    assert sorted(toy.due(results, both)) == [
        f"tune/easy/deltanet/lr={lr} weight_decay=0" for lr in ("0.0001", "0.03")
    ]
    results, failed, _ = measured(toy, path, both)
    assert failed == 0
    rows = results.rows(system="deltanet")
    assert len(rows) == 3 and all(r["fields"] == wider.fields for r in rows)
    assert len(read(path)["rows"]) == 6  # the old ones have left the file
    # A system that is no longer compared goes, too.
    monkeypatch.setattr(Copying, "compared", {"transformer": known["transformer"]})
    assert toy.systems(open_results(toy, path, both, 1)) == ["transformer"]


def test_a_seed_repeats_itself() -> None:
    cell = {"task": "easy", "system": "transformer", "lr": 1e-2, "weight_decay": 0.0,
            "seed": 3, "tuning": False, "device": "cpu"}  # fmt: skip
    rows = [Copying().measure(dict(cell)) for _ in range(2)]
    assert rows[0]["loss"] == rows[1]["loss"] and rows[0]["test"] == rows[1]["test"]


def test_rows_that_failed_or_are_of_dropped_rates_choose_nothing(tmp_path: Path) -> None:
    toy = Copying()
    results = Results(tmp_path / "r.json", "?", {})
    own = {"task": "easy", "system": "transformer", "weight_decay": 0.0, "tuning": True}
    assert toy.chosen(results, "easy", "transformer") is None
    results.add("a", {**own, "lr": 1e-4, "error": "NaN"})
    results.add("b", {**own, "lr": 0.5, "validation": {"tokens": 1.0, "loss": 0.0}})
    assert toy.chosen(results, "easy", "transformer") is None
    results.add("c", {**own, "lr": 1e-4, "validation": {"tokens": 0.5, "loss": 2.0}})
    results.add("d", {**own, "lr": 3e-2, "validation": {"tokens": 0.5, "loss": 1.0}})
    assert toy.chosen(results, "easy", "transformer")["lr"] == 3e-2  # the loss decides
    assert toy.mean(results, "easy", "transformer", "test") is None


def test_copy_draws_its_own_tasks() -> None:
    batch = Copy("easy").draw("train", 3, torch.Generator().manual_seed(0))
    assert torch.equal(batch.inputs, batch.targets) and len(batch) == 3


def test_processes_end_with_a_parent_that_is_killed(tmp_path):
    """A worker that would write a file after some seconds is gone by then."""
    file = tmp_path / "written"
    begun = tmp_path / "begun"
    script = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
from slow import slow
from nestlearn.evals.harness.parallel import in_parallel
if __name__ == "__main__":
    in_parallel(slow, {{"one": ({str(begun)!r}, {str(file)!r})}}, 1, print)
"""
    (tmp_path / "slow.py").write_text(
        "import pathlib, time\n"
        "def slow(begun, file):\n"
        "    pathlib.Path(begun).touch()\n"
        "    time.sleep(8)\n"
        "    pathlib.Path(file).touch()\n"
        "    return {}\n"
    )
    (tmp_path / "main.py").write_text(script)
    parent = subprocess.Popen([sys.executable, str(tmp_path / "main.py")])
    for _ in range(600):
        if begun.exists():
            break
        time.sleep(0.1)
    assert begun.exists()
    parent.kill()
    parent.wait()
    time.sleep(10)
    assert not file.exists()
