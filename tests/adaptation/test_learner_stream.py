"""What a user expects of a learner: streams, bad documents, interruptions, snapshots."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import nestlearn as nl
from nestlearn.adaptation import adaptation_of, reader
from nestlearn.adaptation.documents import sentences_of
from nestlearn.adaptation.reader import Reader, segments, with_sentences
from tests.adaptation.conftest import OTHER, TEXT, learner_of, logits, tiny_model


def test_clocks_go_on_across_documents_and_calls(tokenizer: Any) -> None:
    split, whole = learner_of(tokenizer), learner_of(tokenizer)
    texts = [TEXT, OTHER, "ab", TEXT[:40]]
    whole.learn(texts)
    for text in texts:
        split.learn(text)
    for name in ("every 8", "every 32"):
        for target, tensor in whole.memory.changes[name].items():
            assert torch.equal(split.memory.changes[name][target], tensor)
    clocks = split.memory.optimizer["clocks"]
    assert clocks["every 8"][0] == split.memory.counts["tokens"]


def test_documents_do_not_see_each_other(tokenizer: Any) -> None:
    learner = learner_of(tokenizer, lr=0.0)
    alone = learner.learn(TEXT).loss
    both = learner.learn([OTHER, TEXT])
    other = learner.learn(OTHER)
    weights = other.tokens * other.loss + (both.tokens - other.tokens) * alone
    assert both.loss == pytest.approx(weights / both.tokens, rel=1e-5)


def test_segments_predict_every_token_once() -> None:
    def pieces() -> Any:
        yield [1, 2, 3], True, False
        yield [4, 5, 6, 7, 8], False, False
        yield [9], False, True
        yield [10], True, True
        yield [11, 12], True, True

    found = [(s.ids, bool(s.begun)) for s in segments(pieces(), 4)]
    assert found == [
        ([1, 2, 3, 4, 5], True), ([5, 6, 7, 8, 9], False), ([10], True), ([11, 12], True),
    ]  # fmt: skip


def test_sentences_are_read_again_on_their_own(tokenizer: Any, monkeypatch: Any) -> None:
    """But for the lead the same as reading the document and then its sentences, counted once."""
    monkeypatch.setattr(reader, "LEAD", 0)
    first = "The lighthouse of Ostrava Bay has a red lamp."
    second = "It was built by Irma Quell in 1893."
    text = f"{first} {second}"
    assert sentences_of(text) == [first, second] and sentences_of(first) == []
    learner, by_hand, plain = (
        learner_of(tokenizer, sentences=True), learner_of(tokenizer), learner_of(tokenizer)
    )  # fmt: skip
    done, once = learner.learn([text, first]), plain.learn([text, first])
    by_hand.learn([text, first, second, first])
    for name in ("every 8", "every 32"):
        for target, tensor in by_hand.memory.changes[name].items():
            assert torch.equal(learner.memory.changes[name][target], tensor)
    assert (done.documents, done.tokens) == (2, once.tokens) == (2, len(text) + len(first))
    assert learner.memory.counts == plain.memory.counts
    assert sum(done.updates.values()) > sum(once.updates.values())
    # Evaluation reads a text once.
    assert learner.evaluate(text)["tokens"] == len(text)


def test_a_document_in_pieces_is_counted_once_with_its_sentences(tokenizer: Any) -> None:
    pieces = [("A sentence that is long enough. Another one that is, too.", False), ("end", True)]
    found = list(with_sentences(pieces, tokenizer, 1000))
    assert [(s.begun, s.fresh, s.again) for s in found] == [
        (1, True, False), (0, True, True), (0, True, True), (0, True, False),
    ]  # fmt: skip
    assert [bytes(s.ids[1:]).decode() for s in found[1:]] == [
        "A sentence that is long enough.", "Another one that is, too.", "end",
    ]  # fmt: skip


def test_how_a_lone_sentence_begins_is_not_learned(tokenizer: Any) -> None:
    text = "A sentence that is long enough. Another one that is, too."
    found = list(with_sentences([(text, True)], tokenizer, 16))
    assert [s.lead for s in found if s.fresh] == [0, reader.LEAD, reader.LEAD]
    again = [s for s in found if s.again]
    assert sum(s.tokens for s in again) == len(text) - 1 - 2 * reader.LEAD
    model = tiny_model()
    row = again[0].row(torch.device("cpu"))
    loss, _ = Reader(model, 64).loss(row, again[0].lead)
    chances = model(row[:, :-1]).logits[0].log_softmax(-1)
    right = chances[torch.arange(16), row[0, 1:]]
    assert loss.item() == pytest.approx(-right[reader.LEAD :].mean().item(), rel=1e-5)
    states, tokens = again[0].pick([torch.arange(16.0)[None, :, None]])
    assert states[0][:, 0].tolist() == list(range(5, 16)) and torch.equal(tokens, row[0, 6:])


def test_sentences_of_texts_of_many_kinds() -> None:
    quoted = 'He said "it is over now, my dear friend." Then he left the building for ever.'
    assert sentences_of(quoted) == [quoted[:41], quoted[42:]]
    assert sentences_of("A title\nThe U.S. economy, e.g. cars, is large and is growing.") == [
        "The U.S. economy, e.g. cars, is large and is growing."
    ]
    assert sentences_of(
        "短い。" + "とても長い文なのでそれだけで読まれることになりますよ。" * 2
    ) == [
        "短い。とても長い文なのでそれだけで読まれることになりますよ。",
        "とても長い文なのでそれだけで読まれることになりますよ。",
    ]
    for nothing in ("", " " * 70_000, ". " * 30_000, "one sentence that is all there is"):
        assert len(sentences_of(nothing)) == (2_307 if nothing.startswith(".") else 0)


def test_long_documents_slide_through_the_context(tokenizer: Any) -> None:
    learner = learner_of(tokenizer, context=32)
    done = learner.learn("x y z " * 400)
    assert done.tokens == 2400 and math.isfinite(done.loss)
    assert done.loss < 3  # it repeats, and is learned
    with pytest.raises(ValueError, match="context is 300, but the model reads at most 256"):
        nl.Learner(learner.model, tokenizer, context=300)
    with pytest.raises(ValueError, match="period is 8 tokens, more than the context of 4"):
        nl.Learner(learner.model, tokenizer, context=4)


def test_what_is_read_does_not_depend_on_segments(tokenizer: Any) -> None:
    """With learning rate 0, reading in segments is one forward pass."""
    learner = learner_of(tokenizer, lr=0.0)
    ids = torch.tensor([[256, *TEXT.encode()]])
    whole = F.cross_entropy(logits(learner, ids)[0, :-1], ids[0, 1:]).item()
    assert learner.learn(TEXT).loss == pytest.approx(whole, rel=1e-5)
    assert learner.evaluate(TEXT)["loss"] == pytest.approx(whole, rel=1e-5)


def test_a_segment_that_is_not_finite_changes_nothing(tokenizer: Any, ids: Tensor) -> None:
    learner = learner_of(tokenizer)
    learner.learn(TEXT)
    before = logits(learner, ids)
    norm = learner.model.model.norm.weight
    kept = norm.detach().clone()
    with torch.no_grad():
        norm.fill_(math.nan)
    with pytest.warns(RuntimeWarning, match="segments were left out"):
        done = learner.learn(OTHER)
    assert done.skipped and not done.tokens
    with torch.no_grad():
        norm.copy_(kept)
    assert torch.equal(logits(learner, ids), before)
    assert learner.learn(OTHER).skipped == 0


@pytest.mark.parametrize(
    ("documents", "error", "message"),
    [
        ("", ValueError, "nothing to learn"),
        ([], ValueError, "nothing to learn"),
        (["  \n"], ValueError, "nothing to learn"),
        (b"bytes", TypeError, "got bytes: decode"),
        (5, TypeError, "got int"),
        ([{"body": "x"}], ValueError, "no column 'text'; there are: body"),
    ],
)
def test_bad_documents(tokenizer: Any, documents: Any, error: Any, message: str) -> None:
    learner = learner_of(tokenizer)
    with pytest.raises(error, match=message):
        learner.learn(documents)
    assert learner.memory.is_empty and not learner.memory.snapshots


def test_many_kinds_of_documents(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "b.jsonl").write_text('{"text": "hello there"}\n{"text": "grüß dich — 你好"}\n')
    (tmp_path / "c.bin").write_bytes(b"\0\1\2")
    learner = learner_of(tokenizer)
    with pytest.warns(UserWarning, match="left out 1 binary"):
        assert learner.learn(tmp_path).documents == 3
    assert learner.learn([TEXT, {"text": OTHER}, tmp_path / "a.txt"]).documents == 3
    assert learner.learn(f"{i} and more" for i in range(3)).documents == 3
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"text": [TEXT, OTHER]})
    assert learner.learn(rows).documents == 2
    with pytest.raises(ValueError, match="binary"):
        learner.learn(tmp_path / "c.bin")
    with pytest.raises(ValueError, match="no such file"):
        learner.learn(tmp_path / "none.txt")


def test_one_line_of_megabytes_is_read_in_pieces(tokenizer: Any) -> None:
    from nestlearn.adaptation.documents import PIECE, documents_of

    line = "word " * 300_000 + "x" * 200_000
    pieces = list(documents_of(line))
    assert "".join(p for p, _ in pieces) == line
    assert max(len(p) for p, _ in pieces) <= PIECE
    assert [ends for _, ends in pieces] == [False] * (len(pieces) - 1) + [True]


def test_undo_reset_and_snapshots(tokenizer: Any, ids: Tensor) -> None:
    learner = learner_of(tokenizer, snapshots=2)
    base = logits(learner, ids)
    states = [base]
    for i in range(3):
        learner.learn(TEXT[i * 20 :], label=f"before {i}")
        states.append(logits(learner, ids))
    assert [s.label for s in learner.memory.snapshots] == ["before 1", "before 2"]
    assert learner.undo() == "before 2"
    assert torch.equal(logits(learner, ids), states[2])
    assert learner.undo() == "before 1"
    assert torch.equal(logits(learner, ids), states[1])
    with pytest.raises(ValueError, match="cannot roll back 1 snapshot: the memory holds 0"):
        learner.undo()
    learner.reset()
    assert torch.equal(logits(learner, ids), base) and learner.memory.is_empty
    assert learner.memory.counts == {}


def test_stop_keeps_what_was_learned(tokenizer: Any) -> None:
    learner = learner_of(tokenizer)
    seen: list[int] = []
    done = learner.learn(
        [TEXT, OTHER], progress=lambda d: seen.append(d.tokens), stop=lambda: len(seen) >= 3
    )
    assert done.stopped and done.tokens == 24 == seen[-1]
    assert not learner.memory.is_empty and len(learner.memory.snapshots) == 1


def test_an_error_midway_keeps_what_was_learned(tokenizer: Any) -> None:
    def documents() -> Any:
        yield TEXT
        raise OSError("the disk is gone")

    learner = learner_of(tokenizer)
    with pytest.raises(OSError, match="disk is gone"):
        learner.learn(documents())
    assert learner.memory.counts["documents"] == 1 and not learner.memory.is_empty
    learner.undo()
    assert learner.memory.is_empty


def test_repeats_and_optimizers_per_level(tokenizer: Any) -> None:
    once, often = learner_of(tokenizer), learner_of(tokenizer, repeats=3)
    first = once.learn(TEXT)
    second = often.learn(TEXT)
    assert second.tokens == first.tokens
    assert second.updates["every 8"] == pytest.approx(3 * first.updates["every 8"], abs=2)
    assert often.evaluate(TEXT)["loss"] < once.evaluate(TEXT)["loss"]
    mixed = learner_of(tokenizer, optimizer={"every 8": "sgd", "*": torch.optim.Adagrad})
    mixed.learn(TEXT)
    assert mixed.memory.optimizer["names"] == {"every 8": "SGD", "every 32": "Adagrad"}


def test_wrong_settings(tokenizer: Any) -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match="not adapted"):
        nl.Learner(model, tokenizer)
    nl.adapt(model, rank=2)
    for settings, message in (
        ({"lr": -1.0}, "lr must be 0 or more"),
        ({"clip": math.nan}, "clip must be 0 or more"),
        ({"repeats": 0}, "repeats must be 1 or more"),
        ({"optimizer": "adamm"}, "optimizer must be rowadam, adamw, sgd or a factory"),
        ({"optimizer": 3}, "optimizer must be a name or a factory"),
    ):
        with pytest.raises(ValueError, match=message):
            nl.Learner(model, tokenizer, **settings)


def test_learning_leaves_the_mode_and_the_base_weights(tokenizer: Any) -> None:
    model = tiny_model().train()
    base = {n: p.detach().clone() for n, p in model.named_parameters()}
    learner = learner_of(tokenizer, model)
    learner.learn(TEXT)
    assert model.training
    for name, parameter in model.named_parameters():
        if name in base:
            assert torch.equal(parameter, base[name]) and parameter.grad is None


def test_general_text_is_kept_per_base_model(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from nestlearn.adaptation import calibration

    monkeypatch.setattr(calibration, "SMALLEST", 0)
    monkeypatch.setenv("NESTLEARN_CACHE", str(tmp_path))

    def made(seed: int = 0) -> dict[str, Tensor]:
        return adaptation_of(nl.adapt(tiny_model(seed=seed), rank=4)).fixed

    first, other = made(), made(seed=1)
    files = sorted((tmp_path / "calibration").iterdir())
    assert len(files) == 2
    with monkeypatch.context() as patch:
        patch.setattr(calibration, "generate_text", None)  # not called again
        assert all(torch.equal(p, first[n]) for n, p in made().items())
    assert not torch.equal(*(next(iter(m.values())) for m in (first, other)))
    for file in files:
        file.write_bytes(file.read_bytes()[:100])
    assert all(torch.equal(p, first[n]) for n, p in made().items())  # cut off: made again
    monkeypatch.setenv("NESTLEARN_CACHE", str(files[0]))  # no folder can be made there
    assert all(torch.equal(p, first[n]) for n, p in made().items())


def test_counts_are_right_at_every_moment(tokenizer: Any) -> None:
    """A save in the middle of learning says how much was read until then."""
    learner = learner_of(tokenizer)
    seen: list[tuple[int, int]] = []

    def progress(done: Any) -> None:
        counts = learner.memory.counts
        seen.append((counts["tokens"] - done.tokens, counts["documents"] - done.documents))

    learner.learn("one two three four five six " * 20, progress=progress)
    assert len(seen) > 1 and set(seen) == {(0, 0)}


def test_modes_of_modules_survive_reading(tokenizer: Any) -> None:
    model = tiny_model()
    part = model.train().get_input_embeddings()
    part.eval()
    learner_of(tokenizer, model).learn("some words to read")
    assert model.training and not part.training
