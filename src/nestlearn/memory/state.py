"""State as a value: what a memory knows, passed in and returned, never hidden in a module.

Every sequence layer of the library is called as ``y, state = layer(x, state)``. A state is a small
dataclass whose tensors all have the batch as leading axis, so rows can be selected, merged, moved,
stored and loaded without knowing which layer made it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from nestlearn.files import save_tensors


@dataclasses.dataclass
class State:
    """Base of all states. Subclasses are dataclasses whose fields are one of

    - a tensor ``(B, ...)``, ``None``, another ``State``, or a tuple of these;
    - ``position: tuple[int, ...]``, tokens read so far, one host integer per batch row (the row's
      clock: a host integer, so that deciding which level is due never waits for a device);
    - a plain ``bool``, ``int`` or ``str`` that all rows share.

    States are never changed in place; methods return new ones.

    Example:
        >>> state = MemoryState(weights=(torch.zeros(2, 3),), position=(5, 5))
        >>> state.index([1]).batch_size
        1
        >>> MemoryState.cat([state, state]).position
        (5, 5, 5, 5)
    """

    def _fields(self) -> Iterator[tuple[str, Any]]:
        for field in dataclasses.fields(self):
            yield field.name, getattr(self, field.name)

    def map(self, fn: Callable[[Tensor], Tensor]) -> Self:
        """The same state with ``fn`` applied to every tensor in it."""
        changes = {name: _map(value, fn) for name, value in self._fields()}
        return dataclasses.replace(self, **changes)

    def tensors(self) -> list[Tensor]:
        """All tensors, in field order."""
        found: list[Tensor] = []

        def collect(t: Tensor) -> Tensor:
            found.append(t)
            return t

        self.map(collect)
        return found

    def detach(self) -> Self:
        """Cut the state from the graph that produced it (truncated backpropagation)."""
        return self.map(torch.Tensor.detach)

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """``Tensor.to`` on every tensor."""
        return self.map(lambda t: t.to(*args, **kwargs))

    def index(self, rows: Tensor | Sequence[int]) -> Self:
        """Select (or repeat, or reorder) batch rows."""
        host = [int(r) for r in rows]
        changes = {name: _index(value, host) for name, value in self._fields()}
        return dataclasses.replace(self, **changes)

    @classmethod
    def cat(cls, states: Sequence[Self]) -> Self:
        """Join states along the batch axis; flags that rows share must agree."""
        if not states:
            raise ValueError("State.cat needs at least one state")
        changes = {}
        for name, first in states[0]._fields():
            changes[name] = _cat(name, [getattr(s, name) for s in states], first)
        return dataclasses.replace(states[0], **changes)

    @property
    def batch_size(self) -> int:
        """Number of batch rows."""
        return self.tensors()[0].shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes held by the tensors of this state."""
        return sum(t.numel() * t.element_size() for t in self.tensors())

    def flatten(self, prefix: str = "") -> dict[str, Tensor]:
        """A flat mapping of names to tensors (positions and flags as int64 tensors)."""
        flat: dict[str, Tensor] = {}
        for name, value in self._fields():
            _flatten(prefix + name, value, flat)
        return flat

    def unflatten(self, flat: dict[str, Tensor], prefix: str = "") -> Self:
        """A state of this one's structure with the values of ``flat`` (see ``flatten``).

        Raises:
            ValueError: an entry is missing; the state comes from another layer or version.
        """
        changes = {n: _unflatten(prefix + n, v, flat) for n, v in self._fields()}
        return dataclasses.replace(self, **changes)

    def save(self, path: str | Path) -> None:
        """Write the state to a safetensors file (atomically: the old file or the new one)."""
        save_tensors(self.flatten(), path)

    def load(self, path: str | Path) -> Self:
        """Read a state written by ``save``; ``self`` (e.g. ``layer.init_state(1)``) gives the
        structure. Rows may differ in number from ``self``."""
        from safetensors.torch import load_file

        # Tensors in a file are not aligned as new ones are, and matrix products may then round
        # otherwise: copied, a stream goes on bit for bit.
        return self.unflatten({name: t.clone() for name, t in load_file(str(path)).items()})


