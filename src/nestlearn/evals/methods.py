"""What continual learners are compared with: fine-tuning, LoRA, elastic weights, replay.

All read documents one at a time with `FineTuning.learn`, or tasks of (prompt, completion) examples
with `FineTuning.learn_examples`, and change the model they are given.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nestlearn.adaptation.examples import Example, collate, completion_loss
from nestlearn.adaptation.sites import contiguous_head

Pair = tuple[list[int], list[int]]


class FineTuning:
    """Gradient steps on each document, with AdamW.

    Weights in bfloat16 are updated through float32 copies, so that small steps are not lost.

    Args:
        model: a causal language model, changed in place. With ``lora`` use `model` of this object
            afterwards, which wraps it.
        tokenizer: its tokenizer.
        lr: learning rate.
        repeats: gradient steps on each document; passes over the examples of a task.
        lora: rank of low-rank adapters on every linear map (peft); None trains all weights.
        replay: documents: chance that a step also trains on a document drawn from those read
            before. Examples: share of every task that is kept; a step trains on its batch and on up
            to as many kept examples of earlier tasks.
        ewc: weight of elastic weight consolidation (Kirkpatrick et al. 2017, in the online form of
            Schwarz et al. 2018): ``ewc / 2 * sum F (theta - theta*)^2`` is added to the loss. F is
            the diagonal Fisher information of ``anchor`` at the beginning plus that of every
            document (batch of examples) read, theta* the weights after the last document (task).
        anchor: general text ``(B, T)`` whose predictions are to stay; needed for ``ewc``.
        clip: largest norm of the gradient.
        batch: examples in a step.
        seed: of the replay and of the examples' order.

    Raises:
        ValueError: ``ewc`` without ``anchor``, or with ``lora``.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        lr: float,
        repeats: int = 1,
        lora: int | None = None,
        replay: float = 0.0,
        ewc: float = 0.0,
        anchor: Tensor | None = None,
        clip: float = 1.0,
        batch: int = 16,
        seed: int = 0,
    ) -> None:
        if ewc and (anchor is None or lora is not None):
            raise ValueError("ewc needs anchor, general text (B, T), and all weights (no lora)")
        self.model, self.tokenizer = model.eval(), tokenizer
        if lora is not None:
            import peft

            config = peft.LoraConfig(r=lora, lora_alpha=2 * lora, target_modules="all-linear")
            self.model = peft.get_peft_model(model, config).eval()
            contiguous_head(model)
        self.repeats, self.clip, self.replay, self.ewc = repeats, clip, replay, ewc
        self.batch = batch
        self.weights = [p for p in self.model.parameters() if p.requires_grad]
        self.copies = [p.detach().float().clone() for p in self.weights]
        self.optimizer = torch.optim.AdamW(
            self.copies, lr=lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True
        )
        self._random = random.Random(seed)
        self._read: list[Tensor] = []
        self._kept: list[Pair] = []
        self._fisher: list[Tensor] | None = None
        if ewc and anchor is not None:
            self._fisher = self._information(anchor)
            self._anchors = [c.clone() for c in self.copies]

    def learn(self, text: str) -> None:
        """Read one document."""
        bos = self.tokenizer.bos_token_id
        ids = self.tokenizer(text, add_special_tokens=False).input_ids
        row = torch.tensor([([] if bos is None else [bos]) + ids])
        squares = None
        for _ in range(self.repeats):
            self._backward(row)
            if self._fisher is not None:
                squares = [_grad(p).float().square() for p in self.weights]
            if self._read and self._random.random() < self.replay:
                self._backward(self._random.choice(self._read))
            self._step()
        self._read.append(row)
        if squares is not None:
            self._hold(squares)

    def learn_examples(self, examples: Sequence[Example]) -> None:
        """Learn a task: ``repeats`` passes over its examples in mini-batches, each in a new order;
        the loss is on the completions only."""
        pairs = [example.encode(self.tokenizer) for example in examples]
        device = self.model.get_input_embeddings().weight.device
        squares: list[Tensor] | None = None
        for turn in range(self.repeats):
            order = self._random.sample(pairs, len(pairs))
            for start in range(0, len(order), self.batch):
                chosen = order[start : start + self.batch]
                count = min(len(self._kept), len(chosen))
                replayed = self._random.sample(self._kept, count)
                batch = collate(chosen + replayed).to(device)
                completion_loss(self.model, batch).backward()
                if self._fisher is not None and turn == self.repeats - 1:
                    new = [_grad(p).float().square() for p in self.weights]
                    if squares is None:
                        squares = new
                    else:
                        torch._foreach_add_(squares, new)
                self._step()
        if self.replay:
            kept = max(1, round(self.replay * len(pairs)))
            self._kept += self._random.sample(pairs, min(kept, len(pairs)))
        if squares is not None:
            self._hold(squares)

    def _hold(self, squares: list[Tensor]) -> None:
        """Elastic weights hold on to what is known now."""
        if self._fisher is not None:
            torch._foreach_add_(self._fisher, squares)
            self._anchors = [c.clone() for c in self.copies]

    def _backward(self, row: Tensor) -> None:
        self.model(input_ids=row, labels=row, use_cache=False).loss.backward()

    def _step(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.weights, self.clip)
        for copy, weight in zip(self.copies, self.weights, strict=True):
            copy.grad = _grad(weight).float()
            weight.grad = None
        if self._fisher is not None:
            for copy, fisher, anchor in zip(self.copies, self._fisher, self._anchors, strict=True):
                assert copy.grad is not None
                copy.grad.addcmul_(fisher, copy - anchor, value=self.ewc)
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(self.weights, self.copies)

    def _information(self, rows: Tensor) -> list[Tensor]:
        """Diagonal Fisher information, summed over rows (as documents are)."""
        total = [torch.zeros_like(c) for c in self.copies]
        for row in rows:
            self._backward(row[None])
            torch._foreach_add_(total, [_grad(p).float().square() for p in self.weights])
            for p in self.weights:
                p.grad = None
        return total


def _grad(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
