"""Recognisers of torch's and transformers' own modules."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from nestlearn.lens.findings import FastBox, Found, Scope, matrix_flops, tensors
from nestlearn.lens.forward import foreign_name, uses
from nestlearn.lens.registry import register_module

SOFTMAX = "sum_i s(q, k_i) |v_i - y|^2 (Eq. 62)"
FUSED = "scaled_dot_product_attention"
WINDOWED = "sum_i s(q, k_i) |v_i - y|^2 over a window (Eq. 63)"


def plain(module: nn.Module, scope: Scope) -> Found:
    """Parameters that are updated by an optimizer alone; the children are looked at in turn.

    To be registered for modules of your own whose forward pass the lens cannot follow but which
    remember nothing: ``nl.lens.register_module(MyHead)(nl.lens.plain)``.
    """
    return Found(children=True)


_SHELLS = (
    nn.Sequential,
    nn.ModuleList,
    nn.ModuleDict,
    nn.ParameterList,
    nn.ParameterDict,
    nn.TransformerEncoder,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoder,
    nn.TransformerDecoderLayer,
    nn.Transformer,
    nn.DataParallel,
    nn.parallel.DistributedDataParallel,
)


def _kind(*classes: type[nn.Module]) -> Callable[[nn.Module], bool]:
    """Instances whose forward pass is the library's: a subclass with its own may do anything."""

    def match(module: nn.Module) -> bool:
        if not isinstance(module, classes):
            return False
        author = next(c for c in type(module).__mro__ if "forward" in vars(c))
        return author.__module__.split(".")[0] in ("torch", "transformers", "peft", "accelerate")

    return match


register_module(_kind(*_SHELLS))(plain)


def _is_plain_leaf(module: nn.Module) -> bool:
    """Modules of torch without parameters: activations, dropout, pooling, reshaping, losses."""
    ours = type(module).__module__.startswith("torch.nn.modules")
    return ours and not any(True for _ in module.parameters()) and not module._modules


register_module(_is_plain_leaf)(plain)

# Norms have no products; of tables, rows are looked up.
_WITHOUT_PRODUCTS = (
    nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.PReLU, nn.Embedding, nn.EmbeddingBag,
)  # fmt: skip
register_module(_kind(*_WITHOUT_PRODUCTS))(plain)


@register_module(_kind(nn.modules.batchnorm._NormBase))
def _batch_norm(module: Any, scope: Scope) -> Found:
    """Running statistics are written by the forward pass: a memory of the activations."""
    if not (scope.training and module.track_running_stats):
        return Found()
    size = sum(b.numel() * b.element_size() for b in module.buffers() if b.ndim)
    return Found(
        fast=(
            FastBox(
                "running statistics",
                "1/2 |s - statistics of the batch|^2",
                "activations of each batch",
                ("mean", "variance"),
                1,
                "gradient descent, step = momentum",
                "no: written without a graph",
                per="sample",
                state_bytes=size,
                flops=0,
                slow=(),
                flow=False,
            ),
        )
    )


@register_module(_kind(nn.Linear))
def _linear(module: nn.Linear, scope: Scope) -> Found:
    # Children: what nestlearn.adapt hung beside it.
    return Found(flops=matrix_flops([module.weight]), children=True)


@register_module(_kind(nn.Bilinear))
def _bilinear(module: nn.Bilinear, scope: Scope) -> Found:
    return Found(flops={module.weight: None})


@register_module(_kind(nn.modules.conv._ConvNd))
def _convolution(module: Any, scope: Scope) -> Found:
    """Per output position: each weight is used once (of a transposed one: per input position)."""
    return Found(flops=matrix_flops([module.weight]))


@register_module(_kind(nn.MultiheadAttention))
def _multihead(module: nn.MultiheadAttention, scope: Scope) -> Found:
    """Queries, keys and values of the same length; the cache is what keys and values take."""
    size = module.out_proj.weight.element_size()
    box = attention_box(scope.tokens, module.embed_dim, 2 * module.embed_dim, size, tensors(module))
    return Found(fast=(box,), flops=matrix_flops(tensors(module)))


