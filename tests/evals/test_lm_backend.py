"""What the backend says of texts equals the model's logits of single requests, and lm-eval's own
backend."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nestlearn import HopeConfig, HopeForCausalLM
from nestlearn.train.tokenizers import ByteTokenizer
from tests.adaptation.conftest import tiny_model

pytest.importorskip("lm_eval", reason="pip install 'nestlearn[eval]'")
from nestlearn.evals.lm.backend import Backend  # noqa: E402
from nestlearn.evals.reading import context_length  # noqa: E402

PAIRS = [
    ("the cat sat on", " the mat"),
    ("a", " b"),
    ("", "without context"),
    ("a somewhat longer context than the others ", "and its end"),
    ("the cat sat on", " the dog"),
    ("yes or no?", " n"),
    ("yes or no?", " y"),
]
TEXTS = ["one text", "a longer text, of more bytes than the other has " * 3, "x"]


def hope(mixer: str, **fields: Any) -> Any:
    torch.manual_seed(1)
    model = HopeForCausalLM(
        HopeConfig(
            vocab_size=264, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=256, mixer=mixer, memory_chunk=8,
            **({"projection_chunk": 8} if mixer == "self_modifying" else {}),
            bos_token_id=256, eos_token_id=257, pad_token_id=258, **fields,
        )
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(6)
    return model.eval()


MODELS = {
    "llama": tiny_model,
    "hope": lambda: hope("self_modifying"),
    "gated_deltanet": lambda: hope("gated_deltanet"),
    "hope_attention": lambda: hope("attention"),
}


def asked(*arguments: Any) -> Any:
    return SimpleNamespace(args=arguments)


def alone(model: Any, context: list[int], answer: list[int]) -> tuple[float, bool]:
    """One request, no padding, the whole sequence's logits."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([context + answer]), use_cache=False).logits[0]
    logs = logits.double().log_softmax(-1)
    places = range(len(context) - 1, len(context) + len(answer) - 1)
    value = sum(float(logs[p, a]) for p, a in zip(places, answer, strict=True))
    return value, all(int(logs[p].argmax()) == a for p, a in zip(places, answer, strict=True))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("batch_tokens", [1, 10_000])
def test_likelihoods_are_those_of_single_requests(name: str, batch_tokens: int) -> None:
    model, tokenizer = MODELS[name](), ByteTokenizer()
    backend = Backend(model, tokenizer, batch_tokens=batch_tokens)
    found = backend.loglikelihood([asked(*pair) for pair in PAIRS])
    for (context, answer), (value, greedy) in zip(PAIRS, found, strict=True):
        ended = context.rstrip()
        answer = context[len(ended) :] + answer
        ids = list(ended.encode()) or [backend.prefix_token_id]
        right = alone(model, ids, list(answer.encode()))
        assert value == pytest.approx(right[0], abs=2e-4)
        assert greedy == right[1]


@pytest.mark.parametrize("name", MODELS)
def test_texts_in_segments_or_at_once(name: str) -> None:
    model, tokenizer = MODELS[name](), ByteTokenizer()
    for segment in (16, 4096):
        backend = Backend(model, tokenizer, segment=segment, batch_tokens=64)
        found = backend.loglikelihood_rolling([asked(text) for text in TEXTS])
        for text, value in zip(TEXTS, found, strict=True):
            right = alone(model, [backend.prefix_token_id], list(text.encode()))
            assert value == pytest.approx(right[0], abs=1e-3)


