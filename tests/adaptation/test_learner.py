"""The learner against plain training loops, and what a user expects of a stream."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import nestlearn as nl
from nestlearn.adaptation import adaptation_of
from nestlearn.adaptation.operations import diff
from nestlearn.adaptation.reader import segments
from tests.adaptation.conftest import tiny_model

TEXT = "Irma Quell built the lighthouse of Ostrava Bay in 1893, and kept its lamp for forty years."
OTHER = "The harbour master of Lund sold his boat to a painter from the north. " * 3


def learner_of(tokenizer: Any, model: Any = None, levels: Any = None, **settings: Any) -> Any:
    model = tiny_model() if model is None else model
    chosen = [nl.Level(period=8), nl.Level(period=32)] if levels is None else levels
    names = ("method", "rank", "frozen", "slots", "memories")
    options = {k: settings.pop(k) for k in names if k in settings}
    nl.adapt(model, chosen, **{"rank": 16, "slots": 64, **options})
    return nl.Learner(model, tokenizer, **{"lr": 0.1, "repeats": 1, **settings})


def logits(learner: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return learner.model(ids).logits


@pytest.mark.parametrize("method", ["added", "placement"])
def test_it_learns_what_it_reads(tokenizer: Any, method: str) -> None:
    learner = learner_of(tokenizer, method=method, slots=256, lr=1.0 if method == "added" else 0.01)
    before, other = learner.evaluate(TEXT)["loss"], learner.evaluate(OTHER)["loss"]
    done = [learner.learn(TEXT) for _ in range(4)]
    assert learner.evaluate(TEXT)["loss"] < 0.7 * before
    assert done[-1].loss < done[0].loss
    # What was not read moves less.
    assert abs(learner.evaluate(OTHER)["loss"] - other) < before - learner.evaluate(TEXT)["loss"]
    tokens = len(tokenizer(TEXT).input_ids)  # the beginning is a token more, and is not predicted
    assert done[0].tokens == tokens and done[0].documents == 1
    assert done[0].updates == {"every 8": tokens // 8, "every 32": tokens // 32}
    assert learner.memory.counts["tokens"] == 4 * tokens


def test_one_level_is_a_plain_training_loop(tokenizer: Any) -> None:
    """An independent loop: AdamW on the MLPs of the upper half, a step per 8 tokens."""
    model = tiny_model()
    learner = learner_of(
        tokenizer, model, [nl.Level(period=8)], method="placement", frozen=0.5, clip=1e9,
        optimizer=partial(torch.optim.AdamW, weight_decay=0.0), lr=0.01,
    )  # fmt: skip
    learner.learn(TEXT)

    reference = tiny_model().requires_grad_(False)
    values = {n: reference.get_submodule(n).weight for n in adaptation_of(model).targets}
    start_values = {n: v.clone() for n, v in values.items()}
    for value in values.values():
        value.requires_grad_()
    optimizer = torch.optim.AdamW(values.values(), lr=0.01, weight_decay=0.0)
    for start, stop, loss in segment_losses(reference):
        if stop - start == 8:  # a level is updated when its period is full
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for name, value in values.items():
        learned = learner.memory.changes["every 8"][name]
        torch.testing.assert_close(learned, (value - start_values[name]).detach(), atol=1e-5,
                                   rtol=1e-3)  # fmt: skip


def segment_losses(model: Any, text: str = TEXT) -> Any:
    """(start, stop, loss) of a text read eight tokens at a time, what came before in the cache."""
    ids = torch.tensor([[256, *text.encode()]])
    cache: Any = None
    for start in range(0, ids.shape[1] - 1, 8):
        stop = min(start + 8, ids.shape[1] - 1)
        out = model(ids[:, start:stop], past_key_values=cache, use_cache=True)
        yield start, stop, F.cross_entropy(out.logits[0], ids[0, start + 1 : stop + 1])
        cache = out.past_key_values
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys.detach(), layer.values.detach()


def test_gradients_of_values_are_autograds(tokenizer: Any) -> None:
    """What a memory's errors give is the derivative of the loss by its values."""
    learner = learner_of(tokenizer, None, [nl.Level(period=8)], memories=2, frozen=0.5, clip=1e9,
                         optimizer=partial(torch.optim.SGD), lr=1.0)  # fmt: skip
    learner.learn(TEXT[:88])  # whole periods
    handle = adaptation_of(learner.model)
    before = {n: t.clone() for n, t in learner.memory.changes["every 8"].items()}
    text = TEXT[:8]  # the same keys again: nothing new is written
    ids = torch.tensor([[256, *text.encode()]])
    learner.model.zero_grad()
    F.cross_entropy(learner.model(ids[:, :-1]).logits[0], ids[0, 1:]).backward()
    expected = {n: handle.targets[n].weight.grad.clone() for n in before}
    keys = {n: t.clone() for n, t in learner.memory.changes["keys"].items()}
    learner.learn(text)
    assert all(torch.equal(keys[n], t) for n, t in learner.memory.changes["keys"].items())
    for name, old in before.items():
        moved = learner.memory.changes["every 8"][name] - old
        assert expected[name].any()
        torch.testing.assert_close(moved, -expected[name], atol=1e-6, rtol=1e-4)


