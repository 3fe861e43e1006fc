"""Training steps of ours and of the reference Transformer; answers requests (see ``serve.py``)."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from models import VOCAB, hope, size
from serve import Trial, serve, training_step
from torch import Tensor
from transformer import Transformer

from nestlearn.nn.compiled import compile_model


def _tokens(batch: int, length: int) -> Tensor:
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(0))


def transformer(
    dim: int,
    layers: int,
    heads: int,
    batch: int,
    length: int,
    compiled: bool = False,
    save: bool = False,
) -> Trial:
    """The plain SDPA Transformer; ``save`` recomputes each block in the backward pass."""
    built = Transformer(VOCAB, dim, layers, heads, save)
    data = _tokens(batch, length)
    run = compile_model(built) if compiled else built
    return Trial(training_step(built, lambda: run(data)), batch * length, size(built))


def model(
    dim: int,
    layers: int,
    heads: int,
    batch: int,
    length: int,
    compiled: bool = False,
    save: bool = False,
    **config: Any,
) -> Trial:
    """``HopeForCausalLM`` with any mixer; ``config`` are further ``HopeConfig`` fields."""
    built: Any = hope(dim, layers, heads, length, **config).train()
    if save:
        # transformers 5 renamed it; the old name warns
        getattr(built, "activation_checkpointing_enable", built.gradient_checkpointing_enable)()
    data = _tokens(batch, length)
    run = compile_model(built) if compiled else built
    step = training_step(built, lambda: run(input_ids=data, labels=data).loss)
    return Trial(step, batch * length, size(built), {"config": config})


def layer(dim: int, batch: int, length: int, kind: str = "self_modifying", **options: Any) -> Trial:
    """One layer alone: ``SelfModifyingTitans``, or a ``NeuralMemory`` preset named by ``kind``."""
    from nestlearn.nn.neural_memory import NeuralMemory
    from nestlearn.nn.self_modifying import SelfModifyingTitans

    if kind == "self_modifying":
        built: Any = SelfModifyingTitans(dim, **options)
    else:
        built = NeuralMemory(dim, preset=kind, **options)
    x = torch.randn(batch, length, dim, generator=torch.Generator().manual_seed(0))
    x.requires_grad_()

    def loss() -> Tensor:
        x.grad = None
        return built(x)[0].square().mean()

    return Trial(training_step(built, loss), batch * length, size(built), {"options": options})


BUILDERS = {"transformer": transformer, "model": model, "layer": layer}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    torch.set_num_threads(parser.parse_args().threads)
    torch.manual_seed(0)
    serve(BUILDERS)
