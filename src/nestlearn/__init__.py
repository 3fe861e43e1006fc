"""nestlearn: models that keep learning. Nested Learning and Hope for PyTorch.

``import nestlearn as nl`` gives

- ``nl.Level``, ``nl.Clock``, ``nl.NestedSystem``: who is updated when (SPEC §1);
- ``nl.nn``: sequence layers that learn while they read, ``y, state = layer(x, state)``;
- ``nl.optim``: optimizers whose levels are visible;
- ``nl.adapt``, ``nl.unadapt``, ``nl.Learner``, ``nl.Memory``: a pre-trained model that keeps
  learning, and what it learned as a file;
- ``nl.inspect``: the nested system of any model and optimizer, and what it costs; ``nl.lens``
  teaches it more; ``nl.levels`` has the transfers, to describe a system or to build one;
- ``nl.HopeConfig``, ``nl.HopeModel``, ``nl.HopeForCausalLM``: Hope as a Hugging Face model, known
  to ``AutoConfig`` and ``AutoModelForCausalLM`` as ``model_type="hope"``.
"""

from __future__ import annotations

import sys
from pathlib import PurePath
from typing import TYPE_CHECKING

from nestlearn._lazy import lazy_exports

if TYPE_CHECKING:
    from nestlearn import lens, levels, nn, optim
    from nestlearn.adaptation import Learner, Memory, adapt, unadapt
    from nestlearn.lens import inspect
    from nestlearn.levels.clock import Clock
    from nestlearn.levels.level import Level
    from nestlearn.levels.system import NestedSystem
    from nestlearn.models.hope import HopeConfig, HopeForCausalLM, HopeModel

__version__ = "0.1.0"

__all__ = [
    "Clock",
    "HopeConfig",
    "HopeForCausalLM",
    "HopeModel",
    "Learner",
    "Level",
    "Memory",
    "NestedSystem",
    "__version__",
    "adapt",
    "inspect",
    "lens",
    "levels",
    "nn",
    "optim",
    "unadapt",
]

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "Clock": "nestlearn.levels.clock",
        "Level": "nestlearn.levels.level",
        "NestedSystem": "nestlearn.levels.system",
        "Learner": "nestlearn.adaptation",
        "Memory": "nestlearn.adaptation",
        "adapt": "nestlearn.adaptation",
        "unadapt": "nestlearn.adaptation",
        "inspect": "nestlearn.lens",
        "lens": "nestlearn.lens",
        "levels": "nestlearn.levels",
        "HopeConfig": "nestlearn.models.hope",
        "HopeModel": "nestlearn.models.hope",
        "HopeForCausalLM": "nestlearn.models.hope",
        "nn": "nestlearn.nn",
        "optim": "nestlearn.optim",
    },
)


def _started_as_command() -> bool:
    """Whether this process is the ``nestlearn`` command (or ``python -m nestlearn``)."""
    started = PurePath(sys.argv[0]).stem if getattr(sys, "argv", None) else ""
    return started in ("nestlearn", "-m")


# AutoModelForCausalLM.from_pretrained(folder) must know Hope as soon as nestlearn is imported. That
# imports torch and transformers (two seconds), so the command line, whose --help must be quick,
# leaves it to the sub-commands that load models.
if not _started_as_command():
    import nestlearn.models.hope  # noqa: F401