def test_keys_are_written_where_there_is_something_to_learn(tokenizer: Any) -> None:
    from nestlearn.adaptation.added import Seen
    from nestlearn.adaptation.writing import _new_keys

    key = F.normalize(torch.randn(6, 5, generator=torch.Generator().manual_seed(0)), dim=-1)
    key[4] = key[1]  # two places alike
    error = torch.tensor([0.0, 3.0, 0.1, 2.0, 1.5, 1.0])[:, None] * torch.ones(6, 2)
    none = torch.zeros(8, 5)
    seen = Seen(key, 2.0, torch.zeros(()))
    # Squared errors 9, 4, 2.25, 1 of 16.26: 98% needs all four; the third is like the first.
    new = _new_keys(seen, error, none, 8)
    torch.testing.assert_close(F.normalize(new, dim=-1), key[[1, 3, 5]], atol=0.02, rtol=0)
    torch.testing.assert_close(new.norm(dim=-1), torch.full((3,), 2.0), atol=0.05, rtol=0)
    known = none.clone()
    known[5] = key[3] * 7
    assert len(_new_keys(seen, error, known, 8)) == 2
    assert len(_new_keys(seen, 0 * error, none, 8)) == 0
    assert len(_new_keys(seen, error, none[:0], 2)) == 2


