"""Formulas and their values as DeepChem data sets of stoichiometry graphs.

``polysrl_dc`` is imported first, since it imports DeepChem without a line for each optional library
that is not installed. No other file of the benchmarks imports DeepChem when it is run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from polysrl_dc import StoichiometryGraphFeaturizer

# isort: split
from deepchem.data import Dataset, NumpyDataset
from deepchem.models.models import Model
from deepchem.trans import undo_transforms

if TYPE_CHECKING:
    from targets import Target

__all__ = ["Dataset", "Model", "NumpyDataset", "dataset_of", "graph_dataset", "undo_transforms"]


def graph_dataset(
    formulas: Sequence[str] | np.ndarray,
    values: np.ndarray | None = None,
    ids: Sequence[str] | np.ndarray | None = None,
) -> NumpyDataset:
    """Data set of formulas.

    Parameters
    ----------
    formulas : sequence of str, (n,)
    values : array-like, (n,) or (n, n_tasks), optional
        Labels; without them the data set is one to predict.
    ids : sequence, (n,), optional
        The formulas by default.

    Returns
    -------
    deepchem.data.NumpyDataset

    Raises
    ------
    polysrl_dc.InvalidInputError
        Naming a formula that cannot be read, and its row.

    Examples
    --------
    >>> graph_dataset(["NaCl", "KCl"], np.array([8.5, 8.4])).y.shape
    (2, 1)
    """
    graphs = StoichiometryGraphFeaturizer().featurize(formulas)
    labels = None if values is None else np.reshape(values, (len(graphs), -1))
    return NumpyDataset(graphs, labels, ids=np.asarray(formulas if ids is None else ids))


def dataset_of(target: Target, rows: np.ndarray) -> NumpyDataset:
    """Data set of rows of a target, whose numbers are the ids."""
    return graph_dataset(target.formulas[rows], target.values[rows], ids=rows)
