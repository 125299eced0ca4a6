"""Predictions of rows that were not learned from, as ``sklearn.model_selection`` makes them."""

from collections.abc import Callable

import numpy as np
from deepchem.data import Dataset, NumpyDataset

from polysrl_dc.datasets import StoichiometrySplitter
from polysrl_dc.model import PolySRLModel


def cross_val_predict(
    train: Callable[[Dataset], PolySRLModel],
    dataset: Dataset,
    n_folds: int = 5,
    n_samples: int = 64,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Predict each row by a model that has not learned from its formula.

    To calibrate a model of all rows, hand the result to :meth:`PolySRLModel.calibrate`: unlike
    held-out rows, nothing is then lost for training.

    Parameters
    ----------
    train : callable
        Makes a fitted model of a dataset; called once per fold.
    dataset : dc.data.Dataset
        X holds stoichiometry graphs, y labels.
    n_folds : int
        Parts of about the same size; all rows of a reduced formula are in one of them.
    n_samples : int
        As in :meth:`PolySRLModel.predict_uncertainty`; classifiers take none.
    seed : int
        Of the parts.

    Returns
    -------
    mean, std : numpy.ndarray, each of shape (n, n_tasks)
        In the order of the rows. The standard deviations are the models' own.

    Raises
    ------
    ValueError
        ``n_folds`` is less than 2 or greater than the number of formulas.

    Examples
    --------
    >>> import deepchem as dc, polysrl_dc
    >>> formulas = [f"{metal}{n}{anion}" for metal in ("Li", "Na", "K", "Rb")
    ...             for anion in ("F", "Cl", "Br") for n in range(1, 7)]
    >>> graphs = dc.feat.StoichiometryGraphFeaturizer().featurize(formulas)
    >>> dataset = dc.data.NumpyDataset(graphs, np.linspace(8, 9, 72))
    >>> def train(part):
    ...     model = dc.models.PolySRLModel(freeze_encoder=True)
    ...     model.fit(part, nb_epoch=2)
    ...     return model
    >>> predicted = cross_val_predict(train, dataset, n_folds=3)
    >>> model = train(dataset)
    >>> calibration = model.calibrate(dataset, predicted=predicted)
    """
    rows = NumpyDataset(dataset.X, ids=np.arange(len(dataset)))
    order, predicted = [], []
    for pair in StoichiometrySplitter().k_fold_split(rows, n_folds, seed=seed):
        learned, held_out = (part.ids.astype(int) for part in pair)
        model = train(dataset.select(learned))
        samples = 0 if model.settings["task"] == "classification" else n_samples
        predicted.append(model.predict_uncertainty(dataset.select(held_out), n_samples=samples))
        order.append(held_out)
    back = np.argsort(np.concatenate(order))
    mean, std = (np.concatenate(parts)[back] for parts in zip(*predicted, strict=True))
    return mean, std
