"""What a Hope model consists of (SPEC §7), as a Hugging Face configuration."""

from __future__ import annotations

import dataclasses
import difflib
import functools
from typing import Any

from transformers import PreTrainedConfig

from nestlearn.memory.structures import ACTIVATIONS
from nestlearn.nn.mixers import (
    DEEP_MEMORIES,
    DELTA_RULE,
    WINDOWED,
    build_mixer,
    default_chunk,
    layer_mixers,
    least_layers,
)


@dataclasses.dataclass(frozen=True)
class _Shape:
    """A preset: its sizes, and how many parameters the whole model is to have."""

    parameters: float
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    tie_word_embeddings: bool
    cms_periods: tuple[int, ...]


# Vocabulary 259 = 256 bytes + begin, end, padding. The paper's sizes have its vocabulary of 32k.
_PRESETS = {
    "tiny": _Shape(0.13e6, 259, 64, 2, 2, 1_024, True, (1,)),
    "small": _Shape(1.0e6, 259, 128, 4, 4, 2_048, True, (1, 4)),
    "140m": _Shape(140e6, 32_000, 768, 12, 12, 4_096, True, (1, 4, 16)),
    "760m": _Shape(760e6, 32_000, 1_536, 24, 16, 4_096, True, (1, 4, 16)),
    "1.3b": _Shape(1.3e9, 32_000, 2_048, 24, 16, 4_096, True, (1, 4, 16)),
}

# Keys that are no fields but that Hugging Face passes or stores.
_FOREIGN_KEYS = {
    "_attn_implementation_internal",
    "_commit_hash",
    "_experts_implementation_internal",
    "_name_or_path",
    "attn_implementation",
    "auto_map",
    "experts_implementation",
    "model_type",
    "name_or_path",
    "num_labels",
    "output_attentions",
    "torch_dtype",
}


_WHOLE = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
    "memory_depth",
    "memory_chunk",
    "projection_chunk",
    "conv_size",
)
_YES_NO = (
    "memory_momentum",
    "memory_weight_decay",
    "memory_truncate",
    "allow_neg_eigval",
    "tie_word_embeddings",
    "use_cache",
)

# Fields that only the self-modifying mixer reads.
_SELF_MODIFYING = (
    "memory_depth",
    "memory_objective",
    "memory_readout",
    "memory_rule",
    "memory_momentum",
    "memory_weight_decay",
    "memory_retention",
    "memory_half_lives",
    "memory_targets",
    "memory_truncate",
    "memory_adaptive",
    "eta_max",
    "write_threshold",
    "write_cost",
    "counters",
    "counter_noise",
)
# Who reads the fields that are not for every mixer.
_OWNERS = {
    **dict.fromkeys(_SELF_MODIFYING, ("self_modifying",)),
    "memory_width": ("self_modifying", *DEEP_MEMORIES),
    "sliding_window": WINDOWED,
    "allow_neg_eigval": DELTA_RULE,
}


