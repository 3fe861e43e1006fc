"""The general optimizer: a momentum that is an associative memory of gradients (Eq. 33-52)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from nestlearn.memory.objectives import OBJECTIVES
from nestlearn.optim.base import GradientOptimizer
from nestlearn.optim.delta import descend
from nestlearn.optim.m3 import shape_scale
from nestlearn.optim.newton_schulz import orthogonalise
from nestlearn.optim.presets import check_design, design_of
from nestlearn.optim.sharding import gather, local, own_part, sum_over_parts


class AssociativeMomentum(GradientOptimizer):
    """An optimizer whose momentum m is an associative memory of gradients (Eq. 33-52).

    At every step m makes one step on its own inner objective, with the gradient's features
    ``phi(g)`` as keys and P as values, and the weights move by what it answers:

        m <- alpha m - eta dL~(m; phi(g), P),     W <- W - lr sigma(m)

    For the dot product ``L~ = -<m, P phi(g)>`` that is ``m <- alpha m + eta P phi(g)`` (Eq. 33-41,
    47, 51); for the regression ``1/2 ||m phi(g)^T - I||^2`` it is delta momentum (Eq. 48-49), with
    the proximal rate ``eta / (1 + eta ||phi(g)||^2)``, as for the other objectives of
    `nestlearn.memory`. sigma is Newton-Schulz in Muon (Eq. 42-44, 52). (m is stored with the sign
    of the gradient.)

    P is the identity or a preconditioner from a second memory h, which is Hebbian too:
    ``h <- alpha2 h + eta2 g^2`` (or ``g g^T``), ``P = 1 / (sqrt(h) + eps)`` (Eq. 101-111).

    Each preset is a choice of these parts; a keyword argument changes one. Presets: ``sgd``,
    ``nesterov``, ``signsgd``, ``signum``, ``lion``, ``adagrad``, ``adagrad_full`` (outer products
    of whole tensors, which must be small), ``shampoo``, ``rmsprop``, ``adam``, ``adamw``,
    ``nadam``, ``muon``, ``adamuon`` (matrices only, the last two), ``delta``.

    Args:
        params: a model, parameters or groups. A group may change any part.
        preset: see above.
        lr: learning rate.
        weight_decay: decoupled, or through the gradient, as the preset's namesake has it.
        design: fields of `Design`, and `Common` options.

    Raises:
        ValueError: an unknown preset, an option out of range, parts that do not fit together, or
            vectors for a sigma that needs matrices. TypeError: an unknown option.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> optimizer = AssociativeMomentum([w], preset="adam", lr=0.1)
        >>> w.grad = torch.tensor([0.3, -5.0])
        >>> optimizer.step()
        >>> w.detach()
        tensor([ 0.9000, -1.9000])
        >>> mine = AssociativeMomentum([w], preset="sgd", feature="sign", output=torch.tanh)
    """

    _fixed: ClassVar[tuple[str, ...]] = ("value", "place", "readout")

    def __init__(
        self,
        params: Any,
        preset: str = "sgd",
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.0,
        **design: Any,
    ) -> None:
        names = ("maximize", "foreach", "capturable", "differentiable")
        common: Any = {k: design.pop(k) for k in names if k in design}
        defaults = {"lr": lr, "weight_decay": weight_decay, **design_of(preset, **design)}
        super().__init__(params, defaults, common)

    def _check(self, group: dict[str, Any]) -> None:
        check_design(group)
        matrix = group["output"] == "newton_schulz" or group["scale"] in (
            "original",
            "match_rms_adamw",
        )
        given = group["params"]
        for item in [given] if isinstance(given, Tensor) else given:
            p = item[1] if isinstance(item, tuple) else item
            if matrix and isinstance(p, Tensor) and p.ndim < 2:
                raise ValueError(
                    f"a parameter of shape {tuple(p.shape)} is no matrix: put it into another "
                    "optimizer; nestlearn.optim.split_parameters(model) sorts a model's parameters"
                )

    # -- state --------------------------------------------------------------------------------

    def _initial(self, group: dict[str, Any], p: Tensor) -> dict[str, Any]:
        def zeros() -> Tensor:
            return torch.zeros_like(p, memory_format=torch.preserve_format).detach()

        state: dict[str, Any] = {}
        if group["retention"] or group["readout"] != "memory":
            state["momentum"] = zeros()
        if group["readout"] == "nadam":
            state["momentum_product"] = torch.ones((), device=p.device, dtype=torch.float32)
        if group["value"] == "diagonal":
            state["square"] = zeros()
        elif group["value"] == "full":
            state["outer"] = local(p).new_zeros(p.numel(), p.numel()).detach()
        elif group["value"] == "kronecker":
            rows = p.shape[0] if p.ndim else 1
            state["left"] = local(p).new_zeros(rows, rows).detach()
            if p.ndim > 1:
                columns = p[0].numel()
                state["right"] = local(p).new_zeros(columns, columns).detach()
        return state

    # -- the step -----------------------------------------------------------------------------

    def _update(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        parts, gs = [local(p) for p in params], [local(g) for g in grads]
        if group["weight_decay"] and not group["decoupled"]:
            gs = list(torch._foreach_add(gs, parts, alpha=group["weight_decay"]))
        keys = [_feature(group["feature"], g, p) for g, p in zip(gs, params, strict=True)]
        if group["place"] == "gradient":
            keys = self._preconditioned(group, params, gs, keys)
        read = self._momentum(group, params, keys)
        if group["place"] == "memory":
            read = self._preconditioned(group, params, gs, read)
        read = _output(group, params, read)
        if group["place"] == "output":
            read = self._preconditioned(group, params, read, read)
        if group["scale"] is not None:
            read = _scaled(group, params, read)
        decay = group["weight_decay"] if group["decoupled"] else 0.0
        descend({**group, "weight_decay": decay}, parts, read)

    def _momentum(
        self, group: dict[str, Any], params: list[Tensor], keys: list[Tensor]
    ) -> list[Tensor]:
        """Write the keys into the momentum; what is read from it."""
        alpha = group["retention"]
        eta = 1 - alpha if group["rate"] is None else group["rate"]
        if not alpha and group["readout"] == "memory":
            return keys if eta == 1 else list(torch._foreach_mul(keys, eta))
        ms = [local(self.state[p]["momentum"]) for p in params]
        early: list[Tensor] = []
        if group["readout"] == "before":
            early = list(torch._foreach_lerp(keys, ms, group["read_retention"]))
        if group["objective"] == "dot" and group["rate"] is None:
            torch._foreach_lerp_(ms, keys, 1 - alpha)
        elif group["objective"] == "dot":
            torch._foreach_mul_(ms, alpha)
            torch._foreach_add_(ms, keys, alpha=eta)
        else:
            old = [m.clone() for m in ms] if torch.is_grad_enabled() else ms
            triples = zip(params, old, keys, strict=True)
            steps = [_written(group, p, m, k, eta) for p, m, k in triples]
            torch._foreach_mul_(ms, alpha)
            torch._foreach_add_(ms, steps)
        counts = self._counts(group, params)
        if group["readout"] == "before":
            return early
        if group["readout"] == "nadam":
            return self._nadam(group, params, ms, keys, counts)
        if group["readout"] == "nesterov" and group["rate"] is None:
            read = torch._foreach_lerp(keys, ms, alpha)
        elif group["readout"] == "nesterov":
            read = torch._foreach_add(torch._foreach_mul(ms, alpha), keys, alpha=eta)
        else:
            read = torch._foreach_mul(ms, 1)
        # An orthogonalised or signed read-out does not see the correction.
        if group["bias_correction"] and group["rate"] is None and group["place"] != "output":
            torch._foreach_div_(read, [1 - alpha**t for t in counts])
        return list(read)

    def _nadam(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        ms: list[Tensor],
        keys: list[Tensor],
        counts: list[Any],
    ) -> list[Tensor]:
        """Nesterov's look-ahead with a momentum that warms up (Dozat's NAdam)."""
        decay, beta = group["momentum_decay"], group["retention"]
        read = []
        for p, m, key, t in zip(params, ms, keys, counts, strict=True):
            now = beta * (1 - 0.5 * 0.96 ** (t * decay))
            then = beta * (1 - 0.5 * 0.96 ** ((t + 1) * decay))
            product = self.state[p]["momentum_product"]
            product *= now
            if not group["capturable"]:
                product = product.item()
            read.append(key * ((1 - now) / (1 - product)) + m * (then / (1 - product * then)))
        return read

    def _preconditioned(
        self, group: dict[str, Any], params: list[Tensor], seen: list[Tensor], xs: list[Tensor]
    ) -> list[Tensor]:
        """Write ``seen`` into the second memory and apply its preconditioner P to ``xs``."""
        kind = group["value"]
        if kind == "identity":
            return xs
        alpha = group["value_retention"]
        eta = 1 - alpha if group["value_rate"] is None else group["value_rate"]
        counts = self._counts(group, params)
        correct = group["bias_correction"] and group["value_rate"] is None
        weights = [1 - alpha**t for t in counts] if correct else [1.0] * len(params)
        if kind == "diagonal":
            hs = [local(self.state[p]["square"]) for p in params]
            torch._foreach_mul_(hs, alpha)
            torch._foreach_addcmul_(hs, seen, seen, value=eta)
            roots = torch._foreach_sqrt(hs)
            if correct:
                roots = torch._foreach_div(roots, [w**0.5 for w in weights])
            roots = torch._foreach_add(roots, group["eps"])
            return list(torch._foreach_div(xs, roots))
        result = []
        for p, g, x, weight in zip(params, seen, xs, weights, strict=True):
            state, eps = self.state[p], group["eps"]
            g, x = gather(g, p), gather(x, p)
            if kind == "full":
                outer = state["outer"].mul_(alpha).add_(torch.outer(g.flatten(), g.flatten()) * eta)
                done = _power(outer / weight, -0.5, eps) @ x.flatten()
            else:
                g2 = g.reshape(len(g) if g.ndim else 1, -1)
                left = state["left"].mul_(alpha).add_(g2 @ g2.mT * eta)
                power = -0.25 if "right" in state else -0.5
                done = _power(left / weight, power, eps) @ x.reshape(g2.shape)
                if "right" in state:
                    right = state["right"].mul_(alpha).add_(g2.mT @ g2 * eta)
                    done = done @ _power(right / weight, power, eps)
            result.append(own_part(done.reshape(p.shape), p))
        return result


def _feature(feature: Any, g: Tensor, p: Tensor) -> Tensor:
    if callable(feature):
        return own_part(feature(gather(g, p)), p)
    if feature == "sign":
        return g.sign()
    if feature == "unit":
        square = sum_over_parts(g.square().sum().unsqueeze(0), [p])[0]
        return g / square.sqrt().clamp(min=torch.finfo(g.dtype).tiny)
    return g


def _written(group: dict[str, Any], p: Tensor, m: Tensor, key: Tensor, eta: float) -> Tensor:
    """``-eta' dL~``: what a step on the inner objective adds to the memory."""
    objective = OBJECTIVES[group["objective"]]
    if p.ndim < 2 or group["structure"] == "elementwise":
        y, v = (m * key).unsqueeze(-1), torch.ones_like(key).unsqueeze(-1)
        bend = 1.0 if objective.curvature is None else objective.curvature(y, v)
        return -eta / (1 + eta * bend * key.square()) * objective.grad(y, v).squeeze(-1) * key
    m2, k = gather(m, p).flatten(1), gather(key, p).flatten(1)
    y = m2 @ k.mT
    v = torch.eye(len(k), dtype=k.dtype, device=k.device)
    bend = 1.0 if objective.curvature is None else objective.curvature(y, v).max()
    rate = eta / (1 + eta * bend * k.square().sum())
    return own_part((objective.grad(y, v) @ k * -rate).view(p.shape), p)


