"""Checkpoints: a run stopped anywhere goes on bit-exactly.

``out/checkpoints/step-00000100/`` holds the model as a Hugging Face folder (``config.json``,
``model.safetensors``, tokenizer) and the trainer's part: ``state.safetensors`` with every tensor
(optimizer states, half-filled accumulators, random generators) and ``state.json`` with all else,
among it a checksum of each file. A folder gets its name only when it is complete.
"""

from __future__ import annotations

import json
import random
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from nestlearn.files import checksum, pack, unpack, write_folder

_NAME = re.compile(r"step-(\d{8,})")
_STATE = "state.json"


def save_model(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None
) -> None:
    """Write a Hugging Face folder, replacing an older one as a whole."""
    write_folder(folder, lambda new: _write_model(new, model, tokenizer))


def save_checkpoint(
    root: Path,
    step: int,
    state: dict[str, Any],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    keep: int = 2,
) -> Path:
    """Write ``root/step-<step>`` atomically, then drop all but the newest ``keep`` checkpoints.

    Args:
        state: dictionaries, lists, tuples, numbers, strings, None and tensors, nested at will.
    """
    folder = root / f"step-{step:08d}"

    def write(new: Path) -> None:
        _write_model(new, model, tokenizer)
        tensors: dict[str, Tensor] = {}
        tree = pack(state, tensors)
        save_file(tensors, new / "state.safetensors")
        sums = {p.name: checksum(p) for p in sorted(new.iterdir())}
        (new / _STATE).write_text(json.dumps({"format": 1, "sha256": sums, "state": tree}))

    write_folder(folder, write)
    for old in list_checkpoints(root)[:-keep]:
        shutil.rmtree(old)
    return folder


def list_checkpoints(root: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [p for p in root.glob("step-*") if _NAME.fullmatch(p.name) and (p / _STATE).is_file()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("step-")))


def find_checkpoint(root: Path, resume: str) -> Path | None:
    """The checkpoint that ``--resume auto|never|PATH`` means; None: start from scratch.

    Raises:
        ValueError: ``never`` although there are checkpoints, or a path without one.
    """
    present = list_checkpoints(root)
    if resume == "auto":
        return present[-1] if present else None
    if resume == "never":
        if present:
            raise ValueError(
                f"{root.parent} already holds checkpoints (the last: {present[-1].name}); continue "
                "with --resume auto, or choose another --out"
            )
        return None
    path = Path(resume)
    if (path / _STATE).is_file():
        return path
    inside = list_checkpoints(path) or list_checkpoints(path / "checkpoints")
    if not inside:
        raise ValueError(
            f"--resume {resume}: no checkpoint there (auto, never, or a step-* folder)"
        )
    return inside[-1]


def load_checkpoint(folder: Path, model: PreTrainedModel) -> dict[str, Any]:
    """Load the weights into ``model`` and return the trainer's state.

    Raises:
        ValueError: a damaged file, or weights of another model.
    """
    content = json.loads((folder / _STATE).read_text())
    for name, expected in content["sha256"].items():
        if not (folder / name).is_file() or checksum(folder / name) != expected:
            raise ValueError(
                f"checkpoint {folder} is damaged ({name}); delete it to continue from an older one"
            )
    load_weights(model, folder)
    tensors = load_file(folder / "state.safetensors")
    state: dict[str, Any] = unpack(content["state"], tensors)
    return state


def load_weights(model: nn.Module, folder: Path) -> None:
    """Copy weights from a model folder into ``model``, bit for bit.

    Raises:
        ValueError: names or shapes that differ.
    """
    stored: dict[str, Tensor] = {}
    for file in sorted(folder.glob("model*.safetensors")):
        stored |= load_file(file)
    mine = model.state_dict()
    # Tied tensors are stored once, under any of their names.
    places: dict[tuple[int, torch.Size], list[str]] = {}
    for name, tensor in mine.items():
        places.setdefault((tensor.data_ptr(), tensor.shape), []).append(name)
    missing = [names[0] for names in places.values() if not set(names) & set(stored)]
    unknown = sorted(set(stored) - set(mine))
    wrong = [n for n, t in stored.items() if n in mine and t.shape != mine[n].shape]
    if missing or unknown or wrong:
        raise ValueError(
            f"{folder} holds another model: missing {missing[:3]}, unknown {unknown[:3]}, "
            f"other shape {wrong[:3]}; give the run's own model settings or another --out"
        )
    with torch.no_grad():
        for name, tensor in stored.items():
            mine[name].copy_(tensor)


def random_state() -> dict[str, Any]:
    """The state of all random generators of this process."""
    numpy_state = np.random.get_state(legacy=False)
    return {
        "python": random.getstate(),
        "numpy": json.dumps(numpy_state, default=lambda a: a.tolist()),
        "torch": torch.get_rng_state(),
        "cuda": list(torch.cuda.get_rng_state_all()) if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Put all random generators back to a ``random_state()``."""
    random.setstate(state["python"])
    numpy_state = json.loads(state["numpy"])
    numpy_state["state"]["key"] = np.array(numpy_state["state"]["key"], dtype=np.uint32)
    np.random.set_state(numpy_state)
    torch.set_rng_state(state["torch"])
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def _write_model(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None
) -> None:
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        model.save_pretrained(folder)
    finally:
        if bars:
            transformers_logging.enable_progress_bar()
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
