"""Reading texts of any length in pieces, with the state handed on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

PIECE = 4096
"""Tokens that are read at once; a multiple of every segment."""


@torch.no_grad()
def read(model: Any, ids: Tensor, piece: int = PIECE) -> Any:
    """The model's output after ``ids (B, T)``: ``logits`` of the last token, ``past_key_values``.

    Args:
        model: takes and hands back its state as ``past_key_values``.
        piece: tokens read at once.

    Example:
        >>> from nestlearn import HopeConfig, HopeForCausalLM
        >>> model = HopeForCausalLM(HopeConfig.preset("tiny")).eval()
        >>> read(model, torch.randint(256, (2, 100)), piece=32).logits.shape
        torch.Size([2, 1, 259])
    """
    state, out = None, None
    for part in ids.split(piece, 1):
        out = model(
            input_ids=part.to(model.device), past_key_values=state, use_cache=True, logits_to_keep=1
        )
        state = out.past_key_values
    return out


def context_length(model: Any) -> int | None:
    """Tokens a model can see; None for models that keep a state of constant size instead.

    Example:
        >>> from nestlearn import HopeConfig, HopeForCausalLM
        >>> [context_length(HopeForCausalLM(HopeConfig.preset("tiny", mixer=mixer)))
        ...  for mixer in ("self_modifying", "attention")]
        [None, 1024]
    """
    config = model.config.get_text_config()
    if config.model_type == "hope":
        sees_all = "attention" in config.layer_mixers and config.sliding_window is None
        return config.max_position_embeddings if sees_all else None
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        value = getattr(config, name, None)
        if isinstance(value, int):
            return value
    raise ValueError(
        f"the configuration of this {config.model_type} model does not say how long a context "
        "may be: set --max-length"
    )
