"""Recognisers of the mixers that Hope is compared with."""

from __future__ import annotations

import dataclasses

from torch import Tensor, nn

from nestlearn.lens.blocks import attention_box, plain
from nestlearn.lens.findings import FastBox, Found, Scope, matrix_flops, tensors
from nestlearn.lens.memories import FLOW, RULES, TOKENS, memory_flops
from nestlearn.lens.registry import register_module
from nestlearn.nn.lstm import LSTM
from nestlearn.nn.mamba2 import Mamba2
from nestlearn.nn.rwkv7 import RWKV7, LowRank
from nestlearn.nn.self_referential import SelfReferentialMatrix
from nestlearn.nn.titans import TitansGate, TitansLayer
from nestlearn.nn.titans_context import TitansContext

register_module(LowRank)(plain)
register_module(TitansGate)(plain)
register_module(TitansLayer)(plain)


def _linears(module: nn.Module) -> dict[Tensor, float | None]:
    """Products of the projections and the convolution; the rest of the parameters has none."""
    weights = [m.weight for m in module.modules() if isinstance(m, nn.Linear)]
    conv = getattr(module, "conv", None)
    return matrix_flops([*weights, *([] if conv is None else [conv.weight])])


@register_module(RWKV7)
def _rwkv7(module: RWKV7, scope: Scope) -> Found:
    """Read, write, and the answer to the removal key: three products with the memory."""
    state = module.init_state(1)
    memory = FastBox(
        "memory",
        "1/2 |M k - v|^2, decay and rate per channel",
        TOKENS,
        ("M",),
        1,
        "generalised delta rule",
        FLOW,
        state_bytes=state.nbytes,
        flops=memory_flops([state.memory.weights[0]], True) + 2.0 * state.memory.weights[0].numel(),
        slow=tensors(module),
    )
    return Found(fast=(memory,), flops=_linears(module))


@register_module(Mamba2)
def _mamba2(module: Mamba2, scope: Scope) -> Found:
    state = module.init_state(1)
    memory = FastBox(
        "memory",
        RULES["hebbian"],
        TOKENS,
        ("M",),
        1,
        "gradient descent, retention exp(dt A)",
        FLOW,
        state_bytes=state.nbytes,
        flops=memory_flops([state.memory.weights[0]], True, forward=False),
        slow=tensors(module),
    )
    return Found(fast=(memory,), flops=_linears(module))


@register_module(LSTM)
def _lstm(module: LSTM, scope: Scope) -> Found:
    box = FastBox(
        "recurrent state",
        "none is stated: a learned recurrence",
        "tokens of one sequence",
        ("h", "c"),
        1,
        "LSTM",
        "yes: through time",
        state_bytes=module.init_state(1).nbytes,
        flops=0,
        slow=tensors(module),
    )
    return Found(fast=(box,), flops=matrix_flops(tensors(module)))


@register_module(SelfReferentialMatrix)
def _self_referential(module: SelfReferentialMatrix, scope: Scope) -> Found:
    """Per token W x, W (f(q) - f(k)) and an outer product."""
    box = FastBox(
        "self-referential matrix",
        "1/2 |W f(k) - W f(q)|^2, of all rows of W",
        "tokens of one sequence, by keys and queries that W makes",
        ("W",),
        1,
        "gradient descent, rates that W makes",
        FLOW,
        state_bytes=module.init_state(1).nbytes,
        flops=memory_flops([module.initial], True),
        slow=(module.out_proj.weight,),
        initial=(module.initial,),
    )
    return Found(fast=(box,), flops=matrix_flops([module.out_proj.weight]))


@register_module(TitansContext)
def _titans_context(module: TitansContext, scope: Scope) -> Found:
    """Attention within a segment, its recalled tokens and the persistent ones; the memory is a
    child, and is asked once more per token for what it recalls."""
    size = module.qkv.weight.element_size()
    seen = 2 * module.chunk + len(module.persistent)
    slow = (module.qkv.weight, module.attention_out.weight, module.persistent)
    box = attention_box(seen, module.dim, 2 * module.dim, size, slow, seen)
    held = module.init_state(1)
    recall = memory_flops(list(module.memory.initial), False)
    box = dataclasses.replace(
        box,
        context="a segment, what was recalled for it, persistent tokens",
        state_bytes=held.recalled.nbytes + held.segment.nbytes + held.history.nbytes,
        flops=(box.flops or 0) + recall,
    )
    again = matrix_flops([module.memory.in_proj.weight, module.memory.out_proj.weight])
    keys = 2.0 * 2 * module.dim * module.dim  # of the recalled tokens
    return Found(fast=(box,), flops={module.qkv.weight: keys, **again}, children=True)
