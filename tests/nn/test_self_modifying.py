"""Self-modifying Titans: settings, state, checkpointing, cost. The mathematics is tested in
tests/equations, the streaming contracts in tests/contracts."""

from __future__ import annotations

import contextlib

import pytest
import torch

from nestlearn.nn import SelfModifyingTitans, native, scan, self_modifying
from nestlearn.nn.compiled import compile_model
from nestlearn.nn.counting import count


def layer_and_input(tokens=24, **settings):
    layer = SelfModifyingTitans(
        16, 2, **{"memory_chunk": 4, "projection_chunk": 8, **settings}
    ).double()
    return layer, torch.randn(2, tokens, 16, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"memory_depth": 1},
        {"adaptive": ("eta", "alpha")},
        {"adaptive": ("v", "alpha")},
        {"adaptive": ("k", "eta")},
        {"adaptive": ()},
    ],
    ids=str,
)
def test_untrained_it_looks_where_the_token_came_before(settings, monkeypatch):
    """The key most like a token's query is that of the token behind its last occurrence."""
    seen = []

    def recording(cell, state, inputs, *rest):
        seen.append(inputs)
        return scan.scan(cell, state, inputs, *rest)

    monkeypatch.setattr(self_modifying, "scan", recording)
    torch.manual_seed(0)
    layer = SelfModifyingTitans(128, 2, **settings)
    tokens = torch.cat([torch.randperm(24), torch.randperm(24)])
    layer(torch.randn(24, 128)[tokens][None])
    k, _, q = seen[-1][:3]
    found = (q @ k.mT)[0, :, 25:, 1:25].argmax(-1)  # of the second occurrences, but the first one
    places = torch.stack([(tokens[:24] == t).nonzero()[0, 0] for t in tokens[25:]])
    right = (found == places)[:, places < 23]  # behind the last token begins the second half
    assert right.float().mean() > 0.9


def test_without_a_convolution_nothing_comes_from_before():
    layer = SelfModifyingTitans(16, 2, conv_size=1)
    assert layer(torch.randn(1, 5, 16))[0].isfinite().all()


