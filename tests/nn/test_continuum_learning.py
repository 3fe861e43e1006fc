"""ContinuumMemory: outer levels and their optimizer, ends of contexts, online learning."""

from __future__ import annotations

import functools

import pytest
import torch

from nestlearn.levels import Level
from nestlearn.nn.continuum import ContinuumMemory
from nestlearn.optim.multirate import MultiRate

D, H = 8, 24
LEVELS = {
    "sequential": [Level(1), Level(4), Level(6)],
    "nested": [Level(2), Level(4), Level(12)],
    "independent": [Level(1), Level(4), Level(6)],
}


def make(kind="sequential", error="context", dtype=torch.float64, **settings) -> ContinuumMemory:
    levels = settings.pop("levels", LEVELS[kind])
    return ContinuumMemory(D, H, levels, kind=kind, error=error, **settings).to(dtype)


def assert_states_equal(a, b, tolerance=1e-11):
    first, second = a.flatten(), b.flatten()
    assert first.keys() == second.keys()
    for key, value in first.items():
        torch.testing.assert_close(value, second[key], rtol=tolerance, atol=tolerance, msg=key)


# -- outer levels and their optimizer -----------------------------------------------------------


def test_parameter_groups_fire_on_each_levels_clock():
    layer = ContinuumMemory(
        D, H, [Level(1, "fast"), Level(3, "slow", lr_scale=0.5)], kind="independent"
    )
    groups = layer.parameter_groups(0.1)
    assert [(g["level"], g["period"], g["lr"]) for g in groups] == [
        ("fast", 1, 0.1), ("slow", 3, 0.05), ("rest", 1, 0.1),
    ]  # fmt: skip
    optimizer = MultiRate(groups, inner=functools.partial(torch.optim.SGD, lr=0.1))
    for step in range(1, 7):
        before = [block.up.weight.clone() for block in layer.chain]
        layer(torch.randn(2, 3, D))[0].square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        moved = [not torch.equal(b, c.up.weight) for b, c in zip(before, layer.chain, strict=True)]
        assert moved == [True, step % 3 == 0]


def test_in_context_levels_belong_to_the_slowest_level():
    layer = ContinuumMemory(D, H, [Level(4, "fast", error="context"), Level(8, "slow")])
    assert list(layer.level_parameters()) == ["slow"]
    groups = layer.parameter_groups(0.1)
    assert [(g["level"], g["period"]) for g in groups] == [("slow", 8), ("rest", 1)]
    count = sum(p.numel() for g in groups for p in g["params"])
    assert count == sum(p.numel() for p in layer.parameters())
    _, state = layer(torch.randn(2, 9, D))
    assert state.levels[0] is not None and state.levels[1] is None


# -- ends of contexts ---------------------------------------------------------------------------


@pytest.mark.parametrize("length", [8, 11, 2])
def test_fates(length):
    x = torch.randn(2, length, D, dtype=torch.float64)
    ends, layers = {}, {}
    for fate in ("discard", "keep", "consolidate"):
        torch.manual_seed(1)
        layer = make(levels=[Level(4, fate=fate, eta=1.0)])
        base = layer.chain[0].up.weight.clone()
        _, state = layer(x)
        ends[fate] = layer.end_context(state)
        layers[fate] = (layer, base)
        assert ends[fate].position == (0, 0)
        assert (ends[fate].levels[0].pending == 0).all()
    assert ends["discard"].levels[0].up.abs().max() == 0
    kept = ends["keep"].levels[0].up
    assert kept.abs().max() > 0  # also what an open chunk held
    if length % 4:
        assert not torch.equal(kept, layers["keep"][0](x)[1].levels[0].up)
    else:
        torch.testing.assert_close(kept, layers["keep"][0](x)[1].levels[0].up)
    for fate in ("discard", "keep"):
        assert torch.equal(layers[fate][0].chain[0].up.weight, layers[fate][1])
    layer, base = layers["consolidate"]
    torch.testing.assert_close(layer.chain[0].up.weight.data, base + kept.mean(0))
    assert ends["consolidate"].levels[0].up.abs().max() == 0


def test_end_of_context_of_rows_out_of_step():
    layer = make(levels=[Level(4, fate="keep")])
    x = torch.randn(2, 7, D, dtype=torch.float64)
    mask = torch.tensor([[True] * 7, [True] * 5 + [False] * 2])
    end = layer.end_context(layer(x, None, mask)[1])
    alone = layer.end_context(layer(x[1:, :5])[1])
    assert_states_equal(end.index([1]), alone)


def test_nested_keeps_the_initial_state():
    layer = make("nested", levels=[Level(2, fate="keep", eta=1.0), Level(4, meta_rate=0.5)])
    _, state = layer(torch.randn(1, 8, D, dtype=torch.float64))
    fast = state.levels[0]
    assert torch.equal(fast.up, fast.start[0]) and fast.up.abs().max() > 0  # restarted at 8
    assert torch.equal(layer.end_context(state).levels[0].up, fast.start[0])


# -- online -------------------------------------------------------------------------------------


def online(**settings) -> ContinuumMemory:
    return make(error="online", levels=[Level(4), Level(8)], **settings)


def test_online_splits_rows_and_padding():
    layer = online()
    x, g = torch.randn(2, 2, 8, D, dtype=torch.float64)
    whole = layer.learn(x[:, 4:], g[:, 4:], layer.learn(x[:, :4], g[:, :4]))
    state = None
    for a, b in [(0, 1), (1, 3), (3, 4), (4, 7), (7, 8)]:
        state = layer.learn(x[:, a:b], g[:, a:b], state)
    assert_states_equal(state, whole)
    assert whole.levels[1].up.abs().max() > 0
    mask = torch.tensor([[True] * 4, [False] * 2 + [True] * 2])
    ragged = layer.learn(x[:, :4], g[:, :4], None, mask)
    assert ragged.position == (4, 2)
    assert_states_equal(ragged.index([1]), layer.learn(x[1:, 2:4], g[1:, 2:4]))
    y, same = layer(x, ragged)
    assert same is ragged and y.shape == x.shape


def test_online_segments_end_where_a_level_is_due():
    layer = online()
    x = torch.randn(1, 6, D, dtype=torch.float64)
    assert layer.cut(3, 13) == [(3, 4), (4, 8), (8, 12), (12, 13)]
    with pytest.raises(ValueError, match="due at token 4, inside the segment 1..6"):
        layer.learn(x, x)
    with pytest.raises(ValueError, match="online"):
        make().learn(x, x)
    with pytest.raises(ValueError, match="gradient"):
        layer.learn(x, x[:, :3])


def test_online_state_survives_the_end_and_frozen_states_do_not_learn():
    layer = make(error="online", levels=[Level(4, fate="keep")])
    x, g = torch.randn(2, 1, 3, D, dtype=torch.float64)
    state = layer.learn(x, g)
    assert state.levels[0].up.abs().max() == 0
    assert layer.end_context(state).levels[0].up.abs().max() > 0
    assert layer.learn(x, g, state.freeze()).position == (3,)
