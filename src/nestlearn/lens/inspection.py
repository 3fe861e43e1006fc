"""``nl.inspect``: the nested system of any model and optimizer."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch.optim import Optimizer

from nestlearn.lens.adapted import AdaptedSystem, is_adapted
from nestlearn.lens.build import Builder
from nestlearn.lens.system import InspectedSystem
from nestlearn.lens.walk import survey

TOKENS = 1024
"""Length of a data point where neither the caller nor the model's configuration says one."""


def inspect(
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    *,
    tokens: int | None = None,
    objective: str = "task loss",
) -> InspectedSystem:
    """The nested system of a model and its optimizer (Def. 1-7, Fig. 3).

    What is updated is a box ``(objective, context, parameters)``: the weights, each memory that the
    optimizer keeps of their gradients, each memory that the model writes while it reads. Boxes are
    sorted into levels by update frequency, in updates per data point; an equally frequent box that
    another needs is faster (Def. 2). Level 1 is the slowest.

    With an optimizer, a data point is a sequence of ``tokens`` tokens (or a sample, for a model
    without tokens) and takes one optimizer step. Without one the model is in context: a data point
    is one token, and the weights' frequency is 0. FLOPs are those of matrix products in a forward
    pass, and of writing the memories: `docs/lens.md` has the formulas.

    Modules and optimizers that no recogniser knows are listed as unknown, never guessed at:
    `nestlearn.lens.register_module`, `nestlearn.lens.register_optimizer`.

    Args:
        model: any module. One that `nestlearn.adapt` gave levels to is shown as `AdaptedSystem`.
        optimizer: what updates it: one, several, or a `nestlearn.optim.MultiRate`; None: nothing
            does.
        tokens: length of a data point; default: what the model's configuration says is its
            longest, else 1,024.
        objective: what is backpropagated, in words.

    Raises:
        ValueError: tokens below 1, an optimizer of other parameters, one for an adapted model
            (which brings its own), a model without parameters or boxes.

    Example:
        >>> mlp = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> system = inspect(mlp, torch.optim.Adam(mlp.parameters()))
        >>> [[box.name for box in level] for level in system.levels]
        [['weights'], ['first moment', 'second moment']]
    """
    if tokens is not None and (not isinstance(tokens, int) or tokens < 1):
        raise ValueError(f"tokens must be an integer, 1 or more, got {tokens!r}")
    if is_adapted(model):
        if optimizer is not None:
            raise ValueError(
                "an adapted model is updated by nl.Learner, with an optimizer of its own: leave "
                "optimizer out"
            )
        return AdaptedSystem.of(model, tokens or _longest(model))
    optimizers = _optimizers(optimizer)
    length = tokens or _longest(model)
    found = survey(model, length, bool(optimizers))
    return Builder(model, found, optimizers, length, objective).system()


def _optimizers(given: Optimizer | Sequence[Optimizer] | None) -> tuple[Optimizer, ...]:
    if given is None:
        return ()
    several = tuple(given) if isinstance(given, Sequence) else (given,)
    for one in several:
        if not isinstance(one, Optimizer):
            raise ValueError(
                f"optimizer must be a torch.optim.Optimizer or a list of them, got {one!r}"
            )
    return several


def _longest(model: nn.Module) -> int:
    config = getattr(model, "config", None)
    longest = getattr(config, "max_position_embeddings", None)
    return longest if isinstance(longest, int) and longest > 0 else TOKENS
