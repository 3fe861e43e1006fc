"""``nestlearn bench NAME``: runs ``benchmarks/NAME.py`` of the repository this package comes from.

The scripts are not installed with the package: they install other projects into an environment of
their own and write results into the repository.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


def benchmark_folder() -> Path:
    """``benchmarks/`` of the checkout; a ValueError where the package was installed without it."""
    folder = Path(__file__).resolve().parents[3] / "benchmarks"
    if not folder.is_dir():
        raise ValueError(
            "benchmarks are run from a checkout of the repository, and this nestlearn was "
            "installed without one; clone it and run `make bench` there"
        )
    return folder


def benchmarks() -> dict[str, Path]:
    """Name -> script of every benchmark: the scripts that can be run, but not their workers."""
    return {
        script.stem: script
        for script in sorted(benchmark_folder().glob("*.py"))
        if not script.stem.startswith(("_", "worker_")) and "__main__" in script.read_text()
    }


def find_benchmark(name: str) -> Path:
    """The script called ``name`` or, alone among all, beginning with it (train: train_speed)."""
    scripts = benchmarks()
    fitting = [name] if name in scripts else [known for known in scripts if known.startswith(name)]
    if len(fitting) != 1:
        problem = f"{name!r} may be {' or '.join(fitting)}" if fitting else f"no benchmark {name!r}"
        raise ValueError(f"{problem}; this checkout has: {', '.join(scripts) or 'none'}")
    return scripts[fitting[0]]


@dataclass
class Bench:
    """``nestlearn bench [NAME [FLAGS ...]]``: without a name, list the benchmarks there are.

    All that follows the name, ``--help`` too, is handed to the script as it stands.
    """

    name: str = ""
    arguments: tuple[str, ...] = ()

    @classmethod
    def from_arguments(cls, arguments: Sequence[str], prog: str = "nestlearn bench") -> Bench:
        """Read the command line (not tyro's work: the flags are the script's)."""
        if arguments and arguments[0] in ("-h", "--help"):
            print(f"usage: {prog} [NAME [FLAGS ...]]\n")
            print("Runs benchmarks/NAME.py with FLAGS; without a name, lists the names.")
            print(f"`{prog} NAME --help` lists a benchmark's flags.")
            raise SystemExit(0)
        return cls(arguments[0] if arguments else "", tuple(arguments[1:]))

    def run(self) -> int:
        """Run the script; its exit status is ours."""
        if not self.name:
            print("\n".join(benchmarks()) or "no benchmarks in this checkout")
            return 0
        command = [sys.executable, str(find_benchmark(self.name)), *self.arguments]
        return subprocess.run(command, check=False).returncode
