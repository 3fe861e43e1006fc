"""What all optimizers of this package share: groups, gradients that are fit to use, state by name.

A subclass says which options a group has (`_check`) and what one step does with a group's
parameters and their gradients (`_update`).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, ClassVar, TypedDict

import torch
from torch import Tensor
from torch.optim import Optimizer

from nestlearn.optim.named import follow_names, named
from nestlearn.optim.sharding import like_parameter, local, sum_over_parts


class Common(TypedDict, total=False):
    """Options that every optimizer takes, with their meaning in ``torch.optim``.

    Attributes:
        maximize: climb instead of descending.
        foreach: all tensors of a group at once (default) or, with False, one after the other,
            which needs less memory for intermediate results.
        capturable: the step never waits for the device, so that a CUDA graph can hold it and
            ``torch.compile`` compiles it (without, a compiled step runs as it is). A gradient that
            is not finite then counts as zero; otherwise its parameter is left out of the step.
        differentiable: gradients flow through the step (for parameters that are not leaves).
    """

    maximize: bool
    foreach: bool | None
    capturable: bool
    differentiable: bool


_COMMON: dict[str, Any] = {
    "maximize": False,
    "foreach": None,
    "capturable": False,
    "differentiable": False,
}


class GradientOptimizer(Optimizer):
    """Base of the optimizers: ``torch.optim.Optimizer`` with a stated policy for bad gradients.

    - ``params`` may be a module, named parameters, parameters or groups. With names, `state_dict`
      carries them and `load_state_dict` follows them, however the parameters are grouped.
    - A parameter whose gradient holds NaN or infinity is left out of the step: neither it nor its
      state changes. The first time is a warning; ``skipped`` counts them all.
    - Sparse gradients and complex parameters raise ValueError.
    """

    _differentiable: ClassVar[bool] = True
    _capturable: ClassVar[bool] = True
    _fixed: ClassVar[tuple[str, ...]] = ()  # options that say what the state means

    def __init__(self, params: Any, defaults: dict[str, Any], common: Common) -> None:
        unknown = set(common) - set(_COMMON)
        if unknown:
            raise TypeError(
                f"{type(self).__name__} has no option {', '.join(sorted(unknown))}; it takes "
                f"{', '.join([*defaults, *_COMMON])}"
            )
        self._skipped = 0
        self._skipped_on_device: Tensor | None = None
        super().__init__(named(params), {**defaults, **_COMMON, **common})

    # -- construction -------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its options are checked.

        Raises:
            ValueError: an option out of range, or a complex parameter.
        """
        group = {**self.defaults, **param_group}
        for name in ("differentiable", "capturable"):
            if group[name] and not getattr(self, f"_{name}"):
                raise ValueError(f"{type(self).__name__} has no {name} step; leave {name}=False")
        check(group, "lr", "weight_decay")
        self._check(group)
        super().add_param_group(param_group)
        if any(p.is_complex() for p in self.param_groups[-1]["params"]):
            self.param_groups.pop()
            raise ValueError("complex parameters are not supported; use torch.view_as_real")

    def _check(self, group: dict[str, Any]) -> None:
        """Raise ValueError if an option of the group is out of range."""

    # -- the step -----------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step from the parameters' ``.grad``; returns what ``closure`` returned, if given.

        Raises:
            ValueError: a sparse gradient.
        """
        # What waits for the device cannot be part of a graph.
        return (self._step if self.defaults["capturable"] else self._step_on_host)(closure)

    @torch._disable_dynamo
    def _step_on_host(self, closure: Callable[[], Any] | None) -> Any:
        return self._step(closure)

    def _step(self, closure: Callable[[], Any] | None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            work = [_gradients(group) for group in self.param_groups]
            fit = self._fit(work)
            for group, pairs in zip(self.param_groups, work, strict=True):
                ready: list[tuple[Tensor, Tensor]] = []
                for p, g in pairs:
                    ok = fit[p]
                    if isinstance(ok, Tensor):
                        ready.append((p, g.where(ok, 0)))
                    elif ok:
                        ready.append((p, g))
                for part in [ready] if group["foreach"] is not False else [[r] for r in ready]:
                    if part:
                        self._prepare(group, [p for p, _ in part])
                        self._update(group, [p for p, _ in part], [g for _, g in part])
        return loss

    def _update(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        """One step of these parameters of the group; their states exist and count this step."""
        raise NotImplementedError

    def _initial(self, group: dict[str, Any], p: Tensor) -> dict[str, Any]:
        """State of a parameter before its first step (without ``step``)."""
        return {}

    def _prepare(self, group: dict[str, Any], params: list[Tensor]) -> None:
        for p in params:
            state = self.state[p]
            if not state:
                where = local(p).device if group["capturable"] else "cpu"
                state["step"] = torch.zeros((), dtype=torch.float32, device=where)
                state.update(self._initial(group, p))
            elif group["differentiable"]:  # what an earlier step saved must stay as it was
                state.update({k: v.clone() for k, v in state.items() if torch.is_tensor(v)})
            state["step"] += 1

    def _counts(self, group: dict[str, Any], params: list[Tensor]) -> list[Any]:
        """Steps of each parameter, this one included: numbers, or tensors where capturable."""
        steps = [self.state[p]["step"] for p in params]
        if group["capturable"]:  # as exact as the numbers on the host
            return [step.double() for step in steps]
        return [step.item() for step in steps]

    # -- gradients ----------------------------------------------------------------------------

    @torch.no_grad()
    def _fit(self, work: list[list[tuple[Tensor, Tensor]]]) -> dict[Tensor, Any]:
        """Whether each parameter's gradient is finite: bools, or 0-dim tensors if capturable."""
        pairs = [pair for group in work for pair in group]
        if not pairs:
            return {}
        parts = [local(g) for _, g in pairs]
        like = [p for p, _ in pairs]
        where = parts[0].device
        if self.defaults["capturable"]:
            bad = torch.stack([(~part.isfinite().all()).to(where) for part in parts])
            bad = sum_over_parts(bad.float(), like) > 0
            lost, before = bad.sum(), self._skipped_on_device
            self._skipped_on_device = lost if before is None else before + lost
            return {p: ~b.to(x.device) for p, b, x in zip(like, bad.unbind(), parts, strict=True)}
        # One pass: a sum is not finite if a term is not. The other way round it may overflow, so
        # only what looks bad is looked at closely.
        sums = torch.stack([part.sum().to(where, torch.float64) for part in parts])
        suspect = [not math.isfinite(s) for s in sums.tolist()]
        bad = torch.tensor(
            [s and not bool(x.isfinite().all()) for s, x in zip(suspect, parts, strict=True)],
            dtype=torch.float32,
            device=where,
        )
        flags = [count > 0 for count in sum_over_parts(bad, like).tolist()]
        if any(flags):
            self._tell([p for p, flag in zip(like, flags, strict=True) if flag])
        return {p: not flag for p, flag in zip(like, flags, strict=True)}

    def _tell(self, bad: list[Tensor]) -> None:
        if not self._skipped:
            names = {
                p: name
                for group in self.param_groups
                for p, name in zip(group["params"], group.get("param_names", ()), strict=False)
            }
            first = names.get(bad[0], f"a parameter of shape {tuple(bad[0].shape)}")
            warnings.warn(
                f"the gradient of {first} (one of {len(bad)} such now) is not finite: these "
                "parameters and their states are left out of this step, and of every later step "
                "where that happens; see optimizer.skipped. Lower the learning rate, clip "
                "gradients or look for the operation that overflows",
                RuntimeWarning,
                stacklevel=6,
            )
        self._skipped += len(bad)

    @property
    def skipped(self) -> int:
        """Parameter updates left out so far because the gradient was not finite."""
        on_device = self._skipped_on_device
        return self._skipped + (0 if on_device is None else int(on_device.item()))

    # -- state --------------------------------------------------------------------------------

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` gave, bit-exact; by name if both sides know names.

        Raises:
            ValueError: a state of other parameters, or of an optimizer that works differently.
        """
        state_dict = follow_names(self.param_groups, state_dict, self._fixed)
        super().load_state_dict(state_dict)
        # torch has cast the state to the parameters' types; ours may differ on purpose.
        numbers = [n for group in state_dict["param_groups"] for n in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for p, n in zip(params, numbers, strict=True):
            capturable = self.defaults["capturable"]
            for key, value in state_dict["state"].get(n, {}).items():
                if torch.is_tensor(value):
                    on_host = key == "step" and not capturable
                    self.state[p][key] = value.to("cpu" if on_host else p.device, copy=True)

    def __getstate__(self) -> dict[str, Any]:
        own = {"_skipped": self._skipped, "_skipped_on_device": self._skipped_on_device}
        return {**super().__getstate__(), **own}


def _gradients(group: dict[str, Any]) -> list[tuple[Tensor, Tensor]]:
    pairs = []
    for p in group["params"]:
        if p.grad is None:
            continue
        if p.grad.layout != torch.strided:
            raise ValueError(
                "sparse gradients are not supported: build the embedding with sparse=False, or "
                "give its weight to torch.optim.SparseAdam"
            )
        g = like_parameter(p.grad, p)
        pairs.append((p, -g if group["maximize"] else g))
    return pairs


def check(
    group: dict[str, Any],
    *names: str,
    low: float = 0.0,
    high: float = math.inf,
    open_low: bool = False,
    open_high: bool = True,
) -> None:
    """Check that options lie within ``[low, high)`` (or an interval open or closed as said).

    Raises:
        ValueError: an option outside, or no number.
    """
    for name in names:
        value = group[name]
        if isinstance(value, Tensor):
            if value.numel() != 1:
                raise ValueError(f"{name} must be one number, got a tensor {tuple(value.shape)}")
            if value.device.type != "cpu":
                continue  # reading it would wait for the device
        good = isinstance(value, (int, float, Tensor)) and not isinstance(value, bool)
        if good:
            number = float(value)
            good = (number > low if open_low else number >= low) and (
                number < high if open_high else number <= high
            )
        if not good:
            left, right = "(" if open_low else "[", ")" if open_high else "]"
            raise ValueError(f"{name} must be in {left}{low}, {high}{right}, got {value!r}")


def choose(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    """Check that an option is one of those allowed.

    Raises:
        ValueError: it is not.
    """
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
