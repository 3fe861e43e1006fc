"""NeuralMemory as a layer: every preset streams, learns its initial memory and stays finite."""

from __future__ import annotations

import pytest
import torch

from nestlearn.nn.neural_memory import NeuralMemory
from nestlearn.nn.presets import PRESETS, MemorySpec, get_spec

DIM, HEADS, C = 16, 2, 4
EVERY = pytest.mark.parametrize("preset", PRESETS)
POINTS = {
    "oja": {"preset": "deltanet", "rule": "oja", "normalise_values": True},
    "gated oja": {"preset": "gated_deltanet", "rule": "oja", "normalise_values": True},
    "quadratic": {"preset": "ttt_linear", "feature": "quadratic", "momentum": True},
    "delta gradient descent": {"preset": "titans", "rule": "dgd"},
    "deepest": {"preset": "titans", "depth": 4, "readout": "chunk", "activation": "gelu"},
    "recurrent": {"preset": "titans", "chunk": 1},
    "shallow window": {"preset": "atlas", "depth": 1, "momentum": False, "window": 3},
    "wide window": {"preset": "atlas", "window": 11},
    "shallow KL": {"preset": "memora", "depth": 1},
}
ANY = pytest.mark.parametrize("settings", [*({"preset": p} for p in PRESETS), *POINTS.values()])


def make(settings, dtype=torch.float64, **more):
    layer = NeuralMemory(DIM, HEADS, **{"chunk": C, **settings, **more}).to(dtype)
    with torch.no_grad():
        for w in layer.initial:
            w.add_(0.1 * torch.randn_like(w))
    return layer


def stream(layer, x, sizes, state=None):
    outputs = []
    for piece in x.split(sizes, 1):
        y, state = layer(piece, state)
        outputs.append(y)
    return torch.cat(outputs, 1), state


@ANY
def test_any_split_is_the_same_stream(settings):
    layer = make(settings)
    x = torch.randn(2, 14, DIM, dtype=torch.float64)
    for length in range(1, 2 * C + 2):
        y, state = layer(x[:, :length])
        z, other = stream(layer, x[:, :length], [1] * length)
        torch.testing.assert_close(y, z, atol=1e-10, rtol=1e-10)
        for a, b in zip(state.tensors(), other.tensors(), strict=True):
            torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)
    y, state = layer(x)
    z, other = stream(layer, x, [3, 5, 6])
    torch.testing.assert_close(y, z, atol=1e-10, rtol=1e-10)
    assert state.position == other.position == (14, 14)


@ANY
def test_outer_gradient_reaches_initial_memory_and_gates(settings):
    layer = make(settings)
    y, _ = layer(torch.randn(2, 11, DIM, dtype=torch.float64))
    y.square().sum().backward()
    for name, p in layer.named_parameters():
        assert p.grad is not None and p.grad.abs().max() > 0, name
    if layer.gate_bias is not None:
        assert (layer.gate_bias.grad.abs() > 0).all()


@pytest.mark.parametrize("preset", ["gated_deltanet", "titans", "atlas", "memora"])
def test_outer_gradient_is_right(preset):
    layer = make({"preset": preset}, row_limit=0.0)
    x = torch.randn(1, 6, DIM, dtype=torch.float64)
    names = ["gate_bias", *(f"initial.{i}" for i in range(len(layer.initial)))]
    values = [layer.get_parameter(n).detach()[:1].clone() for n in names]

    def run(*heads):
        given = {
            n: torch.cat([h, layer.get_parameter(n).detach()[1:]])
            for n, h in zip(names, heads, strict=True)
        }
        return torch.func.functional_call(layer, given, (x,))[0].sum()

    for v in values:
        v.requires_grad_()
    assert torch.autograd.gradcheck(run, values, fast_mode=True)


