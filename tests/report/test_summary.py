"""What the page says of a run: warnings, confusions, scores."""

from __future__ import annotations

import math
from typing import Any

import pytest
from report_examples import classification

from ntkdask.report import summary


def test_warnings_name_what_to_doubt() -> None:
    metrics = classification(folds=2)
    metrics["memory"]["measured_peak_bytes"] = 3 * 2**30
    metrics["folds"][1]["alpha"] = 100.0
    found = "\n".join(summary.find_warnings(metrics))
    assert "3\u202fGiB, exceeded its plan of 393\u202fMiB" in found
    assert "3\u202fGiB, exceeded its budget of 2\u202fGiB" in found
    assert "Fold 1: the chosen α = 100 is the largest tried" in found
    assert "Fold 0" not in found


def test_confusion_sums_and_worst_pairs() -> None:
    folds: list[Any] = [
        {"test": {"confusion": [[5, 1], [0, 4]]}},
        {"test": {"confusion": [[5, 2], [1, 4]]}},
        {"test": None},
    ]
    matrix = summary.confusion_counts(folds)
    assert matrix.tolist() == [[10, 3], [1, 8]]
    assert summary.confused_pairs(matrix, ["a", "b"], count=1) == [("a", "b", "3", "23.08\u202f%")]
    assert summary.largest_class(matrix) == pytest.approx(13 / 22)
    assert [row["share"] for row in summary.class_table(matrix, ["a", "b"])] == pytest.approx([10 / 13, 8 / 9])


def test_scores_fall_back_to_the_folds() -> None:
    folds = [{"test": {"mse": 1.0}}, {"test": {"mse": 3.0}}]
    assert summary.mean_test_score({"test": {}, "folds": folds}, "mse") == (2.0, 1.0)
    assert all(map(math.isnan, summary.mean_test_score({"test": {}, "folds": []}, "mse")))
