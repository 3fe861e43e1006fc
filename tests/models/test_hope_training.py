"""The training side of the model: loss, checkpointing, masks, levels."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from nestlearn.models.hope import HopeConfig, HopeForCausalLM, HopeModel, modeling

SIZES = {
    "vocab_size": 31,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "memory_chunk": 4,
    "projection_chunk": 4,
    "cms_periods": [1, 4],
}


def make(mixer="attention", **overrides):
    return HopeForCausalLM(HopeConfig(mixer=mixer, **{**SIZES, **overrides})).double()


def test_loss_in_pieces_is_the_loss(monkeypatch):
    model = make().train()
    ids = torch.randint(31, (3, 17))
    labels = ids.clone()
    labels[0, :5] = -100
    results = []
    for limit in (2**24, 31 * 5):
        monkeypatch.setattr(modeling, "LOGITS_PER_CHUNK", limit)
        model.zero_grad()
        out = model(ids, labels=labels)
        assert out.logits is None
        out.loss.backward()
        results.append((out.loss.detach(), [p.grad.clone() for p in model.parameters()]))
    torch.testing.assert_close(results[0][0], results[1][0])
    for one, two in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(one, two)
    model.eval()
    out = model(ids, labels=labels)
    plain = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(out.loss, plain)
    torch.testing.assert_close(results[0][0], plain.detach())


def test_loss_over_an_accumulated_batch():
    model = make().train()
    ids = torch.randint(31, (2, 9))
    summed = model(ids, labels=ids, num_items_in_batch=1).loss
    torch.testing.assert_close(summed / 16, model(ids, labels=ids).loss)
    nothing = model(ids, labels=torch.full_like(ids, -100)).loss
    assert nothing == 0


def test_right_padding_costs_no_separate_rows(monkeypatch):
    """Without a state to return the padded batch runs as one batch."""
    model = make("self_modifying").train()
    seen = []
    forward = model.model.layers[0].forward
    monkeypatch.setattr(
        model.model.layers[0], "forward", lambda x, s, m: (seen.append(m), forward(x, s, m))[1]
    )
    ids = torch.randint(31, (2, 9))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    loss = model(ids, attention_mask=mask, labels=labels).loss
    assert seen == [None]
    model(ids, attention_mask=mask, use_cache=True)
    assert seen[1] is not None
    rows = [
        model(ids[:1], labels=ids[:1]).loss * 8,
        model(ids[1:, :5], labels=ids[1:, :5]).loss * 4,
    ]
    torch.testing.assert_close(loss, sum(rows) / 12)


def test_state_is_kept_in_training_only_on_request():
    model = make().train()
    ids = torch.randint(31, (1, 6))
    assert model(ids).past_key_values is None
    assert model(ids, use_cache=True).past_key_values.get_seq_length() == 6
    assert model.eval()(ids).past_key_values is not None
    assert model(ids, use_cache=False).past_key_values is None


@pytest.mark.parametrize("mixer", ["attention", "self_modifying"])
def test_truncated_backpropagation_runs(mixer):
    model = make(mixer).train()
    cache = None
    for _ in range(3):
        ids = torch.randint(31, (2, 6))
        out = model(ids, labels=ids, past_key_values=cache, use_cache=True)
        out.loss.backward()
        cache = out.past_key_values.detach()
    assert cache.get_seq_length() == 18


def test_checkpointing_sets_the_chunks_of_recurrent_mixers():
    model = make("self_modifying")
    model.activation_checkpointing_enable()
    assert all(layer.mixer.checkpoint_chunks > 0 for layer in model.model.layers)
    assert all(layer.gradient_checkpointing for layer in model.model.layers)
    model.activation_checkpointing_disable()
    assert all(layer.mixer.checkpoint_chunks == 0 for layer in model.model.layers)


def test_level_parameters_cover_the_continuum_memory():
    model = make()
    levels = model.level_parameters()
    assert list(levels) == ["level1", "level2"]
    inside = {id(p) for layer in model.model.layers for p in layer.cms.parameters()}
    listed = [id(p) for parameters in levels.values() for p in parameters]
    assert len(listed) == len(set(listed)) and set(listed) <= inside


def test_hidden_states_and_tuples():
    model = make().eval()
    ids = torch.randint(31, (1, 5))
    out = model(ids, output_hidden_states=True)
    assert len(out.hidden_states) == 3
    assert torch.equal(model.lm_head(out.hidden_states[-1]), out.logits)
    assert torch.equal(model(ids, return_dict=False)[0], out.logits)


def test_base_model_round_trip_and_head_from_base(tmp_path):
    base = HopeModel(HopeConfig(mixer="attention", **SIZES, tie_word_embeddings=False)).eval()
    base.save_pretrained(tmp_path)
    ids = torch.randint(31, (1, 5))
    expected = base(ids).last_hidden_state
    assert torch.equal(HopeModel.from_pretrained(tmp_path)(ids).last_hidden_state, expected)
    headed = HopeForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(headed.model.eval()(ids).last_hidden_state, expected)
    assert 0.01 < headed.lm_head.weight.std() < 0.03


def test_weights_that_do_not_fit_are_refused(tmp_path):
    make().float().save_pretrained(tmp_path)
    HopeConfig(mixer="attention", **{**SIZES, "num_hidden_layers": 3}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="missing"):
        HopeForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "call",
    [
        lambda m: m(),
        lambda m: m(torch.zeros(1, 3).long(), inputs_embeds=torch.zeros(1, 3, 16)),
        lambda m: m(torch.zeros(1, 0).long()),
        lambda m: m(torch.zeros(1, 3).long(), output_attentions=True),
        lambda m: m(torch.zeros(1, 3).long(), attention_mask=torch.ones(1, 2)),
        lambda m: m(torch.zeros(1, 3).long(), attention_mask=torch.tensor([[1, 0, 1]])),
    ],
)
def test_wrong_calls_are_refused(call):
    with pytest.raises(ValueError):
        call(make())
