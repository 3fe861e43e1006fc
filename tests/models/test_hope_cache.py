"""HopeCache: rows, copies, freezing, files."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from nestlearn.models.hope import HopeCache, HopeConfig, HopeForCausalLM, HopeModel

SIZES = {
    "vocab_size": 31,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "memory_chunk": 4,
    "projection_chunk": 4,
}


def make(mixer: str, **overrides) -> HopeForCausalLM:
    return HopeForCausalLM(HopeConfig(mixer=mixer, **{**SIZES, **overrides})).eval()


@pytest.fixture(params=["attention", "self_modifying"])
def model(request):
    return make(request.param)


def ids(*shape):
    return torch.randint(31, shape)


def test_counts_its_own_tokens_and_rows(model):
    cache = HopeCache()
    assert cache.get_seq_length() == 0 and cache.batch_size == -1 and not cache.is_initialized
    model(ids(2, 5), past_key_values=cache)
    model(ids(2, 3), past_key_values=cache)
    assert cache.get_seq_length() == 8 and cache.batch_size == 2 and len(cache) == 2
    assert cache.nbytes > 0 and "tokens=8" in repr(cache)
    assert cache.get_max_length() == -1 and not cache.is_compileable
    cache.reset()
    assert cache.get_seq_length() == 0 and len(cache) == 0


def test_rows_are_selected_repeated_and_reordered(model):
    cache = model(ids(3, 6)).past_key_values
    single = [cache.copy() for _ in range(3)]
    for row, one in enumerate(single):
        one.batch_select_indices(torch.tensor([row]))
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([4, 0, 1, 2]))
    assert cache.batch_size == 4
    more = ids(1, 5)
    got = model(more.expand(4, -1), past_key_values=cache).logits
    for position, row in enumerate([2, 0, 0, 1]):
        expected = model(more, past_key_values=single[row].copy()).logits[0]
        torch.testing.assert_close(got[position], expected, atol=1e-5, rtol=1e-5)


def test_a_copy_is_independent(model):
    cache = model(ids(1, 6)).past_key_values
    kept = cache.copy()
    before = {k: v.clone() for k, v in kept._flatten().items()}
    model(ids(1, 9), past_key_values=cache)
    assert kept.get_seq_length() == 6
    assert all(torch.equal(v, before[k]) for k, v in kept._flatten().items())


def test_detach_cuts_the_graph(model):
    cache = model(ids(1, 6), use_cache=True).past_key_values
    assert any(t.requires_grad for s in cache._present() for t in s.tensors())
    assert not any(t.requires_grad for s in cache.detach()._present() for t in s.tensors())


def test_it_cannot_unread(model):
    cache = model(ids(1, 6)).past_key_values
    assert not cache.is_croppable
    cache.crop(0)
    with pytest.raises(ValueError, match="un-read"):
        cache.crop(2)
    with pytest.raises(ValueError, match="un-read"):
        cache.activate_past_recording()


def test_a_frozen_memory_is_read_but_not_written():
    model = make("self_modifying")
    cache = model(ids(1, 10)).past_key_values
    weights = [t.clone() for t in memories(cache)]
    cache.freeze()
    assert cache.frozen
    first = model(ids(1, 12), past_key_values=cache).logits
    assert cache.get_seq_length() == 22 and first.isfinite().all()
    assert all(torch.equal(a, b) for a, b in zip(weights, memories(cache), strict=True))
    cache.unfreeze()
    model(ids(1, 12), past_key_values=cache)
    assert not all(torch.equal(a, b) for a, b in zip(weights, memories(cache), strict=True))


def test_freezing_before_the_first_token():
    model = make("self_modifying")
    cache = HopeCache().freeze()
    assert cache.frozen
    model(ids(2, 9), past_key_values=cache)
    fresh = model.init_cache(2)
    assert cache.frozen
    assert all(torch.equal(a, b) for a, b in zip(memories(fresh), memories(cache), strict=True))


def test_attention_has_nothing_to_freeze():
    cache = make("attention")(ids(1, 4)).past_key_values
    with pytest.raises(ValueError, match="nothing to freeze"):
        cache.freeze()
    assert not cache.frozen


def memories(cache: HopeCache) -> list[torch.Tensor]:
    """Fast weights of all memories (not the short-term history in front of them)."""
    flat = cache._flatten()
    return [flat[name] for name in sorted(flat) if ".weights." in name]


def test_recurrent_state_keeps_its_size():
    model = make("self_modifying")
    cache = HopeCache()
    model(ids(1, 7), past_key_values=cache)
    before = cache.nbytes
    model(ids(1, 90), past_key_values=cache)
    assert cache.nbytes == before


def test_file_of_another_model_is_refused(model, tmp_path):
    file = tmp_path / "memory.safetensors"
    cache = model(ids(1, 6)).past_key_values
    cache.save(file, model)
    other = make(model.config.mixer)
    with pytest.raises(ValueError, match="other weights"):
        HopeCache.load(file, other)
    assert HopeCache.load(file, other, strict=False).get_seq_length() == 6
    with pytest.raises(ValueError):
        HopeCache.load(file, make(model.config.mixer, hidden_size=32), strict=False)


def test_damaged_and_foreign_files_are_refused(model, tmp_path):
    file = tmp_path / "memory.safetensors"
    with pytest.raises(ValueError, match="no state file"):
        HopeCache.load(file, model)
    with pytest.raises(ValueError, match="nothing to save"):
        HopeCache().save(file, model)
    cache = model(ids(1, 6)).past_key_values
    cache.save(file, model)
    raw = bytearray(file.read_bytes())
    raw[-3] ^= 1
    file.write_bytes(bytes(raw))
    with pytest.raises(ValueError, match="damaged"):
        HopeCache.load(file, model)
    file.write_bytes(b"not a state")
    with pytest.raises(ValueError, match="not a readable"):
        HopeCache.load(file, model)
    save_file({"x": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match="not a Hope state"):
        HopeCache.load(file, model)


def test_file_belongs_to_base_and_head_alike(model, tmp_path):
    file = tmp_path / "memory.safetensors"
    model(ids(1, 6)).past_key_values.save(file, model)
    base: HopeModel = model.model
    assert HopeCache.load(file, base).get_seq_length() == 6
    assert any(name.startswith("layers.1.mixer.") for name in load_file(file))


def test_a_foreign_or_wrong_sized_cache_is_refused(model):
    from transformers import DynamicCache

    with pytest.raises(ValueError, match="HopeCache"):
        model(ids(1, 4), past_key_values=DynamicCache())
    cache = model(ids(1, 4)).past_key_values
    with pytest.raises(ValueError, match="rows"):
        model(ids(2, 4), past_key_values=cache)
