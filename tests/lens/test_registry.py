"""What the lens does not know is shown as such; users teach it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nestlearn as nl
from nestlearn.lens import registry
from nestlearn.lens.forward import foreign_name


@pytest.fixture(autouse=True)
def _forget(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(registry, "_MODULES", list(registry._MODULES))
    monkeypatch.setattr(registry, "_OPTIMIZERS", list(registry._OPTIMIZERS))
    yield


class Gated(nn.Module):
    """Token by token: nothing to hide."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(8, 4)
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.down(F.silu(self.gate(x)) * self.up(x))


class HiddenMemory(nn.Module):
    """Linear attention that nobody registered."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        written = torch.einsum("btv,btk->btvk", self.v(x), self.k(x)).cumsum(1)
        return torch.einsum("btvk,btk->btv", written, self.q(x))


class InHelper(HiddenMemory):
    """The same, behind a method."""

    def forward(self, x: Tensor) -> Tensor:
        return self.helper(x)

    def helper(self, x: Tensor) -> Tensor:
        return (self.q(x) @ self.k(x).mT).tril() @ self.v(x)


def wrapped(function):
    def call(self, x):
        return function(self, x).roll(1, 1)

    return call


class Decorated(HiddenMemory):
    """A decorator that says nothing of itself."""

    @wrapped
    def forward(self, x: Tensor) -> Tensor:
        return self.q(x)


class Shell(nn.Module):
    """Known blocks, put together in an unknown way."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (Gated(), None),
        (HiddenMemory(), "einsum"),
        (InHelper(), "@"),
        (Decorated(), "roll"),
        (Shell(), "mean"),
    ],
)
def test_forward_passes_are_read(module: nn.Module, name: str | None) -> None:
    assert foreign_name(module) == name


def test_compositions_of_known_layers_need_no_recogniser() -> None:
    system = nl.inspect(Gated())
    assert system.unknown == ()
    assert [box.name for box in system.boxes] == ["weights"]


class Disguised(nn.Sequential):
    """A container by its base class only."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).cumsum(1)


class DisguisedLayer(nn.Linear):
    """A linear map by its base class only."""

    def __init__(self) -> None:
        super().__init__(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cumsum(x, 1) @ self.weight


@pytest.mark.parametrize("kind", [HiddenMemory, InHelper, Decorated, Disguised, DisguisedLayer])
def test_an_unknown_block_is_shown_and_not_guessed(kind: type[nn.Module]) -> None:
    model = nn.Sequential(Gated(), kind(), kind())
    system = nl.inspect(model, torch.optim.SGD(model.parameters()))
    name = f"unknown block {kind.__name__}"
    assert [[box.name for box in level] for level in system.levels] == [["weights", name]]
    assert system[name].objective == "unknown"
    assert system[name].frequency == 1  # that much the optimizer says
    assert system[name].flops_per_token is None and system.flops_per_token is None
    (unknown,) = system.unknown
    assert (unknown.what, unknown.where) == (kind.__name__, ("1", "2"))
    text = str(system)
    assert f"{kind.__name__} (1, 2)" in text and "FLOP not known" in text
    data = json.loads(system.to_json())
    assert data["unknown"][0]["where"] == ["1", "2"] and data["flops_per_token"] is None


class Fused(nn.Module):
    """Somebody's own attention, through torch's."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(4, 12)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unsqueeze(1).chunk(3, -1)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).squeeze(1)


class FusedAndMore(Fused):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unsqueeze(1).chunk(3, -1)
        return F.scaled_dot_product_attention(q, k, v).squeeze(1).cumsum(1)


def test_attention_of_somebody_s_own() -> None:
    system = nl.inspect(Fused())
    assert system["attention"].frequency == float("inf") and system.unknown == ()
    assert system["attention"].flops_per_token is None  # how many heads, only its author knows
    (unknown,) = nl.inspect(FusedAndMore()).unknown
    assert "besides attention its forward pass uses 'cumsum'" in unknown.reason


def test_a_module_without_a_forward_pass_only_holds_others() -> None:
    holder = nn.Module()
    holder.inside = HiddenMemory()
    holder.weight = nn.Parameter(torch.ones(2))
    assert [u.where for u in nl.inspect(holder).unknown] == [("inside",)]


