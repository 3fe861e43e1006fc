"""``nestlearn inspect``: the nested system of a model, from its configuration alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from nestlearn.optim.multirate import InnerFactory

Choice = Literal["none", "sgd", "momentum", "adamw"]


@dataclass
class Inspect:
    """Show which levels a model has, how often each is updated, what passes between them and what
    they cost. Weights are not loaded."""

    model: Annotated[str, tyro.conf.Positional]
    """A folder with a saved model or a training run, a .gguf file, or a Hugging Face id."""
    optimizer: Choice = "none"
    """What trains it, each level at its own period; none: the model in use."""
    tokens: int | None = None
    """Length of a sequence (default: the longest the model is meant for)."""
    table: bool = False
    """Print a table instead of a tree."""
    json: bool = False
    """Print one JSON object instead."""
    picture: Path | None = None
    """Also draw it into this file (.png, .svg or .pdf)."""

    def run(self) -> int:
        """Print the system; returns the exit status."""
        if self.tokens is not None and self.tokens < 1:
            raise ValueError(f"--tokens must be 1 or more, got {self.tokens}")
        if self.json and self.table:
            raise ValueError("give --json or --table, not both")
        if self.picture is not None and not self.picture.absolute().parent.is_dir():
            raise ValueError(f"--picture: no folder {self.picture.absolute().parent}")

        from nestlearn.cli.pretrained import load_shapes
        from nestlearn.lens import inspect

        model = load_shapes(self.model)
        system = inspect(model, optimizer_for(model, self.optimizer), tokens=self.tokens)
        if self.json:
            print(system.to_json())
        else:
            from rich.console import Console

            width = max(140, Console().width) if self.table else None
            Console(highlight=False, width=width).print(system.table() if self.table else system)
        if self.picture is not None:
            system.picture(self.picture)
        return 0


def optimizer_for(model: Any, name: Choice) -> Optimizer | None:
    """The optimizer that ``nestlearn train`` would use, with another inner optimizer if asked."""
    if name == "none":
        return None
    import functools

    import torch

    from nestlearn.optim import MultiRate, level_groups

    inner: dict[str, InnerFactory] = {
        "sgd": torch.optim.SGD,
        "momentum": functools.partial(torch.optim.SGD, momentum=0.9),
        "adamw": torch.optim.AdamW,
    }
    return MultiRate(level_groups(model, lr=1e-3), inner=inner[name])
