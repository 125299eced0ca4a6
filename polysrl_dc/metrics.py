"""Scores where labels are missing, and DeepChem's transformers undone on a single row."""

from collections.abc import Sequence
from copy import copy
from typing import Any

import numpy as np
from deepchem.metrics import Metric, mae_score, roc_auc_score
from deepchem.trans import Transformer, undo_transforms

from polysrl_dc.errors import InvalidInputError


def masked_scores(
    labels: np.ndarray,
    predictions: np.ndarray,
    weights: np.ndarray,
    metrics: Sequence[Metric],
    n_classes: int = 2,
    use_sample_weights: bool = False,
) -> tuple[dict[str, float], dict[str, Any]]:
    """Score each task on the rows that have its label.

    DeepChem's metrics count a missing label as a true zero; these leave it out.

    Parameters
    ----------
    labels, predictions, weights : numpy.ndarray, each of shape (n, n_tasks)
        A label of weight 0 is missing. To metrics of classification the predictions are
        probabilities of class 1.
    metrics : sequence of dc.metrics.Metric
    n_classes : int
        Of classification metrics.
    use_sample_weights : bool
        Pass the weights to the metrics; else they do not matter.

    Returns
    -------
    scores : dict
        Name of the metric -> mean over the tasks, by the metric's own task averager. Of metrics of
        one name it is the last, as in DeepChem.
    per_task : dict
        Name of the metric -> score of each task; of a single task it is a number.

    Raises
    ------
    InvalidInputError
        If a task has no label at all.

    Examples
    --------
    >>> import deepchem as dc
    >>> y, p, w = np.array([[1.0], [0.0]]), np.array([[1.5], [9.0]]), np.array([[1.0], [0.0]])
    >>> scores, _ = masked_scores(y, p, w, [dc.metrics.Metric(dc.metrics.mae_score)])
    >>> float(scores["mae_score"])
    0.5
    """
    tasks = []
    for task in range(labels.shape[1]):
        labeled = weights[:, task] != 0
        if not labeled.any():
            raise InvalidInputError(f"task {task} has no label to be scored on")
        tasks.append([part[labeled, task : task + 1] for part in (labels, predictions, weights)])

    def score(metric: Metric, truth: np.ndarray, found: np.ndarray, weight: np.ndarray) -> float:
        if metric.mode == "classification":  # else DeepChem takes two probabilities for classes
            found = np.stack([1 - found, found], axis=-1)
        alone = copy(metric)
        alone.task_averager = np.mean  # the metric's own one may need several tasks
        settings = {"n_classes": n_classes, "use_sample_weights": use_sample_weights}
        return float(alone.compute_metric(truth, found, weight, n_tasks=1, **settings))

    per_task = {metric.name: [score(metric, *task) for task in tasks] for metric in metrics}
    scores = {metric.name: metric.task_averager(per_task[metric.name]) for metric in metrics}
    if len(tasks) == 1:
        return scores, {name: found[0] for name, found in per_task.items()}
    return scores, per_task


def relative_error(
    labels: np.ndarray, predictions: np.ndarray, weights: np.ndarray, kind: str
) -> float:
    """Mean over the tasks of the error beside that of one value for all rows.

    Regression: the MAE, beside that of the median. Classification: 1 - ROC-AUC, beside 1/2.

    Parameters
    ----------
    labels, predictions, weights : numpy.ndarray, each of shape (n, n_tasks)
        As in :func:`masked_scores`; a task without labels, or with a single one, does not count.
    kind : {"regression", "classification"}

    Returns
    -------
    float
        1 where the predictions are as good as one value; NaN where no task counts.

    Examples
    --------
    >>> y, p, w = np.array([[1.0], [3.0]]), np.array([[1.5], [2.5]]), np.ones((2, 1))
    >>> relative_error(y, p, w, "regression")
    0.5
    """
    found = []
    for truth, guess in _labeled(labels, predictions, weights):
        if len(np.unique(truth)) < 2:
            continue
        if kind == "classification":
            found.append((1 - roc_auc_score(truth, guess)) / 0.5)
        else:
            found.append(mae_score(truth, guess) / _error_of_median(truth))
    return float(np.mean(found)) if found else float("nan")


def score_lines(
    targets: Sequence[str],
    labels: np.ndarray,
    predictions: np.ndarray,
    weights: np.ndarray,
    kind: str,
) -> list[str]:
    """The score of each target that has labels, in words.

    Parameters
    ----------
    targets : sequence of str, (n_tasks,)
    labels, predictions, weights : numpy.ndarray, each of shape (n, n_tasks)
        As in :func:`masked_scores`.
    kind : {"regression", "classification"}

    Returns
    -------
    list of str

    Examples
    --------
    >>> y, p, w = np.array([[1.0], [3.0]]), np.array([[1.5], [2.5]]), np.ones((2, 1))
    >>> score_lines(["gap"], y, p, w, "regression")
    ['mae_score of gap: 0.5 on 2 held-out labels; 1 with their median for all']
    """
    classes, lines = kind == "classification", []
    score = roc_auc_score if classes else mae_score
    for name, (truth, found) in zip(targets, _labeled(labels, predictions, weights), strict=True):
        line = f"{score.__name__} of {name}: "
        if classes and len(np.unique(truth)) < 2:
            lines.append(f"{line}needs held-out labels of both classes")
        elif len(truth):
            line += f"{score(truth, found):.4g} on {len(truth)} held-out labels"
            beside = "" if classes else f"; {_error_of_median(truth):.4g} with their median for all"
            lines.append(line + beside)
    return lines


def _labeled(
    labels: np.ndarray, predictions: np.ndarray, weights: np.ndarray
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Labels and predictions of each task on the rows that have its label."""
    tasks = zip(labels.T, predictions.T, weights.T, strict=True)
    return [(truth[weight != 0], found[weight != 0]) for truth, found, weight in tasks]


def _error_of_median(labels: np.ndarray) -> float:
    return float(np.abs(labels - np.median(labels)).mean())


def undone(values: np.ndarray, transformers: Sequence[Transformer]) -> np.ndarray:
    """Labels or predictions as they were before DeepChem's transformers.

    A ``NormalizationTransformer`` takes a single row for a column, so it is given two of them.

    Parameters
    ----------
    values : numpy.ndarray, shape (n, n_tasks)
    transformers : sequence of dc.trans.Transformer

    Returns
    -------
    numpy.ndarray, shape (n, n_tasks)
        In the units before.

    Examples
    --------
    >>> import deepchem as dc
    >>> dataset = dc.data.NumpyDataset(np.zeros((2, 1)), np.array([1.0, 3.0]))
    >>> normal = dc.trans.NormalizationTransformer(transform_y=True, dataset=dataset)
    >>> undone(np.array([[0.0]]), [normal]).tolist()
    [[2.0]]
    """
    rows = np.repeat(values, 2, axis=0) if len(values) == 1 else values
    return undo_transforms(rows, list(transformers))[: len(values)]
