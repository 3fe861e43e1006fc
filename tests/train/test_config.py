"""TrainConfig: the schedule, and values that make no sense."""

from __future__ import annotations

import pytest

from nestlearn.train import TrainConfig


def test_learning_rate_warms_up_then_falls_as_a_cosine() -> None:
    config = TrainConfig(out="x", steps=110, warmup=10, lr=1.0, min_lr=0.1)
    rates = [config.learning_rate(step) for step in range(1, 111)]
    assert rates[:10] == pytest.approx([i / 10 for i in range(1, 11)])
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert config.learning_rate(60) == pytest.approx(0.55)
    assert rates[-1] == pytest.approx(0.1)


def test_no_warmup_and_one_step() -> None:
    assert TrainConfig(out="x", steps=1, warmup=0).learning_rate(1) > 0
    config = TrainConfig(out="x", steps=5)
    assert (config.warmup_steps, config.eval_interval, config.save_interval) == (0, 1, 1)


@pytest.mark.parametrize(("name", "value"), [
    ("steps", 0), ("steps", 2.5), ("batch_size", -1), ("seq_len", 1), ("accumulate", 0),
    ("lr", 0.0), ("lr", float("nan")), ("min_lr", 2.0), ("warmup", -1), ("weight_decay", -0.1),
    ("betas", (0.9, 1.0)), ("clip", 0.0), ("dtype", "fp8"), ("eval_every", 0), ("keep", 0),
    ("log", ("paper",)), ("out", ""), ("resume", ""), ("nonfinite", "ignore"),
])  # fmt: skip
def test_bad_values_are_named(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{name} must be"):
        TrainConfig(**{"out": "x", name: value})  # type: ignore[arg-type]


def test_batch_must_split_into_micro_batches() -> None:
    with pytest.raises(ValueError, match="multiple of accumulate=3"):
        TrainConfig(out="x", batch_size=8, accumulate=3)
