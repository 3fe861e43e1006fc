"""Experiments in which systems are trained on text, and their trained models are kept.

Experiments of one plan share the models: what one has trained, the others load.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model

from nestlearn.evals.harness.experiment import Request, Scale
from nestlearn.evals.harness.results import Results
from nestlearn.evals.harness.systems import Size
from nestlearn.evals.harness.task import VALIDATION, Batch, Task
from nestlearn.evals.harness.trained import Plan, Trained
from nestlearn.evals.text import Windows, default_text
from nestlearn.files import write_file
from nestlearn.train.distributed import Distributed

FINEWEB = "HuggingFaceFW/fineweb-edu:sample-10BT"
_BPE_SAMPLE = 50_000_000  # characters a tokenizer is trained on


@dataclasses.dataclass(frozen=True)
class TextPlan(Plan):
    """How systems are trained on text.

    Attributes:
        length: tokens of a training sequence.
        corpus: data as ``nestlearn train`` takes it; None: bytes of novels, or of Python's own
            sources where there are none.
        tokenizer: of a corpus: ``bpe:N``, or what ``nestlearn train`` takes.
        tokens: of the corpus, at most.
        limit: examples of a standard task.
    """

    length: int = 256
    corpus: str | None = None
    tokenizer: str = "byte"
    tokens: int | None = None
    limit: int | None = None


PLANS: Mapping[Scale, TextPlan] = {
    "tiny": TextPlan(
        Size(128, 4, 4), steps=400, batch=16, lrs=(3e-3, 1.2e-2, 2.4e-2), seeds=1, examples=128,
        limit=60,
        systems=("transformer", "gated_deltanet", "titans", "hope_attention", "hope"),
    ),
    "small": TextPlan(
        Size(512, 8, 8), steps=3_000, batch=32, lrs=(1e-3,), seeds=1, examples=256, limit=1_000,
        length=1_024, corpus=FINEWEB, tokenizer="bpe:16384", tokens=120_000_000,
        systems=("transformer", "gated_deltanet", "titans", "hope_attention", "hope"),
    ),
    "paper": TextPlan(
        Size(1_536, 24, 16, parameters=760_000_000), steps=60_000, batch=128, lrs=(6e-4,), seeds=1,
        examples=512, length=4_096, tokenizer="bpe:32000", tokens=30_000_000_000,
        corpus="HuggingFaceFW/fineweb-edu:sample-100BT",
    ),
}  # fmt: skip
"""760 million parameters and 30 billion tokens are the smaller of the paper's two sizes."""


class CorpusWindows(Task):
    """Predicting the next token of sequences of a corpus, held-out regions of it for validation
    and, in turn, test.

    Args:
        plan: its corpus, tokenizer and length. folder: where the tokenizer is kept.
    """

    metric = "loss"
    name = "text"

    def __init__(self, plan: TextPlan, folder: Path) -> None:
        self.plan, self.folder, self.length = plan, folder, plan.length

    @functools.cached_property
    def tokenizer(self) -> Any:
        """Of the corpus, trained at first use."""
        from nestlearn.sources import find_sources, read_documents
        from nestlearn.train.tokenizers import load_tokenizer

        if (self.folder / "tokenizer.json").is_file():
            return load_tokenizer(str(self.folder))
        assert self.plan.corpus is not None
        texts: Any = ()
        if self.plan.tokenizer.startswith("bpe:"):
            sources = find_sources([self.plan.corpus], print)
            texts = _sample(text for text, _ in read_documents(sources, None))
        tokenizer = load_tokenizer(self.plan.tokenizer, texts)
        tokenizer.save_pretrained(self.folder)
        return tokenizer

    @property
    def vocab_size(self) -> int:  # type: ignore[override]
        """Of the tokenizer."""
        return len(self.tokenizer)

    @functools.cached_property
    def blocks(self) -> Any:
        """Training and held-out sequences."""
        from nestlearn.train import Blocks, prepare

        assert self.plan.corpus is not None
        corpus = prepare([self.plan.corpus], self.tokenizer, max_tokens=self.plan.tokens)
        return Blocks(corpus, self.length)

    def draw(self, split: str, count: int, generator: torch.Generator) -> Batch:
        """Held-out sequences: every other one is for validation, the rest for the test."""
        rows = self.blocks.val(2 * count)[0 if split == VALIDATION else 1 :: 2]
        return Batch.of(rows[:, :-1], rows[:, 1:])


