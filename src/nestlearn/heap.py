"""Freed memory stays with the process: glibc hands large blocks back to the system otherwise."""

from __future__ import annotations

import ctypes
import os
import sys

# The names of these numbers are in <malloc.h>.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST = 2**30
_SET_BY_USER = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")


def keep_freed_memory() -> bool:
    """Let the C library keep freed blocks of up to 1 GiB for the next allocation.

    PyTorch takes every tensor on the CPU from ``malloc``. With glibc a block above some megabytes
    is mapped when it is made and unmapped when it is freed, so a training step that frees its
    activations has the system map and clear the same pages at every step: a third of the time of
    training a small Hope (``benchmarks/heap.py``). Kept blocks cost no more than the most memory
    that was ever in use, plus what cannot be fitted together.

    It acts on the whole process, also on what other libraries allocate from then on; therefore
    ``import nestlearn`` does not do it. The commands of ``nestlearn`` do, and so do the
    processes in which cells of tables are measured.

    Returns:
        Whether it was set: False beside another C library, on another system, or where the
        environment has settings of its own (``MALLOC_MMAP_THRESHOLD_``, ``MALLOC_TRIM_THRESHOLD_``,
        ``GLIBC_TUNABLES``), which stay.

    Example:
        >>> from nestlearn.heap import keep_freed_memory
        >>> isinstance(keep_freed_memory(), bool)
        True
    """
    if sys.platform != "linux" or any(name in os.environ for name in _SET_BY_USER):
        return False
    try:
        # Only glibc has this function; with another allocator in front it changes nothing.
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _LARGEST)) and bool(mallopt(_TRIM_THRESHOLD, -1))
