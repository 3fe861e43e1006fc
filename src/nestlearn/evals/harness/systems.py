"""The systems of the paper's tables, by name: each is a mixer in the same blocks."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any


@dataclasses.dataclass(frozen=True)
class System:
    """One row of the tables.

    Attributes:
        label: its name in the paper.
        fields: what it sets in `HopeConfig`.
        attention: whether any of its layers attends to tokens.
        narrow: where it would be larger than the others, its memories are as wide as a head.
    """

    label: str
    fields: dict[str, Any]
    attention: bool = False
    narrow: bool = False

    def but(self, label: str | None = None, /, **fields: Any) -> System:
        """The same with other fields, and under another label if one is given.

        Example:
            >>> SYSTEMS["hope"].but("Hope, one level", cms_periods=(1,)).fields
            {'mixer': 'self_modifying', 'cms_periods': (1,)}
        """
        return dataclasses.replace(self, label=label or self.label, fields=self.fields | fields)


SYSTEMS: dict[str, System] = {
    "transformer": System("Transformer", {"mixer": "attention"}, attention=True),
    "linear_attention": System("Linear attention", {"mixer": "linear_attention"}),
    "retnet": System("RetNet", {"mixer": "retnet"}),
    "deltanet": System("DeltaNet", {"mixer": "deltanet"}),
    "deltanet_neg": System("DeltaNet (η to 2)", {"mixer": "deltanet", "allow_neg_eigval": True}),
    "gated_deltanet": System("Gated DeltaNet", {"mixer": "gated_deltanet"}),
    "gated_deltanet_neg": System(
        "Gated DeltaNet (η to 2)", {"mixer": "gated_deltanet", "allow_neg_eigval": True}
    ),
    "rwkv7": System("RWKV-7", {"mixer": "rwkv7"}),
    "comba": System("Comba", {"mixer": "comba"}),
    "samba": System("Samba", {"mixer": "samba"}, attention=True),
    "ttt_linear": System("TTT-Linear", {"mixer": "ttt_linear"}),
    "ttt_mlp": System("TTT-MLP", {"mixer": "ttt_mlp"}),
    "moneta": System("Moneta", {"mixer": "moneta"}),
    "yaad": System("Yaad", {"mixer": "yaad"}),
    "memora": System("Memora", {"mixer": "memora"}),
    "dla": System("DLA", {"mixer": "dla"}),
    "atlas": System("Atlas", {"mixer": "atlas"}),
    "titans": System("Titans (LMM)", {"mixer": "titans"}),
    "titans_mac": System("Titans (MAC)", {"mixer": "titans_mac"}, attention=True, narrow=True),
    "titans_mag": System("Titans (MAG)", {"mixer": "titans_mag"}, attention=True, narrow=True),
    "titans_mal": System("Titans (MAL)", {"mixer": "titans_mal"}, attention=True),
    "lstm": System("LSTM", {"mixer": "lstm"}),
    "srwm": System("SRWM", {"mixer": "srwm"}),
    "hope_attention": System(
        "Hope-Attention", {"mixer": "attention", "cms_periods": (1, 4)}, attention=True
    ),
    "hope": System("Hope", {"mixer": "self_modifying", "cms_periods": (1, 4)}),
}
"""Hope differs from the others in its mixer and in its MLPs' levels (CMS). Counters are plain
sums beside its heads (`nestlearn.nn.counting`)."""
SYSTEMS["hope_counters"] = SYSTEMS["hope"].but("Hope (counters)", counters=16, counter_noise=0.05)


@dataclasses.dataclass(frozen=True)
class Size:
    """Width, depth and heads that all systems of a comparison share.

    Attributes:
        width, layers, heads: of every system.
        parameters: of the whole model; None: what a Transformer of this width has whose MLPs are
            four times as wide.
    """

    width: int
    layers: int
    heads: int
    parameters: int | None = None


def check_system(name: str) -> System:
    """The system called ``name``.

    Raises:
        ValueError: there is none; the message lists all.
    """
    if name not in SYSTEMS:
        near = difflib.get_close_matches(name, SYSTEMS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(SYSTEMS)}"
        raise ValueError(f"unknown system {name!r}; {hint}")
    return SYSTEMS[name]


def build(name: str | System, size: Size, vocab_size: int, length: int, **fields: Any) -> Any:
    """A model with random weights; all systems of one size have equally many parameters.

    Layers that take turns (Samba) are at least one of each, also where the others have fewer. Two
    of Titans' wirings have two mixers in a block, which is more than the whole block of a small
    Transformer: there their memories are as wide as a head, at other sizes twice as wide.

    Args:
        name: of the system, or one that is not in `SYSTEMS`.
        size: what it shares with the others.
        vocab_size: tokens. length: of the longest sequence.
        fields: further fields of `HopeConfig`, before those of the system.

    Raises:
        ValueError: no such system, or its mixer alone is larger than ``size`` allows.

    Example:
        >>> models = [build(n, Size(32, 1, 2), 16, 64) for n in ("transformer", "gated_deltanet")]
        >>> [sum(p.numel() for p in m.parameters()) for m in models]
        [12896, 12932]
    """
    from nestlearn.models.hope import HopeConfig, HopeForCausalLM
    from nestlearn.nn.mixers import least_layers

    system = name if isinstance(name, System) else check_system(name)
    parameters = size.parameters
    if parameters is None:
        # Attention has four square matrices, an MLP of fourfold width eight; and two norms.
        blocks = size.layers * (12 * size.width**2 + 2 * size.width)
        parameters = vocab_size * size.width + blocks
    fields = {**fields, **system.fields}
    fields = {
        "vocab_size": vocab_size,
        "hidden_size": size.width,
        "num_hidden_layers": max(size.layers, least_layers(fields.get("mixer", HopeConfig.mixer))),
        "num_attention_heads": size.heads,
        "max_position_embeddings": length,
        **fields,
    }
    try:
        config = HopeConfig.with_parameters(parameters, **fields)
    except ValueError:
        if not system.narrow:
            raise
        fields["memory_width"] = size.width // size.heads
        config = HopeConfig.with_parameters(parameters, **fields)
    return HopeForCausalLM(config)
