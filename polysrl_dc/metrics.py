"""DeepChem's metrics where labels are missing, and its transformers undone on a single row."""

from collections.abc import Sequence
from copy import copy
from typing import Any

import numpy as np
from deepchem.metrics import Metric
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
