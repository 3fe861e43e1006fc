"""Tokenizers: nothing is lost, whatever the text; byte counts are right."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from nestlearn.train.tokenizers import (
    ByteTokenizer,
    fingerprint,
    is_byte_tokenizer,
    load_tokenizer,
    token_bytes,
    train_bpe,
)

BYTES = ByteTokenizer()
CORPUS = ["the cat sat on the mat, the dog did not", "über größe 日本語 the the the"] * 20
BPE = train_bpe(CORPUS, 280)


@settings(max_examples=60, deadline=None)
@given(st.text())
def test_byte_tokenizer_is_lossless_on_text(text: str) -> None:
    ids = BYTES(text)["input_ids"]
    assert ids == list(text.encode())
    assert BYTES.decode(ids) == text


@settings(max_examples=30)
@given(st.binary())
def test_byte_tokenizer_is_lossless_on_bytes(data: bytes) -> None:
    assert BYTES.decode_bytes(BYTES.encode_bytes(data)) == data


@settings(max_examples=60, deadline=None)
@given(st.text())
def test_bpe_is_lossless(text: str) -> None:
    assert BPE.decode(BPE(text)["input_ids"]) == text


def test_special_tokens() -> None:
    assert (BYTES.bos_token_id, BYTES.eos_token_id, BYTES.pad_token_id) == (256, 257, 258)
    assert len(BYTES) == 259
    assert BYTES("<|eos|>")["input_ids"] == list(b"<|eos|>")  # text never becomes a special token
    assert BYTES.decode([257, 65], skip_special_tokens=True) == "A"
    assert BYTES.decode_bytes([257, 65]) == b"A"
    padded = BYTES(["a", "bcd"], padding=True)["input_ids"]
    assert padded == [[97, 258, 258], [98, 99, 100]]


def test_saved_byte_tokenizer_loads_as_a_plain_one(tmp_path) -> None:
    BYTES.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "né <|eos|> \0\n\U0001f600"
    assert loaded(text)["input_ids"] == BYTES(text)["input_ids"]
    assert loaded.decode(loaded(text)["input_ids"]) == text
    assert is_byte_tokenizer(loaded) and fingerprint(loaded) == fingerprint(BYTES)
    assert loaded.eos_token_id == 257


def test_bpe_sizes_and_reload(tmp_path) -> None:
    assert isinstance(BPE, PreTrainedTokenizerFast) and len(BPE) == 280
    assert len(BPE("the the")["input_ids"]) < 7
    assert not is_byte_tokenizer(BPE) and not is_byte_tokenizer(train_bpe(["ab"], 259))
    BPE.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert loaded(CORPUS[1])["input_ids"] == BPE(CORPUS[1])["input_ids"]
    assert fingerprint(loaded) == fingerprint(BPE) != fingerprint(BYTES)


@pytest.mark.parametrize("tokenizer", [BYTES, BPE])
def test_token_bytes_add_up(tokenizer) -> None:
    lengths = token_bytes(tokenizer)
    for text in (*CORPUS, "日\U0001f600 x"):
        assert lengths[tokenizer(text)["input_ids"]].sum() == len(text.encode())
    assert lengths[tokenizer.eos_token_id] == 0


def test_token_bytes_of_sentencepiece_style() -> None:
    from tokenizers import Tokenizer, models

    vocabulary = {"\u2581the": 0, "é": 1, "<0x0A>": 2, "<unk>": 3}
    plain = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, "<unk>")), unk_token="<unk>"
    )
    assert token_bytes(plain).tolist() == [4, 2, 1, 0]


def test_load_tokenizer_by_name() -> None:
    assert isinstance(load_tokenizer("byte"), ByteTokenizer)
    assert len(load_tokenizer("bpe:270", CORPUS)) == 270


@pytest.mark.parametrize(("name", "message"), [
    ("bpe", "write bpe:N"), ("bpe:many", "write bpe:N"), ("bpe:100", "at least 259"),
    ("./no/such/folder", "no tokenizer './no/such/folder'"),
])  # fmt: skip
def test_unknown_tokenizers(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_tokenizer(name)
