"""What a person sees of a run: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar


class Progress:
    """Lines and a progress bar.

    Args:
        visible: False for processes that should say nothing.
        stream: where to write, default standard error's console on a terminal, else plain text.
        interval: seconds between two lines where there is no terminal.
    """

    def __init__(
        self, visible: bool = True, stream: TextIO | None = None, interval: float = 10.0
    ) -> None:
        self._visible, self._interval = visible, interval
        self._console = Console(file=stream or sys.stdout, highlight=False, soft_wrap=True)
        self._bar: Bar | None = None
        self._task: TaskID | None = None
        self._steps = 0
        self._began = self._shown = 0.0
        self._first = 0
        self._note = ""

    def line(self, text: str) -> None:
        """Print one line (above the bar)."""
        if self._visible:
            self._console.print(text, markup=False)

    def start(self, steps: int, done: int) -> None:
        """The run begins at step ``done`` of ``steps``."""
        self._steps, self._first, self._began = steps, done, time.monotonic()
        self._shown = self._began
        if self._visible and self._console.is_terminal:
            self._bar = Bar(
                TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
                BarColumn(),
                TextColumn("{task.description}"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._bar.add_task("", total=steps, completed=done)
            self._bar.start()

    def update(self, step: int, loss: float, rate: float, fired: tuple[str, ...] = ()) -> None:
        """A step was done."""
        speed = (step - self._first) / max(1e-9, time.monotonic() - self._began)
        text = f"loss {loss:.3f}  lr {rate:.1e}  {speed:.2f} steps/s{self._note}"
        if len(fired) > 1:
            text += "  updated: " + ", ".join(fired)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=step, description=text)
        elif self._visible and time.monotonic() - self._shown >= self._interval:
            self._shown = time.monotonic()
            self.line(f"step {step}/{self._steps}  {text}")

    def evaluated(self, step: int, result: dict[str, float], better: bool) -> None:
        """Held-out results are in."""
        parts = [f"perplexity {result['perplexity']:.3f}"]
        if "bits_per_byte" in result:
            parts.insert(0, f"{result['bits_per_byte']:.3f} bits per byte")
            self._note = f"  val {result['bits_per_byte']:.3f} bpb"
        self.line(
            f"step {step}/{self._steps}  held out: {', '.join(parts)}{' (best)' if better else ''}"
        )

    def stop(self) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
