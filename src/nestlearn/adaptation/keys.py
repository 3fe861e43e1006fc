"""Keys of added memories: fixed directions that hardly answer to what the model says anyway.

A memory that learns ``V`` in ``y + V K h`` changes the model wherever its keys ``K h`` are large.
If ``K = R (C + c)^{-1}`` with a random R and ``C = E[h h^T]`` over general text, common directions
of h are turned down and the rare ones, which tell one subject from another, are left: what is
learned in one place moves little elsewhere. The general text is what the model itself generates, so
no data is needed. It is Eq. 47's preconditioning, of keys, with the model's own statistics.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nestlearn.adaptation.sites import Site

ROWS, LENGTH = 64, 64
"""Size of the text that a model generates for its keys."""


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
def calibrated_keys(
    model: nn.Module,
    sites: Sequence[Site],
    tokens: Tensor | None,
    rank: int,
    seed: int = 0,
    ridge: float = 0.1,
) -> dict[str, Tensor]:
    """Keys for the memory of every site.

    Args:
        model: a causal language model.
        sites: where memories will be.
        tokens: general text ``(B, T)``; None: random directions, not turned down anywhere.
        rank: keys per site, r.
        seed: of R.
        ridge: what the mean eigenvalue of C is multiplied by and added to it: the smaller, the more
            common directions are turned down.

    Returns:
        path of the site's output map -> keys ``(r, H)``, of few bits (see `quantise`), in which a
        value of 1 in every entry of V changes y by about its own size.

    Raises:
        ValueError: a site that does not run when the model does.
    """
    generator = torch.Generator().manual_seed(seed)
    random = {
        site.output: torch.randn(rank, site.hidden, generator=generator) / site.hidden**0.5
        for site in sites
    }
    if tokens is None:
        return {name: _round(r / rank**0.5) for name, r in random.items()}
    found: dict[str, Tensor] = {}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            h = inputs[0].detach().float().cpu().flatten(0, -2)
            size = output.detach().float().square().mean().sqrt().item()
            found[name] = _turned_down(random[name], h, size, ridge)

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


def preconditioners(
    model: nn.Module,
    sites: Sequence[Site],
    tokens: Tensor,
    seed: int = 0,
    ridge: float = 0.1,
    batch: int = 8,
) -> dict[str, Tensor]:
    """P^(1/2), P the preconditioner of Eq. 47: turns steps away from what the model needs.

    ``P = (F + c)^{-1} c`` with ``F = E[g g^T]``, g the gradient of the log-likelihood of what the
    model itself would say next (Fisher information) at the output of a site. With the keys, which
    do the same for the inputs, it is natural gradient with a Kronecker-factored curvature. The
    square root is what an optimizer is put between: it sees ``P^(1/2) dL/dV`` and its step is
    multiplied by P^(1/2), as if ``V = P^(1/2) U`` and U were learned.

    Args:
        model: a causal language model; its parameters get no gradient.
        sites: where memories are.
        tokens: general text ``(B, T)``.
        seed: of the sampled next tokens.
        ridge: c in units of F's mean eigenvalue: the smaller, the more is turned away.
        batch: rows at a time.

    Returns:
        path of the site's output map -> P^(1/2) ``(D, D)``, symmetric, float32.
    """
    generator = torch.Generator().manual_seed(seed)
    outputs: dict[str, Tensor] = {}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            outputs[name] = torch.zeros_like(output, requires_grad=True)
            return output + outputs[name]

        return hook

    names = [site.output for site in sites]
    sums = {site.output: torch.zeros(site.width, site.width) for site in sites}
    hooks = [model.get_submodule(n).register_forward_hook(watch(n)) for n in names]
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    try:
        for rows in tokens.split(batch):
            with torch.enable_grad():
                out = model(input_ids=rows.to(embeddings.weight.device), use_cache=False)
                logits = out.logits.float().flatten(0, 1)
                chances = logits.detach().softmax(-1).cpu()
                said = torch.multinomial(chances, 1, generator=generator)[:, 0].to(logits.device)
                loss = F.cross_entropy(logits, said, reduction="sum")
                grads = torch.autograd.grad(loss, [outputs[n] for n in names])
            for name, grad in zip(names, grads, strict=True):
                g = grad.float().flatten(0, -2)
                sums[name] += (g.mT @ g).cpu()
    finally:
        for hook in hooks:
            hook.remove()
    return {name: _inverse_root(total, ridge) for name, total in sums.items()}


def _inverse_root(curvature: Tensor, ridge: float) -> Tensor:
    """``(F / c + 1)^{-1/2}``, c = ridge times F's mean eigenvalue."""
    scale = (ridge * curvature.diagonal().double().mean()).clamp(min=1e-300)
    values, vectors = torch.linalg.eigh(curvature.double() / scale)
    return ((vectors * (1 + values.clamp(min=0)).rsqrt()) @ vectors.mT).float()


def _turned_down(random: Tensor, h: Tensor, size: float, ridge: float) -> Tensor:
    """``R (1 + C / c)^{-1}``, c = ridge times C's mean eigenvalue, scaled; ``h (N, H)``."""
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
    answers = F.linear(h, keys).square().mean().sqrt()
    scale = size / (answers.item() * math.sqrt(len(random))) if answers > 0 else 1.0
    return _round(keys * (scale if math.isfinite(scale) and scale > 0 else 1.0))


def quantise(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Keys as integers -127..127 and a power of two per row, as memory files store them.

    Keys are rounded to such numbers when they are made, so this loses nothing, and models in
    float32 and bfloat16 use the same.
    """
    largest = keys.abs().amax(-1, keepdim=True).clamp(min=2.0**-100)
    scale = torch.exp2(torch.ceil(torch.log2(largest.double() / 127))).float()
    return (keys / scale).round().to(torch.int8), scale


def _round(keys: Tensor) -> Tensor:
    integers, scale = quantise(keys.float())
    return integers * scale
