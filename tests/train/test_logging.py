"""Logs: one gapless curve in JSON lines, further sinks on request."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest

from nestlearn.train import read_log
from nestlearn.train.logging import RunLog


def test_records_after_the_resumed_step_are_dropped(tmp_path: Path) -> None:
    log = RunLog(tmp_path, (), {})
    for step in range(1, 6):
        log.write("step", step, loss=1.0 / step, levels=["every 1"])
    log.close()
    with (tmp_path / "log.jsonl").open("a") as handle:
        handle.write('{"event": "st')  # cut off by a crash
    log = RunLog(tmp_path, (), {}, step=3)
    log.write("step", 4, loss=9.0)
    log.close()
    assert [(r["step"], r["loss"]) for r in read_log(tmp_path, "step")] == [
        (1, 1.0), (2, 0.5), (3, 1 / 3), (4, 9.0)]  # fmt: skip
    assert read_log(tmp_path, "eval") == []


def test_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = RunLog(tmp_path, ("tensorboard",), {"lr": 1})
    log.write("eval", 3, loss=0.5, best=True)
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("eval/loss")] == [(3, 0.5)]
    assert events.Tags()["scalars"] == ["eval/loss"]


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_trackers(tmp_path: Path, monkeypatch, name: str) -> None:
    calls: list = []
    fake = types.SimpleNamespace(
        init=lambda **kw: calls.append(kw),
        log=lambda values, step: calls.append((values, step)),
        finish=lambda: calls.append("finish"),
    )
    monkeypatch.setitem(sys.modules, name, fake)
    log = RunLog(tmp_path / "run", (name,), {"lr": 1})
    log.write("step", 2, loss=0.5)
    log.close()
    assert calls == [
        {"project": "nestlearn", "name": "run", "config": {"lr": 1}},
        ({"step/loss": 0.5}, 2),
        "finish",
    ]


@pytest.mark.parametrize(("name", "module"), [
    ("tensorboard", "torch.utils.tensorboard"), ("trackio", "trackio"), ("wandb", "wandb"),
])  # fmt: skip
def test_missing_packages_are_named(tmp_path: Path, monkeypatch, name: str, module: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=f"--log {name} needs: pip install {name}"):
        RunLog(tmp_path, (name,), {})
