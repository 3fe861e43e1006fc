"""The loop: it learns, its levels fire on time, and nothing goes wrong in silence."""

from __future__ import annotations

import io
import math
import signal
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from nestlearn.train import Progress, TrainingStopped, list_checkpoints, read_log

from .conftest import tiny_model


def test_it_learns_and_writes_everything(make, tmp_path: Path) -> None:
    stream = io.StringIO()
    trainer = make(steps=60, seq_len=64, progress=Progress(stream=stream))
    result = trainer.fit()
    out = tmp_path / "run"
    steps, evals = read_log(out, "step"), read_log(out, "eval")
    assert [s["step"] for s in steps] == list(range(1, 61))
    assert result.losses == [s["loss"] for s in steps]
    assert result.losses[-1] < 0.7 * result.losses[0]
    assert evals[-1]["perplexity"] == pytest.approx(math.exp(evals[-1]["loss"]))
    assert evals[-1]["bits_per_byte"] == pytest.approx(evals[-1]["loss"] / math.log(2))
    assert result.best == min(e["loss"] for e in evals)
    assert [p.name for p in list_checkpoints(out / "checkpoints")] == [
        "step-00000054",
        "step-00000060",
    ]
    assert not list(out.rglob("*.tmp"))
    text = stream.getvalue()
    assert "levels: every step" in text and "every 3 steps" in text
    assert "bits per byte" in text and "done: 60 steps" in text


def test_saved_models_load_with_transformers(make, tmp_path: Path) -> None:
    trainer = make(steps=4)
    trainer.fit()
    for name in ("final", "best", "checkpoints/step-00000004"):
        folder = tmp_path / "run" / name
        model = AutoModelForCausalLM.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        ids = tokenizer("12 plus", return_tensors="pt").input_ids
        with torch.no_grad():
            logits, ours = model(ids).logits, trainer.model.eval()(ids).logits
        assert torch.equal(logits, ours) or name == "best"


def test_levels_fire_on_their_clocks(make, tmp_path: Path) -> None:
    make(steps=7).fit()
    fired = [record["levels"] for record in read_log(tmp_path / "run", "step")]
    both, fast = ["every 1", "every 3"], ["every 1"]
    assert fired == [fast, fast, both, fast, fast, both, fast]


def test_micro_batches_give_the_same_curve(make, tmp_path: Path) -> None:
    whole = make(out=str(tmp_path / "a"), batch_size=8, steps=6, model=tiny_model())
    parts = make(out=str(tmp_path / "b"), batch_size=8, steps=6, accumulate=4, model=tiny_model())
    assert parts.fit().losses == pytest.approx(whole.fit().losses, abs=1e-5)


def test_any_causal_language_model_trains(make) -> None:
    config = LlamaConfig(vocab_size=259, hidden_size=32, intermediate_size=64,
                         num_hidden_layers=2, num_attention_heads=2)  # fmt: skip
    result = make(model=LlamaForCausalLM(config), steps=20, lr=1e-2).fit()
    assert result.losses[-1] < result.losses[0]


@pytest.mark.parametrize("settings", [
    {"mixer": "self_modifying"}, {"mixer": "gated_deltanet"}, {"cms_kind": "independent"},
    {"mixer": "attention", "tie_word_embeddings": False},
])  # fmt: skip
def test_variants_of_hope_train(make, settings: dict) -> None:
    result = make(model=tiny_model(**settings), steps=8, lr=1e-2).fit()
    assert all(map(math.isfinite, result.losses)) and result.losses[-1] < result.losses[0]


def test_bf16_stays_close_to_fp32(make) -> None:
    full = make(steps=6)
    losses = full.fit().losses
    half = make(steps=6, dtype="bf16", out=full.config.out + "-bf16")
    assert half.fit().losses == pytest.approx(losses, rel=0.02)
    assert all(p.dtype == torch.float32 for p in half.model.parameters())


def test_nested_levels_restart_when_the_slower_one_is_due(make) -> None:
    trainer = make(model=tiny_model(cms_kind="nested", cms_periods=[1, 3]), steps=3)
    initial = [dict(i) for i in trainer.nested._initial.values()]
    assert len(initial) == 2  # one per layer
    trainer.fit()
    after = list(trainer.nested._initial.values())
    for name, module in trainer.nested._modules.items():
        weights = module.initial_weights()
        stored = trainer.nested._initial[name]
        assert all(torch.equal(weights[key], stored[key]) for key in stored)  # step 3: restarted
    assert not torch.equal(next(iter(initial[0].values())), next(iter(after[0].values())))