@dataclasses.dataclass
class MemoryState(State):
    """State of one associative memory that is written in chunks.

    Attributes:
        weights: fast weights, layer by layer, each ``(B, ..., d_out, d_in)``.
        extra: further recurrent tensors of the rule (momentum, window), each ``(B, ...)``.
        pending: what was read since the last chunk boundary and is not yet written, each
            ``(B, C - 1, ...)``; the first ``position % C`` rows of it are valid.
        position: tokens read per batch row.
        frozen: reads only; nothing is written and the clock stands still.
    """

    weights: tuple[Tensor, ...] = ()
    extra: tuple[Tensor, ...] = ()
    pending: tuple[Tensor, ...] = ()
    position: tuple[int, ...] = ()
    frozen: bool = False

    def freeze(self, frozen: bool = True) -> MemoryState:
        """The same memory, read-only (or writable again)."""
        return dataclasses.replace(self, frozen=frozen)


def _map(value: Any, fn: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return fn(value)
    if isinstance(value, State):
        return value.map(fn)
    if isinstance(value, tuple):
        return tuple(_map(v, fn) for v in value)
    return value


def _is_position(value: Any) -> bool:
    return isinstance(value, tuple) and bool(value) and all(type(v) is int for v in value)


def _index(value: Any, rows: list[int]) -> Any:
    if isinstance(value, Tensor):
        return value[torch.tensor(rows, device=value.device, dtype=torch.long)]
    if isinstance(value, State):
        return value.index(rows)
    if _is_position(value):
        return tuple(value[r] for r in rows)
    if isinstance(value, tuple):
        return tuple(_index(v, rows) for v in value)
    return value


def _cat(name: str, values: list[Any], first: Any) -> Any:
    if isinstance(first, Tensor):
        return torch.cat(values)
    if isinstance(first, State):
        return type(first).cat(values)
    if _is_position(first):
        return tuple(p for value in values for p in value)
    if isinstance(first, tuple):
        return tuple(_cat(name, [v[i] for v in values], f) for i, f in enumerate(first))
    if any(v != first for v in values):
        raise ValueError(f"cannot join states whose `{name}` differ: {values}")
    return first


def _flatten(name: str, value: Any, flat: dict[str, Tensor]) -> None:
    if isinstance(value, Tensor):
        flat[name] = value
    elif isinstance(value, State):
        flat.update(value.flatten(name + "."))
    elif _is_position(value):
        flat[name] = torch.tensor(value, dtype=torch.long)
    elif isinstance(value, tuple):
        for i, v in enumerate(value):
            _flatten(f"{name}.{i}", v, flat)
    elif isinstance(value, bool | int):
        flat[name] = torch.tensor([int(value)], dtype=torch.long)


def _unflatten(name: str, value: Any, flat: dict[str, Tensor]) -> Any:
    if isinstance(value, State):
        return value.unflatten(flat, name + ".")
    if isinstance(value, tuple) and not _is_position(value):
        return tuple(_unflatten(f"{name}.{i}", v, flat) for i, v in enumerate(value))
    if value is None or isinstance(value, str):
        return value
    if name not in flat:
        raise ValueError(
            f"the stored state has no entry {name!r}: it was written by a layer with other settings"
        )
    stored = flat[name]
    if isinstance(value, Tensor):
        if stored.shape[1:] != value.shape[1:]:
            raise ValueError(
                f"stored state entry {name!r} has shape {tuple(stored.shape)}, this layer needs "
                f"(batch, {', '.join(map(str, value.shape[1:]))})"
            )
        return stored.to(value)
    if _is_position(value):
        return tuple(int(p) for p in stored)
    return type(value)(stored.item())
