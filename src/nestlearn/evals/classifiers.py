"""Continual classifiers that are compared on class-incremental streams; one interface for all.

Each is handed the examples of one task after the other and is then asked for labels, told nothing
but the labels seen so far. All have the same prompts, and a language model writes the label, by
constrained greedy decoding (`nestlearn.evals.labels`).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from nestlearn.adaptation.examples import Example
from nestlearn.adaptation.learner import Learner
from nestlearn.adaptation.reader import reading
from nestlearn.adaptation.sites import contiguous_head
from nestlearn.evals.labels import write_labels
from nestlearn.evals.methods import FineTuning


class Classifier(Protocol):
    """What a method must do."""

    def learn(self, examples: Sequence[Example]) -> None:
        """The next task."""

    def classify(self, prompts: Sequence[str], completions: Sequence[str]) -> list[int]:
        """Number of one of the completions seen so far, for every prompt."""


class Writing:
    """A model that writes labels as it is; the beginning of the others.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        batch: prompts at a time.
    """

    def __init__(self, model: Any, tokenizer: Any, batch: int = 32) -> None:
        self.model, self.tokenizer, self.batch = model, tokenizer, batch

    def learn(self, examples: Sequence[Example]) -> None:
        """Nothing is learned."""

    def classify(self, prompts: Sequence[str], completions: Sequence[str]) -> list[int]:
        """See `Classifier`."""
        return write_labels(
            self.model,
            [tokens(self.tokenizer, p) for p in prompts],
            [tokens(self.tokenizer, c, False) for c in completions],
            batch=self.batch,
        )


class Taught(Writing):
    """Ours: an adapted model and its `Learner`."""

    def __init__(self, learner: Learner, batch: int = 32) -> None:
        super().__init__(learner.model, learner.tokenizer, batch)
        self.learner = learner

    def learn(self, examples: Sequence[Example]) -> None:
        """See `Classifier`."""
        self.learner.learn(examples)


class Tuned(Writing):
    """Fine-tuning in its variants (`nestlearn.evals.methods.FineTuning`)."""

    def __init__(self, method: FineTuning, batch: int = 32) -> None:
        super().__init__(method.model, method.tokenizer, batch)
        self.method = method

    def learn(self, examples: Sequence[Example]) -> None:
        """See `Classifier`."""
        self.method.learn_examples(examples)


class InContext(Writing):
    """In-context learning: as many examples as fit stand before every prompt.

    They are drawn from all tasks, evenly over the classes, anew after each task, and read once:
    their attention cache is shared by all prompts.

    Args:
        context: tokens of the examples at most.
        seed: of the choice and order.
    """

    def __init__(
        self, model: Any, tokenizer: Any, *, context: int, seed: int = 0, batch: int = 8
    ) -> None:
        super().__init__(model, tokenizer, batch)
        contiguous_head(model)
        self.context, self.seed = context, seed
        self._classes: dict[str, list[str]] = {}
        self._prefix: Any = None
        self.shown = 0

    def learn(self, examples: Sequence[Example]) -> None:
        """Keep the examples; choose and read anew."""
        for example in examples:
            self._classes.setdefault(example.completion, []).append(
                example.prompt + example.completion
            )
        generator = random.Random(self.seed)
        rounds = [generator.sample(texts, len(texts)) for texts in self._classes.values()]
        chosen: list[list[int]] = []
        room = self.context - 1
        for turn in range(max(map(len, rounds))):
            row = [texts[turn] for texts in rounds if turn < len(texts)]
            for text in generator.sample(row, len(row)):
                ids = tokens(self.tokenizer, text, False)
                if len(ids) <= room:
                    chosen.append(ids)
                    room -= len(ids)
        self.shown = len(chosen)
        generator.shuffle(chosen)
        ids = tokens(self.tokenizer, "") + [t for one in chosen for t in one]
        device = self.model.get_input_embeddings().weight.device
        with torch.no_grad(), reading(self.model):
            self._prefix = self.model(
                torch.tensor([ids], device=device), use_cache=True, logits_to_keep=1
            ).past_key_values

    def classify(self, prompts: Sequence[str], completions: Sequence[str]) -> list[int]:
        """See `Classifier`."""
        return write_labels(
            self.model,
            [tokens(self.tokenizer, p, False) for p in prompts],
            [tokens(self.tokenizer, c, False) for c in completions],
            prefix=self._prefix,
            batch=self.batch,
        )


class InCA(Writing):
    """In-context learning assisted by an external continual learner (Momeni et al. 2025).

    The external learner is a Gaussian for each class, with a covariance shared by all, on mean-
    pooled embeddings of the prompt; it is kept as sums, so it forgets nothing. The ``top``
    likeliest classes are shown to the language model, each with the example nearest to its mean,
    and it writes the label of one of them. With ``top=1`` the Gaussians decide alone.

    Args:
        top: classes that the language model chooses from.
        layer: hidden states that are pooled (0: embeddings, -1: the last).
        shrinkage: share of the identity in the covariance.
    """

    def __init__(
        self, model: Any, tokenizer: Any, *, top: int = 3, layer: int = -1,
        shrinkage: float = 0.1, batch: int = 32,
    ) -> None:  # fmt: skip
        super().__init__(model, tokenizer, batch)
        if not (top >= 1 and 0 < shrinkage <= 1):
            raise ValueError(f"top must be 1 or more, shrinkage in (0, 1]: {top}, {shrinkage}")
        contiguous_head(model)
        self.top, self.layer, self.shrinkage = top, layer, shrinkage
        self._means: dict[str, Tensor] = {}
        self._shown: dict[str, str] = {}
        self._scatter: Tensor | None = None
        self._count = 0

    def learn(self, examples: Sequence[Example]) -> None:
        """Means of the new classes, and what they add to the shared covariance."""
        found = self.embed([example.prompt for example in examples])
        if self._scatter is None:
            self._scatter = found.new_zeros(found.shape[1], found.shape[1])
        for name in dict.fromkeys(example.completion for example in examples):
            rows = [i for i, example in enumerate(examples) if example.completion == name]
            own = found[rows]
            self._means[name] = own.mean(0)
            centred = own - own.mean(0)
            self._scatter += centred.mT @ centred
            self._count += len(rows)
            nearest = examples[rows[int(centred.square().sum(1).argmin())]]
            self._shown[name] = nearest.prompt + nearest.completion

    def classify(self, prompts: Sequence[str], completions: Sequence[str]) -> list[int]:
        """See `Classifier`."""
        scores = self.log_likelihoods(prompts, completions)
        ranked = scores.topk(min(self.top, len(completions)), dim=1).indices.tolist()
        if self.top == 1:
            return [row[0] for row in ranked]
        shown = []
        for prompt, row in zip(prompts, ranked, strict=True):
            # The likeliest class stands next to the prompt.
            before = "".join(self._shown[completions[c]] for c in reversed(row))
            shown.append(tokens(self.tokenizer, before + prompt))
        labels = [tokens(self.tokenizer, c, False) for c in completions]
        return write_labels(self.model, shown, labels, choices=ranked, batch=self.batch)

    def log_likelihoods(self, prompts: Sequence[str], completions: Sequence[str]) -> Tensor:
        """``-1/2 (x - mu_c)^T S^{-1} (x - mu_c)`` up to a constant, ``(prompts, completions)``."""
        assert self._scatter is not None
        cov = self._scatter / max(1, self._count - len(self._means))
        size = cov.diagonal().mean()
        cov = (1 - self.shrinkage) * cov
        cov.diagonal().add_(self.shrinkage * size.clamp(min=1e-12))
        means = torch.stack([self._means[c] for c in completions])
        solved = torch.linalg.solve(cov, means.mT)
        return self.embed(prompts) @ solved - 0.5 * (means.mT * solved).sum(0)

    @torch.no_grad()
    def embed(self, prompts: Sequence[str]) -> Tensor:
        """Mean hidden state of each prompt's tokens but the first, ``(N, D)``, float64."""
        rows = [tokens(self.tokenizer, p) for p in prompts]
        device = self.model.get_input_embeddings().weight.device
        made: list[Tensor] = []
        with reading(self.model):
            for start in range(0, len(rows), self.batch):
                part = rows[start : start + self.batch]
                length = max(map(len, part))
                ids = torch.zeros(len(part), length, dtype=torch.long, device=device)
                mask = torch.zeros_like(ids)
                for r, row in enumerate(part):
                    ids[r, : len(row)] = torch.tensor(row)
                    mask[r, : len(row)] = 1
                out = self.model(
                    input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=1,
                    output_hidden_states=True,
                )  # fmt: skip
                h = out.hidden_states[self.layer].double()
                # The first token's state is huge, whatever the token, and says nothing.
                mask[:, 0] = 0
                made.append((h * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1))
        return torch.cat(made).cpu()


def tokens(tokenizer: Any, text: str, begins: bool = True) -> list[int]:
    """Tokens of a text, after the token that begins texts if there is one."""
    ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids if text else []
    start = begins and tokenizer.bos_token_id is not None
    return [tokenizer.bos_token_id, *ids] if start else ids
