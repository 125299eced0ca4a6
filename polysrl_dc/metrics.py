"""DeepChem's metrics where some labels are missing."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from deepchem.metrics import Metric

from polysrl_dc.errors import InvalidInputError


def masked_scores(
    labels: np.ndarray,
    predictions: np.ndarray,
    weights: np.ndarray,
    metrics: Sequence[Metric],
    n_classes: int = 2,
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Score each task on the rows that have its label.

    DeepChem's metrics count a missing label as a true zero; these leave it out.

    Parameters
    ----------
    labels, predictions, weights : numpy.ndarray, each of shape (n, n_tasks)
        A label of weight 0 is missing. Other weights do not matter.
    metrics : sequence of dc.metrics.Metric
    n_classes : int
        Of classification metrics.

    Returns
    -------
    scores : dict
        Name of the metric -> mean over the tasks, by the metric's own task averager. Of metrics of
        one name it is the last, as in DeepChem.
    per_task : dict
        Name of the metric -> score of each task.

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
    pairs = []
    for task in range(labels.shape[1]):
        labeled = weights[:, task] != 0
        if not labeled.any():
            raise InvalidInputError(f"task {task} has no label to be scored on")
        pairs.append((labels[labeled, task : task + 1], predictions[labeled, task : task + 1]))

    def score(metric: Any, pair: tuple[np.ndarray, np.ndarray]) -> float:
        return float(metric.compute_metric(*pair, n_tasks=1, n_classes=n_classes))

    per_task = {metric.name: [score(metric, pair) for pair in pairs] for metric in metrics}
    scores = {metric.name: metric.task_averager(per_task[metric.name]) for metric in metrics}
    return scores, per_task
