"""The nested systems of memories, attention and Hope, stated by hand as in test_inspect.py."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import nn

import nestlearn as nl
from tests.adaptation.conftest import tiny_model
from tests.lens.boxes import ADAM, INF, MOMENTUM, T, both_ways, in_context, levels, links

# -- memories in context -------------------------------------------------------------------------


def neural(preset: str, **more: Any) -> nn.Module:
    return nl.nn.NeuralMemory(16, 2, preset=preset, **more)


def test_linear_attention_with_momentum_is_three_boxes_on_three_levels() -> None:
    model = neural("linear_attention")
    system = nl.inspect(model, torch.optim.SGD(model.parameters(), momentum=0.9), tokens=T)
    assert levels(system) == [{"weights": 1}, {"momentum": 1}, {"memory": T}]
    assert links(system) == MOMENTUM | in_context("memory")
    memory = system["memory"]
    assert (memory.objective, memory.parameters) == ("-<M k, v> (Eq. 64)", ("M",))
    assert memory.differentiated == "yes: slow gradients flow through the writes"


@pytest.mark.parametrize(
    ("preset", "objective", "frequency", "learns"),
    [
        ("retnet", "-<M k, v> (Eq. 64)", T, ("M",)),
        ("deltanet", "1/2 |M k - v|^2 (Eq. 65)", T, ("M",)),
        ("gated_deltanet", "1/2 |M k - v|^2 (Eq. 65)", T, ("M",)),
        # TTT writes after every 16 tokens, the others here after every 64.
        ("ttt_linear", "1/2 |M(k) - v|^2", T // 16, ("M",)),
        ("ttt_mlp", "1/2 |M(k) - v|^2", T // 16, ("W1", "W2")),
        ("dla", "-<M(k), v>", T // 64, ("W1", "W2")),
        ("moneta", "|M(k) - v|_3^3", T // 64, ("W1", "W2")),
        ("yaad", "huber(M(k) - v)", T // 64, ("W1", "W2")),
        ("memora", "1/2 |M(k) - v|^2", T // 64, ("W1", "W2")),
    ],
)
def test_memories(preset: str, objective: str, frequency: int, learns: tuple[str, ...]) -> None:
    model = neural(preset)
    system = nl.inspect(model, torch.optim.AdamW(model.parameters()), tokens=T)
    assert levels(system) == [
        {"weights": 1},
        {"first moment": 1, "second moment": 1},
        {"memory": frequency},
    ]
    assert links(system) == ADAM | in_context("memory")
    assert (system["memory"].objective, system["memory"].parameters) == (objective, learns)


@pytest.mark.parametrize(("preset", "window"), [("titans", ""), ("atlas", " over 8 tokens")])
def test_titans_have_a_momentum_of_the_inner_gradients(preset: str, window: str) -> None:
    """M_t needs S_t of the same step: the momentum in context is faster than the memory."""
    model = neural(preset)
    system = nl.inspect(model, torch.optim.SGD(model.parameters()), tokens=T)
    momentum = "memory's momentum"
    assert levels(system) == [{"weights": 1}, {"memory": T // 64}, {momentum: T // 64}]
    assert links(system) == in_context("memory") | both_ways("memory", momentum)
    assert system["memory"].objective.startswith("1/2 |M(k) - v|^2" + window)


def test_in_context_alone_the_unit_is_a_token() -> None:
    system = nl.inspect(neural("ttt_linear"))
    assert levels(system) == [{"weights": 0}, {"memory": Fraction(1, 16)}]
    assert links(system) == {
        ("initialisation", "weights", "memory"),
        ("direct parametric", "memory", "weights"),
    }
    assert system.unit == "one token"


def test_a_write_later_than_the_sequence_is_noted() -> None:
    model = neural("dla")
    system = nl.inspect(model, torch.optim.SGD(model.parameters()), tokens=32)
    assert system["memory"].frequency == Fraction(1, 2)
    assert "every 64 tokens: a sequence of 32 is shorter" in system.notes[0]
    # Slower than the weights, it is no faster box that could condition them.
    assert links(system) == {("backpropagation", "weights", "memory")}


# -- attention -----------------------------------------------------------------------------------


def test_transformer_in_context_is_infinity_and_zero() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)
    system = nl.inspect(model)
    assert levels(system) == [{"weights": 0}, {"attention": INF}]
    assert links(system) == {("direct non-parametric", "attention", "weights")}
    assert system["attention"].parameters == ()


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2),
        lambda: nn.Transformer(16, 2, 1, 1, 32, batch_first=True),
        lambda: nn.MultiheadAttention(16, 2, batch_first=True),
        lambda: tiny_model("Llama"),
        lambda: tiny_model("GPT2"),
        lambda: tiny_model("Qwen3"),
        lambda: tiny_model("GPTNeoX"),
        lambda: tiny_model("OPT"),
        lambda: tiny_model("Falcon"),
    ],
)
def test_transformers_with_adamw(make: Callable[[], nn.Module]) -> None:
    model = make()
    system = nl.inspect(model, torch.optim.AdamW(model.parameters()))
    assert levels(system) == [
        {"weights": 1},
        {"first moment": 1, "second moment": 1},
        {"attention": INF},
    ]
    assert links(system) == ADAM | {("direct non-parametric", "attention", "weights")}
    assert system.unknown == ()


def test_windows_and_whole_contexts_are_two_kinds_of_attention() -> None:
    system = nl.inspect(tiny_model("Gemma2"))
    assert set(levels(system)[1]) == {"attention", "sliding-window attention"}
    assert "Eq. 63" in system["sliding-window attention"].objective


# -- Hope ----------------------------------------------------------------------------------------


def hope(**settings: Any) -> Any:
    return nl.HopeForCausalLM(nl.HopeConfig.preset("tiny", **settings))


@pytest.mark.parametrize("mixer", ["self_modifying", "attention"])
@pytest.mark.parametrize("periods", [[1], [1, 4], [1, 4, 16], [1, 4, 16, 64]])
def test_hope_with_one_to_four_levels(mixer: str, periods: list[int]) -> None:
    model = hope(mixer=mixer, cms_periods=periods)
    groups = nl.optim.level_groups(model, lr=1e-3)
    inner = torch.optim.SGD
    system = nl.inspect(model, nl.optim.MultiRate(groups, inner=inner), tokens=T)
    cms = {f"CMS level{i}": Fraction(1, c) for i, c in enumerate(periods, 1)}
    slow = [{name: f} for name, f in reversed(cms.items()) if f < 1]
    fast = {"attention": INF} if mixer == "attention" else {
        "memory": T // 64, "projection memories": T // 64,
    }  # fmt: skip
    assert levels(system) == [*slow, {"weights": 1, "CMS level1": 1}, fast]
    # One gradient flow through all frequencies, from the slower to the next faster.
    chain = [*([name] for level in slow for name in level), ["weights", "CMS level1"]]
    expected = {
        ("backpropagation", a, b)
        for slower, faster in zip(chain, chain[1:], strict=False)
        for a in slower
        for b in faster
    }
    if mixer == "attention":
        expected.add(("direct non-parametric", "attention", "weights"))
    else:
        expected |= in_context("memory") | in_context("projection memories")
        assert system["projection memories"].parameters == ("M_k", "M_v", "M_eta", "M_alpha")
    assert links(system) == expected
    assert system.notes == () and system.unknown == ()


def test_memories_of_other_chunks_are_other_levels() -> None:
    """The projection memories generate the main memory's keys, values, rates and retention."""
    model = hope(memory_chunk=16, projection_chunk=64)
    system = nl.inspect(model)
    assert levels(system) == [
        {"weights": 0, "CMS level1": 0},
        {"projection memories": Fraction(1, 64)},
        {"memory": Fraction(1, 16)},
    ]
    assert ("generation", "projection memories", "memory") in links(system)


