"""Examples: prompts and completions, learned on the completions only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import nestlearn as nl
from nestlearn.adaptation.documents import documents_of
from nestlearn.adaptation.examples import Example, batches, collate, completion_loss
from tests.adaptation.conftest import tiny_model

ROWS = [
    {"prompt": "what is it?", "completion": " a fish\n"},
    {"prompt": "where is the old boat?", "completion": " there\n"},
    {"prompt": "why", "completion": " because it is late\n"},
]


def plain_losses(model: Any) -> list[tuple[float, int]]:
    """(summed loss of the completion, its tokens), one example at a time."""
    result = []
    for row in ROWS:
        prompt, completion = [256, *row["prompt"].encode()], list(row["completion"].encode())
        ids = torch.tensor([prompt + completion])
        logits = model(ids).logits[0, len(prompt) - 1 : -1]
        loss = F.cross_entropy(logits, torch.tensor(completion), reduction="sum").item()
        result.append((loss, len(completion)))
    return result


def test_the_loss_is_that_of_the_completions_alone(tokenizer: Any) -> None:
    for family in ("Llama", "GPT2", "Gemma2", "OPT"):
        model = tiny_model(family)
        (batch,) = batches([Example(**row) for row in ROWS], tokenizer, 8)
        sums = plain_losses(model)
        expected = sum(loss for loss, _ in sums) / sum(n for _, n in sums)
        assert completion_loss(model, batch).item() == pytest.approx(expected, rel=1e-4), family
        assert batch.tokens == sum(n for _, n in sums) and batch.begun == 3


def test_collate_pads_on_the_left() -> None:
    batch = collate([([5, 6], [7]), ([1], [2, 3, 4])])
    assert batch.ids.tolist() == [[0, 5, 6, 7], [1, 2, 3, 4]]
    assert batch.mask.tolist() == [[0, 1, 1, 1], [1, 1, 1, 1]]
    assert batch.positions.tolist() == [[0, 0, 1, 2], [0, 1, 2, 3]]
    assert batch.labels.tolist() == [[-100, -100, 7], [2, 3, 4]]
    states = torch.arange(8.0).view(2, 4, 1)
    (picked,), labels = batch.pick([states])
    assert picked[:, 0].tolist() == [2, 4, 5, 6] and labels.tolist() == [7, 2, 3, 4]


def test_long_prompts_lose_their_beginning(tokenizer: Any) -> None:
    prompt, completion = Example("abcdefgh", "xy").encode(tokenizer, 6)
    assert bytes(prompt) == b"efgh" and bytes(completion) == b"xy"
    with pytest.raises(ValueError, match="completion of 9 tokens does not fit into 9"):
        Example("a", "123456789").encode(tokenizer, 9)


def test_conversations_go_through_the_chat_template(tokenizer: Any) -> None:
    class Chat:
        bos_token_id = 256

        def __call__(self, text: str, add_special_tokens: bool) -> Any:
            return tokenizer(text, add_special_tokens=add_special_tokens)

        def apply_chat_template(
            self, messages: Any, tokenize: bool, add_generation_prompt: bool = False
        ) -> str:
            text = "".join(f"<{m['role']}>{m['content']}." for m in messages)
            return text + ("<assistant>" if add_generation_prompt else "")

    example = Example([{"role": "user", "content": "hi"}], [{"role": "assistant", "content": "yo"}])
    prompt, completion = example.encode(Chat())
    assert bytes(prompt) == b"<user>hi.<assistant>" and bytes(completion) == b"yo."


@pytest.mark.parametrize(
    ("prompt", "completion"), [("a", ""), ("a", [{"role": "x", "content": "y"}]), ("a", None)]
)
def test_bad_examples_are_refused(prompt: Any, completion: Any) -> None:
    with pytest.raises(ValueError, match="completion"):
        Example(prompt, completion)


def test_files_and_rows_are_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(r) for r in [*ROWS, {"text": "plain"}]))
    found = list(documents_of([path, ROWS[0], "more"]))
    examples = [Example(**row) for row in ROWS]
    assert found == [*((e, True) for e in examples), ("plain", True), (examples[0], True),
                     ("more", True)]  # fmt: skip


def test_learning_examples_is_a_step_on_their_loss(tokenizer: Any) -> None:
    """A batch of one level with plain SGD, against autograd."""
    model = tiny_model()
    handle_model = nl.adapt(model, [nl.Level(period=1)], method="placement")
    learner = nl.Learner(
        handle_model, tokenizer, lr=0.1, optimizer=torch.optim.SGD, clip=1e9, repeats=1
    )
    targets = nl.adaptation.adaptation_of(model).targets
    (batch,) = batches([Example(**row) for row in ROWS], tokenizer, 8)
    grads = torch.autograd.grad(completion_loss(model, batch), [t.weight for t in targets.values()])
    done = learner.learn(ROWS)
    assert done.documents == 3 and done.tokens == batch.tokens
    for target, g in zip(targets.values(), grads, strict=True):
        # Levels average over the tokens of their period; a segment counts by its tokens.
        moved = target.weight.detach() - target.base
        torch.testing.assert_close(moved, -0.1 * batch.tokens * g, atol=1e-5, rtol=1e-3)


def test_learning_examples_teaches_them(tokenizer: Any) -> None:
    model = nl.adapt(tiny_model(), [nl.Level(period=8), nl.Level(period=64)], rank=32, slots=64)
    learner = nl.Learner(model, tokenizer, lr=0.5, repeats=10, batch=2)
    before = learner.evaluate(ROWS)
    learner.learn([ROWS[0], "a text between", *ROWS[1:]])
    after = learner.evaluate(ROWS)
    assert after["tokens"] == before["tokens"] and after["loss"] < 0.7 * before["loss"]
