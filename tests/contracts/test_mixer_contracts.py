"""One battery for every mixer of the registry (ARCHITECTURE §3): a stream is a stream."""

from __future__ import annotations

import contextlib

import pytest
import torch

from nestlearn.nn import native
from nestlearn.nn.mixers import MIXERS, WINDOWED, build_mixer

DIM = 16
VARIANTS = {
    "self_modifying, all options": {
        "memory_readout": "token",
        "memory_momentum": True,
        "memory_adaptive": ["k", "v", "q", "eta", "alpha"],
        "memory_depth": 3,
    },
    "self_modifying, few options": {
        "memory_objective": "l2",
        "memory_rule": "gd",
        "memory_retention": "zero",
        "memory_weight_decay": False,
        "memory_adaptive": ["v"],
        "memory_depth": 1,
        "memory_chunk": 1,
    },
    "self_modifying, without the CPU kernel": {},
    "self_modifying, counting": {"counters": 3},
    "self_modifying, no projections": {"memory_adaptive": [], "projection_chunk": 1},
    "gated_deltanet, reflecting": {"allow_neg_eigval": True},
    "attention, windowed": {"sliding_window": 6},
    "titans_mag, windowed": {"sliding_window": 4},
    "titans_mal, windowed": {"sliding_window": 4},
}
# Attention costs the square of its length; a rewritten matrix a Python step per token.
HOSTILE_LENGTH = {
    **dict.fromkeys(WINDOWED, 4_096), "srwm": 8_192, "titans_mac": 16_384,
}  # fmt: skip
EVERY = pytest.mark.parametrize("name", [*MIXERS, *VARIANTS])
NAMED = pytest.mark.parametrize("name", list(MIXERS))


@pytest.fixture
def make(name, config_for):
    """Builds the mixer or variant ``name``, with further settings."""

    def build(**settings):
        mixer = name.partition(",")[0]
        config = config_for(mixer, **{**VARIANTS.get(name, {}), **settings})
        return build_mixer(mixer, config)

    with native.disabled() if "without the CPU kernel" in name else contextlib.nullcontext():
        yield build


@pytest.fixture
def layer(make):
    return make().double().eval()


def read(layer, x, cuts, state=None):
    """Outputs and final state of reading ``x`` in the pieces that ``cuts`` make."""
    outputs = []
    edges = [0, *cuts, x.shape[1]]
    for start, stop in zip(edges, edges[1:], strict=False):
        y, state = layer(x[:, start:stop], state)
        outputs.append(y)
    return torch.cat(outputs, 1), state


@EVERY
def test_any_split_gives_the_same(layer, chunk, same_state):
    x = torch.randn(2, 4 * chunk + 3, DIM, dtype=torch.float64)
    whole, state = layer(x)
    for cuts in ([1], [chunk], [chunk + 1], [chunk - 1, 2 * chunk], [2, 3, 11, 12]):
        parts, other = read(layer, x, cuts)
        torch.testing.assert_close(parts, whole, atol=1e-10, rtol=0)
        same_state(state, other, 1e-10)


@EVERY
def test_token_by_token_is_one_pass(layer, chunk, same_state):
    x = torch.randn(2, 3 * chunk + 1, DIM, dtype=torch.float64)
    whole, state = layer(x)
    parts, other = read(layer, x, list(range(1, x.shape[1])))
    torch.testing.assert_close(parts, whole, atol=1e-10, rtol=0)
    same_state(state, other, 1e-10)
    assert state.position == (x.shape[1],) * 2


@EVERY
def test_every_length(layer, chunk):
    x = torch.randn(1, 2 * chunk + 1, DIM, dtype=torch.float64)
    whole, _ = layer(x)
    for length in range(1, x.shape[1] + 1):
        y, state = layer(x[:, :length])
        torch.testing.assert_close(y, whole[:, :length], atol=1e-10, rtol=0)
        assert state.position == (length,)


@EVERY
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_neutral(layer, chunk, side, same_state):
    lengths = [2 * chunk + 1, chunk + 2, 1, 0]
    width, extra = max(lengths), 5
    real = [torch.randn(1, n + extra, DIM, dtype=torch.float64) for n in lengths]
    x = torch.randn(len(lengths), width, DIM, dtype=torch.float64)
    mask = torch.zeros(len(lengths), width, dtype=torch.bool)
    for row, n in enumerate(lengths):
        where = slice(width - n, width) if side == "left" else slice(0, n)
        x[row, where], mask[row, where] = real[row][0, :n], True
    padded, state = layer(x, None, mask)
    after, last = layer(torch.cat([r[:, -extra:] for r in real]), state)
    assert not padded[~mask].any()
    for row, n in enumerate(lengths):
        alone, end = layer(real[row])
        torch.testing.assert_close(padded[row][mask[row]], alone[0, :n], atol=1e-10, rtol=0)
        torch.testing.assert_close(after[row], alone[0, n:], atol=1e-10, rtol=0)
        same_state(last.index([row]), end, 1e-10)


@EVERY
def test_rows_are_independent(layer, chunk, same_state):
    x = torch.randn(3, 2 * chunk + 2, DIM, dtype=torch.float64)
    together, state = layer(x)
    for row in range(3):
        alone, other = layer(x[row : row + 1])
        torch.testing.assert_close(together[row], alone[0], atol=1e-10, rtol=0)
        same_state(state.index([row]), other, 1e-10)


