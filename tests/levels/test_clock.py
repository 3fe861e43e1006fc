"""Clock and Level: who is due when (Eq. 71), and clear errors."""

from __future__ import annotations

import dataclasses
import json
from fractions import Fraction

import pytest

from nestlearn.levels import NEVER, Clock, Level, segments


@pytest.mark.parametrize("period", [1, 2, 3, 7, 64])
@pytest.mark.parametrize("offset", [0, 1, 5])
def test_clock_agrees_with_counting(period, offset):
    clock = Clock(period, offset)
    expected = [i for i in range(200) if i > offset and (i - offset) % period == 0]
    assert [i for i in range(200) if clock.due(i)] == expected
    for start in (0, 1, 4, 6, 63, 64, 65):
        assert list(clock.boundaries(start, 150)) == [i for i in expected if start < i <= 150]
        assert clock.until(start) == next(i for i in expected + [10**6] if i > start) - start
        last = max([i for i in expected if i <= start], default=min(start, offset))
        assert clock.elapsed(start) == start - last


def test_step_zero_is_never_due():
    assert not Clock(1).due(0)
    assert not Clock(4).due(0)


def test_never():
    clock = Clock(NEVER)
    assert clock.frequency == 0
    assert not any(clock.due(i) for i in (0, 1, 10**12))
    assert list(clock.boundaries(0, 10**12)) == []
    assert Clock(3).frequency == Fraction(1, 3)


def test_segments_cover_and_cut_at_every_due_step():
    clocks = [Clock(4), Clock(6), Clock(NEVER)]
    for start in range(13):
        for stop in range(start, 30):
            pieces = segments(clocks, start, stop)
            covered = [i for a, b in pieces for i in range(a, b)]
            assert covered == list(range(start, stop))
            for a, b in pieces:
                assert not any(clock.due(i) for clock in clocks for i in range(a + 1, b))


@pytest.mark.parametrize("bad", [0, -3, 1.5, "4", True, None])
def test_clock_refuses(bad):
    with pytest.raises(ValueError, match="period"):
        Clock(bad)


def test_clock_refuses_offset():
    with pytest.raises(ValueError, match="offset"):
        Clock(4, -1)


def test_clock_is_a_value():
    assert Clock(4) == Clock(4) and hash(Clock(4)) == hash(Clock(4))
    with pytest.raises(dataclasses.FrozenInstanceError):
        Clock(4).period = 5


def test_level_unit_follows_error():
    assert Level(4).unit == "step"
    assert Level(4, error="context").unit == "token"
    assert Level(4).with_error("online") == Level(4, error="online", unit="token")
    assert Level(8).clock == Clock(8)
    assert json.loads(json.dumps(dataclasses.asdict(Level(4, name="a"))))["name"] == "a"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"period": 0}, "period"),
        ({"name": "a.b"}, "name"),
        ({"name": ""}, "name"),
        ({"error": "inner"}, "error must be one of"),
        ({"unit": "token"}, "leave unit out"),
        ({"unit": "step", "error": "context"}, "in tokens"),
        ({"unit": "epoch"}, "unit='epoch'"),
        ({"fate": "forget"}, "fate"),
        ({"eta": -1.0}, "eta"),
        ({"eta": float("nan")}, "eta"),
        ({"lr_scale": float("inf")}, "lr_scale"),
        ({"meta_rate": 1.5}, "meta_rate"),
    ],
)
def test_level_refuses(settings, message):
    with pytest.raises(ValueError, match=message):
        Level(**settings)
