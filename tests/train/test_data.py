"""Data: every source, the token cache, the split and the order."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from nestlearn.sources import find_sources, read_documents
from nestlearn.train import Blocks, ByteTokenizer, Corpus, prepare, train_bpe
from nestlearn.train.data import _split

TOKENIZER = ByteTokenizer()


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NESTLEARN_CACHE", str(tmp_path / "cache"))


def tokens(*data: Path | str, **options) -> list[int]:
    return prepare([str(d) for d in data], TOKENIZER, **options).tokens.tolist()


def text(content: str) -> list[int]:
    return [*content.encode(), 257]


def test_text_files_folders_and_globs(tmp_path: Path) -> None:
    (tmp_path / "d" / "sub").mkdir(parents=True)
    (tmp_path / "d" / "b.txt").write_text("bé\r\n")
    (tmp_path / "d" / "sub" / "a.py").write_text("a")
    (tmp_path / "d" / ".hidden").write_text("h")
    (tmp_path / "d" / "c.bin").write_bytes(b"\0\1")
    lines: list[str] = []
    assert tokens(tmp_path / "d", notify=lines.append) == text("bé\r\n") + text("a")
    assert len(lines) == 1 and "left out 1 binary or empty files (c.bin)" in lines[0]
    assert tokens(tmp_path / "d" / "b.txt") == text("bé\r\n")
    assert tokens(f"{tmp_path}/**/*.py") == text("a")
    assert tokens(f"{tmp_path}/d*", notify=lines.append) == text("bé\r\n") + text("a")
    assert tokens(tmp_path / "d" / "b.txt", max_tokens=2) == [ord("b"), 0xC3]


def test_large_files_come_in_pieces_cut_after_lines(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("nestlearn.sources._PIECE", 7)
    content = "one\ntwo three four\n\nfivé and a line longer than a piece\nend"
    (tmp_path / "a.txt").write_text(content)
    pieces = list(read_documents(find_sources([str(tmp_path / "a.txt")])))
    assert "".join(piece for piece, _ in pieces) == content and len(pieces) > 3
    assert [last for _, last in pieces] == [False] * (len(pieces) - 1) + [True]


def test_jsonl_and_parquet_and_saved_data_sets(tmp_path: Path) -> None:
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"text": "one", "n": 1}, {"text": "zwö", "n": 2}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    (tmp_path / "b.json").write_text(json.dumps([{"body": r["text"]} for r in rows]))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "c.parquet")
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(tmp_path / "dd")
    expected = text("one") + text("zwö")
    assert tokens(tmp_path / "a.jsonl") == expected
    assert tokens(tmp_path / "b.json", text_column="body") == expected
    assert tokens(tmp_path / "c.parquet") == expected
    assert tokens(tmp_path / "saved") == expected
    assert tokens(tmp_path / "dd") == expected


def test_hub_data_sets_are_streamed(monkeypatch) -> None:
    import datasets

    seen = {}

    def load_dataset(name, subset, *, split, streaming):
        seen.update(name=name, subset=subset, split=split, streaming=streaming)
        return ({"text": f"row {i}"} for i in range(10**9))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(tokens("org/name:sub@test", max_tokens=1000)) == 1000
    assert seen == {"name": "org/name", "subset": "sub", "split": "test", "streaming": True}


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


@pytest.mark.parametrize(("name", "content", "message"), [
    ("empty.txt", "", "is empty"),
    ("image.png", b"\x89PNG\0\0", "is a binary file"),
    ("latin.txt", b"gr\xfc\xdfe " * 50, "is a binary file"),
    ("late.txt", b"a" * 10_000 + b"\xfc rest", "not UTF-8 text"),
    ("a.jsonl", '{"content": "x", "id": 1}', "no column 'text'; there are: content, id"),
    ("b.jsonl", '{"text": "x"}\n{"text": 3}', "row 2: column 'text' holds int, not text"),
    ("c.jsonl", '{"text": "x"}\n{"text": ', "line 2 is not valid JSON"),
    ("d.json", "[1,", "not valid JSON"),
    ("e.jsonl", "[1]", "expected an object"),
    ("f.parquet", "no parquet", "no Parquet file"),
])  # fmt: skip
def test_bad_files_are_named(tmp_path: Path, name: str, content, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        tokens(write(tmp_path / name, content))
    assert name in str(error.value)


def test_missing_data(tmp_path: Path, monkeypatch) -> None:
    import datasets

    def unreachable(*args, **kwargs):
        raise ConnectionError("couldn't reach the hub\nlong explanation")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    (tmp_path / "d").mkdir()
    for name, message in [
        ("no/such/file.txt", "no such file or folder"),
        ("./nowhere", "no such file or folder"),
        ("missing.jsonl", "no such file or folder"),
        (str(tmp_path / "d"), "holds no text"),
        (str(tmp_path / "*.none"), "holds no text"),
        ("what is this", "no file, folder, glob or Hugging Face"),
        ("org/data-set-that-is-not", "data set failed: couldn't reach the hub$"),
    ]:
        with pytest.raises(ValueError, match=message):
            tokens(name)
    with pytest.raises(ValueError, match="no data"):
        find_sources([])
    write(tmp_path / "gz.txt", gzip.compress(b"text"))
    with pytest.raises(ValueError, match="binary"):
        tokens(tmp_path / "gz.txt")


def test_missing_parquet_column_lists_columns(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"body": ["x"], "id": [1]}), tmp_path / "c.parquet")
    with pytest.raises(ValueError, match="no column 'text'; there are: body, id"):
        tokens(tmp_path / "c.parquet")


def test_cache_is_used_and_follows_changes(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "a.txt"
    path.write_text("first")
    first = prepare([str(path)], TOKENIZER)
    assert isinstance(first.tokens, np.memmap) and first.tokens.dtype == np.uint16
    monkeypatch.setattr("nestlearn.train.data._build", lambda *a: pytest.fail("not cached"))
    assert prepare([str(path)], TOKENIZER).digest == first.digest
    monkeypatch.undo()
    monkeypatch.setenv("NESTLEARN_CACHE", str(tmp_path / "cache"))
    path.write_text("second text")
    assert tokens(path) == text("second text")
    bpe = train_bpe(["second text"] * 3, 262)
    assert len(prepare([str(path)], bpe).tokens) < len("second text")
    assert not list((tmp_path / "cache" / "tokens").glob(".*"))


def test_failed_preparation_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        tokens(write(tmp_path / "c.jsonl", '{"text": "x"}\nbroken'))
    assert not list((tmp_path / "cache" / "tokens").iterdir())


@pytest.mark.parametrize("total", [200, 5_000, 100_000, 3_000_000])
@pytest.mark.parametrize("seq_len", [8, 64])
def test_held_out_and_training_tokens_are_disjoint(total: int, seq_len: int) -> None:
    blocks = Blocks(Corpus.of(np.arange(total, dtype=np.uint32)), seq_len)
    train = {int(s) for s in blocks.train_starts}
    used = np.zeros(total, dtype=int)
    for start in train:
        used[start : start + seq_len] += 1
    for start in blocks.val_starts:
        used[start : start + seq_len] += 1
    assert used.max() == 1  # also: no token is in two blocks
    share = len(blocks.val_starts) * seq_len / total
    assert share == pytest.approx(0.05, abs=0.03) or len(blocks.val_starts) == 1
    regions = _split(total, seq_len, 0.05)
    assert len(regions[1]) == len(regions[0]) <= 16


def test_order_depends_on_the_seed_and_the_number_only() -> None:
    corpus = Corpus.of(np.arange(5000, dtype=np.uint16))
    blocks = Blocks(corpus, 16, seed=3)
    n = len(blocks.train_starts)
    epochs = blocks.train(0, 2 * n)[:, 0].tolist()
    assert sorted(epochs[:n]) == sorted(epochs[n:]) == sorted(blocks.train_starts.tolist())
    assert epochs[:n] != epochs[n:]
    fresh = Blocks(corpus, 16, seed=3)
    assert fresh.train(n - 2, 5)[:, 0].tolist() == epochs[n - 2 : n + 3]  # across the epochs' edge
    assert Blocks(corpus, 16, seed=4).train(0, n)[:, 0].tolist() != epochs[:n]
    assert blocks.digest == fresh.digest != Blocks(corpus, 16, seed=4).digest


def test_separate_held_out_data() -> None:
    train, val = np.zeros(100, np.uint16), np.ones(40, np.uint16)
    blocks = Blocks(Corpus.of(train), 10, held_out=Corpus.of(val))
    assert blocks.train(0, 10).sum() == 0 and blocks.val().shape == (4, 10)
    assert blocks.val(2).shape == (2, 10) and blocks.val().min() == 1


def test_too_little_data() -> None:
    with pytest.raises(ValueError, match="too little data: 100 tokens .* sequences of 64"):
        Blocks(Corpus.of(np.zeros(100, np.uint16)), 64)
    with pytest.raises(ValueError, match="and 3 held out"):
        Blocks(Corpus.of(np.zeros(100, np.uint16)), 64, held_out=Corpus.of(np.zeros(3, np.uint16)))
    with pytest.raises(ValueError, match="between 0 and 1"):
        Blocks(Corpus.of(np.zeros(100, np.uint16)), 4, val_fraction=1.5)
