"""Well-known optimizers as settings of one associative memory (SPEC §3.1)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor

from nestlearn.memory.objectives import OBJECTIVES
from nestlearn.optim.base import check, choose

Map = str | Callable[[Tensor], Tensor]

MAPS = ("identity", "sign", "unit")
OUTPUTS = ("identity", "sign", "newton_schulz")
READOUTS = ("memory", "nesterov", "before", "nadam")
VALUES = ("identity", "diagonal", "full", "kronecker")
PLACES = ("gradient", "memory", "output")
SCALES = (None, "original", "match_rms_adamw", "rms")


@dataclass(frozen=True)
class Design:
    """What an `AssociativeMomentum` remembers and how it is read.

    Attributes:
        objective: inner objective of the momentum, a name of `nestlearn.memory.OBJECTIVES`.
        structure: ``"elementwise"`` (each entry is a memory of its own, its key the entry of the
            gradient) or ``"matrix"`` (keys are the gradient's rows). One and the same for the dot
            product.
        feature: phi, applied to the gradient before it is written.
        retention: alpha, what the momentum keeps of itself.
        rate: eta, with which it is written; None for ``1 - retention``, an average.
        readout: what is read: the ``"memory"`` after the write; ``"nesterov"``: as it will be after
            one more write of this gradient; ``"before"``: as the old memory would be after a write
            with retention ``read_retention``; ``"nadam"``.
        read_retention: of ``"before"``.
        momentum_decay: of ``"nadam"``.
        bias_correction: divide averages by the weight that they have seen so far.
        value: P, what the memory is to answer: ``"identity"`` or a preconditioner made from a
            second memory of squared gradients: ``"diagonal"`` g^2, ``"full"`` g g^T of the whole
            tensor, ``"kronecker"`` g g^T and g^T g.
        place: what P is applied to: the ``"gradient"`` (Eq. 47), the ``"memory"`` when it is read,
            or the ``"output"`` after sigma.
        value_retention, value_rate: alpha and eta of the second memory.
        eps: added to the root of the second memory (to its diagonal where it is a matrix).
        output: sigma, applied to what is read.
        scale: of the step: ``"original"`` and ``"match_rms_adamw"`` from the matrix's shape, see
            `M3`; ``"rms"``: a root mean square of 0.2.
        decoupled: weight decay acts on the weights, not through the gradient.
        ns_steps: Newton-Schulz steps.
        ns_dtype: their type, ``"bfloat16"``, ``"float32"``, or None for the gradient's.
    """

    objective: str = "dot"
    structure: str = "elementwise"
    feature: Map = "identity"
    retention: float = 0.9
    rate: float | None = 1.0
    readout: str = "memory"
    read_retention: float = 0.9
    momentum_decay: float = 4e-3
    bias_correction: bool = False
    value: str = "identity"
    place: str = "gradient"
    value_retention: float = 0.999
    value_rate: float | None = None
    eps: float = 1e-8
    output: Map = "identity"
    scale: str | None = None
    decoupled: bool = True
    ns_steps: int = 5
    ns_dtype: str | None = "bfloat16"


_ADAM = Design(rate=None, bias_correction=True, value="diagonal", place="memory", decoupled=False)
_MUON = Design(
    retention=0.95, rate=None, readout="nesterov", output="newton_schulz", scale="original"
)
_ADAGRAD = Design(retention=0.0, value="diagonal", value_retention=1.0, value_rate=1.0, eps=1e-10)

PRESETS: dict[str, Design] = {
    "sgd": Design(decoupled=False),
    "nesterov": Design(readout="nesterov", decoupled=False),
    "signsgd": Design(retention=0.0, output="sign"),
    "signum": Design(rate=None, output="sign"),
    "lion": Design(retention=0.99, rate=None, readout="before", output="sign"),
    "adagrad": replace(_ADAGRAD, decoupled=False),
    "adagrad_full": replace(_ADAGRAD, value="full", eps=1e-6),
    "shampoo": replace(_ADAGRAD, value="kronecker", eps=1e-4),
    "rmsprop": replace(_ADAGRAD, value_retention=0.99, value_rate=None, eps=1e-8, decoupled=False),
    "adam": _ADAM,
    "adamw": replace(_ADAM, decoupled=True),
    "nadam": replace(_ADAM, readout="nadam"),
    "muon": _MUON,
    "adamuon": replace(_MUON, value="diagonal", place="output", bias_correction=True, scale="rms"),
    "delta": Design(objective="l2", structure="matrix"),
}
"""Name to design. Each but ``delta`` (Eq. 48-49 with one inner rate) equals the optimizer it is
named after; docs/optimizers.md derives them."""


def design_of(preset: str, **changes: Any) -> dict[str, Any]:
    """The preset's design with some fields changed, as options of a parameter group.

    Raises:
        ValueError: an unknown preset. TypeError: an unknown field.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    return asdict(replace(PRESETS[preset], **changes))


def check_design(group: dict[str, Any]) -> None:
    """Raise ValueError for a design that does not fit together."""
    choose("objective", group["objective"], tuple(OBJECTIVES))
    choose("structure", group["structure"], ("elementwise", "matrix"))
    for name, allowed in (("feature", MAPS), ("output", OUTPUTS)):
        if not callable(group[name]):
            choose(name, group[name], allowed)
    choose("readout", group["readout"], READOUTS)
    choose("value", group["value"], VALUES)
    choose("place", group["place"], PLACES)
    choose("scale", group["scale"], SCALES)
    choose("ns_dtype", group["ns_dtype"], ("bfloat16", "float32", None))
    for name in ("retention", "value_retention"):
        check(group, name, high=1.0, open_high=False)
        rate = name.replace("retention", "rate")
        if group[rate] is not None:
            check(group, rate)
        elif group[name] == 1.0:
            raise ValueError(f"{name}=1 keeps everything, so nothing new would enter: give {rate}")
    check(group, "read_retention", high=1.0)
    check(group, "momentum_decay", "eps")
    if not isinstance(group["ns_steps"], int) or group["ns_steps"] < 1:
        raise ValueError(f"ns_steps must be an integer, 1 or more, got {group['ns_steps']!r}")
    plain = group["value"] == "identity" or group["place"] != "gradient"
    if group["objective"] != "dot" and not plain:
        raise ValueError(
            f"objective={group['objective']!r} has the value identity: its answers are compared "
            "with it; apply the preconditioner with place='memory'"
        )
    if group["value"] in ("full", "kronecker") and group["place"] == "output":
        raise ValueError("place='output' is for value='diagonal'")
    if group["readout"] == "nadam" and group["rate"] is not None:
        raise ValueError("readout='nadam' reads an average: leave rate=None")
