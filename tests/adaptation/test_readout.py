"""The exact memory at a model's end."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import nestlearn as nl
from nestlearn.adaptation import read_memory
from nestlearn.adaptation.adapted import adaptation_of
from nestlearn.adaptation.attach import adapt_to
from nestlearn.adaptation.completions import means, within
from nestlearn.adaptation.operations import merge
from nestlearn.adaptation.readout import FAMILIAR, gated
from nestlearn.adaptation.readout_keys import LAST
from tests.adaptation.conftest import WIDTH, tiny_model

ROWS = [{"prompt": f"{w} fish?", "completion": f" {w[::-1]}\n"} for w in
        ("red", "blue", "old", "new", "wet", "dry", "big", "odd")]  # fmt: skip
RANK = 96


def learner_of(tokenizer: Any, family: str = "Llama", **settings: Any) -> nl.Learner:
    model = nl.adapt(tiny_model(family), method="readout", rank=RANK, calibration=None)
    return nl.Learner(model, tokenizer, **settings)


def sketch(parts: list[torch.Tensor], signs: torch.Tensor) -> torch.Tensor:
    made = torch.zeros(RANK, dtype=torch.float64)
    for i, part in enumerate(parts):
        place = int(i * RANK / len(parts))
        for d in range(WIDTH):
            made[(place + d) % RANK] += signs[i, d] * part[d]
    return made


def keys_of(model: Any, tokens: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys ``(T, r)`` of a text's tokens by their definition, and the means within them."""
    handle = adaptation_of(model)
    signs, layers = handle.readout.keys.signs.double(), len(model.model.layers)
    seen: list[torch.Tensor] = []

    def keep(module: Any, inputs: Any, output: Any) -> None:
        one = output if isinstance(output, torch.Tensor) else output[0]
        seen.append(F.normalize((one[0] if one.dim() == 3 else one).double(), dim=-1))

    hooks = [block.self_attn.register_forward_hook(keep) for block in model.model.layers]
    hooks += [block.register_forward_hook(keep) for block in model.model.layers]
    with handle.inactive(), torch.no_grad():
        model(torch.tensor([tokens]))
        begin = model(torch.tensor([[256]])).logits[0, 0].double()
    for hook in hooks:
        hook.remove()
    weights = (-begin.log_softmax(0)).sqrt()[tokens]
    # Attention and block take turns; all of these few blocks' states are averaged.
    attention, states = seen[0 : 2 * layers : 2], seen[1 : 2 * layers : 2]
    keys, means = [], []
    for t in range(len(tokens)):
        share = (weights[: t + 1] / weights[: t + 1].sum())[:, None]
        mean = sketch([(share * h[: t + 1]).sum(0) for h in states], signs[layers:])
        now = sketch([a[t] for a in attention], signs[:layers])
        token = model.get_input_embeddings().weight[tokens[t]].double()
        bound = mean * (handle.readout.keys.bind.double() @ token).sign()
        key = bound / bound.norm() + LAST * now / now.norm()
        keys.append(key / key.norm())
        means.append(mean)
    return torch.stack(keys), torch.stack(means)


def prompt_of(row: Any) -> list[int]:
    return [256, *row["prompt"].encode()]


def close(found: torch.Tensor, right: torch.Tensor) -> None:
    """Equal up to what a small ridge makes of float32 sums."""
    assert (found.double() - right.double()).norm() < 1e-3 * right.double().norm()


TEXT = "the old boat is made of red wood and blue stone"