class HopeConfig(PreTrainedConfig):
    """Sizes and variants of a Hope model; every field is saved in ``config.json``.

    Attributes:
        vocab_size, hidden_size, num_hidden_layers, num_attention_heads: as in any language model.
        intermediate_size: hidden width of the continuum memory (CMS), over all its levels; None:
            four times ``hidden_size``.
        max_position_embeddings: context the model is meant for; only attention depends on it.
        mixer: ``"self_modifying"`` (Hope), ``"attention"`` (Hope-Attention), a baseline's name (see
            ``nestlearn.nn.mixers.MIXERS``), or a list of names that the layers take turns in;
            ``"samba"`` is ``["mamba2", "attention"]`` with a window.
        memory_depth: layers of each memory. memory_width: hidden width of a deep memory, per head;
            None: what is usual for the mixer (Hope the head size, Titans twice, TTT four times it).
        memory_chunk: tokens between two writes of the memory; None: what is usual for the mixer
            (64, for TTT 16). projection_chunk: the same for the memories that generate keys,
            values, eta and alpha (SPEC §5). 1 is the exact recurrence.
        memory_objective: ``"dot"`` or ``"l2"``; memory_readout: ``"chunk"`` or ``"token"``;
        memory_rule: ``"dgd"`` or ``"gd"``; memory_momentum, memory_weight_decay: Tab. 6's variants.
        memory_retention: forgetting returns to the learned ``"initial"`` state or to ``"zero"``.
        memory_half_lives: tokens until what was written has faded to a half, before training: in
            the first head and in the last.
        memory_targets: ``"generated"`` by every memory, or ``"shared"`` (Eq. 79-82).
        memory_truncate: let no training gradient pass a chunk's boundary.
        memory_adaptive: which projections are memories, of ``"k", "v", "q", "eta", "alpha"``.
        eta_max: largest inner learning rate; conv_size: window of the causal convolution.
        write_threshold: tokens whose write gate is not above it write exactly nothing, in [0, 1).
        write_cost: what a lasting write adds to the training loss, in nats (see
            `nestlearn.nn.write_cost`); like the loss it is divided by the number of labels.
        counters: channels beside the heads that are plain sums, which count
            (`nestlearn.nn.counting`). counter_noise: what is counted is off by normal numbers of
            this deviation in training.
        allow_neg_eigval: writes of the delta rule (deltanet, gated_deltanet, comba) may be up to 2,
            where ``I - eta k k^T`` has an eigenvalue of -1, in the place of 1: such a memory can
            turn a value round, which tracking a state takes (Grazzi et al. 2025, arXiv 2411.12537).
        sliding_window: attention sees this many latest tokens; None: all, but half of
            ``max_position_embeddings`` in ``"samba"``, ``"titans_mag"`` and ``"titans_mal"``.
        cms_periods: update period of each CMS level in optimizer steps, fastest first; ``[1]`` is a
            Transformer's MLP. cms_kind: ``"sequential"``, ``"nested"`` or ``"independent"``.
        hidden_act, rms_norm_eps, rope_theta, tie_word_embeddings, initializer_range: as usual.

    Raises:
        ValueError: an unknown key (with the nearest known one) or a value out of range.

    Example:
        >>> config = HopeConfig.preset("small", mixer="attention")
        >>> config.hidden_size, config.mixer
        (128, 'attention')
    """

    model_type = "hope"
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 32_000
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int | None = None
    max_position_embeddings: int = 4_096
    mixer: str | list[str] | tuple[str, ...] = "self_modifying"
    memory_depth: int = 2
    memory_width: int | None = None
    memory_chunk: int | None = None
    projection_chunk: int = 64
    memory_objective: str = "dot"
    memory_readout: str = "token"
    memory_rule: str = "dgd"
    memory_momentum: bool = False
    memory_weight_decay: bool = True
    memory_retention: str = "initial"
    memory_half_lives: list[float] | tuple[float, ...] = (100, 10_000)
    memory_targets: str = "generated"
    memory_truncate: bool = False
    memory_adaptive: list[str] | tuple[str, ...] = ("k", "v", "eta", "alpha")
    eta_max: float = 8.0
    write_threshold: float = 0.0
    write_cost: float = 0.0
    counters: int = 0
    counter_noise: float = 0.0
    allow_neg_eigval: bool = False
    conv_size: int = 4
    sliding_window: int | None = None
    cms_periods: list[int] | tuple[int, ...] = (1,)
    cms_kind: str = "sequential"
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    tie_word_embeddings: bool = True
    initializer_range: float = 0.02
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self._check_keys(kwargs)
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size if _whole(self.hidden_size) else 1
        if not isinstance(self.mixer, str):
            self.mixer = list(self.mixer)
        cycle = layer_mixers(self.mixer, len(self.mixer))
        if self.memory_chunk is None:
            self.memory_chunk = min(default_chunk(name) for name in cycle)
        if self.mixer == "samba" and self.sliding_window is None:
            # The published ratio: 2,048 of 4,096.
            self.sliding_window = max(1, self.max_position_embeddings // 2)
        self.memory_adaptive = list(self.memory_adaptive)
        self.memory_half_lives = list(self.memory_half_lives)
        self.cms_periods = list(self.cms_periods)
        super().__post_init__(**kwargs)
        self._check_values()

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> HopeConfig:
        """The configuration of a named size: ``tiny``, ``small``, ``140m``, ``760m``, ``1.3b``.

        ``intermediate_size`` is chosen so that the model has the preset's number of parameters
        with *any* mixer: comparisons at one preset are at equal parameters. Overriding
        ``hidden_size`` or ``num_hidden_layers`` keeps the preset's ratio of parameters to size.

        Raises:
            ValueError: unknown preset or key.
        """
        if name not in _PRESETS:
            raise ValueError(f"unknown preset {name!r}; choose one of {', '.join(_PRESETS)}")
        shape = _PRESETS[name]
        sizes = {k: v for k, v in dataclasses.asdict(shape).items() if k != "parameters"}
        special = shape.vocab_size == 259 and "vocab_size" not in overrides
        tokens = {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258} if special else {}
        config = cls(**{**sizes, **tokens, **overrides})
        if overrides.get("intermediate_size") is None:
            tables = 1 if shape.tie_word_embeddings else 2
            blocks = shape.parameters - tables * shape.vocab_size * shape.hidden_size
            per_layer = blocks / shape.num_hidden_layers
            per_layer *= (config.hidden_size / shape.hidden_size) ** 2
            config.intermediate_size = _matching_width(per_layer, config)
        return config

    @classmethod
    def with_parameters(cls, parameters: float, **fields: Any) -> HopeConfig:
        """A configuration whose model has this many parameters, with *any* mixer.

        ``intermediate_size`` is chosen; all other fields are as given.

        Raises:
            ValueError: unknown key, or the mixers alone need more.

        Example:
            >>> sizes = dict(vocab_size=64, hidden_size=64, num_hidden_layers=2,
            ...              num_attention_heads=2)
            >>> [HopeConfig.with_parameters(120e3, mixer=m, **sizes).intermediate_size
            ...  for m in ("attention", "deltanet")]
            [320, 316]
        """
        config = cls(**fields)
        tables = 1 if config.tie_word_embeddings else 2
        rest = parameters - tables * config.vocab_size * config.hidden_size
        config.intermediate_size = _matching_width(rest / config.num_hidden_layers, config)
        return config

    @property
    def layer_mixers(self) -> list[str]:
        """The mixer of every layer, bottom to top."""
        return layer_mixers(self.mixer, self.num_hidden_layers)

    @staticmethod
    def presets() -> tuple[str, ...]:
        """Names of all presets."""
        return tuple(_PRESETS)

    def _check_keys(self, kwargs: dict[str, Any]) -> None:
        fields = list(HopeConfig.__annotations__)
        for key in kwargs:
            if key in _FOREIGN_KEYS:
                continue
            near = difflib.get_close_matches(key, fields, n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(fields)}"
            raise ValueError(f"HopeConfig has no field {key!r}; {hint}")

    def _check_values(self) -> None:
        for field in _WHOLE:
            _require(_whole(getattr(self, field)), field, getattr(self, field), "an integer >= 1")
        for field in ("memory_width", "sliding_window"):
            value = getattr(self, field)
            _require(value is None or _whole(value), field, value, "an integer >= 1 or None")
        for field in ("eta_max", "rms_norm_eps", "rope_theta", "initializer_range"):
            value = getattr(self, field)
            fits = _number(value) and 0 < value < float("inf")
            _require(fits, field, value, "a number > 0")
        share = self.write_threshold
        fits = _number(share) and 0 <= share < 1
        _require(fits, "write_threshold", share, "a number in [0, 1)")
        for field in ("write_cost", "counter_noise"):
            value = getattr(self, field)
            fits = _number(value) and 0 <= value < float("inf")
            _require(fits, field, value, "a number >= 0")
        fits = type(self.counters) is int and self.counters >= 0
        _require(fits, "counters", self.counters, "an integer >= 0")
        fits = self.counters > 0 or self.counter_noise == 0
        _require(fits, "counter_noise", self.counter_noise, "0 with counters=0: it acts on them")
        for field in _YES_NO:
            value = getattr(self, field)
            _require(isinstance(value, bool), field, value, "True or False")
        for field, choices in {
            "memory_objective": ("dot", "l2"),
            "memory_readout": ("chunk", "token"),
            "memory_rule": ("dgd", "gd"),
            "memory_retention": ("initial", "zero"),
            "memory_targets": ("generated", "shared"),
            "cms_kind": ("sequential", "nested", "independent"),
        }.items():
            value = getattr(self, field)
            _require(value in choices, field, value, f"one of {', '.join(choices)}")
        span = self.memory_half_lives
        numbers = all(isinstance(t, int | float) and 0 < t < float("inf") for t in span)
        _require(
            len(span) == 2 and numbers and span[0] <= span[1],
            "memory_half_lives",
            span,
            "two numbers of tokens > 0, the shortest first",
        )
        known = {"k", "v", "q", "eta", "alpha"}
        adaptive = self.memory_adaptive
        _require(set(adaptive) <= known, "memory_adaptive", adaptive, f"taken from {sorted(known)}")
        _require(
            bool(self.cms_periods) and all(_whole(p) for p in self.cms_periods),
            "cms_periods",
            self.cms_periods,
            "a list of integers >= 1, one per level",
        )
        _require(
            list(self.cms_periods) == sorted(self.cms_periods),
            "cms_periods",
            self.cms_periods,
            "ordered from the fastest level to the slowest",
        )
        acts = (*ACTIVATIONS, "gelu_pytorch_tanh")
        act = self.hidden_act
        _require(act in acts, "hidden_act", act, f"one of {', '.join(acts)}")
        least = least_layers(self.mixer)
        _require(
            self.num_hidden_layers >= least,
            "num_hidden_layers",
            self.num_hidden_layers,
            f"at least {least} with mixer {self.mixer!r}, whose layers take turns",
        )
        self._check_ownership()
        heads = self.num_attention_heads
        _require(
            self.hidden_size % heads == 0,
            "hidden_size",
            self.hidden_size,
            f"a multiple of num_attention_heads={heads}",
        )
        for field in ("pad_token_id", "bos_token_id", "eos_token_id"):
            value = getattr(self, field)
            ids = value if isinstance(value, list) else [value]
            inside = all(i is None or 0 <= i < self.vocab_size for i in ids)
            _require(inside, field, value, f"inside the vocabulary of {self.vocab_size}")

    def _check_ownership(self) -> None:
        """Fields of one mixer must not be set, and then ignored, for another."""
        used = set(self.layer_mixers)
        for field, names in _OWNERS.items():
            if not used & set(names):
                value, default = getattr(self, field), getattr(HopeConfig, field)
                default = list(default) if isinstance(default, tuple) else default
                _require(
                    value == default,
                    field,
                    value,
                    f"left alone with mixer {self.mixer!r}: it belongs to "
                    f"{', '.join(map(repr, names))}",
                )


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _require(ok: bool, field: str, value: Any, expected: str) -> None:
    if not ok:
        raise ValueError(f"HopeConfig: {field} must be {expected}, got {value!r}")


def _matching_width(per_layer: float, config: HopeConfig) -> int:
    """CMS width at which a block has this many parameters."""
    width = config.hidden_size
    left = per_layer - _mixer_parameters(config) - 2 * width
    step = (64 if width >= 512 else 4) * len(config.cms_periods)
    hidden = round(left / (2 * width) / step) * step
    if hidden < step:
        raise ValueError(
            f"mixer {config.mixer!r} alone needs more parameters than the blocks are to have; "
            "set intermediate_size (equal parameters cannot be kept)"
        )
    return hidden


def _mixer_parameters(config: HopeConfig) -> float:
    """Of a layer, on average over layers: all have the same CMS width."""
    settings = config.to_json_string(use_diff=False)
    names = config.layer_mixers
    return sum(_count_mixer(name, settings) for name in names) / len(names)


@functools.lru_cache(maxsize=64)
def _count_mixer(name: str, settings: str) -> int:
    import json
    import types

    import torch

    with torch.device("meta"):
        layer = build_mixer(name, types.SimpleNamespace(**json.loads(settings)))
    return sum(p.numel() for p in layer.parameters())
