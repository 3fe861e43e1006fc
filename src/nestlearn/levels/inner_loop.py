"""A two-level system by hand: a fast level that learns in an inner loop, and a slow one around it.

    fast:  theta_0 from the slow level,  theta_i = theta_(i-1) - eta grad L(theta_(i-1); context)
    slow:  phi <- phi - outer optimizer of  grad_phi mean over contexts of L_outer(theta_k; query)

What passes between them is said with the transfers of `nestlearn.levels.transfer`; each kind does
its part in every episode. Initialisation with backpropagation is MAML, generation of weights a
hypernetwork.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from nestlearn.levels.transfer import (
    Backpropagation,
    DirectNonParametric,
    Episode,
    Generation,
    Initialisation,
    Transfer,
)

Parameters = Mapping[str, Tensor]


class InnerLoop:
    """The fast level: k steps of gradient descent on a context, as a function of its start.

        theta_i = theta_(i-1) - lr * grad L(theta_(i-1); context),    i = 1 ... k

    Nothing is stored: parameters come in and go out, so the same loop serves any number of contexts
    at once (``torch.func.vmap``).

    Args:
        module: gives the function; its parameters' names and shapes are the level's.
        objective: ``objective(module(x), *rest)`` for a context ``(x, *rest)``: a scalar.
        steps: k; 0: the level only receives its parameters.
        lr: inner learning rate eta.

    Raises:
        ValueError: a module without parameters, a negative number of steps, an lr that is not
            above 0 and finite.

    Example:
        >>> loop = InnerLoop(nn.Linear(1, 1), nn.functional.mse_loss, steps=3, lr=0.1)
        >>> x = torch.randn(8, 1)
        >>> learned = loop.learn(loop.parameters(), (x, 2 * x))
        >>> loop.read(learned, x).shape
        torch.Size([8, 1])
    """

    def __init__(
        self, module: nn.Module, objective: Callable[..., Tensor], steps: int = 1, lr: float = 0.01
    ) -> None:
        if not any(True for _ in module.parameters()):
            raise ValueError(f"{type(module).__name__} has no parameters that a level could learn")
        if not isinstance(steps, int) or isinstance(steps, bool) or steps < 0:
            raise ValueError(f"steps must be an integer, 0 or more, got {steps!r}")
        if not (math.isfinite(lr) and lr > 0):
            raise ValueError(f"lr must be above 0 and finite, got {lr!r}")
        self.module, self.objective, self.steps, self.lr = module, objective, steps, lr

    def parameters(self) -> dict[str, Tensor]:
        """The module's own parameters, by name."""
        return dict(self.module.named_parameters())

    @property
    def size(self) -> int:
        """How many numbers the level learns."""
        return sum(p.numel() for p in self.module.parameters())

    def read(self, parameters: Parameters, x: Any) -> Any:
        """``module(x)`` with these parameters."""
        return functional_call(self.module, dict(parameters), (x,))

    def loss(self, parameters: Parameters, context: tuple[Any, ...]) -> Tensor:
        """The level's objective on a context."""
        return self.objective(self.read(parameters, context[0]), *context[1:])

    def learn(
        self, parameters: Parameters, context: tuple[Any, ...], through: bool = True
    ) -> dict[str, Tensor]:
        """The parameters after k steps.

        Args:
            parameters: theta_0.
            context: inputs, then what the objective compares outputs with.
            through: whether gradients of the result flow through the steps (second order).
                Without, each step is a constant: d theta_k / d theta_0 is taken as the identity.
        """
        learned = dict(parameters)
        for _ in range(self.steps):
            at = learned if through else {name: p.detach() for name, p in learned.items()}
            slope = grad(self.loss)(at, context)
            if not through:  # the context may come from a graph as well
                slope = {name: g.detach() for name, g in slope.items()}
            learned = {name: p - self.lr * slope[name] for name, p in learned.items()}
        return learned

    def unflatten(self, flat: Tensor) -> dict[str, Tensor]:
        """A vector of `size` numbers as parameters, in the module's order.

        Raises:
            ValueError: another size.
        """
        if flat.numel() != self.size:
            raise ValueError(
                f"the level has {self.size} parameters, what was generated has {flat.numel()}; "
                "give the generator that many outputs"
            )
        names, tensors = zip(*self.module.named_parameters(), strict=True)
        parts = flat.flatten().split([p.numel() for p in tensors])
        return {n: v.view_as(p) for n, p, v in zip(names, tensors, parts, strict=True)}


