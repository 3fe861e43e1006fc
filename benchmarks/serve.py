"""A worker process that builds training steps and times them on request.

Ours and the peers' code need different environments, and a fair comparison alternates between them
within one run. So each environment has one worker, alive for the whole run and idle (blocked on its
standard input) while the other works. Requests and answers are one JSON object a line. This file
imports nothing but torch and the standard library, so it runs in every environment.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import resource
import select
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


@dataclasses.dataclass
class Trial:
    """One thing to time: ``step()`` handles ``tokens`` tokens; ``info`` goes into the row."""

    step: Callable[[], Any]
    tokens: int
    parameters: int
    info: dict[str, Any] = dataclasses.field(default_factory=dict)


Builder = Callable[..., Trial]


def training_step(model: Any, loss: Callable[[], Any], lr: float = 1e-3) -> Callable[[], float]:
    """Forward, backward and AdamW step of ``model``; returns the loss as a number."""
    import torch

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)

    def step() -> float:
        value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(value.detach())

    return step


def serve(builders: dict[str, Builder]) -> None:
    """Answer requests until standard input ends.

    Requests: ``{"op": "prepare", "cell", "builder", "options"}`` builds and runs one step;
    ``{"op": "time", "cell", "seconds", "steps"}`` gives the seconds of each timed step;
    ``{"op": "drop", "cell"}``; ``{"op": "peak", "builder", "options", "baseline"}`` gives the bytes
    of memory one step needs at its peak (once per process: the system's record only rises).
    """
    answer_to = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print must not be taken for an answer
    trials: dict[str, Trial] = {}
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = _handle(request, builders, trials)
        except BaseException as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {str(error)[:400]}"}
        answer_to.write(json.dumps(answer) + "\n")
        answer_to.flush()


def _handle(request: dict, builders: dict[str, Builder], trials: dict[str, Trial]) -> dict:
    operation = request["op"]
    if operation == "versions":
        return {"versions": _versions(request["packages"])}
    if operation == "prepare":
        trial = builders[request["builder"]](**request["options"])
        start = time.perf_counter()
        value = trial.step()
        seconds = time.perf_counter() - start
        trials[request["cell"]] = trial
        return {
            "tokens": trial.tokens,
            "parameters": trial.parameters,
            "first_step_s": seconds,
            "first_loss": value,
            **trial.info,
        }
    if operation == "time":
        trial = trials[request["cell"]]
        times: list[float] = []
        if request.get("warm", True):
            trial.step()
        while len(times) < request["steps"] or sum(times) < request["seconds"]:
            start = time.perf_counter()
            trial.step()
            times.append(time.perf_counter() - start)
        return {"times": times}
    if operation == "drop":
        trials.pop(request["cell"], None)
        gc.collect()
        return {}
    if operation == "peak":
        build = builders[request["builder"]]
        build(**{**request["options"], **request["baseline"]}).step()
        gc.collect()
        before = _current_bytes()
        trial = build(**request["options"])
        trial.step()
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {"baseline_bytes": before, "peak_bytes": after, "step_bytes": after - before}
    raise ValueError(f"unknown request {operation!r}")


def _current_bytes() -> int:
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _versions(packages: list[str]) -> dict[str, str | None]:
    from importlib.metadata import PackageNotFoundError, version

    found: dict[str, str | None] = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


class Worker:
    """The other end: starts ``script`` under ``python`` and asks it."""

    def __init__(self, python: str | Path, script: Path, threads: int, log: Path | None = None):
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
        self._log = open(log, "a") if log else subprocess.DEVNULL  # noqa: SIM115
        self._process = subprocess.Popen(
            [str(python), str(script), "--threads", str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment,
        )

    def ask(self, limit_s: float | None = None, **request: Any) -> dict[str, Any]:
        """Send one request and wait for its answer; ``{"error": ...}`` if it failed. A worker that
        does not answer within ``limit_s`` seconds is ended."""
        assert self._process.stdin and self._process.stdout
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            if not select.select([self._process.stdout], [], [], limit_s)[0]:
                self._process.kill()
                self._process.wait()
                return {"error": f"no answer within {limit_s:.0f} s"}
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            return {"error": f"the worker ended with code {self._process.wait()}"}
        return json.loads(line)

    def close(self) -> None:
        """End the worker."""
        if self._process.stdin:
            self._process.stdin.close()
        self._process.wait()
        if not isinstance(self._log, int):
            self._log.close()
