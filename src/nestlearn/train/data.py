"""Tokens on disk and the order in which they are read.

Text becomes one long row of tokens, kept in a memory-mapped file, which is tokenised once and then
shared by all runs. Training reads blocks of ``seq_len`` tokens from it in an order that depends on
the seed alone, so the position of a run is one number: sequences read so far.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nestlearn.files import cache_folder
from nestlearn.sources import Notify, find_sources, read_documents
from nestlearn.train.tokenizers import fingerprint, is_byte_tokenizer

_VERSION = 1
_REGION = 8192  # tokens in one held-out region, about


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A row of tokens.

    Attributes:
        tokens: ``(N,)`` unsigned integers, memory-mapped where it comes from `prepare`.
        digest: hash of the tokens; a resumed run must find the same.
        documents: number of documents.
    """

    tokens: np.ndarray
    digest: str
    documents: int = 1

    @classmethod
    def of(cls, tokens: np.ndarray) -> Corpus:
        """A corpus of tokens at hand (tests, synthetic tasks)."""
        return cls(tokens, hashlib.sha256(np.ascontiguousarray(tokens).data).hexdigest()[:16])


def prepare(
    data: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    text_column: str | None = None,
    max_tokens: int | None = None,
    cache: Path | None = None,
    notify: Notify = print,
) -> Corpus:
    """Tokenise data, or find it tokenised in the cache.

    Documents follow each other, separated by the tokenizer's end-of-text token.

    Args:
        data: files, folders, globs or hub ids (``org/name[:subset][@split]``, read as a stream).
        text_column: see `nestlearn.sources.read_documents`.
        max_tokens: stop reading after so many tokens.
        cache: folder of token files.
        notify: gets one line about what was left out or is being done.

    Raises:
        ValueError: missing, empty or binary data, a missing column.
    """
    sources = find_sources(data, notify)
    stamps = [source.stamp() for source in sources]
    identity = [_VERSION, stamps, text_column, max_tokens, fingerprint(tokenizer)]
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:24]
    folder = (cache or cache_folder()) / "tokens" / key
    if not (folder / "info.json").is_file():
        pieces = read_documents(sources, text_column)
        _build(folder, pieces, tokenizer, max_tokens, ", ".join(data), notify)
    info = json.loads((folder / "info.json").read_text())
    tokens = np.memmap(folder / "tokens.bin", dtype=info["dtype"], mode="r")
    if len(tokens) != info["tokens"]:
        raise ValueError(f"the token file in {folder} is damaged; delete that folder")
    return Corpus(tokens, info["digest"], info["documents"])


