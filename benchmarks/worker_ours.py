"""Training steps of ours and of the reference Transformer; answers requests (see ``serve.py``)."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import Any

import torch
from models import VOCAB, hope, size
from rule_alone import rule_trial
from serve import Trial, serve, training_step
from torch import Tensor, nn
from transformer import Transformer

from nestlearn.nn.compiled import compile_model
from nestlearn.nn.self_memories import MemoryGroup


def _tokens(batch: int, length: int) -> Tensor:
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(0))


def path_of(model: nn.Module) -> str:
    """Which path a model's steps take: "native" if a layer runs in the CPU kernel, else "compiled"
    if ``torch.compile`` wraps the model or a method of a layer (``compile_chunks``), else "eager".
    """
    layers = list(model.modules())
    if any(_runs_native(layer) for layer in layers):
        return "native"
    methods = (value for layer in layers for value in vars(layer).values())
    wrapped = hasattr(model, "_orig_mod") or any(
        hasattr(method, "_torchdynamo_orig_callable") for method in methods
    )
    return "compiled" if wrapped else "eager"


def _runs_native(layer: nn.Module) -> bool:
    return isinstance(layer, MemoryGroup) and layer.runs_native(tuple(layer.initial))


def _without_native() -> None:
    """Turn the CPU kernel off, in this process and before its first use."""
    os.environ["NESTLEARN_NATIVE"] = "0"


def _trial(
    model: nn.Module, run: nn.Module, loss: Callable[[], Tensor], tokens: int, **info: Any
) -> Trial:
    """Training steps of ``model``, run as ``run``. If that is compiled, the first two steps compile
    (the second knows the optimizer's state) and do not count."""
    return Trial(
        training_step(model, loss),
        tokens,
        size(model),
        info,
        after=lambda: {"path": path_of(run)},
        warmup=2 if path_of(run) == "compiled" else 1,
    )


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
    return _trial(built, run, lambda: run(data), batch * length, batch=batch)


def model(
    dim: int,
    layers: int,
    heads: int,
    batch: int,
    length: int,
    compiled: bool = False,
    save: bool = False,
    native: bool = True,
    **config: Any,
) -> Trial:
    """``HopeForCausalLM`` with any mixer; ``config`` are further ``HopeConfig`` fields. ``save``
    recomputes activations in the backward pass: in groups of chunks where the mixer can."""
    if not native:
        _without_native()
    built: Any = hope(dim, layers, heads, length, **config).train()
    if save:
        # transformers 5 renamed it; the old name warns
        getattr(built, "activation_checkpointing_enable", built.gradient_checkpointing_enable)()
    data = _tokens(batch, length)
    run = compile_model(built) if compiled else built
    groups = {m.checkpoint_chunks for m in built.modules() if hasattr(m, "checkpoint_chunks")}
    return _trial(
        built,
        run,
        lambda: run(input_ids=data, labels=data).loss,
        batch * length,
        batch=batch,
        checkpoint_chunks=max(groups, default=None),
    )


def layer(
    dim: int,
    batch: int,
    length: int,
    kind: str = "self_modifying",
    native: bool = True,
    **options: Any,
) -> Trial:
    """One layer alone: ``SelfModifyingTitans``, or a ``NeuralMemory`` preset named by ``kind``."""
    from nestlearn.nn.neural_memory import NeuralMemory
    from nestlearn.nn.self_modifying import SelfModifyingTitans

    if not native:
        _without_native()
    if kind == "self_modifying":
        built: Any = SelfModifyingTitans(dim, **options)
    else:
        built = NeuralMemory(dim, preset=kind, **options)
    x = torch.randn(batch, length, dim, generator=torch.Generator().manual_seed(0))
    x.requires_grad_()

    def loss() -> Tensor:
        x.grad = None
        return built(x)[0].square().mean()

    return _trial(built, built, loss, batch * length, batch=batch)


def rule(chunk: int = 64, **sizes: int) -> Trial:
    """The rule of the gated DeltaNet preset alone."""
    from nestlearn.rules.dispatch import apply_rule

    def run(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2).contiguous() for t in (q, k, v))
        M = q.new_zeros(*q.shape[:2], v.shape[-1], k.shape[-1])
        alpha, eta = g.exp().mT, beta.mT
        return apply_rule("delta", M, q, k, v, eta, alpha, gated=True, chunk=chunk)[0]

    return rule_trial(run, **sizes)


BUILDERS = {"transformer": transformer, "model": model, "layer": layer, "rule": rule}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    torch.set_num_threads(parser.parse_args().threads)
    torch.manual_seed(0)
    serve(BUILDERS)
