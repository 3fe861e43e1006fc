"""MultiRate: Eq. 70-71 for any inner optimizer, against plain loops and plain optimizers."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import nn

import nestlearn as nl
from nestlearn.levels.clock import NEVER, Clock
from nestlearn.optim import MultiRate, describe_levels, level_groups

SGD = functools.partial(torch.optim.SGD, lr=0.1)
ADAMW = functools.partial(torch.optim.AdamW, lr=0.01)


def two_layers(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).to(dtype)


def groups_of(model: nn.Sequential, period: int = 4, **options) -> list[dict]:
    return [
        {"params": list(model[0].parameters())},
        {"params": list(model[1].parameters()), "period": period, **options},
    ]


def run(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(5, 3, generator=generator).to(next(model.parameters()).dtype)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("inner", [SGD, ADAMW, functools.partial(torch.optim.Adagrad, lr=0.1)])
def test_period_one_is_the_inner_optimizer(inner) -> None:
    ours, plain = two_layers(), two_layers()
    run(ours, MultiRate(ours.parameters(), inner=inner), range(1, 8))
    run(plain, inner(plain.parameters()), range(1, 8))
    assert equal(ours, plain)


@pytest.mark.parametrize("accumulate", ["sum", "mean"])
def test_slow_level_takes_one_step_on_its_chunk(accumulate: str) -> None:
    """theta <- theta - lr * sum (or mean) of the chunk's gradients, at steps 4, 8, ... only."""
    p = nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = MultiRate([{"params": [p], "period": 4}], inner=SGD, accumulate=accumulate)
    expected, chunk = p.detach().clone(), []
    for step in range(1, 10):
        p.grad = torch.tensor([step, -1.0])
        chunk.append(p.grad.clone())
        optimizer.step()
        if step % 4 == 0:
            total = torch.stack(chunk).sum(0) / (4 if accumulate == "mean" else 1)
            expected -= 0.1 * total
            chunk = []
        assert torch.allclose(p, expected, rtol=0, atol=1e-6), step
        assert optimizer.fired == (("every 4",) if step % 4 == 0 else ())
        assert torch.equal(p.grad, torch.tensor([step, -1.0]))  # the caller's gradient is left


def test_sum_travels_as_far_as_period_one_for_linear_inner_optimizers() -> None:
    fast, slow = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    optimizer = MultiRate([{"params": [fast]}, {"params": [slow], "period": 8}], inner=SGD)
    for _ in range(16):
        fast.grad, slow.grad = torch.ones(1), torch.ones(1)
        optimizer.step()
    assert torch.allclose(fast, slow) and torch.allclose(fast, torch.tensor([-1.6]))


def test_level_that_is_not_due_does_no_optimizer_work() -> None:
    model = two_layers()
    optimizer = MultiRate(groups_of(model), inner=ADAMW)
    calls = {name: 0 for name in optimizer.levels}
    for name, level in optimizer.levels.items():

        def count(*_, name=name):
            calls[name] += 1

        level.optimizer.register_step_post_hook(count)
    before = model[1].weight.clone()
    run(model, optimizer, range(1, 4))
    assert torch.equal(model[1].weight, before) and calls == {"every 1": 3, "every 4": 0}
    assert not optimizer.levels["every 4"].optimizer.state
    run(model, optimizer, range(4, 9))
    assert calls == {"every 1": 8, "every 4": 2}
    assert optimizer.levels["every 4"].updates == 2


def test_never_is_frozen() -> None:
    model = two_layers()
    optimizer = MultiRate(groups_of(model, NEVER), inner=SGD)
    before = model[1].weight.clone()
    run(model, optimizer, range(1, 6))
    assert torch.equal(model[1].weight, before) and not optimizer.state


def test_groups_of_one_level_share_an_inner_optimizer() -> None:
    model = two_layers()
    groups = [
        {"params": [model[0].weight], "period": Clock(2), "weight_decay": 0.5},
        {"params": [model[1].weight], "period": 2, "weight_decay": 0.0},
        {"params": [model[0].bias, model[1].bias], "level": "own", "lr": 0.5},
    ]
    optimizer = MultiRate(groups, inner={"own": SGD, "*": ADAMW})
    assert list(optimizer.levels) == ["every 2", "own"]
    assert isinstance(optimizer.levels["own"].optimizer, torch.optim.SGD)
    assert len(optimizer.levels["every 2"].optimizer.param_groups) == 2
    assert [g["lr"] for g in optimizer.param_groups] == [0.01, 0.01, 0.5]
    assert [g.get("weight_decay") for g in optimizer.param_groups] == [0.5, 0.0, 0]
    assert "momentum" not in optimizer.param_groups[0]  # one level's defaults stay its own


