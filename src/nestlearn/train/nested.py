"""Nested levels (Eq. 72): initial states that slower levels learn while a model is trained."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class NestedLevels:
    """The initial states of every nested continuum memory in a model, moved forward step by step.

    Args:
        model: searched for modules of ``kind="nested"`` whose levels learn from the outer loss.

    Example:
        >>> nested = NestedLevels(model)
        >>> optimizer.step(); nested.step()
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules: dict[str, Any] = {
            name: module
            for name, module in model.named_modules()
            if getattr(module, "kind", None) == "nested"
            and callable(getattr(module, "meta_step", None))
            and getattr(module, "levels", [None])[0].error == "outer"
        }
        self._initial = {name: m.initial_weights() for name, m in self._modules.items()}
        self.steps = 0

    def step(self) -> None:
        """After an optimizer step: where a slower level is due, the faster one restarts."""
        self.steps += 1
        for name, module in self._modules.items():
            self._initial[name] = module.meta_step(self.steps, self._initial[name])

    def state_dict(self) -> dict[str, Any]:
        """Steps so far and all initial states."""
        return {"steps": self.steps, "initial": self._initial}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a ``state_dict()``."""
        self.steps = state["steps"]
        for name, stored in state["initial"].items():
            mine: dict[str, Tensor] = self._initial[name]
            self._initial[name] = {k: t.to(mine[k].device) for k, t in stored.items()}
