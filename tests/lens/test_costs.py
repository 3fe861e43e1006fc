"""Bytes against what torch holds, FLOPs against torch's own counter on running modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import nestlearn as nl
from nestlearn.lens.memories import memory_flops
from nestlearn.nn import native
from nestlearn.nn.mixers import build_mixer
from nestlearn.rules import reference
from nestlearn.rules.diagonal import diagonal_step
from tests.adaptation.conftest import tiny_model
from tests.contracts.conftest import make_config

T = 64


@torch.no_grad()
def counted(call: Callable[[], Any]) -> int:
    """FLOPs that torch counts; its fused attention on CPUs is not counted, the plain one is."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def inspected(model: nn.Module, tokens: int = T) -> int | None:
    return nl.inspect(model, tokens=tokens).flops_per_token


# -- FLOPs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8, bias=False)),
        lambda: nn.TransformerEncoderLayer(32, 4, 64, batch_first=True),
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 3),
        lambda: nl.nn.CausalSelfAttention(32, 4),
        lambda: nl.nn.ContinuumMemory(32, 64, [nl.Level(1), nl.Level(4)]),
    ],
)
def test_flops_of_layers(make: Callable[[], nn.Module]) -> None:
    model = make().train()
    x = torch.randn(2, T, 32)
    assert counted(lambda: model(x)) == 2 * T * inspected(model)


@pytest.mark.parametrize("family", ["Llama", "GPT2", "Qwen3", "Gemma", "GPTNeoX"])
def test_flops_of_language_models(family: str) -> None:
    model = tiny_model(family)
    ids = torch.randint(256, (1, T))
    assert counted(lambda: model(ids, use_cache=False)) == T * inspected(model)


def test_flops_of_convolutions_per_position() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1, groups=2))
    assert counted(lambda: model(torch.randn(1, 3, 6, 5))) == 30 * inspected(model)


def test_flops_of_hope_attention() -> None:
    model = nl.HopeForCausalLM(
        nl.HopeConfig.preset("tiny", mixer="attention", cms_periods=[1, 4])
    ).eval()
    ids = torch.randint(256, (1, T))
    assert counted(lambda: model(ids, use_cache=False)) == T * inspected(model)


def chunk_free(make: Callable[[int], nn.Module], dim: int) -> float:
    """FLOPs per token at chunk size 0: what tokens of a chunk do with one another grows with the
    chunk (two measurements and a line through them), the recurrence does not."""
    counts = {}
    for chunk in (16, 32):
        layer, x = make(chunk), torch.randn(1, T, dim)
        counts[chunk] = counted(lambda layer=layer, x=x: layer(x)) / T
    return counts[16] - (counts[32] - counts[16])


@pytest.mark.parametrize("preset", ["linear_attention", "retnet", "ttt_linear", "ttt_mlp", "dla"])
def test_flops_of_memories(preset: str) -> None:
    def make(chunk: int) -> nn.Module:
        return nl.nn.NeuralMemory(32, 2, preset=preset, chunk=chunk)

    assert chunk_free(make, 32) == inspected(make(16))


def test_momentum_takes_no_product_in_the_recurrence() -> None:
    """The chunked form carries it with products of its own, so that it does more than is stated."""

    def make(chunk: int) -> nn.Module:
        return nl.nn.NeuralMemory(32, 2, preset="titans", chunk=chunk)

    assert inspected(make(16)) < chunk_free(make, 32) < 2 * inspected(make(16))


def test_flops_of_the_delta_rule() -> None:
    """The plain recurrence, token by token: answer, write, read."""
    M, k, v, q = (torch.randn(2, *s) for s in ((16, 16), (16,), (16,), (16,)))
    eta = torch.rand(2)

    def step() -> Tensor:
        after = reference.delta(M, k, v, eta, torch.ones(2))
        return after @ q.unsqueeze(-1)

    # The outer product is broadcast there: it multiplies without adding, and is not counted.
    outer = 2 * 2 * 16 * 16
    assert counted(step) + outer == memory_flops([M], writes=True)


@pytest.mark.parametrize("objective", ["dot", "l2"])
@pytest.mark.parametrize("depth", [1, 2])
def test_flops_of_self_modifying_memories(
    monkeypatch: pytest.MonkeyPatch, objective: str, depth: int
) -> None:
    """With retention to zero. To bring retention to the initial state into the chunked form, one
    more product per write is done, which the recurrence M_0 + alpha (M - M_0) does not need."""
    monkeypatch.setattr(native, "usable", lambda *_: False)  # count torch's operations

    def make(chunk: int) -> nn.Module:
        return nl.nn.SelfModifyingTitans(
            32, 2, memory_depth=depth, memory_chunk=chunk, projection_chunk=chunk,
            retention="zero", objective=objective,
        )  # fmt: skip

    assert chunk_free(make, 32) == inspected(make(16))


def test_flops_of_state_spaces() -> None:
    def make(chunk: int) -> nn.Module:
        return build_mixer("mamba2", make_config("mamba2", memory_chunk=chunk))

    assert chunk_free(make, 16) == inspected(make(16))


def test_flops_of_the_generalised_delta_rule() -> None:
    """Answer to the removal key, two outer products (not counted there), read."""
    M, k, v, w, a, b, q = (torch.randn(2, *s) for s in ((8, 8), *((8,),) * 6))

    def step() -> Tensor:
        return diagonal_step(M, k, v, w, a, b) @ q.unsqueeze(-1)

    layer = build_mixer("rwkv7", make_config("rwkv7"))
    products = sum(2 * m.weight.numel() for m in layer.modules() if isinstance(m, nn.Linear))
    assert counted(step) + 2 * 2 * 2 * 64 == inspected(layer) - products


