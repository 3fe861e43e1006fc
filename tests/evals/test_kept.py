"""Cells that were cut off go on where they had come to, and give what they would have given."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nestlearn.evals.harness import kept as kept_module
from nestlearn.evals.harness import run as run_module
from nestlearn.evals.harness.experiment import Request
from nestlearn.evals.harness.fitting import fit
from nestlearn.evals.harness.kept import Kept, kept_file
from nestlearn.evals.harness.run import open_results, run
from nestlearn.models.hope import HopeConfig, HopeForCausalLM
from tests.evals.toy import Copying, here


@pytest.fixture(autouse=True)
def at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_module, "EVERY", 0.0)
    monkeypatch.setattr(kept_module, "monotonic", lambda: 0.0)


def hope() -> nn.Module:
    torch.manual_seed(0)
    return HopeForCausalLM(
        HopeConfig(vocab_size=9, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                   intermediate_size=24, cms_periods=[1, 4], memory_chunk=4, projection_chunk=4)
    )  # fmt: skip


class Dropped(nn.Module):
    """Draws from the global generator in training."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Embedding(9, 8), nn.Dropout(0.5), nn.Linear(8, 9))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.layers(tokens)


def losses(steps: int) -> Iterator[Callable[[Any], Tensor]]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        tokens = torch.randint(9, (2, 12), generator=generator)

        def compute(model: Any, tokens: Tensor = tokens) -> Tensor:
            out = model(tokens)
            logits = out if isinstance(out, Tensor) else out.logits
            return nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())

        yield compute


def stop_at(last: int) -> Callable[[int, float, float], None]:
    def report(step: int, loss: float, norm: float) -> None:
        if step == last:
            raise KeyboardInterrupt

    return report