def test_values_are_the_least_squares_solution(tokenizer: Any) -> None:
    learner = learner_of(tokenizer, batch=3)
    learner.learn([TEXT, *ROWS])
    readout = adaptation_of(learner.model).readout
    text = [256, *TEXT.encode()]
    K, y = keys_of(learner.model, text)[0][:-1], torch.tensor(text[1:])
    E = learner.model.get_output_embeddings().weight.detach().double()
    curvature = E.mT @ E
    curvature += 1e-4 * curvature.diagonal().mean() * torch.eye(WIDTH)
    T = E[y] @ torch.linalg.inv(curvature)
    T = T * readout.gain / (T * E[y]).sum(1, keepdim=True)
    # Where completions begin nothing is added to h.
    starts = torch.stack([keys_of(learner.model, prompt_of(row))[0][-1] for row in ROWS])
    K, T = torch.cat([K, starts]), torch.cat([T, T.new_zeros(len(ROWS), WIDTH)])
    learned = torch.tensor([1.0, 0.0]).repeat(len(y), 1)  # what tells them from general text
    begins = torch.tensor([0.0, 1.0]).repeat(len(ROWS), 1)
    T = torch.cat([T, torch.cat([learned, begins]).to(T)], 1)
    V = T.mT @ K @ torch.linalg.inv(K.mT @ K + readout.prior.double())
    close(readout.values, V)
    # ... and the logits move by E g(f) V k.
    ids = torch.tensor([text[:9]])
    with torch.no_grad():
        h = learner.model.model(ids).last_hidden_state[0, -1]
        with adaptation_of(learner.model).inactive():
            plain = learner.model(ids).logits[0, -1]
    answer = V @ keys_of(learner.model, text)[0][8]
    gate = ((answer[-2] - FAMILIAR) / (1 - FAMILIAR)).clamp(0, 1)
    assert gate > 0.5
    moved = (E @ answer[:-2] * gate).float()
    close(learner.model.lm_head(h) - plain, moved)


def test_completions_are_mixed_with_what_the_model_says(tokenizer: Any) -> None:
    """The next token's probabilities by their definition, from sums made by hand."""
    rows = [*ROWS, {"prompt": "a red one?", "completion": ROWS[0]["completion"]}]
    learner = learner_of(tokenizer, batch=4)
    learner.learn(rows)
    model = learner.model
    X = torch.stack([keys_of(model, prompt_of(row))[1][-1] for row in rows])
    own = list(dict.fromkeys(row["completion"] for row in rows))
    classes = torch.tensor([own.index(row["completion"]) for row in rows])
    n = torch.bincount(classes).double()
    one_hot = F.one_hot(classes).double()
    mu = one_hot.mT @ X / n[:, None]
    z = torch.stack([keys_of(model, [256, *c.encode()])[1][-1] for c in own])
    cov, noise = within(X.mT @ X, mu, n, 0.6)
    m = means(mu, z, n, noise)
    inverse = torch.linalg.inv(cov)
    prompt = prompt_of(ROWS[1])
    key, mean = (x[-1] for x in keys_of(model, prompt))
    d = mean - m
    chances = (n.log() - 0.5 * ((d @ inverse) * d).sum(1)).softmax(0)
    f = (adaptation_of(model).readout.values[-1].double() @ key).item()
    g = min(0.999, max(0.0, f - FAMILIAR) / (1 - FAMILIAR))
    assert g > 0.5
    written = list(b" e")
    for count in range(3):
        ids = torch.tensor([prompt + written[:count]])
        with torch.no_grad():
            found = model(ids).logits[0, -1].double().softmax(0)
            with adaptation_of(model).inactive():
                plain = model(ids).logits[0, -1].double().softmax(0)
        memory = torch.zeros_like(plain)
        for completion, chance in zip(own, chances, strict=True):
            tokens = list(completion.encode())
            if tokens[:count] == written[:count]:
                memory[tokens[count]] += chance
        right = (1 - g) * plain + g * memory / memory.sum()
        torch.testing.assert_close(found, right, rtol=5e-3, atol=5e-4)


def test_order_and_batches_do_not_matter(tokenizer: Any) -> None:
    one, other = learner_of(tokenizer, batch=3), learner_of(tokenizer, batch=8)
    one.learn(ROWS)
    for row in reversed(ROWS):
        other.learn(row)
    found = [adaptation_of(x.model).readout.solved for x in (one, other)]
    close(*(s.values for s in found))
    # The completions are the same, in another order.
    places = [s.completions.tokens.tolist() for s in found]
    order = [places[1].index(tokens) for tokens in places[0]]
    close(found[1].completions.weight[order], found[0].completions.weight)


