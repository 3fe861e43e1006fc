"""The cost on writing: the sum it stands for, what it is added to, and what it leaves alone."""

from __future__ import annotations

import pytest
import torch

from nestlearn.evals.harness.task import Batch
from nestlearn.evals.harness.trained import _loss
from nestlearn.models.hope import HopeConfig, HopeForCausalLM
from nestlearn.nn import SelfModifyingTitans
from nestlearn.nn.write_cost import cost_at, count_writes, record_writes


def model(cost: float = 0.0, **fields) -> HopeForCausalLM:
    torch.manual_seed(0)
    config = HopeConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, memory_chunk=4,
        projection_chunk=4, intermediate_size=24, write_cost=cost, **fields,
    )  # fmt: skip
    return HopeForCausalLM(config)


def test_the_sum_by_hand():
    eta, alpha = torch.rand(2, 3, 5), torch.rand(2, 3, 5)
    total = 0.0
    for e, a in zip(eta.flatten().tolist(), alpha.flatten().tolist(), strict=True):
        life = 1 / (1 - a)
        total += e / (e + 0.01) * life / (life + 5)
    assert float(count_writes([(eta, alpha)])) == pytest.approx(total, rel=1e-5)
    assert count_writes([]) == 0


def test_what_counts():
    ever = torch.ones(1, 1, 100)
    large, small = ever, 1e-5 * ever
    assert float(count_writes([(large, ever)])) == pytest.approx(100, rel=0.02)
    assert float(count_writes([(small, ever)])) == pytest.approx(0.1, rel=0.02)
    assert float(count_writes([(large, 0.5 * ever)])) == pytest.approx(2, rel=0.05)  # soon gone


def test_forgetting_has_no_gradient():
    eta, alpha = torch.rand(1, 1, 4, requires_grad=True), torch.rand(1, 1, 4, requires_grad=True)
    count_writes([(eta, alpha)]).backward()
    assert (eta.grad > 0).all() and alpha.grad is None


def test_only_what_is_called_inside_is_collected():
    layer, x = SelfModifyingTitans(16, 2), torch.randn(3, 7, 16)
    with record_writes() as outer:
        layer(x)
        with record_writes() as inner:
            layer(x[:1])
    layer(x)
    assert [e.shape for e, _ in outer] == [(3, 2, 7), (1, 2, 7)]
    assert [a.shape for _, a in inner] == [(1, 2, 7)]


@pytest.mark.parametrize("fields", [{}, {"memory_adaptive": ()}, {"memory_weight_decay": False}])
def test_the_training_loss_has_it_and_nothing_else_changes(fields):
    free, charged = model(**fields), model(0.01, **fields)
    tokens = torch.randint(20, (3, 9))
    labels = tokens.masked_fill(torch.rand(3, 9) < 0.5, -100)
    with record_writes() as written:
        plain = free(input_ids=tokens, labels=labels)
    out = charged(input_ids=tokens, labels=labels)
    count = (labels[:, 1:] != -100).sum()
    assert len(written) == 2 and plain.write_loss is None
    torch.testing.assert_close(out.write_loss, 0.01 * count_writes(written))
    torch.testing.assert_close(out.loss, plain.loss + out.write_loss / count)
    wanted = torch.autograd.grad(
        plain.loss + 0.01 * count_writes(written) / count, [*free.parameters()], allow_unused=True
    )
    found = torch.autograd.grad(out.loss, [*charged.parameters()], allow_unused=True)
    torch.testing.assert_close(found, wanted)
    read = charged.eval()(input_ids=tokens, labels=labels)
    assert read.write_loss is None
    torch.testing.assert_close(read.loss, plain.loss)


def test_accumulated_gradients_are_those_of_the_whole_batch():
    charged, tokens = model(0.01), torch.randint(20, (4, 9))
    whole = torch.autograd.grad(charged(input_ids=tokens, labels=tokens).loss,
                                [*charged.parameters()])  # fmt: skip
    halves = [charged(input_ids=t, labels=t, num_items_in_batch=32).loss for t in tokens.split(2)]
    parts = torch.autograd.grad(sum(halves), [*charged.parameters()])
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-6)


def test_padding_writes_nothing():
    charged = model(0.01)
    a, b = torch.randint(20, (1, 9)), torch.randint(20, (1, 5))
    alone = [charged(input_ids=t, labels=t).write_loss for t in (a, b)]
    tokens = torch.cat([a, torch.nn.functional.pad(b, (4, 0))])
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, :4] = 0
    both = charged(
        input_ids=tokens, attention_mask=mask, labels=tokens.masked_fill(mask == 0, -100)
    )
    torch.testing.assert_close(both.write_loss, sum(alone))


def test_recomputed_activations_give_the_same_gradients():
    charged, tokens = model(0.01), torch.randint(20, (2, 40))
    grads = []
    for again in (False, True):
        if again:
            charged.gradient_checkpointing_enable()
        out = charged(input_ids=tokens, labels=tokens)
        grads.append(torch.autograd.grad(out.loss, [*charged.parameters()]))
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)


def test_experiments_pay_per_answer():
    tokens = torch.randint(20, (3, 9))
    targets = torch.full((3, 9), -100)
    targets[:, -1] = 1
    batch = Batch.of(tokens, targets)
    free, charged = model(), model(0.01)
    more = charged(tokens, use_cache=False).write_loss / 3
    torch.testing.assert_close(_loss(batch, 1.0, charged), _loss(batch, 1.0, free) + more)


def test_a_model_that_pays_learns_to_write_less():
    charged, tokens = model(1.0, write_threshold=0.004), torch.randint(20, (2, 64))
    optimizer = torch.optim.Adam(charged.parameters(), 1e-2)
    counts = []
    for _ in range(60):
        loss = charged(input_ids=tokens).write_loss
        counts.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert counts[-1] < 0.02 * counts[0]


@pytest.mark.parametrize("value", [-1, "much", True, float("inf"), float("nan")])
def test_bad_costs_are_refused(value):
    with pytest.raises(ValueError, match=r"write_cost .*a number >= 0"):
        HopeConfig.preset("tiny", write_cost=value)


def test_a_compiled_layer_is_recorded_too():
    torch._dynamo.reset()
    layer, x = SelfModifyingTitans(8, 1, projection_chunk=4, memory_chunk=4), torch.randn(1, 4, 8)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    grads = []
    for called in (layer, compiled):
        with record_writes() as written:
            called(x)
        assert len(written) == 1
        grads.append(torch.autograd.grad(count_writes(written), layer.gates.eta_bias)[0])
    torch.testing.assert_close(*grads)


def test_the_cost_comes_and_goes() -> None:
    places = torch.linspace(0, 1, 201).tolist()
    shares = [cost_at(p) for p in places]
    highest = shares.index(max(shares))
    assert places[highest] == pytest.approx(0.675) and shares[highest] == pytest.approx(1.0)
    assert not any(share for place, share in zip(places, shares, strict=True) if place < 0.35)
    assert shares[:highest] == sorted(shares[:highest])
    assert shares[highest:] == sorted(shares[highest:], reverse=True)
    assert shares[-1] == cost_at(1.5) == pytest.approx(0.1)  # trained on for longer than planned
