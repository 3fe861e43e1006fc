"""Every system is a flag of every item, with as many parameters as the others."""

from __future__ import annotations

import pytest
import torch

from nestlearn.evals.harness.systems import SYSTEMS, Size, System, build
from nestlearn.evals.harness.trained import Trained
from nestlearn.evals.registry import experiment


def sizes(item: Trained, task: str) -> dict[str, int]:
    """Parameters of all systems, built without memory for them."""
    found = {}
    for name in item.compared:
        with torch.device("meta"):
            model = item.model(name, item.tasks()[task], item.plan_of(task))
        found[name] = sum({id(p): p.numel() for p in model.parameters()}.values())
    return found


@pytest.mark.parametrize("scale", ["tiny", "small", "paper"])
@pytest.mark.parametrize("name", ["table4", "table5", "few_shot", "mqar"])
def test_every_system_can_be_built_at_one_size(name, scale):
    item = experiment(name, scale)
    assert isinstance(item, Trained)
    # The narrowest model leaves least room for a mixer; mqar has several widths.
    task = next(iter(item.tasks()))
    found = sizes(item, task)
    assert set(found) >= set(SYSTEMS)
    assert max(found.values()) < 1.025 * min(found.values())


@pytest.mark.parametrize("name", ["table1", "table2", "fig9"])
def test_and_where_texts_are_read(name, shared_data, monkeypatch):
    monkeypatch.setenv("NESTLEARN_DATA", str(shared_data))
    item = experiment(name, "tiny")
    task = next(iter(item.tasks()))
    found = sizes(item, task)
    found.pop("armt", None)  # has its memory on top: docs/reproduce.md
    assert set(found) >= set(SYSTEMS)
    assert max(found.values()) < 1.025 * min(found.values())


def test_a_narrow_memory_only_where_it_must_be():
    def width(name: str, heads: int) -> int:
        return build(name, Size(64, 1, heads), 16, 64).config.memory_width

    assert width("titans_mac", heads=2) == 32
    assert width("titans_mac", heads=4) is None
    assert width("titans_mal", heads=2) is None


def test_patterns_have_a_layer_of_each():
    model = build("samba", Size(64, 1, 2), 16, 64)
    assert model.config.layer_mixers == ["mamba2", "attention"]


def test_too_large_a_mixer_is_still_an_error():
    with pytest.raises(ValueError, match="titans_mac' alone needs more parameters"):
        build("titans_mac", Size(64, 1, 2, parameters=20_000), 16, 64)
    with pytest.raises(ValueError, match="eta_max"):
        build(System("x", {"mixer": "titans_mac"}, narrow=True), Size(64, 1, 2), 16, 64, eta_max=0)
