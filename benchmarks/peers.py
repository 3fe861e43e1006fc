"""The environment of the peers' code: ``benchmarks/.peers-venv`` with packages as PyPI has them.

    python benchmarks/peers.py            # create it (again)
    python benchmarks/peers.py --check    # say what is in it

torch is installed first, at the version ours runs with, and nothing may replace it. Packages are
pinned; nested-learning is installed without its declared dependencies, because it pins versions of
``datasets`` and ``huggingface-hub`` that its model code does not use.

Peers' *optimizers* are timed and trained within our own process: `use_optimizers` puts them,
without their dependencies (torch is all they import), into a folder of their own,
``.peers-optimizers``.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from serve import Worker

HERE = Path(__file__).resolve().parent
VENV = HERE / ".peers-venv"
PYTHON = VENV / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
TORCH = "torch==2.13.0"
FULL = ["titans-pytorch==0.5.5", "omegaconf>=2.3", "numpy"]
BARE = ["nested-learning==0.2.0", "fla-core==0.6.0", "triton==3.9.0"]  # without dependencies
PACKAGES = ["torch", "titans-pytorch", "nested-learning", "fla-core"]
OPTIMIZERS = HERE / ".peers-optimizers"
OPTIMIZER_PACKAGES = ["pytorch-optimizer==4.1.0", "nested-learning==0.2.0"]


def ready() -> bool:
    """Whether the environment exists and holds the pinned packages."""
    if not PYTHON.exists():
        return False
    names = [p.split("==") for p in (TORCH, *FULL, *BARE) if "==" in p]
    code = (
        "from importlib.metadata import version as v\n"
        f"ok = all(v(n).split('+')[0] == w for n, w in {names!r})\n"
        "raise SystemExit(not ok)"
    )
    return subprocess.run([str(PYTHON), "-c", code], capture_output=True).returncode == 0


def install() -> None:
    """Create the environment.

    Raises:
        RuntimeError: an install step failed (its output is shown).
    """
    print(f"creating benchmarks/{VENV.name} (once; some minutes)", flush=True)
    _run([sys.executable, "-m", "venv", "--clear", str(VENV)])
    pip = [str(PYTHON), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    _run([*pip, TORCH])
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraint:
        constraint.write(TORCH + "\n")
        constraint.flush()
        _run([*pip, "-c", constraint.name, *FULL])
        _run([*pip, "--no-deps", *BARE])


def python() -> Path:
    """The environment's interpreter, after installing it if need be.

    Raises:
        RuntimeError: an install step failed.
    """
    if not ready():
        install()
    return PYTHON


def use_optimizers() -> None:
    """Make the peers' optimizers importable here (last on the path: nothing of ours is replaced).

    Raises:
        RuntimeError: pip could not install them.
    """
    wanted = [p.replace("-", "_").replace("==", "-") + ".dist-info" for p in OPTIMIZER_PACKAGES]
    if not all((OPTIMIZERS / name).is_dir() for name in wanted):
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        _run([*pip, "--no-deps", "--upgrade", "--target", str(OPTIMIZERS), *OPTIMIZER_PACKAGES])
    if str(OPTIMIZERS) not in sys.path:
        sys.path.append(str(OPTIMIZERS))


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        tail = "\n".join((done.stdout + done.stderr).strip().splitlines()[-3:])
        raise RuntimeError(f"`{' '.join(command[1:])}` failed: {tail}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="install nothing, report only")
    if not parser.parse_args().check:
        python()
    if not ready():
        raise SystemExit("the peers' environment is missing; run without --check to create it")
    worker = Worker(PYTHON, HERE / "worker_peers.py", 1)
    for package, found in worker.ask(op="versions", packages=PACKAGES)["versions"].items():
        print(f"{package:20s}{found}")
    worker.close()
