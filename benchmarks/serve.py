"""A worker process that builds one training step and times it on request.

Ours and the peers' code need different environments, and one cell may need most of the machine's
memory. So each cell has a worker of its own, ended when the cell is done and idle (blocked on its
standard input) while the reference works; ``side_by_side`` lets the two take turns. Requests and
answers are one JSON object a line. This file imports nothing but torch and the standard library,
so it runs in every environment.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import gc
import json
import os
import queue
import re
import resource
import select
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any


@dataclasses.dataclass
class Trial:
    """One thing to time: ``step()`` handles ``tokens`` tokens; ``info`` goes into the row, and so
    does what ``after()`` says once steps have run. The first ``warmup`` steps do not count."""

    step: Callable[[], Any]
    tokens: int
    parameters: int
    info: dict[str, Any] = dataclasses.field(default_factory=dict)
    after: Callable[[], dict[str, Any]] = dict
    warmup: int = 1


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
    """Answer requests until standard input ends; then end at once, in the middle of a step too.

    Requests: ``{"op": "prepare", "builder", "options"}`` builds the trial and runs its warm-up;
    ``{"op": "time", "seconds", "steps", "warm"}`` gives the seconds of each timed step;
    ``{"op": "peak", "builder", "options", "baseline"}`` gives the bytes of memory one step needs at
    its peak (once per process: the system's record only rises); ``{"op": "versions", "packages"}``.
    """
    answer_to = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print must not be taken for an answer
    requests: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(requests,), daemon=True).start()
    trials: list[Trial] = []
    while True:
        request = json.loads(requests.get())
        try:
            answer = _handle(request, builders, trials)
        except BaseException as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {str(error)[:400]}"}
        answer_to.write(json.dumps(answer) + "\n")
        answer_to.flush()


def _read(requests: queue.SimpleQueue[str]) -> None:
    """In a thread, so that a worker notices in the middle of a step that nobody listens any more
    (its memory may be what the next run needs)."""
    for line in sys.stdin:
        requests.put(line)
    os._exit(0)


def _handle(request: dict, builders: dict[str, Builder], trials: list[Trial]) -> dict:
    operation = request["op"]
    if operation == "versions":
        return {"versions": _versions(request["packages"])}
    if operation == "prepare":
        trials[:] = [builders[request["builder"]](**request["options"])]
        (trial,) = trials
        seconds, values = [], []
        for _ in range(trial.warmup):
            start = time.perf_counter()
            values.append(trial.step())
            seconds.append(time.perf_counter() - start)
        return {
            "tokens": trial.tokens,
            "parameters": trial.parameters,
            "warmup_s": seconds,
            "first_loss": values[0],
            **trial.info,
        }
    if operation == "time":
        (trial,) = trials
        times: list[float] = []
        if request.get("warm", True):
            trial.step()
        while len(times) < request["steps"] or sum(times) < request["seconds"]:
            start = time.perf_counter()
            trial.step()
            times.append(time.perf_counter() - start)
        return {"times": times, "after": {"process_peak_bytes": _peak_bytes(), **trial.after()}}
    if operation == "peak":
        build = builders[request["builder"]]
        build(**{**request["options"], **request["baseline"]}).step()
        gc.collect()
        _give_memory_back()
        before = _current_bytes()
        trial = build(**request["options"])
        start = time.perf_counter()
        trial.step()
        return {
            "tokens": trial.tokens,
            "parameters": trial.parameters,
            "seconds_of_the_step": time.perf_counter() - start,
            "baseline_bytes": before,
            "peak_bytes": _peak_bytes(),
            "step_bytes": _peak_bytes() - before,
            **trial.info,
            **trial.after(),
        }
    raise ValueError(f"unknown request {operation!r}")


def _peak_bytes() -> int:
    """The process's high-water mark. ``ru_maxrss`` is the same number, except that a new process
    begins with its parent's."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _current_bytes() -> int:
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return _peak_bytes()


def _give_memory_back() -> None:
    """What was freed but is kept by malloc would hide a part of what comes next (glibc only)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _versions(packages: list[str]) -> dict[str, str | None]:
    from importlib.metadata import PackageNotFoundError, version

    found: dict[str, str | None] = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def _free_bytes() -> int | None:
    """Memory that can be had without swapping; None where the system does not say."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


class Worker:
    """The other end: starts ``script`` under ``python`` and asks it.

    ``memory``: GiB the process may allocate; 0: what is free now, but for one. Beyond that its
    allocations fail (Linux), which is then its answer; otherwise the system would end a process.
    """

    def __init__(
        self,
        python: str | Path,
        script: Path,
        threads: int,
        log: Path | None = None,
        memory: float = 0,
    ):
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
        self._log = open(log, "a") if log else subprocess.DEVNULL  # noqa: SIM115
        self._process = subprocess.Popen(
            [str(python), str(script), "--threads", str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment,
            start_new_session=True,  # Ctrl-C is for the parent, and close() ends all its children
        )
        free = _free_bytes()
        self._most = 0
        if free and hasattr(resource, "prlimit"):
            self._most = most = int(memory * 2**30) or max(free - 2**30, 2**30)
            resource.prlimit(self._process.pid, resource.RLIMIT_DATA, (most, most))
            with contextlib.suppress(OSError):  # should memory run out all the same: this one
                Path(f"/proc/{self._process.pid}/oom_score_adj").write_text("1000")

    @property
    def alive(self) -> bool:
        """Whether it can still answer."""
        return self._process.poll() is None

    def ask(self, limit_s: float | None = None, **request: Any) -> dict[str, Any]:
        """Send one request and wait for its answer; ``{"error": ...}`` if it failed. A worker that
        does not answer within ``limit_s`` seconds is ended."""
        assert self._process.stdin and self._process.stdout
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            if not select.select([self._process.stdout], [], [], limit_s)[0]:
                self.close()
                return {"error": f"no answer within {limit_s:.0f} s"}
            line = self._process.stdout.readline()
        except (BrokenPipeError, ValueError):  # ValueError: closed
            line = ""
        if not line:
            code = self._process.wait()
            why = " (killed, most likely for memory)" if code == -signal.SIGKILL else ""
            return {"error": f"the worker ended with code {code}{why}"}
        answer = json.loads(line)
        if self._most and re.search("allocate memory|MemoryError", answer.get("error", "")):
            answer["error"] = f"more than {self._most / 2**30:.1f} GiB: {answer['error']}"
        return answer

    def close(self) -> None:
        """End the worker and what it started."""
        if self.alive:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        if not isinstance(self._log, int):
            self._log.close()


class Failed(Exception):
    """A cell could not be measured; the message says why."""


class Deadline:
    """So many seconds from now."""

    def __init__(self, seconds: float):
        self.seconds, self._end = seconds, time.monotonic() + seconds

    def left(self) -> float:
        """Seconds that are left, at least 0."""
        return max(0.0, self._end - time.monotonic())

    def ask(self, worker: Worker, **request: Any) -> dict[str, Any]:
        """The worker's answer within the time left.

        Raises:
            Failed: there is none, or it is an error.
        """
        answer = worker.ask(self.left(), **request)
        if "error" not in answer:
            return answer
        late = f"over the limit of {self.seconds:.0f} s for a cell (at {request['op']})"
        raise Failed(answer["error"] if self.left() else late)


@dataclasses.dataclass
class Pace:
    """How many turns a cell has, and how long one is: ``seconds`` and three steps at least after
    one more to warm up; a single step where steps take more than ``slow`` seconds."""

    rounds: int
    seconds: float
    slow: float


class Timed:
    """A trial in a worker of its own, warmed up.

    Raises:
        Failed: it cannot be built, or was not ready in time; the worker is ended.
    """

    def __init__(
        self, worker: Worker, builder: str, options: dict[str, Any], pace: Pace, until: Deadline
    ):
        self.worker, self.pace, self.role = worker, pace, ""
        try:
            self.facts = until.ask(worker, op="prepare", builder=builder, options=options)
        except BaseException:
            worker.close()
            raise
        self._step_s = self.facts["warmup_s"][-1]
        self.turns: list[list[float]] = []

    def turn(self, until: Deadline) -> float:
        """Seconds of a step, the median of this turn's."""
        turn: dict[str, Any] = {"steps": 3, "seconds": self.pace.seconds, "warm": True}
        if self._step_s > self.pace.slow:
            turn = {"steps": 1, "seconds": 0.0, "warm": False}
        try:
            answer = until.ask(self.worker, op="time", **turn)
        except Failed as error:
            raise Failed(f"{error}{self.role}") from None
        self.turns.append(answer["times"])
        self.facts |= answer["after"]
        self._step_s = median(answer["times"])
        return self._step_s


def side_by_side(
    cell: Timed, reference: Timed | None, rounds: int, until: Deadline
) -> dict[str, Any]:
    """Time reference, cell, reference, cell, ..., reference; the speeds and their ratio.

    A round's ratio is the cell's tokens/s in its turn over the reference's in the turns just before
    and after, so what else the machine does, if it lasts, touches both. Stops before ``rounds``
    turns if one more would not end in time, after the first at the earliest.

    Raises:
        Failed: a step failed, or the first round did not end in time.
    """
    others = [reference.turn(until)] if reference else []
    mine: list[float] = []
    took = 0.0
    while len(mine) < rounds and (not mine or until.left() > 1.2 * took):
        begin = until.left()
        mine.append(cell.turn(until))
        if reference:
            others.append(reference.turn(until))
        took = begin - until.left()
    tokens = cell.facts["tokens"]
    row = {
        **cell.facts,
        "rounds": len(mine),
        "seconds_per_step": median(mine),
        "tokens_per_s": tokens / median(mine),
        "tokens_per_s_range": [tokens / f(mine) for f in (max, min)],
        "round_seconds": cell.turns,
    }
    if len(mine) < rounds:
        row["note"] = f"{len(mine)} of {rounds} rounds within {until.seconds:.0f} s"
    if reference:
        speed = tokens / reference.facts["tokens"]
        ratios = [
            speed * (before + after) / 2 / own
            for before, own, after in zip(others, mine, others[1:], strict=False)
        ]
        row |= {
            "ratio": median(ratios),
            "ratio_range": [min(ratios), max(ratios)],
            "ratio_rounds": ratios,
            "reference_tokens_per_s": reference.facts["tokens"] / median(others),
            "reference_round_seconds": others,
        }
    return row
