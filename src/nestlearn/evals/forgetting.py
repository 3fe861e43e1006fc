"""Metrics of learning task after task, from the accuracy matrix R.

``R[i][j]`` is the accuracy on task j after learning task i (j <= i); T tasks. "Forgetting" has two
definitions in the field; both are here, under names of their own.
"""

from __future__ import annotations

from collections.abc import Sequence

Matrix = Sequence[Sequence[float]]


def average_accuracy(matrix: Matrix) -> float:
    """``1/T sum_j R[T-1][j]``: accuracy at the end, all tasks alike.

    Example:
        >>> average_accuracy([[1.0], [0.5, 0.75]])
        0.625
    """
    last = _checked(matrix)[-1]
    return sum(last) / len(last)


def average_incremental_accuracy(matrix: Matrix) -> float:
    """Mean over i of the average accuracy on the tasks seen after task i."""
    return sum(sum(row) / len(row) for row in _checked(matrix)) / len(matrix)


def forgetting_from_best(matrix: Matrix) -> float:
    """``1/(T-1) sum_{j<T-1} (max_{i<T-1} R[i][j] - R[T-1][j])`` (Chaudhry et al. 2018).

    Example:
        >>> forgetting_from_best([[0.5], [1.0, 1.0], [0.25, 0.5, 1.0]])
        0.625
    """
    rows = _checked(matrix, 2)
    drops = [
        max(row[j] for row in rows[j:-1]) - rows[-1][j] for j in range(len(rows) - 1)
    ]  # fmt: skip
    return sum(drops) / len(drops)


def forgetting_since_learned(matrix: Matrix) -> float:
    """``1/(T-1) sum_{j<T-1} (R[j][j] - R[T-1][j])``: from just after learning to the end.

    Example:
        >>> forgetting_since_learned([[0.5], [1.0, 1.0], [0.25, 0.5, 1.0]])
        0.375
    """
    return -backward_transfer(matrix)


def backward_transfer(matrix: Matrix) -> float:
    """``1/(T-1) sum_{j<T-1} (R[T-1][j] - R[j][j])`` (Lopez-Paz and Ranzato 2017)."""
    rows = _checked(matrix, 2)
    changes = [rows[-1][j] - rows[j][j] for j in range(len(rows) - 1)]
    return sum(changes) / len(changes)


METRICS = {
    f.__name__: f
    for f in (
        average_accuracy,
        average_incremental_accuracy,
        forgetting_from_best,
        forgetting_since_learned,
        backward_transfer,
    )
}


def _checked(matrix: Matrix, tasks: int = 1) -> Matrix:
    if len(matrix) < tasks or any(len(row) != i + 1 for i, row in enumerate(matrix)):
        raise ValueError(
            f"row i of an accuracy matrix has i + 1 entries, of {tasks} or more tasks; got rows of "
            f"{[len(row) for row in matrix]}"
        )
    return matrix
