"""Splits that keep what belongs together on one side, and predictions of rows held out by them."""

import hashlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from itertools import repeat
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from deepchem.data import Dataset, DiskDataset, NumpyDataset
from deepchem.splits import Splitter
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from sklearn.model_selection import GroupKFold

from polysrl_dc.batches import checked_labels
from polysrl_dc.datasets import PolymorphDataset
from polysrl_dc.domain import distances_to
from polysrl_dc.errors import InvalidInputError
from polysrl_dc.featurizers import check_lengths, reduced_formulas
from polysrl_dc.model import PolySRLModel


class StoichiometrySplitter(Splitter):
    """Split so that no reduced formula stands on both sides.

    Works on datasets whose X holds the graphs of this package. Sizes follow the fractions as far
    as whole groups allow; the split depends on the seed only.

    Parameters
    ----------
    groups : sequence, shape (n,), optional
        A label of each row of the datasets to be split, such as the publication it comes from, that
        does not stand on both sides either. What is measured on random rows tells little of new
        publications: their compounds are less like the known ones.

    Examples
    --------
    >>> import deepchem as dc, polysrl_dc
    >>> graphs = dc.feat.StoichiometryGraphFeaturizer()(["NaCl", "Na2Cl2", "MgO", "CaO", "KCl"])
    >>> splitter = dc.splits.StoichiometrySplitter()
    >>> [len(fold) for _, fold in splitter.k_fold_split(dc.data.NumpyDataset(graphs), 2)]
    [3, 2]
    >>> splitter = dc.splits.StoichiometrySplitter(["a", "b", "b", "c", "c"])
    >>> [len(fold) for _, fold in splitter.k_fold_split(dc.data.NumpyDataset(graphs), 2)]
    [3, 2]
    """

    def __init__(self, groups: Sequence[Hashable] | None = None) -> None:
        self.groups = groups

    def __str__(self) -> str:
        """Its name, and a digest of the groups: MolNet's loaders keep what was split under it."""
        if self.groups is None:
            return type(self).__name__
        digest = hashlib.sha256(repr(list(self.groups)).encode()).hexdigest()
        return f"{type(self).__name__}_groups_{digest[:16]}"

    def split(
        self,
        dataset: Dataset,
        frac_train: float = 0.8,
        frac_valid: float = 0.1,
        frac_test: float = 0.1,
        seed: int | None = None,
        log_every_n: int | None = None,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Row numbers of the three parts; groups are shuffled and cut where the rows add up.

        Parameters
        ----------
        dataset : dc.data.Dataset of n stoichiometry or structure graphs
        frac_train, frac_valid, frac_test : float
            Parts of the rows, which are met as closely as whole groups allow.
        seed : int, optional
            Default: another one with every call.
        log_every_n : int, optional
            Of no effect.

        Returns
        -------
        train, valid, test : numpy.ndarray of int
            Ascending; n together.

        Raises
        ------
        InvalidInputError
            A row is no graph, or has no group, naming row and id.
        ValueError
            A fraction is negative, they do not add up to 1, or there are not n ``groups``.
        """
        fractions = np.array([frac_train, frac_valid, frac_test])
        if (fractions < 0).any() or not np.isclose(fractions.sum(), 1):
            raise ValueError(f"fractions {fractions.tolist()} must not be negative and add up to 1")
        groups = row_groups(dataset, self.groups)
        shuffled = np.random.default_rng(seed).permutation(groups.max() + 1)
        sizes = np.bincount(groups)[shuffled]
        middle = (np.cumsum(sizes) - sizes / 2) / len(groups)
        part = np.searchsorted(np.cumsum(fractions)[:2], middle, side="right")
        part_of_group = np.empty_like(part)
        part_of_group[shuffled] = part
        train, valid, test = (np.flatnonzero(part_of_group[groups] == i) for i in range(3))
        return train, valid, test

    def k_fold_split(
        self,
        dataset: Dataset,
        k: int,
        directories: list[str] | None = None,
        seed: int | None = None,
        **kwargs: Any,
    ) -> list[tuple[Dataset, Dataset]]:
        """``k`` pairs of training and test dataset; every row is tested once.

        Parameters
        ----------
        dataset : dc.data.Dataset of n stoichiometry or structure graphs
        k : int
            Parts, of about the same size.
        directories : list of str, optional
            2 k folders for the parts of a DiskDataset.
        seed : int, optional
            Default: another one with every call.
        **kwargs
            DeepChem's; none has a meaning here.

        Returns
        -------
        list of k pairs of dc.data.Dataset

        Raises
        ------
        InvalidInputError
            A row is no graph, or has no group, naming row and id.
        TypeError
            An argument is unknown, or ``k`` no whole number.
        ValueError
            ``k`` is less than 2 or more than there are formulas, or groups; or the number of
            ``groups`` or ``directories`` is another one.
        """
        if kwargs:
            raise TypeError(f"unknown arguments {sorted(kwargs)}")
        groups = row_groups(dataset, self.groups)
        if not isinstance(k, Integral):
            raise TypeError(f"k is {k!r}: must be a whole number")
        if not 2 <= k <= groups.max() + 1:
            what = "formulas" if self.groups is None else "groups"
            raise ValueError(f"k is {k}: must be between 2 and the {groups.max() + 1} {what}")
        if directories is not None and len(directories) != 2 * k:
            raise ValueError(f"{len(directories)} directories for {2 * k} parts")
        folders: Iterator[str | None] = iter(directories) if directories else repeat(None)
        # large groups first, each to the smallest fold; those of a size in random order
        order = np.random.default_rng(seed).permutation(groups.max() + 1)
        folds = GroupKFold(k).split(groups, groups=order[groups])
        return [
            (dataset.select(train, next(folders)), dataset.select(test, next(folders)))
            for train, test in folds
        ]


def row_groups(dataset: Dataset, labels: Sequence[Hashable] | None = None) -> np.ndarray:
    """Numbers of what belongs together.

    Rows belong together if they have the same reduced formula or, where there are any, the same
    label, or if further rows link them so.

    Parameters
    ----------
    dataset : dc.data.Dataset of n stoichiometry or structure graphs
    labels : sequence, shape (n,), optional
        As ``groups`` of :class:`StoichiometrySplitter`.

    Returns
    -------
    numpy.ndarray, shape (n,), integer
        From 0.

    Raises
    ------
    InvalidInputError
        A row is no graph or has no label, naming row and id.
    ValueError
        There are more labels than rows, or less.
    """
    if isinstance(dataset, PolymorphDataset):
        check_lengths(dataset)
        names = dataset.groups
    else:
        names = reduced_formulas(dataset)
    formulas = np.unique(names, return_inverse=True)[1]
    if labels is None:
        return formulas
    column = pd.Series(list(labels), dtype=object)
    if len(column) != len(formulas):
        raise ValueError(f"{len(column)} groups for {len(formulas)} rows")
    for row in np.flatnonzero(column.isna() | (column == "")):
        raise InvalidInputError(f"row {row} (id {dataset.ids[row]}) has no group")
    numbers = formulas.max() + 1 + pd.factorize(column)[0]
    links = (np.ones(len(column)), (formulas, numbers))
    size = numbers.max() + 1
    return connected_components(coo_array(links, shape=(size, size)), directed=False)[1][formulas]


class HeldOut(NamedTuple):
    """Predictions of rows by models that have not learned from them.

    Attributes
    ----------
    mean, std : numpy.ndarray, each of shape (n, n_tasks)
        The standard deviations are the models' own.
    distance : numpy.ndarray, shape (n,)
        From the formula of each row to the nearest one with a label that its model has learned
        from, as in :class:`polysrl_dc.Domain`.
    """

    mean: np.ndarray
    std: np.ndarray
    distance: np.ndarray


def cross_val_predict(
    train: Callable[[Dataset], PolySRLModel],
    dataset: Dataset,
    n_folds: int = 5,
    polymorphs: bool = True,
    seed: int = 0,
    groups: Sequence[Hashable] | None = None,
) -> HeldOut:
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
    polymorphs : bool
        As in :meth:`PolySRLModel.predict_uncertainty`; classifiers take none.
    seed : int
        Of the parts.
    groups : sequence, shape (n,), optional
        As in :class:`StoichiometrySplitter`: what stays in one part besides equal formulas.

    Returns
    -------
    HeldOut
        In the order of the rows.

    Raises
    ------
    InvalidInputError
        Before anything is trained: a row, label or group is bad, naming row and id, or all labels
        of a task are in one part. Later: ``train`` refuses the rows of all parts but one, which is
        named.
    TypeError
        The rows are no dataset.
    ValueError
        ``n_folds`` is less than 2 or greater than the number of formulas, or of groups; there are
        not n ``groups``; or ``train`` has not fitted its model.

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
    >>> polysrl_dc.keep_formulas(model, dataset)
    >>> calibration = model.calibrate(dataset, predicted=predicted)
    """
    check_lengths(dataset)
    if isinstance(dataset, DiskDataset):  # select would write each part to a temporary folder
        dataset = NumpyDataset(dataset.X, dataset.y, dataset.w, dataset.ids)
    rows = NumpyDataset(dataset.X, ids=np.arange(len(dataset)))
    pairs = StoichiometrySplitter(groups).k_fold_split(rows, n_folds, seed=seed)
    folds = [tuple(part.ids.astype(int) for part in pair) for pair in pairs]
    n_tasks = int(np.prod(np.shape(dataset.y)[1:]))
    known = checked_labels(dataset, n_tasks, classification=False)[1] != 0
    for fold, (learned, _) in enumerate(folds, 1):
        for task in np.flatnonzero(~known[learned].any(0)):
            raise InvalidInputError(f"task {task} has no label outside fold {fold} of {n_folds}")
    labelled = known.any(1)
    order, predicted = [], []
    for fold, (learned, held_out) in enumerate(folds, 1):
        try:
            model = train(dataset.select(learned))
        except InvalidInputError as error:
            raise InvalidInputError(f"without fold {fold} of {n_folds}: {error}") from error
        asked = polymorphs and model.settings["task"] == "regression"
        rest = dataset.select(held_out)
        distance = distances_to(model, dataset.select(learned[labelled[learned]]), rest)
        predicted.append((*model.predict_uncertainty(rest, polymorphs=asked), distance))
        order.append(held_out)
    back = np.argsort(np.concatenate(order))
    return HeldOut(*(np.concatenate(parts)[back] for parts in zip(*predicted, strict=True)))
