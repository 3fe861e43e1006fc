"""Text to train and test language models on: novels split by book, or Python's own sources."""

from __future__ import annotations

import functools
import gzip
import math
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nestlearn.evals.harness.data import data_root
from nestlearn.evals.harness.task import TRAIN, Batch, Task

# Suggested split of the novels, by book (README of the data folder).
VALIDATION = ("Doyle_Hound_1902", "Eliot_Felix_1866", "Kipling_Kim_1901", "Hardy_Jude_1895")
TEST = (
    "Stevenson_Treasure_1883",
    "Conrad_Nostromo_1904",
    "Gaskell_Ruth_1855",
    "James_Ambassadors_1903",
)


@functools.cache
def text(kind: str = "novels") -> dict[str, list[Tensor]]:
    """Documents as byte tensors by split: ``train``, ``validation``, ``test``.

    Args:
        kind: ``"novels"`` (the data folder's English novels) or ``"stdlib"`` (Python's own sources,
            every 10th file validation and every 10th test).

    Raises:
        ValueError: the novels are not there; set NESTLEARN_DATA or use ``"stdlib"``.
    """
    if kind == "stdlib":
        return _stdlib()
    folder = data_root() / "english_novels"
    files = sorted(p for p in folder.glob("*") if p.name.endswith((".txt", ".txt.gz")))
    if not files:
        raise ValueError("no english_novels: set NESTLEARN_DATA to the data folder or use stdlib")
    splits: dict[str, list[Tensor]] = {"train": [], "validation": [], "test": []}
    for path in files:
        name = path.name.split(".txt")[0]
        split = "validation" if name in VALIDATION else "test" if name in TEST else "train"
        splits[split].append(_bytes(path))
    return splits


def default_text() -> str:
    """``novels`` where the data folder has them, else ``stdlib``."""
    return "novels" if (data_root() / "english_novels").is_dir() else "stdlib"


def batches(documents: list[Tensor], batch: int, length: int, seed: int) -> Iterable[Tensor]:
    """Endless batches of windows ``(batch, length + 1)`` at random places of random documents (a
    document's chance is its length); the order depends on the seed only."""
    joined = torch.cat(documents)
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(joined) - length - 1, (batch,), generator=generator)
        yield torch.stack([joined[s : s + length + 1] for s in starts.tolist()]).long()


def bits_per_byte(model: Any, documents: list[Tensor], length: int, windows: int) -> float:
    """Mean bits per byte over ``windows`` evenly spaced windows per document, each read from the
    initial state."""
    model.eval()
    total, count = 0.0, 0
    with torch.inference_mode():
        for document in documents:
            places = torch.linspace(0, len(document) - length - 1, windows).long().tolist()
            data = torch.stack([document[p : p + length + 1] for p in places]).long()
            for rows in data.split(8):
                logits = model(input_ids=rows[:, :-1], use_cache=False).logits
                loss = F.cross_entropy(
                    logits.flatten(0, 1).float(), rows[:, 1:].flatten(), reduction="sum"
                )
                total, count = total + float(loss), count + rows[:, 1:].numel()
    model.train()
    return total / count / math.log(2)


class Windows(Task):
    """Predicting the next byte of windows of text; documents end with byte token 257.

    Training windows are drawn at random from the documents of the training split, those of
    validation and test lie evenly spread over theirs.

    Args:
        kind: see `text`. length: bytes that are predicted in a window.
        eos: the token between documents.

    Raises:
        ValueError: the novels are not there.
    """

    vocab_size = 259
    metric = "loss"

    def __init__(self, kind: str, length: int, eos: int = 257) -> None:
        self.name, self.length, self.eos = kind, length, eos

    def draw(self, split: str, count: int, generator: torch.Generator) -> Batch:
        """``count`` windows of ``length`` bytes, each with the byte after every one of them."""
        joined = _joined(self.name, split, self.eos)
        last = len(joined) - self.length - 1
        if split == TRAIN:
            starts = torch.randint(last, (count,), generator=generator).tolist()
        else:
            starts = torch.linspace(0, last, count).long().tolist()
        rows = torch.stack([joined[s : s + self.length + 1] for s in starts]).long()
        return Batch.of(rows[:, :-1], rows[:, 1:])


@functools.cache
def _joined(kind: str, split: str, eos: int) -> Tensor:
    end = torch.tensor([eos], dtype=torch.int16)
    return torch.cat([p for d in text(kind)[split] for p in (d.to(torch.int16), end)])


def _bytes(path: Path) -> Tensor:
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8)


def _stdlib() -> dict[str, list[Tensor]]:
    splits: dict[str, list[Tensor]] = {"train": [], "validation": [], "test": []}
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    for i, path in enumerate(p for p in sources if p.stat().st_size > 20_000):
        splits[{8: "validation", 9: "test"}.get(i % 10, "train")].append(_bytes(path))
    return splits
