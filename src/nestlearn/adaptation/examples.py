"""Examples: a prompt and how it is to be completed, in batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

FIELDS = ("prompt", "completion")


@dataclasses.dataclass(frozen=True)
class Example:
    """A prompt that is read and a completion that is learned.

    Attributes:
        prompt, completion: texts, or both lists of messages ``{"role": ..., "content": ...}``,
            which the tokenizer's chat template turns into text.

    Raises:
        ValueError: an empty completion, or only one of the two made of messages.
    """

    prompt: Any
    completion: Any

    def __post_init__(self) -> None:
        kinds = [_kind(part) for part in (self.prompt, self.completion)]
        if None in kinds or kinds[0] != kinds[1]:
            raise ValueError(
                "prompt and completion must both be text, or both lists of messages with role and "
                f"content; got {self.prompt!r:.60} and {self.completion!r:.60}"
            )
        if not self.completion:
            raise ValueError(f"the completion of {self.prompt!r:.60} is empty: nothing to learn")

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Example | None:
        """The example in a row with the columns ``prompt`` and ``completion``; None without."""
        return cls(row["prompt"], row["completion"]) if all(f in row for f in FIELDS) else None

    def encode(self, tokenizer: Any, limit: int = 1 << 30) -> tuple[list[int], list[int]]:
        """Tokens of prompt and completion; a prompt that is too long loses its beginning.

        Raises:
            ValueError: no room for the completion within ``limit`` tokens.
        """
        if isinstance(self.prompt, str):
            start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
            prompt = start + _ids(tokenizer, self.prompt)
            completion = _ids(tokenizer, self.completion)
        else:
            text = tokenizer.apply_chat_template(
                self.prompt, tokenize=False, add_generation_prompt=True
            )
            whole = tokenizer.apply_chat_template([*self.prompt, *self.completion], tokenize=False)
            if not whole.startswith(text):
                raise ValueError("the chat template changes the prompt when it is answered")
            prompt, completion = _ids(tokenizer, text), _ids(tokenizer, whole[len(text) :])
        if not prompt:
            raise ValueError("a prompt without tokens: this tokenizer has no token to begin with")
        room = limit - len(completion)
        if room < 1:
            raise ValueError(
                f"a completion of {len(completion)} tokens does not fit into {limit}; "
                "give a larger context or a shorter completion"
            )
        return prompt[-room:], completion


@dataclasses.dataclass(frozen=True)
class Batch:
    """Examples padded on the left, so that their completions end together.

    Attributes:
        ids, mask, positions: ``(B, T)``.
        labels: ``(B, C)``, the last C tokens where they are to be learned, -100 elsewhere.
    """

    ids: Tensor
    mask: Tensor
    positions: Tensor
    labels: Tensor

    @property
    def tokens(self) -> int:
        """How many tokens are learned."""
        return int((self.labels >= 0).sum())

    @property
    def begun(self) -> int:
        """How many examples begin."""
        return len(self.ids)

    def pick(self, parts: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
        """Of states ``(B, T, D)``: those that predict a label, ``(N, D)``, and these labels."""
        width = self.labels.shape[1]
        chosen = (self.labels >= 0).to(parts[0].device)
        return [p[:, -width - 1 : -1][chosen] for p in parts], self.labels[self.labels >= 0]

    @property
    def inputs(self) -> dict[str, Any]:
        """Arguments of the model whose logits ``(B, C, V)`` predict `labels`."""
        return {
            "input_ids": self.ids,
            "attention_mask": self.mask,
            "position_ids": self.positions,
            "use_cache": False,
            "logits_to_keep": self.labels.shape[1] + 1,
        }

    def to(self, device: torch.device) -> Batch:
        """The same on another device."""
        return Batch(*(getattr(self, f.name).to(device) for f in dataclasses.fields(self)))


def collate(pairs: Sequence[tuple[list[int], list[int]]]) -> Batch:
    """A batch of (prompt, completion) tokens.

    Example:
        >>> collate([([5], [6, 7]), ([1, 2], [3])]).labels.tolist()
        [[6, 7], [-100, 3]]
    """
    length = max(len(p) + len(c) for p, c in pairs)
    width = max(len(c) for _, c in pairs)
    ids = torch.zeros(len(pairs), length, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full((len(pairs), width), -100)
    for row, (prompt, completion) in enumerate(pairs):
        count = len(prompt) + len(completion)
        ids[row, length - count :] = torch.tensor(prompt + completion)
        mask[row, length - count :] = 1
        labels[row, width - len(completion) :] = torch.tensor(completion)
    return Batch(ids, mask, (mask.cumsum(1) - 1).clamp(min=0), labels)


def completion_loss(model: Any, batch: Batch) -> Tensor:
    """Mean next-token loss over the tokens of the completions."""
    logits = model(**batch.inputs).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1).float(), batch.labels.flatten())


def batches(
    examples: Iterable[Example], tokenizer: Any, size: int, limit: int = 1 << 30
) -> Iterator[Batch]:
    """Batches of ``size`` examples, in order."""
    held: list[tuple[list[int], list[int]]] = []
    for example in examples:
        held.append(example.encode(tokenizer, limit))
        if len(held) == size:
            yield collate(held)
            held = []
    if held:
        yield collate(held)


def _kind(part: Any) -> type | None:
    if isinstance(part, str):
        return str
    messages = isinstance(part, list) and all(
        isinstance(m, Mapping) and {"role", "content"} <= set(m) for m in part
    )
    return list if messages else None


def _ids(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    return ids
