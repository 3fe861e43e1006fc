"""What a synthetic task is: batches of inputs, targets at some positions, scores."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100
"""Target of positions at which nothing is asked."""
TRAIN, VALIDATION = "train", "validation"
"""Splits that every task has beside its test splits."""


@dataclasses.dataclass(frozen=True)
class Batch:
    """Sequences and what is asked of them.

    Attributes:
        inputs: ``(B, T)`` token numbers.
        targets: ``(B, T)``, the right token at every position or `IGNORE`; or ``(B, T, V)`` zeros
            and ones, the set of right tokens.
        asked: ``(B, T)``, True where an answer counts.
    """

    inputs: Tensor
    targets: Tensor
    asked: Tensor

    @classmethod
    def of(cls, inputs: Tensor, targets: Tensor) -> Batch:
        """A batch with one right token at every position that is not `IGNORE`."""
        return cls(inputs, targets, targets != IGNORE)

    def __len__(self) -> int:
        return len(self.inputs)

    def each(self, change: Callable[[Tensor], Tensor]) -> Self:
        """A batch of the same kind with all its tensors changed."""
        return type(self)(change(self.inputs), change(self.targets), change(self.asked))

    def rows(self, which: slice | Tensor) -> Self:
        """Some of the rows."""
        return self.each(lambda part: part[which])

    def loss(self, logits: Tensor) -> Tensor:
        """Mean cross-entropy over the positions asked; of sets: binary, mean over the tokens, too.

        Args:
            logits: ``(B, T, V)``.
        """
        logits, targets = logits[self.asked].float(), self.targets[self.asked]
        if targets.ndim == 2:
            return F.binary_cross_entropy_with_logits(logits, targets)
        return F.cross_entropy(logits, targets)

    def correct(self, logits: Tensor) -> Tensor:
        """``(B, T)``: the answer is right, or none was asked. A set must be right as a whole."""
        if self.targets.ndim == 3:
            right = ((logits > 0) == (self.targets > 0)).all(-1)
        else:
            right = logits.argmax(-1) == self.targets
        return right | ~self.asked


@dataclasses.dataclass(frozen=True)
class Score:
    """Shares of answers and of whole strings that are right, and the mean loss."""

    tokens: float
    strings: float
    loss: float


class Task(ABC):
    """A task that a model is trained on from scratch.

    Attributes:
        name: what it is called.
        vocab_size: tokens there are.
        length: longest sequence of any split.
        splits: names of the test splits.
        metric: what the literature reports: ``"strings"`` or ``"tokens"``, a share, or ``"loss"``,
            the less the better.
    """

    name: str
    vocab_size: int
    length: int
    splits: tuple[str, ...] = ("test",)
    metric: str = "tokens"

    @abstractmethod
    def draw(self, split: str, count: int, generator: torch.Generator) -> Batch:
        """``count`` examples of a split: `TRAIN`, `VALIDATION` or one of ``splits``."""

    def at(self, progress: float) -> Task:
        """The task as it is taught after a share of the training steps, in [0, 1): a curriculum
        for all systems. By default the same from beginning to end; what ``draw`` gives for other
        splits than `TRAIN` never changes."""
        return self


@torch.no_grad()
def score(model: torch.nn.Module, batch: Batch, rows: int = 32) -> Score:
    """How well a model does on a batch, ``rows`` sequences at a time.

    Args:
        model: ``model(inputs, use_cache=False).logits`` is ``(B, T, V)``.
    """
    was_training = model.training
    model.eval()
    tokens = strings = asked = 0
    loss = 0.0
    for start in range(0, len(batch), rows):
        part = batch.rows(slice(start, start + rows))
        logits = model(part.inputs, use_cache=False).logits
        right, count = part.correct(logits), int(part.asked.sum())
        tokens += int((right & part.asked).sum())
        strings += int(right.all(1).sum())
        loss += float(part.loss(logits)) * count
        asked += count
    model.train(was_training)
    return Score(tokens / asked, strings / len(batch), loss / asked)
