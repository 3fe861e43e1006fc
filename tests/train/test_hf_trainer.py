"""Hope with its levels under `transformers.Trainer`."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import Trainer, TrainingArguments

from nestlearn.optim import MultiRate, level_groups
from nestlearn.train import Blocks, Corpus

from .conftest import tiny_model


def hf_trainer(corpus: Corpus, out: Path, steps: int) -> Trainer:
    rows = Blocks(corpus, 32).train(0, 64)
    data = [{"input_ids": row, "labels": row} for row in rows]
    model = tiny_model()
    optimizer = MultiRate(level_groups(model, lr=5e-3))
    arguments = TrainingArguments(
        str(out), max_steps=steps, per_device_train_batch_size=4, learning_rate=5e-3,
        logging_steps=1, save_steps=4, report_to=[], use_cpu=True, disable_tqdm=True,
        lr_scheduler_type="constant", seed=1,
    )  # fmt: skip
    return Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, None))


def losses(trainer: Trainer) -> list[float]:
    return [r["loss"] for r in trainer.state.log_history if "loss" in r]


def test_hope_trains_and_resumes_under_transformers_trainer(corpus, tmp_path: Path) -> None:
    whole = hf_trainer(corpus, tmp_path, 7)
    whole.train()
    assert losses(whole)[-1] < losses(whole)[0]
    assert whole.optimizer.optimizer.levels["every 3"].updates == 2
    again = hf_trainer(corpus, tmp_path, 7)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))  # mid-period
    for name, p in whole.model.state_dict().items():
        assert torch.equal(p, again.model.state_dict()[name]), name
