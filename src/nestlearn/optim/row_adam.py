"""Adam for tables whose rows learn at different times."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim import Optimizer


class RowAdam(Optimizer):
    """Adam that leaves rows alone while they have no gradient, with one second moment per row.

    For row i of a matrix, at each step at which its gradient g_i is not zero throughout:

        m_i <- b1 m_i + (1 - b1) g_i              v_i <- b2 v_i + (1 - b2) mean(g_i^2)
        w_i <- w_i - lr (m_i / (1 - b1^t_i)) / (sqrt(v_i / (1 - b2^t_i)) + eps)

    t_i counts the row's own steps. In an associative memory a row is one pair's value: Adam would
    go on moving it by its momentum while other pairs are learned, and would take the first steps of
    a new pair for late ones.

    Args:
        params: matrices ``(rows, columns)``, or groups of them.
        lr: length of a step, as a root mean square over the row.
        betas: b1, b2.
        eps: added to the denominator.

    Raises:
        ValueError: values out of range, or a parameter that is no matrix.

    Example:
        >>> w = torch.nn.Parameter(torch.zeros(3, 2))
        >>> w.grad = torch.tensor([[1.0, 1.0], [0.0, 0.0], [-2.0, -2.0]])
        >>> RowAdam([w], lr=0.1).step(); w.data[:, 0]
        tensor([-0.1000,  0.0000,  0.1000])
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.2,
        betas: tuple[float, float] = (0.8, 0.95),
        eps: float = 1e-12,
    ) -> None:
        if not 0 <= lr < float("inf"):
            raise ValueError(f"lr must be 0 or more and finite, got {lr!r}")
        if not all(0 <= b < 1 for b in betas):
            raise ValueError(f"betas must be 0 or more and below 1, got {betas!r}")
        if not eps > 0:
            raise ValueError(f"eps must be more than 0, got {eps!r}")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})
        for group in self.param_groups:
            for p in group["params"]:
                if p.ndim != 2:
                    raise ValueError(f"RowAdam is for matrices, got a shape of {tuple(p.shape)}")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every row that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._step(p, group)
        return loss

    def _step(self, p: torch.Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        if not state:
            state["steps"] = torch.zeros(len(p), device=p.device)
            state["mean"] = torch.zeros_like(p)
            state["square"] = torch.zeros(len(p), dtype=p.dtype, device=p.device)
        g = p.grad
        assert g is not None
        rows = g.any(-1).nonzero()[:, 0]
        if not len(rows):
            return
        g = g[rows]
        first, second = group["betas"]
        steps = state["steps"][rows] + 1
        mean = torch.lerp(g, state["mean"][rows], first)
        square = torch.lerp(g.square().mean(-1), state["square"][rows], second)
        state["steps"][rows], state["mean"][rows], state["square"][rows] = steps, mean, square
        size = (square / (1 - second**steps)).sqrt() + group["eps"]
        p[rows] -= group["lr"] * mean / ((1 - first**steps) * size)[:, None]