@EVERY
def test_checkpointing_changes_nothing(preset):
    layer, x = make({"preset": preset}), torch.randn(1, 13, DIM, dtype=torch.float64)
    grads = []
    for group in (0, 2):
        layer.checkpoint_chunks = group
        layer.zero_grad()
        layer(x)[0].square().sum().backward()
        grads.append([p.grad.clone() for p in layer.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


@ANY
def test_frozen_memory_reads_and_never_writes(settings):
    layer = make(settings)
    x = torch.randn(2, 6, DIM, dtype=torch.float64)
    _, state = layer(x)
    frozen = state.freeze()
    y, after = stream(layer, x, [2, 4], frozen)
    whole, _ = layer(x, frozen)
    torch.testing.assert_close(y, whole)
    assert after.position == state.position
    for a, b in zip(after.memory.tensors(), state.memory.tensors(), strict=True):
        assert torch.equal(a, b)
    torch.testing.assert_close(layer(x, after.freeze(False))[1].position, (12, 12))


@ANY
def test_padded_rows_give_what_they_give_alone(settings):
    layer = make(settings)
    x = torch.randn(3, 9, DIM, dtype=torch.float64)
    mask = torch.ones(3, 9, dtype=torch.bool)
    mask[0, :4] = False
    mask[2, 5:] = False
    y, state = layer(x, mask=mask)
    for row, (start, stop) in enumerate([(4, 9), (0, 9), (0, 5)]):
        alone, own = layer(x[row : row + 1, start:stop])
        torch.testing.assert_close(y[row : row + 1, start:stop], alone)
        for a, b in zip(state.index([row]).tensors(), own.tensors(), strict=True):
            torch.testing.assert_close(a, b)
    assert y[~mask].abs().max() == 0 and state.position == (5, 9, 5)


@EVERY
def test_saved_state_continues_bit_equal(preset, tmp_path):
    layer = make({"preset": preset}, torch.float32)
    x = torch.randn(2, 10, DIM)
    _, state = layer(x)
    state.save(tmp_path / "state.safetensors")
    loaded = layer.init_state(1).load(tmp_path / "state.safetensors")
    assert loaded.position == (10, 10)
    assert torch.equal(layer(x, loaded)[0], layer(x, state)[0])


@EVERY
@pytest.mark.parametrize("gates", ["start", "maximal"])
def test_finite_for_hard_streams(preset, gates):
    """64k constant tokens, tokens scaled by 1e4, zeros; also with all gates driven to one."""
    layer = NeuralMemory(DIM, HEADS, preset, chunk=64)
    length = 65536 if gates == "start" else 8192
    if gates == "maximal" and layer.gate_bias is not None:
        torch.nn.init.constant_(layer.gate_bias, 8.0)
    wild = torch.randn(1, 2048, DIM) * torch.where(torch.rand(1, 2048, 1) < 0.5, 1e4, 1.0)
    streams = [torch.randn(1, 1, DIM).expand(1, length, DIM), wild, torch.zeros(1, 512, DIM)]
    for x in streams:
        with torch.no_grad():
            y, state = layer(x)
        assert y.isfinite().all() and all(t.isfinite().all() for t in state.memory.tensors())
    for x in (streams[0][:, :512], wild[:, :512], streams[2], torch.randn(1, 512, DIM)):
        layer.zero_grad()
        layer(x)[0].square().mean().backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("preset", ["titans", "ttt_mlp", "atlas", "moneta", "yaad", "memora"])
def test_outer_gradient_does_not_grow_with_length(preset):
    """Writes that overshoot make the outer gradient grow with every chunk; the damped step's do
    not."""
    layer = NeuralMemory(32, HEADS, preset)
    sizes = []
    x = torch.randn(1, 1536, 32)
    for length in (192, 1536):
        layer.zero_grad()
        y, _ = layer(x[:, :length])
        (y[:, -64:] * torch.randn(1, 64, 32)).mean().backward()
        sizes.append(sum(p.grad.square().sum() for p in layer.parameters()).sqrt())
    assert sizes[1] < 5 * sizes[0]


@EVERY
def test_half_precision_is_close(preset):
    layer = make({"preset": preset}, torch.float32)
    x = torch.randn(2, 20, DIM)
    y, _ = layer(x)
    z, state = layer.bfloat16()(x.bfloat16())
    assert z.dtype == torch.bfloat16
    assert all(t.dtype == torch.float32 for t in state.memory.weights)
    assert (z.float() - y).norm() < 0.1 * y.norm()


def test_retention_starts_near_one():
    layer = NeuralMemory(32, 4, "titans")
    alpha = layer.gate_bias[layer.spec.gates.index("alpha")].sigmoid()
    assert alpha.min() > 0.98


@pytest.mark.parametrize(
    ("make_it", "message"),
    [
        (lambda: NeuralMemory(10, 4), "multiple of heads"),
        (lambda: get_spec("titan"), "did you mean 'titans'"),
        (lambda: get_spec("titans", chunks=3), "did you mean 'chunk'"),
        (lambda: get_spec("titans", chunk=0), "at least 1"),
        (lambda: get_spec("titans", depth=5), "1 to 4"),
        (lambda: get_spec("titans", rule="sgd"), "rule must be one of"),
        (lambda: get_spec("titans", eta_start=1.0), "eta_start"),
        (lambda: get_spec("titans", expansion=0), "expansion"),
        (lambda: get_spec("titans", feature="quadratic"), "depth=1"),
        (lambda: get_spec("deltanet", depth=2), "rule='gradient'"),
        (lambda: get_spec("deltanet", eta_max=2.1), "eta_max must be at most 2, got 2.1"),
        (lambda: get_spec("deltanet", readout="chunk"), "token by token"),
        (lambda: get_spec("deltanet", rule="oja"), "normalise_values=True"),
        (lambda: get_spec("atlas", rule="dgd"), "no window"),
        (lambda: get_spec("memora", readout="token"), "readout must be 'chunk'"),
        (lambda: get_spec("memora", momentum=True), "without momentum"),
        (lambda: MemorySpec(gated_decay=True), "gated_decay"),
        (lambda: MemorySpec(rate="one"), "need a gate"),
    ],
)
def test_errors_say_what_to_do(make_it, message):
    with pytest.raises(ValueError, match=message):
        make_it()
