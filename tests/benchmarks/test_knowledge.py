"""The knowledge benchmark's bookkeeping: which settings its rules choose, means, the plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nestlearn.evals.harness.results import Results

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
BASE = {"method": "frozen", "setting": {}, "tuning": True, "perplexity_unrelated": 100.0,
        "cloze_log_prob": -4.0}  # fmt: skip
TUNED = {  # setting's rate and weight -> perplexity of unrelated text (base 100), log-probability
    (1e-4, 1e4): (102.0, -1.0),
    (5e-5, 1e4): (100.2, -2.0),
    (1e-4, 1e5): (99.0, -3.0),
    (2e-4, 1e5): (150.0, -0.5),
}


@pytest.fixture
def knowledge(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import knowledge

    return knowledge


@pytest.fixture
def results(tmp_path: Path) -> Results:
    """Elastic weights tuned on four settings; the chosen ones run on two seeds."""
    found = Results(tmp_path / "knowledge.json", "?", {})
    found.add("f", BASE)
    for (lr, weight), (perplexity, likely) in TUNED.items():
        row = {"method": "ewc", "setting": {"lr": lr, "ewc": weight}}
        tuned = {"tuning": True, "perplexity_unrelated": perplexity, "cloze_log_prob": likely}
        found.add(f"tune/{lr} {weight}", row | tuned)
        for seed in range(2):
            final = {
                "tuning": False,
                "seed": seed,
                "cloze_accuracy": 0.25 * (1 + seed),
                "cloze_log_prob": likely,
                "questions_accuracy": 0.0,
                "questions_log_prob": -5.0,
                "perplexity_unrelated": perplexity,
                "forgotten_nats": -0.1,
                "forgetting_curve_nats": [[0, 3.0], [1, 1.0], [2, 0.9]],
            }
            if weight == 1e4:
                found.add(f"final/{lr} {weight}/{seed}", row | final)
    found.add("broken", {"method": "ewc", "tuning": True, "error": "NaN"})
    return found


def test_a_rule_takes_the_best_recall_that_its_damage_allows(
    knowledge: Any, results: Results
) -> None:
    taken = {rule: knowledge.chosen(results, "ewc", rule) for rule in knowledge.RULES}
    assert taken == {
        "frugal": {"lr": 5e-5, "ewc": 1e4},
        "gentle": {"lr": 5e-5, "ewc": 1e4},
        "careful": {"lr": 1e-4, "ewc": 1e4},
        "recall": {"lr": 2e-4, "ewc": 1e5},
    }
    rows = results.rows(method="ewc", tuning=True)
    results.record["rows"] = [r for r in rows if r.get("perplexity_unrelated", 0) > 101]
    results.add("f", BASE)
    assert knowledge.chosen(results, "ewc", "frugal") is None  # no setting is allowed


def test_means_are_of_the_chosen_setting_and_only_of_what_has_run(
    knowledge: Any, results: Results
) -> None:
    summary = knowledge.summarise(results)
    assert set(summary) == {"ewc, frugal", "ewc, gentle", "ewc, careful"}  # recall has not
    entry = summary["ewc, careful"]
    assert entry["seeds"] == 2 and entry["setting"] == {"lr": 1e-4, "ewc": 1e4}
    assert entry["cloze_accuracy"] == pytest.approx(0.375)
    assert entry["cloze_accuracy_sd"] == pytest.approx(0.25 / 2**0.5)
    assert entry["perplexity_unrelated"] == pytest.approx(102.0)


def test_the_plot_says_once_what_several_rules_choose(
    knowledge: Any, results: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.figure import Figure

    texts: list[list[str]] = []

    def keep(figure: Any, path: Path, **_: Any) -> None:
        for axes in figure.axes:
            texts.append([line.get_label() for line in axes.lines])

    monkeypatch.setattr(Figure, "savefig", keep)
    knowledge.plot(results, tmp_path / "p.png")
    assert texts[0] == ["ewc, ewc=10000", "ewc, ewc=100000"]  # a line for each weight
    assert texts[2] == ["ewc, frugal and gentle", "ewc, careful"]
