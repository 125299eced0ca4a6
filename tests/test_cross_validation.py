"""Predictions of rows by models that have not learned from them."""

import deepchem as dc
import numpy as np
import pytest
from models import FORMULAS, SIGNAL, data, fitted

from polysrl_dc import cross_val_predict

TWICE = [*FORMULAS, *reversed(FORMULAS)]
LABELS = np.concatenate([SIGNAL, SIGNAL[::-1] + 0.1])


@pytest.mark.parametrize("task", ["regression", "classification"])
def test_each_row_is_predicted_by_a_model_without_its_formula(task):
    labels = LABELS if task == "regression" else (LABELS > 0).astype(float)
    dataset = dc.data.NumpyDataset(data(formulas=TWICE, y=labels).X, labels, ids=TWICE)
    made = []

    def train(part):
        made.append((set(part.ids), fitted(task, dataset=part, nb_epoch=1)))
        return made[-1][1]

    mean, std = cross_val_predict(train, dataset, n_folds=4, n_samples=8)
    assert len(made) == 4 and mean.shape == std.shape == (len(TWICE), 1)
    for row, formula in enumerate(TWICE):
        (model,) = (model for learned, model in made if formula not in learned)
        n_samples = 8 if task == "regression" else 0
        alone = model.predict_uncertainty(dataset.select([row]), n_samples=n_samples)
        expected = np.array(alone)[:, 0]
        np.testing.assert_allclose((mean[row], std[row]), expected, rtol=1e-4, atol=1e-6)


def test_parts_follow_the_seed():
    def train(part):
        return fitted(dataset=part, nb_epoch=1)

    one, again, other = (cross_val_predict(train, data(), 3, seed=seed)[0] for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert (one != other).any()


@pytest.mark.parametrize("n_folds", [1, len(FORMULAS) + 1])
def test_more_parts_than_formulas_or_one_alone_are_refused(n_folds):
    message = f"k is {n_folds}: must be between 2 and the {len(FORMULAS)} formulas"
    with pytest.raises(ValueError, match=message):
        cross_val_predict(lambda _: pytest.fail("trained"), data(), n_folds)
