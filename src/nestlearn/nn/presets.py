"""Named memories of the literature as points in one space (SPEC §2).

A `MemorySpec` says what is stored (structure), what is minimised (objective), how it is written
(rule, momentum, window), what is kept (retention), and how keys are seen (feature map). Each
preset is one such point; changing one field gives its neighbour.
"""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass
from typing import Any

from nestlearn.memory.objectives import OBJECTIVES
from nestlearn.memory.structures import ACTIVATIONS, MAX_DEPTH
from nestlearn.rules.linear import LINEAR_RULES

RULES = (*LINEAR_RULES, "gradient", "dgd")
RETENTIONS = ("none", "fixed", "gate", "kl")
FEATURES = ("identity", "elu1", "polynomial", "quadratic")
CHOICES: dict[str, tuple[str, ...]] = {
    "rule": RULES,
    "objective": tuple(OBJECTIVES),
    "retention": RETENTIONS,
    "feature": FEATURES,
    "rate": ("one", "gate"),
    "readout": ("token", "chunk"),
    "activation": tuple(ACTIVATIONS),
}


@dataclass(frozen=True)
class MemorySpec:
    """One associative memory.

    Attributes:
        rule: "hebbian" (Eq. 64), "delta" (Eq. 65), "oja" (Eq. 66-67): linear rules, exact token
            recurrences for any chunk. "gradient": gradient descent on ``objective`` with gradients
            taken at the chunk's start. "dgd": the same with delta gradient descent's decay
            (Eq. 57, 88).
        depth: weights per memory: 1 is a matrix, 2 to 4 an MLP with a residual (Eq. 89).
        expansion: hidden width of a deep memory in units of the head size.
        activation: of a deep memory, "silu" or "gelu".
        objective: inner objective of "gradient" and "dgd": "dot", "l2", "lp" or "huber".
        p: exponent of "lp".
        threshold: where "huber" becomes linear.
        retention: "none" (alpha = 1), "fixed" (``1 - 2^{-5-h}`` for head h), "gate" (one alpha per
            head and token), "kl" (gate on the logarithm of simplex weights: KL retention).
        gated_decay: retention multiplies the whole delta update, ``alpha M (I - eta k k^T)``.
        closed_loop: Comba's feedback: the state is corrected by the share b of what was written,
            ``alpha M (I - b eta k k^T)``, and the query by the key, ``q - d k``; b in (0, 1) and d
            are learned per head.
        rate: "one" (eta = 1) or "gate" (one eta per head and token).
        eta_max: largest inner learning rate.
        eta_start: inner learning rate of an untrained layer.
        momentum: ``S <- beta S - eta grad; M <- alpha M + S``, with a beta gate (Titans).
        window: pairs that the objective sums over (Omega rule, Eq. 68); 1 is the usual case.
        feature: map of queries and keys, before they are brought to unit norm: "identity", "elu1"
            (elu + 1), "polynomial" (``a x + b x^2``, learned), "quadratic" (x, all its products).
        normalise_values: values to unit norm as well.
        row_limit: bound on the row norms of weights that gradients write (never below the norm they
            start with); 0 switches it off.
        chunk: tokens per chunk, C.
        readout: "token": ``M_t q_t``; "chunk": the memory at the chunk's start answers.
        conv_size: window of the causal convolution in front.

    Raises:
        ValueError: a value is not one of its choices, or two fields contradict each other.
    """

    rule: str = "gradient"
    depth: int = 1
    expansion: float = 2.0
    activation: str = "silu"
    objective: str = "l2"
    p: float = 3.0
    threshold: float = 0.25
    retention: str = "gate"
    gated_decay: bool = False
    closed_loop: bool = False
    rate: str = "gate"
    eta_max: float = 1.0
    eta_start: float = 0.1
    momentum: bool = False
    window: int = 1
    feature: str = "identity"
    normalise_values: bool = True
    row_limit: float = 2.0
    chunk: int = 64
    readout: str = "token"
    conv_size: int = 4

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name} must be one of {', '.join(choices)}; got {getattr(self, name)!r}"
                )
        if not 1 <= self.depth <= MAX_DEPTH:
            raise ValueError(f"depth must be 1 to {MAX_DEPTH}, got {self.depth}")
        for name in ("chunk", "window", "conv_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.eta_start < self.eta_max:
            raise ValueError(f"eta_start must lie in (0, eta_max), got {self.eta_start}")
        if self.expansion <= 0 or self.row_limit < 0:
            raise ValueError("expansion must be > 0 and row_limit >= 0")
        for wrong, message in self._conflicts():
            if wrong:
                raise ValueError(message)

    def _conflicts(self) -> list[tuple[bool, str]]:
        kl = self.retention == "kl"
        return [
            (
                self.linear and (self.depth > 1 or self.momentum or self.window > 1 or kl),
                f"rule {self.rule!r} writes a matrix without momentum, window or KL retention; "
                "use rule='gradient' for these",
            ),
            (
                self.rule == "oja" and not self.normalise_values,
                "rule 'oja' decays along the values and diverges unless normalise_values=True",
            ),
            (
                self.linear and self.readout == "chunk",
                f"rule {self.rule!r} is exact token by token: readout must be 'token'",
            ),
            (
                self.rule == "dgd" and self.window > 1,
                "rule 'dgd' has no window; use rule='gradient' or window=1",
            ),
            (
                kl and (self.momentum or self.window > 1 or self.rule != "gradient"),
                "KL retention goes with rule='gradient', without momentum or window",
            ),
            (
                kl and self.readout == "token",
                "KL retention is read at the chunk's start: readout must be 'chunk'",
            ),
            (
                self.feature == "quadratic" and self.depth > 1,
                "the quadratic feature map changes the size of keys, a deep memory needs "
                "d_in = d_out: use depth=1 or feature='polynomial'",
            ),
            (
                self.rule == "delta" and self.eta_max > 2,
                "a step of the delta rule above 2 makes a memory grow without bound: eta_max must "
                f"be at most 2, got {self.eta_max}",
            ),
            (
                self.gated_decay and self.rule not in ("delta", "oja"),
                "gated_decay belongs to the rules 'delta' and 'oja'",
            ),
            (
                self.closed_loop and not (self.rule == "delta" and self.gated_decay),
                "closed_loop belongs to the rule 'delta' with gated_decay=True",
            ),
            (
                self.rate == "one" and not self.linear,
                "rate='one' (eta = 1) belongs to the linear rules; gradient writes need a gate",
            ),
        ]

    @property
    def linear(self) -> bool:
        """Whether the rule is linear in the memory (exact for any chunk)."""
        return self.rule in LINEAR_RULES

    @property
    def gates(self) -> tuple[str, ...]:
        """The data-dependent scalars per head and token, in order."""
        names = []
        if self.rate == "gate":
            names.append("eta")
        if self.retention in ("gate", "kl"):
            names.append("alpha")
        if self.momentum:
            names.append("beta")
        if self.window > 1:
            names.append("omega")
        return tuple(names)


_RAW: dict[str, Any] = {"normalise_values": False}
_MIRAS: dict[str, Any] = {"depth": 2}

PRESETS: dict[str, MemorySpec] = {
    # M + v phi(k)^T
    "linear_attention": MemorySpec(
        rule="hebbian", rate="one", retention="none", feature="elu1", **_RAW
    ),
    # gamma_h M + v k^T
    "retnet": MemorySpec(rule="hebbian", rate="one", retention="fixed", **_RAW),
    # M (I - eta k k^T) + eta v k^T
    "deltanet": MemorySpec(rule="delta", retention="none", eta_start=0.5, **_RAW),
    # alpha M (I - eta k k^T) + eta v k^T
    "gated_deltanet": MemorySpec(rule="delta", gated_decay=True, eta_start=0.5, **_RAW),
    # alpha M (I - b eta k k^T) + eta v k^T, read with q - d k (Hu et al. 2025, arXiv 2506.02475)
    "comba": MemorySpec(rule="delta", gated_decay=True, closed_loop=True, eta_start=0.5, **_RAW),
    # W - eta grad 1/2 ||W k - v||^2, gradients at the start of mini-batches of 16
    "ttt_linear": MemorySpec(retention="none", chunk=16),
    "ttt_mlp": MemorySpec(retention="none", depth=2, expansion=4.0, activation="gelu", chunk=16),
    # S <- beta S - eta grad; M <- alpha M + S
    "titans": MemorySpec(depth=2, momentum=True),
    # Hebbian in spirit, deep in structure
    "dla": MemorySpec(depth=2, objective="dot"),
    # Omega rule over a sliding window, polynomial features
    "atlas": MemorySpec(depth=2, momentum=True, window=8, feature="polynomial"),
    "moneta": MemorySpec(objective="lp", p=3.0, **_MIRAS),
    "yaad": MemorySpec(objective="huber", **_MIRAS),
    "memora": MemorySpec(retention="kl", readout="chunk", **_MIRAS),
}
"""Presets by name."""


def get_spec(preset: str | MemorySpec, **overrides: Any) -> MemorySpec:
    """The spec called ``preset`` with some fields changed.

    Example:
        >>> get_spec("titans", chunk=16).momentum
        True

    Raises:
        ValueError: unknown preset or field (with the nearest names), or a contradiction.
    """
    if isinstance(preset, str):
        if preset not in PRESETS:
            raise ValueError(_unknown("memory preset", preset, PRESETS))
        preset = PRESETS[preset]
    fields = [f.name for f in dataclasses.fields(MemorySpec)]
    for name in overrides:
        if name not in fields:
            raise ValueError(_unknown("memory setting", name, fields))
    return dataclasses.replace(preset, **overrides)


def _unknown(what: str, name: str, known: Any) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"unknown {what} {name!r}; choose one of {', '.join(known)}{hint}"
