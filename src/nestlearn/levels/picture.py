"""A nested system as a picture: one row per level, the slowest at the bottom."""

from __future__ import annotations

import textwrap
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any

from nestlearn.levels.system import Box, NestedSystem, cost_text, frequency_text, learned_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH, HEIGHT, GAP = 3.6, 1.5, 1.2  # inches: a box, and the room between two rows
COLOURS = {
    "direct parametric": "tab:blue",
    "direct non-parametric": "tab:cyan",
    "backpropagation": "tab:red",
    "initialisation": "tab:green",
    "generation": "tab:purple",
}


def draw(system: NestedSystem, path: str | PathLike[str] | None = None) -> Figure:
    """Boxes with objective, context and parameters, arrows labelled with the kind of transfer.

    Args:
        system: what to draw.
        path: where to write the picture as well.

    Raises:
        ValueError: matplotlib is not installed, or cannot write a file of this ending.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError(
            "pictures need matplotlib; install it with `pip install 'nestlearn[bench]'`"
        ) from error

    levels = system.levels
    widest = max(len(level) for level in levels)
    left = 1.5
    width = left + widest * (WIDTH + GAP)
    height = len(levels) * (HEIGHT + GAP) + 0.6
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    axes.text(0.15, height - 0.35, system.name, fontsize=13, fontweight="bold", va="center")
    centres: dict[str, tuple[float, float]] = {}
    for row, level in enumerate(levels):
        y = GAP / 2 + row * (HEIGHT + GAP) + HEIGHT / 2
        speed = " (slowest)" if row == 0 and len(levels) > 1 else ""
        label = f"level {row + 1}{speed}\nfrequency {frequency_text(level[0].frequency)}"
        axes.text(0.15, y, label, fontsize=9, va="center")
        offset = left + (widest - len(level)) * (WIDTH + GAP) / 2
        for column, box in enumerate(level):
            x = offset + column * (WIDTH + GAP) + (WIDTH + GAP) / 2
            centres[box.name] = (x, y)
            _box(axes, x, y, box)
    _arrows(axes, system, centres)
    if path is not None:
        try:
            figure.savefig(fspath(path), dpi=120)
        except ValueError as error:
            raise ValueError(f"cannot write the picture {fspath(path)}: {error}") from error
    return figure


def _box(axes: Any, x: float, y: float, box: Box) -> None:
    from matplotlib.patches import FancyBboxPatch

    corner = (x - WIDTH / 2, y - HEIGHT / 2)
    patch = FancyBboxPatch(
        corner, WIDTH, HEIGHT, boxstyle="round,pad=0,rounding_size=0.12",
        facecolor="whitesmoke" if box.parameters else "lightyellow", edgecolor="black", zorder=2,
    )  # fmt: skip
    axes.add_patch(patch)
    rows = [
        f"min {box.objective}",
        f"context: {box.context}",
        f"learns: {learned_text(box)}",
        box.solver,
        cost_text(box),
    ]
    lines = [shorten(row, 2) for row in rows if row]
    # Dollar signs would start mathematics; names of parameters have none, but users' may.
    text = "\n".join(lines).replace("$", r"\$")
    axes.text(x, y + HEIGHT / 2 - 0.06, shorten(box.name, 1).replace("$", r"\$"), ha="center",
              va="top", fontsize=9, fontweight="bold", zorder=3)  # fmt: skip
    axes.text(x, y - 0.12, text, ha="center", va="center", fontsize=7, zorder=3)


def shorten(text: str, lines: int, width: int = 58) -> str:
    """Text wrapped to the width of a box, cut after so many lines."""
    return "\n".join(textwrap.wrap(text, width, max_lines=lines, placeholder=" ..."))


def _arrows(axes: Any, system: NestedSystem, centres: dict[str, tuple[float, float]]) -> None:
    """One arrow per transfer; several between the same two boxes side by side."""
    between: dict[frozenset[str], int] = {}
    leaving = {box.name: [t for t in system.transfers if t.source == box.name]
               for box in system.boxes}  # fmt: skip
    for transfer in system.transfers:
        pair = frozenset((transfer.source, transfer.target))
        index = between.get(pair, 0)
        between[pair] = index + 1
        (x0, y0), (x1, y1) = centres[transfer.source], centres[transfer.target]
        up = 1 if y1 > y0 else -1
        side = (index - 1) * 0.95
        start = (x0 + side, y0 + up * HEIGHT / 2)
        end = (x1 + side, y1 - up * HEIGHT / 2)
        rows = round(abs(y1 - y0) / (HEIGHT + GAP))
        bend = 0.0 if rows <= 1 else 0.25  # pass beside the rows between
        colour = COLOURS[transfer.kind]
        axes.annotate(
            "", xy=end, xytext=start, zorder=1 if rows > 1 else 4,
            arrowprops={"arrowstyle": "-|>", "color": colour,
                        "connectionstyle": f"arc3,rad={bend}", "shrinkA": 0, "shrinkB": 0},
        )  # fmt: skip
        # Labels stand in the room next to their start, clear of boxes, at a height of their own.
        place = (leaving[transfer.source].index(transfer) + 1) / (len(leaving[transfer.source]) + 1)
        share = place * GAP / max(GAP, abs(end[1] - start[1]))
        axes.text(
            start[0] + share * (end[0] - start[0]), start[1] + share * (end[1] - start[1]),
            transfer.label, color=colour, fontsize=6.5, ha="center", va="center", zorder=5,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},
        )  # fmt: skip
