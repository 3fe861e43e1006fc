"""The paper map names symbols that import, tests that exist, and a legal status in every row."""

from __future__ import annotations

import ast
import importlib
import re
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
MAP = ROOT / "docs" / "paper-map.md"
STATUSES = {"exact", "our reading", "not verified", "not done"}

# What SPEC.md mentions; every one must have a row (single equations, or inside a range of one).
DEFINITIONS = range(1, 8)
EQUATIONS = [
    *range(24, 29),
    *range(33, 53),
    57,
    59,
    60,
    *range(62, 69),
    *range(70, 76),
    *range(79, 98),
    *range(101, 112),
]
FIGURES = [3, 4, 5, 6, 7, 8, 9, 11, 12]
TABLES = range(1, 7)


class Row(NamedTuple):
    item: str
    what: str
    symbols: list[str]
    tests: list[str]
    status: str


@cache
def rows() -> list[Row]:
    found = []
    for line in MAP.read_text().splitlines():
        if not line.startswith("| ") or line.startswith("| paper item"):
            continue
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        assert len(cells) == 5, f"five cells in each row, but: {line}"
        item, what, symbols, tests, status = cells
        quoted = re.compile(r"`([^`]+)`")
        found.append(Row(item, what, quoted.findall(symbols), quoted.findall(tests), status))
    return found


def resolve(symbol: str) -> Any:
    """The object a dotted name stands for: the longest module, then attributes."""
    parts = symbol.split(".")
    for size in range(len(parts), 0, -1):
        try:
            value: Any = importlib.import_module(".".join(parts[:size]))
        except ModuleNotFoundError:
            continue
        for name in parts[size:]:
            value = getattr(value, name)
        return value
    raise ModuleNotFoundError(symbol)


@cache
def functions_of(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def numbers(kind: str) -> set[int]:
    """All numbers of a kind that have a row; ``Eq. 24–26`` stands for three."""
    found: set[int] = set()
    for row in rows():
        match = re.fullmatch(rf"{kind}\. (\d+)(?:[–-](\d+))?", row.item)
        if match:
            first = int(match.group(1))
            found |= set(range(first, int(match.group(2) or first) + 1))
    return found


def test_there_are_rows() -> None:
    assert len(rows()) > 50
    items = [row.item for row in rows()]
    assert len(items) == len(set(items)), "each item has one row"


@pytest.mark.parametrize("row", rows(), ids=lambda row: row.item)
def test_row(row: Row) -> None:
    assert row.status in STATUSES
    assert row.what
    for symbol in row.symbols:
        resolve(symbol)
    for test in row.tests:
        path, _, function = test.partition("::")
        assert (ROOT / path).is_file(), f"no file {path}"
        assert function in functions_of(ROOT / path), f"no test {test}"
    if row.status == "not done":
        assert not row.symbols, "an item that is not done has no symbol"
    else:
        assert row.symbols, f"an item that is {row.status} has a symbol"
    if row.status in ("exact", "our reading"):
        assert row.tests, f"an item that is {row.status} has a test; otherwise it is not verified"


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("Def", DEFINITIONS), ("Eq", EQUATIONS), ("Fig", FIGURES), ("Tab", TABLES), ("Alg", [1])],
)
def test_every_numbered_item_has_a_row(kind: str, expected: list[int]) -> None:
    assert set(expected) <= numbers(kind)
