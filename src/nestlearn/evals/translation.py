"""Figure 8: continual translation of new languages by a pre-trained model with levels.

A model learns to translate one language into English, then another; after each it translates new
sentences of all languages learned so far (ChrF). Kalamang is spoken by some 130 people and hardly
written (`evals.kalamang`); the other language is invented (`evals.invented_language`), so that no
model can have read it. Both orders are run: what is measured after the first language is learning
separately, after the second, learning in sequence.

``hope_K`` is the model with K levels (`nestlearn.adapt`, `nestlearn.Learner`), ``hope_3_added`` the
same with added memories; ``hope_0`` is the model as it is, to which only the prompt says anything:
in-context learning. All are asked in three
ways: with the book closed; with the pairs read last in the prompt; with the most similar of all
pairs read so far in the prompt.
"""

from __future__ import annotations

import dataclasses
import random
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nestlearn.evals import invented_language
from nestlearn.evals.harness.data import data_path
from nestlearn.evals.harness.experiment import Experiment, Request, Scale, Table
from nestlearn.evals.harness.results import Results
from nestlearn.evals.kalamang import split

LANGUAGES = ("kalamang", "invented")
WAYS = ("closed", "recent", "similar")
PERIODS = (64, 512, 4096)
"""Tokens between two updates of each level."""
SYSTEMS: dict[str, tuple[int, str, float]] = {
    "hope_0": (0, "placement", 0.0),
    "hope_1": (1, "placement", 1e-4),
    "hope_2": (2, "placement", 1e-4),
    "hope_3": (3, "placement", 1e-4),
    "hope_3_added": (3, "added", 0.2),
}
"""Name -> levels, method of `nestlearn.adapt`, its usual learning rate. Placement is the paper's
(§7.3): the MLPs themselves are the levels."""
SPLIT_SEED = 0
"""Which sentences are learned and which are asked is the same for all seeds."""


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Sentences of a language with their English: ``(sentence, English)``."""

    name: str
    train: tuple[tuple[str, str], ...]
    test: tuple[tuple[str, str], ...]


@dataclasses.dataclass(frozen=True)
class Plan:
    """How much is read and asked at a scale.

    Attributes:
        train, test: sentences of each language; ``train`` None: all Kalamang has, and as many of
            the invented language.
        words: of the longest Kalamang sentence.
        shots: pairs in a prompt.
        new_tokens: of a translation at most.
        repeats, slots: of the learner, and of added memories.
        seeds: orders of the training sentences.
    """

    train: int | None
    test: int
    words: int = 12
    shots: int = 6
    new_tokens: int = 32
    repeats: int = 4
    slots: int = 16_384
    seeds: int = 3


class Translation(Experiment):
    """Systems x orders of the languages; every cell is one model that learns both."""

    name = "fig8"
    item = "Figure 8"
    title = "continual translation of new languages"
    question = (
        "How well is a new language translated after learning it, and after learning another?"
    )
    needs_model = True
    plans: Mapping[Scale, Plan] = {
        "tiny": Plan(train=200, test=24, seeds=1),
        "small": Plan(train=1000, test=100),
        "paper": Plan(train=None, test=200, words=30, shots=30, new_tokens=64, slots=131_072),
    }

    @property
    def plan(self) -> Plan:
        """Of this scale."""
        return self.plans[self.scale]

    def settings(self) -> dict[str, Any]:
        """Everything but the number of seeds, which may grow."""
        plan = dataclasses.asdict(self.plan)
        del plan["seeds"]
        return {**plan, "periods": PERIODS, "systems": SYSTEMS}

    def due(self, results: Results, request: Request) -> dict[str, dict[str, Any]]:
        """One cell per system, first language and seed; the second language is the other one."""
        seeds = self.plan.seeds if request.seeds is None else request.seeds
        data_path("kalamang"), chrf([""], ["-"])  # what is missing is said before any work
        return {
            name: {"system": system, "first": first, "seed": seed, "device": request.device}
            for seed in range(seeds)
            for system in request.pick("systems", tuple(SYSTEMS))
            for first in request.pick("tasks", LANGUAGES)
            if results.get(name := f"{system}/{first} first/seed{seed}") is None
        }

    def measure(self, cell: dict[str, Any]) -> dict[str, Any]:
        """Learn both languages in turn; translate what was learned so far after each."""
        import nestlearn as nl
        from nestlearn.cli.pretrained import load_pretrained

        plan, (count, method, lr) = self.plan, SYSTEMS[cell["system"]]
        seed = cell["seed"]
        model, tokenizer = load_pretrained(cell["model"], device=cell["device"])
        learner = None
        if count:
            levels = [nl.Level(period=p) for p in PERIODS[:count]]
            nl.adapt(model, levels, method=method, slots=plan.slots, seed=seed)
            learner = nl.Learner(model, tokenizer, lr=lr, repeats=plan.repeats, snapshots=0)
        found = corpora(plan)
        order = (cell["first"], *(name for name in LANGUAGES if name != cell["first"]))
        read: list[tuple[str, tuple[str, str]]] = []
        stages: list[dict[str, Any]] = []
        learning = 0.0
        for name in order:
            pairs = list(found[name].train)
            random.Random(seed).shuffle(pairs)
            read += [(found[name].name, pair) for pair in pairs]
            if learner is not None:
                began = time.perf_counter()
                learner.learn([example(found[name].name, pair) for pair in pairs])
                learning += time.perf_counter() - began
            seen = order[: len(stages) + 1]
            asked = {other: translate(model, tokenizer, found[other], read, plan) for other in seen}
            stages.append({
                "learned": name,
                "chrf": {k: {way: v[way][0] for way in WAYS} for k, v in asked.items()},
                "samples": {k: {way: v[way][1] for way in WAYS} for k, v in asked.items()},
            })  # fmt: skip
        return {
            "system": cell["system"], "first": cell["first"], "seed": seed, "stages": stages,
            "sentences": {name: [len(c.train), len(c.test)] for name, c in found.items()},
            "learning_seconds": learning,
        }  # fmt: skip

    def summary(self, row: dict[str, Any]) -> str:
        """ChrF after each stage."""
        said = []
        for stage in row["stages"]:
            scores = (
                f"{name} " + "/".join(f"{found[way]:.1f}" for way in WAYS)
                for name, found in stage["chrf"].items()
            )
            said.append(f"after {stage['learned']}: {', '.join(scores)}")
        return "; ".join(said)

    def tables(self, results: Results) -> list[Table]:
        """Separately, in sequence, and what was forgotten; one table for each way of asking."""
        notes = {
            "closed": "The prompt holds the sentence alone: what is known is in the levels.",
            "recent": f"The prompt holds the {self.plan.shots} pairs read last: in sequence, of "
            "the second language. hope_0 is in-context learning.",
            "similar": f"The prompt holds the {self.plan.shots} most similar of all pairs read, "
            "which nothing is forgotten of. hope_0 is in-context learning with retrieval.",
        }
        columns = ("system", "language", "alone", "first of two", "forgotten", "second of two")
        found = []
        for way in WAYS:
            rows = [
                (system, language, *_entries(results, system, language, way))
                for language in LANGUAGES
                for system in SYSTEMS
                if _rows(results, system)
            ]
            found.append(Table(f"ChrF, {way}", columns, tuple(rows), notes[way]))
        paper = (
            "The paper: in sequence, in-context learning falls far below learning separately; more "
            "levels lose less (its numbers are not at hand)."
        )
        return [*found[:-1], dataclasses.replace(found[-1], note=f"{found[-1].note} {paper}")]

    def plot(self, results: Results, path: Path) -> bool:
        """Bars: separately, and in sequence, per language and way of asking."""
        systems = [s for s in SYSTEMS if _rows(results, s)]
        if not systems:
            return False
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt

        figure, axes = plt.subplots(len(LANGUAGES), len(WAYS), figsize=(14, 7), sharey="row")
        names = ("right after learning it", "after learning the other too", "learned second")
        labels = [_levels(system) for system in systems]
        for line, language in zip(axes, LANGUAGES, strict=True):
            for axis, way in zip(line, WAYS, strict=True):
                for i, label in enumerate(names):
                    heights = []
                    for system in systems:
                        alone, first, _, second = _entries(results, system, language, way)
                        heights.append((alone, first, second)[i] or 0.0)
                    axis.bar([k + 0.27 * (i - 1) for k in range(len(systems))], heights, 0.25,
                             label=label)  # fmt: skip
                axis.set_xticks(range(len(systems)), labels)
                axis.set_title(f"{language}, {way}")
            line[0].set_ylabel("ChrF")
        for axis in axes[-1]:
            axis.set_xlabel("levels")
        handles, found = axes[0][0].get_legend_handles_labels()
        figure.tight_layout(rect=(0, 0.05, 1, 1))
        figure.legend(handles, found, loc="lower center", ncols=len(names))
        figure.savefig(path, dpi=110)
        plt.close(figure)
        return True


# -- reading results ------------------------------------------------------------------------------


def _levels(system: str) -> str:
    count, method, _ = SYSTEMS[system]
    return f"{count} added" if method == "added" else str(count)


def _rows(results: Results, system: str) -> list[dict[str, Any]]:
    return [r for r in results.rows(system=system) if "error" not in r]


def _entries(
    results: Results, system: str, language: str, way: str
) -> tuple[float | None, float | None, float | None, float | None]:
    """ChrF of a language learned alone, after another was learned on top, the difference, and
    learned as the second; means over seeds."""
    first = [r["stages"] for r in _rows(results, system) if r["first"] == language]
    other = [r["stages"] for r in _rows(results, system) if r["first"] != language]

    def mean(stages: list[Any], i: int) -> float | None:
        values = [found[i]["chrf"][language][way] for found in stages]
        return statistics.fmean(values) if values else None

    alone, kept = mean(first, 0), mean(first, 1)
    lost = None if alone is None or kept is None else alone - kept
    return alone, kept, lost, mean(other, 1)


# -- asking ---------------------------------------------------------------------------------------


def example(language: str, pair: tuple[str, str]) -> dict[str, str]:
    """What the learner reads: a prompt, and the translation as its completion.

    Example:
        >>> example("Kalamang", ("Ma he kararak.", "He was already dry."))["completion"]
        ' He was already dry.\\n'
    """
    return {"prompt": prompt(language, pair[0]), "completion": f" {pair[1]}\n"}


def prompt(language: str, sentence: str, shown: Sequence[tuple[str, tuple[str, str]]] = ()) -> str:
    """A sentence to be translated, after pairs ``(language, (sentence, English))``.

    Example:
        >>> print(prompt("Kalamang", "Ma bot.", [("Kalamang", ("Ma ra.", "He goes."))]))
        Kalamang: Ma ra.
        English: He goes.
        <BLANKLINE>
        Kalamang: Ma bot.
        English:
    """
    blocks = [f"{name}: {a}\nEnglish: {b}\n" for name, (a, b) in shown]
    return "\n".join([*blocks, f"{language}: {sentence}\nEnglish:"])


def translate(
    model: Any,
    tokenizer: Any,
    corpus: Corpus,
    read: Sequence[tuple[str, tuple[str, str]]],
    plan: Plan,
) -> dict[str, tuple[float, list[list[str]]]]:
    """Way of asking -> ChrF of the test sentences, and three (sentence, English, translation)."""
    from nestlearn.evals.knowledge import greedy

    found = {}
    for way in WAYS:
        prompts = []
        for sentence, _ in corpus.test:
            shown = list(read[-plan.shots :]) if way == "recent" else []
            if way == "similar":
                shown = similar(sentence, read, plan.shots)
            prompts.append(prompt(corpus.name, sentence, shown))
        written = greedy(model, tokenizer, prompts, plan.new_tokens, batch=8, line=True)
        answers = [answer.strip() for answer in written]
        samples = [[*pair, a] for pair, a in zip(corpus.test, answers, strict=True)]
        found[way] = (chrf(answers, [english for _, english in corpus.test]), samples[:3])
    return found


def chrf(answers: Sequence[str], references: Sequence[str]) -> float:
    """ChrF of a corpus (Popovic 2015; characters up to 6, beta 2), 0 to 100, by sacrebleu.

    Raises:
        ValueError: sacrebleu is not installed.
    """
    try:
        from sacrebleu.metrics import CHRF
    except ImportError:
        raise ValueError("ChrF needs sacrebleu: pip install 'nestlearn[bench]'") from None
    return float(CHRF().corpus_score(list(answers), [list(references)]).score)


def similar(
    sentence: str, read: Sequence[tuple[str, tuple[str, str]]], count: int
) -> list[tuple[str, tuple[str, str]]]:
    """The pairs whose sentences share most character trigrams with this one, the closest last.

    Example:
        >>> read = [("A", ("tok ma ra", "x")), ("A", ("an bot", "y")), ("A", ("ma ra", "z"))]
        >>> [english for _, (_, english) in similar("ma ra", read, 2)]
        ['x', 'z']
    """
    own = _trigrams(sentence)

    def overlap(text: str) -> float:
        other = _trigrams(text)
        return len(own & other) / len(own | other)

    scores = [overlap(pair[0]) for _, pair in read]
    best = sorted(range(len(read)), key=lambda i: (-scores[i], -i))[:count]
    return [read[i] for i in reversed(best)]


def _trigrams(text: str) -> set[str]:
    padded = f"  {text.lower()} "
    return {padded[i : i + 3] for i in range(len(padded) - 2)}


# -- the languages --------------------------------------------------------------------------------


def corpora(plan: Plan) -> dict[str, Corpus]:
    """Both languages at a plan's sizes."""
    train, test = split(data_path("kalamang"), plan.train, plan.test, plan.words, SPLIT_SEED)
    return {
        "kalamang": Corpus("Kalamang", tuple(train), tuple(test)),
        "invented": invented(len(train), plan.test),
    }


def invented(train: int, test: int, seed: int = SPLIT_SEED) -> Corpus:
    """Sentences of the invented language."""
    language = invented_language.InventedLanguage(seed)
    parts = invented_language.split(train, test, seed)
    learned, asked = (tuple(invented_language.sentences(language, part)) for part in parts)
    return Corpus(language.name, learned, asked)
