"""ContinuumMemory: streaming, rows, padding, storage, precision, bounds, cost, clear errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from nestlearn.levels import NEVER, Level
from nestlearn.nn.continuum import ContinuumMemory

D, H = 8, 24
LEVELS = {
    "sequential": [Level(1), Level(4), Level(6)],
    "nested": [Level(2), Level(4), Level(12)],
    "independent": [Level(1), Level(4), Level(6)],
}
MODES = [(kind, error) for kind in LEVELS for error in ("outer", "context")]


def make(kind="sequential", error="context", dtype=torch.float64, **settings) -> ContinuumMemory:
    levels = settings.pop("levels", LEVELS[kind])
    return ContinuumMemory(D, H, levels, kind=kind, error=error, **settings).to(dtype)


def assert_states_equal(a, b, tolerance=1e-11):
    first, second = a.flatten(), b.flatten()
    assert first.keys() == second.keys()
    for key, value in first.items():
        torch.testing.assert_close(value, second[key], rtol=tolerance, atol=tolerance, msg=key)


# -- contracts ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "error"), MODES)
@pytest.mark.parametrize("sizes", [[1] * 26, [3, 1, 9, 13], [12, 14], [25, 1]])
def test_any_split_gives_the_same(kind, error, sizes):
    layer = make(kind, error)
    x = torch.randn(2, 26, D, dtype=torch.float64)
    whole, end = layer(x)
    state, parts = None, []
    for piece in x.split(sizes, 1):
        y, state = layer(piece, state)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-10, atol=1e-10)
    assert_states_equal(state, end)


@pytest.mark.parametrize(("kind", "error"), MODES)
def test_rows_are_independent(kind, error):
    layer = make(kind, error)
    x = torch.randn(3, 17, D, dtype=torch.float64)
    whole, state = layer(x)
    for row in range(3):
        y, alone = layer(x[row : row + 1])
        torch.testing.assert_close(y, whole[row : row + 1], rtol=1e-10, atol=1e-10)
        assert_states_equal(alone, state.index([row]))
    changed = x.clone()
    changed[1] += 1
    assert torch.equal(layer(changed)[0][[0, 2]], whole[[0, 2]])


@pytest.mark.parametrize(("kind", "error"), MODES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_neutral(kind, error, side):
    layer = make(kind, error)
    lengths = [5, 13, 0, 9]
    x = torch.randn(4, 13, D, dtype=torch.float64)
    column = torch.arange(13)
    length = torch.tensor(lengths)[:, None]
    mask = column < length if side == "right" else column >= 13 - length
    garbage = torch.where(mask[..., None], x, torch.nan)
    y, state = layer(garbage, None, mask)
    assert (y[~mask] == 0).all()
    for row, n in enumerate(lengths):
        if n:
            alone, end = layer(x[row : row + 1, mask[row]])
            torch.testing.assert_close(y[row, mask[row]], alone[0], rtol=1e-10, atol=1e-10)
            assert_states_equal(state.index([row]), end)
    after, _ = layer(x, state)  # rows that are not in step go on
    alone, _ = layer(x[:1, mask[0]])
    again, _ = layer(torch.cat([x[:1, mask[0]], x[:1]], 1))
    torch.testing.assert_close(after[:1], again[:, lengths[0] :], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("kind", "error"), MODES)
def test_save_load_continue_is_bit_equal(kind, error, tmp_path):
    layer = make(kind, error, torch.float32)
    x = torch.randn(2, 30, D)
    _, state = layer(x[:, :15])
    state.save(tmp_path / "state.safetensors")
    loaded = layer.init_state(1).load(tmp_path / "state.safetensors")
    twin = make(kind, error, torch.float32)
    twin.load_state_dict(layer.state_dict())
    y, end = layer(x[:, 15:], state)
    z, other = twin(x[:, 15:], loaded)
    assert torch.equal(y, z)
    assert all(torch.equal(v, other.flatten()[k]) for k, v in end.flatten().items())


@pytest.mark.parametrize(("kind", "error"), MODES)
def test_bf16_is_near_fp32(kind, error):
    layer = make(kind, error, torch.float32)
    x = torch.randn(2, 33, D)
    y, _ = layer(x)
    low, state = make(kind, error, torch.float32), None
    low.load_state_dict(layer.state_dict())
    z, state = low.bfloat16()(x.bfloat16())
    assert z.dtype == torch.bfloat16
    if error == "context":
        assert state.levels[0].up.dtype == torch.float32
    assert (y - z.float()).norm() / y.norm() < 0.03


def test_autocast():
    layer = make("sequential", "context", torch.float32)
    x = torch.randn(2, 9, D)
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = layer(x)
    assert (y.float() - layer(x)[0]).norm() / layer(x)[0].norm() < 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", list(LEVELS))
@pytest.mark.parametrize("eta", [0.1, 1e3])
def test_no_nan_on_hostile_input(kind, dtype, eta):
    periods = {"nested": (16, 64, 512)}.get(kind, (16, 48, 512))
    layer = make(kind, "context", dtype, levels=[Level(p, eta=eta) for p in periods])
    scale = torch.ones(1, 4096, 1)
    scale[:, ::7] = 1e4
    noise = torch.randn(1, 4096, D)
    for x in (noise * 1e4, noise * scale, torch.ones(1, 4096, D) * 1e4, torch.zeros(1, 4096, D)):
        with torch.no_grad():
            y, state = layer(x.to(dtype))
        assert torch.isfinite(y).all()
        for fast, block in zip(state.levels, layer.chain, strict=True):
            for delta, base in ((fast.up, block.up.weight), (fast.down, block.down.weight)):
                limit = base.float().norm(dim=-1).clamp_min(1)
                assert (delta.norm(dim=-1) <= limit * 1.001).all()


def test_outer_gradients_stay_finite():
    layer = make("sequential", "context", torch.float32, levels=[Level(p) for p in (4, 8, 16)])
    for x in (torch.zeros(1, 64, D), torch.randn(1, 64, D) * 1e4, torch.ones(1, 64, D)):
        layer.zero_grad()
        layer(x)[0].square().mean().backward()
        assert all(torch.isfinite(p.grad).all() for p in layer.parameters() if p.grad is not None)


def test_forward_leaves_parameters_and_given_states_alone():
    layer = make()
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    x = torch.randn(2, 13, D, dtype=torch.float64)
    _, state = layer(x)
    copy = state.map(torch.clone)
    layer(x, state)
    assert_states_equal(state, copy, 0)
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())
    frozen, same = layer(x, state.freeze())
    assert_states_equal(same, state.freeze(), 0)
    assert torch.equal(frozen, layer(x, state.freeze())[0])


def test_it_memorises_in_context():
    # A repeated sequence: the level's own objective falls from the first to the last reading.
    layer = make(levels=[Level(4, eta=10.0)])
    block = layer.chain[0]
    torch.nn.init.constant_(block.rate.bias, 3.0)
    x = torch.randn(1, 4, D, dtype=torch.float64)
    target = F.normalize(block.value(x), dim=-1)
    y, _ = layer(x.repeat(1, 50, 1))
    loss = (y - target.repeat(1, 50, 1)).square().sum(-1)
    assert loss[0, -4:].mean() < 0.05 * loss[0, :4].mean()


# -- cost ---------------------------------------------------------------------------------------


class Ops(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_outer_mode_runs_exactly_the_operations_of_an_mlp():
    layer = make(levels=[Level()], error="outer", dtype=torch.float32)
    up, down = layer.chain[0].up, layer.chain[0].down
    x = torch.randn(2, 9, D)
    with Ops() as ours:
        layer(x)
    with Ops() as plain:
        down(F.silu(up(x)))
    assert ours.names == plain.names


def flops(layer, x, state) -> int:
    with FlopCounterMode(display=False) as counter:
        layer(x, state)
    return counter.get_total_flops()


def test_a_level_that_is_not_due_costs_its_forward_pass_only():
    period = 32
    layer = make(levels=[Level(period)])
    forward = 2 * 2 * D * H  # two matrix products per token
    state = layer.init_state(1)
    for position in range(2 * period):
        x = torch.randn(1, 1, D, dtype=torch.float64)
        cost = flops(layer, x, state)
        if (position + 1) % period:
            assert cost == forward
        else:
            assert cost > period * forward
        _, state = layer(x, state)


def test_a_level_that_never_fires_keeps_no_state():
    layer = make(levels=[Level(NEVER), Level(4, eta=0.0), Level(8)])
    _, state = layer(torch.randn(1, 9, D, dtype=torch.float64))
    assert state.levels[0] is None and state.levels[1] is None and state.levels[2] is not None


def test_state_size_does_not_depend_on_length():
    layer = make(dtype=torch.float32, levels=[Level(4), Level(600), Level(100_003)])
    sizes = {layer(torch.randn(1, n, D))[1].nbytes for n in (1, 50, 1300)}
    assert len(sizes) == 1 and sizes.pop() == layer.init_state(1).nbytes
    assert layer.chain[1].part.period == 300  # added up in parts of at most 512


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("kind", list(LEVELS))
def test_parameters_equal_one_mlp(count, kind):
    layer = ContinuumMemory(D, H + 1, [Level(2**i) for i in range(count)], kind=kind)
    names = {level.name: level for level in layer.levels}
    by_level = layer.level_parameters()
    assert by_level.keys() == names.keys()
    total = sum(p.numel() for parameters in by_level.values() for p in parameters)
    assert total == 2 * D * (H + 1)
    extra = count if kind == "independent" and count > 1 else 0
    assert sum(p.numel() for p in layer.parameters()) == total + extra


# -- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "parallel"}, "kind must be one of"),
        ({"activation": "relu6"}, "activation must be one of"),
        ({"levels": []}, "at least one level"),
        ({"hidden": 1, "levels": [Level(), Level()]}, "hidden"),
        ({"kind": "independent", "residual": False}, "residual"),
        ({"levels": [Level(1, "a"), Level(2, "a")]}, "unique"),
        ({"levels": [Level(1, "keys")]}, "keys"),
        ({"levels": [Level(2, error="online"), Level(2, error="context")]}, "mixed"),
        ({"kind": "nested", "levels": [Level(2), Level(2)]}, "distinct"),
        ({"kind": "nested", "levels": [Level(2), Level(5)]}, "multiple"),
        ({"kind": "nested", "levels": [Level(2), Level(4, error="context")]}, "one place"),
        ({"error": "inner"}, "error must be one of"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        ContinuumMemory(D, **({"hidden": H} | settings))


@pytest.mark.parametrize("error", ["outer", "context", "online"])
def test_inputs_are_checked(error):
    layer = make(error=error)
    x = torch.randn(2, 3, D, dtype=torch.float64)
    for bad in (x[:, :0], x[0], x[..., 1:]):
        with pytest.raises(ValueError, match="x must be"):
            layer(bad)
    with pytest.raises(ValueError, match="rows"):
        layer(x, layer.init_state(3))
    with pytest.raises(ValueError, match="another layer"):
        layer(x, make(levels=[Level()]).init_state(2))
    with pytest.raises(ValueError, match="mask"):
        layer(x, None, torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="meta_step"):
        layer.meta_step(1, {})


def test_half_lives_belong_to_adapted_models() -> None:
    with pytest.raises(ValueError, match="half_life is for levels of nl.adapt"):
        ContinuumMemory(4, 8, [Level(4, half_life=10.0)])
    with pytest.raises(ValueError, match="half_life must be more than 0"):
        Level(4, half_life=0.0)
