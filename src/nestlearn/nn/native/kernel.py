"""Self-modifying memories on a CPU: whole sequences of chunks in one call, with its gradient.

`run_chunks` computes what `nestlearn.nn.scan.scan` computes with the cells of
`nestlearn.nn.self_memories`, for delta gradient descent and gradient descent, with momentum or
without. It is in C++ because a chunk is some hundred small operations on matrices that fit into the
cache: as PyTorch operations, two thirds of the time are dispatch and memory traffic.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nestlearn.nn.native.build import load

Tensors = tuple[Tensor, ...]
ROLES = ("k", "v", "q", "eta", "alpha")
VECTORS = ("k", "v", "q")
MAX_DEPTH = 4
LANES = 16  # float32 numbers of a vector: chunks of a multiple are fastest
_SUFFIX = {torch.float32: "f32", torch.float64: "f64"}


class _Problem(ctypes.Structure):
    """Mirrors ``Problem`` in kernel.cpp."""

    _fields_ = [
        *((n, ctypes.c_int64) for n in ("units", "heads", "count", "size", "hidden", "depth")),
        *((n, ctypes.c_int64) for n in ("chunk", "chunks", "l2", "token", "projections")),
        *((n, ctypes.c_int64) for n in ("anchored", "shared_targets", "truncate")),
        *((n, ctypes.c_int64) for n in ("delta", "momentum")),
        ("memory_of", ctypes.c_int64 * len(ROLES)),
        *((n, ctypes.c_double) for n in ("eta_max", "threshold")),
        ("next", ctypes.c_int64),
        *((n, ctypes.c_void_p * MAX_DEPTH) for n in ("weights", "initial", "bounds")),
        ("trajectory", ctypes.c_void_p * MAX_DEPTH),
        ("row_scales", ctypes.c_void_p * MAX_DEPTH),
        *((n, ctypes.c_void_p * MAX_DEPTH) for n in ("momenta", "momenta_trajectory")),
        ("decay", ctypes.c_void_p),
        ("x", ctypes.c_void_p * len(VECTORS)),
        ("roles", ctypes.c_void_p * len(ROLES)),
        ("out", ctypes.c_void_p),
        ("readout", ctypes.c_void_p * 2),
        ("bias", ctypes.c_void_p * 2),
        *((n, ctypes.c_void_p * MAX_DEPTH) for n in ("g_weights", "g_initial", "g_momenta")),
        ("g_decay", ctypes.c_void_p),
        ("g_x", ctypes.c_void_p * len(VECTORS)),
        ("g_roles", ctypes.c_void_p * len(ROLES)),
        ("g_out", ctypes.c_void_p),
        ("g_readout", ctypes.c_void_p * 2),
        ("g_bias", ctypes.c_void_p * 2),
    ]


@dataclass(frozen=True)
class Plan:
    """What a group of memories does in a run.

    Attributes:
        chunk: C.
        objective: ``"dot"`` or ``"l2"``.
        generated: roles made by the group's memories, in their order; empty: the group is one
            memory that is read with q.
        token: read after each token's own write, else at the chunk's start.
        eta_max, threshold: of generated η, see `nestlearn.nn.gates.Gates`.
        anchored: retention pulls to the initial states, else to zero.
        generated_targets: memories make their own targets, else they get v.
        truncate: the outer gradient passes no chunk's boundary, but goes to the initial states.
        delta: delta gradient descent, else gradient descent.
        momentum: momenta are kept.
    """

    chunk: int
    objective: str
    anchored: bool
    generated_targets: bool
    truncate: bool
    delta: bool
    momentum: bool
    generated: tuple[str, ...] = ()
    token: bool = True
    eta_max: float = 1.0
    threshold: float = 0.0


_switch = threading.local()


@contextlib.contextmanager
def disabled() -> Iterator[None]:
    """Within it, this thread runs memories as PyTorch operations (to compare, or to differentiate
    twice)."""
    before = getattr(_switch, "off", False)
    _switch.off = True
    try:
        yield
    finally:
        _switch.off = before


def usable(memory: Tensors) -> bool:
    """True where the kernel can run on these weights: CPU, float32 or float64, not traced."""
    w = memory[0]
    if w.device.type != "cpu" or w.dtype not in _SUFFIX or torch.compiler.is_compiling():
        return False
    return not getattr(_switch, "off", False) and _loaded()


@functools.cache
def _loaded() -> bool:
    library, reason = load()
    if library is not None:
        library.problem_size.restype = ctypes.c_int64
        if library.problem_size() != ctypes.sizeof(_Problem):
            raise RuntimeError("nestlearn changed while this process ran; start it again")
    if library is None and not reason.startswith("turned off"):
        warnings.warn(
            "nestlearn runs self-modifying memories as PyTorch operations, two to three times "
            f"slower than its kernel: {reason}. NESTLEARN_NATIVE=0 silences this.",
            RuntimeWarning,
            stacklevel=2,
        )
    return library is not None


def run_chunks(
    plan: Plan,
    weights: Tensors,
    bounds: Tensors,
    initial: Tensors,
    roles: dict[str, Tensor],
    x: dict[str, Tensor] | None = None,
    readouts: dict[str, Tensor] | None = None,
    biases: dict[str, Tensor] | None = None,
    decay: Tensor | None = None,
) -> tuple[dict[str, Tensor], Tensor | None, Tensors]:
    """Whole chunks of self-referential writes to a group of memories (Eq. 83-93).

    Args:
        plan: what kind of group.
        weights: per layer ``(B, H, N, out, in)``, before the first token; with momentum
            followed by the momenta, of the same shapes.
        bounds: row-norm bounds ``(H, N, out, 1)`` per layer.
        initial: the initial states, ``(H, N, out, in)`` per layer.
        roles: those that are given: vectors ``(B, H, T, d)`` of norm 1, scalars ``(B, H, T)``; T is
            a multiple of C.
        x: what the memories generate the other roles from, ``(B, H, T, d)`` each: a vector role
            from its own, η and α from v's.
        readouts, biases: of generated η and α, ``(H, d)`` and ``(H,)``.
        decay: of the momenta, ``(H,)``; None without momentum.

    Returns:
        The generated roles; the read-out ``(B, H, T, d)`` of a group that is read; the weights
        (and momenta) after the last token. Differentiable once in all of weights, roles, x,
        readouts, biases and decay.
    """
    x, readouts, biases = x or {}, readouts or {}, biases or {}
    names = tuple(roles)
    tensors = [
        *weights,
        *(() if decay is None else (decay,)),
        *initial,
        *(roles[n] for n in names),
        *x.values(),
        *(group[n] for group in (readouts, biases) for n in ("eta", "alpha") if n in group),
    ]
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    scalars = tuple(n for n in ("eta", "alpha") if n in readouts)
    results = _Run.apply(plan, bounds, names, tuple(x), scalars, keep, *tensors)
    made = dict(zip(plan.generated, results, strict=False))
    rest = results[len(plan.generated) :]
    if plan.generated:
        return made, None, rest
    return made, rest[0], rest[1:]


class _Run(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan, bounds, names, sources, scalars, keep, *tensors):
        depth = len(bounds)
        rest = [t.contiguous() for t in tensors]
        state = [w.clone() for w in _take(rest, depth + depth * plan.momentum)]
        weights = state[:depth]  # momenta come behind
        saved = list(rest)
        decay = _take(rest, int(plan.momentum))
        initial = _take(rest, depth)
        batch, heads, count, *_ = weights[0].shape
        given = dict(zip(names, _take(rest, len(names)), strict=True))
        x = dict(zip(sources, _take(rest, len(sources)), strict=True))
        like = next(iter(x.values())) if x else given["k"]
        length, size = like.shape[2:]
        chunks = length // plan.chunk
        roles = dict(given)
        for name in plan.generated:
            shape = (batch, heads, length, *((size,) if name in VECTORS else ()))
            roles[name] = like.new_empty(shape)
        out = None if plan.generated else torch.empty_like(like)
        trajectory: list[Tensor] = []
        scales: list[Tensor] = []
        if keep:
            trajectory = [w.new_empty(batch, heads, chunks, *w.shape[2:]) for w in state]
            scales = [w.new_empty(batch, heads, chunks, *w.shape[2:4]) for w in weights]
        ctx.plan, ctx.names, ctx.sources, ctx.scalars = plan, names, sources, scalars
        ctx.depth = depth
        problem = _problem(ctx, state, decay, initial, roles, out, x, rest, trajectory, scales)
        bounds = [b.to(like.dtype).contiguous() for b in bounds]
        _point(problem.bounds, bounds)
        _call("forward", problem, like.dtype)
        made = (roles[n] for n in plan.generated)
        results = (*made, *(() if out is None else (out,)), *state)
        if keep:
            ctx.save_for_backward(*saved, *trajectory, *scales, *results)
        return results

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor):
        plan, names, depth = ctx.plan, ctx.names, ctx.depth
        saved = list(ctx.saved_tensors)
        decay = _take(saved, int(plan.momentum))
        initial = _take(saved, depth)
        given = dict(zip(names, _take(saved, len(names)), strict=True))
        x = dict(zip(ctx.sources, _take(saved, len(ctx.sources)), strict=True))
        gates = _take(saved, 2 * len(ctx.scalars))
        trajectory = _take(saved, depth + depth * plan.momentum)
        scales = _take(saved, depth)
        made = _take(saved, len(plan.generated))
        out = None if plan.generated else saved.pop(0)
        roles = given | dict(zip(plan.generated, made, strict=True))
        grads = tuple(g.contiguous() for g in grads)
        last = len(trajectory)
        g_weights = [g.clone() for g in grads[-last:]]
        g_roles = {n: torch.empty_like(t) for n, t in given.items()}
        g_x = {n: torch.empty_like(t) for n, t in x.items()}
        batch, heads = trajectory[0].shape[:2]
        g_gates = [g.new_zeros(batch, *g.shape) for g in gates]
        g_initial = [w.new_zeros(batch, *w.shape) for w in initial]
        problem = _problem(ctx, saved, decay, initial, roles, out, x, gates, trajectory, scales)
        _point(problem.g_initial, g_initial)
        _point(problem.g_weights, g_weights[:depth])
        g_decay = [t.new_zeros(batch, heads) for t in decay]
        _point(problem.g_momenta, g_weights[depth:])
        if g_decay:
            problem.g_decay = g_decay[0].data_ptr()
        for name, grad in (g_roles | dict(zip(plan.generated, grads, strict=False))).items():
            problem.g_roles[ROLES.index(name)] = grad.data_ptr()
        if out is not None:
            problem.g_out = grads[0].data_ptr()
        _point_vectors(problem.g_x, g_x)
        _point_gates(ctx.scalars, g_gates, problem.g_readout, problem.g_bias)
        _call("backward", problem, trajectory[0].dtype)
        of_decay, shared, summed = (
            [g.sum(0) for g in group] for group in (g_decay, g_initial, g_gates)
        )
        given_back = (g_roles[n] for n in names)
        return (None,) * 6 + (
            *g_weights, *of_decay, *shared, *given_back, *g_x.values(), *summed
        )  # fmt: skip


def _problem(ctx, weights, decay, initial, roles, out, x, gates, trajectory, scales) -> _Problem:
    plan = ctx.plan
    first, last = weights[0], weights[ctx.depth - 1]
    batch, heads, count = first.shape[:3]
    problem = _Problem(
        units=batch * heads,
        heads=heads,
        count=count,
        size=last.shape[3],
        hidden=first.shape[3],
        depth=ctx.depth,
        chunk=plan.chunk,
        chunks=roles["k"].shape[2] // plan.chunk,
        l2=plan.objective == "l2",
        token=plan.token,
        projections=bool(plan.generated),
        anchored=plan.anchored,
        shared_targets=not plan.generated_targets,
        truncate=plan.truncate,
        delta=plan.delta,
        momentum=plan.momentum,
        eta_max=plan.eta_max,
        threshold=plan.threshold,
    )
    for i, role in enumerate(ROLES):
        problem.memory_of[i] = plan.generated.index(role) if role in plan.generated else -1
        if role in roles:
            problem.roles[i] = roles[role].data_ptr()
    depth = ctx.depth
    _point(problem.weights, weights[:depth])
    _point(problem.momenta, weights[depth:])
    if decay:
        problem.decay = decay[0].data_ptr()
    _point(problem.initial, initial)
    _point(problem.trajectory, trajectory[:depth])
    _point(problem.momenta_trajectory, trajectory[depth:])
    _point(problem.row_scales, scales)
    if out is not None:
        problem.out = out.data_ptr()
    _point_vectors(problem.x, x)
    _point_gates(ctx.scalars, gates, problem.readout, problem.bias)
    return problem


def _take(tensors: list[Tensor], count: int) -> list[Tensor]:
    taken = tensors[:count]
    del tensors[:count]
    return taken


def _point(field: Any, tensors: Any) -> None:
    for i, tensor in enumerate(tensors):
        field[i] = tensor.data_ptr()


def _point_vectors(field: Any, tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        field[VECTORS.index(name)] = tensor.data_ptr()


def _point_gates(scalars: tuple[str, ...], tensors: Any, readout: Any, bias: Any) -> None:
    """``tensors``: the read-outs of ``scalars``, then their biases."""
    for i, name in enumerate(scalars):
        slot = ROLES.index(name) - len(VECTORS)
        readout[slot] = tensors[i].data_ptr()
        bias[slot] = tensors[i + len(scalars)].data_ptr()


def _call(direction: str, problem: _Problem, dtype: torch.dtype) -> None:
    """Run the kernel in as many threads as PyTorch uses; heads of rows are shared out."""
    library, _ = load()
    work: Callable[[Any], None] = getattr(library, f"{direction}_{_SUFFIX[dtype]}")
    threads = min(torch.get_num_threads(), problem.units)
    reference = ctypes.byref(problem)
    if threads == 1:
        work(reference)
        return
    pool = _pool(os.getpid(), threads - 1)
    others = [pool.submit(work, reference) for _ in range(threads - 1)]
    work(reference)
    for other in others:
        other.result()


@functools.lru_cache(maxsize=2)
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="nestlearn")
