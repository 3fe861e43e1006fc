"""Result files that grow cell by cell.

A result file is one JSON object: the question it answers, the command, commit, date and hardware of
what was measured last, its settings and seeds, one row per measured cell and a summary. Every row
has the command, commit, date and machine of its own. The file is rewritten atomically after every
cell, and a run that was cut off continues with the cells that are missing.
"""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

_CHECKOUT = Path(__file__).resolve().parents[4]
ROOT = _CHECKOUT if (_CHECKOUT / "pyproject.toml").is_file() else Path.cwd()
"""The repository, or the working folder where the package was installed without one; paths in
result files are relative to it."""


class Results:
    """A result file that grows cell by cell.

    Args:
        path: where it is kept.
        question: what the file answers, one sentence.
        settings: everything that decides what a cell means. A file with other settings is not
            continued (ValueError) unless ``fresh``.
        seeds: the seeds used.
        threads: CPU threads a measurement uses.
        fresh: drop what the file holds and start again.

    Attributes:
        record: what the file holds.
        keeps: False in a process that another one keeps the file for: nothing is written.

    Example:
        >>> import tempfile
        >>> out = Results(Path(tempfile.mkdtemp()) / "r.json", "How fast?", {"T": 8})
        >>> out.add("a", {"seconds": 1.0})
        >>> out.done("a"), out.done("b")
        (True, False)
    """

    def __init__(
        self,
        path: Path | str,
        question: str,
        settings: dict[str, Any],
        seeds: Sequence[int] = (0,),
        threads: int | None = None,
        fresh: bool = False,
    ) -> None:
        self.path, self.keeps = Path(path), True
        self._run: dict[str, Any] = {
            "command": command_line(),
            "commit": git_commit(),
            "date": now(),
            "hardware": hardware(threads),
            "seeds": list(seeds),
        }
        self.record: dict[str, Any] = {
            "question": question,
            **self._run,
            "settings": plain(settings),
            "rows": [],
            "summary": {},
        }
        if self.path.exists() and not fresh:
            old = read(self.path)
            if old.get("settings") != self.record["settings"]:
                raise ValueError(
                    f"{_relative(self.path)} was measured with other settings "
                    f"({_difference(old.get('settings', {}), self.record['settings'])}); "
                    "choose another --out or start again with --fresh"
                )
            # Until something is measured, the file is that of who measured it.
            self.record |= {k: old[k] for k in (*self._run, "rows", "summary") if k in old}

    def done(self, cell: str) -> bool:
        """Whether the cell has been measured (a cell that failed is tried again)."""
        row = self.get(cell)
        return row is not None and "error" not in row

    def get(self, cell: str) -> dict[str, Any] | None:
        """The cell's row, or None."""
        return next((row for row in self.record["rows"] if row["cell"] == cell), None)

    def rows(self, **match: Any) -> list[dict[str, Any]]:
        """All rows whose entries equal ``match``."""
        return [
            row for row in self.record["rows"] if all(row.get(k) == v for k, v in match.items())
        ]

    def add(self, cell: str, row: dict[str, Any]) -> None:
        """Put in (or replace) one cell and write the file."""
        self.record |= self._run
        run = {"command": self._run["command"], "machine": machine(self._run["hardware"])}
        entry = {"cell": cell, **plain(row), **run, "commit": self._run["commit"], "date": now()}
        kept = [r for r in self.record["rows"] if r["cell"] != cell]
        self.record["rows"] = [*kept, entry]
        self.save()

    def summarise(self, summary: dict[str, Any]) -> None:
        """Set the summary and write the file."""
        self.record["summary"] = plain(summary)
        self.save()

    def save(self) -> None:
        """Write the file: temporary file, fsync, rename."""
        if not self.keeps:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        with open(temporary, "w", encoding="utf-8") as handle:
            json.dump(self.record, handle, indent=1, allow_nan=False)
            handle.write("\n")
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, self.path)


def read(path: Path | str) -> dict[str, Any]:
    """A result file as a dictionary.

    Raises:
        ValueError: it is no JSON object.
    """
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{_relative(Path(path))} is not JSON ({error}); delete it") from None
    if not isinstance(record, dict):
        raise ValueError(f"{_relative(Path(path))} is no result file; delete it")
    return record


def hardware(threads: int | None = None) -> dict[str, Any]:
    """What the numbers were measured on."""
    try:
        import torch

        torch_version: str | None = torch.__version__
        if threads is None:
            threads = torch.get_num_threads()
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    except ImportError:
        torch_version, gpu = None, None
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "ram_gib": _ram_gib(),
        "gpu": gpu,
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch_version,
        "threads": threads,
    }


def machine(hardware: dict[str, Any]) -> str:
    """`hardware` in words."""
    chip = hardware["gpu"] or f"{hardware['cpu']}, {hardware['cores']} cores"
    return f"{chip}; PyTorch {hardware['torch']}"


def git_commit() -> str:
    """Short commit of the working tree, ``+dirty`` when files differ from it, or ``none``."""

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        commit = git("rev-parse", "--short=12", "HEAD")
        dirty = git("status", "--porcelain", "--untracked-files=no", "--", "src", "benchmarks/*.py")
    except (OSError, subprocess.CalledProcessError):
        return "none"
    return commit + ("+dirty" if dirty else "")


def command_line() -> str:
    """The command as typed, with paths relative to the repository."""
    words = [_relative(Path(w)) if os.path.isabs(w) else w for w in sys.argv]
    script = Path(sys.argv[0]) if sys.argv else Path("-")
    if script.suffix == ".py":
        words[0] = f"python {_relative(script.resolve())}"
        return " ".join([words[0], *map(shlex.quote, words[1:])])
    return shlex.join(words)


def now() -> str:
    """Date and time in UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def median(values: Iterable[float]) -> float:
    """The median; NaN for none."""
    listed = list(values)
    return statistics.median(listed) if listed else math.nan


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print a table (first column left, the others right)."""
    from rich.console import Console
    from rich.table import Table

    out = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        out.add_column(column, justify="left" if i == 0 else "right", no_wrap=True)
    for row in rows:
        out.add_row(*(shown(value) for value in row))
    Console(width=max(130, Console().width)).print(out)


def plain(value: Any) -> Any:
    """JSON types only; NaN and infinities become strings, so that they are seen and valid."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, Path):
        return _relative(value)
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, str):  # messages name files: keep this machine's folders out
        for folder, name in ((ROOT, "."), (Path(sys.prefix), "<environment>"), (Path.home(), "~")):
            value = value.replace(f"{folder}/", f"{name}/")
    return value


def _difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    keys = [k for k in sorted({*old, *new}) if old.get(k) != new.get(k)]
    return ", ".join(f"{k}: {old.get(k)!r} there, {new.get(k)!r} now" for k in keys)


def _relative(path: Path) -> str:
    try:
        return str(path.resolve().relative_to(ROOT))
    except ValueError:
        return path.name


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _ram_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError, AttributeError):
        return None


def shown(value: Any) -> str:
    """A value of a table as text."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        if value and (abs(value) >= 1e5 or abs(value) < 1e-3):
            return f"{value:.3g}"
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}"
    return str(value)
