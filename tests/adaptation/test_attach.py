"""Adapting changes nothing until something is learned, and can be taken back to the bit."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import nestlearn as nl
from nestlearn.adaptation import adapt_to, adaptation_of
from nestlearn.adaptation.added import KEYS
from tests.adaptation.conftest import BLOCKS, FAMILIES, HIDDEN, WIDTH, tiny_model

METHODS = ("added", "placement")
TOKENS = torch.randint(256, (2, 20), generator=torch.Generator().manual_seed(3))  # as `ids`


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids).logits


def fill(model: Any, seed: int = 0, size: float = 0.3, slots: int = 6) -> nl.Memory:
    """A memory with something in every level and target; keys are those of places in `ids`."""
    handle = adaptation_of(model)
    memory = handle.new_memory("test")
    generator = torch.Generator().manual_seed(seed)
    with handle.inactive():
        places = keys_of(model, TOKENS)
    for name, target in handle.targets.items():
        for level in target.levels:
            shape = target.weight.shape
            change = torch.zeros(shape)
            if name.endswith(KEYS):
                found = places[name.removesuffix(KEYS)]
                chosen = torch.randperm(len(found), generator=generator)[:slots]
                change[:slots] = found[chosen]
            elif handle.method == "added":
                change[:slots] = torch.randn(slots, shape[1], generator=generator) * 4 * size
            else:
                change = size / 6 * torch.randn(shape, generator=generator)
            memory.changes.setdefault(level, {})[name] = change
    return memory


def keys_of(model: Any, ids: Tensor) -> dict[str, Tensor]:
    """k at every place of a text, by the formula, from what the MLP gets."""
    handle = adaptation_of(model)
    found: dict[str, Tensor] = {}
    hooks = []
    for name, projection in handle.fixed.items():

        def hook(module: Any, inputs: Any, y: Tensor, n: str = name, p: Any = projection) -> None:
            k = inputs[0].float().reshape(-1, p.shape[1]) @ p.T
            found[n] = k / k.norm(dim=-1, keepdim=True)

        hooks.append(model.get_submodule(name).register_forward_hook(hook))
    logits(model, ids)
    for one in hooks:
        one.remove()
    return found


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_adapt_and_unadapt_keep_every_bit(family: str, method: str, ids: Tensor) -> None:
    model = tiny_model(family)
    before, names = logits(model, ids), sorted(model.state_dict())
    weights = copy.deepcopy(model.state_dict())
    required = [p.requires_grad for p in model.parameters()]
    assert nl.adapt(model, method=method, rank=4) is model
    assert torch.equal(logits(model, ids), before)
    adaptation_of(model).show(fill(model))
    assert not torch.allclose(logits(model, ids), before, atol=1e-3)
    assert nl.unadapt(model) is model
    assert torch.equal(logits(model, ids), before)
    assert sorted(model.state_dict()) == names
    assert all(torch.equal(weights[n], t) for n, t in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == required


@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_models_too(method: str, ids: Tensor) -> None:
    model = tiny_model(dtype=torch.bfloat16)
    before = logits(model, ids)
    nl.adapt(model, method=method, rank=4)
    assert torch.equal(logits(model, ids), before)
    adaptation_of(model).show(fill(model))
    nl.unadapt(model)
    assert torch.equal(logits(model, ids), before)


def test_an_added_memory_is_the_stated_map(model: Any, ids: Tensor) -> None:
    """The equation of `AddedMemory`, place by place and slot by slot."""
    nl.adapt(model, rank=3, slots=9, memories=2, frozen=0.25)
    handle = adaptation_of(model)
    memory = fill(model)
    handle.show(memory)
    name = handle.sites[1].output
    memory.changes["keys"][name + KEYS][2] *= 3  # a longer key answers louder
    handle.show(memory)
    seen: dict[str, Tensor] = {}
    hook = model.get_submodule(name).register_forward_hook(
        lambda module, inputs, output: seen.update(h=inputs[0], y=output)
    )
    logits(model, ids)
    hook.remove()
    weight, projection = model.get_submodule(name).weight, memory.fixed[name]
    values = sum(own[name] for level, own in memory.changes.items() if level != "keys")
    keys = memory.changes["keys"][name + KEYS]
    most = 0
    for h, y in zip(seen["h"].flatten(0, 1), seen["y"].flatten(0, 1), strict=True):
        k = projection @ h
        near = []
        for key in keys:
            cosine = 0.0 if not key.any() else float(k @ key / k.norm() / key.norm())
            near.append(max(0.0, cosine - 0.6) / 0.4)
        total = max(1.0, sum(near))
        most = max(most, sum(a > 0 for a in near))
        shares = [a / total * key.norm() for a, key in zip(near, keys, strict=True)]
        added = sum(a * v for a, v in zip(shares, values, strict=True))
        torch.testing.assert_close(y, weight @ h + added, atol=1e-4, rtol=1e-4)
    assert most > 1  # the sum is over several slots somewhere


def test_placement_gives_fast_levels_to_the_last_blocks(model: Any) -> None:
    levels = [nl.Level(period=512, name="slow"), nl.Level(period=64, name="fast")]
    nl.adapt(model, levels, method="placement", frozen=0.25)
    handle = adaptation_of(model)
    assert [s.block for s in handle.frozen_sites] == [0]
    owner = {n.split(".")[2]: t.levels for n, t in handle.targets.items()}
    assert owner == {"1": ("slow",), "2": ("slow",), "3": ("fast",)}
    assert not model.model.layers[0].mlp.up_proj.weight.requires_grad
    assert model.model.layers[3].mlp.up_proj.weight.requires_grad
    assert not model.model.layers[3].self_attn.q_proj.weight.requires_grad


def test_nothing_below_the_lowest_learning_block_is_differentiated(model: Any, ids: Tensor) -> None:
    nl.adapt(model, rank=2, frozen=0.5)
    adaptation_of(model).show(fill(model))
    reached = []
    for i, layer in enumerate(model.model.layers):
        layer.register_forward_hook(
            lambda module, inputs, output, i=i: reached.append((i, output.requires_grad))
        )
    model(ids)
    assert reached == [(0, False), (1, False), (2, True), (3, True)]


@pytest.mark.parametrize("method", METHODS)
def test_inactive_levels_leave_the_base_model(method: str, model: Any, ids: Tensor) -> None:
    before = logits(model, ids)
    nl.adapt(model, method=method, rank=4)
    handle = adaptation_of(model)
    handle.show(fill(model))
    learned = logits(model, ids)
    with handle.inactive():
        assert torch.equal(logits(model, ids), before)
    assert torch.equal(logits(model, ids), learned)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["Llama", "GPT2"])
def test_rows_have_memories_of_their_own(family: str, method: str, ids: Tensor) -> None:
    model = tiny_model(family)
    nl.adapt(model, method=method, rank=4)
    handle = adaptation_of(model)
    first, second = fill(model, 1), fill(model, 2)
    alone = []
    for memory in (first, None, second):
        handle.show(memory)
        alone.append(logits(model, ids[:1]))
    handle.show(second)  # must not be seen in rows()
    with handle.rows([first, None, second]):
        together = logits(model, ids[:1].expand(3, -1))
    torch.testing.assert_close(together, torch.cat(alone), atol=2e-4, rtol=2e-4)
    # Nothing leaks: another second memory leaves the first row as it is, bit for bit.
    with handle.rows([first, None, fill(model, 3)]):
        other = logits(model, ids[:1].expand(3, -1))
    assert torch.equal(other[:2], together[:2]) and not torch.equal(other[2], together[2])
    torch.testing.assert_close(logits(model, ids[:1]), alone[2])


def test_rows_generate_and_are_checked(model: Any, ids: Tensor) -> None:
    nl.adapt(model, rank=4)
    handle = adaptation_of(model)
    first, second = fill(model, 1, 0.5), fill(model, 2, 0.5)
    with handle.rows([first, second]):
        both = model.generate(ids[:1].expand(2, -1), max_new_tokens=6, do_sample=False)
        with pytest.raises(ValueError, match="2 memories, the batch has 1 rows"):
            model(ids[:1])
    for row, memory in enumerate((first, second)):
        handle.show(memory)
        alone = model.generate(ids[:1], max_new_tokens=6, do_sample=False)
        assert both[row].tolist()[: alone.shape[1]] == alone[0].tolist()
    other = tiny_model(seed=5)
    nl.adapt(other, rank=4)
    with (
        pytest.raises(ValueError, match="memory 1 does not fit.*another base model"),
        handle.rows([first, fill(other)]),
    ):
        pass


def test_a_memory_brings_its_settings(model: Any, ids: Tensor) -> None:
    nl.adapt(model, [nl.Level(period=8)], rank=3, frozen=0.5, seed=4)
    memory = fill(model)
    adaptation_of(model).show(memory)
    learned = logits(model, ids)
    other = adapt_to(tiny_model(), memory)
    adaptation_of(other).show(memory)
    assert torch.equal(logits(other, ids), learned)
    stranger = tiny_model(seed=9)
    with pytest.raises(ValueError, match="another base model"):
        adapt_to(stranger, memory)
    with pytest.raises(ValueError, match="not adapted"):
        adaptation_of(stranger)


def test_projections_turn_down_what_is_common() -> None:
    from nestlearn.adaptation.keys import _turned_down

    generator = torch.Generator().manual_seed(0)
    random = torch.randn(6, 12, generator=generator)
    common = torch.randn(12, generator=generator)
    for count in (400, 7):  # more tokens than directions, and fewer
        h = torch.randn(count, 1, generator=generator) * common * 2
        h = h + 0.5 * torch.randn(count, 12, generator=generator)
        keys = _turned_down(random, h, 0.1)
        # The closed form, from the definition (projections are rounded to few bits).
        c = 0.1 * h.square().sum() / count / 12
        inverse = torch.linalg.inv(torch.eye(12) + h.T @ h / count / c)
        expected = random @ inverse
        torch.testing.assert_close(
            torch.nn.functional.cosine_similarity(keys.flatten(), expected.flatten(), 0),
            torch.tensor(1.0), atol=2e-3, rtol=0,
        )  # fmt: skip
        assert (keys @ common).norm() / keys.norm() < 0.2 * (random @ common).norm() / random.norm()


def test_generated_text_has_its_own_random_numbers(model: Any) -> None:
    from nestlearn.adaptation.keys import generate_text

    torch.manual_seed(1)
    first = generate_text(model, rows=3, length=5, seed=7)
    after = torch.rand(())
    torch.manual_seed(1)
    assert torch.equal(after, torch.rand(()))
    assert first.shape == (3, 5)
    assert torch.equal(first, generate_text(model, rows=3, length=5, seed=7))
    assert not torch.equal(first, generate_text(model, rows=3, length=5, seed=8))


def test_wrong_settings_are_refused(model: Any) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"method": "lora"}, "method must be one of added, placement"),
        ({"rank": 0}, "rank must be 1 or more"),
        ({"slots": 0}, "slots must be 1 or more"),
        ({"memories": 0}, "memories must be 1 or more"),
        ({"memories": 3, "frozen": 0.5}, "3 memories do not fit beside 2 blocks"),
        ({"levels": [nl.Level(period=8, name="keys")]}, "cannot be named 'keys'"),
        ({"frozen": 1.0}, "frozen is a share"),
        ({"levels": []}, "levels must be a list"),
        ({"levels": [64]}, "levels must be a list"),
        ({"levels": [nl.Level(period=8), nl.Level(period=8)]}, "different names or periods"),
        ({"calibration": "wikipedia"}, "calibration must be"),
        ({"method": "placement", "frozen": 0.5}, "3 levels cannot be placed on 2 blocks"),
    ]
    for settings, message in cases:
        with pytest.raises(ValueError, match=message):
            nl.adapt(model, **settings)
    with pytest.raises(ValueError, match="not adapted; call nl.adapt"):
        nl.unadapt(model)
    nl.adapt(model, rank=2)
    with pytest.raises(ValueError, match="adapted already"):
        nl.adapt(model)


def test_generate_compile_and_beams_still_work(model: Any, ids: Tensor) -> None:
    plain = model.generate(ids, max_new_tokens=5, num_beams=2, do_sample=False)
    nl.adapt(model, rank=2)
    assert torch.equal(model.generate(ids, max_new_tokens=5, num_beams=2, do_sample=False), plain)
    adaptation_of(model).show(fill(model, size=0.02))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids).logits, model(ids).logits)


def test_peft_on_top(model: Any, ids: Tensor) -> None:
    peft = pytest.importorskip("peft")
    nl.adapt(model, rank=2)
    adaptation_of(model).show(fill(model))
    learned = logits(model, ids)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    torch.testing.assert_close(logits(wrapped, ids), learned)
    wrapped(ids, labels=ids).loss.backward()
    grads = {n for n, p in wrapped.named_parameters() if p.grad is not None}
    assert grads and all("lora" in n for n in grads)
    assert adaptation_of(wrapped) is adaptation_of(model)


def test_trainer_trains_the_memories(model: Any, ids: Tensor, tmp_path: Any) -> None:
    """Keys are written by a learner; Trainer goes on with the values of those there are."""
    from transformers import Trainer, TrainingArguments

    base = logits(model, ids)
    nl.adapt(model, rank=2)
    adaptation_of(model).show(fill(model))
    before = logits(model, ids)
    data = [{"input_ids": row, "labels": row} for row in ids]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, report_to=[], use_cpu=True, learning_rate=0.1,
        per_device_train_batch_size=2, disable_tqdm=True,
    )  # fmt: skip
    frozen = model.model.layers[0].mlp.down_proj.weight.clone()
    Trainer(model, arguments, train_dataset=data).train()
    assert torch.equal(model.model.layers[0].mlp.down_proj.weight, frozen)
    assert not torch.equal(logits(model, ids), before)
    nl.unadapt(model)
    assert torch.equal(logits(model, ids), base)


def test_layout_counts(model: Any) -> None:
    nl.adapt(model, rank=5, slots=7, memories=2, frozen=0.5)
    handle = adaptation_of(model)
    assert [s.block for s in handle.sites] == [2, 3] and len(handle.frozen_sites) == BLOCKS - 2
    assert handle.layout.rank == 5
    shapes = {n.endswith(KEYS): s for n, s in handle.layout.shapes.items()}
    assert len(handle.layout.shapes) == 4 and shapes == {False: (7, WIDTH), True: (7, 5)}
    assert {tuple(k.shape) for k in handle.fixed.values()} == {(5, HIDDEN)}


def test_copies_and_pickles_are_models_of_their_own(model: Any, ids: Tensor, tmp_path: Any) -> None:
    base = logits(model, ids)
    nl.adapt(model, rank=4)
    adaptation_of(model).show(fill(model))
    learned = logits(model, ids)
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    for twin in (copy.deepcopy(model), loaded):
        assert torch.equal(logits(twin, ids), learned)
        adaptation_of(twin).show(fill(twin, seed=8))
        with adaptation_of(twin).inactive():
            assert torch.equal(logits(twin, ids), base)
            assert torch.equal(logits(model, ids), learned)
        nl.unadapt(twin)
        assert torch.equal(logits(twin, ids), base) and torch.equal(logits(model, ids), learned)