@pytest.mark.parametrize("stop", range(1, 9))
def test_state_dict_resumes_bit_exactly_mid_period(stop: int) -> None:
    straight = two_layers()
    run(straight, MultiRate(groups_of(straight), inner=ADAMW), range(1, 14))
    broken = two_layers()
    first = MultiRate(groups_of(broken), inner=ADAMW)
    run(broken, first, range(1, stop + 1))
    state = copy.deepcopy(first.state_dict())
    second = MultiRate(groups_of(broken), inner=ADAMW)
    second.load_state_dict(state)
    assert [level.steps for level in second.levels.values()] == [stop, stop]
    run(broken, second, range(stop + 1, 14))
    assert equal(straight, broken)


def test_state_dict_has_torch_layout_and_survives_torch_save(tmp_path) -> None:
    model = two_layers()
    optimizer = MultiRate(groups_of(model), inner=ADAMW)
    run(model, optimizer, range(1, 6))
    state = optimizer.state_dict()
    assert set(state) == {"state", "param_groups"}
    assert [g["params"] for g in state["param_groups"]] == [[0, 1], [2, 3]]
    assert {"step", "exp_avg", "exp_avg_sq", "accumulated"} == set(state["state"][2])
    torch.save(state, tmp_path / "o.pt")
    loaded = torch.load(tmp_path / "o.pt", weights_only=True)
    other = MultiRate(groups_of(model), inner=ADAMW)
    other.load_state_dict(loaded)
    assert torch.equal(
        other.state[model[1].weight]["accumulated"], state["state"][2]["accumulated"]
    )


@pytest.mark.parametrize("make", [
    lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (step + 1)),
    lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=20),
    lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
])  # fmt: skip
def test_schedulers_reach_the_inner_optimizers(make) -> None:
    model = two_layers()
    optimizer = MultiRate(groups_of(model), inner=ADAMW)
    scheduler = make(optimizer)
    for step in range(1, 6):
        run(model, optimizer, range(step, step + 1))
        scheduler.step()
        inner = [g["lr"] for level in optimizer.levels.values()
                 for g in level.optimizer.param_groups]  # fmt: skip
        assert inner == [g["lr"] for g in optimizer.param_groups] == scheduler.get_last_lr()
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    scheduler.step()
    slow = optimizer.levels["every 4"].optimizer
    assert slow.param_groups[0]["lr"] == scheduler.get_last_lr()[1]


def test_deepcopy_is_independent() -> None:
    model = two_layers()
    optimizer = MultiRate(groups_of(model), inner=ADAMW)
    run(model, optimizer, range(1, 4))
    both = copy.deepcopy((model, optimizer))
    run(*both, range(4, 9))
    assert optimizer.levels["every 4"].steps == 3
    run(model, optimizer, range(4, 9))
    assert equal(model, both[0])


def test_bf16_gradients_are_accumulated_in_fp32() -> None:
    p = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    optimizer = MultiRate([{"params": [p], "period": 300}], inner=functools.partial(SGD, lr=1.0))
    for _ in range(300):
        p.grad = torch.ones(1, dtype=torch.bfloat16)
        optimizer.step()
    assert p.item() == -300  # bf16 alone would stop counting at 256


def test_parameters_without_gradient_and_closures() -> None:
    model = two_layers()
    optimizer = MultiRate(groups_of(model, 2), inner=SGD)
    model[1].bias.requires_grad_(False)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(torch.ones(1, 3)).sum()
        loss.backward()
        return loss

    first, second = optimizer.step(closure), optimizer.step(closure)
    assert second < first and model[1].bias.grad is None


