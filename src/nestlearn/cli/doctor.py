"""``nestlearn doctor``: what this machine offers, and which implementation of a layer runs."""

from __future__ import annotations

import dataclasses
import json
import platform
import sys
from typing import Any

from rich.console import Console
from rich.table import Table

from nestlearn import __version__
from nestlearn.cli import machine
from nestlearn.nn import native
from nestlearn.nn.mixers import MIXERS
from nestlearn.nn.presets import PRESETS
from nestlearn.rules.dispatch import available_paths


@dataclasses.dataclass
class Doctor:
    """Say what this machine offers and which path (chunked, compiled, GPU) will run, and why."""

    json: bool = False
    """Print one JSON object instead of tables."""
    quick: bool = False
    """Leave out the trial of torch.compile, which takes some seconds."""

    def run(self) -> int:
        """Examine and print."""
        found = examine(compile_too=not self.quick)
        if self.json:
            print(json.dumps(found, indent=2))
        else:
            show(found, Console())
        return 0


def examine(compile_too: bool = True) -> dict[str, Any]:
    """Everything the report says, as plain values."""
    compiled = machine.try_compile() if compile_too else None
    paths = [dataclasses.asdict(path) for path in available_paths()]
    library, reason = native.load()
    paths.append({"name": "native", "available": library is not None, "reason": reason})
    if compiled is not None and not compiled["usable"]:
        for path in paths:
            if path["name"] == "compiled":
                path |= {"available": False, "reason": f"does not work: {compiled['reason']}"}
    return {
        "nestlearn": __version__,
        "python": platform.python_version(),
        "executable": sys.executable,
        "system": f"{platform.system()} {platform.machine()}",
        "libraries": machine.library_versions(),
        "processor": machine.processor(),
        "memory": machine.memory(),
        "accelerators": machine.accelerators(),
        "compile": compiled,
        "paths": paths,
        "mixers": {name: mixer_path(name) for name in MIXERS},
    }


OTHER_MIXERS = {
    "rwkv7": ("chunked", "generalised delta rule, all chunks in batched products"),
    "mamba2": ("chunked", "decayed Hebbian memory, all chunks in batched products"),
    "lstm": ("sequential", "torch's loop over tokens"),
    "srwm": ("sequential", "a matrix that rewrites itself, token by token"),
    "titans_mac": ("chunked", "attention and a memory written by gradients, segment by segment"),
    "titans_mag": ("chunked", "torch's fused attention beside a memory written by gradients"),
    "titans_mal": ("chunked", "torch's fused attention after a memory written by gradients"),
}


def mixer_path(name: str) -> dict[str, str]:
    """Which implementation a mixer runs on this machine, and why."""
    paths = {path.name: path for path in available_paths()}
    gpu = bool(machine.accelerators())
    where = "on the GPU" if gpu else "on the CPU"
    if name == "attention":
        return {"path": "sdpa", "why": f"torch's fused attention {where}; nothing is written"}
    if name == "self_modifying":
        library, reason = native.load()
        if library is not None and not gpu:
            return {"path": "native", "why": f"whole sequences in one C++ call ({reason})"}
        if not gpu:
            where += f"; not native: {reason}"
        return {
            "path": "chunked",
            "why": f"all memories of a chunk in batched products {where}; with memory_chunk=1 and "
            "projection_chunk=1 it is the exact recurrence, token by token",
        }
    if name in OTHER_MIXERS:
        path, why = OTHER_MIXERS[name]
        return {"path": path, "why": f"{why}, {where}"}
    spec = PRESETS[name]
    if not spec.linear:
        what = "a matrix" if spec.depth == 1 else f"a {spec.depth}-layer memory"
        return {
            "path": "chunked",
            "why": f"{what} written by gradients, one batched write per chunk, {where}",
        }
    fla = spec.rule == "delta" and spec.gated_decay and not spec.closed_loop
    if fla and paths["fla"].available:
        return {
            "path": "fla",
            "why": "gated delta rule in bf16 or fp16 on CUDA; chunked in fp32 and elsewhere",
        }
    why = f"linear memory, all chunks in batched products {where}"
    if fla:
        why += f"; not fla: {paths['fla'].reason}"
    return {"path": "chunked", "why": why}


def show(found: dict[str, Any], console: Console) -> None:
    """Print the report as tables."""
    table = Table("what", "found", title=f"nestlearn {found['nestlearn']}")
    for what, value in _machine_rows(found):
        table.add_row(what, value)
    console.print(table)

    table = Table("implementation", "here", "why", title="Implementations of the learning rules")
    for path in found["paths"]:
        table.add_row(path["name"], "yes" if path["available"] else "no", path["reason"])
    console.print(table)

    table = Table("mixer", "runs", "why", title="What will run")
    for name, choice in found["mixers"].items():
        table.add_row(name, choice["path"], choice["why"])
    console.print(table)


def _machine_rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    processor, memory, compiled = found["processor"], found["memory"], found["compile"]
    units = ", ".join(processor["vector units"]) or "none that matter"
    rows = [
        ("Python", f"{found['python']} ({found['executable']})"),
        ("system", found["system"]),
        ("processor", f"{processor['model']}, {processor['cores']} cores usable"),
        ("vector units", f"{units}; torch uses its {processor['torch kernels']} kernels"),
        ("torch threads", str(processor["torch threads"])),
        ("memory", f"{_gib(memory['total'])}, {_gib(memory['available'])} available"),
    ]
    rows += [("GPU", _gpu(gpu)) for gpu in found["accelerators"]] or [("GPU", "none found")]
    rows += [(name, version or "not installed") for name, version in found["libraries"].items()]
    if compiled is None:
        rows.append(("torch.compile", "not tried (--quick)"))
    elif compiled["usable"]:
        rows.append(("torch.compile", f"works (tried, {compiled['seconds']:.1f} s)"))
    else:
        rows.append(("torch.compile", f"does not work: {compiled['reason']}"))
    return rows


def _gpu(gpu: dict[str, Any]) -> str:
    parts = [gpu["name"]]
    if gpu["memory"]:
        parts.append(_gib(gpu["memory"]))
    if gpu["capability"]:
        parts.append(f"compute capability {gpu['capability']}")
    return ", ".join([*parts, "bf16" if gpu["bf16"] else "no bf16"])


def _gib(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 2**30:.1f} GiB"
