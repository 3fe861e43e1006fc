"""Measuring an experiment: cell by cell, in several processes, resumable."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nestlearn.evals.harness.experiment import Experiment, Request, Scale
from nestlearn.evals.harness.kept import Kept, code, kept_file
from nestlearn.evals.harness.parallel import in_parallel
from nestlearn.evals.harness.results import Results, read
from nestlearn.train.distributed import Distributed


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def open_results(
    experiment: Experiment,
    path: Path,
    request: Request,
    threads: int,
    fresh: bool = False,
    report: Callable[[str], None] = _say,
) -> Results:
    """The result file of an experiment, continued if it is there.

    Results of one pre-trained model are not continued with another; where the request names none,
    the file can only be read. Rows of what is no longer measured are left out, and leave the file
    with the next cell.
    """
    plan = getattr(experiment, "plan", None)
    seeds = getattr(plan, "seeds", 1) if request.seeds is None else request.seeds
    settings = {"experiment": experiment.name, "scale": experiment.scale, **experiment.settings()}
    if experiment.needs_model:
        settings["model"] = _model_name(request.model)
        if request.model is None and path.exists():
            settings["model"] = read(path).get("settings", {}).get("model")
    results = Results(
        path,
        experiment.question,
        settings,
        seeds=list(range(seeds)),
        threads=threads,
        fresh=fresh,
    )
    rows = results.record["rows"]
    results.record["rows"] = [r for r in rows if not experiment.stale(r)]
    if old := len(rows) - len(results.record["rows"]):
        report(f"  {old} cells are of systems that have changed since: left out")
    return results


def run(
    experiment: Experiment,
    results: Results,
    request: Request,
    jobs: int = 1,
    threads: int = 1,
    report: Callable[[str], None] = _say,
) -> int:
    """Measure what is missing; returns how many cells failed.

    A cell that was cut off goes on where it had come to, if the code is the same still. Cells that
    failed before are tried again once, from their start. Under ``torchrun`` all processes train a
    cell's model together, one cell after the other; the first process keeps the results.

    Raises:
        ValueError: the experiment needs a pre-trained model, and the request names none; or its
            cells cannot be measured by several processes together.
    """
    together = Distributed.start(request.device)
    if together.world > 1 and not experiment.shares_cells:
        raise ValueError(f"{experiment.name} does not train models: run it without torchrun")
    results.keeps = together.main
    if experiment.needs_model and request.model is None:
        raise ValueError(f"{experiment.name} needs a pre-trained model: name one with --model")
    again = [r["cell"] for r in results.record["rows"] if "error" in r]
    results.record["rows"] = [r for r in results.record["rows"] if "error" not in r]
    if again:
        report(f"  {len(again)} cells that failed before are tried again")
    stamp = [results.record["settings"], code()]
    if request.fresh and together.main:
        shutil.rmtree(kept_file(results.path, "").parent, ignore_errors=True)
    failed, began = 0, time.perf_counter()
    while cells := experiment.due(results, request):
        left = dict(cells)

        def done(name: str, row: dict[str, Any], left: dict[str, Any] = left) -> None:
            nonlocal failed
            cell = left.pop(name)
            failed += "error" in row
            results.add(name, row if "error" not in row else {**cell, **row})
            if not together.main:
                return
            kept_file(results.path, name).unlink(missing_ok=True)
            said = row.get("error") or experiment.summary(row)
            spent = time.perf_counter() - began
            report(f"  {name}: {said} ({len(left)} left of this round, {spent:.0f} s in all)")

        # The model's place is no part of a cell: results must not depend on where it lies.
        more = {"model": request.model} if experiment.needs_model else {}
        work = {
            name: (
                experiment.name,
                experiment.scale,
                {**cell, **more},
                kept_file(results.path, name),
                json.dumps([*stamp, cell]),
            )
            for name, cell in cells.items()
        }
        if together.world > 1:
            _in_turn(work, together, done)
        else:
            in_parallel(measure, work, jobs, done, threads)
    with contextlib.suppress(OSError):  # what another run has left is not empty
        kept_file(results.path, "").parent.rmdir()
    return failed


def _in_turn(
    work: dict[str, tuple[str, Scale, dict[str, Any], Path, str]],
    together: Distributed,
    done: Callable[[str, dict[str, Any]], None],
) -> None:
    """Cells that all processes measure together; every process gets the first one's rows."""
    for cell, (name, scale, settings, kept, stamp) in work.items():
        mine = kept if together.main else None
        try:
            row = measure(name, scale, {**settings, "device": str(together.device)}, mine, stamp)
        except ValueError as error:
            # Of the settings, so that all processes have it; any other error ends them all.
            row = {"error": f"{type(error).__name__}: {error}"}
        done(cell, together.broadcast(row))


def measure(
    name: str, scale: Scale, cell: dict[str, Any], kept: Path | None, stamp: str
) -> dict[str, Any]:
    """One cell, in a process of its own; goes on with what it kept under the same stamp."""
    from nestlearn.evals.registry import experiment

    began, measured = time.perf_counter(), experiment(name, scale)
    measured.kept = Kept(kept, stamp)
    row = measured.measure(cell)
    row.pop("model", None)
    return {**row, "seconds": time.perf_counter() - began}


def _model_name(model: str | None) -> str | None:
    """Name of a model without the folder it lies in."""
    return None if model is None else Path(model).name
