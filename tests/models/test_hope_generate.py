"""generate(): greedy, sampling, beams, streaming, and going on with a carried memory."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.generation.streamers import BaseStreamer

from nestlearn.models.hope import HopeCache, HopeConfig, HopeForCausalLM

SIZES = {
    "vocab_size": 31,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "memory_chunk": 4,
    "projection_chunk": 2,
    "pad_token_id": 0,
}
GREEDY = {"max_new_tokens": 6, "do_sample": False}


@pytest.fixture(params=["attention", "self_modifying", "gated_deltanet"])
def model(request, tmp_path):
    """A model as a user gets it: from a folder, through the Auto class."""
    HopeForCausalLM(HopeConfig(mixer=request.param, **SIZES)).save_pretrained(tmp_path)
    return AutoModelForCausalLM.from_pretrained(tmp_path).double().eval()


def ids(*shape):
    return torch.randint(1, 31, shape)


def test_left_padded_batch_equals_single_prompts(model):
    prompts = [ids(1, n) for n in (7, 4, 1)]
    batch, mask = torch.zeros(3, 7, dtype=torch.long), torch.zeros(3, 7, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        batch[row, 7 - prompt.shape[1] :], mask[row, 7 - prompt.shape[1] :] = prompt[0], 1
    together = model.generate(batch, attention_mask=mask, **GREEDY)
    for row, prompt in enumerate(prompts):
        alone = model.generate(prompt, **GREEDY)
        assert torch.equal(together[row, 7:], alone[0, prompt.shape[1] :])


def test_beams_equal_beams_without_state(model):
    prompt = ids(2, 5)
    settings = {"num_beams": 3, "num_return_sequences": 2, **GREEDY}
    kept = model.generate(prompt, **settings)
    assert torch.equal(kept, model.generate(prompt, use_cache=False, **settings))


def test_sampling_is_seeded_and_takes_a_config(model):
    config = GenerationConfig(
        max_new_tokens=8, do_sample=True, temperature=0.9, top_p=0.9, num_return_sequences=3
    )
    texts = []
    for _ in range(2):
        torch.manual_seed(7)
        texts.append(model.generate(ids(1, 1) * 0 + 5, generation_config=config))
    assert texts[0].shape[0] == 3
    assert torch.equal(*texts)


def test_streamer_gets_every_token(model):
    class Collect(BaseStreamer):
        def __init__(self):
            self.tokens, self.ended = [], False

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.ended = True

    streamer = Collect()
    out = model.generate(ids(1, 4), streamer=streamer, **GREEDY)
    assert streamer.tokens == out[0].tolist() and streamer.ended


def test_a_conversation_goes_on_from_the_carried_state(model):
    """Whole text again, or only its new part: both equal reading everything from the start."""
    first = model.generate(ids(1, 5), return_dict_in_generate=True, **GREEDY)
    cache = first.past_key_values
    assert isinstance(cache, HopeCache)
    text = torch.cat([first.sequences, ids(1, 4)], 1)
    expected = model.generate(text, **GREEDY)[:, text.shape[1] :]
    seen = cache.get_seq_length()
    assert seen == first.sequences.shape[1] - 1  # the last token was never read

    whole = model.generate(text, past_key_values=cache.copy(), **GREEDY)
    assert torch.equal(whole[:, text.shape[1] :], expected)
    masked = model.generate(
        text, attention_mask=torch.ones_like(text), past_key_values=cache.copy(), **GREEDY
    )
    assert torch.equal(masked[:, text.shape[1] :], expected)
    new = text[:, seen:]
    only_new = model.generate(new, past_key_values=cache.copy(), **GREEDY)
    assert torch.equal(only_new[:, new.shape[1] :], expected)
    # A continuation longer than what was read is still recognised as new.
    long = ids(1, seen + 9)
    got = model.generate(long, past_key_values=cache.copy(), **GREEDY)
    want = model.generate(torch.cat([text[:, :seen], long], 1), **GREEDY)
    assert torch.equal(got[:, long.shape[1] :], want[:, seen + long.shape[1] :])
    assert cache.get_seq_length() == seen


def test_beams_fork_the_carried_state(model):
    cache = model(ids(1, 5)).past_key_values
    before = cache.copy()
    out = model.generate(
        ids(1, 3), past_key_values=cache, num_beams=2, return_dict_in_generate=True, **GREEDY
    )
    assert cache.get_seq_length() == 5 and cache.batch_size == 1
    assert out.past_key_values.batch_size == 2
    again = model.generate(ids(1, 3) * 0 + 4, past_key_values=before.copy(), num_beams=2, **GREEDY)
    full = model.generate(ids(1, 3) * 0 + 4, past_key_values=before, num_beams=2, **GREEDY)
    assert torch.equal(again, full)


def test_prompt_without_anything_new(model):
    prompt = ids(1, 5)
    cache = model(prompt).past_key_values
    with pytest.raises(ValueError, match="add the new tokens"):
        model.generate(prompt, past_key_values=cache, **GREEDY)


def test_chunked_prefill(model):
    prompt = ids(1, 23)
    whole = model.generate(prompt, **GREEDY)
    cache = HopeCache()
    parts = model.generate(prompt, past_key_values=cache, prefill_chunk_size=5, **GREEDY)
    assert torch.equal(whole, parts)


def test_embeddings_as_prompt(model):
    prompt = ids(1, 5)
    embedded = model.get_input_embeddings()(prompt)
    got = model.generate(inputs_embeds=embedded, **GREEDY)
    assert torch.equal(got, model.generate(prompt, **GREEDY)[:, 5:])


def test_logits_to_keep(model):
    prompt = ids(2, 9)
    full = model(prompt).logits
    torch.testing.assert_close(model(prompt, logits_to_keep=1).logits, full[:, -1:])
    chosen = torch.tensor([0, 4])
    torch.testing.assert_close(model(prompt, logits_to_keep=chosen).logits, full[:, chosen])


def test_assisted_generation_is_refused(model):
    with pytest.raises(ValueError, match="stateful"):
        model.generate(ids(1, 5), assistant_model=model, **GREEDY)
