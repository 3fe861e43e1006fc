"""The examples in the docstrings of the tasks with long texts run."""

from __future__ import annotations

import doctest
import importlib
from typing import Any

import numpy as np
import pytest
import torch

from nestlearn.models.hope import HopeConfig, HopeForCausalLM

MODULES = ("haystack", "needles", "babilong", "recurrent_memory", "levels_qa")


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str, tokenizer: Any) -> None:
    model = HopeForCausalLM(HopeConfig.preset("tiny")).eval()
    known = {"np": np, "torch": torch, "tokenizer": tokenizer, "model": model}
    module = importlib.import_module(f"nestlearn.evals.{name}")
    found = doctest.testmod(module, extraglobs=known)
    assert found.failed == 0 and found.attempted > 0
