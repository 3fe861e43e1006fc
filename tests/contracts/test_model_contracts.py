"""The battery of ARCHITECTURE §3 on the whole model, with every mixer of the registry."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from nestlearn.models.hope import HopeCache, HopeForCausalLM
from nestlearn.nn.mixers import MIXERS

PATTERNS = ["samba", ["gated_deltanet", "attention"]]
EVERY = pytest.mark.parametrize("mixer", [*MIXERS, *PATTERNS], ids=str)
VOCAB = 31


@pytest.fixture
def model(mixer, config_for):
    return HopeForCausalLM(config_for(mixer)).double().eval()


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(VOCAB, shape)


def same_cache(a: HopeCache, b: HopeCache, compare, tolerance: float = 1e-10) -> None:
    assert a.get_seq_length() == b.get_seq_length()
    for left, right in zip(a.states, b.states, strict=True):
        for one, two in zip(left, right, strict=True):
            assert (one is None) == (two is None)
            if one is not None:
                compare(one, two, tolerance)


@EVERY
def test_any_split_gives_the_same(model, chunk, same_state):
    ids = tokens(2, 3 * chunk + 1)
    whole = model(ids)
    for cuts in ([1], [chunk, chunk + 1], list(range(1, ids.shape[1]))):
        cache, pieces = HopeCache(), []
        for part in torch.tensor_split(ids, cuts, dim=1):
            pieces.append(model(part, past_key_values=cache).logits)
        torch.testing.assert_close(torch.cat(pieces, 1), whole.logits, atol=1e-10, rtol=0)
        same_cache(cache, whole.past_key_values, same_state)


@EVERY
def test_padding_is_neutral(model, chunk):
    lengths = [2 * chunk + 1, chunk, 1]
    rows = [tokens(1, n) for n in lengths]
    more = tokens(3, 3)
    for side in ("left", "right"):
        ids = tokens(3, max(lengths))
        mask = torch.zeros_like(ids)
        for row, n in enumerate(lengths):
            where = slice(ids.shape[1] - n, None) if side == "left" else slice(0, n)
            ids[row, where], mask[row, where] = rows[row][0], 1
        out = model(ids, attention_mask=mask)
        plain = model(ids, attention_mask=mask, use_cache=False)
        longer = torch.cat([mask, torch.ones_like(more)], 1)
        after = model(more, attention_mask=longer, past_key_values=out.past_key_values)
        for row, real in enumerate(rows):
            alone = model(torch.cat([real, more[row : row + 1]], 1)).logits[0]
            seen = mask[row].bool()
            n = real.shape[1]
            for got in (out, plain):
                torch.testing.assert_close(got.logits[row][seen], alone[:n], atol=1e-10, rtol=0)
            torch.testing.assert_close(after.logits[row], alone[n:], atol=1e-10, rtol=0)


@EVERY
def test_rows_are_independent(model, chunk):
    ids = tokens(3, 2 * chunk + 2)
    together = model(ids).logits
    for row in range(3):
        alone = model(ids[row : row + 1]).logits
        torch.testing.assert_close(together[row], alone[0], atol=1e-10, rtol=0)


@EVERY
def test_saved_model_is_bit_equal(mixer, config_for, tmp_path):
    model = HopeForCausalLM(config_for(mixer)).eval()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert isinstance(loaded, HopeForCausalLM)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    for (name, one), (_, two) in zip(
        model.state_dict().items(), loaded.state_dict().items(), strict=True
    ):
        assert torch.equal(one, two), name
    ids = tokens(2, 13)
    assert torch.equal(model(ids).logits, loaded(ids).logits)


@EVERY
def test_stored_memory_continues_bit_equal(mixer, config_for, tmp_path, same_state):
    model = HopeForCausalLM(config_for(mixer)).eval()
    cache = model(tokens(2, 11)).past_key_values
    cache.save(tmp_path / "memory.safetensors", model)
    loaded = HopeCache.load(tmp_path / "memory.safetensors", model)
    same_cache(cache, loaded, same_state, 0)
    ids = tokens(2, 9)
    assert torch.equal(
        model(ids, past_key_values=cache).logits, model(ids, past_key_values=loaded).logits
    )
    same_cache(cache, loaded, same_state, 0)


@EVERY
@pytest.mark.parametrize("tied", [True, False])
def test_first_loss_is_that_of_guessing(mixer, tied, config_for):
    config = config_for(
        mixer, hidden_size=64, intermediate_size=256, vocab_size=259, tie_word_embeddings=tied
    )
    model = HopeForCausalLM(config)
    ids = torch.randint(259, (4, 65))
    loss = model(ids, labels=ids).loss.item()
    assert abs(loss - math.log(259)) < 0.15


@EVERY
def test_gradient_reaches_every_parameter(mixer, config_for, chunk):
    model = HopeForCausalLM(config_for(mixer)).train()
    ids = tokens(2, 6 * chunk + 1)
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name} is outside the graph"
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, f"{name} gets no gradient"


@EVERY
def test_checkpointing_changes_nothing(mixer, config_for, chunk):
    model = HopeForCausalLM(config_for(mixer)).double().train()
    ids = tokens(2, 4 * chunk + 2)
    grads = []
    for enable in (False, True):
        if enable:
            model.activation_checkpointing_enable()
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for one, two in zip(*grads, strict=True):
        torch.testing.assert_close(one, two, atol=1e-12, rtol=1e-9)
    model.activation_checkpointing_disable()
    assert not any(getattr(m, "checkpoint_chunks", 0) for m in model.modules())


@EVERY
def test_half_precision_is_close(mixer, config_for, chunk):
    half = HopeForCausalLM(config_for(mixer)).to(torch.bfloat16).eval()
    full = HopeForCausalLM(config_for(mixer)).eval()
    full.load_state_dict({k: v.float() for k, v in half.state_dict().items()})
    ids = tokens(2, 5 * chunk)
    got, expected = half(ids).logits.float(), full(ids).logits
    assert (got - expected).norm() / expected.norm() < 0.05


@EVERY
def test_generation_equals_reading_again(mixer, config_for):
    """Greedy text is the same with the state as when the whole text is read at every step."""
    model = HopeForCausalLM(config_for(mixer)).double().eval()
    settings = {"max_new_tokens": 7, "do_sample": False, "pad_token_id": 0}
    prompt = tokens(2, 6).clamp(min=1)  # 0 would be taken for padding
    with_state = model.generate(prompt, **settings)
    without = model.generate(prompt, use_cache=False, **settings)
    assert torch.equal(with_state, without)


@pytest.mark.parametrize("mixer", ["self_modifying", "attention", "gated_deltanet"])
def test_compiles(mixer, config_for, chunk, needs_compiler):
    """The training step of the whole model, with the loss, without graph breaks."""
    torch._dynamo.reset()
    config = config_for(mixer, num_hidden_layers=1, projection_chunk=chunk)
    model = HopeForCausalLM(config).train()
    ids = tokens(2, chunk + 1)
    expected = model(ids, labels=ids).loss
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    loss = compiled(ids, labels=ids).loss
    torch.testing.assert_close(loss, expected, atol=1e-4, rtol=1e-4)
    loss.backward()
