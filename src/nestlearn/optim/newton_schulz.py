"""Newton-Schulz iterations: the nearest orthogonal matrix, without a decomposition (Eq. 44)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

QUINTIC = (3.4445, -4.7750, 2.0315)
"""Coefficients of ``torch.optim.Muon``: steepest at zero, singular values end near 1."""

_SMALL = 1 << 14  # elements of a matrix; below, calling costs more than computing


def newton_schulz(
    matrices: Tensor,
    steps: int = 5,
    coefficients: tuple[float, float, float] = QUINTIC,
    eps: float = 1e-7,
    gram: bool = False,
) -> Tensor:
    """Orthogonalise matrices: singular values become about 1, singular vectors stay (Eq. 44).

        X <- X / ||X||_F,   then  X <- a X + (b X X^T + c (X X^T)^2) X   ``steps`` times

    Five quintic steps leave the singular values between 0.7 and 1.2 where they were at least about
    a thousandth of the norm, with these coefficients; smaller ones grow 480-fold.

    Args:
        matrices: ``(..., m, n)``, any batch in one call; computed in its own dtype.
        steps: number of iterations, at least 1.
        coefficients: ``(a, b, c)``.
        eps: least norm divided by.
        gram: for matrices at least twice as long as wide, iterate on the small ``X X^T`` and apply
            the product of all polynomials at the end, in two parts because its rounding errors
            grow. The same function with a quarter fewer operations, rounded otherwise.

    Returns:
        Like ``matrices``.

    Example:
        >>> newton_schulz(torch.diag(torch.tensor([4.0, 4.0]))).diagonal().round(decimals=1)
        tensor([1.1000, 1.1000])
    """
    tall = matrices.shape[-2] > matrices.shape[-1]
    wide = matrices.mT if tall else matrices
    # Products of transposed bfloat16 matrices are a hundred times slower on some CPUs.
    flat = wide.reshape(-1, *wide.shape[-2:]).contiguous()
    x = flat / torch.linalg.vector_norm(flat, dim=(-2, -1), keepdim=True).clamp(min=eps)
    if torch.is_grad_enabled() and x.requires_grad:
        x = _iterate(x, steps, coefficients)
    elif gram and x.shape[-1] >= 2 * x.shape[-2]:
        pieces = x.split(1) if x.is_cpu and x[:1].numel() > _SMALL else [x]
        done = [_through_gram(piece, steps, coefficients) for piece in pieces]
        x = done[0] if len(done) == 1 else torch.cat(done)
    else:
        # On a CPU the products of one matrix stay in the cache, those of a large batch do not.
        for piece in x.split(1) if x.is_cpu and x[:1].numel() > _SMALL else [x]:
            _iterate_(piece, steps, coefficients)
    x = x.view(wide.shape)
    return x.mT if tall else x


def _iterate(x: Tensor, steps: int, coefficients: tuple[float, float, float]) -> Tensor:
    a, b, c = coefficients
    for _ in range(steps):
        gram = torch.bmm(x, x.mT)
        gram = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, gram, x, beta=a)
    return x


def _iterate_(x: Tensor, steps: int, coefficients: tuple[float, float, float]) -> None:
    """The same in place, with three buffers for all steps: fresh memory costs as much as maths."""
    a, b, c = coefficients
    source, target = x, torch.empty_like(x)
    gram = x.new_empty(x.shape[0], x.shape[1], x.shape[1])
    poly = torch.empty_like(gram)
    for _ in range(steps):
        torch.bmm(source, source.mT, out=gram)
        torch.baddbmm(gram, gram, gram, beta=b, alpha=c, out=poly)
        torch.baddbmm(source, poly, source, beta=a, out=target)
        source, target = target, source
    if source is not x:
        x.copy_(source)


def _through_gram(x: Tensor, steps: int, coefficients: tuple[float, float, float]) -> Tensor:
    """``x <- P_n(A_n) ... P_1(A_1) x`` with ``A = x x^T`` itself updated as ``A <- P A P``."""
    a, b, c = coefficients
    for part in (range(min(3, steps)), range(3, steps)):
        if not part:
            continue
        gram = torch.bmm(x, x.mT)
        product = gram
        for k in part:
            poly = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # P - a I
            if k == part.start:
                product = poly.clone()
                product.diagonal(dim1=-2, dim2=-1).add_(a)
            else:
                product = torch.baddbmm(product, poly, product, beta=a)
            if k + 1 < part.stop:
                half = torch.baddbmm(gram, gram, poly, beta=a)
                gram = torch.baddbmm(half, poly, half, beta=a)
        x = torch.bmm(product, x)
    return x


def orthogonalise(
    matrices: Sequence[Tensor],
    steps: int = 5,
    coefficients: tuple[float, float, float] = QUINTIC,
    dtype: torch.dtype | None = torch.bfloat16,
    gram: bool = False,
) -> list[Tensor]:
    """`newton_schulz` of many matrices: those of one shape in one batched call.

    A matrix and the transpose of another are of one shape. On a CPU large matrices go one by one.

    Args:
        matrices: tensors ``(..., m, n)``.
        steps, coefficients, gram: see `newton_schulz`.
        dtype: what is computed in; None for each matrix's own.

    Returns:
        One tensor per matrix, of its shape, in ``dtype``.

    Example:
        >>> wide, tall = orthogonalise([torch.randn(2, 5), torch.randn(5, 2)])
        >>> wide.shape, tall.shape, tall.dtype
        (torch.Size([2, 5]), torch.Size([5, 2]), torch.bfloat16)
    """
    wide = [x.mT if x.shape[-2] > x.shape[-1] else x for x in matrices]
    batches: dict[Any, list[int]] = {}
    for i, x in enumerate(wide):
        alone = x.is_cpu and x.shape[-2:].numel() > _SMALL
        key = i if alone else (x.shape[-2:], x.device, dtype or x.dtype)
        batches.setdefault(key, []).append(i)
    results = list(wide)
    for members in batches.values():
        pieces = [wide[i].to(dtype or wide[i].dtype) for i in members]
        pieces = [x.flatten(0, -3) if x.ndim > 2 else x.unsqueeze(0) for x in pieces]
        batch = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        done = newton_schulz(batch, steps, coefficients, gram=gram).split([len(x) for x in pieces])
        for i, piece in zip(members, done, strict=True):
            results[i] = piece.view(wide[i].shape)
    return [
        out.mT if x.shape[-2] > x.shape[-1] else out
        for x, out in zip(matrices, results, strict=True)
    ]
