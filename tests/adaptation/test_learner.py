"""The learner against plain training loops."""

from __future__ import annotations

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
from tests.adaptation.conftest import OTHER, TEXT, learner_of, logits, tiny_model


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