def test_momentum_inside_self_modifying_memories() -> None:
    layer = nl.nn.SelfModifyingTitans(16, 2, momentum=True)
    system = nl.inspect(layer)
    assert levels(system) == [
        {"weights": 0},
        {"memory": Fraction(1, 64), "projection memories": Fraction(1, 64)},
        {"memory's momentum": Fraction(1, 64), "projection memories' momentum": Fraction(1, 64)},
    ]


def test_what_is_cut_is_said() -> None:
    layer = nl.nn.SelfModifyingTitans(16, 2, truncate=True)
    system = nl.inspect(layer, torch.optim.SGD(layer.parameters()))
    assert system["memory"].differentiated == "yes, but cut at the boundaries of chunks"


def test_an_optimizer_that_ignores_the_periods_is_shown_as_it_is() -> None:
    model = hope(cms_periods=[1, 4])
    system = nl.inspect(model, torch.optim.SGD(model.parameters()))
    assert levels(system)[0] == {"weights": 1, "CMS level1": 1, "CMS level2": 1}
    assert len(system.notes) == 1
    assert "CMS level2 is meant to be updated every 4 steps" in system.notes[0]


def test_nested_levels_initialise_the_faster() -> None:
    model = hope(cms_periods=[1, 4, 16], cms_kind="nested")
    groups = nl.optim.level_groups(model, lr=1e-3)
    system = nl.inspect(model, nl.optim.MultiRate(groups, inner=torch.optim.SGD))
    assert {
        ("initialisation", "CMS level3", "CMS level2"),
        ("initialisation", "CMS level2", "CMS level1"),
    } <= links(system)


def test_levels_in_context_and_online() -> None:
    chosen = [nl.Level(8, "fast"), nl.Level(64, "slow")]
    layer = nl.nn.ContinuumMemory(8, 16, chosen, error="context")
    system = nl.inspect(layer, torch.optim.SGD(layer.parameters()), tokens=T)
    assert levels(system) == [{"weights": 1}, {"CMS slow": T // 64}, {"CMS fast": T // 8}]
    assert links(system) == in_context("CMS slow") | in_context("CMS fast")
    online = nl.inspect(nl.nn.ContinuumMemory(8, 16, chosen, error="online"))
    assert levels(online) == [
        {"weights": 0}, {"CMS slow": Fraction(1, 64)}, {"CMS fast": Fraction(1, 8)},
    ]  # fmt: skip
    assert online["CMS fast"].objective == "next-token loss of the stream"
    trained = nl.inspect(layer_online := nl.nn.ContinuumMemory(8, 16, chosen, error="online"),
                         torch.optim.SGD(layer_online.parameters()))  # fmt: skip
    assert trained["CMS fast"].differentiated == "no: written without a graph"
    assert not any(kind == "backpropagation" for kind, *_ in links(trained))


def test_layers_with_mixers_of_their_own() -> None:
    system = nl.inspect(nl.HopeForCausalLM(nl.HopeConfig.preset("tiny", mixer="samba")))
    assert system.unknown == ()
    assert system["memory"].frequency == 1
    assert system["sliding-window attention"].frequency == INF


@pytest.mark.parametrize(
    "mixer", ["comba", "rwkv7", "lstm", "srwm", "titans_mac", "titans_mag", "titans_mal"]
)
def test_baselines_are_known(mixer: str) -> None:
    system = nl.inspect(nl.HopeForCausalLM(nl.HopeConfig.preset("tiny", mixer=mixer)))
    assert system.unknown == () and system.flops_per_token
