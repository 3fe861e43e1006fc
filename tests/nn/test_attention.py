"""CausalSelfAttention beyond the common battery: the equation, the rotation, the window."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

from nestlearn.nn.attention import AttentionState, CausalSelfAttention

D = torch.float64


def by_hand(layer: CausalSelfAttention, x: torch.Tensor) -> torch.Tensor:
    """One query at a time, straight from the formula, for one row."""
    length, heads, size = x.shape[0], layer.heads, layer.head_dim
    q, k, v = (layer.qkv.weight @ x.T).T.view(length, 3, heads, size).unbind(1)

    def rotate(vector, position):
        out = vector.clone()
        for i in range(size // 2):
            angle = position * layer.rope_theta ** (-2 * i / size)
            a, b = vector[:, i], vector[:, i + size // 2]
            out[:, i] = a * math.cos(angle) - b * math.sin(angle)
            out[:, i + size // 2] = a * math.sin(angle) + b * math.cos(angle)
        return out

    rows = []
    for t in range(length):
        first = 0 if layer.window is None else max(0, t - layer.window + 1)
        scores = torch.stack(
            [(rotate(q[t], t) * rotate(k[s], s)).sum(-1) for s in range(first, t + 1)]
        )
        weights = (scores / math.sqrt(size)).softmax(0)
        rows.append((weights[..., None] * v[first : t + 1]).sum(0).flatten())
    return torch.stack(rows) @ layer.out.weight.T


@pytest.mark.parametrize("window", [None, 1, 3])
def test_equals_the_formula(window):
    layer = CausalSelfAttention(8, 2, rope_theta=100.0, window=window).double()
    x = torch.randn(7, 8, dtype=D)
    y, _ = layer(x[None])
    torch.testing.assert_close(y[0], by_hand(layer, x), atol=1e-12, rtol=0)


@pytest.mark.parametrize("window", [1, 4])
def test_a_window_bounds_the_state_and_streams(window):
    layer = CausalSelfAttention(8, 2, window=window).double()
    x = torch.randn(2, 13, 8, dtype=D)
    whole, _ = layer(x)
    pieces, state = [], None
    for part in x.split([1, 6, 2, 4], 1):
        y, state = layer(part, state)
        pieces.append(y)
        assert state.slots <= window - 1
    torch.testing.assert_close(torch.cat(pieces, 1), whole, atol=1e-12, rtol=0)
    assert state.position == (13, 13)


def test_a_window_counts_real_tokens_only():
    layer = CausalSelfAttention(8, 2, window=3).double()
    x = torch.randn(1, 6, 8, dtype=D)
    alone, _ = layer(x)
    first = torch.cat([x[:, :2], torch.randn(1, 2, 8, dtype=D)], 1)
    _, state = layer(first, None, torch.tensor([[True, True, False, False]]))
    second = torch.cat([torch.randn(1, 3, 8, dtype=D), x[:, 2:]], 1)
    mask = torch.tensor([[False] * 3 + [True] * 4])
    y, _ = layer(second, state, mask)
    torch.testing.assert_close(y[:, 3:], alone[:, 2:], atol=1e-12, rtol=0)


def test_rows_of_different_length_share_a_state():
    layer = CausalSelfAttention(8, 2).double()
    states = [layer(torch.randn(1, n, 8, dtype=D))[1] for n in (2, 5)]
    joined = AttentionState.cat(states)
    assert joined.slots == 5 and joined.position == (2, 5)
    assert joined.valid.sum(1).tolist() == [2, 5]
    assert joined.index([0]).slots == 2
    assert torch.equal(joined.index([0]).keys, states[0].keys)


def test_reading_beyond_the_trained_positions_warns_once():
    layer = CausalSelfAttention(8, 2, max_position_embeddings=4)
    with pytest.warns(UserWarning, match="max_position_embeddings"):
        layer(torch.randn(1, 5, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(torch.randn(1, 5, 8))


@pytest.mark.parametrize("sizes", [{"dim": 10, "heads": 4}, {"dim": 6, "heads": 2}])
def test_sizes_that_do_not_fit(sizes):
    with pytest.raises(ValueError, match="even head size"):
        CausalSelfAttention(**sizes)


@pytest.mark.parametrize("wrong", [{"window": 0}, {"rope_theta": 0.0}])
def test_other_wrong_settings(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        CausalSelfAttention(8, 2, **wrong)
