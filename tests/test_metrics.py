"""Errors beside those of one value for all rows, and scores in words."""

import numpy as np
import pytest

from polysrl_dc.metrics import relative_error, score_lines


def test_an_error_is_beside_that_of_the_median() -> None:
    labels = np.array([[1.0, 100.0], [2.0, 300.0], [6.0, 0.0]])
    found = np.array([[1.5, 150.0], [2.0, 250.0], [5.0, 7e9]])
    known = np.array([[1.0, 0.5], [1.0, 2.0], [1.0, 0.0]])
    of_each = (0.5 + 0 + 1) / (1 + 0 + 4), 100 / 200
    assert relative_error(labels, found, known, "regression") == pytest.approx(np.mean(of_each))
    alone = relative_error(labels[:, :1], found[:, :1], known[:, :1], "regression")
    assert alone == pytest.approx(of_each[0])


def test_an_error_of_classes_is_the_part_of_pairs_in_the_wrong_order() -> None:
    labels, found = np.array([[0.0], [0.0], [0.0], [1.0]]), np.array([[0.1], [0.4], [0.9], [0.7]])
    error = relative_error(labels, found, np.ones((4, 1)), "classification")
    assert error == pytest.approx((1 / 3) / (1 / 2))


@pytest.mark.parametrize("kind", ["regression", "classification"])
def test_labels_that_are_all_the_same_have_no_error_beside_one_value(kind: str) -> None:
    labels = np.array([[1.0, 0.0], [1.0, 1.0]])
    found, known = np.full((2, 2), 0.5), np.ones((2, 2))
    assert relative_error(labels, found, known, kind) == 1.0
    assert np.isnan(relative_error(labels[:, :1], found[:, :1], known[:, :1], kind))


def test_scores_in_words_leave_out_what_is_missing() -> None:
    labels, found = np.array([[0.0, 1.0], [1.0, 0.0]]), np.array([[0.2, 0.5], [0.9, 9.0]])
    known = np.array([[1.0, 1.0], [1.0, 0.0]])
    assert score_lines(["a", "b"], labels, found, known, "classification") == [
        "roc_auc_score of a: 1 on 2 held-out labels",
        "roc_auc_score of b: needs held-out labels of both classes",
    ]
    assert score_lines(["a", "b"], labels, found, known, "regression") == [
        "mae_score of a: 0.15 on 2 held-out labels; 0.5 with their median for all",
        "mae_score of b: 0.5 on 1 held-out labels; 0 with their median for all",
    ]
    assert score_lines(["a"], labels[:, :1], found[:, :1], np.zeros((2, 1)), "regression") == []