def test_flops_of_the_lstm() -> None:
    """Eager torch counts nothing of its own loop; the products are those of its matrices."""
    layer = build_mixer("lstm", make_config("lstm"))
    assert inspected(layer) == 2 * sum(p.numel() for p in layer.parameters() if p.ndim == 2)


def test_flops_of_the_self_referential_matrix() -> None:
    layer = build_mixer("srwm", make_config("srwm"))
    outer = 2 * layer.initial.numel()  # broadcast there: not counted
    x = torch.randn(1, T, 16)
    assert counted(lambda: layer(x)) / T + outer == inspected(layer)


def test_flops_of_newton_schulz() -> None:
    weight = nn.Parameter(torch.randn(24, 16))
    weight.grad = torch.randn(24, 16)
    model = nn.Module()
    model.weight = weight
    optimizer = torch.optim.Muon([weight])
    flops = nl.inspect(model, optimizer, tokens=1)["momentum"].flops_per_token
    assert counted(optimizer.step) == flops


# -- bytes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "keys"),
    [
        (lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), 1),
        (torch.optim.AdamW, 2),
        (lambda p: torch.optim.Adam(p, amsgrad=True), 3),
        (torch.optim.Adagrad, 1),
        (lambda p: torch.optim.RMSprop(p, centered=True, momentum=0.9), 3),
        (torch.optim.Adadelta, 2),
        (torch.optim.Adamax, 2),
    ],
)
def test_optimizer_state(make: Callable[[Any], Any], keys: int) -> None:
    """Said before the first step, and the same as what is there after it (step counters, a number
    per tensor, are not counted)."""
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3)).to(torch.bfloat16)
    optimizer = make(model.parameters())
    before = nl.inspect(model, optimizer).state_bytes
    model(torch.randn(2, 5, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    held = sum(
        t.nbytes for state in optimizer.state.values() for k, t in state.items()
        if isinstance(t, Tensor) and k != "step"
    )  # fmt: skip
    size = sum(p.nbytes for p in model.parameters())
    assert before == nl.inspect(model, optimizer).state_bytes == held == keys * size


def test_state_of_slow_levels() -> None:
    model = nn.Linear(5, 7)
    groups = [{"params": model.parameters(), "period": 3}]
    optimizer = nl.optim.MultiRate(groups, inner=torch.optim.AdamW)
    for _ in range(4):  # one update, and one gradient gathered since
        optimizer.zero_grad()
        model(torch.randn(2, 5)).sum().backward()
        optimizer.step()
    held = sum(
        t.nbytes for state in optimizer.state_dict()["state"].values() for k, t in state.items()
        if isinstance(t, Tensor) and k != "step"
    )  # fmt: skip
    assert nl.inspect(model, optimizer).state_bytes == held


@pytest.mark.parametrize(
    "make",
    [
        lambda: nl.nn.NeuralMemory(16, 2, preset="titans"),
        lambda: nl.nn.NeuralMemory(16, 2, preset="atlas"),
        lambda: nl.nn.NeuralMemory(16, 2, preset="gated_deltanet"),
        lambda: nl.nn.SelfModifyingTitans(16, 2, momentum=True),
        lambda: nl.nn.SelfModifyingTitans(16, 2, counters=3),
        *(
            lambda name=name: build_mixer(name, make_config(name))
            for name in ("comba", "rwkv7", "mamba2", "lstm", "srwm", "titans_mac")
        ),
        lambda: nl.nn.ContinuumMemory(16, 32, [nl.Level(8), nl.Level(64)], error="context"),
        lambda: nl.nn.ContinuumMemory(16, 32, [nl.Level(8), nl.Level(16)], error="online"),
    ],
)
def test_state_of_memories(make: Callable[[], Any]) -> None:
    layer = make()
    _, state = layer(torch.randn(1, 20, 16))
    assert nl.inspect(layer).state_bytes == state.nbytes


@pytest.mark.parametrize("family", ["Llama", "GPT2", "Qwen3"])
def test_state_of_attention_is_the_cache(family: str) -> None:
    model = tiny_model(family, torch.bfloat16)
    cache = model(torch.randint(256, (1, T)), use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert nl.inspect(model, tokens=T).state_bytes == held


def test_state_of_our_attention() -> None:
    layer = nl.nn.CausalSelfAttention(16, 2)
    _, state = layer(torch.randn(1, T, 16))
    assert nl.inspect(layer, tokens=T).state_bytes == state.nbytes


def test_parameters_are_counted_once() -> None:
    model = nl.HopeForCausalLM(nl.HopeConfig.preset("tiny"))  # tied embeddings
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    assert nl.inspect(model).parameter_bytes == size
    with torch.device("meta"):  # shapes are all it takes
        assert nl.inspect(nl.HopeForCausalLM(model.config)).parameter_bytes == size


def test_adapted_models_count_what_was_added() -> None:
    model = tiny_model()
    plain = nl.inspect(model, tokens=T)
    nl.adapt(model, [nl.Level(period=8)], rank=4, slots=6, frozen=0.5)
    handle = nl.adaptation.adaptation_of(model)
    memory = handle.new_memory()
    for name, target in handle.targets.items():  # every slot is taken
        level = target.levels[0]
        memory.changes.setdefault(level, {})[name] = torch.randn(target.weight.shape)
    handle.show(memory)
    system = nl.inspect(model, tokens=T)
    ids = torch.randint(256, (1, T))
    assert counted(lambda: model(ids, use_cache=False)) == T * system.flops_per_token
    assert system.flops_per_token - plain.flops_per_token == 2 * (4 * 48 + 6 * (4 + 32))
    assert system.parameter_bytes == plain.parameter_bytes
