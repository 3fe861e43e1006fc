"""Which parameters are matrices to orthogonalise, and which are for AdamW."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

Named = list[tuple[str, Tensor]]

_HEADS = (
    "lm_head",
    "head",
    "heads",
    "classifier",
    "score",
    "unembed",
    "unembedding",
    "output_head",
)
_EMBEDS = ("embed", "position", "pos_emb", "token", "wte", "wpe")
_VECTORS = ("norm", "bias", "gain", "scale", "logit")


class ParameterSplit(NamedTuple):
    """A model's trainable parameters by what an optimizer should do with them.

    Each field is a list of ``(name, parameter)``, as ``torch.optim`` takes them.

    Attributes:
        matrices: weights of linear maps, ``(..., out, in)``; leading axes are independent maps.
        kernels: convolution weights ``(out, in, ...)``, one map of ``out x (in ...)``.
        embeddings: embedding tables, positions, and the output head.
        vectors: biases, gains, norms, scalars.
    """

    matrices: Named
    kernels: Named
    embeddings: Named
    vectors: Named

    def kinds(self) -> dict[Tensor, str]:
        """Parameter to the name of its field."""
        return {p: kind for kind in self._fields for _, p in getattr(self, kind)}

    def __repr__(self) -> str:
        rows = [
            f"  {kind}: {len(pairs)} tensors, {sum(p.numel() for _, p in pairs):,} parameters"
            for kind, pairs in zip(self._fields, self, strict=True)
        ]
        return "ParameterSplit(\n" + "\n".join(rows) + "\n)"


def split_parameters(
    model: nn.Module, overrides: Mapping[str, str] | None = None
) -> ParameterSplit:
    """Sort a model's trainable parameters for optimizers that orthogonalise matrices.

    Muon and M3 are for the weights of hidden linear maps. Embeddings and the output head are tables
    of rows, one per token, and vectors have no singular values: these are for AdamW. What a tensor
    is, is read off the type of the module that holds it:

    - embedding: weights of ``nn.Embedding`` and ``nn.EmbeddingBag`` and whatever is tied to them;
      the output head (``get_output_embeddings()`` of a Hugging Face model, or a linear layer called
      lm_head, head, classifier, score, unembed...); tensors of a module's own called embed,
      position or token;
    - kernel: weights of convolutions with more than one input channel per group (those of a
      depthwise convolution are filters, one vector per channel);
    - vector: everything in a norm, of fewer than two dimensions or one row or column, or called
      norm, bias, gain, scale or logit;
    - matrix: the rest.

    Args:
        model: any module.
        overrides: shell-style pattern of a parameter name -> ``"matrices"``, ``"kernels"``,
            ``"embeddings"`` or ``"vectors"``; the last pattern that fits decides.

    Raises:
        ValueError: no trainable parameter, an unknown kind, a pattern that fits nothing, or a
            vector that is to be a matrix.

    Example:
        >>> model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 8), nn.LayerNorm(8))
        >>> split = split_parameters(model)
        >>> [name for name, _ in split.matrices], [name for name, _ in split.vectors]
        (['1.weight'], ['1.bias', '2.weight', '2.bias'])
        >>> muon = torch.optim.Muon(split.matrices, lr=1e-3)
        >>> adamw = torch.optim.AdamW(split.embeddings + split.vectors, lr=1e-3)
    """
    overrides = overrides or {}
    for pattern, kind in overrides.items():
        if kind not in ParameterSplit._fields:
            raise ValueError(
                f"overrides[{pattern!r}] must be one of {', '.join(ParameterSplit._fields)}, "
                f"got {kind!r}"
            )
    tables = _tables(model)
    found: dict[str, Named] = {kind: [] for kind in ParameterSplit._fields}
    unused = set(overrides)
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        owner, _, own_name = name.rpartition(".")
        kind = _kind(model.get_submodule(owner), own_name, p, tables)
        for pattern, chosen in overrides.items():
            if fnmatchcase(name, pattern):
                kind = chosen
                unused.discard(pattern)
        if kind in ("matrices", "kernels") and p.ndim < 2:
            raise ValueError(f"{name} has shape {tuple(p.shape)}: a vector cannot be in {kind}")
        found[kind].append((name, p))
    if unused:
        raise ValueError(f"no trainable parameter is called {', '.join(sorted(unused))}")
    if not any(found.values()):
        raise ValueError("the model has no trainable parameter; set requires_grad on some")
    return ParameterSplit(**found)


def _kind(owner: nn.Module, name: str, p: Tensor, tables: set[Tensor]) -> str:
    low = name.lower()
    if p in tables:
        return "embeddings"
    if p.ndim < 2 or "norm" in type(owner).__name__.lower() or any(w in low for w in _VECTORS):
        return "vectors"
    if isinstance(owner, _ConvNd):
        return "vectors" if owner.in_channels == owner.groups else "kernels"
    if 1 in p.shape[-2:]:
        return "vectors"
    own_table = not isinstance(owner, nn.Linear) and any(word in low for word in _EMBEDS)
    return "embeddings" if own_table else "matrices"


def _tables(model: nn.Module) -> set[Tensor]:
    """Weights of embeddings and of the output head."""
    tables: set[Tensor] = set()
    get_head: Any = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    for name, module in model.named_modules():
        called = name.rpartition(".")[2].lower() in _HEADS and isinstance(module, nn.Linear)
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) or called or module is head:
            weight = module._parameters.get("weight")
            if weight is not None:
                tables.add(weight)
    return tables
