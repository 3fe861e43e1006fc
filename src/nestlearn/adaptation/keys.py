"""What keys of added memories are made of: directions that tell one text from another.

A memory answers where a key resembles one that was written. Hidden activations h of any two places
in a text resemble each other, because some directions are large in all of them. With
``P = R (1 + C / c)^{-1}``, R random and ``C = E[h h^T]`` over general text, those are turned down
in ``k = P h`` and the rare ones are left. The general text is what the model itself generates, so
no data is needed. It is Eq. 47's preconditioning, of keys, with the model's own statistics.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nestlearn.adaptation.sites import Site

ROWS, LENGTH = 64, 64
"""Size of the text that a model generates to know what is common."""


@torch.no_grad()
def generate_text(
    model: nn.Module, rows: int = ROWS, length: int = LENGTH, seed: int = 0
) -> Tensor:
    """Tokens ``(rows, length)`` sampled from a causal language model, each row from a random one.

    Its random numbers are its own; the global generator is not touched.
    """
    generator = torch.Generator().manual_seed(seed)
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    device = embeddings.weight.device
    tokens = torch.randint(embeddings.weight.shape[0], (rows, 1), generator=generator)
    result, cache = tokens, None
    for _ in range(length - 1):
        out = model(input_ids=tokens.to(device), past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        chances = out.logits[:, -1].float().softmax(-1).cpu()
        tokens = torch.multinomial(chances, 1, generator=generator)
        result = torch.cat([result, tokens], 1)
    return result


@torch.no_grad()
def projections(
    model: nn.Module,
    sites: Sequence[Site],
    tokens: Tensor | None,
    rank: int,
    seed: int = 0,
    ridge: float = 0.1,
) -> dict[str, Tensor]:
    """P for the memory of every site.

    Args:
        model: a causal language model.
        sites: where memories will be.
        tokens: general text ``(B, T)``; None: nothing is turned down.
        rank: numbers in a key, r.
        seed: of R.
        ridge: what the mean eigenvalue of C is multiplied by and added to it: the smaller, the more
            common directions are turned down.

    Returns:
        path of the site's output map -> P ``(r, H)``, of few bits (see `quantise`).

    Raises:
        ValueError: a site that does not run when the model does.
    """
    generator = torch.Generator().manual_seed(seed)
    random = {
        site.output: torch.randn(rank, site.hidden, generator=generator) / site.hidden**0.5
        for site in sites
    }
    if tokens is None:
        return {name: rounded(r) for name, r in random.items()}
    found: dict[str, Tensor] = {}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            h = inputs[0].detach().float().cpu().flatten(0, -2)
            found[name] = _turned_down(random[name], h, ridge)

        return hook

    hooks = [
        model.get_submodule(site.output).register_forward_hook(watch(site.output)) for site in sites
    ]
    try:
        embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
        model(input_ids=tokens.to(embeddings.weight.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    missing = [site.output for site in sites if site.output not in found]
    if missing:
        raise ValueError(f"{missing[0]} takes no part when the model runs; choose other sites")
    return found


def _turned_down(random: Tensor, h: Tensor, ridge: float) -> Tensor:
    """``R (1 + C / c)^{-1}``, c = ridge times C's mean eigenvalue; ``h (N, H)``."""
    count, hidden = h.shape
    h, wide = h.double(), random.double()
    level = ridge * h.square().sum().clamp(min=1e-30) / hidden  # c, times N as h^T h is
    # With fewer tokens than directions: (1 + h^T h / c)^{-1} = 1 - h^T (c + h h^T)^{-1} h.
    small = h.mT @ h if hidden <= count else h @ h.mT
    small.diagonal().add_(level)
    factor = torch.linalg.cholesky(small)
    if hidden <= count:
        keys = torch.cholesky_solve(wide.mT * level, factor).mT
    else:
        keys = wide - (torch.cholesky_solve(h @ wide.mT, factor).mT @ h)
    return rounded(keys)


def quantise(keys: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix as integers -127..127 and a power of two per row, as memory files store them.

    Projections and keys are rounded to such numbers when they are made, so this loses nothing, and
    models in float32 and bfloat16 use the same.
    """
    largest = keys.abs().amax(-1, keepdim=True).clamp(min=2.0**-100)
    scale = torch.exp2(torch.ceil(torch.log2(largest.double() / 127))).float()
    return (keys / scale).round().to(torch.int8), scale


def rounded(keys: Tensor) -> Tensor:
    """The nearest matrix that `quantise` loses nothing of."""
    integers, scale = quantise(keys.float())
    return integers * scale
