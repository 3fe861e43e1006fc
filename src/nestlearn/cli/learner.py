"""A learner for the commands: from a memory file, or for a new one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nestlearn.cli.pretrained import Dtype, load_pretrained

if TYPE_CHECKING:
    from nestlearn.adaptation import Learner


def open_learner(
    model: str,
    path: Path,
    dtype: Dtype = "auto",
    device: str = "auto",
    new: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Learner:
    """A learner that goes on from a memory file, its model adapted as the memory needs it.

    Args:
        model: folder, .gguf file or Hugging Face id of the base model.
        path: the memory file. If there is none, the learner begins with an empty memory, and
            ``new`` has what `nestlearn.adapt` needs besides (``periods`` for its levels).
        dtype, device: of the model.
        settings: of `nestlearn.Learner`.

    Raises:
        ValueError: no memory file can be made there; said before the model is loaded.
    """
    from nestlearn.adaptation import Learner, adapt, adapt_to, read_memory
    from nestlearn.adaptation.file import check_path
    from nestlearn.levels.level import Level

    if path.exists():
        memory = read_memory(path)
        base, tokenizer = load_pretrained(model, dtype, device)
        return Learner(adapt_to(base, memory), tokenizer, memory=memory, **settings)
    check_path(path)
    options = {"periods": None, **(new or {})}
    periods = options.pop("periods")
    levels = None if periods is None else [Level(period=p) for p in periods]
    base, tokenizer = load_pretrained(model, dtype, device)
    adapt(base, levels, **options)
    print(f"new memory: {path}")
    return Learner(base, tokenizer, **settings)
