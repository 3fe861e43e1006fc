"""Generalised gradient descent, and delta gradient descent as its best-known instance."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor, nn

from nestlearn.memory.objectives import OBJECTIVES, Objective
from nestlearn.optim.base import Common, GradientOptimizer, check, choose
from nestlearn.optim.delta import descend
from nestlearn.optim.layers import LayerRule, Value, attach, supported
from nestlearn.optim.sharding import local

Retention = Callable[[Tensor, float], Tensor]

_RETENTIONS = ("decay", "l2", "l1")
_attached: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Any]] = weakref.WeakKeyDictionary()


class GeneralizedGD(GradientOptimizer):
    """Generalised gradient descent and momentum (Def. 5, Eq. 59-60).

    A layer ``y = W x`` is an associative memory of its own data. Its weights descend an inner
    objective on what they answer, to a value u that the model generates itself, and retention says
    what is kept of the old weights:

        W <- argmin_W  <G, W> + 1/(2 lr) ||W - W_t||^2 + Ret(W),   G = mean of dL~(W x; u)/dy x^T

    With delta, the gradient of a row's loss at y, and the default value ``u = -delta``:

    - ``objective="dot"``: ``L~ = -<W x, u>``, ``G = delta x^T``: gradient descent;
    - ``objective="l2"``: ``L~ = 1/2 ||W x - u||^2``, ``G = (delta + W x) x^T``: delta gradient
      descent, see `DGD`;
    - ``objective="oja"``: ``L~ = -<W x, u> + 1/2 ||W^T u||^2``: Oja's rule (linear layers only);
    - any other of `nestlearn.memory.objectives`, an `Objective`, or a function ``(y, u) -> (...)``.

    Layers are ``nn.Linear``, ``nn.Conv1d`` to ``3d`` (each position is a row, its patch the input)
    and ``nn.Embedding`` (one-hot rows); a bias belongs to the memory as the weight of an input 1.
    All other parameters (``plain`` lists them) follow gradient descent with the same retention.

    The optimizer hooks these layers (`close` removes the hooks); ``.grad`` then holds G. The
    gradient that earlier layers get is not touched. A row's step is proximal,
    ``lr / (1 + lr c ||x||^2)`` with the objective's curvature c: it cannot overshoot.

    **Scale of the loss.** delta is recovered from the gradient of the whole loss: ``reduction``
    says whether that is the mean over the rows of a layer (tokens, positions) or their sum, and
    ``loss_scale`` what it was multiplied by before ``backward()``: ``1/k`` when gradients of k
    batches are accumulated, ``scaler.get_scale`` with a gradient scaler. A function is asked at
    every forward pass.

    Args:
        params: the model, or parameters or groups of it with ``model``.
        lr: learning rate.
        objective: see above.
        value: ``(x, y, delta) -> u``, all with rows in the leading axes; default ``-delta``.
        retention: ``"decay"``: ``W <- (1 - lr weight_decay) W - lr G``; ``"l2"``: ``Ret = 1/2
            weight_decay ||W||^2``; ``"l1"``: ``weight_decay ||W||_1``; or the proximal map of lr
            Ret: ``(W_t - lr G, lr) -> W``.
        momentum: Eq. 60: ``m <- momentum m + G`` takes the place of G.
        weight_decay: strength of the retention.
        proximal: False for the plain step lr.
        reduction: ``"mean"`` or ``"sum"``.
        loss_scale: a number or a function.
        model: the module whose layers ``params`` belong to.
        common: see `Common`.

    Raises:
        ValueError: an option out of range, no model, or a model that another optimizer has hooked.

    Example:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> _ = nn.init.ones_(layer.weight)
        >>> optimizer = GeneralizedGD(layer, lr=1.0, objective="l2", proximal=False)
        >>> layer(torch.tensor([[1.0, 0.0]])).sum().backward()
        >>> layer.weight.grad  # (delta + y) x^T = (1 + 1) [1, 0]
        tensor([[2., 0.]])
    """

    _differentiable: ClassVar[bool] = False
    _fixed: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-2,
        objective: str | Objective | Callable[[Tensor, Tensor], Tensor] = "l2",
        value: Value | None = None,
        retention: str | Retention = "decay",
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        *,
        proximal: bool = True,
        reduction: str = "mean",
        loss_scale: float | Callable[[], float] = 1.0,
        model: nn.Module | None = None,
        **common: Unpack[Common],
    ) -> None:
        model = params if isinstance(params, nn.Module) else model
        if model is None:
            raise ValueError(
                f"{type(self).__name__} needs the layers' inputs and outputs: give the model "
                "itself as params, or its parameters and model="
            )
        choose("reduction", reduction, ("mean", "sum"))
        if not callable(retention):
            choose("retention", retention, _RETENTIONS)
        self._objective, self._oja = _objective(objective)
        self._value, self._mean, self._proximal = value, reduction == "mean", proximal
        self._retention, self.loss_scale = retention, loss_scale
        self._place: dict[Tensor, int] = {}
        self._seen: set[int] = set()
        self._told = False
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(params, defaults, common)
        self._layers: dict[str, nn.Module] = {}
        self._weights: dict[nn.Module, Tensor] = {}
        name = "oja" if self._oja else self._objective.name
        for path, module in model.named_modules():
            weight = getattr(module, "weight", None)
            if weight in self._place and supported(module, name):
                self._layers[path] = module
                self._weights[module] = weight  # sharding replaces it during the forward pass
        if not self._layers:
            raise ValueError(
                "none of these parameters belongs to a layer that learns from its own output "
                "(nn.Linear, nn.Conv, nn.Embedding): use torch.optim.SGD, or give the right model"
            )
        self._attach()
        hooked = {p for layer in self._layers.values() for p in layer.parameters(False)}
        self.plain = [
            n for n, p in model.named_parameters() if p in self._place and p not in hooked
        ]

    def _attach(self) -> None:
        for path, module in self._layers.items():
            other = _attached.get(module)
            if other is not None and other() is not None:
                raise ValueError(
                    f"layer {path or type(module).__name__} is already with another optimizer of "
                    "this kind; call that one's close() first"
                )
        me = weakref.ref(self)
        self._handles = []
        for module in self._layers.values():
            _attached[module] = me
            self._handles.append(attach(module, lambda m: _rule_of(me(), m)))

    def close(self) -> None:
        """Remove the hooks: the layers' gradients are plain again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for module in self._layers.values():
            _attached.pop(module, None)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            f"{type(self).__name__} is bound to its model's layers and cannot be copied or "
            "pickled: build a new one and load this one's state_dict()"
        )

    def _rule(self, module: nn.Module) -> LayerRule:
        """What a layer does at this moment; it notes that the layer is in use."""
        weight = self._weights[module]
        self._seen.add(id(weight))
        group = self.param_groups[self._place[weight]]
        scale = self.loss_scale() if callable(self.loss_scale) else self.loss_scale
        if group["maximize"]:
            scale = -scale  # climbing is descending the loss times -1
        rate = group["lr"] if self._proximal else 0.0
        return LayerRule(self._objective, self._value, rate, scale, self._mean, self._oja)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters of the model."""
        super().add_param_group(param_group)
        for p in self.param_groups[-1]["params"]:
            self._place[p] = len(self.param_groups) - 1

    def _check(self, group: dict[str, Any]) -> None:
        check(group, "momentum", high=1.0)

    def _initial(self, group: dict[str, Any], p: Tensor) -> dict[str, Any]:
        if not group["momentum"]:
            return {}
        return {"momentum_buffer": torch.zeros_like(p, memory_format=torch.preserve_format)}

    def _update(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        self._tell_unseen(params)
        parts, directions = [local(p) for p in params], [local(g) for g in grads]
        if group["momentum"]:
            buffers = [local(self.state[p]["momentum_buffer"]) for p in params]
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, directions)
            directions = buffers
        if self._retention == "decay":
            descend(group, parts, directions)
            return
        descend({**group, "weight_decay": 0.0}, parts, directions)
        lr, strength = group["lr"], group["weight_decay"]
        if callable(self._retention):
            for p in parts:
                p.copy_(self._retention(p, lr))
        elif self._retention == "l2":
            torch._foreach_div_(parts, 1 + lr * strength)
        else:
            for p in parts:
                p.copy_(p.sign() * (p.abs() - lr * strength).clamp(min=0))

    def _tell_unseen(self, params: list[Tensor]) -> None:
        if self._told:
            return
        updated = {id(p) for p in params}
        weights = {path: id(self._weights[layer]) for path, layer in self._layers.items()}
        unseen = [n for n, w in weights.items() if w in updated and w not in self._seen]
        unseen = [name or "the layer" for name in unseen]
        if unseen:
            self._told = True
            warnings.warn(
                f"{', '.join(unseen[:5])} had a gradient, but its forward() was not called, so it "
                "follows plain gradient descent (nn.MultiheadAttention uses its output projection "
                "that way)",
                RuntimeWarning,
                stacklevel=6,
            )


class DGD(GeneralizedGD):
    """Delta gradient descent (Eq. 53-57): weights that also forget what they answer to this input.

    For a layer ``y = W x`` with delta the gradient of a row's loss at y, gradient descent is a step
    on the dot product ``<W x, delta>``. DGD solves the regression instead,

        min_W  1/2 ||W x - u||^2 + 1/(2 lr) ||W - W_t||^2,     u = -delta

    exactly (Sherman-Morrison), for any ``||x||``, and averages over the rows:

        W <- (1 - lr weight_decay) W - mean of lr / (1 + lr ||x||^2) (delta + W x) x^T

    that is, gradient descent with the layer's output added to the output's gradient. With the rows'
    ``x x^T`` it depends on the data of the present step what is forgotten. See `GeneralizedGD`,
    whose case ``objective="l2"`` this is, for layers, ``reduction`` and ``loss_scale``.

    An in-place operation on a layer's output (``nn.ReLU(inplace=True)``) is an error in backward:
    the output is needed there.

    Args:
        params: the model, or parameters or groups of it with ``model``.
        lr: learning rate.
        momentum: ``m <- momentum m + G`` takes the place of the gradient G.
        weight_decay: decoupled.
        proximal: False for the step lr itself (Eq. 57 as printed).
        reduction, loss_scale, model, common: see `GeneralizedGD`.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
        >>> optimizer = DGD(model, lr=0.1)
        >>> model(torch.randn(8, 3)).square().mean().backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-2,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        *,
        proximal: bool = True,
        reduction: str = "mean",
        loss_scale: float | Callable[[], float] = 1.0,
        model: nn.Module | None = None,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(
            params,
            lr,
            "l2",
            momentum=momentum,
            weight_decay=weight_decay,
            proximal=proximal,
            reduction=reduction,
            loss_scale=loss_scale,
            model=model,
            **common,
        )


def _rule_of(optimizer: GeneralizedGD | None, module: nn.Module) -> LayerRule | None:
    """What the layer's optimizer says; None once that is gone."""
    return None if optimizer is None else optimizer._rule(module)


def _objective(given: Any) -> tuple[Objective, bool]:
    """The objective, and whether it is Oja's (which has the dot product at the output)."""
    if isinstance(given, Objective):
        return given, False
    if given == "oja":
        return OBJECTIVES["dot"], True
    if callable(given):

        def grad(y: Tensor, u: Tensor) -> Tensor:
            with torch.enable_grad():
                y = y.detach().requires_grad_()
                return torch.autograd.grad(given(y, u).sum(), y)[0]

        return Objective("own", given, grad), False
    if given not in OBJECTIVES:
        raise ValueError(
            f"objective must be one of {', '.join([*OBJECTIVES, 'oja'])}, an Objective or a "
            f"function (y, u) -> value, got {given!r}"
        )
    return OBJECTIVES[given], False