def test_equals_lm_evals_own_backend() -> None:
    pytest.importorskip("transformers")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = tiny_model(), ByteTokenizer()
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3, max_length=100)
    ours = Backend(model, tokenizer, max_length=100, batch_tokens=300)

    def requests(kind: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
        return [
            Instance(request_type=kind, doc={}, arguments=a, idx=i)
            for i, a in enumerate(arguments)
        ]  # fmt: skip

    pairs = requests("loglikelihood", PAIRS)
    for a, b in zip(ours.loglikelihood(pairs), theirs.loglikelihood(pairs, True), strict=True):
        assert a[0] == pytest.approx(b[0], abs=1e-4)
        assert a[1] == b[1]
    texts = requests("loglikelihood_rolling", [(text,) for text in TEXTS])
    assert ours.loglikelihood_rolling(texts) == pytest.approx(
        theirs.loglikelihood_rolling(texts, disable_tqdm=True), abs=1e-3
    )
    settings = {"until": ["e"], "max_gen_toks": 12, "do_sample": False}
    continued = requests("generate_until", [(c, settings) for c, _ in PAIRS if c])
    assert ours.generate_until(continued) == theirs.generate_until(continued, True)


@pytest.mark.parametrize("name", MODELS)
def test_continuations_are_those_of_single_requests(name: str) -> None:
    model, tokenizer = MODELS[name](), ByteTokenizer()
    settings = {"until": ["zzz"], "max_gen_toks": 10, "do_sample": False, "temperature": 0.0}
    requests = [asked(context, settings) for context, _ in PAIRS if context]
    together = Backend(model, tokenizer).generate_until(requests)
    for request, text in zip(requests, together, strict=True):
        ids = torch.tensor([list(request.args[0].encode())])
        with torch.no_grad():
            for _ in range(10):
                following = model(input_ids=ids, use_cache=False).logits[0, -1].argmax()
                if int(following) == 257:
                    break
                ids = torch.cat([ids, following.view(1, 1)], 1)
        new = ids[0, len(request.args[0].encode()) :]
        assert text == tokenizer.decode(new, skip_special_tokens=True).split("zzz")[0]


def test_text_ends_before_the_first_stop_sequence() -> None:
    model, tokenizer = tiny_model(), ByteTokenizer()
    free = Backend(model, tokenizer).generate_until([asked("abc", {"max_gen_toks": 20})])[0]
    stop = free[5:7]
    short = Backend(model, tokenizer).generate_until(
        [asked("abc", {"max_gen_toks": 20, "until": [stop]})]
    )[0]
    assert short == free.split(stop)[0]


def test_no_request_is_cut_silently() -> None:
    model, tokenizer = tiny_model(), ByteTokenizer()
    requests = [asked("x" * 30 + "the cat sat on", " a mat"), asked("a", " b")]
    with pytest.raises(ValueError, match="1 of 2 requests are longer .* 20 tokens .* 49"):
        Backend(model, tokenizer, max_length=20).loglikelihood(requests)
    lines: list[str] = []
    cut = Backend(model, tokenizer, max_length=20, overflow="cut", notify=lines.append)
    value = cut.loglikelihood(requests)[0][0]
    assert len(lines) == 1
    assert "1 of 2" in lines[0]
    # 20 tokens are read: the last 15 of the context, five of the answer's six.
    kept = (b"x" * 30 + b"the cat sat on")[-15:]
    assert value == pytest.approx(alone(model, list(kept), list(b" a mat"))[0], abs=1e-4)
    with pytest.raises(ValueError, match="1 of 1 requests"):
        Backend(model, tokenizer, max_length=20).generate_until(
            [asked("y" * 15, {"max_gen_toks": 9})]
        )


def test_an_answer_longer_than_the_context_is_read_in_pieces() -> None:
    model, tokenizer = tiny_model(), ByteTokenizer()
    answer = " a mat, and did not move all day."
    request = asked("the cat sat on", answer)
    with pytest.raises(ValueError, match="1 of 1 requests"):
        Backend(model, tokenizer, max_length=20).loglikelihood([request])
    cut = Backend(model, tokenizer, max_length=20, overflow="cut", notify=lambda line: None)
    (value, greedy), (short, _) = cut.loglikelihood([request, asked("a", " b")])
    before, said = list(b"the cat sat on"), list(answer.encode())
    parts = [
        alone(model, [before[-1]], said[:20]),
        alone(model, (before + said[:20])[-(20 - len(said[20:]) + 1) :], said[20:]),
    ]
    assert value == pytest.approx(sum(v for v, _ in parts), abs=1e-4)
    assert greedy == all(g for _, g in parts)
    assert short == pytest.approx(alone(model, list(b"a"), list(b" b"))[0], abs=1e-4)


def test_context_lengths_and_refusals() -> None:
    assert context_length(tiny_model()) == 256
    assert context_length(hope("self_modifying")) is None
    for fields in ({"batch_tokens": 0}, {"segment": 0}, {"max_length": 1}, {"overflow": "left"}):
        with pytest.raises(ValueError, match=next(iter(fields))):
            Backend(tiny_model(), ByteTokenizer(), **fields)
