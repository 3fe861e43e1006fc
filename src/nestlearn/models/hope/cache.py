"""The state of a whole Hope model, in the shape of a Hugging Face cache.

``transformers`` passes ``past_key_values`` through ``generate``; a ``HopeCache`` is what travels
there: per layer the states of the mixer and of the continuum memory. The states are values; the
cache is the mutable box that holds the newest ones, as ``generate`` expects of a cache.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from nestlearn.files import save_tensors
from nestlearn.memory.state import State

if TYPE_CHECKING:
    from nestlearn.models.hope.modeling import HopePreTrainedModel

FORMAT = "nestlearn-hope-state-1"
TAIL = 32  # token ids kept to recognise a prompt that repeats what was read

LayerState = tuple[State | None, State | None]


class HopeCache(Cache):
    """What a Hope model knows after reading: carried across calls, saved, frozen, forked, reset.

    Attributes:
        states: per layer (mixer state, continuum-memory state); empty before the first call.
        seen_tokens: columns read so far, padding included (``get_seq_length``).
        tail: the last token ids read, ``(B, <= 32)``, or None when embeddings were read.

    Example:
        >>> from nestlearn.models.hope import HopeConfig, HopeForCausalLM
        >>> model = HopeForCausalLM(HopeConfig.preset("tiny", mixer="attention")).eval()
        >>> cache = HopeCache()
        >>> _ = model(torch.randint(256, (1, 9)), past_key_values=cache)
        >>> cache.get_seq_length(), cache.batch_size
        (9, 1)
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.states: list[LayerState] = []
        self.seen_tokens = 0
        self.tail: Tensor | None = None
        self._freeze_next: bool | None = None

    # What the model does with it

    def layer(self, index: int) -> LayerState:
        """States of one layer, or (None, None) before the first call."""
        return self.states[index] if self.states else (None, None)

    def advance(self, states: list[LayerState], columns: int, input_ids: Tensor | None) -> None:
        """Take the states after a call that read ``columns`` columns."""
        if input_ids is None:
            self.tail = None
        elif self.seen_tokens == 0:
            self.tail = input_ids[:, -TAIL:].detach()
        elif self.tail is not None:
            self.tail = torch.cat([self.tail, input_ids.detach()], 1)[:, -TAIL:]
        self.states = states
        self.seen_tokens += columns

    # What generate asks

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns read so far (frozen memories count them too: it is the caller's position)."""
        return self.seen_tokens

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: no limit."""
        return -1

    def __len__(self) -> int:
        return len(self.states)

    def __repr__(self) -> str:
        return (
            f"HopeCache(layers={len(self)}, rows={self.batch_size}, tokens={self.seen_tokens}, "
            f"bytes={self.nbytes}, frozen={self.frozen})"
        )

    @property
    def batch_size(self) -> int:
        """Rows, -1 before the first call."""
        for state in self._present():
            return state.batch_size
        return -1

    @property
    def is_initialized(self) -> bool:
        """Whether anything was read."""
        return bool(self.states)

    @property
    def is_croppable(self) -> bool:
        """False: see ``crop``."""
        return False

    @property
    def is_compileable(self) -> bool:
        """False: ``generate`` must not compile around this cache by itself."""
        return False

    def reset(self) -> None:
        """Forget everything read; the next call starts from the learned initial states."""
        self.__init__()  # type: ignore[misc]

    def crop(self, tokens_to_remove: int) -> None:
        """Impossible: a recurrent memory cannot un-read.

        Raises:
            ValueError: always, unless nothing is to be removed. Keep a ``copy()`` and return to it.
        """
        if tokens_to_remove:
            raise ValueError(
                "a recurrent memory cannot un-read tokens; keep cache.copy() from before and go on "
                "from that one"
            )

    def activate_past_recording(self) -> None:
        """Refused for the same reason as ``crop`` (assisted generation needs it)."""
        raise ValueError("a recurrent memory cannot un-read tokens, so it cannot verify drafts")

    def index(self, rows: Tensor | list[int]) -> None:
        """Keep (repeat, reorder) these batch rows."""
        host = [int(r) for r in rows]
        self.states = self._each(lambda state: state.index(host))
        if self.tail is not None:
            self.tail = self.tail[torch.tensor(host, device=self.tail.device, dtype=torch.long)]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows of the beams that survive."""
        self.index(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows."""
        self.index(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row ``repeats`` times in a row."""
        self.index([r for r in range(max(self.batch_size, 0)) for _ in range(repeats)])

    # What a user does with it

    @property
    def nbytes(self) -> int:
        """Bytes of all states (constant in the number of tokens for recurrent mixers)."""
        return sum(state.nbytes for state in self._present())

    @property
    def frozen(self) -> bool:
        """Whether the memories are read only."""
        if self._freeze_next is not None:
            return self._freeze_next
        return any(_any_frozen(state) for state in self._present())

    def copy(self) -> HopeCache:
        """An independent cache with the same states (cheap: states are values and are shared)."""
        other = HopeCache()
        other.states, other.seen_tokens = list(self.states), self.seen_tokens
        other.tail, other._freeze_next = self.tail, self._freeze_next
        return other

    def detach(self) -> HopeCache:
        """The same cache, cut from the graph (truncated backpropagation through time)."""
        other = self.copy()
        other.states = self._each(lambda state: state.detach())
        return other

    def to(self, *args: Any, **kwargs: Any) -> HopeCache:
        """A copy on another device or in another dtype."""
        other = self.copy()
        other.states = self._each(lambda state: state.to(*args, **kwargs))
        return other

    def freeze(self, frozen: bool = True) -> HopeCache:
        """Make the memories read only (or writable again), in place; returns the cache.

        Attention has no memory to freeze: its cache is the text being read and goes on growing.

        Raises:
            ValueError: no layer of the model has a memory that can be frozen.
        """
        if not self.states:
            self._freeze_next = frozen
            return self
        changed = [(_freeze(m, frozen), _freeze(c, frozen)) for m, c in self.states]
        if frozen and not any(_any_frozen(pair) for pair in changed):
            raise ValueError(
                "nothing to freeze: this model's layers keep no writable memory (attention keeps "
                "the text itself)"
            )
        self.states, self._freeze_next = changed, None
        return self

    def unfreeze(self) -> HopeCache:
        """Let the memories be written again, in place; returns the cache."""
        return self.freeze(False)

    def begin(self, states: list[LayerState]) -> None:
        """Start from initial states, frozen if ``freeze`` was called before the first token."""
        wanted, self._freeze_next = self._freeze_next, None
        self.states = states
        if wanted:
            self.freeze()

    def save(self, path: str | Path, model: HopePreTrainedModel) -> None:
        """Write the state to a safetensors file, with the fingerprint of the model it belongs to.

        Raises:
            ValueError: nothing was read yet.
        """
        if not self.states:
            raise ValueError("nothing to save: the model has not read anything with this cache")
        flat = self._flatten()
        metadata = {
            "format": FORMAT,
            "model": fingerprint(model),
            "checksum": _checksum(flat),
            "seen_tokens": str(self.seen_tokens),
        }
        save_tensors(flat, path, metadata)

    @classmethod
    def load(cls, path: str | Path, model: HopePreTrainedModel, strict: bool = True) -> HopeCache:
        """Read a state written by ``save`` onto the model's device.

        Args:
            path: the file.
            model: the model the state belongs to (gives the structure).
            strict: refuse a state written with other weights; False allows it when shapes fit, for
                instance after further training.

        Raises:
            ValueError: not a state file, damaged, or of another model.
        """
        from safetensors import SafetensorError, safe_open

        if not Path(path).is_file():
            raise ValueError(f"no state file at {path}")
        try:
            with safe_open(str(path), "pt") as handle:
                metadata = handle.metadata() or {}
                flat = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
        if metadata.get("format") != FORMAT:
            raise ValueError(f"{path} is not a Hope state (format {metadata.get('format')!r})")
        if metadata.get("checksum") != _checksum(flat):
            raise ValueError(f"{path} is damaged: its checksum does not match its contents")
        if strict and metadata.get("model") != fingerprint(model):
            raise ValueError(
                f"{path} was written by a model with other weights or another configuration; load "
                "that model, or pass strict=False if only its weights changed since"
            )
        flat = {name: tensor.clone() for name, tensor in flat.items()}  # aligned, see State.load
        cache = cls()
        cache.tail = flat.pop("tail", None)
        template = model.init_cache(1)
        for layer, pair in enumerate(template.states):
            mixer, cms = (
                None if state is None else state.unflatten(flat, f"layers.{layer}.{part}.")
                for state, part in zip(pair, ("mixer", "cms"), strict=True)
            )
            cache.states.append((mixer, cms))
        cache.seen_tokens = int(metadata["seen_tokens"])
        if cache.tail is not None:
            cache.tail = cache.tail.to(model.device)
        return cache

    def _flatten(self) -> dict[str, Tensor]:
        flat: dict[str, Tensor] = {}
        for layer, pair in enumerate(self.states):
            for state, part in zip(pair, ("mixer", "cms"), strict=True):
                if state is not None:
                    flat.update(state.flatten(f"layers.{layer}.{part}."))
        if self.tail is not None:
            flat["tail"] = self.tail
        return flat

    def _each(self, fn: Callable[[State], State]) -> list[LayerState]:
        return [
            (None if mixer is None else fn(mixer), None if cms is None else fn(cms))
            for mixer, cms in self.states
        ]

    def _present(self) -> list[State]:
        return [state for pair in self.states for state in pair if state is not None]


def fingerprint(model: HopePreTrainedModel) -> str:
    """A short hash of a model's configuration and of samples from all its weights."""
    settings = {k: getattr(model.config, k) for k in type(model.config).__annotations__}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    base = getattr(model, "model", model)
    for name, parameter in sorted(base.named_parameters()):
        flat = parameter.detach().reshape(-1)
        sample = torch.cat([flat[:16], flat[-16:], flat[flat.numel() // 2 :][:16]])
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        digest.update(sample.float().cpu().numpy().tobytes())
    return digest.hexdigest()


def _checksum(flat: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(flat):
        digest.update(name.encode())
        raw = flat[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(raw.numpy().tobytes())
    return digest.hexdigest()


def _is_memory(state: State) -> bool:
    """Whether a state can be frozen: it holds something that is written, and a flag for it."""
    return hasattr(state, "frozen") and bool(state.tensors())


def _freeze(value: Any, frozen: bool) -> Any:
    """``value`` with the flag of every memory inside set."""
    if isinstance(value, tuple):
        return tuple(_freeze(v, frozen) for v in value)
    if not isinstance(value, State):
        return value
    fields = [f.name for f in dataclasses.fields(value)]
    changes = {name: _freeze(getattr(value, name), frozen) for name in fields}
    if _is_memory(value):
        changes["frozen"] = frozen
    return dataclasses.replace(value, **changes)


def _any_frozen(value: Any) -> bool:
    """Whether any memory inside is frozen."""
    if isinstance(value, tuple):
        return any(_any_frozen(v) for v in value)
    if not isinstance(value, State):
        return False
    inner = [getattr(value, f.name) for f in dataclasses.fields(value)]
    return bool(getattr(value, "frozen", False)) or any(_any_frozen(v) for v in inner)
