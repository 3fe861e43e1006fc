"""Memories that generate their own targets and are written by delta gradient descent (SPEC §5).

A *group* is N memories per head with the same key stream. Memory n is ``M_n(x)`` of
`nestlearn.memory.structures`, weights ``(B, H, N, out, in)`` per layer. Tokens are columns here,
``(B, H, d, C)``: the first layers of all memories then are one tall matrix, and one matrix product,
one Gram matrix and one factorisation serve the whole group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from nestlearn.nn.pointwise import silu_and_slope, unit
from nestlearn.rules.chunk import ChunkWrite, dgd_chunk, gradient_chunk, proximal
from nestlearn.rules.dgd_write import ChunkDecay, dgd_write, read_per_token

Tensors = tuple[Tensor, ...]


@dataclass(frozen=True)
class WriteRule:
    """How a group is written.

    Attributes:
        retention: what α pulls to, ``"initial"``: the meta-learned initial state M_0,
            ``M_t = M_0 + alpha (M_{t-1} - M_0) - ...``; ``"zero"``: ``M_t = alpha M_{t-1} - ...``.
        targets: ``"generated"``: every memory makes its own, ``v̂ = M(v)`` (Eq. 84); ``"shared"``:
            all get ``v`` (Eq. 79-82).
        objective: ``"dot"``: ``-<M(k), v̂>`` or ``"l2"``: ``1/2 ||M(k) - v̂||^2``.
        delta: True: ``M (alpha I - eta' a a^T) - eta' g a^T`` (DGD, Eq. 88); False: gradient
            descent, ``alpha M - eta' g a^T``.
    """

    objective: str = "dot"
    delta: bool = True
    retention: str = "initial"
    targets: str = "generated"


def respond(weights: Tensors, x: Tensor) -> Tensor:
    """``M_n(x)`` of every memory (Eq. 89, columns): ``(B, H, N, d, C)``.

    ``x`` is ``(B, H, d, C)``, the same for all memories, or ``(B, H, N, d, C)``.
    """
    shared = x.ndim == 4
    y = _first(weights[0], x) if shared else weights[0] @ x
    if len(weights) == 1:
        return y
    for w in weights[1:]:
        y = w @ F.silu(y)
    return (x.unsqueeze(2) if shared else x) + y


def _first(weight: Tensor, x: Tensor) -> Tensor:
    batch, heads, count, out, width = weight.shape
    flat = weight.reshape(batch, heads, count * out, width) @ x
    return flat.view(batch, heads, count, out, x.shape[-1])


def inner_gradients(
    rule: WriteRule, weights: Tensors, keys: Tensor, values: Tensor
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Gradients of every memory's objective at the chunk's initial weights (Eq. 84-87, 90-92).

    Each memory makes its own target ``v̂ = M(v)`` (normalised), unless they are shared; its
    objective is taken at ``M(k)`` and backpropagated through the memory by hand.

    Args:
        rule: which objective.
        weights: layer by layer ``(B, H, N, out, in)``.
        keys, values: ``(B, H, C, d)``, of norm 1.

    Returns:
        Per layer: inputs ``(…, in, C)``, gradients at the output ``(…, out, C)``, and responses
        ``W a (…, out, C)``; the first layer's input is the key itself, ``(B, H, d, C)``.
    """
    k = keys.mT
    inputs, slopes = [k], []
    responses = [_first(weights[0], k)]
    for w in weights[1:]:
        h, slope = silu_and_slope(responses[-1])
        inputs.append(h)
        slopes.append(slope)
        responses.append(w @ h)
    if rule.targets == "generated":
        grad = -unit(respond(weights, values.mT), -2)
    else:
        grad = -values.mT.unsqueeze(2).expand_as(responses[-1])
    if rule.objective == "l2":
        grad = grad + responses[-1]
        if len(weights) > 1:
            grad = grad + k.unsqueeze(2)
    grads = [grad]
    for w, slope in zip(reversed(weights[1:]), reversed(slopes), strict=True):
        grads.append((w.mT @ grads[-1]) * slope)
    grads.reverse()
    return inputs, grads, responses


@dataclass
class Written:
    """One chunk of DGD without momentum, layer by layer.

    Attributes:
        weights: after the chunk, ``(B, H, N, out, in)``.
        fading: the part of the weights before the chunk that retention acts on.
        anchors: the other part, ``(H, N, out, in)``; None: all fades.
        inputs, terms: ``a (B, H, N, in, C)`` (first layer: ``(B, H, d, C)``) and ``u``, see
            `dgd_write`.
        decay: retention, to broadcast over memories; ``tall``: without their axis.
    """

    weights: Tensors
    fading: Tensors
    anchors: Tensors | None
    inputs: list[Tensor]
    terms: list[Tensor]
    decay: ChunkDecay
    tall: ChunkDecay


def write(
    rule: WriteRule,
    weights: Tensors,
    keys: Tensor,
    values: Tensor,
    eta: Tensor,
    alpha: Tensor,
    anchors: Tensors | None = None,
) -> Written:
    """One chunk of DGD without momentum: what `chunk_writes` computes, on the hot path."""
    inputs, grads, responses = inner_gradients(rule, weights, keys, values)
    fading = weights
    if anchors is not None:
        # With M = anchor + D the rule for D is DGD again, the anchor's response joining the
        # gradient: D <- D (alpha I - eta' a a^T) - eta' (g + anchor a) a^T.
        fixed = _anchored(anchors, inputs)
        fading = tuple(w - a for w, a in zip(weights, anchors, strict=True))
        grads = [g + f for g, f in zip(grads, fixed, strict=True)]
        responses = [r - f for r, f in zip(responses, fixed, strict=True)]
    tall = ChunkDecay.from_alpha(alpha)
    # All first layers read the key: one tall memory (B, H, N out, d), one factorisation.
    first, u = dgd_write(
        _tall(fading[0]), inputs[0], _tall(grads[0]), _tall(responses[0]), eta, tall
    )
    new, terms = [first.view_as(weights[0])], [u]
    eta, decay = eta.unsqueeze(2), tall.unsqueeze(2)
    for w, a, g, r in zip(fading[1:], inputs[1:], grads[1:], responses[1:], strict=True):
        after, u = dgd_write(w, a, g, r, eta, decay)
        new.append(after)
        terms.append(u)
    if anchors is not None:
        new = [w + a for w, a in zip(new, anchors, strict=True)]
    return Written(tuple(new), fading, anchors, inputs, terms, decay, tall)


def respond_after(written: Written, x: Tensor) -> Tensor:
    """``M_t(x_t)`` of a group of one memory, each token after its own write.

    Args:
        written: the chunk, of which ``x (B, H, d, n)`` are the last n tokens.

    Returns:
        ``(B, H, d, n)``.
    """
    y = x
    for layer, (w, u) in enumerate(zip(written.fading, written.terms, strict=True)):
        if layer == 0:
            source, a = x, written.inputs[0]
        else:
            source, a, u = F.silu(y), written.inputs[layer].squeeze(2), u.squeeze(2)
        y = read_per_token(w.squeeze(2), a, u, source, written.tall)
        if written.anchors is not None:
            y = y + written.anchors[layer].squeeze(1) @ source
    return y if len(written.fading) == 1 else x + y


def _anchored(anchors: Tensors, inputs: list[Tensor]) -> list[Tensor]:
    """Responses of the anchors, ``(B, H, N, out, C)`` per layer."""
    first = anchors[0].flatten(1, 2) @ inputs[0]
    count = anchors[0].shape[1]
    rest = [w @ a for w, a in zip(anchors[1:], inputs[1:], strict=True)]
    return [first.unflatten(2, (count, -1)), *rest]


def chunk_writes(
    rule: WriteRule,
    weights: Tensors,
    momenta: Tensors,
    keys: Tensor,
    values: Tensor,
    eta: Tensor,
    alpha: Tensor,
    beta: Tensor | None,
    anchors: Tensors | None = None,
) -> list[ChunkWrite]:
    """One chunk of self-referential writes to all memories of a group (Eq. 84-88, 90-93).

    Args:
        rule: objective and kind of write.
        weights: layer by layer ``(B, H, N, out, in)``.
        momenta: like ``weights``, or empty.
        keys, values: ``(B, H, C, d)``, of norm 1.
        eta, alpha: ``(B, H, C)``.
        beta: momentum decay ``(B, H, C)``; needed with ``momenta``.
        anchors: what retention pulls to, ``(H, N, out, in)`` per layer; None: zero.

    Returns:
        The write of every layer, to the weights less their anchors; the first layers of all
        memories are one tall ``(B, H, N out, d)``.
    """
    inputs, grads, responses = inner_gradients(rule, weights, keys, values)
    fixed: list[Tensor | None] = [None] * len(weights)
    if anchors is not None:
        found = _anchored(anchors, inputs)
        weights = tuple(w - a for w, a in zip(weights, anchors, strict=True))
        responses = [r - f for r, f in zip(responses, found, strict=True)]
        fixed = [*found]
    writes = []
    layers = zip(weights, inputs, grads, responses, fixed, strict=True)
    for layer, (w, a, g, r, f) in enumerate(layers):
        s = momenta[layer] if momenta else None
        if layer == 0:
            w, g, r = _tall(w), _tall(g), _tall(r)
            s, f = (None if t is None else _tall(t) for t in (s, f))
        elif layer == 1:
            eta, alpha = eta.unsqueeze(2), alpha.unsqueeze(2)
            beta = None if beta is None else beta.unsqueeze(2)
        offset = None if f is None else f.mT
        writes.append(_write_layer(rule, w, s, a.mT, g.mT, r.mT, offset, eta, alpha, beta))
    return writes


def finish_write(
    writes: list[ChunkWrite], weights: Tensors, anchors: Tensors | None
) -> tuple[Tensors, Tensors]:
    """Weights and momenta after a chunk, in the shapes of ``weights``."""
    new = tuple(c.memory.view_as(w) for c, w in zip(writes, weights, strict=True))
    if anchors is not None:
        new = tuple(w + a for w, a in zip(new, anchors, strict=True))
    momenta = tuple(
        c.momentum.view_as(w)
        for c, w in zip(writes, weights, strict=True)
        if c.momentum is not None
    )
    return new, momenta


def respond_per_token(writes: list[ChunkWrite], x: Tensor, anchors: Tensors | None) -> Tensor:
    """What `respond_after` computes, for writes of any rule: rows ``(B, H, C, d)``."""
    y = x
    for layer, chunk in enumerate(writes):
        source = x if layer == 0 else F.silu(y)
        y = chunk.read(source) if layer == 0 else chunk.read(source.unsqueeze(2)).squeeze(2)
        if anchors is not None:
            y = y + source @ anchors[layer].squeeze(1).mT
    return y if len(writes) == 1 else x + y


def _tall(t: Tensor) -> Tensor:
    """``(B, H, N, out, .) -> (B, H, N out, .)``."""
    return t.reshape(*t.shape[:2], -1, t.shape[-1])


def _write_layer(
    rule: WriteRule,
    weight: Tensor,
    momentum: Tensor | None,
    inputs: Tensor,
    grad: Tensor,
    response: Tensor,
    offset: Tensor | None,
    eta: Tensor,
    alpha: Tensor,
    beta: Tensor | None,
) -> ChunkWrite:
    """One layer; ``inputs (..., C, in)``, ``grad`` and ``response (..., C, out)``."""
    step = proximal(eta, inputs)
    if not rule.delta:
        return gradient_chunk(weight, inputs, grad, step, alpha, S=momentum, beta=beta)
    return dgd_chunk(
        weight,
        inputs,
        grad,
        step,
        alpha,
        S=momentum,
        beta=beta,
        response=response,
        offset=offset,
    )
