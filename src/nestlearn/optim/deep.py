"""Deep momentum (DMGD): the momentum is a small network that learns from gradients (Eq. 50, 52)."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor

from nestlearn.memory.objectives import OBJECTIVES
from nestlearn.memory.structures import ACTIVATIONS, forward, layer_gradients, weight_shapes
from nestlearn.optim.base import Common, GradientOptimizer, check, choose
from nestlearn.optim.delta import descend
from nestlearn.optim.newton_schulz import orthogonalise
from nestlearn.optim.sharding import gather, local, own_part


class DeepMomentum(GradientOptimizer):
    """Deep momentum gradient descent, DMGD (Eq. 50, 52).

    Every matrix ``(out, in)`` has a memory m, a network that maps rows of gradients ``R^in`` to
    rows. Its weights make one step per iteration on an inner objective, and the matrix moves by
    what it answers to the present gradient u, row by row:

        m <- alpha m - eta d/dm mean over rows of L~(m(k); v),   k = v = u / ||u||
        W <- (1 - lr weight_decay) W - lr sigma(||u|| m(k))

    - ``objective="dot"``: ``L~ = -<m(k), v>``: the answer grows along directions that gradients
      keep taking;
    - ``objective="l2"``: ``L~ = 1/2 ||m(k) - v||^2``: m learns to reproduce gradients; what is not
      like earlier ones comes out smaller.

    m is ``x + W_L s(... s(W_1 x))`` (`nestlearn.memory.structures.forward`; ``(I + W) x`` at depth
    1) for the dot product: with an empty memory deep momentum is gradient descent, and retention
    pulls it back there. For the regression it is without ``x``, which would be the answer already.

    Two things are **our reading**. The paper's ``L~ = <m(u), 1>`` has no value that depends on u:
    a step on it moves all entries alike and its answer is no direction of descent;
    ``value="ones"`` is that literal form. Keys have unit norm, so that eta does not depend on the
    loss's scale. (m answers with the sign of the gradient.)

    Vectors and scalars have the memory's linear case, plain momentum with retention ``momentum``.

    Args:
        params: a model, parameters or groups.
        lr: learning rate.
        inner_lr: eta.
        retention: alpha, in [0, 1].
        depth: number of the memory's weights, 1 to 4.
        width: hidden size of the memory; None for ``min(in, 64)``.
        objective: ``"dot"`` or ``"l2"``.
        value: v: ``"gradient"`` or ``"ones"``.
        output: sigma: ``"identity"`` or ``"newton_schulz"``.
        activation: of the memory, ``"silu"`` or ``"gelu"``.
        momentum: of vectors.
        weight_decay: decoupled.
        bound: largest Frobenius norm of what a memory's weight has learned; it keeps the product
            of layers from feeding itself.
        seed: of the memories' first weights.
        common: see `Common`. No ``differentiable`` step.

    Raises:
        ValueError: an option out of range.

    Example:
        >>> w = torch.nn.Parameter(torch.ones(2, 3))
        >>> optimizer = DeepMomentum([w], lr=0.1, inner_lr=0.0)  # an empty memory: gradient descent
        >>> w.grad = torch.full((2, 3), 2.0)
        >>> optimizer.step()
        >>> w.detach()[0]
        tensor([0.8000, 0.8000, 0.8000])
    """

    _differentiable: ClassVar[bool] = False
    _fixed: ClassVar[tuple[str, ...]] = ("depth", "width")

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-2,
        inner_lr: float = 0.1,
        retention: float = 0.99,
        *,
        depth: int = 2,
        width: int | None = None,
        objective: str = "dot",
        value: str = "gradient",
        output: str = "identity",
        activation: str = "silu",
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        bound: float = 4.0,
        seed: int = 0,
        **common: Unpack[Common],
    ) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        defaults = {
            "lr": lr,
            "inner_lr": inner_lr,
            "retention": retention,
            "depth": depth,
            "width": width,
            "objective": objective,
            "value": value,
            "output": output,
            "activation": activation,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "bound": bound,
        }
        super().__init__(params, defaults, common)

    def _check(self, group: dict[str, Any]) -> None:
        check(group, "inner_lr")
        check(group, "retention", high=1.0, open_high=False)
        check(group, "momentum", high=1.0)
        check(group, "bound", open_low=True, high=math.inf)
        choose("objective", group["objective"], ("dot", "l2"))
        choose("value", group["value"], ("gradient", "ones"))
        choose("output", group["output"], ("identity", "newton_schulz"))
        choose("activation", group["activation"], tuple(ACTIVATIONS))
        weight_shapes(1, 1, group["depth"], 1)
        width = group["width"]
        if width is not None and (not isinstance(width, int) or width < 1):
            raise ValueError(f"width must be an integer, 1 or more, or None, got {width!r}")

    def _initial(self, group: dict[str, Any], p: Tensor) -> dict[str, Any]:
        if p.ndim < 2:
            return {"momentum_buffer": torch.zeros_like(p)}
        size = p[0].numel()
        shapes = weight_shapes(size, size, group["depth"], group["width"] or min(size, 64))
        weights = []
        for out, into in shapes[:-1]:
            w = torch.randn(out, into, generator=self._generator) / math.sqrt(into)
            weights.append(w.to(p.device, p.dtype))
        weights.append(torch.zeros(shapes[-1], device=p.device, dtype=p.dtype))
        # What a memory starts from is kept: retention returns to it.
        state = {f"weight_{i}": torch.zeros_like(w) for i, w in enumerate(weights)}
        return {**state, **{f"initial_{i}": w for i, w in enumerate(weights[:-1])}}

    def _update(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        directions: list[Tensor] = []
        for p, g in zip(params, grads, strict=True):
            if p.ndim < 2:
                buffer = local(self.state[p]["momentum_buffer"])
                directions.append(buffer.mul_(group["momentum"]).add_(local(g)))
            else:
                directions.append(self._answer(group, p, gather(local(g), p).flatten(1)))
        at = [i for i, p in enumerate(params) if p.ndim > 1]
        if group["output"] == "newton_schulz":
            for i, x in zip(
                at, orthogonalise([directions[i] for i in at], dtype=None), strict=True
            ):
                directions[i] = x
        for i in at:
            directions[i] = own_part(directions[i].reshape(params[i].shape), params[i])
        descend(group, [local(p) for p in params], directions)

    def _answer(self, group: dict[str, Any], p: Tensor, u: Tensor) -> Tensor:
        """One inner step of p's memory, then ``||u|| m(u / ||u||)``, ``(out, in)``."""
        state, depth = self.state[p], group["depth"]
        norms = torch.linalg.vector_norm(u, dim=-1, keepdim=True)
        keys = u / norms.clamp(min=torch.finfo(u.dtype).tiny)
        values = keys if group["value"] == "gradient" else torch.ones_like(keys)
        learned = [state[f"weight_{i}"] for i in range(depth)]
        first = [state[f"initial_{i}"] for i in range(depth - 1)]
        objective, plain = OBJECTIVES[group["objective"]], group["objective"] == "l2"
        targets = values + keys if plain else values
        inputs, deltas, _ = layer_gradients(
            self._weights(learned, first),
            keys,
            lambda y: objective.grad(y, targets),
            group["activation"],
        )
        for w, a, delta in zip(learned, inputs, deltas, strict=True):
            w.mul_(group["retention"]).addmm_(delta.mT, a, alpha=-group["inner_lr"] / len(keys))
            norm = torch.linalg.vector_norm(w)
            w.mul_((group["bound"] / norm.clamp(min=group["bound"])).to(w.dtype))
        y = forward(self._weights(learned, first), keys, group["activation"])
        return norms * (y - keys if plain else y)

    @staticmethod
    def _weights(learned: list[Tensor], first: list[Tensor]) -> list[Tensor]:
        last = learned[-1]
        if not first:
            return [last + torch.eye(len(last), dtype=last.dtype, device=last.device)]
        return [*(w + start for w, start in zip(learned[:-1], first, strict=True)), last]

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_seed": self._generator.get_state()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        if "_seed" in state:
            self._generator = torch.Generator()
            self._generator.set_state(state.pop("_seed"))
        super().__setstate__(state)