class LanguageModels(Trained):
    """Systems trained on one text; the best learning rate has the least loss on validation text.

    The trained models lie in ``models/`` beside the result file; a cell whose model is there
    already, of the same plan and cell, loads it.
    """

    plans: Mapping[Scale, TextPlan] = PLANS

    @property
    def plan(self) -> TextPlan:
        """Of this scale."""
        return self.plans[self.scale]

    folder = Path("models")
    """Set from the place of the result file."""

    def tasks(self) -> dict[str, Task]:
        """One: predicting text."""
        plan = self.plan
        if plan.corpus is None:
            return {"text": Windows(default_text(), plan.length)}
        return {"text": CorpusWindows(plan, self.folder / "tokenizer")}

    def settings(self) -> dict[str, Any]:
        """The plan and which text."""
        text = {"text": default_text()} if self.plan.corpus is None else {}
        return {**super().settings(), **text}

    def due(self, results: Results, request: Request) -> dict[str, dict[str, Any]]:
        """Cells, with the folder of models."""
        folder = str(results.path.parent / "models")
        self.folder = Path(folder)
        cells = super().due(results, request)
        return {name: {**cell, "folder": folder} for name, cell in cells.items()}

    def measure(self, cell: dict[str, Any]) -> dict[str, Any]:
        """Train or load one model, and measure it."""
        self.folder = Path(cell["folder"])
        row = super().measure(cell)
        del row["folder"]
        return row

    def train(self, model: Any, task: Task, cell: dict[str, Any]) -> dict[str, Any]:
        """Train a model, or load it where it has been trained before."""
        folder = self.folder / _name(cell)
        keeps = Distributed.start(cell["device"]).main
        stamp = self._stamp(model, cell)
        record = folder / "trained.json"
        if record.is_file():
            known = json.loads(record.read_text(encoding="utf-8"))
            if known["stamp"] == stamp:
                load_model(model, str(folder / "final" / "model.safetensors"))
                return dict(known["found"])
        if isinstance(task, CorpusWindows):
            found = self._train_on_corpus(model, task, cell, folder)
        else:
            found = super().train(model, task, cell)
            if keeps:
                model.save_pretrained(folder / "final")
        found = {"loss": found["loss"], "seconds": found["seconds"]}
        text = json.dumps({"stamp": stamp, "found": found})

        def write(path: Path) -> None:
            path.write_text(text, encoding="utf-8")

        if keeps:
            write_file(record, write)
        return found

    def _stamp(self, model: Any, cell: dict[str, Any]) -> dict[str, Any]:
        # Not those of a subclass: what is measured later does not change what is trained.
        shared = LanguageModels.settings(self)
        settings = {k: v for k, v in shared.items() if k not in ("limit", "examples")}
        fields = json.loads(model.config.to_json_string(use_diff=False))
        own = {k: cell[k] for k in ("lr", "weight_decay", "seed")}
        stamp = json.dumps({"settings": settings, "model": fields, **own})
        return dict(json.loads(stamp))

    def _train_on_corpus(
        self, model: Any, task: CorpusWindows, cell: dict[str, Any], folder: Path
    ) -> dict[str, Any]:
        """Through the trainer of ``nestlearn train``, which goes on from its checkpoints."""
        from nestlearn.train import TrainConfig, Trainer

        plan, cuda = self.plan, cell["device"].startswith("cuda")
        config = TrainConfig(
            out=str(folder), steps=plan.steps, batch_size=plan.batch, seq_len=plan.length,
            accumulate=max(1, plan.batch * plan.length // 32_768), lr=cell["lr"],
            weight_decay=cell["weight_decay"], dtype="bf16" if cuda else "fp32",
            device=cell["device"], seed=cell["seed"],
        )  # fmt: skip
        began = time.perf_counter()
        result = Trainer(model, task.blocks, config, task.tokenizer).fit()
        if result.interrupted:
            raise ValueError(f"training was interrupted at step {result.step}; run it again")
        return {"loss": result.losses or [math.nan], "seconds": time.perf_counter() - began}

    def tokenizer(self) -> Any:
        """Of the text that systems are trained on."""
        from nestlearn.train.tokenizers import ByteTokenizer

        task = self.tasks()["text"]
        return task.tokenizer if isinstance(task, CorpusWindows) else ByteTokenizer()

    def perplexity(self, results: Results, system: str) -> float | None:
        """Of the test text, per token (a byte at scale tiny), mean loss over seeds."""
        loss = self.mean(results, "text", system, "test")
        return None if loss is None else math.exp(loss)


def _sample(texts: Iterable[str]) -> Iterator[str]:
    left = _BPE_SAMPLE
    for text in texts:
        yield text[:left]
        left -= len(text)
        if left <= 0:
            return


def _name(cell: dict[str, Any]) -> str:
    kind = "tune" if cell["tuning"] else "final"
    own = f"lr{cell['lr']:g}-wd{cell['weight_decay']:g}-seed{cell['seed']}"
    return f"{cell['system']}-{kind}-{own}"
