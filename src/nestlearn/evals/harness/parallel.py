"""Cells of an experiment in processes of their own."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from typing import Any

import torch

from nestlearn.heap import keep_freed_memory

POLL = 2.0
"""Seconds between two looks at whether the parent lives."""


def in_parallel(
    work: Callable[..., dict[str, Any]],
    cells: Mapping[str, tuple[Any, ...]],
    jobs: int,
    done: Callable[[str, dict[str, Any]], None],
    threads: int = 1,
) -> None:
    """Run ``work(*cells[name])`` for every cell in ``jobs`` processes, and hand every row to
    ``done`` as it comes; a cell that fails gets ``{"error": ...}``.

    Cells that have not begun are given up when ``done`` raises or the user interrupts; where this
    process is killed, those that have begun end within seconds.

    Args:
        work: a function of a module (it is sent to other processes by name).
        cells: name -> arguments.
        jobs: processes at a time.
        done: called in this process.
        threads: CPU threads of a process.
    """
    with ProcessPoolExecutor(
        jobs, mp_context=get_context("spawn"), initializer=_begin,
        initargs=(threads, os.getpid()),
    ) as pool:  # fmt: skip
        futures = {pool.submit(work, *cell): name for name, cell in cells.items()}
        try:
            for future in as_completed(futures):
                error = future.exception()
                row = {"error": f"{type(error).__name__}: {error}"} if error else future.result()
                done(futures[future], row)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _begin(threads: int, parent: int) -> None:
    """In a new process: its threads, its memory, and an end when its parent is gone."""
    keep_freed_memory()
    torch.set_num_threads(threads)
    threading.Thread(target=_follow, args=(parent,), daemon=True).start()


def _follow(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(POLL)
    os._exit(1)