@pytest.mark.parametrize("readout", ["chunk", "token"])
@pytest.mark.parametrize("momentum", [False, True])
def test_checkpointing_changes_nothing(readout, momentum):
    layer, x = layer_and_input(27, readout=readout, momentum=momentum)
    wanted = [x, *layer.parameters()]
    y, state = layer(x)
    plain = torch.autograd.grad(y.square().sum() + state.memory.weights[0].sum(), wanted)
    layer.checkpoint_chunks = 2
    again, state = layer(x)
    recomputed = torch.autograd.grad(again.square().sum() + state.memory.weights[0].sum(), wanted)
    assert torch.equal(y, again)
    for a, b in zip(plain, recomputed, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_momentum_begins_near_none():
    """Untrained, it changes what is read a little, a decay of a half five times as much."""
    torch.manual_seed(0)
    layer = SelfModifyingTitans(32, 2, momentum=True, memory_chunk=8, projection_chunk=8)
    x = torch.randn(1, 32, 32)

    def read(logit):
        with torch.no_grad():
            for group in (layer.memory, layer.projections):
                if logit is not None:
                    group.momentum_logit.fill_(logit)
            return layer(x)[0]

    starts, none, half = read(None), read(-1e4), read(0.0)
    assert 0 < (starts - none).norm() < 0.2 * (half - none).norm()


def test_frozen_memories_are_read_and_not_written():
    layer, x = layer_and_input()
    _, state = layer(x)
    frozen = state.freeze()
    _, after = layer(2 * x, frozen)
    assert after.position == state.position
    for a, b in zip(after.memory.tensors(), state.memory.tensors(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(after.projections.tensors(), state.projections.tensors(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(after.history, state.history)
    _, thawed = layer(x, after.freeze(False))
    assert thawed.position == (48, 48)


def test_state_size_does_not_grow():
    layer, x = layer_and_input(8)
    state, sizes = None, set()
    with torch.no_grad():
        for _ in range(5):
            _, state = layer(x, state)
            sizes.add(state.nbytes)
    assert len(sizes) == 1


def test_writing_matters():
    """What was read changes what is answered, far beyond the convolution's window."""
    layer, x = layer_and_input(24)
    other = x.detach().clone()
    other[:, 0] += 1
    y, z = layer(x)[0], layer(other)[0]
    assert (y[:, 4:8] - z[:, 4:8]).abs().max() > 1e-6  # M_mem's second chunk
    assert (y[:, -1] - z[:, -1]).abs().max() > 1e-6


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"heads": 3}, "multiple of heads"),
        ({"memory_depth": 0}, "memory depth"),
        ({"memory_depth": 5}, "memory depth"),
        ({"objective": "l3"}, "unknown objective 'l3'; choose one of dot, l2"),
        ({"readout": "both"}, "unknown readout"),
        ({"truncate": True, "readout": "chunk"}, "readout 'token'"),
        ({"truncate": True, "momentum": True}, "momentum False"),
        ({"half_lives": (10, 5)}, "shortest, longest"),
        ({"rule": "sgd"}, "unknown rule"),
        ({"counters": -1}, "counters must be at least 0, got -1"),
        ({"counter_noise": -0.1}, "counter_noise must be a number >= 0, got -0.1"),
        ({"counter_noise": 0.1}, "acts on counters: there are none"),
        ({"adaptive": ("k", "w")}, "unknown adaptive role 'w'"),
        ({"memory_chunk": 0}, "memory_chunk must be at least 1"),
        ({"projection_chunk": -1}, "projection_chunk must be at least 1"),
        ({"eta_max": 0.0}, "eta_max must be positive"),
        ({"write_threshold": 1.0}, r"write_threshold must be in \[0, 1\)"),
        ({"conv_size": 0}, "conv size"),
    ],
)
def test_bad_settings_say_what_is_wrong(settings, message):
    with pytest.raises(ValueError, match=message):
        SelfModifyingTitans(**{"dim": 16, "heads": 2, **settings})


def test_bad_input_says_what_is_wrong():
    layer, x = layer_and_input()
    _, state = layer(x)
    with pytest.raises(ValueError, match="tokens > 0"):
        layer(x[:, :0])
    with pytest.raises(ValueError, match="state has 2 rows and x has 1"):
        layer(x[:1], state)
    with pytest.raises(ValueError, match="padding between real tokens"):
        layer(x, None, torch.tensor([[1, 0, 1] * 8] * 2, dtype=torch.bool))


def test_compiled_chunks_compute_the_same(monkeypatch):
    # The graph is captured and run without code generation, which is what takes time.
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **k: real(f, backend="aot_eager", **k))
    layer, x = layer_and_input(17)
    wanted = [x, *layer.parameters()]
    y, state = layer(x)
    plain = torch.autograd.grad(y.square().sum(), wanted)
    assert compile_model(layer) is layer
    again, new = layer(x)
    compiled = torch.autograd.grad(again.square().sum(), wanted)
    torch.testing.assert_close(y, again, rtol=0, atol=1e-12)
    for a, b in zip(plain, compiled, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


def test_a_long_constant_stream_leaves_no_denormal_numbers():
    """They slowed reading down several times after some 10,000 tokens."""
    layer = SelfModifyingTitans(16, 2, memory_chunk=64, projection_chunk=64)
    with torch.no_grad():
        layer.gates.alpha_bias.fill_(4.0)  # alpha 0.98: what is not rewritten decays for ever
        x, state = torch.randn(1, 1, 16).expand(1, 2048, 16), None
        for _ in range(4):
            _, state = layer(x, state)
    weights = [*state.memory.weights, *state.projections.weights]
    everything = torch.cat([w.flatten() for w in weights]).abs()
    assert everything.max() > 1e-3
    assert everything[everything > 0].min() > 1e-18


def test_a_count_is_exact_at_any_length():
    """Ones and minus ones in turns, after 100,000 tokens of them, and with another count beside."""
    values = torch.tensor([[1.0, 0.0], [-1.0, 1.0]]).repeat(50_000, 1)[None]
    out, sums = count(values, torch.zeros(1, 2))
    assert torch.equal(out[0, :, 0], torch.tensor([0.2, 0.0]).repeat(50_000))
    assert sums.tolist() == [[0.0, 50_000.0]] and out.max() < 1


def test_frozen_counters_are_read_and_do_not_count():
    layer = SelfModifyingTitans(16, 2, counters=3)
    x, y = torch.randn(2, 9, 16), torch.randn(2, 6, 16)
    with torch.no_grad():
        _, state = layer(x)
        _, after = layer(y, state.freeze())
        assert torch.equal(after.sums, state.sums)
        out, _ = count(torch.randn(2, 6, 3), state.sums, frozen=True)
    held = state.sums / (4 + state.sums.abs())
    torch.testing.assert_close(out, held.unsqueeze(1).expand(2, 6, 3))


def test_counters_are_noisy_in_training_only():
    torch.manual_seed(0)
    out, sums = count(torch.zeros(400, 25, 2), torch.full((400, 2), 7.0), noise=0.1)
    assert sums.mean().sub(7).abs() < 0.05 and sums.std().sub(0.5).abs() < 0.05  # 0.1 x sqrt(25)
    torch.testing.assert_close(out[:, -1], sums / (4 + sums.abs()))
    layer = SelfModifyingTitans(16, 2, counters=3, counter_noise=0.1)
    plain = SelfModifyingTitans(16, 2, counters=3)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(2, 9, 16)
    assert not torch.equal(layer(x)[1].sums, layer(x)[1].sums)
    assert torch.equal(layer.eval()(x)[0], plain(x)[0])


def test_counters_stay_finite():
    layer = SelfModifyingTitans(16, 2, counters=3)
    x = torch.full((1, 8, 16), 1e25, requires_grad=True)
    y, state = layer(x)
    y.sum().backward()
    assert state.sums.abs().max() > 1e20
    assert y.isfinite().all() and x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


def test_counters_leave_the_heads_as_they_are():
    layer, with_counters = SelfModifyingTitans(16, 2), SelfModifyingTitans(16, 2, counters=3)
    state = with_counters.state_dict()
    for name, w in layer.state_dict().items():
        part = state[name]
        if name in ("in_proj.weight", "conv.weight"):  # rows k, v, q, gate, the counters' own
            part[: len(w)] = w
        elif name == "out_proj.weight":
            part[:, :16], part[:, 16:] = w, 0
        else:
            part.copy_(w)
    with_counters.load_state_dict(state)
    x = torch.randn(2, 11, 16)
    torch.testing.assert_close(with_counters(x)[0], layer(x)[0])


@pytest.mark.parametrize("kernel", [True, False])
def test_below_the_threshold_nothing_is_written(kernel):
    layer = SelfModifyingTitans(16, 2, memory_chunk=4, projection_chunk=4, write_threshold=0.1,
                                weight_decay=False)  # fmt: skip
    x = torch.randn(2, 12, 16)
    before = layer.init_state(2)
    for bias, writes in ((-6.0, False), (0.0, True)):
        with torch.no_grad():
            layer.gates.eta_bias.fill_(bias)
            with contextlib.nullcontext() if kernel else native.disabled():
                _, after = layer(x)
        pairs = [
            *zip(after.memory.weights, before.memory.weights, strict=True),
            *zip(after.projections.weights, before.projections.weights, strict=True),
        ]
        assert all(torch.equal(a, b) for a, b in pairs) is not writes


@pytest.mark.parametrize("kernel", [True, False])
def test_a_closed_gate_can_open_again(kernel):
    layer = SelfModifyingTitans(16, 2, memory_chunk=4, projection_chunk=4, write_threshold=0.1)
    x, bias = torch.randn(2, 12, 16), layer.gates.eta_bias
    written, _ = layer(x)
    with torch.no_grad():
        bias.fill_(-6.0)
    with contextlib.nullcontext() if kernel else native.disabled():
        y, _ = layer(x)
    ((y - written.detach()) ** 2).sum().backward()  # writing would be better
    assert (y - written).abs().max() > 1e-2
    assert (bias.grad < 0).all()


@pytest.mark.parametrize("kernel", [True, False])
def test_closed_gates_do_not_make_gradients_explode(kernel):
    # Estimated inside the recurrence, too, this gradient was 4e6 here, and infinite in training.
    layer = SelfModifyingTitans(16, 1, memory_chunk=16, projection_chunk=16, write_threshold=0.1,
                                weight_decay=False)  # fmt: skip
    with torch.no_grad():
        layer.gates.eta_bias.fill_(-3.0)
    x = torch.randn(1, 1024, 16, requires_grad=True)
    with contextlib.nullcontext() if kernel else native.disabled():
        y, _ = layer(x)
        (grad,) = torch.autograd.grad(y[:, -16:].square().sum(), x)
    assert 0 < grad[:, :512].abs().max() < 100
