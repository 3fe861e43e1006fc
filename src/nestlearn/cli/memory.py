"""``nestlearn memory``: look at memory files, compare, merge, shrink and roll them back."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from nestlearn.cli.units import parse_bytes

File = Annotated[Path, tyro.conf.Positional]


@dataclass
class Show:
    """What a memory file holds."""

    file: File

    def run(self) -> int:
        """Print it."""
        from rich.console import Console
        from rich.table import Table

        from nestlearn.adaptation import read_memory

        memory = read_memory(self.file)
        layout, console = memory.layout, Console(highlight=False, soft_wrap=True)
        size = self.file.stat().st_size
        console.print(f"{self.file}: {size / 1e6:.2f} MB, made {_date(memory.created)}",
                      markup=False)  # fmt: skip
        console.print(f"base model {memory.model or '(no name)'}, fingerprint {layout.base}",
                      markup=False)  # fmt: skip
        console.print(_kind(memory), markup=False)
        console.print(
            "read " + ", ".join(f"{n:,} {name}" for name, n in memory.counts.items()), markup=False
        )
        table = Table("level", "period", "half-life", "tokens", "updates", "norm", "weights")
        clocks = (memory.optimizer or {}).get("clocks", {})
        for level, name in zip(memory.levels, memory.names, strict=True):
            own = memory.changes.get(name, {}).values()
            norm = sum(t.double().square().sum().item() for t in own) ** 0.5
            tokens, updates = clocks.get(name, (0, 0))
            fade = "-" if level.half_life is None else f"{level.half_life:g}"
            table.add_row(name, f"{level.period:,}", fade, f"{tokens:,}", f"{updates:,}",
                          f"{norm:.3f}", str(len(own)))  # fmt: skip
        console.print(table)
        for i, snapshot in enumerate(reversed(memory.snapshots), 1):
            tokens = snapshot.counts.get("tokens", 0)
            console.print(f"snapshot {i}: {_date(snapshot.created)}, {tokens:,} tokens, "
                          f"{snapshot.label}", markup=False)  # fmt: skip
        return 0


def _kind(memory: Any) -> str:
    """What it is, and how full."""
    from nestlearn.adaptation.memory import WRITTEN

    layout = memory.layout
    if layout.method != "added":
        return f"{layout.method}; {len(layout.shapes)} weights"
    written = memory.changes.get(WRITTEN, {}).values()
    used = sum(int(keys.any(-1).sum()) for keys in written)
    slots = sum(shape[0] for name, shape in layout.shapes.items() if name in memory.fixed)
    count = len(memory.fixed)
    return f"{count} added memor{'ies' if count > 1 else 'y'}; {used:,} of {slots:,} slots in use"


@dataclass
class Diff:
    """How two memory files of one base model differ."""

    first: File
    second: File

    def run(self) -> int:
        """Print a table."""
        from rich.console import Console
        from rich.table import Table

        from nestlearn.adaptation import read_memory
        from nestlearn.adaptation.operations import diff

        table = Table("level", "norm of first", "norm of second", "distance", "cosine")
        for row in diff(read_memory(self.first), read_memory(self.second)):
            values = (row.first, row.second, row.distance, row.cosine)
            table.add_row(row.level, *("-" if math.isnan(v) else f"{v:.4f}" for v in values))
        Console(highlight=False).print(table)
        return 0


@dataclass
class Merge:
    """Add what several memory files learned."""

    files: Annotated[tuple[Path, ...], tyro.conf.Positional]
    out: Path
    """The new memory file."""
    weights: tuple[float, ...] = ()
    """One for each file (default: 1)."""
    force: bool = False
    """Replace OUT if it exists."""

    def run(self) -> int:
        """Write the sum."""
        from nestlearn.adaptation import read_memory, write_memory
        from nestlearn.adaptation.operations import merge

        if self.out.exists() and not self.force:
            raise ValueError(f"{self.out} exists; --force replaces it")
        merged = merge([read_memory(f) for f in self.files], self.weights or None)
        print(f"{self.out}: {write_memory(merged, self.out)}")
        return 0


@dataclass
class Rollback:
    """Return a memory file to an earlier snapshot."""

    file: File
    steps: int = 1
    """Snapshots to go back; `nestlearn memory show` lists them."""

    def run(self) -> int:
        """Rewrite the file."""
        from nestlearn.adaptation import read_memory, write_memory

        memory = read_memory(self.file)
        snapshot = memory.rollback(self.steps)
        stored = write_memory(memory, self.file)
        tokens = snapshot.counts.get("tokens", 0)
        print(f"{self.file} is as on {_date(snapshot.created)} ({snapshot.label}): {tokens:,} "
              f"tokens; {stored}")  # fmt: skip
        return 0


@dataclass
class Prune:
    """Make a memory file smaller."""

    file: File
    snapshots: int | None = None
    """Keep so many of the newest snapshots."""
    momenta: bool = False
    """Drop the optimizers' momenta."""
    level: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = field(default_factory=tuple)
    """Drop what this level knows; may be repeated."""
    max_size: str | None = None
    """Store in at most so many bytes (8MB), at lower precision and rank if need be."""
    out: Path | None = None
    """Write here instead of replacing the file."""

    def run(self) -> int:
        """Rewrite the file."""
        from nestlearn.adaptation import read_memory, write_memory
        from nestlearn.adaptation.operations import prune

        limit = None if self.max_size is None else parse_bytes(self.max_size)
        memory = prune(
            read_memory(self.file),
            snapshots=self.snapshots,
            momenta=self.momenta,
            levels=self.level,
        )
        out = self.out or self.file
        print(f"{out}: {write_memory(memory, out, limit)}")
        return 0


@dataclass
class Verify:
    """Check that memory files are whole, and that they fit a model."""

    files: Annotated[tuple[Path, ...], tyro.conf.Positional]
    model: str | None = None
    """Base model that they must fit."""

    def run(self) -> int:
        """Print a line per file; returns 1 if one is not sound."""
        from nestlearn.adaptation import adapt_to, read_memory, unadapt

        model = None
        if self.model is not None:
            from nestlearn.cli.pretrained import load_pretrained

            model, _ = load_pretrained(self.model)
        failed = 0
        for file in self.files:
            try:
                memory = read_memory(file)
                if model is not None:
                    unadapt(adapt_to(model, memory))
                print(f"{file}: sound")
            except (ValueError, OSError) as error:
                failed += 1
                print(f"{file}: {error}")
        return int(failed > 0)


Action = (
    Annotated[Show, tyro.conf.subcommand("show")]
    | Annotated[Diff, tyro.conf.subcommand("diff")]
    | Annotated[Merge, tyro.conf.subcommand("merge")]
    | Annotated[Rollback, tyro.conf.subcommand("rollback")]
    | Annotated[Prune, tyro.conf.subcommand("prune")]
    | Annotated[Verify, tyro.conf.subcommand("verify")]
)


@dataclass
class MemoryCommand:
    """Look at memory files, compare, merge, shrink and roll them back."""

    action: tyro.conf.OmitSubcommandPrefixes[Action]

    def run(self) -> int:
        """Run the chosen one."""
        return self.action.run()


def _date(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
