"""Reading text: files, folders, globs, JSON lines, Parquet and Hugging Face data sets."""

from __future__ import annotations

import dataclasses
import glob
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

_PIECE = 1 << 24  # characters or bytes of a file read at once
_PROBE = 8192  # bytes looked at to tell text from binary
_JSON_LINES = {".jsonl", ".ndjson", ".json"}
_HUB_ID = re.compile(r"(?P<id>[\w.-]+(/[\w.-]+)?)(:(?P<subset>[\w.-]+))?(@(?P<split>[\w.-]+))?")

Notify = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Source:
    """One place that text comes from.

    Attributes:
        kind: ``"text"``, ``"jsonl"``, ``"parquet"``, ``"disk"`` (a data set saved by ``datasets``)
            or ``"hub"``.
        name: path or hub id (``org/name[:subset][@split]``).
    """

    kind: str
    name: str

    def stamp(self) -> list[Any]:
        """What identifies the source's present content without reading it."""
        if self.kind == "hub":
            return [self.kind, self.name]
        path = Path(self.name).resolve()
        files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        stats = [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
        return [self.kind, *stats]


def find_sources(names: Sequence[str], notify: Notify = print) -> list[Source]:
    """What the given paths, folders, globs and hub ids stand for, in a fixed order.

    In a folder every file counts, whatever its depth, but hidden and binary ones, which are left
    out with one line.

    Raises:
        ValueError: nothing found, or a file that was named itself is empty or binary.
    """
    if not names:
        raise ValueError("no data: name a file, folder, glob or Hugging Face data set")
    sources: list[Source] = []
    for name in names:
        sources += _find(name, notify)
    return sources


def _find(name: str, notify: Notify) -> list[Source]:
    path = Path(name).expanduser()
    if path.is_dir():
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            return [Source("disk", str(path))]
        return _several(name, _inside(path), notify)
    if path.is_file():
        return [_single(path)]
    if any(c in name for c in "*?["):
        matches = [Path(m) for m in sorted(glob.glob(str(path), recursive=True))]
        files = [f for m in matches for f in (_inside(m) if m.is_dir() else [m])]
        return _several(name, list(dict.fromkeys(files)), notify)
    looks_like_path = name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_like_path or Path(name).suffix in {*_JSON_LINES, ".txt", ".md", ".parquet"}:
        raise ValueError(f"no such file or folder: {name}")
    if _HUB_ID.fullmatch(name) is None:
        raise ValueError(f"{name!r} is no file, folder, glob or Hugging Face data set id")
    return [Source("hub", name)]


def _inside(folder: Path) -> list[Path]:
    """All files below a folder that are not hidden, in a fixed order."""
    files = (p for p in sorted(folder.rglob("*")) if p.is_file())
    return [
        p for p in files if not any(part.startswith(".") for part in p.relative_to(folder).parts)
    ]


def _single(path: Path) -> Source:
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty")
    if path.suffix == ".parquet":
        return Source("parquet", str(path))
    if _is_binary(path):
        raise ValueError(f"{path} is a binary file; give text, JSON lines or Parquet")
    return Source("jsonl" if path.suffix in _JSON_LINES else "text", str(path))


def _several(name: str, paths: list[Path], notify: Notify) -> list[Source]:
    sources, skipped = [], []
    for path in paths:
        if path.stat().st_size == 0 or (path.suffix != ".parquet" and _is_binary(path)):
            skipped.append(path.name)
        else:
            sources.append(_single(path))
    if skipped:
        more = ", ..." if len(skipped) > 3 else ""
        notify(f"{name}: left out {len(skipped)} binary or empty files "
               f"({', '.join(skipped[:3])}{more})")  # fmt: skip
    if not sources:
        raise ValueError(f"{name} holds no text, JSON lines or Parquet files")
    return sources


def _is_binary(path: Path) -> bool:
    with path.open("rb") as handle:
        head = handle.read(_PROBE)
    if b"\0" in head:
        return True
    try:
        head.decode()
    except UnicodeDecodeError as error:  # a character cut at the end of the probe is fine
        return error.start < len(head) - 3
    return False


def read_documents(
    sources: Iterable[Source],
    text_column: str | None = None,
    other: Callable[[dict[str, Any]], Any] | None = None,
) -> Iterator[tuple[Any, bool]]:
    """Pieces of text in order; the flag says that a document ends with this piece.

    A text file is one document (large ones come in several pieces, cut after a line); a row of
    JSON lines, Parquet or a data set is one document.

    Args:
        sources: see `find_sources`.
        text_column: column of the text, default ``"text"``.
        other: what a row without that column stands for; None if for nothing.

    Raises:
        ValueError: a missing column (with those there are), a broken line, text that is not UTF-8.
    """
    for source in sources:
        if source.kind == "text":
            yield from _read_text(Path(source.name))
        else:
            column = text_column or "text"
            rows = _READERS[source.kind](source.name, column)
            for number, row in enumerate(rows, 1):
                if other and isinstance(row, dict) and column not in row:
                    found = other(row)
                    if found is not None:
                        yield found, True
                        continue
                yield _text_of(row, column, f"{source.name}, row {number}"), True


def _read_text(path: Path) -> Iterator[tuple[str, bool]]:
    try:
        with path.open(encoding="utf-8", newline="") as handle:
            piece = handle.read(_PIECE)
            while piece:
                following = handle.read(_PIECE)
                if following:
                    cut = piece.rfind("\n") + 1
                    if cut:
                        piece, following = piece[:cut], piece[cut:] + following
                yield piece, not following
                piece = following
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); convert it first"
        ) from error