def test_errors_say_what_to_do() -> None:
    model = two_layers()
    with pytest.raises(ValueError, match="period must be 1 or more"):
        MultiRate(groups_of(model, 0), inner=SGD)
    with pytest.raises(ValueError, match="another level name"):
        groups = groups_of(model, 4, level="a")
        groups[0]["level"] = "a"
        MultiRate(groups, inner=SGD)
    with pytest.raises(ValueError, match="accumulate must be one of"):
        MultiRate(model.parameters(), inner=SGD, accumulate="max")
    with pytest.raises(ValueError, match="no inner optimizer for level 'every 4'"):
        MultiRate(groups_of(model), inner={"every 1": SGD})
    with pytest.raises(ValueError, match="more than one parameter group"):
        MultiRate([*groups_of(model), {"params": [model[0].weight]}], inner=SGD)
    stored = MultiRate(groups_of(model, 8), inner=SGD).state_dict()
    with pytest.raises(ValueError, match="belongs to other levels"):
        MultiRate(groups_of(model, 4), inner=SGD).load_state_dict(stored)


def test_level_groups_of_hope() -> None:
    from nestlearn.models.hope import HopeConfig, HopeForCausalLM

    model = HopeForCausalLM(HopeConfig.preset("tiny", cms_periods=[1, 4]))
    groups = level_groups(model, lr=0.1, weight_decay=0.3)
    kinds = [(g["period"], round(g["lr"], 6), g["weight_decay"]) for g in groups]
    memories = [(1, 0.025, 0.3), (1, 0.025, 0.0)]
    assert kinds == [*memories, (1, 0.1, 0.3), (1, 0.1, 0.0), (4, 0.025, 0.3)]
    names = {p: name for name, p in model.named_parameters()}
    found = [names[p] for g in groups for p in g["params"]]
    assert sorted(found) == sorted(names.values())
    assert any("initial" in names[p] for p in groups[1]["params"])
    assert "model.embed_tokens.weight" in {names[p] for p in groups[3]["params"]}
    assert all(".cms." in names[p] for p in groups[4]["params"])
    assert "every 4 steps" in describe_levels(groups)


def test_level_groups_of_any_model() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    decayed, plain = level_groups(model, lr=0.1)
    assert decayed["params"] == [model[2].weight] and len(plain["params"]) == 4
    for p in model.parameters():
        p.requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter"):
        level_groups(model, lr=0.1)


def test_level_groups_follow_lr_scale_and_never() -> None:
    from nestlearn.levels import Level
    from nestlearn.nn.continuum import ContinuumMemory

    levels = [Level(1, "a"), Level(8, "b", lr_scale=0.5), Level(NEVER, "c")]
    layer = ContinuumMemory(4, 12, levels)
    groups = level_groups(layer, lr=0.1)
    slow = [g for g in groups if g["period"] == 8]
    assert {g["lr"] for g in slow} == {0.05} and {g["period"] for g in groups} == {1, 8}


def test_memories_of_a_self_modifying_layer_learn_at_a_quarter() -> None:
    layer = nl.nn.SelfModifyingTitans(8, heads=2)
    groups = level_groups(layer, lr=1.0)
    rates = {p: group["lr"] for group in groups for p in group["params"]}
    slow = [*layer.memory.parameters(), *layer.projections.parameters(), *layer.gates.parameters()]
    assert {rates[p] for p in slow} == {0.25}
    assert rates[layer.in_proj.weight] == rates[layer.norm_weight] == 1.0


def test_a_slow_level_of_hope_has_its_share_of_the_rate() -> None:
    config = nl.HopeConfig.preset("tiny", mixer="attention", cms_periods=[1, 4])
    groups = level_groups(nl.HopeForCausalLM(config), lr=1.0)
    assert {(g["period"], g["lr"]) for g in groups} == {(1, 1.0), (4, 0.25)}


def test_clocks_can_count_tokens() -> None:
    """``units`` advances the clocks: a level fires once when its boundary is passed."""
    p = torch.nn.Parameter(torch.zeros(1))
    groups = [{"params": [p], "period": 10, "accumulate": "mean"}]
    optimizer = MultiRate(groups, functools.partial(torch.optim.SGD, lr=1.0))
    fired = []
    for units in (4, 4, 4, 25, 3):
        p.grad = torch.ones(1) * units  # a sum over the tokens
        optimizer.step(units=units)
        fired.append(bool(optimizer.fired))
    assert fired == [False, False, True, True, True]
    assert optimizer.levels["every 10"].steps == 40
    # Mean over a period of 10: 12, 25 and 3 tokens of gradient 1.
    torch.testing.assert_close(p.detach(), -torch.tensor([4.0]))
    with pytest.raises(ValueError, match="units must be 1 or more"):
        optimizer.step(units=0)