# -- what goes wrong ------------------------------------------------------------------------------


def poison(trainer, steps: set[int]) -> None:
    """Make the loss NaN at given steps."""
    loss = trainer._loss

    def poisoned(rows):
        value = loss(rows)
        return value * float("nan") if trainer.step in steps else value

    trainer._loss = poisoned


def test_a_nan_step_is_left_out_with_one_line(make, tmp_path: Path) -> None:
    stream = io.StringIO()
    trainer = make(steps=8, progress=Progress(stream=stream), eval_every=8)
    poison(trainer, {4})
    result = trainer.fit()
    assert math.isnan(result.losses[3]) and math.isfinite(result.losses[-1])
    lines = [line for line in stream.getvalue().splitlines() if line.startswith("step 4:")]
    assert len(lines) == 1 and "loss is nan; step left out" in lines[0] and "lower --lr" in lines[0]
    assert {level.steps for level in trainer.optimizer.levels.values()} == {7}  # no clock moved
    assert all(p.isfinite().all() for p in trainer.model.parameters())
    assert read_log(tmp_path / "run", "step")[3]["levels"] == []


def test_nan_can_stop_the_run(make) -> None:
    trainer = make(steps=8, nonfinite="stop", save_every=2)
    poison(trainer, {4})
    with pytest.raises(TrainingStopped, match="step 4: loss is nan; stopped"):
        trainer.fit()
    assert trainer.checkpoint is not None and trainer.checkpoint.name == "step-00000002"


def test_nan_forever_stops_the_run(make) -> None:
    trainer = make(steps=30, eval_every=30)
    poison(trainer, set(range(3, 31)))
    with pytest.raises(TrainingStopped, match=r"step 13: loss is nan \(11 steps in a row\)"):
        trainer.fit()


def test_infinite_gradient_with_finite_loss(make) -> None:
    stream = io.StringIO()
    trainer = make(steps=3, progress=Progress(stream=stream), eval_every=3)
    weight = next(trainer.model.parameters())
    weight.register_hook(lambda g: g * float("inf") if trainer.step == 2 else g)
    trainer.fit()
    assert "step 2: gradient norm is" in stream.getvalue()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_save_then_stop(make, tmp_path: Path, number) -> None:
    stream = io.StringIO()
    trainer = make(steps=50, progress=stopping_at(5, number, stream))
    before = signal.getsignal(number)
    result = trainer.fit()
    assert result.interrupted and result.step == 6
    assert list_checkpoints(tmp_path / "run" / "checkpoints")[-1].name == "step-00000006"
    assert "interrupted: step 6 is saved" in stream.getvalue()
    assert signal.getsignal(number) is before


def test_second_ctrl_c_stops_at_once(make) -> None:
    class Impatient(Progress):
        def update(self, step, *args, **kwargs):
            if step == 3:
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        make(steps=9, progress=Impatient(visible=False)).fit()


def stopping_at(step: int, number: int, stream: io.StringIO | None = None) -> Progress:
    class Stopping(Progress):
        def update(self, now, *args, **kwargs):
            super().update(now, *args, **kwargs)
            if now == step:
                signal.raise_signal(number)

    return Stopping(visible=stream is not None, stream=stream)


def test_compiled_model_gives_the_same_losses(make, monkeypatch) -> None:
    calls = []

    def compile(module, **kwargs):  # the real compiler takes a minute; the wiring is tested here
        calls.append(module)
        return module

    plain = make(steps=3)
    losses = plain.fit().losses
    monkeypatch.setattr(torch, "compile", compile)
    compiled = make(steps=3, compile=True, out=plain.config.out + "-c")
    assert compiled.fit().losses == losses and calls == [compiled.model]


def test_wrong_block_length(make, corpus) -> None:
    from nestlearn.train import Blocks, TrainConfig, Trainer

    with pytest.raises(ValueError, match="blocks have seq_len 16"):
        Trainer(tiny_model(), Blocks(corpus, 16), TrainConfig(out="x", seq_len=32))
