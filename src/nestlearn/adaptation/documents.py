"""Documents of any kind as pieces of tokens, at constant memory."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from nestlearn.adaptation.examples import Example
from nestlearn.sources import Notify, find_sources, read_documents

PIECE = 1 << 16  # characters tokenised at once
_BREAKS = ("\n", " ")
_END = re.compile(r"""(?:(?<=[.!?])|(?<=[.!?]["'”’)]))\s+(?![a-z])|(?<=[。！？])""")
SHORTEST = 25  # characters of a sentence

Documents = str | Path | Mapping[str, Any] | Iterable[Any]


def documents_of(
    given: Documents, text_column: str = "text", notify: Notify = warnings.warn
) -> Iterator[tuple[str | Example, bool]]:
    """Text in pieces, and whether a document ends with the piece; examples as they are.

    Args:
        given: a text; a path of a file, folder or glob (text, JSON lines, Parquet); a row with a
            column of text; or an iterable of these (a list, a generator, a Hugging Face data set).
            A row without that column, but with ``prompt`` and ``completion``, is an example.
        text_column: column of rows that holds the text.
        notify: is told what was left out.

    Raises:
        ValueError: nothing readable, or a row without that column.
        TypeError: something that is no text.
    """
    if isinstance(given, str):
        if given.strip():
            yield from _cut(given)
    elif isinstance(given, Path):
        sources = find_sources([str(given)], notify)
        for piece, ends in read_documents(sources, text_column, Example.of):
            if isinstance(piece, Example):
                yield piece, True
                continue
            for part, last in _cut(piece):
                yield part, last and ends
            if ends and not piece.strip():
                yield "", True
    elif isinstance(given, Example):
        yield given, True
    elif isinstance(given, Mapping):
        if text_column not in given and (example := Example.of(given)) is not None:
            yield example, True
            return
        if text_column not in given:
            columns = ", ".join(map(str, given)) or "none"
            raise ValueError(f"a row has no column {text_column!r}; there are: {columns}")
        yield from documents_of(given[text_column], text_column, notify)
    elif isinstance(given, bytes):
        raise TypeError("documents are text, got bytes: decode them first, e.g. data.decode()")
    elif isinstance(given, Iterable):
        for one in given:
            yield from documents_of(one, text_column, notify)
    else:
        raise TypeError(
            f"documents are text, paths, rows or iterables of these, got {type(given).__name__}"
        )


def token_pieces(
    documents: Iterable[tuple[str, bool]], tokenizer: Any
) -> Iterator[tuple[list[int], bool, bool]]:
    """Token numbers of pieces: (tokens, whether a document begins, whether it ends)."""
    begins = True
    for text, ends in documents:
        ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids if text else []
        if begins and tokenizer.bos_token_id is not None:
            ids = [tokenizer.bos_token_id, *ids]
        yield ids, begins, ends
        begins = ends


def sentences_of(text: str) -> list[str]:
    """Sentences of a text, line by line; none if it is only one.

    A short sentence goes with the next of its line; what is short at a line's end, such as a
    title, is left out.

    Example:
        >>> text = "Ostrava\\nIrma Quell lit the lamp there in 1893. It was red. Nobody knows why."
        >>> sentences_of(text)
        ['Irma Quell lit the lamp there in 1893.', 'It was red. Nobody knows why.']
    """
    found = []
    for line in map(str.strip, text.splitlines()):
        start = 0
        for begin, end in (*(m.span() for m in _END.finditer(line)), (len(line), len(line))):
            if begin - start >= SHORTEST:
                found.append(line[start:begin])
                start = end
    return found if found != [text.strip()] else []


def _cut(text: str) -> Iterator[tuple[str, bool]]:
    """Pieces of at most `PIECE` characters, cut before white space where there is some."""
    start = 0
    while len(text) - start > PIECE:
        stop = start + PIECE
        for sign in _BREAKS:
            found = text.rfind(sign, start + PIECE // 2, stop)
            if found > 0:
                stop = found
                break
        yield text[start:stop], False
        start = stop
    yield text[start:], True
