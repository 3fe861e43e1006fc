"""Class-incremental streams from the real data."""

from __future__ import annotations

from pathlib import Path

import pytest

from nestlearn.evals.streams import clinc150, dbpedia14


def test_clinc_has_ten_tasks_of_fifteen(shared_data: Path) -> None:
    stream = clinc150(shared_data / "clinc150", train=3, test=2)
    assert [len(t.labels) for t in stream.tasks] == [15] * 10
    assert len(set(stream.seen(9))) == 150 and len(stream.seen(1)) == 30
    for task in stream.tasks:
        assert [label for _, label in task.train].count(task.labels[0]) == 3
        assert {label for _, label in task.train} == set(task.labels)
        assert len(task.test) == 30
    example = stream.examples(0)[0]
    assert example.prompt.endswith("\nIntent:") and example.completion.endswith("\n")


def test_a_seed_draws_classes_and_examples(shared_data: Path) -> None:
    one, other = (clinc150(shared_data / "clinc150", train=2, test=1, seed=s) for s in (0, 1))
    assert one.tasks[0].labels != other.tasks[0].labels
    for part in ("train", "test"):
        a, b = ({x for t in s.tasks for x in getattr(t, part)} for s in (one, other))
        assert len(a & b) < 0.2 * len(a)
    assert clinc150(shared_data / "clinc150", train=2, test=1, seed=1) == other


@pytest.mark.parametrize("maker", [clinc150, dbpedia14])
def test_splits_do_not_overlap(shared_data: Path, maker: object) -> None:
    folder = shared_data / ("clinc150" if maker is clinc150 else "dbpedia14")
    test, validation = (maker(folder, validation=v) for v in (False, True))  # type: ignore[operator]
    train = {text for t in test.tasks for text, _ in t.train}
    for stream in (test, validation):
        assert train == {text for t in stream.tasks for text, _ in t.train}
        asked = {text for t in stream.tasks for text, _ in t.test}
        # CLINC150 itself repeats a few sentences between its parts.
        assert len(train & asked) < 0.01 * len(asked)


def test_dbpedia_has_seven_tasks_of_two(shared_data: Path) -> None:
    stream = dbpedia14(shared_data / "dbpedia14", train=5, test=4, tasks=6)
    assert [len(t.labels) for t in stream.tasks] == [2] * 6
    assert all(len(t.train) == 10 and len(t.test) == 8 for t in stream.tasks)
    with pytest.raises(ValueError, match="tasks must be 1 to 7"):
        dbpedia14(shared_data / "dbpedia14", tasks=8)
    with pytest.raises(ValueError, match="has 75 examples, 76 were asked for"):
        dbpedia14(shared_data / "dbpedia14", test=76)
