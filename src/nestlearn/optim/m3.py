"""M3, multi-scale momentum Muon (Alg. 1, Eq. 75), with AdamW for what is no matrix."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from nestlearn.optim.base import Common, GradientOptimizer, check, choose
from nestlearn.optim.blocks import in_blocks
from nestlearn.optim.newton_schulz import orthogonalise
from nestlearn.optim.parameters import split_parameters
from nestlearn.optim.sharding import gather, local, own_part, sum_over_parts

_ALGORITHMS = ("m3", "adamw")
_LAYOUTS = ("flatten", "batch")
_ADJUST = ("original", "match_rms_adamw", None)


class M3(GradientOptimizer):
    """Multi-scale momentum Muon (Alg. 1, Eq. 75): two momenta, a fast and a slow one.

    ``form="ema"`` (default), for a matrix with gradient g at step t:

        M1 <- b1 M1 + (1 - b1) g                          every step
        M2 <- b3 M2 + (1 - b3) sum of the last f g's      every f steps
        V  <- b2 V + (1 - b2) g^2,   V' = V / (1 - b2^t)
        O1 = NS(M1),  O2 = NS(M2)                         O2 only when M2 changes
        W  <- W - lr (s (O1 + alpha O2) / (sqrt(V' / mean V') + eps) + weight_decay W)

    NS is `newton_schulz`; it does not see its argument's scale, so M1 and M2 need no bias
    correction. With ``nesterov`` O1 is NS((1 - b1) g + b1 M1), as in ``torch.optim.Muon``. The
    second moment is taken relative to its mean over the matrix: it moves the step between
    entries but leaves its size to lr, whatever the loss is multiplied by. s is ``adjust_lr``.

    ``form="paper"`` is Alg. 1 to the letter, in which nothing decays and nothing is corrected
    (``nesterov`` False, s = 1): steps shrink with 1/sqrt(t).

        M1 <- M1 + b1 g,  M2 <- M2 + b3 sum g,  V <- V + b2 g^2
        W  <- W - lr ((O1 + alpha O2) / (sqrt(V) + eps) + weight_decay W)

    Embeddings, the output head, norms, biases and scalars are updated by AdamW. Which is which is
    decided by `split_parameters` where a model is given, else by dimensions: a tensor of two or
    more is a matrix, then also an embedding table. A group can say it itself with
    ``algorithm="m3"`` or ``"adamw"``, and how a tensor of more than two dimensions is seen with
    ``layout="flatten"`` (``out x rest``, convolutions) or ``"batch"`` (leading axes are
    independent matrices).

    Args:
        params: a model, or parameters or groups as for any optimizer.
        lr: learning rate.
        betas: ``(b1, b2, b3)``: fast momentum, second moment, slow momentum.
        alpha: weight of the slow direction; 0 for none.
        frequency: f, steps between two updates of the slow momentum.
        eps: added to the square root; in the default form relative to the root mean second moment,
            so that dividing makes no step larger than 1 / eps times itself.
        weight_decay: of matrices; decoupled.
        form: ``"ema"`` or ``"paper"``.
        nesterov: default: True in the default form.
        second_moment: False leaves V at 1.
        adjust_lr: s: ``"match_rms_adamw"`` is 0.2 sqrt(max(m, n)), which gives the step the size of
            AdamW's so that both take one lr; ``"original"`` is sqrt(max(1, m/n)); None is 1. As in
            ``torch.optim.Muon``. Default: ``"match_rms_adamw"``, in the paper's form None.
        ns_steps: Newton-Schulz steps.
        ns_dtype: what these compute in; None for the parameters' own. bfloat16 as in
            ``torch.optim.Muon``; on a CPU without bfloat16 instructions float32 is faster.
        ns_gram: see `newton_schulz`; False rounds exactly as ``torch.optim.Muon`` does.
        adamw_lr: learning rate of the AdamW groups (default: lr).
        adamw_betas, adamw_eps, adamw_weight_decay: their other options.
        model: where ``params`` are groups of its parameters: decides which are matrices.
        common: see `Common`. The clock of the slow momentum is read on the host, so there is no
            ``capturable`` step, and no ``differentiable`` one.

    Raises:
        ValueError: an option out of range.

    Example:
        >>> model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 8), nn.Linear(8, 9))
        >>> optimizer = M3(model, lr=1e-3)
        >>> [(g["algorithm"], len(g["params"])) for g in optimizer.param_groups]
        [('m3', 2), ('adamw', 3)]
        >>> model(torch.tensor([1, 2])).square().mean().backward()
        >>> optimizer.step()
    """

    _differentiable: ClassVar[bool] = False
    _capturable: ClassVar[bool] = False
    _fixed: ClassVar[tuple[str, ...]] = ("algorithm", "form", "second_moment")

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float, float] = (0.95, 0.95, 0.9),
        alpha: float = 0.2,
        frequency: int = 16,
        eps: float = 0.1,
        weight_decay: float = 0.1,
        *,
        form: str = "ema",
        nesterov: bool | None = None,
        second_moment: bool = True,
        adjust_lr: str | None = "default",
        ns_steps: int = 5,
        ns_dtype: torch.dtype | None = torch.bfloat16,
        ns_gram: bool = True,
        adamw_lr: float | None = None,
        adamw_betas: tuple[float, float] = (0.9, 0.95),
        adamw_eps: float = 1e-8,
        adamw_weight_decay: float = 0.0,
        model: nn.Module | None = None,
        **common: Unpack[Common],
    ) -> None:
        choose("form", form, ("ema", "paper"))
        if adjust_lr == "default":
            adjust_lr = "match_rms_adamw" if form == "ema" else None
        model = params if isinstance(params, nn.Module) else model
        self._kinds = {} if model is None else split_parameters(model).kinds()
        self._adamw: dict[str, Any] = {
            "lr": lr if adamw_lr is None else adamw_lr,
            "betas": adamw_betas,
            "eps": adamw_eps,
            "weight_decay": adamw_weight_decay,
        }
        defaults = {
            "lr": lr,
            "betas": betas,
            "alpha": alpha,
            "frequency": frequency,
            "eps": eps,
            "weight_decay": weight_decay,
            "form": form,
            "nesterov": form == "ema" if nesterov is None else nesterov,
            "second_moment": second_moment,
            "adjust_lr": adjust_lr,
            "ns_steps": ns_steps,
            "ns_dtype": ns_dtype,
            "ns_gram": ns_gram,
            "layout": "flatten",
        }
        super().__init__(params, defaults, common)

    # -- groups -------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; without ``algorithm`` it becomes one group per kind of parameter."""
        if "algorithm" in param_group:
            choose("algorithm", param_group["algorithm"], _ALGORITHMS)
            super().add_param_group(param_group)
            return
        given = param_group["params"]
        parts: dict[tuple[str, str], list[Any]] = {}
        for item in [given] if isinstance(given, Tensor) else given:
            p = item[1] if isinstance(item, tuple) else item
            kind = self._kinds.get(p, "kernels" if p.ndim > 1 else "vectors")
            matrix = kind in ("matrices", "kernels")
            layout = "batch" if kind == "matrices" and p.ndim > 2 else "flatten"
            parts.setdefault(("m3" if matrix else "adamw", layout), []).append(item)
        rest = {k: v for k, v in param_group.items() if k not in ("params", "param_names")}
        order = sorted(parts, key=lambda key: (key[0] != "m3", key[1]))
        for algorithm, layout in order or [("m3", "flatten")]:
            items = parts.get((algorithm, layout), [])
            group = {**rest, "params": items, "algorithm": algorithm, "layout": layout}
            if algorithm == "adamw":
                own = dict(self._adamw)
                if "lr" in rest:  # a group's own rate keeps its ratio to the others
                    own["lr"] = rest["lr"] * float(own["lr"]) / (float(self.defaults["lr"]) or 1.0)
                group |= {k: v for k, v in own.items() if k == "lr" or k not in rest}
            super().add_param_group(group)

    def _check(self, group: dict[str, Any]) -> None:
        if group["algorithm"] == "adamw":
            b1, b2 = group["betas"]
            check({"beta1": b1, "beta2": b2}, "beta1", "beta2", high=1.0)
            check(group, "eps")
            return
        ema = group["form"] == "ema"
        choose("form", group["form"], ("ema", "paper"))
        if len(group["betas"]) != 3:
            raise ValueError(f"betas must be (b1, b2, b3), got {group['betas']!r}")
        named = dict(zip(("b1", "b2", "b3"), group["betas"], strict=True))
        check(named, *named, high=1.0 if ema else math.inf)
        check(group, "alpha")
        check(group, "eps", open_low=group["second_moment"])
        choose("adjust_lr", group["adjust_lr"], _ADJUST)
        choose("layout", group["layout"], _LAYOUTS)
        for name in ("frequency", "ns_steps"):
            if not isinstance(group[name], int) or group[name] < 1:
                raise ValueError(f"{name} must be an integer, 1 or more, got {group[name]!r}")
        if group["nesterov"] and not ema:
            raise ValueError("form='paper' has no Nesterov momentum; leave nesterov=None")
        for item in group["params"] if not isinstance(group["params"], Tensor) else ():
            p = item[1] if isinstance(item, tuple) else item
            if isinstance(p, Tensor) and p.ndim < 2:
                raise ValueError(
                    f"a parameter of shape {tuple(p.shape)} is no matrix; its group needs "
                    "algorithm='adamw'"
                )

    # -- the step -----------------------------------------------------------------------------

    def _initial(self, group: dict[str, Any], p: Tensor) -> dict[str, Any]:
        def zeros() -> Tensor:
            return torch.zeros_like(p, memory_format=torch.preserve_format)

        if group["algorithm"] == "adamw":
            return {"exp_avg": zeros(), "exp_avg_sq": zeros()}
        state = {"momentum": zeros()}
        if group["second_moment"]:
            state["second_moment"] = zeros()
        if group["alpha"]:
            state["slow_momentum"] = zeros()
        return state

    def _update(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        if group["algorithm"] == "adamw":
            self._adamw_step(group, params, grads)
            return
        states = [self.state[p] for p in params]
        slow = self._slow_directions(group, params) if group["alpha"] else [None] * len(params)
        parts = [local(p) for p in params]
        second = [local(s["second_moment"]) if "second_moment" in s else None for s in states]
        ahead = [torch.empty_like(p, dtype=group["ns_dtype"]) for p in parts]
        relative = group["second_moment"] and group["form"] == "ema"
        sums = [torch.zeros((), device=p.device) for p in parts] if relative else None
        in_blocks(
            lambda at, *lists: _remember(group, sums and [sums[i] for i in at], *lists),
            [local(g) for g in grads],
            [local(s["momentum"]) for s in states],
            [local(s["slow_momentum"]) if "slow_momentum" in s else None for s in states],
            second,
            ahead,
        )
        scales = [_scale(group, p) for p in params]
        means = [1.0] * len(params) if sums is None else _root_mean(params, sums)
        fast = _orthogonal(group, params, ahead)
        in_blocks(
            lambda at, *lists: _apply(
                group, [scales[i] for i in at], [means[i] for i in at], *lists
            ),
            parts,
            fast,
            slow,
            second,
        )

    def _slow_directions(self, group: dict[str, Any], params: list[Tensor]) -> list[Tensor | None]:
        """``O2`` of each parameter; at the start of a period it is made anew (Alg. 1, line 4)."""
        due = []
        for p, count in zip(params, self._counts(group, params), strict=True):
            if (count - 1) % group["frequency"] == 0 and count > 1:
                due.append(p)
        momenta = [local(self.state[p]["slow_momentum"]) for p in due]
        for p, direction in zip(due, _orthogonal(group, due, momenta), strict=True):
            state = self.state[p]
            if "slow_direction" not in state:
                state["slow_direction"] = torch.empty_like(p, dtype=direction.dtype)
            local(state["slow_direction"]).copy_(direction)
        if due and group["form"] == "ema":
            torch._foreach_mul_(momenta, group["betas"][2])
        found = [self.state[p].get("slow_direction") for p in params]
        if all(x is None for x in found):
            return [None] * len(params)
        kind = group["ns_dtype"]
        return [
            torch.zeros_like(local(p), dtype=kind) if x is None else local(x)
            for x, p in zip(found, params, strict=True)
        ]

    def _adamw_step(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        states = [self.state[p] for p in params]
        b1, b2 = group["betas"]
        steps = torch._foreach_sub([s["step"] for s in states], 1)  # it counts this step itself
        parts = [local(p) for p in params]
        on_cpu = all(p.device.type == "cpu" for p in parts)
        with torch.no_grad():
            adamw(
                parts,
                [local(g) for g in grads],
                [local(s["exp_avg"]) for s in states],
                [local(s["exp_avg_sq"]) for s in states],
                [],
                list(steps),
                foreach=None if on_cpu else group["foreach"],
                fused=on_cpu or None,
                capturable=group["capturable"],
                amsgrad=False,
                beta1=b1,
                beta2=b2,
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,  # the gradients have their sign already
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_adamw": self._adamw, "_kinds": self._kinds}


def _remember(
    group: dict[str, Any],
    sums: list[Tensor] | None,
    grads: list[Tensor],
    momenta: list[Tensor],
    slow: list[Tensor] | None,
    second: list[Tensor] | None,
    ahead: list[Tensor],
) -> None:
    """Write the gradients into the memories; ``ahead`` becomes what is to be orthogonalised."""
    b1, b2, b3 = group["betas"]
    ema = group["form"] == "ema"
    if ema:
        torch._foreach_lerp_(momenta, grads, 1 - b1)
    else:
        torch._foreach_add_(momenta, grads, alpha=b1)
    read = torch._foreach_lerp(grads, momenta, b1) if group["nesterov"] else momenta
    torch._foreach_copy_(ahead, read)
    if slow is not None:
        torch._foreach_add_(slow, grads, alpha=1 - b3 if ema else b3)
    if second is not None:
        if ema:
            torch._foreach_mul_(second, b2)
        torch._foreach_addcmul_(second, grads, grads, value=1 - b2 if ema else b2)
        for total, v in zip(sums or (), second, strict=False):
            total.add_(v.sum())


def _apply(
    group: dict[str, Any],
    scales: list[float],
    means: list[float],
    params: list[Tensor],
    fast: list[Tensor],
    slow: list[Tensor] | None,
    second: list[Tensor] | None,
) -> None:
    """``W <- (1 - lr decay) W - lr s (O1 + alpha O2) / (sqrt(V) / r + eps)``, r in ``means``."""
    lr, decay = float(group["lr"]), group["weight_decay"]
    kind = params[0].dtype
    update = fast if slow is None and second is None else [x.to(kind) for x in fast]
    if slow is not None:
        torch._foreach_add_(update, [x.to(kind) for x in slow], alpha=group["alpha"])
    if decay:
        torch._foreach_mul_(params, 1 - lr * decay)
    if second is None:
        for p, x, scale in zip(params, update, scales, strict=True):
            p.add_(x, alpha=-lr * scale)
        return
    # The fraction is multiplied by r above and below: one operation less per element.
    size = torch._foreach_sqrt(second)
    torch._foreach_add_(size, [group["eps"] * r for r in means])
    steps = [-lr * scale * r for scale, r in zip(scales, means, strict=True)]
    torch._foreach_addcdiv_(params, update, size, steps)


def _root_mean(params: list[Tensor], sums: list[Tensor]) -> list[float]:
    """``sqrt(mean V)`` of each matrix. V over its mean needs no bias correction."""
    totals = sum_over_parts(torch.stack([s.to(sums[0].device) for s in sums]), params).tolist()
    return [
        max(math.sqrt(total / max(1, p.numel())), 1e-30)
        for total, p in zip(totals, params, strict=True)
    ]


def _scale(group: dict[str, Any], p: Tensor) -> float:
    flat = group["layout"] == "flatten"
    rows, columns = (p.shape[0], p.shape[1:].numel()) if flat else p.shape[-2:]
    return shape_scale(group["adjust_lr"], rows, columns)


def shape_scale(adjust: str | None, rows: int, columns: int) -> float:
    """s, from the shape of a matrix (``torch.optim.Muon``'s ``adjust_lr_fn``)."""
    if adjust is None:
        return 1.0
    if adjust == "original":
        return math.sqrt(max(1.0, rows / columns))
    return 0.2 * math.sqrt(max(rows, columns))


def _orthogonal(group: dict[str, Any], params: list[Tensor], parts: list[Tensor]) -> list[Tensor]:
    """NS of the matrices of which ``parts`` are this process's parts; its parts of the results."""
    whole = [gather(x, p) for x, p in zip(parts, params, strict=True)]
    flat = group["layout"] == "flatten"
    matrices = [x.flatten(1) if flat else x for x in whole]
    done = orthogonalise(
        matrices, group["ns_steps"], dtype=group["ns_dtype"], gram=group["ns_gram"]
    )
    return [own_part(o.reshape(p.shape).contiguous(), p) for o, p in zip(done, params, strict=True)]
