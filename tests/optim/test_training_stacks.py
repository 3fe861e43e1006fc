"""The optimizers inside Hugging Face's Trainer and accelerate."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import nestlearn as nl
from nestlearn.optim import DGD, M3


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                    num_attention_heads=2, max_position_embeddings=32)
    )  # fmt: skip


def rows() -> list[dict]:
    ids = (torch.arange(12) + torch.arange(16).unsqueeze(1)) % 32
    return [{"input_ids": row, "labels": row} for row in ids]


def trainer(out: Path, kind: type, steps: int = 6, **options) -> Trainer:
    arguments = TrainingArguments(
        str(out), max_steps=steps, per_device_train_batch_size=4, logging_steps=1, save_steps=3,
        report_to=[], use_cpu=True, disable_tqdm=True, lr_scheduler_type="linear", seed=1,
    )  # fmt: skip
    net = model()
    return Trainer(
        net, arguments, train_dataset=rows(),
        optimizer_cls_and_kwargs=(kind, {"model": net, **options}),
    )  # fmt: skip


@pytest.mark.parametrize(("kind", "options"), [
    (M3, {"lr": 0.02, "frequency": 2}), (DGD, {"lr": 0.3, "momentum": 0.9}),
])  # fmt: skip
def test_trainer_trains_and_resumes(tmp_path: Path, kind: type, options: dict) -> None:
    whole = trainer(tmp_path, kind, **options)
    whole.train()
    losses = [r["loss"] for r in whole.state.log_history if "loss" in r]
    assert losses[-1] < losses[0]
    inner = whole.optimizer.optimizer
    assert type(inner) is kind
    if kind is M3:
        names = {g["algorithm"]: len(g["params"]) for g in inner.param_groups}
        assert names == {"m3": 7, "adamw": 5}
    else:
        inner.close()
    again = trainer(tmp_path, kind, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for name, p in whole.model.state_dict().items():
        assert torch.equal(p, again.model.state_dict()[name]), name


def test_accelerate_accumulates_and_schedules() -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    net = model()
    optimizer = M3(net, lr=0.02, frequency=2)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 8)
    net, optimizer, loader, scheduler = accelerator.prepare(
        net, optimizer, DataLoader(rows(), batch_size=4), scheduler
    )
    losses = []
    for _ in range(4):
        for batch in loader:
            with accelerator.accumulate(net):
                loss = net(**batch).loss
                accelerator.backward(loss)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            losses.append(loss.item())
    assert losses[-1] < losses[0]
    weight = net.model.layers[0].mlp.up_proj.weight
    assert optimizer.optimizer.state[weight]["step"] == len(losses) // 2
    assert all(g["lr"] < 0.02 for g in optimizer.param_groups)


@pytest.mark.parametrize("inner", ["M3", "DeltaMomentum", "AssociativeMomentum"])
def test_as_a_levels_optimizer_of_a_learner(tmp_path: Path, inner: str) -> None:
    """Any class or factory is an inner optimizer of `Learner`; its state is in the memory file."""
    from nestlearn.train.tokenizers import ByteTokenizer
    from tests.adaptation.conftest import tiny_model

    tokenizer, text = ByteTokenizer(), "the lighthouse was built by Irma Quell. " * 12
    learner = nl.Learner(nl.adapt(tiny_model()), tokenizer, optimizer=getattr(nl.optim, inner))
    before = learner.evaluate(text)["loss"]
    learner.learn(text)
    assert learner.evaluate(text)["loss"] < before
    learner.save(tmp_path / "memory.nlmem")
    other = nl.Learner(nl.adapt(tiny_model()), tokenizer, optimizer=getattr(nl.optim, inner))
    other.load(tmp_path / "memory.nlmem")
    learner.learn(text), other.learn(text)
    assert learner.evaluate(text)["loss"] == pytest.approx(other.evaluate(text)["loss"], abs=1e-6)
