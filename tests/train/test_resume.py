"""A run that is stopped anywhere goes on bit-exactly; one that cannot go on says why."""

from __future__ import annotations

import io
import json
import random
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from nestlearn.train import Progress, list_checkpoints, load_weights, read_log
from nestlearn.train.checkpoint import (
    load_checkpoint,
    random_state,
    save_checkpoint,
    set_random_state,
)

from .conftest import tiny_model
from .test_loop import stopping_at


def tensors_of(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [t for v in value.values() for t in tensors_of(v)]
    if isinstance(value, list | tuple):
        return [t for v in value for t in tensors_of(v)]
    return []


def assert_same_state(a: Any, b: Any) -> None:
    mine = [*a.model.state_dict().values(), *tensors_of(a.optimizer.state_dict())]
    theirs = [*b.model.state_dict().values(), *tensors_of(b.optimizer.state_dict())]
    assert len(mine) == len(theirs)
    assert all(torch.equal(x, y) for x, y in zip(mine, theirs, strict=True))
    assert a.optimizer.state_dict()["param_groups"] == b.optimizer.state_dict()["param_groups"]


@pytest.mark.parametrize("stop", [3, 4, 6])  # period 3: every phase of the accumulator
@pytest.mark.parametrize("settings", [{}, {"cms_kind": "nested"}])
def test_interrupted_run_equals_straight_run(make, tmp_path: Path, stop: int, settings) -> None:
    fields = {"steps": 11, "accumulate": 2, "eval_every": 4, "save_every": 100}
    straight = make(model=tiny_model(**settings), out=str(tmp_path / "straight"), **fields)
    expected = straight.fit()
    first = make(
        model=tiny_model(**settings), progress=stopping_at(stop, signal.SIGINT), **fields
    ).fit()
    assert first.interrupted and first.step == stop + 1
    torch.rand(7), np.random.rand(3), random.random()
    second = make(model=tiny_model(seed=5, **settings), **fields)
    result = second.fit()
    assert first.losses + result.losses == expected.losses
    assert (result.val_loss, result.best) == (expected.val_loss, expected.best)
    assert_same_state(second, straight)
    saved = [
        load_file(tmp_path / run / "final" / "model.safetensors") for run in ("run", "straight")
    ]
    assert all(torch.equal(saved[0][k], saved[1][k]) for k in saved[1])
    logs = [read_log(tmp_path / run) for run in ("run", "straight")]
    for log in logs:
        for record in log:
            record.pop("tokens_per_second", None)
    assert logs[0] == logs[1]


def test_dropout_resumes_exactly(make, tmp_path: Path) -> None:
    """The random generators are part of the checkpoint."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def model() -> LlamaForCausalLM:
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(
            vocab_size=259, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
            num_attention_heads=2, attention_dropout=0.3))  # fmt: skip

    expected = make(model=model(), out=str(tmp_path / "straight"), steps=8).fit().losses
    first = make(model=model(), steps=8, progress=stopping_at(3, signal.SIGTERM)).fit()
    torch.rand(100)
    assert first.losses + make(model=model(), steps=8).fit().losses == expected


def test_resume_from_a_path_and_extend(make, tmp_path: Path) -> None:
    make(steps=6, save_every=3).fit()
    stream = io.StringIO()
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000003"
    other = make(steps=9, resume=str(checkpoint), out=str(tmp_path / "other"),
                 progress=Progress(stream=stream))  # fmt: skip
    result = other.fit()
    assert len(result.losses) == 6 and result.step == 9
    assert "continuing from step-00000003" in stream.getvalue()
    assert "settings changed since: steps 6 -> 9" in stream.getvalue()
    assert make(steps=6, resume=str(tmp_path / "run"), out=str(tmp_path / "c")).fit().losses == []


def test_finished_run_does_nothing(make, tmp_path: Path) -> None:
    make(steps=3).fit()
    before = (tmp_path / "run" / "log.jsonl").read_text()
    result = make(steps=3).fit()
    assert result.losses == [] and result.step == 3
    assert (tmp_path / "run" / "log.jsonl").read_text() == before


def test_resume_errors(make, tmp_path: Path) -> None:
    make(steps=4, save_every=2).fit()
    folder = list_checkpoints(tmp_path / "run" / "checkpoints")[-1]
    with pytest.raises(ValueError, match="already holds checkpoints .* --resume auto"):
        make(resume="never").fit()
    with pytest.raises(ValueError, match="no checkpoint there"):
        make(resume=str(tmp_path)).fit()
    with pytest.raises(ValueError, match="other data"):
        make(seed=1).fit()
    with pytest.raises(ValueError, match="other batch_size"):
        make(batch_size=2).fit()
    with pytest.raises(ValueError, match="holds another model"):
        make(model=tiny_model(hidden_size=48)).fit()
    with pytest.raises(ValueError, match="other levels"):
        make(model=tiny_model(cms_periods=[1, 4])).fit()
    content = bytearray((folder / "state.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "state.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"is damaged \(state.safetensors\); delete it"):
        make().fit()


def test_a_checkpoint_without_its_last_file_does_not_count(make, tmp_path: Path) -> None:
    make(steps=4, save_every=2).fit()
    root = tmp_path / "run" / "checkpoints"
    (root / "step-00000004" / "state.json").unlink()
    (root / ".step-00000006.1.tmp").mkdir()
    assert [p.name for p in list_checkpoints(root)] == ["step-00000002"]
    assert make(steps=4).fit().step == 4


def test_state_of_any_shape_round_trips(tmp_path: Path) -> None:
    model = tiny_model()
    state = {"a": (1, None, "x", 1e-300, float("inf")), 3: [True, {"t": torch.arange(3)}],
             "bf16": torch.ones(2, dtype=torch.bfloat16), "empty": {}}  # fmt: skip
    folder = save_checkpoint(tmp_path / "checkpoints", 7, state, model)
    loaded = load_checkpoint(folder, model)
    assert loaded["a"] == state["a"] and loaded["empty"] == {}
    assert torch.equal(loaded[3][1]["t"], torch.arange(3))
    assert loaded["bf16"].dtype == torch.bfloat16
    with pytest.raises(ValueError, match="cannot hold a set"):
        save_checkpoint(tmp_path / "checkpoints", 8, {"a": {1}}, model)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000007"]


def test_random_generators_round_trip() -> None:
    def draw() -> tuple:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    state = random_state()
    json.dumps(state["numpy"])
    first = draw()
    assert draw() != first
    set_random_state(state)
    assert draw() == first


def test_keep_and_overwrite(tmp_path: Path) -> None:
    model = tiny_model()
    for step in (1, 2, 3, 3):
        save_checkpoint(tmp_path / "c", step, {"step": step}, model, keep=2)
    assert [p.name for p in list_checkpoints(tmp_path / "c")] == ["step-00000002", "step-00000003"]


def test_load_weights_knows_tied_tensors(tmp_path: Path) -> None:
    model, other = tiny_model(0), tiny_model(1)
    model.save_pretrained(tmp_path)
    load_weights(other, tmp_path)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in other.state_dict().items())