@EVERY
def test_forward_changes_nothing_in_place(layer, chunk):
    _, state = layer(torch.randn(2, chunk + 1, DIM, dtype=torch.float64))
    before = {k: v.clone() for k, v in state.flatten().items()}
    weights = {k: v.clone() for k, v in layer.state_dict().items()}
    x = torch.randn(2, 2 * chunk, DIM, dtype=torch.float64)
    first, _ = layer(x, state)
    second, _ = layer(x, state)
    assert torch.equal(first, second)
    assert all(torch.equal(v, before[k]) for k, v in state.flatten().items())
    assert all(torch.equal(v, weights[k]) for k, v in layer.state_dict().items())


@EVERY
def test_stored_state_continues_bit_equal(make, chunk, tmp_path, same_state):
    layer = make().eval()
    x = torch.randn(2, 3 * chunk, DIM)
    _, state = layer(x[:, : chunk + 1])
    state.save(tmp_path / "state.safetensors")
    loaded = layer.init_state(1).load(tmp_path / "state.safetensors")
    same_state(state, loaded, 0)
    expected, end = layer(x[:, chunk + 1 :], state)
    got, other = layer(x[:, chunk + 1 :], loaded)
    assert torch.equal(expected, got)
    same_state(end, other, 0)


@EVERY
def test_half_precision_is_close(make, chunk):
    half = make().to(torch.bfloat16).eval()
    full = make().eval()
    full.load_state_dict({k: v.float() for k, v in half.state_dict().items()})
    x = torch.randn(2, 6 * chunk, DIM).to(torch.bfloat16)
    y, state = half(x)
    expected, _ = full(x.float())
    assert y.dtype == torch.bfloat16
    error = (y.float() - expected).norm() / expected.norm()
    assert error < 0.05, f"relative error {error:.3f}"
    again, _ = half(x, state)
    assert again.isfinite().all()


@NAMED
def test_long_and_hostile_input_stays_finite(name, make):
    """Random, constant, repeated and hugely scaled tokens side by side."""
    layer = make(memory_chunk=64, projection_chunk=64).eval()
    length = HOSTILE_LENGTH.get(name, 65_536)
    x = torch.randn(4, length, DIM)
    x[1] = x[1, :1]
    x[2] = x[2, :7].repeat(length // 7 + 1, 1)[:length]
    x[3] *= 1e4
    with torch.no_grad():
        y, state = layer(x)
    assert y.isfinite().all()
    assert all(t.isfinite().all() for t in state.tensors() if t.is_floating_point())


@EVERY
def test_gradient_reaches_every_parameter(layer, chunk):
    x = torch.randn(2, 6 * chunk + 1, DIM, dtype=torch.float64, requires_grad=True)
    y, _ = layer(x)
    (y * torch.randn_like(y)).sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, f"{name} is outside the graph"
        assert parameter.grad.isfinite().all(), f"{name} has a gradient that is not finite"
        assert parameter.grad.abs().max() > 0, f"{name} gets no gradient"
    assert x.grad is not None and (x.grad[:, 0].abs().max() > 0)


@EVERY
def test_gradient_through_a_carried_state(layer, chunk):
    """Two calls that carry the state have the gradient of one call."""
    x = torch.randn(1, 4 * chunk, DIM, dtype=torch.float64)
    weight = torch.randn_like(x)
    grads = []
    for cuts in ([], [chunk + 1, 3 * chunk]):
        layer.zero_grad()
        y, _ = read(layer, x, cuts)
        (y * weight).sum().backward()
        grads.append([p.grad.clone() for p in layer.parameters()])
    for one, two in zip(*grads, strict=True):
        torch.testing.assert_close(one, two, atol=1e-9, rtol=1e-9)


@EVERY
def test_state_size_does_not_grow(layer, name, chunk):
    if name in WINDOWED:
        pytest.skip("attention keeps the text itself; sizes with a window are in tests/nn")
    _, short = layer(torch.randn(1, chunk + 1, DIM, dtype=torch.float64))
    _, long = layer(torch.randn(1, 9 * chunk + 2, DIM, dtype=torch.float64))
    assert short.nbytes == long.nbytes


@EVERY
def test_wrong_calls_are_refused(layer, chunk):
    x = torch.randn(2, chunk, DIM, dtype=torch.float64)
    with pytest.raises(ValueError):
        layer(x[:, :0])
    _, state = layer(x)
    with pytest.raises(ValueError):
        layer(x[:1], state)
    hole = torch.ones(2, chunk, dtype=torch.bool)
    hole[0, 1] = False
    with pytest.raises(ValueError):
        layer(x, None, hole)
    with pytest.raises(ValueError):
        layer(x, None, hole[:, :2])


@NAMED
def test_compiles_without_graph_break(name, make, chunk, needs_compiler):
    torch._dynamo.reset()
    layer = make(projection_chunk=chunk)
    # Code generation costs minutes for the large graphs, and tracing is what can fail here.
    backend = "inductor" if name == "linear_attention" else "aot_eager"
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    x = torch.randn(2, chunk + 1, DIM)  # one write, and a read after it
    expected, _ = layer(x)
    y, state = compiled(x)
    torch.testing.assert_close(y, expected, atol=1e-4, rtol=1e-4)
    y.sum().backward()
    assert state.position == (chunk + 1,) * 2
