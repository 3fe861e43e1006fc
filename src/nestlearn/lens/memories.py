"""Recognisers of the library's own layers: memories that are written in context."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from torch import Tensor

from nestlearn.lens.blocks import attention_box, plain
from nestlearn.lens.findings import FastBox, Found, Scope, SlowBox, matrix_flops, tensors
from nestlearn.lens.registry import register_module
from nestlearn.levels.clock import NEVER
from nestlearn.levels.transfer import DirectParametric, Generation, Initialisation
from nestlearn.nn.attention import CausalSelfAttention
from nestlearn.nn.continuum import ContinuumMemory
from nestlearn.nn.continuum_block import ContinuumBlock
from nestlearn.nn.conv import CausalConv
from nestlearn.nn.neural_memory import NeuralMemory
from nestlearn.nn.self_modifying import SelfModifyingTitans

if TYPE_CHECKING:
    from nestlearn.nn.presets import MemorySpec
    from nestlearn.nn.self_memories import MemoryGroup

OBJECTIVES = {
    "dot": "-<M(k), v>",
    "l2": "1/2 |M(k) - v|^2",
    "lp": "|M(k) - v|_p^p",
    "huber": "huber(M(k) - v)",
}
RULES = {
    "hebbian": "-<M k, v> (Eq. 64)",
    "delta": "1/2 |M k - v|^2 (Eq. 65)",
    "oja": "-<M k, v> + 1/2 |M^T v|^2 (Eq. 66-67)",
}
FLOW = "yes: slow gradients flow through the writes"
CUT = "yes, but cut at the boundaries of chunks"
TOKENS = "keys and values of the tokens of one sequence"


def memory_flops(
    matrices: Sequence[Tensor], writes: bool, reads: int = 1, forward: bool = True
) -> float:
    """FLOPs per token of a memory's recurrence, in matrix products.

    With P numbers in its weights, of which F in the first layer: a read is 2 P; a write by the
    gradient of an objective is 2 P forward (none with ``forward=False``: the dot product with a
    matrix), 2 (P - F) backward through the layers and 2 P for the outer products.

    Args:
        matrices: the weights, layer by layer, all heads and memories together.
        writes: whether it is written.
        reads: answers per token, apart from those that the write needs.
        forward: whether the gradient needs the memory's answer.
    """
    sizes = [w.numel() for w in matrices]
    total, first = sum(sizes), sizes[0]
    flops = 2.0 * reads * total
    if writes:
        flops += 2 * total * forward + 2 * (total - first) + 2 * total
    return flops


@register_module(CausalConv)
def _conv(module: CausalConv, scope: Scope) -> Found:
    return Found(flops={module.weight: 2.0 * module.weight.numel()})


@register_module(CausalSelfAttention)
def _attention(module: CausalSelfAttention, scope: Scope) -> Found:
    size = module.qkv.weight.element_size()
    slow = tensors(module)
    box = attention_box(scope.tokens, module.dim, 2 * module.dim, size, slow, module.window)
    return Found(fast=(box,), children=True)


# -- NeuralMemory ------------------------------------------------------------------------------


@register_module(NeuralMemory)
def _neural_memory(module: NeuralMemory, scope: Scope) -> Found:
    """One memory per head; Titans' momentum is a memory of the inner gradients (SPEC §2)."""
    spec = module.spec
    state = module.init_state(1, device=module.gain.device)
    momentum = state.memory.extra[: len(state.memory.weights)] if spec.momentum else ()
    held = _bytes(momentum)
    initial = tuple(module.initial)
    outer = tuple(p for p in module.parameters() if all(p is not w for w in initial))
    rate = Fraction(1) if spec.linear else Fraction(1, spec.chunk)
    memory = FastBox(
        "memory",
        _objective(spec),
        TOKENS,
        _weights(len(initial)),
        rate,
        _solver(spec),
        FLOW,
        state_bytes=state.nbytes - held,
        flops=memory_flops(
            initial, True, forward=spec.rule != "hebbian" and (spec.depth > 1 or _looks(spec))
        ),
        slow=outer,
        initial=initial,
        needs=("memory's momentum",) if spec.momentum else (),
    )
    boxes = [memory]
    if spec.momentum:
        boxes.append(
            FastBox(
                "memory's momentum",
                "-<S, gradient of the memory>",
                "gradients of the memory's objective",
                tuple(f"S{i}" for i in range(1, len(initial) + 1)),
                rate,
                "gradient descent, S <- beta S - eta gradient",
                FLOW,
                state_bytes=held,
                flops=0,
                transfers=(
                    Generation("memory", "memory's momentum"),
                    DirectParametric("memory's momentum", "memory"),
                ),
            )
        )
    flops = matrix_flops([module.in_proj.weight, module.out_proj.weight, module.conv.weight])
    return Found(fast=tuple(boxes), flops=flops)


