"""The examples in the docstrings run."""

from __future__ import annotations

import doctest
import functools
import importlib
import pkgutil

import pytest
import torch
from torch import nn

import nestlearn.optim

MODULES = [m.name for m in pkgutil.iter_modules(nestlearn.optim.__path__)]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    module = importlib.import_module(f"nestlearn.optim.{name}")
    known = {"torch": torch, "nn": nn, "functools": functools}
    assert doctest.testmod(module, extraglobs=known).failed == 0
