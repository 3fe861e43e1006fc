"""Shared test settings: one thread (two cores, several workers) and one place for real data."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from nestlearn.train.tokenizers import ByteTokenizer

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real data sets; tests that need it are skipped where it does not exist."""
    root = Path(os.environ.get("NESTLEARN_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not root.is_dir():
        pytest.skip(f"no data folder at {root}; set NESTLEARN_DATA to one")
    return root


@pytest.fixture(scope="session")
def tokenizer() -> ByteTokenizer:
    """One byte is one token."""
    return ByteTokenizer()
