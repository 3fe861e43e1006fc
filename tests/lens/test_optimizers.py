"""The library's own optimizers through the lens, and their products against torch's counter."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import nestlearn as nl
from tests.lens.boxes import both_ways, levels, links
from tests.lens.test_inspect import mlp


def step(model: nn.Module, optimizer: Any) -> None:
    optimizer.zero_grad()
    model(torch.randn(4, 4)).square().mean().backward()
    optimizer.step()


def held(optimizer: Any) -> int:
    return sum(
        t.nbytes for state in optimizer.state.values() for k, t in state.items()
        if isinstance(t, Tensor) and k not in ("step", "momentum_product")
    )  # fmt: skip


def test_m3_has_a_momentum_slower_than_the_weights() -> None:
    """Alg. 1: M1 and V at every step, M2 every f steps; the weights need all three."""
    model = nn.Sequential(nn.Linear(4, 8, bias=False), nn.ReLU(), nn.Linear(8, 2, bias=False))
    optimizer = nl.optim.M3([p for p in model.parameters()], frequency=3)
    system = nl.inspect(model, optimizer)
    assert levels(system) == [
        {"slow momentum": Fraction(1, 3)},
        {"weights": 1},
        {"fast momentum": 1, "second moment": 1},
    ]
    assert links(system) == both_ways("weights", "fast momentum", "second moment") | {
        ("generation", "weights", "slow momentum"),
        ("generation", "slow momentum", "weights"),
    }
    assert system["slow momentum"].context == "gradients of weights, summed over 3 steps"
    before = system.state_bytes
    for _ in range(4):
        step(model, optimizer)
    assert held(optimizer) == before == nl.inspect(model, optimizer).state_bytes


def test_m3_updates_matrices_and_adamw_the_rest() -> None:
    model = mlp()
    system = nl.inspect(model, nl.optim.M3(model, frequency=4))
    assert [set(level) for level in levels(system)] == [
        {"slow momentum"},
        {
            "weights (with fast momentum, slow momentum, second moment)",
            "weights (with first moment, second moment of AdamW)",
        },
        {"fast momentum", "second moment", "first moment", "second moment of AdamW"},
    ]


def test_delta_momentum_is_a_regression() -> None:
    model = mlp()
    system = nl.inspect(model, nl.optim.DeltaMomentum(model, lr=0.1))
    assert levels(system) == [{"weights": 1}, {"momentum": 1}]
    assert system["momentum"].objective.startswith("1/2 |m g^T + 1|^2 (Eq. 48-49)")
    plain = nl.inspect(model, nl.optim.DeltaMomentum(model, lr=0.1, delta=0.0))
    assert plain["momentum"].objective.startswith("-<m, g>")


def test_dgd_gives_the_weights_another_objective() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    optimizer = nl.optim.DGD(model, lr=0.1, momentum=0.9)
    try:
        system = nl.inspect(model, optimizer)
    finally:
        optimizer.close()
    own, norm = (box for box in system.boxes if box.name.startswith("weights"))
    assert own.objective == "1/2 |W x - u|^2, u = -gradient of the task loss at W x"
    assert own.solver == "delta gradient descent (DGD)"
    assert (norm.objective, norm.solver) == ("task loss", "gradient descent (DGD)")
    assert norm.parameters == ("1.weight", "1.bias")
    assert len(system.levels) == 2 and levels(system)[1] == {"momentum": 1}


@pytest.mark.parametrize(
    ("preset", "expected", "objectives"),
    [
        ("sgd", [{"weights": 1}, {"momentum": 1}], {"momentum": "-<m, g>"}),
        ("signsgd", [{"weights": 1}], {}),
        ("lion", [{"weights": 1}, {"momentum": 1}], {"momentum": "1/2 |m - g|^2"}),
        ("adagrad", [{"weights": 1}, {"second moment": 1}], {"second moment": "-<v, g*g>"}),
        ("rmsprop", [{"weights": 1}, {"second moment": 1}], {"second moment": "1/2 |v - g*g|^2"}),
        (
            "adam",
            [{"weights": 1}, {"momentum": 1, "second moment": 1}],
            {"momentum": "1/2 |m - g|^2", "second moment": "1/2 |v - g*g|^2"},
        ),
        ("shampoo", [{"weights": 1}, {"second moment": 1}], {"second moment": "-<L, g g^T>"}),
        ("adagrad_full", [{"weights": 1}, {"second moment": 1}], {"second moment": "-<H, g g^T>"}),
        ("delta", [{"weights": 1}, {"momentum": 1}], {"momentum": "1/2 |m g^T - I|^2"}),
    ],
)
def test_presets(preset: str, expected: list[dict[str, int]], objectives: dict[str, str]) -> None:
    model = mlp()
    optimizer = nl.optim.AssociativeMomentum(model, preset=preset, lr=1e-3)
    system = nl.inspect(model, optimizer)
    assert levels(system) == expected
    for name, start in objectives.items():
        assert system[name].objective.startswith(start)
    step(model, optimizer)
    assert held(optimizer) == system.state_bytes


@pytest.mark.parametrize("depth", [1, 3])
def test_deep_momentum_is_a_network(depth: int) -> None:
    model = mlp()
    optimizer = nl.optim.DeepMomentum(model, depth=depth, width=5)
    system = nl.inspect(model, optimizer)
    assert levels(system) == [
        {"weights (with deep momentum)": 1, "weights (with momentum)": 1},
        {"deep momentum": 1, "momentum": 1},
    ]
    assert system["deep momentum"].objective.startswith("-<m(k), v>, k = v = g / |g|")
    step(model, optimizer)
    assert held(optimizer) == system.state_bytes == nl.inspect(model, optimizer).state_bytes


def test_order_inside_an_optimizer() -> None:
    """Preconditioned before it is written (Eq. 47), the momentum needs the second moment of the
    same step; AdaMuon's second moment sees what the momentum answers, and needs that."""
    model = nn.Linear(4, 8, bias=False)
    first = nl.optim.AssociativeMomentum(model, preset="rmsprop", retention=0.9)
    assert levels(nl.inspect(model, first)) == [
        {"weights": 1}, {"momentum": 1}, {"second moment": 1},
    ]  # fmt: skip
    second = nl.optim.AssociativeMomentum(model, preset="adamuon")
    assert levels(nl.inspect(model, second)) == [
        {"weights": 1}, {"second moment": 1}, {"momentum": 1},
    ]  # fmt: skip


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (4, 12)])
@pytest.mark.parametrize(
    "make",
    [
        lambda p: nl.optim.DeltaMomentum(p, lr=0.1),
        lambda p: nl.optim.AssociativeMomentum(p, preset="delta"),
        lambda p: nl.optim.AssociativeMomentum(p, preset="muon"),
        lambda p: nl.optim.AssociativeMomentum(p, preset="shampoo"),
        lambda p: nl.optim.AssociativeMomentum(p, preset="adagrad_full"),
        lambda p: nl.optim.M3(p, alpha=0.0, ns_gram=True),
        lambda p: nl.optim.M3(p, alpha=0.0, ns_gram=False),
        lambda p: nl.optim.DeepMomentum(p),
        lambda p: nl.optim.DeepMomentum(p, depth=1, objective="l2"),
        lambda p: nl.optim.DeepMomentum(p, depth=3, width=5, output="newton_schulz"),
    ],
)
def test_products_of_a_step(make: Any, shape: tuple[int, int]) -> None:
    model = nn.Linear(shape[1], shape[0], bias=False)
    optimizer = make([model.weight])
    model.weight.grad = torch.randn(shape)
    optimizer.step()
    own = nl.inspect(model, optimizer, tokens=1).flops_per_token - 2 * model.weight.numel()
    with FlopCounterMode(display=False) as counter:
        optimizer.step()
    # Stated, but not counted by torch: matrix times vector, and products added in place.
    state = optimizer.state[model.weight]
    vector = 2 * model.weight.numel() ** 2 if "outer" in state else 0
    in_place = sum(2 * shape[0] * t.numel() for k, t in state.items() if k.startswith("weight_"))
    if isinstance(optimizer, nl.optim.DeltaMomentum):  # the second of its products
        in_place = 2 * model.weight.numel() * min(shape)
    assert counter.get_total_flops() == own - vector - in_place


def test_hope_trained_with_m3_on_level_clocks() -> None:
    model = nl.HopeForCausalLM(nl.HopeConfig.preset("tiny", cms_periods=[1, 4]))
    system = nl.inspect(model, nl.optim.M3(model, frequency=8))
    assert system.levels[0][0].name == "slow momentum"
    assert system["slow momentum"].frequency == Fraction(1, 8)
    assert system.unknown == ()
