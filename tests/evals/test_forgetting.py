"""Metrics of continual learning on matrices worked out by hand."""

from __future__ import annotations

import pytest

from nestlearn.evals.forgetting import (
    METRICS,
    average_accuracy,
    average_incremental_accuracy,
    backward_transfer,
    forgetting_from_best,
    forgetting_since_learned,
)

# Task 0 gets better before it is lost, so the two definitions of forgetting differ.
MATRIX = [[0.6], [0.9, 0.8], [0.5, 0.7, 1.0]]


def test_by_hand() -> None:
    assert average_accuracy(MATRIX) == pytest.approx((0.5 + 0.7 + 1.0) / 3)
    assert average_incremental_accuracy(MATRIX) == pytest.approx(
        (0.6 + (0.9 + 0.8) / 2 + (0.5 + 0.7 + 1.0) / 3) / 3
    )
    # Best before the end: 0.9 and 0.8; just after learning: 0.6 and 0.8; at the end 0.5 and 0.7.
    assert forgetting_from_best(MATRIX) == pytest.approx((0.4 + 0.1) / 2)
    assert forgetting_since_learned(MATRIX) == pytest.approx((0.1 + 0.1) / 2)
    assert backward_transfer(MATRIX) == pytest.approx(-0.1)


def test_getting_better_is_transfer_not_forgetting() -> None:
    matrix = [[0.2], [0.3, 0.5], [0.7, 0.5, 0.5]]
    assert backward_transfer(matrix) == pytest.approx(0.25)
    assert forgetting_from_best(matrix) == pytest.approx((-0.4 + 0.0) / 2)


def test_the_last_row_is_no_candidate_for_the_best() -> None:
    """Chaudhry et al.: the best of the tasks before the last."""
    assert forgetting_from_best([[0.4], [0.9, 0.1]]) == pytest.approx(-0.5)


@pytest.mark.parametrize("matrix", [[], [[0.1, 0.2]], [[0.1], [0.2]]])
def test_other_shapes_are_refused(matrix: list[list[float]]) -> None:
    for metric in METRICS.values():
        with pytest.raises(ValueError, match="row i of an accuracy matrix has"):
            metric(matrix)
