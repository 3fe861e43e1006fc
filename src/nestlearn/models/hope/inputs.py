"""Masks and prompts, as Hugging Face passes them, in the form that a streaming model needs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nestlearn.models.hope.cache import HopeCache

if TYPE_CHECKING:
    from nestlearn.models.hope.modeling import HopeForCausalLM


def input_mask(
    attention_mask: Tensor | None, x: Tensor, seen_tokens: int, keeps_state: bool
) -> Tensor | None:
    """The ``(B, T)`` mask of this call's tokens, or None where no row needs separate work.

    Without a state to return, right padding needs none: every mixer is causal, so what stands right
    of a token cannot change it.

    Raises:
        ValueError: the mask has another shape than ``(B, T)`` or ``(B, seen + T)``.
    """
    if attention_mask is None:
        return None
    batch, length = x.shape[:2]
    shapes = {(batch, length), (batch, seen_tokens + length)}
    if tuple(attention_mask.shape) not in shapes:
        raise ValueError(
            f"attention_mask must be (batch, tokens) = {(batch, length)}, or cover the "
            f"{seen_tokens} tokens read before as well; got {tuple(attention_mask.shape)}"
        )
    mask = attention_mask[:, -length:].bool()
    if bool(mask.all()):
        return None
    starts_real = bool((mask[:, 0] | ~mask.any(1)).all())
    holes = bool((mask[:, 1:] & ~mask[:, :-1]).any())
    if starts_real and not holes and not keeps_state:
        return None
    return mask


def resume(
    model: HopeForCausalLM, inputs: Tensor | None, args: tuple, kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Arguments of ``generate`` for going on from a cache that has read something.

    ``generate`` cuts what the cache has read off the front of the prompt; a prompt that holds only
    new tokens must be marked by an attention mask that also covers the tokens read before.

    Raises:
        ValueError: a foreign cache, or a prompt of which nothing is new.
    """
    cache = kwargs["past_key_values"]
    if not isinstance(cache, HopeCache):
        raise ValueError(f"past_key_values must be a HopeCache, got {type(cache).__name__}")
    ids = inputs if inputs is not None else kwargs.get("input_ids")
    seen = cache.get_seq_length()
    if seen == 0 or ids is None:
        return kwargs
    kwargs = dict(kwargs)
    settings = args[0] if args else kwargs.get("generation_config") or model.generation_config
    copies = max(
        int(kwargs.get(name) or getattr(settings, name, None) or 1)
        for name in ("num_beams", "num_return_sequences")
    )
    if cache.batch_size not in (ids.shape[0], ids.shape[0] * copies):
        raise ValueError(
            f"the cache holds {cache.batch_size} rows and the prompt {ids.shape[0]}; use "
            "cache.batch_repeat_interleave(...) or cache.batch_select_indices(...)"
        )
    repeats = _repeats(cache, ids)
    if repeats and ids.shape[1] == seen:
        raise ValueError(
            f"the cache has read all {seen} tokens of this prompt; add the new tokens after them"
        )
    mask = kwargs.get("attention_mask")
    if not repeats:
        if mask is None:
            mask = torch.ones_like(ids)
        if mask.shape[1] == ids.shape[1]:
            mask = torch.cat([mask.new_ones(mask.shape[0], seen), mask], 1)
        kwargs["attention_mask"] = mask
    if cache.batch_size < ids.shape[0] * copies:
        cache = cache.copy()
        cache.batch_repeat_interleave(copies)
        kwargs["past_key_values"] = cache
    return kwargs


def _repeats(cache: HopeCache, ids: Tensor) -> bool:
    """Whether the prompt starts with the tokens that the cache has read."""
    seen, tail = cache.get_seq_length(), cache.tail
    if ids.shape[1] < seen or tail is None:
        return False
    rows = torch.arange(cache.batch_size, device=ids.device) * ids.shape[0] // cache.batch_size
    before = ids[rows, seen - tail.shape[1] : seen]
    return bool((before == tail.to(ids.device)).all())
