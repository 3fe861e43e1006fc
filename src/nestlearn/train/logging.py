"""What a run writes down: JSON lines always; TensorBoard, trackio or wandb on request."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol


class Sink(Protocol):
    """Takes numbers by name and step."""

    def write(self, step: int, values: dict[str, float]) -> None:
        """Record values of one step."""

    def close(self) -> None:
        """Finish."""


class RunLog:
    """The log of one run.

    ``out/log.jsonl`` has one object per line: ``{"event": "step" | "eval" | ..., "step": n, ...}``.
    When a run resumes from step n, records after n (of steps that are now computed again) are
    dropped first, so the file is one gapless curve.

    Args:
        out: folder of the run.
        sinks: names of further sinks.
        settings: the run's settings, for sinks that store them.
        step: step that the run continues from (0: a new run).

    Raises:
        ValueError: a sink whose package is not installed.
    """

    def __init__(
        self, out: Path, sinks: tuple[str, ...], settings: dict[str, Any], step: int = 0
    ) -> None:
        self.path = out / "log.jsonl"
        out.mkdir(parents=True, exist_ok=True)
        self._sinks = [_SINKS[name](out, settings) for name in sinks]
        self._truncate(step)
        self._file = self.path.open("a", encoding="utf-8")

    def write(self, event: str, step: int, **values: Any) -> None:
        """Append a record; numbers also go to the further sinks."""
        record = {"event": event, "step": step, **values}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        numbers = {
            f"{event}/{k}": float(v)
            for k, v in values.items()
            if isinstance(v, int | float) and not isinstance(v, bool)
        }
        for sink in self._sinks:
            sink.write(step, numbers)

    def close(self) -> None:
        """Close the file and all sinks."""
        self._file.close()
        for sink in self._sinks:
            sink.close()

    def _truncate(self, step: int) -> None:
        if not self.path.is_file():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:  # a line cut off by a crash
                continue
            if step and record["step"] <= step:
                kept.append(line + "\n")
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(kept), encoding="utf-8")
        os.replace(temporary, self.path)


def read_log(out: str | Path, event: str | None = None) -> list[dict[str, Any]]:
    """Records of a run's log, of one event or all."""
    lines = (Path(out) / "log.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    return [r for r in records if event is None or r["event"] == event]


class _TensorBoard:
    def __init__(self, out: Path, settings: dict[str, Any]) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError("--log tensorboard needs: pip install tensorboard") from error
        self._writer = SummaryWriter(str(out / "tensorboard"))

    def write(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Tracker:
    """trackio and wandb share one interface."""

    package = ""

    def __init__(self, out: Path, settings: dict[str, Any]) -> None:
        import importlib

        try:
            self._module = importlib.import_module(self.package)
        except ImportError as error:
            raise ValueError(f"--log {self.package} needs: pip install {self.package}") from error
        self._module.init(project="nestlearn", name=out.name, config=settings)

    def write(self, step: int, values: dict[str, float]) -> None:
        self._module.log(values, step=step)

    def close(self) -> None:
        self._module.finish()


class _Trackio(_Tracker):
    package = "trackio"


class _Wandb(_Tracker):
    package = "wandb"


_SINKS: dict[str, Callable[[Path, dict[str, Any]], Sink]] = {
    "tensorboard": _TensorBoard,
    "trackio": _Trackio,
    "wandb": _Wandb,
}
