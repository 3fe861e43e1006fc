"""The tables and figures that can be reproduced, by name."""

from __future__ import annotations

import difflib
import importlib

from nestlearn.evals.harness.experiment import Experiment, Scale

EXPERIMENTS: dict[str, str] = {
    "table1": "nestlearn.evals.needles_trained:NeedlesTrained",
    "table5": "nestlearn.evals.formal_languages:FormalLanguages",
    "fig7": "nestlearn.evals.levels_qa:LevelsQA",
    "fig9": "nestlearn.evals.babilong_trained:BabiLong",
}
"""Name -> ``module:class``; imported when asked for."""


def experiment(name: str, scale: Scale = "tiny") -> Experiment:
    """The experiment called ``name`` at a scale.

    Raises:
        ValueError: there is none (the message lists all), or it has no such scale.

    Example:
        >>> experiment("table5").item
        'Table 5'
    """
    if name not in EXPERIMENTS:
        near = difflib.get_close_matches(name, EXPERIMENTS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(EXPERIMENTS)}"
        raise ValueError(f"unknown experiment {name!r}; {hint}")
    module, cls = EXPERIMENTS[name].split(":")
    made: Experiment = getattr(importlib.import_module(module), cls)(scale)
    return made