def _text_of(row: Any, column: str, where: str) -> str:
    if isinstance(row, str):
        return row
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected an object with a column {column!r}, got {row!r:.60}")
    if column not in row:
        columns = ", ".join(map(str, row)) or "none"
        raise ValueError(
            f"{where}: no column {column!r}; there are: {columns} (choose with --text-column)"
        )
    if not isinstance(row[column], str):
        kind = type(row[column]).__name__
        raise ValueError(f"{where}: column {column!r} holds {kind}, not text")
    return row[column]


def _read_jsonl(name: str, column: str) -> Iterator[Any]:
    with open(name, encoding="utf-8") as handle:
        if handle.read(1) == "[":
            handle.seek(0)
            try:
                yield from json.load(handle)
            except json.JSONDecodeError as error:
                raise ValueError(f"{name} is not valid JSON: {error}") from error
            return
        handle.seek(0)
        for number, line in enumerate(handle, 1):
            if line.strip():
                try:
                    yield json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"{name}, line {number} is not valid JSON: {error}") from error


def _read_parquet(name: str, column: str) -> Iterator[Any]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ValueError("reading Parquet needs pyarrow: pip install pyarrow") from error
    try:
        file = pq.ParquetFile(name)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{name} is no Parquet file: {error}") from error
    names = file.schema_arrow.names
    for batch in file.iter_batches(1024, columns=[column] if column in names else names):
        yield from batch.to_pylist()


def _read_disk(name: str, column: str) -> Iterator[Any]:
    datasets = _datasets()
    data = datasets.load_from_disk(name)
    if isinstance(data, datasets.DatasetDict):
        if "train" not in data:
            raise ValueError(f"{name} has the splits {', '.join(data)}; give the folder of one")
        data = data["train"]
    yield from data


def _read_hub(name: str, column: str) -> Iterator[Any]:
    match = _HUB_ID.fullmatch(name)
    assert match is not None
    split = match["split"] or "train"
    try:
        data = _datasets().load_dataset(match["id"], match["subset"], split=split, streaming=True)
        yield from data
    except ValueError as error:
        raise ValueError(f"data set {name!r}: {_first_line(error)}") from error
    except Exception as error:  # the hub client raises many kinds; all mean the same to the user
        raise ValueError(
            f"{name!r} is no file or folder here, and opening it as a Hugging Face data set "
            f"failed: {_first_line(error)}"
        ) from error


_READERS: dict[str, Callable[[str, str], Iterator[Any]]] = {
    "jsonl": _read_jsonl,
    "parquet": _read_parquet,
    "disk": _read_disk,
    "hub": _read_hub,
}


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ValueError("Hugging Face data sets need: pip install datasets") from error
    return datasets


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