@pytest.mark.parametrize("optimizer", ["rowadam", "adamw"])
def test_room_grows_without_a_trace(
    tokenizer: Any, ids: Tensor, optimizer: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Starting with room for 4 slots or for all 2,000 gives the same bits, across a file too."""
    from nestlearn.adaptation import level_weights

    found = []
    for fewest in (4, 2000):
        monkeypatch.setattr(level_weights, "FEWEST", fewest)
        learner = learner_of(tokenizer, slots=2000, optimizer=optimizer)
        learner.learn(TEXT[:36])  # in the middle of the slow level's period
        learner.save(tmp_path / "m.nlmem")
        learner.load(tmp_path / "m.nlmem")
        learner.learn([TEXT[36:], OTHER[:50]])
        rows = learner._weights.rows
        assert all(n > 4 and (fewest == 2000) == (n == 2000) for n in rows.values())
        after = logits(learner, ids)
        state = {k: v for own in learner.memory.optimizer["state"].values() for k, v in own.items()}
        learner.undo()
        found.append((after, learner.memory, logits(learner, ids), state))
    (first, a, back, s), (second, b, whole, t) = found
    assert torch.equal(first, second) and torch.equal(back, whole)
    assert all(row.distance == 0 < row.first for row in diff(a, b)[:1])
    for key, value in ((k, v) for k, v in s.items() if v.ndim):
        assert torch.equal(value, t[key][: len(value)]) and not t[key][len(value) :].any()


def test_a_level_that_is_frozen_later_keeps_its_share(tokenizer: Any, ids: Tensor) -> None:
    learner = learner_of(tokenizer)
    learner.learn(TEXT)
    held = learner.memory.copy()
    held.optimizer = None
    other = learner_of(tokenizer, None, [nl.Level(period=8, lr_scale=0.0),
                                         nl.Level(period=32, eta=0.0)])  # fmt: skip
    other.use(held)
    before = logits(other, ids)
    assert any(t.any() for t in held.changes["every 32"].values())
    other.learn(TEXT)  # nothing may move but by keys of which none is new
    total = {n: other.memory.total(n) for n in held.changes["every 32"]}
    for name, value in total.items():
        weight = adaptation_of(other.model).targets[name].weight
        torch.testing.assert_close(weight[: len(value)].detach(), value)
    assert before.isfinite().all()


def test_full_memories_give_up_their_weakest(tokenizer: Any) -> None:
    learner = learner_of(tokenizer, slots=12, lr=1.0)
    learner.learn(TEXT)
    (name,) = (n for n in learner.memory.changes["keys"])
    keys = learner.memory.changes["keys"][name].clone()
    strength = learner.memory.total(name.removesuffix(".keys")).norm(dim=-1) * keys.norm(dim=-1)
    assert keys.any(-1).all()
    learner.learn("Zq")  # two places at most
    changed = (learner.memory.changes["keys"][name] != keys).any(-1)
    assert 1 <= changed.sum() <= 2
    assert strength[changed].max() <= strength[~changed].min()
    learner.undo()
    assert torch.equal(learner.memory.changes["keys"][name], keys)


def test_slow_levels_average_their_period(tokenizer: Any) -> None:
    """With SGD and one update, a level of period 32 moves by the mean of four segments' gradients,
    each weighted by its tokens."""
    learner = learner_of(
        tokenizer, None, [nl.Level(period=8, lr_scale=0.0), nl.Level(period=32)],
        method="placement", optimizer=partial(torch.optim.SGD), lr=0.5, clip=1e9,
    )  # fmt: skip
    reference = tiny_model().requires_grad_(False)
    own = {n: t for n, t in adaptation_of(learner.model).targets.items() if "every 32" in t.levels}
    weights = [reference.get_submodule(n).weight.requires_grad_() for n in own]
    grads = [
        torch.autograd.grad(loss, weights) for _, _, loss in segment_losses(reference, TEXT[:32])
    ]
    learner.learn(TEXT[:32])
    for i, name in enumerate(own):
        moved = learner.memory.changes["every 32"][name]
        expected = -0.5 * sum(g[i] for g in grads) / 4
        torch.testing.assert_close(moved, expected, atol=1e-6, rtol=1e-4)
    assert not any(t.any() for t in learner.memory.changes["every 8"].values())


def test_consolidation_moves_without_changing_the_model(tokenizer: Any, ids: Tensor) -> None:
    share = 0.25
    levels = [nl.Level(period=8), nl.Level(period=32, meta_rate=share, lr_scale=0.0)]
    learner = learner_of(tokenizer, None, levels)
    still = learner_of(tokenizer, None, [nl.Level(period=8), nl.Level(period=32, meta_rate=0.0,
                                                                     lr_scale=0.0)])  # fmt: skip
    text = TEXT[:64]  # two periods of the slow level
    learner.learn(text)
    still.learn(text)
    moved, alone = learner.memory.changes, still.memory.changes
    for name, whole in alone["every 8"].items():
        assert moved["every 32"][name].any() and not alone["every 32"][name].any()
        torch.testing.assert_close(moved["every 8"][name] + moved["every 32"][name], whole)
    torch.testing.assert_close(logits(learner, ids), logits(still, ids))


def test_retention_halves_within_the_half_life(tokenizer: Any) -> None:
    kept = learner_of(tokenizer, None, [nl.Level(period=8, half_life=16.0)])
    kept.learn(TEXT[:32])
    before = {n: t.clone() for n, t in kept.memory.changes["every 8"].items()}
    kept._factory = partial(torch.optim.SGD, lr=0.0)
    kept.lr = 0.0
    memory = kept.memory.copy()
    memory.optimizer = None
    kept.use(memory)
    kept.learn(TEXT[:16])  # two updates with learning rate 0: one half-life
    for name, tensor in kept.memory.changes["every 8"].items():
        torch.testing.assert_close(tensor, before[name] / 2)


def test_learning_rate_zero_keeps_every_bit(tokenizer: Any, ids: Tensor) -> None:
    for settings in ({"lr": 0.0}, {"levels": [nl.Level(period=8, lr_scale=0.0)]}):
        learner = learner_of(tokenizer, **settings)
        before = tiny_model()(ids).logits
        learner.learn(TEXT)
        assert torch.equal(logits(learner, ids), before)


def test_frozen_levels_keep_still(tokenizer: Any) -> None:
    levels = [nl.Level(period=8), nl.Level(period=16, eta=0.0, name="still")]
    learner = learner_of(tokenizer, None, levels)
    learner.learn(TEXT)
    assert not learner.memory.changes["still"]
    learner.freeze()
    with pytest.raises(ValueError, match="frozen; learner.freeze"):
        learner.learn(TEXT)
    learner.freeze(False)
    learner.learn(TEXT)


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
