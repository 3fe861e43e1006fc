"""The knowledge task's metrics against computations by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from nestlearn.evals.knowledge import (
    cloze_scores,
    contains,
    greedy,
    load_passages,
    normalise,
    perplexity,
    question_scores,
    token_f1,
)
from tests.adaptation.conftest import tiny_model

ITEMS = [("the first", " a"), ("a longer beginning of a line", " bcd"), ("x", " yz")]


def test_cloze_is_greedy_decoding_one_row_at_a_time(tokenizer: Any) -> None:
    model = tiny_model()
    right, total = 0, 0.0
    items = list(ITEMS)
    # One that is right: what the model itself says.
    for letter in "abcdefghijklmnopqrstuvwxyz":
        first = int(model(torch.tensor([[256, ord(letter)]])).logits[0, -1].argmax())
        if 32 < first < 127:
            items.append((letter, chr(first)))
            break
    for prompt, answer in items:
        ids = [256, *prompt.encode()]
        chances = []
        hit = True
        for byte in answer.encode():
            logits = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            hit &= int(logits.argmax()) == byte
            chances.append(logits[byte].item())
            ids.append(byte)
        right += hit
        total += sum(chances) / len(chances)
    found = cloze_scores(model, tokenizer, items, batch=3)
    assert found["accuracy"] == right / 4 >= 0.25
    assert found["log_prob"] == pytest.approx(total / 4, rel=1e-4)


def test_greedy_in_batches_is_greedy_alone(tokenizer: Any) -> None:
    model = tiny_model()
    prompts = ["a", "something long to begin with", "middle"]
    together = greedy(model, tokenizer, prompts, 5)
    assert together == [greedy(model, tokenizer, [p], 5)[0] for p in prompts]


def test_a_line_is_where_writing_stops(tokenizer: Any) -> None:
    model = tiny_model()
    calls = []

    def counts_down(module: Any, args: Any, inputs: Any, out: Any) -> Any:
        calls.append(1)
        below = inputs["input_ids"][:, -1:] - 1
        return type(out)(
            logits=torch.nn.functional.one_hot(below, out.logits.shape[-1]).float(),
            past_key_values=out.past_key_values,
        )

    model.register_forward_hook(counts_down, with_kwargs=True)
    # The end of a line is byte 10: five, no and two tokens away.
    prompts = ["\x0f", "something long to end with z", "x\x0c"]
    whole = greedy(model, tokenizer, prompts, 8)
    assert whole == ["\x0e\x0d\x0c\x0b\n\x09\x08\x07", "yxwvutsr", "\x0b\n\x09\x08\x07\x06\x05\x04"]
    assert greedy(model, tokenizer, prompts, 8, line=True) == [w.split("\n")[0] for w in whole]
    for prompt, tokens in zip(prompts, (5, 8, 2), strict=True):
        calls.clear()
        greedy(model, tokenizer, [prompt], 8, line=True)
        assert len(calls) == tokens
    calls.clear()
    greedy(model, tokenizer, [prompts[0], prompts[2]], 8, line=True)
    assert len(calls) == 5  # a batch ends with its last line


def test_perplexity(tokenizer: Any) -> None:
    model = tiny_model()
    ids = torch.randint(256, (70,))
    losses = [model(w[None], labels=w[None]).loss.item() for w in ids[:64].view(2, 32)]
    expected = math.exp(sum(losses) / 2)
    assert perplexity(model, ids, length=32, batch=1) == pytest.approx(expected, rel=1e-4)
    with pytest.raises(ValueError, match="fewer than one window"):
        perplexity(model, ids, length=100)


def test_answers_are_compared_as_squad_does() -> None:
    assert normalise("The  Grey-Widow, an Isle!") == "greywidow isle"
    assert contains("It was Irma Quell.", "irma quell") and not contains(
        "Irma Quells", "Irma Quell"
    )
    assert not contains("", "x")
    assert token_f1("the red boat", "a red car") == pytest.approx(0.5)
    assert token_f1("x", "y") == 0


def test_question_scores(tokenizer: Any) -> None:
    model = tiny_model()
    answer = greedy(model, tokenizer, ["Question: who?\nAnswer:"], 24)[0].split("\n")[0]
    found = question_scores(model, tokenizer, [("who?", answer or "x"), ("what?", "zzzz")])
    assert set(found) == {"accuracy", "f1", "log_prob"} and found["log_prob"] < 0
    assert found["accuracy"] == (0.5 if normalise(answer) else 0.0)


def test_the_book_can_be_open_and_questions_asked_in_the_chat_template(tokenizer: Any) -> None:
    model, items = tiny_model(), [("who?", "x"), ("what is it?", "yz")]
    plain = ["P.\n\nQuestion: who?\nAnswer:", "Another.\n\nQuestion: what is it?\nAnswer:"]
    found = question_scores(model, tokenizer, items, passages=["P.", "Another."])
    by_hand = cloze_scores(model, tokenizer, [(plain[0], " x"), (plain[1], " yz")])
    assert found["log_prob"] == pytest.approx(by_hand["log_prob"], rel=1e-5)
    tokenizer.split_special_tokens = False
    tokenizer.chat_template = "{{ bos_token }}<{{ messages[0]['content'] }}>"
    asked = question_scores(model, tokenizer, items, chat=True)
    # The template has the first token, which is not put before it once more.
    turns = [f"<Question: {q}\nAnswer in a few words.>" for q, _ in items]
    by_hand = cloze_scores(model, tokenizer, [(turns[0], "x"), (turns[1], "yz")])
    assert asked["log_prob"] == pytest.approx(by_hand["log_prob"], rel=1e-5)


def test_passages(tmp_path: Path) -> None:
    rows = [
        {
            "title": f"T{i}",
            "context": f"Some words at first. The answer to everything is {i} cats. And more.",
            "questions": [
                {"question": "What?", "answer": f"{i} cats"},
                {"question": "Again?", "answer": f"{i} cats"},
                {"question": "Not there?", "answer": "dogs"},
            ],
        }
        for i in range(5)
    ]
    path = tmp_path / "p.json"
    path.write_text(json.dumps(rows))
    chosen = load_passages(path, 3, seed=1)
    assert chosen == load_passages(path, 3, seed=1) != load_passages(path, 3, seed=2)
    first = chosen[0]
    number = first.title[1:]
    assert first.cloze == (("The answer to everything is", f" {number} cats"),)
    assert first.questions == (("What?", f"{number} cats"),)
    assert first.document.startswith(f"T{number}\nSome words")
    with pytest.raises(ValueError, match="has 5 usable passages, 6 were asked for"):
        load_passages(path, 6)


def test_real_passages(shared_data: Path) -> None:
    chosen = load_passages(shared_data / "squad_knowledge" / "squad_val.json.gz", 50)
    assert len({p.text for p in chosen}) == 50
    for passage in chosen:
        for prompt, answer in passage.cloze:
            assert prompt + answer in passage.text
