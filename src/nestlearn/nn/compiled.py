"""Compiling models whose layers loop over chunks.

``torch.compile`` of such a model unrolls every chunk of every layer into one graph, which takes
minutes and starts anew for another length. What pays is compiling the chunk: one small graph per
kind of memory, used for all chunks, layers and lengths.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn


def compile_model(model: nn.Module) -> nn.Module:
    """The model, compiled the way that suits it; same parameters, same results to rounding.

    Layers with a ``compile_chunks`` method (`SelfModifyingTitans`) compile their chunk; a model
    without any is compiled as a whole.

    Example:
        >>> run = compile_model(nn.Linear(2, 2))
    """
    chunked = [module for module in model.modules() if hasattr(module, "compile_chunks")]
    if not chunked:
        return cast(nn.Module, torch.compile(model))
    for module in chunked:
        cast(Any, module).compile_chunks()
    return model
