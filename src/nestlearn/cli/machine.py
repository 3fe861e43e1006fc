"""What this machine offers: processor, memory, devices, libraries, a working compiler."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch

# Processor flags that decide how fast bf16 and wide vectors are.
_FLAGS = {
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx512_bf16": "AVX-512 bf16",
    "amx_bf16": "AMX bf16",
    "asimd": "NEON",
    "sve": "SVE",
    "bf16": "Arm bf16",
}
LIBRARIES = (
    "torch",
    "transformers",
    "datasets",
    "tokenizers",
    "safetensors",
    "triton",
    "flash-linear-attention",
    "accelerate",
)


def resident_bytes() -> int:
    """Memory this process occupies now (its peak, where the system tells no more)."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * resource.getpagesize()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def library_versions() -> dict[str, str | None]:
    """Version of every library we can use; None: not installed."""
    versions: dict[str, str | None] = {}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def processor() -> dict[str, Any]:
    """Model, usable cores, torch's threads and the vector units."""
    model, flags = platform.processor() or platform.machine(), set[str]()
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                model = value.strip()
            elif key.strip() in ("flags", "Features"):
                flags = set(value.split())
                break
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "model": model,
        "cores": cores,
        "torch threads": torch.get_num_threads(),
        "vector units": [label for flag, label in _FLAGS.items() if flag in flags],
        "torch kernels": torch.backends.cpu.get_cpu_capability(),
    }


def slow_with_bf16(processor: dict[str, Any]) -> bool:
    """Whether bfloat16 is emulated: x86 without AVX-512 multiplies matrices in it several times
    slower than in float32 (8 times on an AMD EPYC of the third generation, PyTorch 2.13)."""
    units = processor["vector units"]
    return "AVX2" in units and not any(unit.startswith(("AVX-512", "AMX")) for unit in units)


def memory() -> dict[str, int | None]:
    """Bytes of main memory: all of it and what is free now (None: the system does not say)."""
    info = Path("/proc/meminfo")
    if info.exists():
        rows = (line.split(":") for line in info.read_text().splitlines())
        sizes = {key: int(value.split()[0]) * 1024 for key, value in rows}
        return {"total": sizes.get("MemTotal"), "available": sizes.get("MemAvailable")}
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return {"total": None, "available": None}
    return {"total": total, "available": None}


def accelerators() -> list[dict[str, Any]]:
    """Name, memory and compute capability of every CUDA device; Apple's GPU by name."""
    found: list[dict[str, Any]] = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        device = torch.cuda.get_device_properties(index)
        found.append(
            {
                "name": device.name,
                "memory": device.total_memory,
                "capability": f"{device.major}.{device.minor}",
                "bf16": torch.cuda.is_bf16_supported(),
            }
        )
    if torch.backends.mps.is_available():
        found.append({"name": "Apple GPU (mps)", "memory": None, "capability": "", "bf16": True})
    return found


def try_compile() -> dict[str, Any]:
    """Compile a small function and run it: usable, seconds it took, and why not."""

    def function(x: torch.Tensor) -> torch.Tensor:
        return (x @ x).relu().sum()

    x = torch.linspace(-1, 1, 64).view(8, 8)
    started = time.perf_counter()
    try:
        value = torch.compile(function, fullgraph=True)(x)
        usable = bool(torch.allclose(value, function(x), rtol=1e-4))
        reason = "" if usable else "the compiled function returned another value"
    except Exception as error:  # any failure means the same: it cannot be used here
        usable = False
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[0] if lines else type(error).__name__
    finally:
        torch.compiler.reset()
    return {"usable": usable, "seconds": time.perf_counter() - started, "reason": reason}
