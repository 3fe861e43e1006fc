"""Chains of element-wise operations on a CPU, block by block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_BLOCK = 1 << 15  # elements; what one pass over a block touches stays in a core's cache


def in_blocks(function: Callable[..., None], *lists: list[Any]) -> None:
    """``function(indices, *lists)`` on lists of equally long tensors, in place.

    On a CPU it is called for one block of one tensor after the other, so that a chain of
    operations reads and writes main memory once. A list of None (nothing there) arrives as None.
    """
    have = [None if not xs or xs[0] is None else xs for xs in lists]
    count = len(lists[0])
    if not count:
        return
    if any(x.device.type != "cpu" for x in lists[0]):
        function(range(count), *have)
        return
    for i in range(count):
        tensors = [None if xs is None else xs[i] for xs in have]
        if not all(x is None or x.is_contiguous() for x in tensors):
            function([i], *[None if x is None else [x] for x in tensors])
            continue
        cut = [None if x is None else x.view(-1).split(_BLOCK) for x in tensors]
        for number in range(len(cut[0] or ())):
            function([i], *[None if c is None else [c[number]] for c in cut])
