"""One level of a continuum memory: an MLP, its copy in context, and the rule that writes the copy.

    f(theta; x) = W_down s(W_up x)                    theta = theta_0 + Delta, Delta per batch row
    Delta <- Delta - sum_{t in chunk} step_t grad_t   if the level's clock is due, else unchanged

theta_0 are the module's parameters and are never changed by a forward pass. All gradients are
written out by hand, so the outer gradient flows through the writes as through any other layer.
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nestlearn.levels.clock import NEVER, Clock, segments
from nestlearn.levels.level import Level
from nestlearn.memory.structures import ACTIVATIONS
from nestlearn.nn.continuum_state import FastWeights

MAX_PENDING = 512
"""Tokens a level keeps before their error is added up; longer chunks are added up in parts."""

Term = tuple[Tensor, Tensor, Tensor]
"""One weight's part of a write: ``step_t delta_t``, ``a_t`` and the mass."""


class ContinuumBlock(nn.Module):
    """The MLP of one level with its clock, and how it is written in context.

    **The level's own objective** (``error="context"``). Eq. 71 leaves f open. Our reading: the
    level memorises, for each input, a learned value of it, as an associative memory (Def. 1):

        L_t = 1/2 |f(theta; x_t) - v_t|^2,    v_t = gain * V x_t / |V x_t|

    **The step** (also our reading). Both layers are linear in their own input a_t (x_t for up, the
    hidden units for down), and the proximal step of that linear problem (SPEC 3.5) is taken:

        step_t = eta_t / (1 + eta_t |a_t|^2),    eta_t = eta * sigmoid(rate(x_t) - log C)
        Delta <- Delta - sum_t step_t delta_t a_t^T / max(1, sum_t step_t |a_t|^2)

    All delta_t are taken at the chunk's start. One token is the exact proximal step; a chunk is
    divided by its mass where it exceeds 1, so that ``down`` moves at most onto its targets however
    large C, eta or the inputs are. Each row of Delta is kept within max(1, norm of that row of
    theta_0), which bounds the level for every input and length.

    Args:
        dim: D, size of input and output.
        width: H, hidden units.
        activation: ``"silu"`` or ``"gelu"`` (tanh form).
        level: period, source of error, eta.
        slower: nested systems: the level that holds this level's initial state.
        fan: hidden units of all levels whose outputs are added up; the initial ``down`` is scaled
            so that their sum starts with the variance of one MLP. None: H.
    """

    def __init__(
        self,
        dim: int,
        width: int,
        activation: str,
        level: Level,
        slower: Level | None = None,
        fan: int | None = None,
    ) -> None:
        super().__init__()
        self.level = level
        self.slower = slower
        self.clock = level.clock
        self.learns = level.error != "outer" and level.eta > 0 and level.period != NEVER
        self.slope = ACTIVATIONS[activation]
        self.act = F.silu if activation == "silu" else partial(F.gelu, approximate="tanh")
        self.up = nn.Linear(dim, width, bias=False)
        self.down = nn.Linear(width, dim, bias=False)
        bound = 1 / math.sqrt(fan or width)
        nn.init.uniform_(self.down.weight, -bound, bound)
        self.part = Clock(_divisor(level.period)) if level.error == "context" else Clock()
        if level.error == "context":
            self.value = nn.Linear(dim, dim, bias=False)
            self.rate = nn.Linear(dim, 1)
            self.gain = nn.Parameter(torch.ones(()))
            nn.init.zeros_(self.rate.weight)
            nn.init.zeros_(self.rate.bias)

    def forward(self, x: Tensor) -> Tensor:
        """``f(theta_0; x)``: the MLP of a Transformer."""
        return self.down(self.act(self.up(x)))

    def init_fast(self, batch: int, device: torch.device, dtype: torch.dtype) -> FastWeights | None:
        """The state before the first token; None for a level that does not learn."""
        if not self.learns:
            return None
        exact = torch.promote_types(dtype, torch.float32)
        width, dim = self.up.weight.shape
        shapes = ((width, dim), (dim, width))

        def pair() -> tuple[Tensor, ...]:
            return tuple(torch.zeros(batch, *s, device=device, dtype=exact) for s in shapes)

        up, down = pair()
        error: tuple[Tensor, ...] = ()
        if self.part.period != self.clock.period or self.level.error == "online":
            error = (*pair(), torch.zeros(batch, 2, device=device, dtype=exact))
        pending = torch.zeros(batch, self.part.period - 1, dim, device=device, dtype=dtype)
        return FastWeights(up, down, () if self.slower is None else pair(), pending, error)

    def weights(self, fast: FastWeights | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """``theta_0 + Delta``, ``(B, H, D)`` and ``(B, D, H)``, or theta_0 itself."""
        base = (self.up.weight, self.down.weight)
        return (
            _sum(base, fast, dtype) if fast is not None else (base[0].to(dtype), base[1].to(dtype))
        )

    def read(self, x: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden units before the activation and output."""
        z = x @ up.mT
        return z, self.act(z) @ down.mT

    # -- in context -----------------------------------------------------------------------------

    def run(self, x: Tensor, fast: FastWeights, position: int) -> tuple[Tensor, FastWeights]:
        """Read ``x (B, T, D)`` with weights that are written whenever the clock is due."""
        outputs = []
        # Expanded once, so that the outer gradient is summed over rows once and not per chunk.
        base = (
            self.up.weight.expand(x.shape[0], -1, -1),
            self.down.weight.expand(x.shape[0], -1, -1),
        )
        up, down = _sum(base, fast, x.dtype)
        for start, stop in segments([self.part], position, position + x.shape[1]):
            piece = x[:, start - position : stop - position]
            z, y = self.read(piece, up, down)
            outputs.append(y)
            held = self.part.elapsed(start)
            if not self.part.due(stop):
                fast = _hold(fast, piece, held)
                continue
            if held:
                earlier = fast.pending[:, :held].to(x.dtype)
                z_earlier, y_earlier = self.read(earlier, up, down)
                piece, z, y = (
                    torch.cat(both, 1)
                    for both in ((earlier, piece), (z_earlier, z), (y_earlier, y))
                )
                fast = dataclasses.replace(fast, pending=torch.zeros_like(fast.pending))
            terms = self.chunk_terms(piece, z, y, down)
            if not self.clock.due(stop):
                fast = _gather(fast, *terms)
                continue
            fast = self.end_of_period(self.update(fast, *terms), stop)
            up, down = _sum(base, fast, x.dtype)
        return torch.cat(outputs, 1), fast

    def chunk_terms(
        self, x: Tensor, z: Tensor, y: Tensor, down: Tensor, valid: Tensor | None = None
    ) -> tuple[Term, Term]:
        """The write of a chunk, ``sum_t step_t delta_t a_t^T``, as its factors, for up and down.

        Args:
            x, z, y: input, hidden units before the activation and output, ``(B, C, .)``.
            down: the weight that gave ``y``.
            valid: ``(B, C)``, tokens that count; None for all.

        Returns:
            Per weight ``step_t delta_t (B, C, out)``, ``a_t (B, C, in)`` and the mass
            ``sum_t step_t |a_t|^2 (B,)``.
        """
        exact = torch.promote_types(x.dtype, torch.float32)
        value = self.value(x).to(exact)
        norm = torch.linalg.vector_norm(value, dim=-1, keepdim=True)
        target = self.gain * value / norm.clamp_min(torch.finfo(exact).tiny ** 0.5)
        hidden, slope = self.slope(z)
        delta_down = y - target.to(y.dtype)
        delta_up = (delta_down @ down) * slope
        eta = self.level.eta * torch.sigmoid(self.rate(x).to(exact) - math.log(self.level.period))
        if valid is not None:
            eta = eta * valid[..., None]

        def term(delta: Tensor, a: Tensor) -> Term:
            size = a.to(exact).square().sum(-1, keepdim=True)
            step = eta / (1 + eta * size)
            return step.to(delta.dtype) * delta, a, (step * size).sum((1, 2))

        return term(delta_up, x), term(delta_down, hidden)

    def update(
        self, fast: FastWeights, up: Term | None = None, down: Term | None = None
    ) -> FastWeights:
        """Delta after the update with the open chunk's error, of which ``up`` and ``down`` are the
        part that is not yet added up; the error is then forgotten."""
        if fast.error:
            if up is not None and down is not None:
                fast = _gather(fast, up, down)
            mass = fast.error[2].clamp_min(1)[:, :, None, None]
            new_up = fast.up - fast.error[0] / mass[:, 0]
            new_down = fast.down - fast.error[1] / mass[:, 1]
        else:
            assert up is not None and down is not None
            new_up, new_down = _move(fast.up, up), _move(fast.down, down)
        return dataclasses.replace(
            fast,
            up=_bounded(new_up, self.up.weight),
            down=_bounded(new_down, self.down.weight),
            error=tuple(torch.zeros_like(e) for e in fast.error),
        )

    def end_of_period(self, fast: FastWeights, step: int) -> FastWeights:
        """Nested systems: where the slower level is due, it learns the initial state from this
        level's change, and this level starts anew from there (Eq. 72)."""
        if self.slower is None or not self.slower.clock.due(step):
            return fast
        return self.restart(fast)

    def restart(self, fast: FastWeights) -> FastWeights:
        """``start <- start + rho (Delta - start)``, ``Delta <- start`` (rho: the slower level's
        meta_rate).

        Along the chunk, ``start - Delta`` is the sum of the faster level's steps, so this is a
        first-order gradient step on the initial state with that sum as its error.
        """
        assert self.slower is not None
        rho = self.slower.meta_rate
        start = tuple(
            s + rho * (d - s) for s, d in zip(fast.start, (fast.up, fast.down), strict=True)
        )
        return dataclasses.replace(fast, up=start[0], down=start[1], start=start)

    def flush(
        self, fast: FastWeights, position: tuple[int, ...], dtype: torch.dtype
    ) -> FastWeights:
        """Apply the error of an open chunk, for rows at any position."""
        terms: tuple[Term, ...] = ()
        if fast.pending.shape[1]:
            held = torch.tensor([self.part.elapsed(p) for p in position], device=fast.up.device)
            valid = torch.arange(fast.pending.shape[1], device=held.device) < held[:, None]
            up, down = self.weights(fast, dtype)
            x = fast.pending.to(dtype)
            terms = self.chunk_terms(x, *self.read(x, up, down), down, valid)
        if not terms and not fast.error:
            return fast
        fast = self.update(fast, *terms)
        return dataclasses.replace(fast, pending=torch.zeros_like(fast.pending))

    @torch.no_grad()
    def absorb(self, fast: FastWeights) -> None:
        """``theta_0 <- theta_0 + mean over rows of Delta``."""
        self.up.weight += fast.up.mean(0).to(self.up.weight)
        self.down.weight += fast.down.mean(0).to(self.down.weight)

    # -- online ---------------------------------------------------------------------------------

    def errors_from_outside(
        self, fast: FastWeights, x: Tensor, hidden: Tensor, g: Tensor, d: Tensor
    ) -> FastWeights:
        """Add ``eta sum_t g_t a_t^T`` to the open chunk's error."""
        eta = self.level.eta
        nothing = torch.zeros_like(fast.error[2][:, 0])
        return _gather(fast, (eta * d, x, nothing), (eta * g, hidden, nothing))


def _hold(fast: FastWeights, piece: Tensor, held: int) -> FastWeights:
    """Keep the inputs of an open chunk; nothing else is computed until the level is due."""
    pending = fast.pending
    stop = held + piece.shape[1]
    parts = (pending[:, :held], piece.to(pending.dtype), pending[:, stop:])
    return dataclasses.replace(fast, pending=torch.cat(parts, 1))


def _sum(
    base: tuple[Tensor, Tensor], fast: FastWeights, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    return (base[0] + fast.up).to(dtype), (base[1] + fast.down).to(dtype)


def _add_product(total: Tensor, s: Tensor, a: Tensor, sign: int = 1) -> Tensor:
    """``total + sign * s^T a`` in one operation where the types allow."""
    if s.dtype == a.dtype == total.dtype and not torch.is_autocast_enabled(s.device.type):
        return torch.baddbmm(total, s.mT, a, alpha=sign)
    return total + sign * (s.mT @ a).to(total.dtype)


def _move(delta: Tensor, term: Term) -> Tensor:
    """``Delta - sum_t step_t delta_t a_t^T / max(1, mass)``."""
    s, a, mass = term
    return _add_product(delta, s / mass.clamp_min(1)[:, None, None].to(s.dtype), a, -1)


def _gather(fast: FastWeights, up: Term, down: Term) -> FastWeights:
    """Add a part of a chunk to the chunk's error."""
    sums = (_add_product(e, s, a) for e, (s, a, _) in zip(fast.error, (up, down), strict=False))
    return dataclasses.replace(
        fast, error=(*sums, fast.error[2] + torch.stack((up[2], down[2]), -1))
    )


def _bounded(delta: Tensor, base: Tensor) -> Tensor:
    """Rows of Delta, none longer than max(1, that row of theta_0)."""
    if delta.device.type == "cpu" and not torch.compiler.is_compiling():
        with torch.no_grad():  # mostly nothing is too long: save the multiplication by 1
            limit = torch.linalg.vector_norm(base.to(delta.dtype), dim=-1).clamp_min(1)
            if not (torch.linalg.vector_norm(delta, dim=-1) > limit).any():
                return delta
    limit = torch.linalg.vector_norm(base.to(delta.dtype), dim=-1, keepdim=True).clamp_min(1)
    norm = torch.linalg.vector_norm(delta, dim=-1, keepdim=True)
    return delta * (limit / torch.maximum(norm, limit))


def _divisor(period: int) -> int:
    """The largest divisor of ``period`` that is at most MAX_PENDING."""
    if period == NEVER:
        return 1
    return next(n for n in range(min(period, MAX_PENDING), 0, -1) if period % n == 0)
