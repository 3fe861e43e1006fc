"""HopeConfig: validation, presets, parameter counts."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoConfig

from nestlearn.models.hope import HopeConfig, HopeForCausalLM
from nestlearn.nn.mixers import DEEP_MEMORIES, MIXERS
from nestlearn.nn.presets import PRESETS

NOMINAL = {"tiny": 0.13e6, "small": 1.0e6, "140m": 140e6, "760m": 760e6, "1.3b": 1.3e9}


@pytest.mark.parametrize("name", list(NOMINAL))
@pytest.mark.parametrize(
    "mixer",
    ["self_modifying", "attention", "gated_deltanet", "ttt_mlp", "rwkv7", "samba", "srwm"],
)
def test_presets_have_their_size_with_any_mixer(name, mixer):
    with torch.device("meta"):
        model = HopeForCausalLM(HopeConfig.preset(name, mixer=mixer))
    count = sum(p.numel() for p in model.parameters())
    assert abs(count / NOMINAL[name] - 1) < 0.03
    assert sum(model.num_parameters_by_part().values()) == count


def test_preset_overrides_keep_the_proportions():
    wide = HopeConfig.preset("small", mixer="attention", hidden_size=256)
    ratio = HopeConfig.preset("small", mixer="attention").intermediate_size / 128
    assert wide.intermediate_size / 256 == pytest.approx(ratio, rel=0.02)
    assert (
        HopeConfig.preset("tiny", mixer="attention", intermediate_size=40).intermediate_size == 40
    )
    assert HopeConfig.preset("tiny", mixer="attention", vocab_size=5_000).bos_token_id is None


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"hiden_size": 3}, "hidden_size"),
        ({"temperature": 0.5}, "temperature"),
        ({"mixer": "atention"}, "attention"),
        ({"mixer": []}, "empty list"),
        ({"mixer": ["mamba2", "samba"]}, "pattern of layers"),
        ({"mixer": "sambaa"}, "did you mean 'samba'"),
        ({"mixer": ["mamba2", "titans"], "sliding_window": 8}, "belongs to 'attention'"),
        ({"hidden_size": 30}, "num_attention_heads"),
        ({"cms_periods": []}, "cms_periods"),
        ({"cms_periods": [4, 1]}, "fastest"),
        ({"cms_kind": "parallel"}, "sequential"),
        ({"memory_objective": "l1"}, "dot"),
        ({"memory_targets": "own"}, "generated, shared"),
        ({"memory_truncate": 1}, "memory_truncate"),
        ({"memory_half_lives": [100, 10]}, "shortest first"),
        ({"memory_retention": "one"}, "initial, zero"),
        ({"memory_adaptive": ["k", "z"]}, "memory_adaptive"),
        ({"eta_max": float("inf")}, "eta_max"),
        ({"write_threshold": 1}, "write_threshold"),
        ({"counters": -1}, "counters"),
        ({"counters": 4, "mixer": "titans"}, "belongs to 'self_modifying'"),
        ({"counter_noise": "much"}, "counter_noise"),
        ({"counter_noise": 0.1}, "0 with counters=0"),
        ({"allow_neg_eigval": 1, "mixer": "deltanet"}, "allow_neg_eigval"),
        ({"allow_neg_eigval": True}, "belongs to 'deltanet', 'gated_deltanet', 'comba'"),
        ({"memory_chunk": 0}, "memory_chunk"),
        ({"memory_momentum": 1}, "memory_momentum"),
        ({"hidden_act": "sillu"}, "hidden_act"),
        ({"mixer": "titans", "memory_depth": 3}, "belongs to 'self_modifying'"),
        ({"sliding_window": 8}, "belongs to 'attention'"),
        ({"vocab_size": 10, "pad_token_id": 10}, "vocabulary"),
        ({"num_hidden_layers": 2.0}, "num_hidden_layers"),
        ({"mixer": "samba", "num_hidden_layers": 1}, "at least 2 with mixer 'samba'"),
        ({"mixer": "deltanet", "memory_width": 8}, "belongs to 'self_modifying', 'ttt_mlp'"),
    ],
)
def test_mistakes_are_named(settings, said):
    with pytest.raises(ValueError, match=said):
        HopeConfig(**settings)


def test_unknown_preset_lists_the_known():
    with pytest.raises(ValueError, match="tiny, small, 140m"):
        HopeConfig.preset("huge")


def test_round_trip_and_auto(tmp_path):
    config = HopeConfig.preset("small", mixer="attention", cms_periods=[1, 8], sliding_window=9)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, HopeConfig)
    ours = list(HopeConfig.__annotations__)
    assert {k: getattr(loaded, k) for k in ours} == {k: getattr(config, k) for k in ours}


def test_a_key_from_another_version_is_refused(tmp_path):
    HopeConfig.preset("tiny", mixer="attention").save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "memory_depht": 3}))
    with pytest.raises(ValueError, match="memory_depth"):
        HopeConfig.from_pretrained(tmp_path)


def test_options_reach_the_layers_that_read_them():
    mixers = ["gated_deltanet", "titans", "self_modifying"]
    fields = {"allow_neg_eigval": True, "counters": 3, "counter_noise": 0.1}
    config = HopeConfig.preset("tiny", mixer=mixers, num_hidden_layers=3, **fields)
    delta, titans, hope = (block.mixer for block in HopeForCausalLM(config).model.blocks)
    assert (delta.spec.eta_max, titans.spec.eta_max) == (2.0, 1.0)
    assert (hope.counters, hope.counter_noise) == (3, 0.1)


@pytest.mark.parametrize("name", MIXERS)
def test_deep_memories_have_the_width_that_is_set(name):
    deep = name in PRESETS and PRESETS[name].depth > 1 or name.startswith("titans_")
    assert deep == (name in DEEP_MEMORIES)
    if deep:
        config = HopeConfig.preset("tiny", mixer=name, memory_width=21)
        mixer = HopeForCausalLM(config).model.blocks[0].mixer
        memory = getattr(mixer, "memory", mixer)
        assert memory.initial[0].shape[1] == memory.initial[-1].shape[2] == 21


def test_layers_take_turns(tmp_path):
    config = HopeConfig.preset("small", mixer="samba", num_hidden_layers=3)
    assert config.layer_mixers == ["mamba2", "attention", "mamba2"]
    assert config.sliding_window == 1_024
    model = HopeForCausalLM(config)
    kinds = [type(block.mixer).__name__ for block in model.model.blocks]
    assert kinds == ["Mamba2", "CausalSelfAttention", "Mamba2"]
    assert model.model.blocks[1].mixer.window == 1_024
    config = HopeConfig.preset("small", mixer=("titans", "attention"), sliding_window=8)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert loaded.mixer == ["titans", "attention"] and loaded.sliding_window == 8