def _build(
    folder: Path,
    pieces: Iterator[tuple[str, bool]],
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int | None,
    name: str,
    notify: Notify,
) -> None:
    dtype = np.dtype(np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    temporary.mkdir(parents=True, exist_ok=True)
    digest, count, documents, shown = hashlib.sha256(), 0, 0, 0
    try:
        with (temporary / "tokens.bin").open("wb") as handle:
            for ids, last in _encode(pieces, tokenizer):
                if max_tokens is not None:
                    ids = ids[: max_tokens - count]
                row = ids.astype(dtype)
                handle.write(row.data)
                digest.update(row.data)
                count += len(row)
                documents += last
                if count - shown >= 50_000_000:
                    shown = count
                    notify(f"{name}: {count / 1e6:.0f} M tokens so far")
                if max_tokens is not None and count >= max_tokens:
                    break
            handle.flush()
            os.fsync(handle.fileno())
        if count == 0:
            raise ValueError(f"{name} holds no text")
        info = {
            "dtype": dtype.name,
            "tokens": count,
            "documents": max(1, documents),
            "digest": digest.hexdigest()[:16],
        }
        (temporary / "info.json").write_text(json.dumps(info))
        if folder.exists():  # unfinished, or another process was faster
            shutil.rmtree(folder)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _encode(
    pieces: Iterator[tuple[str, bool]], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[np.ndarray, bool]]:
    """Token numbers piece by piece, in batches for speed, with an end-of-text after documents."""
    as_bytes = is_byte_tokenizer(tokenizer)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    while batch := list(itertools.islice(pieces, 1 if as_bytes else 64)):
        texts = [text for text, _ in batch]
        if as_bytes:
            rows = [np.frombuffer(text.encode(), np.uint8).astype(np.int64) for text in texts]
        else:
            encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
            rows = [np.array(ids, dtype=np.int64) for ids in encoded]
        for row, (_, last) in zip(rows, batch, strict=True):
            yield np.concatenate([row, np.array(end if last else [], np.int64)]), last


class Blocks:
    """Training and held-out sequences of a corpus.

    The held-out part is ``val_fraction`` of the tokens, taken as several contiguous regions spread
    evenly over the corpus; no training sequence touches one. (Text that occurs twice in the data
    may of course be in both; give separate held-out data if that matters.)

    Training sequences are the corpus cut into blocks of ``seq_len`` tokens, shuffled anew in every
    epoch: sequence number n is a function of (corpus, seq_len, seed, n) only.

    Args:
        corpus: the tokens.
        seq_len: tokens per sequence.
        seed: of the shuffling.
        val_fraction: held-out part of the corpus.
        held_out: a corpus to hold out instead; then all of ``corpus`` is trained on.

    Raises:
        ValueError: fewer tokens than a training and a held-out sequence need.

    Example:
        >>> blocks = Blocks(Corpus.of(np.arange(1000) % 7), seq_len=10)
        >>> blocks.train(0, 4).shape
        torch.Size([4, 10])
    """

    def __init__(
        self,
        corpus: Corpus,
        seq_len: int,
        *,
        seed: int = 0,
        val_fraction: float = 0.05,
        held_out: Corpus | None = None,
    ) -> None:
        if not 0 < val_fraction < 1:
            raise ValueError(f"val_fraction must be between 0 and 1, got {val_fraction}")
        self.corpus, self.seq_len, self.seed = corpus, seq_len, seed
        self.held_out = held_out or corpus
        if held_out is not None:
            train = [(0, len(corpus.tokens))]
            val = [(0, len(held_out.tokens))]
        else:
            train, val = _split(len(corpus.tokens), seq_len, val_fraction)
        self.train_starts = _starts(train, seq_len)
        self.val_starts = _starts(val, seq_len)
        if len(self.train_starts) == 0 or len(self.val_starts) == 0:
            raise ValueError(
                f"too little data: {len(corpus.tokens)} tokens to train on"
                + (f" and {len(held_out.tokens)} held out" if held_out is not None else "")
                + f" are too few for sequences of {seq_len}; use more data or a shorter --seq-len"
            )
        self._epoch = -1
        self._order = np.empty(0, np.int64)

    @property
    def digest(self) -> str:
        """Identifies data, cut and order; a resumed run must have the same."""
        parts = (self.corpus.digest, self.held_out.digest, self.seq_len, self.seed)
        text = json.dumps([*parts, len(self.train_starts), len(self.val_starts)])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def train(self, first: int, count: int) -> Tensor:
        """``count`` training sequences from number ``first``: int64 ``(count, seq_len)``."""
        starts = []
        for n in range(first, first + count):
            epoch, place = divmod(n, len(self.train_starts))
            if epoch != self._epoch:
                generator = np.random.default_rng([self.seed, epoch])
                self._order = generator.permutation(len(self.train_starts))
                self._epoch = epoch
            starts.append(self.train_starts[self._order[place]])
        return self._gather(self.corpus, starts)

    def val(self, limit: int | None = None) -> Tensor:
        """Held-out sequences, at most ``limit`` of them, spread evenly: ``(count, seq_len)``."""
        starts = self.val_starts
        if limit is not None and limit < len(starts):
            starts = starts[np.linspace(0, len(starts) - 1, limit).astype(np.int64)]
        return self._gather(self.held_out, starts)

    def _gather(self, corpus: Corpus, starts: Sequence[int] | np.ndarray) -> Tensor:
        rows = [corpus.tokens[s : s + self.seq_len].astype(np.int64) for s in starts]
        return torch.from_numpy(np.stack(rows))


def _split(
    total: int, seq_len: int, fraction: float
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Training and held-out regions as (start, stop)."""
    held = max(int(total * fraction), seq_len)
    regions = max(1, min(16, held // max(_REGION, seq_len)))
    train, val = [], []
    for i in range(regions):
        start, stop = total * i // regions, total * (i + 1) // regions
        middle = stop - held // regions
        train.append((start, middle))
        val.append((middle, stop))
    return train, val


def _starts(regions: list[tuple[int, int]], seq_len: int) -> np.ndarray:
    rows = [np.arange(a, b - seq_len + 1, seq_len, dtype=np.int64) for a, b in regions]
    return np.concatenate(rows)
