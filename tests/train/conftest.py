"""A small run: synthetic text, a tiny Hope on two levels, a quiet trainer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nestlearn.models.hope import HopeConfig, HopeForCausalLM
from nestlearn.train import Blocks, ByteTokenizer, Corpus, Progress, TrainConfig, Trainer


@pytest.fixture(scope="session")
def corpus() -> Corpus:
    """Text with structure at several distances: numbers written out one after the other."""
    words = " ".join(f"{n} plus {n % 7} is {n + n % 7}." for n in range(4000))
    return Corpus.of(np.frombuffer(words.encode(), np.uint8).astype(np.uint16))


def tiny_model(seed: int = 0, **settings: Any) -> HopeForCausalLM:
    """Two levels: one updated every step, one every third."""
    torch.manual_seed(seed)
    options = {"mixer": "attention", "cms_periods": [1, 3], "hidden_size": 32} | settings
    return HopeForCausalLM(HopeConfig.preset("tiny", intermediate_size=64, **options))


@pytest.fixture
def make(tmp_path: Path, corpus: Corpus) -> Callable[..., Trainer]:
    """``make(steps=..., model=..., progress=..., **TrainConfig fields)``."""

    def build(
        model: Any = None, progress: Any = None, optimizer: Any = None, **fields: Any
    ) -> Trainer:
        options = {"out": str(tmp_path / "run"), "steps": 12, "batch_size": 4, "seq_len": 32,
                   "lr": 5e-3, "log_every": 1, "eval_sequences": 8}  # fmt: skip
        config = TrainConfig(**{**options, **fields})
        blocks = Blocks(corpus, config.seq_len, seed=config.seed)
        model = tiny_model() if model is None else model
        quiet = progress or Progress(visible=False)
        return Trainer(model, blocks, config, ByteTokenizer(), optimizer, None, quiet)

    return build