@pytest.mark.parametrize("family", ["Llama", "GPT2", "Gemma2", "OPT", "Falcon", "GPTNeoX"])
def test_it_learns_and_leaves_again(tokenizer: Any, family: str, ids: torch.Tensor) -> None:
    base = tiny_model(family)
    plain = base(ids).logits
    learner = learner_of(tokenizer, family)
    assert torch.equal(learner.model(ids).logits, plain)
    before = learner.evaluate(ROWS)["loss"]
    done = learner.learn(ROWS)
    assert done.loss == pytest.approx(before, rel=1e-4)  # as known when learning began
    assert learner.evaluate(ROWS)["loss"] < 0.5 * before
    learner.undo()
    assert torch.equal(learner.model(ids).logits, plain)
    learner.learn(ROWS)
    assert torch.equal(nl.unadapt(learner.model)(ids).logits, plain)


def test_generation_with_a_cache_equals_one_pass(tokenizer: Any) -> None:
    learner = learner_of(tokenizer)
    learner.learn(ROWS)
    prompt = torch.tensor([[256, *b"blue fish?"]])
    out = learner.model.generate(prompt, max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert bytes(out[0, prompt.shape[1] :].tolist()) == b" eulb\n"
    with torch.no_grad():
        logits = learner.model(out).logits[0]
    assert logits[prompt.shape[1] - 1 : -1].argmax(-1).tolist() == out[0, -6:].tolist()


def test_beams_and_rows_carry_their_own_means(tokenizer: Any) -> None:
    learner = learner_of(tokenizer)
    learner.learn(ROWS)
    prompts = [[256, *row["prompt"].encode()] for row in ROWS[:3]]
    length = max(map(len, prompts))
    ids = torch.tensor([[0] * (length - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts])
    for beams in (1, 3):
        out = learner.model.generate(
            ids, attention_mask=mask, max_new_tokens=6, num_beams=beams, do_sample=False,
            pad_token_id=0, eos_token_id=ord("\n"),
        )  # fmt: skip
        for row, answer in zip(ROWS, out[:, length:].tolist(), strict=False):
            assert bytes(answer).decode().startswith(row["completion"])


def test_tokens_taken_back_leave_the_mean(tokenizer: Any) -> None:
    learner = learner_of(tokenizer)
    learner.learn(ROWS)
    prompt, more = torch.tensor([[256, *b"blue fish?"]]), torch.tensor([list(b" eul")])
    with torch.no_grad():
        whole = learner.model(torch.cat([prompt, more], 1)).logits[:, -1]
        cache = learner.model(prompt, use_cache=True).past_key_values
        learner.model(torch.tensor([list(b" old")]), past_key_values=cache)
        cache.crop(-4)
        again = learner.model(more, past_key_values=cache).logits[:, -1]
    torch.testing.assert_close(again, whole, rtol=1e-3, atol=1e-2)


def test_memory_files_and_merging(tokenizer: Any, tmp_path: Path, ids: torch.Tensor) -> None:
    whole, halves = learner_of(tokenizer), [learner_of(tokenizer) for _ in range(2)]
    whole.learn(ROWS)
    for half, rows in zip(halves, (ROWS[:4], ROWS[4:]), strict=True):
        half.learn(rows)
    stored = whole.save(tmp_path / "w.nlmem")
    memory = read_memory(tmp_path / "w.nlmem")
    held = [(n, c) for own in whole.memory.changes.values() for n, c in own.items()]
    found = [c for own in memory.changes.values() for c in own.values()]
    for (name, change), read in zip(held, found, strict=True):
        assert torch.equal(read, change[: len(read)]) and not change[len(read) :].any(), name
    # Of the sums a triangle is stored, of the rows those in use.
    sums = sum((len(c) - RANK + 1) * RANK for n, c in held if n == "readout")
    rows = sum(c.numel() for (n, _), c in zip(held, found, strict=True) if n != "readout")
    prior = adaptation_of(whole.model).fixed["readout"].numel()  # one byte each
    assert stored.nbytes < 4 * (sums + rows) + prior + 9_000
    small = whole.save(tmp_path / "s.nlmem", max_bytes=200_000)
    assert small.storage == "float32"
    with pytest.raises(ValueError, match="this memory needs at least"):
        whole.save(tmp_path / "s.nlmem", max_bytes=60_000)
    fresh = nl.Learner(adapt_to(tiny_model(), memory), tokenizer, memory=memory)
    assert torch.equal(fresh.model(ids).logits, whole.model(ids).logits)
    both = merge([half.memory for half in halves])
    fresh.use(both)
    solved = [adaptation_of(one.model).readout.solved for one in (fresh, whole)]
    close(*(one.values for one in solved))
    close(*(one.completions.weight for one in solved))


def test_rows_have_memories_of_their_own(tokenizer: Any, ids: torch.Tensor) -> None:
    learner = learner_of(tokenizer)
    plain = learner.model(ids).logits
    learner.learn(ROWS[:4])
    one = learner.memory.copy()
    shown = learner.model(ids).logits
    learner.learn(ROWS[4:])
    with adaptation_of(learner.model).rows([one, None]):
        found = learner.model(ids).logits
    torch.testing.assert_close(found, torch.stack([shown[0], plain[1]]))


def test_a_fast_level_fades_and_a_slow_one_takes_over(tokenizer: Any) -> None:
    levels = [nl.Level(period=1, half_life=1.0), nl.Level(period=4, meta_rate=1.0)]
    model = nl.adapt(tiny_model(), levels, method="readout", rank=RANK, calibration=None)
    learner = nl.Learner(model, tokenizer)
    learner.learn(ROWS)  # one batch: the fast level fades by half, the slow one takes the rest
    single = learner_of(tokenizer)
    single.learn(ROWS)
    fast, slow = (learner.memory.changes[n]["readout"] for n in ("every 1", "every 4"))
    assert not fast.any()
    torch.testing.assert_close(slow, 0.5 * single.memory.changes["every 1"]["readout"])
    name = "readout.completions"
    fast, slow = (learner.memory.changes[n][name] for n in ("every 1", "every 4"))
    assert not fast.any()
    torch.testing.assert_close(slow, 0.5 * single.memory.changes["every 1"][name])


def test_general_text_is_left_alone(tokenizer: Any) -> None:
    model = tiny_model()
    text = torch.randint(256, (8, 32), generator=torch.Generator().manual_seed(0))

    def moved(calibration: torch.Tensor | None) -> float:
        adapted = nl.adapt(
            copy.deepcopy(model), method="readout", rank=RANK, calibration=calibration
        )
        learner = nl.Learner(adapted, tokenizer)
        plain = adapted(text).logits.log_softmax(-1)
        learner.learn([*ROWS, TEXT])
        return F.kl_div(
            adapted(text).logits.log_softmax(-1), plain, log_target=True, reduction="batchmean"
        ).item()

    assert moved(text) < 0.2 * moved(None)


def test_nothing_is_added_where_nothing_is_familiar() -> None:
    answers = torch.tensor(
        [[3.0, -2.0, f] for f in (-1.0, 0.2, FAMILIAR, (FAMILIAR + 1) / 2, 1.0, 7.0)]
    )
    right = torch.tensor([0.0, 0.0, 0.0, 0.5, 1.0, 1.0])[:, None] * answers[:, :2]
    torch.testing.assert_close(gated(answers), right)


def test_a_readout_of_many_numbers_keeps_them_all(tokenizer: Any) -> None:
    """Its sums have more rows than the changes of an added memory begin with."""
    model = nl.adapt(tiny_model(), method="readout", rank=600, calibration=None)
    learner = nl.Learner(model, tokenizer)
    learner.learn([TEXT, *ROWS])
    sums = adaptation_of(model).readout.sums
    assert len(sums) == 2 * 600 + WIDTH + 2
    assert sums[600 : 600 + WIDTH + 2].any(1).all()
    assert sums[-600:].any()
    assert adaptation_of(model).readout.rows.any(1).sum() == len(ROWS)


def test_it_copies_and_texts_are_learned_too(tokenizer: Any) -> None:
    learner = learner_of(tokenizer)
    before = learner.evaluate(TEXT)["loss"]
    learner.learn(TEXT)
    assert learner.evaluate(TEXT)["loss"] < 0.5 * before
    assert "readout" in str(nl.inspect(learner.model))
    twin = copy.deepcopy(learner.model)
    row = torch.tensor([[256, *b"the old"]])
    assert torch.equal(twin(row).logits, learner.model(row).logits)