@pytest.mark.parametrize("make", [hope, Dropped])
@pytest.mark.parametrize("cuts", [(0,), (6,), (2, 3, 9), (11,)])
def test_training_goes_on_bit_for_bit(
    make: Callable[[], nn.Module], cuts: tuple[int, ...], tmp_path: Path
) -> None:
    whole = make()
    wanted = fit(whole, losses(12), 1e-2, 12)
    for cut in cuts:
        with pytest.raises(KeyboardInterrupt):
            fit(make(), losses(12), 1e-2, 12, report=stop_at(cut), kept=Kept(tmp_path / "c.pt"))
    begun: list[int] = []
    model, kept = make(), Kept(tmp_path / "c.pt")
    found = fit(model, losses(12), 1e-2, 12, report=lambda s, *_: begun.append(s), kept=kept)
    # What is kept is that of before the report that stopped it: that step is done once more.
    assert begun[0] == cuts[-1]
    assert found["loss"] == wanted["loss"] and found["norm"] == wanted["norm"]
    for mine, theirs in zip(model.parameters(), whole.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    again = make()
    assert fit(again, losses(12), 1e-2, 12, report=stop_at(11), kept=kept)["loss"] == found["loss"]
    assert all(map(torch.equal, again.parameters(), whole.parameters()))  # no step was done


def test_another_stamp_is_none_and_what_cannot_be_read_is_said(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "cell.pt"
    assert Kept(path, "a").put("part", lambda: [1, 2], now=True)
    assert Kept(path, "a").get("part") == [1, 2] and Kept(path, "a").get("other") is None
    assert Kept(path, "b").get("part") is None
    for junk in (path.read_bytes()[:-30], b"", b"junk" * 100):
        path.write_bytes(junk)
        with pytest.warns(UserWarning, match="cell.pt cannot be read; the cell starts again"):
            assert Kept(path, "a").get("part") is None
    torch.save({"stamp": "a", "parts": {"part": Path("x")}}, path)  # not plain data: not loaded
    with pytest.warns(UserWarning, match="cannot be read"):
        assert Kept(path, "a").get("part") is None


def test_writing_waits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    times = iter([0, 30, 61, 71, 72, 270, 272, 272, 280, 280])
    monkeypatch.setattr(kept_module, "EVERY", 60.0)
    monkeypatch.setattr(kept_module, "monotonic", lambda: next(times))
    kept = Kept(tmp_path / "c.pt")
    assert not kept.put("x", lambda: 1)  # after 30 s
    assert kept.put("x", lambda: 2)  # after 61 s; it takes 10
    assert not kept.put("x", lambda: 3)  # 200 s are to pass after that, not 60
    assert not kept.put("x", lambda: 4)
    assert kept.put("x", lambda: 5)
    assert Kept.put(kept, "x", lambda: 6, now=True) and kept.get("x") == 6


def test_nothing_is_kept_without_a_place() -> None:
    kept = Kept()  # of an experiment that is asked for several cells: one must not see another's
    for now in (False, True):
        assert not kept.put("x", lambda: pytest.fail("made"), now=now)
    assert kept.get("x") is None


class Interrupted(Copying):
    """Ends at the n-th score."""

    scored = 0
    ends_at = 0

    def scores(self, *given: Any) -> dict[str, Any]:
        type(self).scored += 1
        if self.scored == self.ends_at:
            raise KeyboardInterrupt
        return super().scores(*given)


def rows(path: Path) -> list[dict[str, Any]]:
    times = ("seconds", "train_seconds", "test_seconds", "date")
    found = json.loads(path.read_text())["rows"]
    return [{k: v for k, v in row.items() if k not in times} for row in found]


def test_an_experiment_goes_on_within_a_cell(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(run_module, "in_parallel", here)
    monkeypatch.setattr("nestlearn.evals.registry.experiment", lambda name, scale: Interrupted())
    trained: list[float] = []

    def counting(*args: Any, **more: Any) -> dict[str, Any]:
        return fit(*args, **more, report=lambda step, *_: trained.append(step))

    monkeypatch.setattr("nestlearn.evals.harness.trained.fit", counting)
    request = Request(tasks=("easy",), seeds=1)

    def go(path: Path, ends_at: int = 0, **more: Any) -> int:
        Interrupted.scored, Interrupted.ends_at = 0, ends_at
        trained.clear()
        item, ask = Interrupted(), Request(tasks=("easy",), seeds=1, **more)
        return run(item, open_results(item, path, request, 1, **more), ask, report=lambda _: None)

    assert go(tmp_path / "whole.json") == 0
    assert trained == [*range(40)] * 3 and Interrupted.scored == 4  # two rates; validation, test
    path = tmp_path / "cut.json"
    with pytest.raises(KeyboardInterrupt):
        go(path, ends_at=4)
    folder = kept_file(path, "").parent
    assert len(list(folder.iterdir())) == 1
    assert go(path) == 0
    assert trained == [] and Interrupted.scored == 1  # the test split was all that was missing
    assert rows(path) == rows(tmp_path / "whole.json")
    assert not folder.exists()
    other = tmp_path / "other.json"
    with pytest.raises(KeyboardInterrupt):
        go(other, ends_at=4)
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "code", lambda: "changed")
        assert go(other) == 0 and trained == [*range(40)]  # the cell that was cut off, all of it
    with pytest.raises(KeyboardInterrupt):
        go(path, ends_at=4, fresh=True)
    assert go(path, fresh=True) == 0
    assert len(trained) == 120  # nothing of before


def test_a_cell_that_failed_starts_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(run_module, "in_parallel", here)
    monkeypatch.setattr("nestlearn.evals.registry.experiment", lambda name, scale: Broken())
    path, request = tmp_path / "r.json", Request(tasks=("easy",), seeds=1)
    results = open_results(Broken(), path, request, 1)
    assert run(Broken(), results, request, report=lambda _: None) == 2
    assert not kept_file(path, "").parent.exists()


class Broken(Copying):
    """Fails after training."""

    def scores(self, *given: Any) -> dict[str, Any]:
        raise ArithmeticError
