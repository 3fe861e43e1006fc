"""``nestlearn learn``: a pre-trained model reads files and keeps what it learned in a file."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from nestlearn.cli.learner import open_learner
from nestlearn.cli.units import parse_bytes

if TYPE_CHECKING:
    from nestlearn.adaptation import Learned, Learner

INTERRUPTED = 130


@dataclass
class Learn:
    """Read files once, learn from them, and keep what was learned in a memory file."""

    files: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Files, folders, globs (text, JSON lines, Parquet), Hugging Face data sets, or - (standard
    input)."""
    model: str
    """Folder, .gguf file or Hugging Face id of the base model; it is never changed."""
    memory: Path
    """The memory file (*.nlmem): made if there is none, continued if there is one."""
    levels: tuple[int, ...] | None = None
    """Periods of the levels in tokens (default 64 512 4096, of a readout 1); for a new memory."""
    method: Literal["added", "placement", "readout"] = "added"
    """Memories beside the MLPs, the MLPs themselves as levels, or one exact memory at the end (for
    examples with a prompt and a completion); for a new memory."""
    rank: int | None = None
    """Numbers in a key (default 256, of a readout 3,072); for a new memory."""
    slots: int = 4096
    """Pairs that an added memory can hold; for a new memory."""
    frozen: float | None = None
    """Share of the blocks, from the input up, that learn nothing; for a new memory."""
    lr: float | None = None
    """Learning rate (default: 0.2 for added memories, 1e-4 for placement)."""
    repeats: int = 4
    """Gradient steps on each segment: more keeps more of what is read, and takes longer."""
    sentences: bool = False
    """Read each sentence once more on its own: much more comes back, in twice the time."""
    optimizer: Literal["rowadam", "adamw", "sgd"] | None = None
    """Of every level (default: rowadam for added memories, adamw for placement)."""
    context: int | None = None
    """Tokens of a document that are seen at once."""
    text_column: str = "text"
    """Column of JSON lines, Parquet and data sets that holds the text."""
    held_out: str | None = None
    """Text that is not learned: its perplexity is printed before and after."""
    max_size: str | None = None
    """Largest size of the memory file, such as 8MB; default: everything is kept exactly."""
    save_every: float = 60.0
    """Seconds between saves while learning."""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Type of the weights."""
    device: str = "auto"
    """auto, cpu, cuda."""

    def run(self) -> int:
        """Learn and save; returns the exit status: 0, or 130 if interrupted (after saving)."""
        limit = None if self.max_size is None else parse_bytes(self.max_size)
        if self.save_every <= 0:
            raise ValueError(f"--save-every must be more than 0 seconds, got {self.save_every}")
        documents = _documents(self.files)

        from nestlearn.interrupt import Interrupt

        learner = self._learner()
        before = self._held_out(learner, "before")
        known = learner.memory.counts.get("tokens", 0)
        saved = time.monotonic()
        bar = _Bar()

        with Interrupt(bar.line) as interrupt, bar:

            def progress(done: Learned) -> None:
                nonlocal saved
                bar.show(done)
                if time.monotonic() - saved > self.save_every:
                    learner.save(self.memory, limit)
                    saved = time.monotonic()

            try:
                done = learner.learn(
                    documents,
                    text_column=self.text_column,
                    label=f"before {', '.join(self.files)}"[:200],
                    progress=progress,
                    stop=lambda: interrupt.requested,
                )
            except BaseException:
                if learner.memory.counts.get("tokens", 0) > known:
                    print(f"saved what was learned so far: {learner.save(self.memory, limit)}",
                          file=sys.stderr)  # fmt: skip
                raise
            stored = learner.save(self.memory, limit)
        updates = ", ".join(f"{name}: {count}" for name, count in done.updates.items())
        print(f"learned {done.tokens:,} tokens of {done.documents:,} documents, "
              f"{done.tokens_per_second:.0f} tokens/s; updates {updates}")  # fmt: skip
        print(f"{self.memory}: {stored}")
        if before is not None:
            after = self._held_out(learner, "after")
            assert after is not None
            print(f"held-out perplexity changed by {100 * (after / before - 1):+.2f}%")
        return INTERRUPTED if done.stopped else 0

    def _learner(self) -> Learner:
        return open_learner(
            self.model, self.memory, self.dtype, self.device,
            {"periods": self.levels, "method": self.method, "rank": self.rank,
             "slots": self.slots, "frozen": self.frozen},
            lr=self.lr, optimizer=self.optimizer, repeats=self.repeats, sentences=self.sentences,
            context=self.context,
        )  # fmt: skip

    def _held_out(self, learner: Learner, when: str) -> float | None:
        if self.held_out is None:
            return None
        result = learner.evaluate(Path(self.held_out), text_column=self.text_column)
        print(f"held-out perplexity {when}: {result['perplexity']:.3f} "
              f"({result['tokens']:,} tokens)")  # fmt: skip
        return result["perplexity"]


def _documents(names: tuple[str, ...]) -> Any:
    if not names:
        raise ValueError("nothing to learn: name files, folders, a data set, or - for a pipe")
    if "-" in names:
        if names != ("-",):
            raise ValueError("- (standard input) cannot be mixed with files")
        return iter(_standard_input())
    return [Path(name) for name in names]


def _standard_input() -> list[str]:
    data = sys.stdin.buffer.read()
    try:
        return [data.decode("utf-8-sig")]
    except UnicodeDecodeError as error:
        raise ValueError(f"standard input is not UTF-8 text ({error.reason})") from error


class _Bar:
    """A live line on a terminal, plain lines elsewhere."""

    def __init__(self, interval: float = 10.0) -> None:
        from rich.console import Console
        from rich.progress import Progress, SpinnerColumn, TextColumn

        self._console = Console(highlight=False, soft_wrap=True)
        self._interval, self._shown = interval, time.monotonic()
        self._bar = (
            Progress(SpinnerColumn(), TextColumn("{task.description}"), console=self._console)
            if self._console.is_terminal
            else None
        )

    def __enter__(self) -> _Bar:
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task("reading", total=None)
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def line(self, text: str) -> None:
        """Print one line."""
        self._console.print(text, markup=False)

    def show(self, done: Learned) -> None:
        """What was done so far."""
        surprise = "  ".join(f"{name}: {value:.2f}" for name, value in done.surprise.items())
        text = (
            f"{done.tokens:,} tokens  {done.documents:,} documents  "
            f"{done.tokens_per_second:.0f} tokens/s  surprise {surprise}"
        )
        if self._bar is not None:
            self._bar.update(self._task, description=text)
        elif time.monotonic() - self._shown >= self._interval:
            self._shown = time.monotonic()
            self.line(text)