def test_an_unknown_shell_has_known_children() -> None:
    model = Shell(Gated(), Gated())
    system = nl.inspect(model)
    assert [box.name for box in system.boxes] == ["weights"]
    assert system.unknown[0].what == "Shell" and "'mean'" in system.unknown[0].reason
    nl.lens.register_module(Shell)(nl.lens.plain)
    assert nl.inspect(model).unknown == ()


def test_users_teach_modules() -> None:
    @nl.lens.register_module(HiddenMemory)
    def recognise(module: HiddenMemory, scope: nl.lens.Scope) -> nl.lens.Found:
        box = nl.lens.FastBox(
            "memory", "-<M k, v>", "tokens", ("M",), 1, "sum", slow=tuple(module.parameters()),
            state_bytes=64, flops=64,
        )  # fmt: skip
        return nl.lens.Found(fast=(box,), children=True)

    model = nn.Sequential(HiddenMemory(), HiddenMemory())
    system = nl.inspect(model, torch.optim.SGD(model.parameters()), tokens=8)
    assert system["memory"].frequency == 8 and system["memory"].context == "tokens (2 layers)"
    assert system["memory"].state_bytes == 128
    assert system.flops_per_token == 2 * 64 + 2 * 3 * 2 * 16
    assert system.unknown == ()


def test_the_newest_recogniser_is_asked_first_and_may_pass() -> None:
    asked = []

    @nl.lens.register_module(lambda module: isinstance(module, nn.Linear))
    def passes(module: nn.Module, scope: nl.lens.Scope) -> None:
        asked.append(scope.path)
        return None

    model = nn.Sequential(nn.Linear(2, 2))
    assert nl.inspect(model).flops_per_token == 8
    assert asked == ["0"]


class Signs(torch.optim.Optimizer):
    """An optimizer of somebody's own, with state."""

    def __init__(self, params, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                trace = self.state[p].setdefault("trace", torch.zeros_like(p))
                trace.add_(p.grad)
                p.sub_(group["lr"] * trace.sign())


def test_unknown_optimizers_are_listed_with_what_they_keep() -> None:
    model = nn.Linear(3, 2)
    optimizer = Signs(model.parameters())
    system = nl.inspect(model, optimizer)
    assert [box.name for box in system.boxes] == ["weights"]
    assert system["weights"].solver == "unknown (Signs)"
    assert "nothing yet" in system.unknown[0].reason
    model(torch.randn(1, 3)).sum().backward()
    optimizer.step()
    assert "trace (32 bytes)" in nl.inspect(model, optimizer).unknown[0].reason


def test_users_teach_optimizers() -> None:
    @nl.lens.register_optimizer(Signs)
    def recognise(optimizer: Signs, group: dict, parameter: Tensor) -> list[nl.lens.Memory]:
        if parameter.ndim < 2:
            return []
        slow = nl.lens.Memory("slow trace", "-<m, g>", ("trace",), "sum", period=4)
        return [nl.lens.Memory("trace", "-<m, g>", ("none",), "sum", bytes=5), slow]

    model = nn.Linear(3, 2)
    system = nl.inspect(model, Signs(model.parameters()))
    assert [{b.name: b.frequency for b in level} for level in system.levels] == [
        {"slow trace": Fraction(1, 4)},
        {"weights (with trace, slow trace)": 1, "weights (with no memory)": 1},
        {"trace": 1},
    ]
    assert system["trace"].state_bytes == 5 and system["slow trace"].state_bytes == 24
    # A slower memory makes a part of every step: it is no faster box that conditions one.
    kinds = {(t.kind, t.source) for t in system.transfers if t.source.endswith("trace")}
    assert kinds == {("direct parametric", "trace"), ("generation", "slow trace")}
    assert system.unknown == ()


@pytest.mark.parametrize("register", [nl.lens.register_module, nl.lens.register_optimizer])
def test_registering_needs_a_class_or_a_predicate(register) -> None:
    with pytest.raises(ValueError, match="class or a predicate"):
        register("Linear")
