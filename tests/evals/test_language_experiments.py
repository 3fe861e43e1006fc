"""Tables 2, 3, 6 and Figure 10 end to end with toy plans."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from nestlearn import HopeConfig, HopeForCausalLM
from nestlearn.evals.ablation import PAPER, VARIANTS, Ablation
from nestlearn.evals.context_use import ContextUse, edges, losses_by_position
from nestlearn.evals.harness.report import write_report
from nestlearn.evals.harness.systems import SYSTEMS, Size, build
from nestlearn.evals.harness.task import TRAIN
from nestlearn.evals.language_models import PLANS, CorpusWindows, TextPlan
from nestlearn.evals.text import Windows, text
from tests.evals.conftest import measured

TOY = TextPlan(
    Size(32, 1, 4), steps=2, batch=2, lrs=(3e-3,), seeds=1, examples=8, length=32, limit=2,
    systems=("transformer", "hope"),
)  # fmt: skip


@pytest.fixture(autouse=True)
def _toy(monkeypatch: pytest.MonkeyPatch) -> None:
    from nestlearn.evals.language_models import LanguageModels

    for cls in (LanguageModels, Ablation):
        monkeypatch.setattr(cls, "plans", {"tiny": TOY, "small": TOY, "paper": TOY})


def test_windows_are_the_documents_bytes(data_folder: Path) -> None:
    task = Windows("novels", 20)
    batch = task.draw("test", 5, torch.Generator())
    (book,) = text("novels")["test"]
    whole = [*book.tolist(), 257]
    starts = torch.linspace(0, len(whole) - 21, 5).long().tolist()
    for row, start in enumerate(starts):
        assert batch.inputs[row].tolist() == whole[start : start + 20]
        assert batch.targets[row].tolist() == whole[start + 1 : start + 21]
    one, two = (task.draw(TRAIN, 3, torch.Generator().manual_seed(s)) for s in (0, 1))
    assert not torch.equal(one.inputs, two.inputs)
    again = task.draw(TRAIN, 3, torch.Generator().manual_seed(0))
    assert torch.equal(one.inputs, again.inputs)


def test_context_use(data_folder: Path, tmp_path: Path) -> None:
    experiment = ContextUse()
    results = measured(experiment, tmp_path / "fig10.json")
    (row,) = results.rows(system="hope")
    assert row["edges"] == [0, 64, 128, 256, 511]
    assert len(row["losses"]) == 4
    (table,) = experiment.tables(results)
    assert [r[0] for r in table.rows] == ["Transformer", "Hope"]
    assert table.rows[1][1] == pytest.approx(math.exp(row["losses"][0]))
    assert (tmp_path / "fig10.png") in write_report(experiment, results)


@pytest.mark.parametrize("mixer", ["self_modifying", "attention"])
def test_losses_by_position_are_those_of_one_pass(mixer: str) -> None:
    model = HopeForCausalLM(HopeConfig.preset("tiny", mixer=mixer)).eval()
    rows = torch.randint(256, (2, 70))
    with torch.no_grad():
        logits = model(input_ids=rows, use_cache=False).logits[:, :-1].double()
    right = F.cross_entropy(logits.transpose(1, 2), rows[:, 1:], reduction="none")
    assert torch.allclose(losses_by_position(model, rows, segment=23), right, atol=1e-4)


def test_edges_cover_every_position() -> None:
    for longest in (1, 63, 64, 65, 4095):
        found = edges(longest)
        assert found[0] == 0
        assert found[-1] == longest
        assert found == sorted(set(found))


def test_trained_models_are_shared(
    data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = measured(ContextUse(), tmp_path / "fig10.json", systems=("hope",))
    monkeypatch.setattr("nestlearn.evals.harness.trained.fit", None)  # no training from here on
    (tmp_path / "fig10.json").unlink()
    again = measured(ContextUse(), tmp_path / "fig10.json", systems=("hope",))
    (one,), (two,) = first.rows(system="hope"), again.rows(system="hope")
    assert one["test"] == two["test"]
    assert one["losses"] == two["losses"]

    class Elsewhere(ContextUse):
        """Another experiment, with settings of its own, on the same models."""

        def settings(self) -> dict[str, Any]:
            return {**super().settings(), "more": 1}

    (three,) = measured(Elsewhere(), tmp_path / "more.json", systems=("hope",)).rows(system="hope")
    assert three["test"] == one["test"]
    other = dataclasses.replace(TOY, steps=3)
    monkeypatch.setattr(ContextUse, "plans", {"tiny": other})
    with pytest.raises(TypeError):  # of another plan: trained anew
        measured(ContextUse(), tmp_path / "other.json", systems=("hope",))


def test_ablation_leaves_out_one_part_each() -> None:
    full = dict(VARIANTS["full"].fields)
    for name in PAPER:
        changed = [k for k, v in VARIANTS[name].fields.items() if v != full[k]]
        assert len(changed) == (0 if name == "full" else 1), name
        model = build(VARIANTS[name], Size(32, 1, 2), 32, 16)
        ids = torch.randint(32, (2, 16))
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        assert torch.isfinite(loss)
    assert VARIANTS["hope"].fields == SYSTEMS["hope"].fields


def test_ablation_signs(data_folder: Path, tmp_path: Path) -> None:
    experiment = Ablation()
    results = measured(experiment, tmp_path / "t.json", systems=("full", "no_cms"), seeds=2)
    for row in results.record["rows"]:  # as in the paper, where leaving CMS out costs 0.8
        better = row["system"] == "full"
        row["test"] = {"loss": 1.0 if better else 1.1, "tokens": 0.5 if better else 0.6,
                       "strings": 0.0}  # fmt: skip
    (table,) = experiment.tables(results)
    full, without = table.rows
    assert full[3:7] == (None, None, None, None)
    assert without[4] is True
    assert without[6] is False
    assert without[3] == f"{math.exp(1.1) - math.exp(1):+.3f} (+0.80)"
    assert experiment.plot(results, tmp_path / "t.png")


@pytest.mark.parametrize("name", ["table2", "table3"])
def test_tables_of_standard_tasks(
    name: str, data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval", reason="pip install 'nestlearn[eval]'")
    from nestlearn.evals.language import OnStandardTasks

    # Table 3 has 48 tokens generated, for which attention needs room.
    plan = dataclasses.replace(TOY, length=64) if name == "table3" else TOY
    monkeypatch.setattr(OnStandardTasks, "plans", {"tiny": plan})
    from nestlearn.evals.registry import experiment as registered

    experiment: Any = registered(name)
    results = measured(experiment, tmp_path / f"{name}.json")
    (table,) = experiment.tables(results)
    assert [row[0] for row in table.rows] == ["Transformer", "Hope"]
    assert all(len(row) == len(table.columns) for row in table.rows)
    (row,) = results.rows(system="hope")
    if name == "table2":
        assert "(52.28)" in table.rows[1][-1]
        assert row["tasks"]["piqa"]["examples"] == 2
        assert row["cut"] == []  # no attention: nothing need be cut
        (cut,) = (r["cut"] for r in results.rows(system="transformer"))
        assert any("cut from the left" in line for line in cut)
    else:
        assert isinstance(row["second_reading"], float)
        assert 0 <= row["tasks"]["squad"]["metrics"]["contains"] <= 1
    write_report(experiment, results)


def test_training_on_a_corpus(
    data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NESTLEARN_CACHE", str(tmp_path / "cache"))
    books = str(data_folder / "english_novels" / "Train_Book_1800.txt.gz")
    plan = dataclasses.replace(
        TOY, corpus=_unpacked(books, tmp_path), tokenizer="bpe:280", systems=("hope",)
    )
    monkeypatch.setattr(ContextUse, "plans", {"small": plan})
    experiment = ContextUse("small")
    results = measured(experiment, tmp_path / "fig10.json")
    (row,) = results.rows(system="hope")
    assert row["test"]["loss"] > 0
    task = experiment.tasks()["text"]
    assert isinstance(task, CorpusWindows)
    validation, test = (task.draw(s, 2, torch.Generator()) for s in ("validation", "test"))
    assert validation.inputs.shape[1] == TOY.length - 1
    assert not torch.equal(validation.inputs[0], test.inputs[0])


def _unpacked(path: str, folder: Path) -> str:
    import gzip

    out = folder / "corpus.txt"
    out.write_bytes(gzip.decompress(Path(path).read_bytes()) * 4)
    return str(out)


def test_plans_are_of_equal_data_for_all_systems() -> None:
    for plan in PLANS.values():
        assert "hope" in plan.systems
        assert set(plan.systems) <= set(SYSTEMS)
