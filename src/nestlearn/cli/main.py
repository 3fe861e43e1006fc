"""The ``nestlearn`` command: finds the sub-command, imports only that one, runs it.

A sub-command is a dataclass whose fields are its flags (read by tyro) and whose ``run()`` returns
the exit status. Mistakes of the user end in one line and status 1, bugs in a traceback.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nestlearn.heap import keep_freed_memory


@dataclass(frozen=True)
class Command:
    """Where a sub-command lives and what it is for."""

    module: str
    cls: str
    summary: str


COMMANDS: dict[str, Command] = {
    "train": Command("nestlearn.cli.train", "Train", "train a model on text"),
    "learn": Command("nestlearn.cli.learn", "Learn", "teach a pre-trained model from files"),
    "chat": Command("nestlearn.cli.chat", "Chat", "talk to a model with a memory"),
    "memory": Command(
        "nestlearn.cli.memory", "MemoryCommand", "show, compare, merge, roll back memory files"
    ),
    "generate": Command("nestlearn.cli.generate", "Generate", "continue a prompt"),
    "demo": Command("nestlearn.cli.demo", "Demo", "a pre-trained model learns a text, in minutes"),
    "demo-train": Command(
        "nestlearn.cli.demo_train", "DemoTrain", "train Hope, sample and stream, in minutes"
    ),
    "inspect": Command(
        "nestlearn.cli.inspect", "Inspect", "the levels of a model, and what they cost"
    ),
    "eval": Command("nestlearn.cli.eval", "Eval", "measure a model on standard tasks"),
    "reproduce": Command(
        "nestlearn.cli.reproduce", "Reproduce", "the tables and figures of the paper"
    ),
    "bench": Command("nestlearn.cli.bench", "Bench", "run a script of benchmarks/"),
    "doctor": Command("nestlearn.cli.doctor", "Doctor", "what this machine offers, what will run"),
}

INTERRUPTED = 130  # 128 + SIGINT
PIPE_CLOSED = 141  # 128 + SIGPIPE
SPINS = "10000"
"""How often a CPU thread of PyTorch's looks whether the others are done before it sleeps (GNU
OpenMP). By default it looks for milliseconds, in which a busy machine could do the others' work:
with two processes besides on two cores, a step of training takes half the time with this. On an
idle machine nothing changes."""


def usage() -> str:
    """The text of ``nestlearn --help``."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: nestlearn [-h] [--version] COMMAND ...",
            "",
            "Models that keep learning: Nested Learning and Hope for PyTorch.",
            "",
            "commands:",
            *lines,
            "",
            "`nestlearn COMMAND --help` lists a command's flags.",
            "NESTLEARN_DEBUG=1 shows the traceback of an error.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status.

    Example:
        >>> main(["--version"])
        nestlearn 0.1.0
        0
    """
    if "OMP_WAIT_POLICY" not in os.environ:  # read when torch is imported, which is later
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
    keep_freed_memory()
    try:
        status = _dispatch(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader (`| head`) has gone; nothing may be written at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except Exception as error:
        if os.environ.get("NESTLEARN_DEBUG") or not is_user_error(error):
            traceback.print_exc()
        else:
            print(f"nestlearn: error: {describe(error)}", file=sys.stderr)
        return 1


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if argv[0] in ("-V", "--version"):
        from nestlearn import __version__

        print(f"nestlearn {__version__}")
        return 0
    name, rest = argv[0], argv[1:]
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean `{near[0]}`?" if near else f"choose one of {', '.join(COMMANDS)}."
        print(f"nestlearn: error: no command {name!r}; {hint}", file=sys.stderr)
        return 2

    command = COMMANDS[name]
    cls = getattr(importlib.import_module(command.module), command.cls)
    prog = f"nestlearn {name}"
    if hasattr(cls, "from_arguments"):  # hands its flags on to another program
        return int(cls.from_arguments(rest, prog=prog).run())
    import tyro

    return int(tyro.cli(cls, args=rest, prog=prog).run())


def is_user_error(error: Exception) -> bool:
    """Whether the user can mend it: the system's errors about files, and values we refused.

    A ``ValueError`` counts only if nestlearn's own code raised it; one that comes out of a library
    is a bug of ours, and its traceback is needed.
    """
    if isinstance(error, OSError):
        return True
    if not isinstance(error, ValueError):
        return False
    frames = traceback.extract_tb(error.__traceback__)
    package = Path(__file__).resolve().parents[1]
    return bool(frames) and Path(frames[-1].filename).resolve().is_relative_to(package)


def describe(error: Exception) -> str:
    """An error as one line."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.strerror}: {error.filename}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines) or type(error).__name__


if __name__ == "__main__":
    raise SystemExit(main())
