"""NestedSystem: the order of Def. 2, the worked examples of SPEC §1 (Fig. 3), transfers, output."""

from __future__ import annotations

import json
import math
from fractions import Fraction

import pytest
from rich.console import Console

from nestlearn.levels import (
    Backpropagation,
    Box,
    DirectNonParametric,
    DirectParametric,
    Generation,
    Initialisation,
    NestedSystem,
    Transfer,
)


def mlp_gradient_descent() -> NestedSystem:
    return NestedSystem(
        [Box("MLP", "task loss", "training samples", ("W1", "W2"), 1)], name="MLP + GD"
    )


def mlp_momentum() -> NestedSystem:
    weights = Box("MLP", "task loss", "training samples", ("W",), 1, needs=("momentum",))
    momentum = Box("momentum", "-<m, gradient>", "gradients of the MLP", ("m",), 1)
    return NestedSystem(
        [weights, momentum],
        [
            Generation("MLP", "momentum", generates="context"),
            DirectParametric("momentum", "MLP"),
        ],
        name="MLP + momentum",
    )


def linear_attention_momentum(tokens: int = 512) -> NestedSystem:
    slow = Box("projections", "next-token loss", "corpus", ("Wk", "Wv", "Wq"), 1, "momentum GD",
               needs=("momentum",))  # fmt: skip
    momentum = Box("momentum", "-<m, gradient>", "gradients", ("m",), 1)
    memory = Box("memory", "-<M k, v>", "tokens of one sequence", ("M",), tokens)
    return NestedSystem(
        [slow, momentum, memory],
        [
            Initialisation("projections", "memory"),
            DirectParametric("memory", "projections"),
            Generation("projections", "momentum"),
            Backpropagation("projections", "memory"),
        ],
        name="linear attention + momentum",
    )


def transformer_in_context() -> NestedSystem:
    attention = Box("attention", "sum_i s(k_i, q) |v_i - M|^2", "tokens of one sequence", (),
                    math.inf, "closed form (Nadaraya-Watson)")  # fmt: skip
    mlp = Box("MLP", "next-token loss", "corpus", ("W1", "W2"), 0, "pre-trained")
    return NestedSystem(
        [attention, mlp], [DirectNonParametric("attention", "MLP")], name="Transformer in context"
    )


def names(system: NestedSystem) -> list[list[str]]:
    return [[box.name for box in level] for level in system.levels]


def test_mlp_with_gradient_descent_is_one_level():
    system = mlp_gradient_descent()
    assert names(system) == [["MLP"]]
    assert "MLP + GD: 1 level\n" in str(system)


def test_mlp_with_momentum_is_two_levels():
    system = mlp_momentum()
    assert names(system) == [["MLP"], ["momentum"]]
    assert system.faster("momentum", "MLP") and not system.faster("MLP", "momentum")
    text = str(system)
    assert "MLP + momentum: 2 levels" in text
    assert "level 1 (slowest), frequency 1" in text and "level 2 (fastest), frequency 1" in text
    assert "generation -> momentum: generates its context" in text


def test_linear_attention_with_momentum_is_three_boxes_at_three_levels():
    system = linear_attention_momentum()
    assert names(system) == [["projections"], ["momentum"], ["memory"]]
    text = str(system)
    assert "3 levels" in text and "frequency 512" in text
    assert text.index("projections: Wk") < text.index("momentum: m") < text.index("memory: M")


def test_transformer_in_context_is_infinity_and_zero():
    system = transformer_in_context()
    assert names(system) == [["MLP"], ["attention"]]
    text = str(system)
    assert "level 1 (slowest), frequency 0" in text
    assert "level 2 (fastest), frequency ∞" in text
    assert "attention: no parameters" in text


def test_update_frequencies_of_a_continuum_memory():
    boxes = [Box(f"mlp{c}", "l", "c", ("W",), Fraction(1, c)) for c in (1, 16, 4)]
    system = NestedSystem(boxes)
    assert names(system) == [["mlp16"], ["mlp4"], ["mlp1"]]
    assert "frequency 1/16" in str(system)


