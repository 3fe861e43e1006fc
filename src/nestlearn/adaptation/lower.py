"""Computing the blocks below the lowest memory once, however often a segment is repeated."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from nestlearn.adaptation.sites import find_blocks


class LowerBlocks:
    """What the blocks that never change answered when a segment was read first.

    Gradient steps on one segment differ only from the lowest block that learns upwards. Within
    `first` the answers of all blocks below are noted; within `again` those blocks return them
    instead of computing. The first repeat of all is also computed in full: a model whose upper
    blocks look at more of the lower ones than their output and its attention cache (some share keys
    and values between blocks) is noticed, and from then on nothing is left out.

    Args:
        model: an adapted model.
        learning: modules that learn.

    Attributes:
        blocks: those left out at repeats; none where that cannot be done.
    """

    def __init__(self, model: nn.Module, learning: Iterable[nn.Module]) -> None:
        self.blocks: list[nn.Module] = []
        self.checked = False
        compiled = any(getattr(m, "_compiled_call_impl", None) for m in model.modules())
        # A compiled model would be compiled again each time.
        if not compiled and not hasattr(model, "_orig_mod"):
            with contextlib.suppress(ValueError):
                self.blocks = _below(find_blocks(model)[1], set(learning))
        self._answers: list[Any] = []
        self._cached: list[Any] = []

    @contextlib.contextmanager
    def first(self) -> Iterator[None]:
        """Within it, answers are noted."""
        self._answers = [None] * len(self.blocks)
        self._cached = []

        def note(number: int) -> Callable[..., None]:
            def hook(module: nn.Module, inputs: Any, output: Any) -> None:
                self._answers[number] = _detached(output)

            return hook

        hooks = [b.register_forward_hook(note(i)) for i, b in enumerate(self.blocks)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """Within it, the blocks answer what they answered within `first`."""
        replaced = [(b, b.__dict__.get("forward")) for b in self.blocks]
        for block, answer in zip(self.blocks, self._answers, strict=True):
            block.forward = _constant(answer)
        try:
            yield
        finally:
            for block, before in replaced:
                if before is None:
                    del block.forward
                else:  # a library had put in its own
                    block.forward = before

    def complete(self, cache: Any) -> Any:
        """An attention cache with what the blocks left out have of the segment, too."""
        if cache is None or not self.blocks:
            return cache
        count = len(self.blocks)
        if self._cached:
            cache.layers[:count] = self._cached
        else:
            self._cached = list(cache.layers[:count])
        return cache

    def repeat(self, compute: Callable[[], Tensor], watching: Callable[[], Any]) -> Any:
        """What ``compute`` returns and what was watched meanwhile, without the blocks below."""
        if self.blocks and not self.checked:
            self.checked = True
            with torch.no_grad():
                whole = compute()
                with self.again():
                    part = compute()
            if not torch.allclose(whole, part, rtol=1e-3):
                warnings.warn(
                    "the blocks below the lowest memory cannot be left out at repeats, as this "
                    "model's upper blocks depend on more than their output; learning is slower",
                    RuntimeWarning,
                    stacklevel=2,
                )
                self.blocks, self._answers, self._cached = [], [], []
        with watching() as seen, self.again():
            return compute(), seen


def _below(blocks: nn.ModuleList, learning: set[nn.Module]) -> list[nn.Module]:
    """The blocks before the first in which anything learns; none if there is no such block."""
    for i, block in enumerate(blocks):
        if not learning.isdisjoint(block.modules()):
            return list(blocks[:i])
    return []


def _constant(answer: Any) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        return answer

    return forward


def _detached(output: Any) -> Any:
    if isinstance(output, Tensor):
        return output.detach()
    if isinstance(output, tuple):
        return tuple(_detached(one) for one in output)
    return output
