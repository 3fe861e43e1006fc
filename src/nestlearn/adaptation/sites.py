"""Finding the MLP blocks of a causal language model by their structure."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

_ATTENTION = ("attn", "attention")


@dataclasses.dataclass(frozen=True)
class Site:
    """The MLP of one block, as found in a model.

    An MLP is read as an associative memory: its hidden activations are keys, and its last linear
    map holds the value of each key. Memories are added there.

    Attributes:
        block: number of the block, from 0 at the input.
        output: path of the last linear map, from hidden to model width, like
            ``model.layers.0.mlp.down_proj``.
        linears: paths of all linear maps of the MLP, that one among them.
        hidden: width of the hidden activations, H.
        width: the model's width, D.
    """

    block: int
    output: str
    linears: tuple[str, ...]
    hidden: int
    width: int


def find_sites(model: nn.Module, names: Sequence[str] | None = None) -> tuple[Site, ...]:
    """The MLPs of a decoder-only language model, from the input up.

    The blocks are the longest list of modules with attention in them; within a block, the MLP is
    every linear map that is no part of attention, and its output the one from another width to the
    model's.

    Args:
        model: any Hugging Face causal language model.
        names: paths of output maps, one for each block that is to have one, where the structure is
            not recognised.

    Raises:
        ValueError: no blocks, an encoder-decoder, or a block whose MLP is not recognised; the
            message lists what was found.
    """
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"{type(model).__name__} is an encoder-decoder; only decoder-only language models "
            "(Llama, Qwen, Gemma, Mistral, GPT-2, ...) can be adapted"
        )
    width = _width(model)
    if names is not None:
        return tuple(_named(model, name, i, width) for i, name in enumerate(names))
    prefix, blocks = find_blocks(model)
    return tuple(_site(f"{prefix}.{i}", block, i, width) for i, block in enumerate(blocks))


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """(inputs, outputs) of a linear map: ``nn.Linear`` and its subclasses, GPT-2's ``Conv1D``."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    return None


def _width(model: nn.Module) -> int:
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    weight = getattr(embeddings, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        raise ValueError(
            f"{type(model).__name__} has no token embeddings; give a causal language model, e.g. "
            "AutoModelForCausalLM.from_pretrained(...)"
        )
    return weight.shape[1]


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Path and list of the blocks: the longest list of modules with attention in them.

    Raises:
        ValueError: there is none.
    """
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module)
        and all(any(_is_attention(n, m) for n, m in block.named_modules() if n) for block in module)
    ]
    if not lists:
        raise ValueError(
            f"{type(model).__name__} has no list of blocks with attention in them, so its MLPs "
            "cannot be found; name their last linear maps with sites=[...]"
        )
    return max(lists, key=lambda entry: len(entry[1]))


def _is_attention(name: str, module: nn.Module) -> bool:
    last = name.rsplit(".", 1)[-1].lower()
    words = (last, type(module).__name__.lower())
    is_norm = any("norm" in w or w.startswith("ln") for w in words)
    return not is_norm and any(a in w for w in words for a in _ATTENTION)


def _outside_attention(block: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    for name, child in block.named_children():
        # peft's own maps stand beside the ones they add to.
        if not _is_attention(name, child) and not name.startswith("lora_"):
            path = f"{prefix}.{name}"
            yield path, child
            yield from _outside_attention(child, path)


def _site(path: str, block: nn.Module, number: int, width: int) -> Site:
    found = {
        name: shape
        for name, module in _outside_attention(block, path)
        if (shape := linear_shape(module)) is not None
    }
    outputs = [n for n, (into, out) in found.items() if out == width and into != width]
    if len(outputs) != 1:
        shapes = ", ".join(f"{n} {into}->{out}" for n, (into, out) in found.items()) or "none"
        raise ValueError(
            f"the MLP of block {number} ({type(block).__name__}) is not recognised: it needs one "
            f"linear map from a hidden width to {width} outside of attention; there are: {shapes}. "
            "Name the maps with sites=[...]"
        )
    hidden = found[outputs[0]][0]
    inputs = [n for n, (into, out) in found.items() if into == width and out % hidden == 0]
    return Site(number, outputs[0], (*inputs, outputs[0]), hidden, width)


def _named(model: nn.Module, name: str, number: int, width: int) -> Site:
    try:
        module = model.get_submodule(name)
    except AttributeError as error:
        raise ValueError(f"sites: the model has no module {name!r}") from error
    shape = linear_shape(module)
    if shape is None or shape[1] != width:
        raise ValueError(
            f"sites: {name!r} ({type(module).__name__}) is no linear map to the model's width "
            f"{width}"
        )
    return Site(number, name, (name,), shape[0], width)


def find_attention(model: nn.Module) -> tuple[str, ...]:
    """Paths of the blocks' attention modules, from the input up.

    Raises:
        ValueError: no blocks are recognised.
    """
    prefix, blocks = find_blocks(model)
    return tuple(
        f"{prefix}.{i}.{next(n for n, m in block.named_modules() if n and _is_attention(n, m))}"
        for i, block in enumerate(blocks)
    )


def block_paths(model: nn.Module) -> tuple[str, ...]:
    """Paths of the blocks, from the input up.

    Raises:
        ValueError: none are recognised.
    """
    prefix, blocks = find_blocks(model)
    return tuple(f"{prefix}.{i}" for i in range(len(blocks)))


def contiguous_head(model: Any) -> Any:
    """Hand the output embeddings contiguous inputs; returns the hook.

    Models cut out the hidden states whose logits are asked for. In PyTorch 2.13 on CPUs, a linear
    map without gradients of a cut-out batch is a hundred times slower than of its copy.
    """
    return model.get_output_embeddings().register_forward_pre_hook(_contiguous)


def _contiguous(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (inputs[0].contiguous(), *inputs[1:])
