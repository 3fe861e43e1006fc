"""Continuum memory system: MLP blocks, each updated at its own frequency (SPEC §6, Eq. 70-74)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import Any, cast

import torch
from torch import Tensor, nn

from nestlearn.levels.clock import segments
from nestlearn.levels.level import Level
from nestlearn.nn.continuum_block import ContinuumBlock
from nestlearn.nn.continuum_online import learn_segment
from nestlearn.nn.continuum_state import ContinuumState, check_settings, slower_levels
from nestlearn.nn.ragged import check_input, run_ragged


class ContinuumMemory(nn.Module):
    """A chain of MLPs, level l updated every C^(l) steps with its chunk's error (Eq. 70-74).

        theta_l <- theta_l - sum_{t in chunk} eta_t f(theta_l; x_t)   if i = 0 mod C_l (Eq. 71)

    **Kinds** (h_0 = x, levels chained in the order given):

    - ``"sequential"`` (Eq. 70, 73): ``h_l = h_{l-1} + MLP_l(h_{l-1})``, output ``h_k - h_0``. One
      level is exactly a Transformer's MLP. ``residual=False`` is the literal composition
      ``MLP_k(... MLP_1(x))``. All initial states are learned together by the outer loss.
    - ``"nested"`` (Eq. 72): the same chain; the next slower level learns a level's initial state
      and restarts the level from it whenever the slower level is due (`ContinuumBlock.restart`).
      Periods must be distinct, each a multiple of the next. The initial states themselves live
      until the context ends.
    - ``"independent"`` (Eq. 74): ``sum_l mix_l MLP_l(x)`` with learned ``mix``, 1 at the start: one
      wide MLP, cut into levels.

    **Errors** (`Level.error`; ``error`` here overrides all levels):

    - ``"outer"``: plain parameters and plain backpropagation. ``parameter_groups`` gives
      `nestlearn.optim.MultiRate` each level with its period. For nested levels call ``meta_step``
      after the optimizer.
    - ``"context"``: each row has its own copies ``theta_0 + Delta`` in the state; theta_0 stays
      untouched. The forward pass writes a level when its token clock is due, from the level's own
      objective (`ContinuumBlock`); gradients of the outer loss flow through the writes.
    - ``"online"``: the forward pass reads ``theta_0 + Delta`` and never writes; ``learn`` takes the
      gradient of the next-token loss at this layer's outputs.

    Context and online levels cannot be mixed in one layer; either mixes with outer levels. A level
    that is not due costs its forward pass only (in context: and keeping its inputs; a chunk of more
    than 512 tokens is added up in equal parts of at most that size).

    Args:
        dim: D, size of input and output.
        hidden: H, hidden units of all levels together; the MLPs have ``2 D H`` parameters in all.
            In-context levels have ``D^2 + D + 2`` further ones each (value, rate, gain), an
            independent memory of k > 1 levels k (mix).
        levels: the levels, or None for one outer level of period 1.
        kind, error, residual: see above.
        activation: ``"silu"``, or ``"gelu"`` (tanh form; also as ``"gelu_pytorch_tanh"``).

    Shapes: ``forward(x (B, T, D), state, mask (B, T)) -> (y (B, T, D), state)``.

    Raises:
        ValueError: settings that do not fit together, a state of another batch, empty input.

    Example:
        >>> layer = ContinuumMemory(16, 64, [Level(4, "fast"), Level(16, "slow")], error="context")
        >>> y, state = layer(torch.randn(2, 10, 16))
        >>> y.shape, state.position
        (torch.Size([2, 10, 16]), (10, 10))
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        levels: Sequence[Level] | None = None,
        kind: str = "sequential",
        error: str | None = None,
        activation: str = "silu",
        residual: bool = True,
    ) -> None:
        super().__init__()
        activation = {"gelu_pytorch_tanh": "gelu"}.get(activation, activation)
        chosen = [Level()] if levels is None else list(levels)
        if error is not None:
            chosen = [level.with_error(error) for level in chosen]
        check_settings(dim, hidden, chosen, kind, activation, residual)
        self.dim = dim
        self.hidden = hidden
        self.kind = kind
        self.residual = residual
        self.levels = tuple(
            dataclasses.replace(level, name=level.name or f"level{i}")
            for i, level in enumerate(chosen, 1)
        )
        names = [str(level.name) for level in self.levels]
        reserved = [n for n in names if hasattr(nn.ModuleDict, n)]
        if any(level.half_life is not None for level in self.levels):
            raise ValueError(
                "half_life is for levels of nl.adapt; levels of a ContinuumMemory fade with `fate`"
            )
        if len(set(names)) != len(names) or reserved:
            raise ValueError(f"level names must be unique and not {reserved or ''}, got {names}")
        slower = slower_levels(self.levels) if kind == "nested" else {}
        share, left = divmod(hidden, len(names))
        fan = hidden if residual else None
        self.blocks = nn.ModuleDict(
            {
                name: ContinuumBlock(
                    dim, share + (i < left), activation, level, slower.get(level), fan
                )
                for i, (name, level) in enumerate(zip(names, self.levels, strict=True))
            }
        )
        independent = kind == "independent" and len(names) > 1
        self.mix = nn.Parameter(torch.ones(len(names))) if independent else None
        learning = [
            level.error
            for level, block in zip(self.levels, self.chain, strict=True)
            if block.learns
        ]
        self._error = learning[0] if learning else "outer"

    @property
    def chain(self) -> list[ContinuumBlock]:
        """The levels' MLPs in chain order."""
        return cast("list[ContinuumBlock]", list(self.blocks.values()))

    # -- reading --------------------------------------------------------------------------------

    def init_state(
        self,
        batch_size: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> ContinuumState:
        """The state before the first token: every level at its learned initial state."""
        weight = self.chain[0].up.weight
        place, kind = torch.device(device or weight.device), dtype or weight.dtype
        fast = tuple(block.init_fast(batch_size, place, kind) for block in self.chain)
        return ContinuumState(fast, (0,) * batch_size)

    def forward(
        self, x: Tensor, state: ContinuumState | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, ContinuumState]:
        """Read ``x (B, T, D)``; True in ``mask (B, T)`` marks real tokens, padding gives zeros."""
        self._check_input(x, state, mask)
        if self._error == "context":
            return run_ragged(self._write, x, state, mask, self.init_state)
        if state is None or self._error == "outer":
            y = self.combine(x, lambda block, _, h: block(h))
            state = self.init_state(x.shape[0]) if state is None else state
        else:
            y = self._read(x, state)
        return (y if mask is None else y.masked_fill(~mask.bool()[..., None], 0)), state

    def combine(self, x: Tensor, read: Callable[[ContinuumBlock, int, Tensor], Tensor]) -> Tensor:
        """The levels' outputs, put together as ``kind`` says."""
        chain = self.chain
        if self.kind == "independent":
            outputs = [read(block, i, x) for i, block in enumerate(chain)]
            if self.mix is None:
                return outputs[0]
            weighted = [m * y for m, y in zip(self.mix, outputs, strict=True)]
            return reduce(torch.add, weighted)
        y, h = x, x
        for i, block in enumerate(chain):
            out = read(block, i, h)
            if not self.residual:
                y = h = out
                continue
            y = out if i == 0 else y + out  # h_k - h_0, without the cancellation
            if i + 1 < len(chain):
                h = h + out
        return y

    def _read(self, x: Tensor, state: ContinuumState) -> Tensor:
        def read(block: ContinuumBlock, i: int, h: Tensor) -> Tensor:
            fast = state.levels[i]
            return block(h) if fast is None else block.read(h, *block.weights(fast, h.dtype))[1]

        return self.combine(x, read)

    def _write(self, x: Tensor, state: ContinuumState | None) -> tuple[Tensor, ContinuumState]:
        """In context, all rows at one position."""
        if state is None:
            state = self.init_state(x.shape[0], x.device, x.dtype)
        if state.frozen:
            return self._read(x, state), state
        levels = list(state.levels)
        position = state.position[0]

        def read(block: ContinuumBlock, i: int, h: Tensor) -> Tensor:
            fast = levels[i]
            if fast is None:
                return block(h)
            y, levels[i] = block.run(h, fast, position)
            return y

        y = self.combine(x, read)
        after = tuple(p + x.shape[1] for p in state.position)
        return y, dataclasses.replace(state, levels=tuple(levels), position=after)

    # -- learning online ------------------------------------------------------------------------

    def cut(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Cut a stream's tokens ``start < i <= stop`` where an online or in-context level is due;
        these are the longest segments that `learn` takes."""
        return segments([b.clock for b in self.chain if b.learns], start, stop)

    @torch.no_grad()
    def learn(
        self,
        x: Tensor,
        gradient: Tensor,
        state: ContinuumState | None = None,
        mask: Tensor | None = None,
    ) -> ContinuumState:
        """Learn online from a stream segment (Eq. 71 with the next-token loss's error).

        Each online level adds ``eta sum_t delta_t a_t^T`` to the error of its open chunk and
        applies it when its clock is due; each row of Delta is kept within max(1, norm of that row
        of theta_0). The weights are those that ``forward(x, state)`` read, so no level may be
        due before the segment's last token (`cut` gives such segments).

        Args:
            x: this layer's input ``(B, T, D)``.
            gradient: of the loss at this layer's output, ``(B, T, D)``.
            state: the state with which ``x`` was read.
            mask: ``(B, T)``, True at real tokens; others teach nothing.

        Returns:
            The new state, without a graph.

        Raises:
            ValueError: no level is online, shapes differ, or a level is due inside the segment.
        """
        if self._error != "online":
            raise ValueError(
                "no level of this layer learns online; build it with Level(error='online', eta > 0)"
            )
        self._check_input(x, state, mask)
        if gradient.shape != x.shape:
            raise ValueError(f"gradient is {tuple(gradient.shape)}, the output {tuple(x.shape)}")
        both = torch.cat([x, gradient.to(x.dtype)], -1)
        return run_ragged(partial(learn_segment, self), both, state, mask, self.init_state)[1]

    # -- ends of contexts -----------------------------------------------------------------------

    def end_context(self, state: ContinuumState) -> ContinuumState:
        """The state that opens the next context: every level's clock at 0.

        What an open chunk holds is applied first. Then each level's change meets its ``fate``:
        discarded; kept in the state; or consolidated: its mean over the batch rows is added to
        theta_0, which the next slower level holds (this changes the module's parameters, outside
        any graph). In nested systems the change goes through the initial state that the slower
        level learns, and that is what is kept or consolidated.
        """
        levels = []
        for block, fast in zip(self.chain, state.levels, strict=True):
            if fast is not None:
                fast = block.flush(fast, state.position, block.up.weight.dtype)
                if block.slower is not None:
                    fast = block.restart(fast)
                if block.level.fate == "consolidate":
                    block.absorb(fast)
                if block.level.fate != "keep":
                    fast = fast.map(torch.zeros_like)
            levels.append(fast)
        return dataclasses.replace(state, levels=tuple(levels), position=(0,) * state.batch_size)

    # -- the outer loss -------------------------------------------------------------------------

    def level_parameters(self) -> dict[str, list[nn.Parameter]]:
        """Level name to the parameters that the outer optimizer updates on that level's clock.

        Levels that learn in context or online are not in it: their theta_0 are initial states,
        learned at the slowest level, that is, with all other parameters.
        """
        return {
            str(level.name): list(block.parameters())
            for level, block in zip(self.levels, self.chain, strict=True)
            if level.error == "outer"
        }

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        """Groups for `nestlearn.optim.MultiRate`: one per outer level with its period and
        ``lr * lr_scale``, and one of period 1 for everything else.

        Example:
            >>> layer = ContinuumMemory(4, 8, [Level(1, "fast"), Level(8, "slow", lr_scale=0.5)])
            >>> [(g["level"], g["period"], g["lr"]) for g in layer.parameter_groups(0.1)]
            [('fast', 1, 0.1), ('slow', 8, 0.05)]
        """
        by_level = self.level_parameters()
        groups: list[dict[str, Any]] = [
            {
                "params": by_level[str(level.name)],
                "level": level.name,
                "period": level.period,
                "lr": lr * level.lr_scale,
            }
            for level in self.levels
            if level.error == "outer"
        ]
        taken = {id(p) for group in groups for p in group["params"]}
        rest = [p for p in self.parameters() if id(p) not in taken]
        if rest:
            groups.append({"params": rest, "level": "rest", "period": 1, "lr": lr})
        return groups

    def initial_weights(self) -> dict[str, Tensor]:
        """Nested outer levels: a copy of the faster levels' parameters, their initial states now.
        Keep it (and save it) beside the optimizer for ``meta_step``."""
        return {
            f"{name}.{part}": parameter.detach().clone()
            for name, block in self.blocks.items()
            if cast(ContinuumBlock, block).slower is not None
            for part, parameter in block.named_parameters()
        }

    @torch.no_grad()
    def meta_step(self, step: int, initial: dict[str, Tensor]) -> dict[str, Tensor]:
        """Nested outer levels, after optimizer step ``step`` (from 1): where a slower level is due,
        ``theta_init <- theta_init + rho (theta - theta_init)`` and the faster level restarts there
        (Eq. 72; rho: the slower level's meta_rate).

        Args:
            step: optimizer steps so far.
            initial: what ``initial_weights`` or the last call returned.

        Returns:
            The initial states now.

        Raises:
            ValueError: this is not a nested layer with outer levels.
        """
        if self.kind != "nested" or self.levels[0].error != "outer":
            raise ValueError("meta_step is for kind='nested' with error='outer'")
        initial = dict(initial)
        for name, block in self.blocks.items():
            slower = cast(ContinuumBlock, block).slower
            if slower is None or not slower.clock.due(step):
                continue
            for part, parameter in block.named_parameters():
                key = f"{name}.{part}"
                initial[key] = torch.lerp(initial[key], parameter.detach(), slower.meta_rate)
                parameter.copy_(initial[key])
        return initial

    # -- validation -----------------------------------------------------------------------------

    def _check_input(self, x: Tensor, state: ContinuumState | None, mask: Tensor | None) -> None:
        if state is not None and (
            not isinstance(state, ContinuumState) or len(state.levels) != len(self.levels)
        ):
            raise ValueError("this state comes from another layer; begin with state=None")
        check_input(x, state, mask, self.dim)

    def extra_repr(self) -> str:
        rows = ", ".join(f"{v.name}: every {v.period} {v.unit}s ({v.error})" for v in self.levels)
        return f"kind={self.kind!r}, {rows}"
