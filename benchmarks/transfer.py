"""Transfer protocol of the paper (Appendix E): encoder and head are trained together.

Adam at a constant rate for 500 epochs, without early stopping. A fold of a large task takes half an
hour, so it is not the smallest part that survives an interruption: each of its trainings is, from
its last checkpoint on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from folds import split_validation
from graph_data import dataset_of
from sklearn.metrics import mean_absolute_error
from targets import Target
from training_state import trained

from polysrl_dc import PolySRLConfig, PolySRLModel

EPOCHS = 500
LEARNING_RATES = (5e-3, 1e-3, 5e-4, 1e-4)
#: The protocol asks for values, not for uncertainties.
CONFIG = replace(PolySRLConfig.named("default"), heteroscedastic=False)


def predict_fold(
    target: Target,
    split: tuple[np.ndarray, np.ndarray],
    encoder: str | None,
    seed: int,
    learning_rates: Sequence[float] = LEARNING_RATES,
    unfinished: Path | None = None,
    epochs: int = EPOCHS,
) -> tuple[np.ndarray, None, dict[str, Any]]:
    """Choose the learning rate on a fifth of the training fold, train on all of it, predict.

    Parameters
    ----------
    target : Target
    split : tuple of numpy.ndarray
        Training and test rows.
    encoder : str or None
        Saved model to start from; None for random weights.
    seed : int
        Of weights, orders and the validation part.
    learning_rates : sequence of float
        One alone is taken without a trial.
    unfinished : path, optional
        Folder from which the same trainings, if they were interrupted, go on.
    epochs : int

    Returns
    -------
    predictions : numpy.ndarray, shape (n_test,)
        In units of the target.
    std : None
        See :data:`CONFIG`.
    params : dict
        ``learning_rate``, and ``validation_mae`` by rate if there was a choice.
    """
    torch.set_num_threads(1)
    train, test = split

    def train_on(rows: np.ndarray, rate: float) -> PolySRLModel:
        model = PolySRLModel(
            "regression",
            config=CONFIG,
            pretrained=encoder,
            batch_size=target.batch_size,
            learning_rate=rate,
            schedule="constant",
            seed=seed,
        )
        name = f"{target.name}, rate {rate:g}"
        return trained(model, dataset_of(target, rows), epochs, name, unfinished)

    trials: dict[float, float] = {}
    if len(learning_rates) > 1:
        part, valid = split_validation(target.formulas[train], seed=seed)
        truth, asked = target.values[train[valid]], dataset_of(target, train[valid])
        for rate in learning_rates:
            predicted = train_on(train[part], rate).predict(asked)
            trials[rate] = float(mean_absolute_error(truth, np.ravel(predicted)))
    rate = min(trials, key=trials.__getitem__) if trials else learning_rates[0]
    predictions = np.ravel(train_on(train, rate).predict(dataset_of(target, test)))
    params: dict[str, Any] = {"learning_rate": rate}
    if trials:
        params["validation_mae"] = {f"{rate:g}": error for rate, error in trials.items()}
    return predictions, None, params
