"""Compile the kernel on first use and load it; without a compiler there is a reason instead."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from nestlearn.files import cache_folder

SOURCES = ("kernel.cpp", "memories.h", "chunk.h", "dense.h")
FLAGS = (
    "-std=c++17",
    "-O3",
    "-march=native",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-signed-zeros",
    "-fassociative-math",  # sums may be reordered; infinities and NaN keep their meaning
    "-shared",
    "-fPIC",
)
WIDE = "-mprefer-vector-width=512"


@functools.cache
def load() -> tuple[ctypes.CDLL | None, str]:
    """The compiled kernel, or None and why there is none.

    The library is compiled once per machine type and version, for the processor at hand, into
    ``$NESTLEARN_CACHE`` (default: ``nestlearn`` in the user's cache folder). ``NESTLEARN_NATIVE=0``
    turns it off; ``CXX`` names the compiler.
    """
    if os.environ.get("NESTLEARN_NATIVE", "1") == "0":
        return None, "turned off by NESTLEARN_NATIVE=0"
    if platform.system() == "Windows":
        return None, "not built on Windows"
    compiler = _compiler()
    if compiler is None:
        return None, "no C++ compiler found (install g++ or clang++, or set CXX)"
    try:
        return ctypes.CDLL(str(_compile(compiler))), f"compiled with {Path(compiler).name}"
    except (OSError, subprocess.SubprocessError) as error:
        output = getattr(error, "stderr", None) or str(error)
        return None, f"{Path(compiler).name} could not compile it: {output.strip()[:500]}"


def _compiler() -> str | None:
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++"]
    return next((found for name in names if (found := shutil.which(name))), None)


def _compile(compiler: str) -> Path:
    folder = Path(__file__).parent
    flags = [*FLAGS]
    if platform.machine() in ("x86_64", "AMD64"):
        flags.append(WIDE)
    # What -march=native means here is part of the name: home folders are shared between machines.
    native = _run([compiler, "-march=native", "-dM", "-E", "-x", "c++", os.devnull])
    name = hashlib.sha256(" ".join([compiler, *flags, native]).encode())
    for source in SOURCES:
        name.update((folder / source).read_bytes())
    cache = cache_folder()
    library = cache / f"kernel-{name.hexdigest()[:20]}.so"
    if not library.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            made = Path(scratch) / library.name
            _run([compiler, *flags, str(folder / SOURCES[0]), "-o", str(made)])
            made.replace(library)  # atomic: other processes may be compiling too
    return library


def _run(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=300).stdout
