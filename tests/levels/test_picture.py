"""Pictures: every box and arrow is in them, the slowest level at the bottom."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import nestlearn as nl
from nestlearn.levels import Box, NestedSystem

pytest.importorskip("matplotlib")


def system() -> NestedSystem:
    layer = nl.nn.NeuralMemory(16, 2, preset="linear_attention")
    return nl.inspect(layer, torch.optim.SGD(layer.parameters(), momentum=0.9), tokens=512)


def test_a_picture_shows_what_the_system_says() -> None:
    drawn = system()
    texts = {t.get_text(): t.get_position() for t in drawn.picture().axes[0].texts}
    joined = "\n".join(texts)
    for box in drawn.boxes:
        assert box.name in texts
        assert f"min {box.objective}" in joined and f"context: {box.context}" in joined.replace(
            "\n", " "
        )
    for kind in ("initialisation", "backpropagation", "direct parametric", "generation (context)"):
        assert kind in texts
    assert "frequency 512" in joined and "(slowest)" in joined and "512 FLOP" in joined
    # One row per level, and the slowest is the lowest.
    heights = [texts[level[0].name][1] for level in drawn.levels]
    assert heights == sorted(heights) and len(set(heights)) == len(heights)


def test_arrows_go_from_box_to_box() -> None:
    axes = system().picture().axes[0]
    arrows = [t for t in axes.texts if getattr(t, "arrow_patch", None) is not None]
    assert len(arrows) == len(system().transfers)


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_pictures_are_written(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"system.{ending}"
    NestedSystem([Box("costs $5 or $6", "x_1 $ y", "c", ("a",), 1)]).picture(path)
    assert path.stat().st_size > 1000


def test_an_unknown_format_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot write the picture"):
        system().picture(tmp_path / "system.docx")


def test_without_matplotlib_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match="pip install"):
        system().picture()
