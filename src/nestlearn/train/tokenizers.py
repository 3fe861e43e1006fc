"""Tokenizers: bytes by default, any Hugging Face tokenizer, or a freshly trained BPE."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

_SPECIAL = {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "pad_token": "<|pad|>"}
_ALPHABET: dict[int, str] = bytes_to_unicode()  # byte -> the printable character standing for it


class ByteTokenizer(PreTrainedTokenizerFast):
    """One token per UTF-8 byte: token b is byte b; 256 begins, 257 ends, 258 pads a text.

    Nothing is ever unknown and ``decode(encode(text)) == text`` for any text; words that look like
    special tokens are read as plain bytes. `encode_bytes` and `decode_bytes` do the same for bytes
    that are no valid UTF-8. A saved byte tokenizer loads with ``AutoTokenizer`` on machines
    without this library.

    Example:
        >>> tokenizer = ByteTokenizer()
        >>> tokenizer("hé").input_ids
        [104, 195, 169]
        >>> tokenizer.decode([104, 195, 169])
        'hé'
    """

    def __init__(self, **kwargs: Any) -> None:
        if not {"tokenizer_object", "tokenizer_file"} & set(kwargs):
            vocabulary = {char: byte for byte, char in _ALPHABET.items()}
            tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
            tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(
                add_prefix_space=False, use_regex=False
            )
            tokenizer.decoder = decoders.ByteLevel()
            tokenizer.add_special_tokens(list(_SPECIAL.values()))
            kwargs["tokenizer_object"] = tokenizer
        kwargs = {**_SPECIAL, "split_special_tokens": True, **kwargs}
        super().__init__(**kwargs)

    @staticmethod
    def encode_bytes(data: bytes) -> np.ndarray:
        """Token numbers of raw bytes, ``(len(data),)`` int64."""
        return np.frombuffer(data, dtype=np.uint8).astype(np.int64)

    @staticmethod
    def decode_bytes(ids: Iterable[int]) -> bytes:
        """The bytes that tokens stand for; special tokens are left out."""
        return bytes(i for i in map(int, ids) if i < 256)


def train_bpe(
    texts: Iterable[str], vocab_size: int, digits: bool = False
) -> PreTrainedTokenizerFast:
    """A byte-level BPE of ``vocab_size`` tokens in all, learned from texts; lossless.

    Args:
        texts: what its merges are learned from.
        vocab_size: bytes, merges and special tokens.
        digits: every digit is a token of its own.

    Raises:
        ValueError: ``vocab_size`` below 259 (256 bytes + 3 special tokens).
    """
    if vocab_size < 259:
        raise ValueError(f"a BPE needs a vocabulary of at least 259 tokens, got {vocab_size}")
    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    single = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([single, words]) if digits else words
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(_SPECIAL.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, split_special_tokens=True, **_SPECIAL
    )


def load_tokenizer(name: str, texts: Iterable[str] = ()) -> PreTrainedTokenizerBase:
    """The tokenizer that ``name`` asks for.

    Args:
        name: ``"byte"``, ``"bpe:N"`` (a BPE of N tokens trained on ``texts``), or the folder or hub
            id of a Hugging Face tokenizer.
        texts: what a BPE is trained on; read only for ``bpe:N``.

    Raises:
        ValueError: no such tokenizer, or a size that is no number.
    """
    if name == "byte":
        return ByteTokenizer()
    if name.startswith("bpe"):
        match = re.fullmatch(r"bpe:(\d+)", name)
        if match is None:
            raise ValueError(f"tokenizer {name!r}: write bpe:N with a vocabulary size, as bpe:8192")
        return train_bpe(texts, int(match.group(1)))
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # the hub client raises many kinds; all mean the same to the user
        raise ValueError(
            f"no tokenizer {name!r}: neither 'byte' nor 'bpe:N', and not loadable as a folder or "
            f"hub id ({_first_line(error)})"
        ) from error
    return tokenizer


def is_byte_tokenizer(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether token b is byte b (also for one that was saved and loaded as a plain tokenizer)."""
    if isinstance(tokenizer, ByteTokenizer):
        return True
    if len(tokenizer) != 259:
        return False
    vocabulary = tokenizer.get_vocab()
    return all(vocabulary.get(char) == byte for byte, char in _ALPHABET.items())


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """How many bytes of text each token stands for, ``(vocabulary,)``; special tokens 0.

    With it a loss per token becomes bits per byte, which compares models across tokenizers.
    """
    lengths = np.zeros(max(len(tokenizer), *(i + 1 for i in tokenizer.get_vocab().values())), int)
    special = set(tokenizer.all_special_ids)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    byte_level = backend is not None and (
        "ByteLevel" in repr(backend.decoder) or "ByteLevel" in repr(backend.pre_tokenizer)
    )
    for token, i in tokenizer.get_vocab().items():
        if i in special:
            continue
        if byte_level:
            lengths[i] = len(token)  # each character stands for one byte
        elif re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", token):
            lengths[i] = 1
        else:
            lengths[i] = len(token.replace("\u2581", " ").removeprefix("##").encode())
    return lengths


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of what the tokenizer does, so that cached tokens are never used with another."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = sorted(tokenizer.get_vocab().items())
    text = repr(vocabulary) if backend is None else backend.to_str()
    return hashlib.sha256(f"{text}{tokenizer.eos_token_id}".encode()).hexdigest()[:16]


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
