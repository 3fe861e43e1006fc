"""Freed memory that stays with the process."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

SCRIPT = """
import torch
from nestlearn.cli.machine import resident_bytes
from nestlearn.heap import keep_freed_memory

kept = KEPT
torch.ones(2**24)  # 64 MiB, freed at once
print(kept, resident_bytes())
"""


def run(kept: str, **environment: str) -> tuple[str, int]:
    """What the function said, and the bytes resident after 64 MiB were freed."""
    command = [sys.executable, "-c", SCRIPT.replace("KEPT", kept)]
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    clean |= {"OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(command, env=clean, capture_output=True, text=True, check=True)
    said, resident = done.stdout.split()
    return said, int(resident)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has this setting")
def test_freed_blocks_stay() -> None:
    _, before = run("None")
    said, after = run("keep_freed_memory()")
    assert said == "True"
    assert after - before > 48 * 2**20


def test_settings_of_the_environment_stay() -> None:
    said, _ = run("keep_freed_memory()", MALLOC_TRIM_THRESHOLD_="131072")
    assert said == "False"
