"""The lens's recognisers: from a module or an optimizer to what it is. Users add their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from nestlearn.lens.findings import Found, Memory, Rule, Scope

ModuleRecogniser = Callable[[Any, Scope], Found | None]
OptimizerRecogniser = Callable[[Any, dict[str, Any], Tensor], Sequence[Memory] | Rule | None]
Match = type | Callable[[Any], bool]

_MODULES: list[tuple[Match, ModuleRecogniser]] = []
_OPTIMIZERS: list[tuple[Match, OptimizerRecogniser]] = []


def register_module(
    match: type[nn.Module] | Callable[[nn.Module], bool],
) -> Callable[[ModuleRecogniser], ModuleRecogniser]:
    """Teach the lens a kind of module; the newest recogniser that matches is asked first.

    Args:
        match: a class (subclasses match too), or a predicate on a module.

    Returns:
        A decorator for a function ``(module, scope) -> Found``, or None if it is another kind after
        all. `nestlearn.lens.plain` is one: parameters that a slow optimizer trains, no fast state.

    Example:
        >>> class Decay(nn.Module):  # M <- 0.9 M + v k^T for every token
        ...     def __init__(self): super().__init__(); self.qkv = nn.Linear(8, 24)
        >>> @nl.lens.register_module(Decay)
        ... def _(module, scope):
        ...     memory = nl.lens.FastBox("memory", "-<M k, v>", "tokens of one sequence", ("M",), 1,
        ...                              "gradient descent", slow=tuple(module.parameters()))
        ...     return nl.lens.Found(fast=(memory,), children=True)
        >>> nl.inspect(Decay())["memory"].frequency
        Fraction(1, 1)
    """
    return _adder(_MODULES, match)


def register_optimizer(
    match: type[Optimizer] | Callable[[Optimizer], bool],
) -> Callable[[OptimizerRecogniser], OptimizerRecogniser]:
    """Teach the lens a kind of optimizer; the newest recogniser that matches is asked first.

    Args:
        match: a class (subclasses match too), or a predicate on an optimizer.

    Returns:
        A decorator for a function ``(optimizer, group, parameter) -> memories`` (a sequence of
        `nestlearn.lens.Memory`; empty: plain gradient descent), or a `nestlearn.lens.Rule` where
        the parameter has another objective than the task's; or None if it is another kind.

    Example:
        >>> class Heavy(torch.optim.SGD): ...
        >>> @nl.lens.register_optimizer(Heavy)
        ... def _(optimizer, group, parameter):
        ...     return [nl.lens.Memory("impulse", "-<m, gradient>", ("momentum_buffer",), "sum")]
        >>> model = nn.Linear(2, 2)
        >>> nl.inspect(model, Heavy(model.parameters(), lr=1.0)).levels[1][0].name
        'impulse'
    """
    return _adder(_OPTIMIZERS, match)


def recognise(module: nn.Module, scope: Scope) -> Found | None:
    """What the first recogniser that knows the module says; None: nobody knows it."""
    for match, recogniser in reversed(_MODULES):
        if _matches(match, module) and (found := recogniser(module, scope)) is not None:
            return found
    return None


def rule_of(optimizer: Optimizer, group: dict[str, Any], parameter: Tensor) -> Rule | None:
    """How an optimizer updates a parameter; None: nobody knows the optimizer."""
    for match, recogniser in reversed(_OPTIMIZERS):
        if _matches(match, optimizer):
            found = recogniser(optimizer, group, parameter)
            if found is not None:
                return found if isinstance(found, Rule) else Rule(tuple(found))
    return None


def _adder(registry: list[tuple[Match, Any]], match: Match) -> Callable[[Any], Any]:
    if not callable(match):
        raise ValueError(f"match must be a class or a predicate, got {match!r}")

    def add(recogniser: Any) -> Any:
        registry.append((match, recogniser))
        return recogniser

    return add


def _matches(match: Match, thing: Any) -> bool:
    return isinstance(thing, match) if isinstance(match, type) else bool(match(thing))