def _looks(spec: MemorySpec) -> bool:
    """Whether the gradient of a matrix memory depends on what it answers."""
    return spec.linear or spec.objective != "dot" or spec.rule == "dgd"


def _objective(spec: MemorySpec) -> str:
    if spec.linear:
        return RULES[spec.rule]
    text = OBJECTIVES[spec.objective].replace("_p^p", f"_{spec.p:g}^{spec.p:g}")
    return text + (f" over {spec.window} tokens (Eq. 68)" if spec.window > 1 else "")


def _solver(spec: MemorySpec) -> str:
    name = {"dgd": "delta gradient descent (Eq. 57)"}.get(spec.rule, "gradient descent")
    if spec.momentum:
        name += " with momentum"
    kept = {"fixed": "fixed retention", "gate": "retention alpha_t", "kl": "KL retention"}
    if spec.retention in kept:
        name += f", {kept[spec.retention]}"
    return name


def _weights(depth: int) -> tuple[str, ...]:
    return ("M",) if depth == 1 else tuple(f"W{i}" for i in range(1, depth + 1))


def _bytes(found: Sequence[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in found)


# -- self-modifying Titans ---------------------------------------------------------------------


@register_module(SelfModifyingTitans)
def _self_modifying(module: SelfModifyingTitans, scope: Scope) -> Found:
    """The main memory, and the memories that generate what it is written with (SPEC §5)."""
    state = module.init_state(1)
    groups: dict[str, tuple[MemoryGroup, Any, int]] = {
        "memory": (module.memory, state.memory, state.history.nbytes)
    }
    if module.projections is not None:
        groups["projection memories"] = (module.projections, state.projections, 0)
    starts = {id(w) for group, _, _ in groups.values() for w in group.initial}
    outer = tuple(p for p in module.parameters() if id(p) not in starts)
    boxes: list[FastBox] = []
    for name, (group, held, more) in groups.items():
        roles = ", ".join(f"M_{role}" for role in module.adaptive)
        boxes += _group_boxes(name, group, held, more, outer, roles)
    if len(groups) == 2 and module.memory.chunk != module.projections.chunk:  # type: ignore[union-attr]
        # Of equal chunks they are one level: each is written from the states before.
        boxes[-1] = _with_transfer(boxes[-1], Generation("projection memories", "memory"))
    if state.sums is not None:
        boxes.append(
            FastBox(
                "counters",
                RULES["hebbian"] + ", with one key",
                "values of the tokens of one sequence",
                ("M",),
                1,
                "gradient descent",
                FLOW,
                state_bytes=state.sums.nbytes,
                flops=0,
                slow=outer,
            )
        )
    maps = (module.in_conv, module.in_proj, module.count_proj, module.conv, module.scalar_proj,
            module.out_proj)  # fmt: skip
    flops = matrix_flops([m.weight for m in maps if m is not None])
    return Found(fast=tuple(boxes), flops=flops)


def _group_boxes(
    name: str, group: MemoryGroup, state: Any, more: int, outer: tuple[Tensor, ...], roles: str
) -> list[FastBox]:
    main = name == "memory"
    rule, initial = group.rule, tuple(group.initial)
    momenta = state.extra
    own = rule.targets == "generated"
    target = "its own target M(v)" if own else "v"
    objective = OBJECTIVES[rule.objective].replace("v>", "v̂>").replace("- v|", "- v̂|")
    generated = "; " + ("v̂ is " + target if own else "v̂ = v")
    solver = "delta gradient descent (Eq. 88)" if rule.delta else "gradient descent"
    momentum = f"{name}' momentum" if name.endswith("s") else f"{name}'s momentum"
    looks = rule.objective != "dot" or len(initial) > 1 or rule.delta
    # Read with the query (others: with the token), and asked for its own target.
    flops = memory_flops(initial, True, reads=1 + own, forward=looks)
    if not main:
        readout = getattr(group, "readout", {})
        flops += 2.0 * sum(p.numel() for p in readout.values())
    box = FastBox(
        name,
        objective + generated,
        TOKENS + ("" if main else ", which they generate themselves"),
        _weights(len(initial)) if main else tuple(roles.split(", ")),
        Fraction(1, group.chunk),
        solver + (" with momentum" if momenta else ""),
        CUT if group.truncate else FLOW,
        state_bytes=state.nbytes - _bytes(momenta) + more,
        flops=flops,
        slow=outer,
        initial=initial,
        needs=(momentum,) if momenta else (),
    )
    if not momenta:
        return [box]
    kept = FastBox(
        momentum,
        "-<S, gradient of the memory>",
        "gradients of the memory's objective",
        ("S",),
        Fraction(1, group.chunk),
        "gradient descent, S <- beta S - eta gradient",
        FLOW,
        state_bytes=_bytes(momenta),
        flops=0,
        transfers=(Generation(name, momentum), DirectParametric(momentum, name)),
    )
    return [kept, box]


def _with_transfer(box: FastBox, transfer: Generation) -> FastBox:
    return dataclasses.replace(box, transfers=(*box.transfers, transfer))


# -- continuum memory --------------------------------------------------------------------------


@register_module(ContinuumBlock)
def _continuum_block(module: ContinuumBlock, scope: Scope) -> Found:
    return Found(children=True)


@register_module(ContinuumMemory)
def _continuum(module: ContinuumMemory, scope: Scope) -> Found:
    """Levels with outer errors are slow boxes, the others have fast copies (SPEC §6)."""
    slow: list[SlowBox] = []
    fast: list[FastBox] = []
    state = module.init_state(1, device=module.chain[0].up.weight.device)
    nested = module.kind == "nested"
    flops: dict[Tensor, float | None] = {}
    rest = () if module.mix is None else (module.mix,)
    for i, block in enumerate(module.chain):
        name = f"CMS {block.level.name}"
        slower = f"CMS {block.slower.name}" if nested and block.slower is not None else None
        flops |= matrix_flops(tensors(block))
        if not block.learns:
            links = (Initialisation(slower, name),) if slower else ()
            slow.append(SlowBox(name, tensors(block), block.level.period, transfers=links))
            continue
        held = state.levels[i]
        assert held is not None
        online = block.level.error == "online"
        weights = (block.up.weight, block.down.weight)
        # theta_0's products are done with theta_0 + Delta: they are the fast box's work.
        flops |= dict.fromkeys(weights, 0.0)
        fast.append(
            FastBox(
                name,
                "next-token loss of the stream" if online else "1/2 |f(x) - v|^2",
                f"{block.level.period:,} tokens" + ("" if online else " of one sequence"),
                ("Delta up", "Delta down"),
                Fraction(0) if block.level.period == NEVER else Fraction(1, block.level.period),
                "gradient descent" if online else "proximal gradient steps",
                "no: written without a graph" if online else FLOW,
                state_bytes=held.nbytes,
                flops=_block_flops(weights, online),
                slow=(*weights, *rest),
                initial=weights,
                flow=not online,
                transfers=(Initialisation(slower, name),) if slower else (),
            )
        )
    return Found(fast=tuple(fast), slow=tuple(slow), flops=flops)


def _block_flops(weights: tuple[Tensor, Tensor], online: bool) -> float:
    """Read and write; the error of an online level comes from outside."""
    up, down = (w.numel() for w in weights)
    if online:
        return 2.0 * (up + down)
    # The read is the write's forward pass; back through ``down``; outer products.
    return 2.0 * (up + down) + 2 * down + 2 * (up + down)


def register_shells() -> None:
    """Blocks that only put layers together."""
    from nestlearn.models.hope.modeling import HopeBlock

    register_module(HopeBlock)(plain)


register_shells()
