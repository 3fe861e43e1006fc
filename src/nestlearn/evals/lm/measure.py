"""Measuring a model on standard tasks, task by task."""

from __future__ import annotations

import functools
import logging
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

from nestlearn.evals.lm.tasks import LOCAL, METRIC, Source, load_task, where

_SHARES = ("acc", "acc_norm", "acc_bytes", "contains", "exact_match", "em")


def check_installed() -> None:
    """Raises:
    ValueError: lm-eval is not installed.
    """
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"standard tasks need lm-eval: pip install 'nestlearn[eval]' ({error})"
        ) from error


@functools.cache
def _manager() -> Any:
    """lm-eval's index of tasks, which takes seconds to build."""
    import datasets
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    return TaskManager()


@functools.cache
def check_data(tasks: tuple[str, ...], source: Source = "auto") -> None:
    """Raises:
    ValueError: lm-eval is not installed, a task is unknown, or its data cannot be had.
    """
    check_installed()
    manager = _manager()
    for name in tasks:
        load_task(name, source, manager)


def measure_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    source: Source = "auto",
    limit: int | None = None,
    shots: int | None = None,
    **backend: Any,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and row of every task, as soon as it is measured.

    Args:
        tasks: of lm-eval, or of `nestlearn.evals.lm.tasks.LOCAL`.
        source: where data is taken from.
        limit: examples of a task; None: all.
        shots: examples in the prompt; None: the task's own number.
        backend: further arguments of `nestlearn.evals.lm.backend.Backend`.

    Yields:
        ``(task, row)``: ``metrics`` as lm-eval computes them, ``errors`` (standard errors of
        shares), ``examples``, ``source``, ``seconds``.

    Raises:
        ValueError: unknown tasks, data that cannot be had, requests that do not fit.
    """
    check_installed()
    import lm_eval

    from nestlearn.evals.lm.backend import Backend

    manager = _manager()
    machine = Backend(model, tokenizer, **backend)
    for name in tasks:
        began = time.perf_counter()
        for task in load_task(name, source, manager):
            found = lm_eval.simple_evaluate(
                machine,
                tasks=[task],
                limit=limit,
                num_fewshot=shots,
                bootstrap_iters=0,
                task_manager=manager,
                log_samples=False,
            )
            row = _row(found, task.config.task)
            origin = where(name, source)
            row |= {"task": task.config.task, "source": origin}
            if origin == "local" and LOCAL[name].note:
                row["note"] = LOCAL[name].note
            yield task.config.task, {**row, "seconds": time.perf_counter() - began}
            began = time.perf_counter()


def _row(found: Any, task: str) -> dict[str, Any]:
    examples = int(found["n-samples"][task]["effective"])
    metrics, errors = {}, {}
    for key, value in found["results"][task].items():
        name, _, kind = key.partition(",")
        if not kind or name.endswith("_stderr") or not isinstance(value, int | float):
            continue
        metrics[name] = float(value)
        if name in _SHARES and examples > 1:  # lm-eval's own formula for means
            errors[name] = math.sqrt(value * (1 - value) / (examples - 1))
    return {"metrics": metrics, "errors": errors, "examples": examples,
            "version": str(found["versions"].get(task))}  # fmt: skip


def main_metric(row: dict[str, Any]) -> tuple[str, float, float | None]:
    """Name, value and standard error of the metric that tables show; shares in percent."""
    name = METRIC.get(row["task"]) or next(iter(row["metrics"]))
    scale = 100 if name in (*_SHARES, "f1") else 1
    error = row["errors"].get(name)
    return name, scale * row["metrics"][name], None if error is None else scale * error
