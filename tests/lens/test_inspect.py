"""The nested system of models and optimizers, stated by hand from the paper (§3, Fig. 3, Def. 2).

Per set-up: the levels, slowest first, as lists of (box, updates per data point), and the transfers.
A data point is a sequence of ``T`` tokens and one optimizer step; without an optimizer, one token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import nn

import nestlearn as nl
from tests.adaptation.conftest import tiny_model
from tests.lens.boxes import ADAM, INF, MOMENTUM, T, both_ways, levels, links


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


# -- optimizers on an MLP ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("optimizer", "expected", "transfers"),
    [
        (lambda p: torch.optim.SGD(p), [{"weights": 1}], set()),
        (
            lambda p: torch.optim.SGD(p, momentum=0.9),
            [{"weights": 1}, {"momentum": 1}],
            MOMENTUM,
        ),
        # Two memories that do not need each other: two boxes on one level.
        (
            torch.optim.Adam,
            [{"weights": 1}, {"first moment": 1, "second moment": 1}],
            ADAM,
        ),
        (
            lambda p: torch.optim.AdamW(p, amsgrad=True),
            [
                {"weights": 1},
                {"first moment": 1, "largest second moment": 1},
                {"second moment": 1},
            ],
            ADAM | both_ways("weights", "largest second moment"),
        ),
        (
            torch.optim.NAdam,
            [{"weights": 1}, {"first moment": 1, "second moment": 1}],
            ADAM,
        ),
        (
            torch.optim.Adagrad,
            [{"weights": 1}, {"sum of squares": 1}],
            both_ways("weights", "sum of squares"),
        ),
        (
            torch.optim.RMSprop,
            [{"weights": 1}, {"second moment": 1}],
            both_ways("weights", "second moment"),
        ),
        # The momentum is of g / sqrt(v): it needs the new v, which is therefore faster.
        (
            lambda p: torch.optim.RMSprop(p, momentum=0.9),
            [{"weights": 1}, {"momentum": 1}, {"second moment": 1}],
            both_ways("weights", "momentum", "second moment"),
        ),
        (
            torch.optim.Adadelta,
            [{"weights": 1}, {"second moment of the steps": 1}, {"second moment": 1}],
            both_ways("weights", "second moment", "second moment of the steps"),
        ),
    ],
)
def test_optimizers(
    optimizer: Callable[[Iterable[Any]], Any],
    expected: list[dict[str, int]],
    transfers: set[tuple[str, str, str]],
) -> None:
    model = mlp()
    system = nl.inspect(model, optimizer(model.parameters()))
    assert levels(system) == expected
    assert links(system) == transfers
    assert system["weights"].parameters == ("0.weight", "0.bias", "2.weight", "2.bias")
    assert system.unknown == () and system.notes == ()


def test_an_mlp_without_an_optimizer_stands_still() -> None:
    system = nl.inspect(mlp())
    assert levels(system) == [{"weights": 0}]
    assert links(system) == set()


def test_frozen_and_forgotten_parameters() -> None:
    model = mlp()
    model[0].requires_grad_(False)
    system = nl.inspect(model, torch.optim.SGD([model[2].weight], momentum=0.9))
    assert levels(system) == [{"weights (frozen)": 0}, {"weights (every step)": 1}, {"momentum": 1}]
    assert system["weights (frozen)"].parameters == ("0.weight", "0.bias", "2.bias")
    assert system["momentum"].context == "gradients of weights (every step)"
    assert system.notes == ("1 parameters get gradients that no optimizer uses",)


def test_two_optimizers_make_two_boxes_of_one_level() -> None:
    model = mlp()
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    both = [torch.optim.Muon(matrices), torch.optim.AdamW(vectors)]
    system = nl.inspect(model, both)
    assert levels(system) == [
        {"weights (Muon)": 1, "weights (AdamW)": 1},
        {"momentum": 1, "first moment": 1, "second moment": 1},
    ]
    assert links(system) == both_ways("weights (Muon)", "momentum") | both_ways(
        "weights (AdamW)", "first moment", "second moment"
    )
    with pytest.raises(ValueError, match="one optimizer"):
        nl.inspect(model, [*both, torch.optim.SGD(vectors)])


def test_periods_make_levels() -> None:
    model = mlp()
    groups = [
        {"params": model[0].parameters()},
        {"params": model[2].parameters(), "period": 4},
    ]
    system = nl.inspect(model, nl.optim.MultiRate(groups, inner=torch.optim.SGD))
    assert levels(system) == [
        {"weights (every 4 steps)": Fraction(1, 4)},
        {"weights (every step)": 1},
    ]
    assert links(system) == {("backpropagation", "weights (every 4 steps)", "weights (every step)")}


# -- other layers of torch -----------------------------------------------------------------------


def test_running_statistics_are_a_memory_of_activations() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU())
    system = nl.inspect(model, torch.optim.SGD(model.parameters()))
    assert levels(system) == [{"weights": 1, "running statistics": 1}]
    assert levels(nl.inspect(model)) == [{"weights": 0}]


def test_a_recurrent_state_changes_with_every_token() -> None:
    model = nn.LSTM(4, 8, batch_first=True)
    system = nl.inspect(model, torch.optim.SGD(model.parameters()), tokens=T)
    assert levels(system) == [{"weights": 1}, {"recurrent state": T}]
    assert system["recurrent state"].objective.startswith("none is stated")


def test_wrappers_are_looked_through() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = torch.compile(mlp())
    optimizer = accelerate.Accelerator(cpu=True).prepare(torch.optim.Adam(model.parameters()))
    system = nl.inspect(model, optimizer)
    assert levels(system) == [{"weights": 1}, {"first moment": 1, "second moment": 1}]


def test_peft_adapters_learn_beside_frozen_weights() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        tiny_model(), peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    )
    learned = [p for p in model.parameters() if p.requires_grad]
    system = nl.inspect(model, torch.optim.SGD(learned))
    assert levels(system) == [
        {"weights (frozen)": 0}, {"weights (every step)": 1}, {"attention": INF},
    ]  # fmt: skip
    assert all("lora" in name for name in system["weights (every step)"].parameters)
    assert system.unknown == ()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: nl.inspect(m, torch.optim.SGD(mlp().parameters())), "not the model's"),
        (lambda m: nl.inspect(m, "adam"), "torch.optim.Optimizer"),
        (lambda m: nl.inspect(m, [3]), "torch.optim.Optimizer"),
        (lambda m: nl.inspect(m, tokens=0), "tokens"),
        (lambda m: nl.inspect(nn.ReLU()), "no parameters"),
    ],
)
def test_mistakes_are_refused(call: Callable[[nn.Module], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(mlp())
