"""The tables and figures that can be reproduced, by name."""

from __future__ import annotations

import difflib
import importlib

from nestlearn.evals.harness.experiment import Experiment, Scale

EXPERIMENTS: dict[str, str] = {
    "table1": "nestlearn.evals.needles_trained:NeedlesTrained",
    "table2": "nestlearn.evals.language:Language",
    "table3": "nestlearn.evals.language:Recall",
    "table4": "nestlearn.evals.mad:MAD",
    "table5": "nestlearn.evals.formal_languages:FormalLanguages",
    "table6": "nestlearn.evals.ablation:Ablation",
    "fig4": "nestlearn.evals.scripted:Landscape",
    "fig6": "nestlearn.evals.scripted:ClassIncremental",
    "fig7": "nestlearn.evals.levels_qa:LevelsQA",
    "fig8": "nestlearn.evals.translation:Translation",
    "fig9": "nestlearn.evals.babilong_trained:BabiLong",
    "fig10": "nestlearn.evals.context_use:ContextUse",
    "fig11": "nestlearn.evals.scripted:EqualSteps",
    "fig12": "nestlearn.evals.scripted:StepTime",
    "few_shot": "nestlearn.evals.few_shot:FewShot",
    "knowledge": "nestlearn.evals.scripted:Knowledge",
    "mqar": "nestlearn.evals.mqar:MQAR",
    "section4.3": "nestlearn.evals.scripted:OrthogonalTasks",
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