def attention_box(
    tokens: int,
    width: int | None,
    cached: int | None,
    size: int,
    slow: tuple[Tensor, ...],
    window: int | None = None,
) -> FastBox:
    """Softmax attention: the non-parametric solution of a regression on the context (Eq. 62).

    Args:
        tokens: T.
        width: of all heads' queries together: ``4 T width`` FLOPs per token.
        cached: numbers kept per token, keys and values.
        size: bytes per number.
        slow: parameters of the layer.
        window: tokens that are seen; None: all.
    """
    seen = tokens if window is None else min(window, tokens)
    return FastBox(
        "attention" if window is None else "sliding-window attention",
        SOFTMAX if window is None else WINDOWED,
        "tokens of one sequence" if window is None else f"the latest {window:,} tokens",
        (),
        math.inf,
        "non-parametric (Nadaraya-Watson)",
        "yes: through keys, values and queries",
        state_bytes=None if cached is None else seen * cached * size,
        flops=None if width is None else 4.0 * seen * width,
        slow=slow,
    )


@register_module(_kind(nn.RNNBase))
def _recurrent(module: nn.RNNBase, scope: Scope) -> Found:
    width, copies = module.hidden_size, module.num_layers * (1 + module.bidirectional)
    state = {"LSTM": ("h", "c")}.get(type(module).__name__, ("h",))
    weight = next(module.parameters())
    projected = module.proj_size or width
    numbers = copies * (projected + (width if len(state) == 2 else 0))
    box = FastBox(
        "recurrent state",
        "none is stated: a learned recurrence",
        "tokens of one sequence",
        state,
        1,
        type(module).__name__,
        "yes: through time",
        state_bytes=numbers * weight.element_size(),
        flops=0,
        slow=tensors(module),
    )
    return Found(fast=(box,), flops=matrix_flops(tensors(module)))


# -- any library -------------------------------------------------------------------------------


@register_module(lambda module: uses(module, FUSED))
def _fused_attention(module: nn.Module, scope: Scope) -> Found:
    """A module of somebody's own that calls torch's attention; heads and caches are its affair."""
    size = next((p.element_size() for p in module.parameters()), 4)
    box = attention_box(scope.tokens, None, None, size, tensors(module))
    more = foreign_name(module, (FUSED,))
    library = type(module).__module__.split(".")[0] in ("torch", "transformers")
    unknown = f"besides attention its forward pass uses {more!r}" if more and not library else ""
    return Found(fast=(box,), children=True, unknown=unknown)


def _from(package: str) -> Any:
    def match(module: nn.Module) -> bool:
        return any(c.__module__.split(".")[0] == package for c in type(module).__mro__)

    return match


@register_module(_from("peft"))
def _peft(module: nn.Module, scope: Scope) -> Found | None:
    """Frozen maps with small trainable ones beside them."""
    known = {"PeftModel", "BaseTunerLayer", "BaseTuner"}
    return Found(children=True) if known & {c.__name__ for c in type(module).__mro__} else None


@register_module(_from("transformers"))
def _transformers(module: Any, scope: Scope) -> Found | None:
    name = type(module).__name__
    classes = {c.__name__ for c in type(module).__mro__}
    if classes & {"PreTrainedModel", "GradientCheckpointingLayer"}:
        return Found(children=True)
    if name == "Conv1D":
        return Found(flops=matrix_flops([module.weight]), children=True)
    if type(module).__module__ == "transformers.activations" or name.endswith("RotaryEmbedding"):
        return Found()
    if name.endswith("Norm") and all(p.ndim <= 1 for p in module.parameters()):
        return Found()
    if uses(module, "ALL_ATTENTION_FUNCTIONS"):
        return _transformers_attention(module, scope)
    return None


def _transformers_attention(module: Any, scope: Scope) -> Found:
    """Every class that calls the library's attention interface does softmax attention."""
    config = getattr(module, "config", None)
    heads = getattr(config, "num_attention_heads", None)
    width = cached = None
    if config is not None and heads:
        head = getattr(module, "head_dim", None) or getattr(config, "head_dim", None)
        head = head or config.hidden_size // heads
        width = heads * head
        cached = 2 * head * (getattr(config, "num_key_value_heads", None) or heads)
    window = getattr(module, "sliding_window", None)
    size = next((p.element_size() for p in module.parameters()), 4)
    box = attention_box(scope.tokens, width, cached, size, tensors(module), window)
    return Found(fast=(box,), children=True)