class TwoLevel(nn.Module):
    """A slow level around a fast one (§3.3, Eq. 24-28); its parameters are the slow level's.

    Transfers say what passes between the two, and name them:

    - ``Initialisation(slow, fast)``: the fast level starts from the slow level's parameters
      (Eq. 28; MAML). The slow module then has the fast one's parameters; by default it is the fast
      level's own module.
    - ``Generation(slow, fast, generates="weights")``: it starts from ``slow(*context)``, a vector
      of `InnerLoop.size` numbers (a hypernetwork). ``generates="context"``: it learns from
      ``slow(*context)`` instead of the context.
    - ``DirectParametric(fast, slow)``: the answer is ``slow(query, fast answer)`` (Eq. 24-26).
    - ``DirectNonParametric(fast, slow)``: the answer is ``slow(query, *context)`` (Eq. 27), and
      there is no inner loop: the fast box is the context itself.
    - ``Backpropagation(slow, fast)``: the slow level's gradient flows through the fast level's
      steps; leave it out for the first-order approximation.

    A fast level that is neither initialised nor generated starts from its module's parameters as
    they are, every time.

    Args:
        fast: the inner loop; None with ``DirectNonParametric``.
        transfers: see above.
        slow: the slow level's module, where it is not the fast level's own.
        objective: of the slow level, ``objective(answer, *rest)``; default: the fast level's.

    Shapes: ``forward(context, query)`` is one episode; ``loss(context, query)`` takes tensors with
    a leading axis of episodes and gives the mean of the slow objective, to be differentiated.

    Raises:
        ValueError: transfers that name more than two levels, contradict each other or the modules.

    Example:
        >>> net = nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 1))
        >>> task = InnerLoop(net, nn.functional.mse_loss, steps=1, lr=0.01)
        >>> maml = TwoLevel(task, [Initialisation("meta", "task"), Backpropagation("meta", "task")])
        >>> x = torch.randn(4, 10, 1)
        >>> maml.loss((x, x.sin()), (x, x.sin())).backward()
    """

    def __init__(
        self,
        fast: InnerLoop | None,
        transfers: Sequence[Transfer],
        slow: nn.Module | None = None,
        objective: Callable[..., Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.transfers = tuple(transfers)
        self.slow_name, self.fast_name = _names(self.transfers)
        if fast is None and objective is None:
            raise ValueError("without a fast level that has one, give the slow level an objective")
        if slow is None:
            if fast is None or not self.has(Initialisation):
                raise ValueError(
                    "give the slow level's module; only with Initialisation it is the fast level's"
                )
            slow = fast.module
        self._check(fast, slow)
        if fast is not None and self.starts_fixed:
            # The same start every time: never trained, but moved and saved with the rest.
            self.start = copy.deepcopy(fast.module).requires_grad_(False)
            fast = InnerLoop(self.start, fast.objective, fast.steps, fast.lr)
        self.slow = slow
        self.fast = fast
        self.objective: Callable[..., Tensor] = objective or fast.objective  # type: ignore[union-attr]

    def has(self, kind: type[Transfer]) -> bool:
        """Whether a transfer of this kind is among the transfers."""
        return any(isinstance(t, kind) for t in self.transfers)

    @property
    def starts_fixed(self) -> bool:
        """Whether the fast level's start comes from no transfer."""
        given = self.has(Initialisation) or self.generates("weights")
        return not given and not self.has(DirectNonParametric)

    def generates(self, what: str) -> bool:
        """Whether the slow level generates the fast one's ``"weights"`` or ``"context"``."""
        return any(isinstance(t, Generation) and t.generates == what for t in self.transfers)

    def _check(self, fast: InnerLoop | None, slow: nn.Module) -> None:
        bare = self.has(DirectNonParametric)
        if bare == (fast is not None):
            raise ValueError(
                "DirectNonParametric conditions on the context itself and goes with fast=None; "
                "every other transfer needs an InnerLoop"
            )
        if bare and len(self.transfers) > 1:
            raise ValueError("DirectNonParametric has no fast parameters for another transfer")
        if sum(not isinstance(t, Backpropagation) for t in self.transfers) > 1:
            raise ValueError(
                "the slow module does one thing: hold the initial state, generate or answer; for "
                "more, combine them in a module of your own"
            )
        if self.generates("context") and not (self.has(Backpropagation) and fast and fast.steps):
            raise ValueError(
                "a generated context reaches the answer through the fast level's steps only: add "
                "Backpropagation(slow, fast), and steps >= 1"
            )
        if fast is not None and self.has(Initialisation):
            wanted = {n: p.shape for n, p in fast.module.named_parameters()}
            if {n: p.shape for n, p in slow.named_parameters()} != wanted:
                raise ValueError(
                    "with Initialisation the slow module must have the parameters of the fast one"
                )

    def learn(self, context: tuple[Any, ...]) -> dict[str, Tensor]:
        """The fast level's parameters after one context."""
        episode = self._begin(context, None)
        if self.fast is None:
            return {}
        return self.fast.learn(episode.initial, episode.context, episode.through)

    def forward(self, context: tuple[Any, ...], query: Any) -> Any:
        """One episode: the answer to ``query`` after the fast level has seen ``context``."""
        episode = self._begin(context, query)
        if self.fast is not None:
            learned = self.fast.learn(episode.initial, episode.context, episode.through)
            episode.output = self.fast.read(learned, query)
        for transfer in self.transfers:
            transfer.after(self.slow, self.fast, episode)
        return episode.output

    def _begin(self, context: tuple[Any, ...], query: Any) -> Episode:
        start = {} if self.fast is None else self.fast.parameters()
        episode = Episode(tuple(context), query, start)
        for transfer in self.transfers:
            transfer.before(self.slow, self.fast, episode)
        return episode

    def episodes(self, context: tuple[Tensor, ...], query: Tensor) -> Any:
        """`forward` for every entry of the tensors' leading axis."""
        return vmap(self.forward, randomness="different")(tuple(context), query)

    def loss(self, context: tuple[Tensor, ...], query: tuple[Tensor, ...]) -> Tensor:
        """Mean over episodes of the slow level's objective.

        Args:
            context: tensors ``(episodes, ...)``: inputs, then what they are compared with.
            query: the same for the slow level's objective.
        """
        answers = self.episodes(context, query[0])
        losses = vmap(self.objective)(answers, *query[1:])
        return torch.mean(losses)

    def extra_repr(self) -> str:
        """Shown by ``print``."""
        links = "; ".join(f"{t.source} -> {t.target}: {t.label}" for t in self.transfers)
        steps = "" if self.fast is None else f", {self.fast.steps} steps of {self.fast.lr}"
        return f"{links}{steps}"


def _names(transfers: Sequence[Transfer]) -> tuple[str, str]:
    """(slow, fast), as the transfers name them."""
    found: set[tuple[str, str]] = set()
    loose: list[Transfer] = []
    for transfer in transfers:
        if isinstance(transfer, Backpropagation):
            loose.append(transfer)
        elif transfer.faster == "source":
            found.add((transfer.target, transfer.source))
        else:  # Initialisation, and a generator that generates for the fast level
            found.add((transfer.source, transfer.target))
    if len(found) > 1 or any({t.source, t.target} != set(*found) for t in loose if found):
        links = ", ".join(f"{t.kind} {t.source} -> {t.target}" for t in transfers)
        raise ValueError(f"the transfers must be between one slow and one fast level; got {links}")
    if not found:
        raise ValueError(
            "no transfer lets the slow level act; add Initialisation, Generation, "
            "DirectParametric or DirectNonParametric"
        )
    return next(iter(found))