def _output(group: dict[str, Any], params: list[Tensor], read: list[Tensor]) -> list[Tensor]:
    """sigma."""
    output = group["output"]
    if callable(output):
        pairs = zip(read, params, strict=True)
        return [own_part(output(gather(x, p)), p) for x, p in pairs]
    if output == "sign":
        return [x.sign() for x in read]
    if output == "identity":
        return read
    kind = None if group["ns_dtype"] is None else getattr(torch, group["ns_dtype"])
    whole = [gather(x, p).flatten(1) for x, p in zip(read, params, strict=True)]
    done = orthogonalise(whole, group["ns_steps"], dtype=kind)
    pairs = zip(done, params, strict=True)
    return [own_part(x.reshape(p.shape), p).to(p.dtype) for x, p in pairs]


def _scaled(group: dict[str, Any], params: list[Tensor], read: list[Tensor]) -> list[Tensor]:
    if group["scale"] != "rms":
        return [
            x * shape_scale(group["scale"], p.shape[0], p[0].numel())
            for x, p in zip(read, params, strict=True)
        ]
    squares = sum_over_parts(torch.stack([x.square().sum() for x in read]), params)
    norms = (squares.sqrt() + group["eps"]).unbind()
    return [x * (0.2 * p.numel() ** 0.5 / n) for x, p, n in zip(read, params, norms, strict=True)]


def _power(matrix: Tensor, power: float, eps: float) -> Tensor:
    """``(matrix + eps I)^power`` of a symmetric matrix that is positive semi-definite."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * (values.clamp(min=0) + eps) ** power @ vectors.mT