def box(name: str, frequency: float = 1, needs: tuple[str, ...] = ()) -> Box:
    return Box(name, "loss", "data", (name,), frequency, needs=needs)


def test_equal_frequency_without_dependency_is_one_level():
    system = NestedSystem([box("a"), box("b")])
    assert names(system) == [["a", "b"]]
    assert not system.faster("a", "b") and not system.faster("b", "a")


def test_dependencies_count_through_other_boxes():
    # c needs the fast b, which needs a: c and a have equal frequency, so a is faster than c.
    system = NestedSystem([box("a"), box("b", 4, ("a",)), box("c", 1, ("b",))])
    assert system.faster("a", "c") and names(system) == [["c"], ["a"], ["b"]]
    chain = NestedSystem([box("x", needs=("y",)), box("y", needs=("z",)), box("z"), box("w")])
    assert names(chain) == [["x", "w"], ["y"], ["z"]]
    assert [chain.level_of(n) for n in "xyzw"] == [1, 2, 3, 1]


def test_circles_are_refused():
    with pytest.raises(ValueError, match="a -> b -> a"):
        NestedSystem([box("a", needs=("b",)), box("b", needs=("a",))])
    with pytest.raises(ValueError, match="b -> c -> b"):
        NestedSystem([box("a", needs=("b",)), box("b", 2, ("c",)), box("c", 3, ("b",))])
    with pytest.raises(ValueError, match="own state"):
        box("a", needs=("a",))


@pytest.mark.parametrize(
    ("transfer", "message"),
    [
        (lambda: Transfer("slow", "fast"), "common base"),
        (lambda: Backpropagation("slow", "slow"), "itself"),
        (lambda: Backpropagation("slow", "twin"), "one level"),
        (lambda: Backpropagation("slow", "nobody"), "nobody"),
        (lambda: DirectParametric("slow", "fast"), "must be faster"),
        (lambda: DirectNonParametric("fast", "slow"), "use DirectParametric"),
        (lambda: Initialisation("fast", "slow"), "must be faster"),
        (lambda: Generation("slow", "fast", generates="noise"), "generates"),
    ],
)
def test_transfers_are_checked(transfer, message):
    boxes = [box("slow"), box("twin"), box("fast", 8)]
    with pytest.raises(ValueError, match=message):
        NestedSystem(boxes, [transfer()])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NestedSystem([]), "at least one"),
        (lambda: NestedSystem([box("a"), box("a")]), "unique"),
        (lambda: NestedSystem([box("a", needs=("q",))]), "'q'"),
        (lambda: NestedSystem([box("a")])["q"], "'q'"),
        (lambda: box(""), "name"),
        (lambda: box("a", -1), "frequency"),
        (lambda: box("a", float("nan")), "frequency"),
        (lambda: box("a", math.inf), "has parameters"),
        (lambda: Box("a", "l", "c", "W", 1), "tuple of names"),
    ],
)
def test_mistakes_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_json():
    data = json.loads(transformer_in_context().to_json())
    assert [level["level"] for level in data["levels"]] == [1, 2]
    assert [level["boxes"][0]["frequency"] for level in data["levels"]] == ["0", "inf"]
    assert data["transfers"] == [
        {"kind": "direct non-parametric", "source": "attention", "target": "MLP"}
    ]
    kinds = {t["kind"] for t in json.loads(linear_attention_momentum().to_json())["transfers"]}
    assert kinds == {"initialisation", "direct parametric", "generation", "backpropagation"}


def test_table_and_rich_printing():
    console = Console(width=140, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    system = linear_attention_momentum()
    console.print(system.table())
    console.print(system)
    text = console.export_text()
    assert "momentum GD" in text and "512" in text and "Wk, Wv, Wq" in text
    assert repr(system) == "NestedSystem('linear attention + momentum', boxes=3, levels=3)"
