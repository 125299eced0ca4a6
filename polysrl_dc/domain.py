"""How far a formula is from those that a model has learned from.

A prediction for a formula unlike all of the reference, or with an element that the reference lacks,
is an extrapolation. Distances are those between embeddings; what counts as far follows from the
distances of the reference formulas from one another.

Two references answer two questions. With the structures of pretraining: is the embedding learned or
extrapolated, and which known compounds is the formula like? With the formulas that a model was
trained on: how far is a prediction from the data it rests on? The second goes with the error.
"""

from __future__ import annotations

import warnings
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import pandas as pd
from deepchem.data import Dataset, NumpyDataset
from pymatgen.core import Element
from sklearn.neighbors import NearestNeighbors

from polysrl_dc.batches import stoichiometries
from polysrl_dc.datasets import PolymorphDataset
from polysrl_dc.errors import InvalidInputError
from polysrl_dc.featurizers import Formulas, formulas_dataset, reduced_formulas


class EmbeddingModel(Protocol):
    """What is asked of a model here; every ``PolySRLModel`` is one."""

    provenance: dict[str, Any]

    def predict_embedding(self, dataset: Formulas) -> np.ndarray:
        """Vectors of unit length, shape (n, F)."""


class OutsideDomainWarning(UserWarning):
    """Formulas have elements that the reference lacks, or are far from all of it."""


class Domain:
    """The formulas of a reference in embedding space: of structures, or of training data.

    Distances are Euclidean, between embeddings of unit length: 0 to 2, without a unit. A formula
    lies outside if one of its elements is not in the reference, or if it is further from the
    nearest reference formula than most reference formulas are from their own nearest one.

    Parameters
    ----------
    model : PolySRLModel
        The reference is embedded once, with the weights that the model has at this moment.
    reference : PolymorphDataset, dc.data.Dataset of graphs, or iterable of formulas, optional
        At least two different reduced formulas. Rows of one reduced formula count as one. Default:
        the formulas that ``polysrl train``, an estimator for scikit-learn or :func:`keep_formulas`
        has put into the model; ``model.domain`` is made of them once and kept.
    percentile : float
        Of the reference's own distances: above it a formula lies outside.
    n_sampled : int
        Reference formulas whose distance to the nearest other one is measured.
    seed : int
        Of that sample.

    Attributes
    ----------
    formulas : numpy.ndarray, shape (m,), str
        Different reduced formulas of the reference.
    structures : list of m numpy.ndarray
        Ids of the rows of the reference that have each formula.
    elements : numpy.ndarray, shape (119,), bool
        True at the atomic numbers that occur in the reference.
    own_distances : numpy.ndarray, shape (min(m, n_sampled),), float64
        From reference formulas to the nearest other one, ascending.
    threshold : float
        Their ``percentile``.

    Raises
    ------
    InvalidInputError
        A bad formula or row, which is named, or fewer than two different formulas.
    ValueError
        ``percentile`` is not between 0 and 100, ``n_sampled`` less than 1, or no reference known.

    Examples
    --------
    >>> import polysrl_dc
    >>> model = polysrl_dc.PolySRLModel.from_pretrained("polysrl-mp")
    >>> domain = Domain(model, ["NaCl", "KCl", "Na2Cl2", "RbBr"])
    >>> domain.formulas.tolist(), domain.structures[1].tolist()
    (['KCl', 'NaCl', 'RbBr'], ['NaCl', 'Na2Cl2'])
    >>> domain.query(["K2Cl2"], k=2)[["nearest", "rank", "outside"]].values.tolist()
    [['KCl', 1, False], ['RbBr', 2, False]]
    """

    def __init__(
        self,
        model: EmbeddingModel,
        reference: Formulas | None = None,
        *,
        percentile: float = 99.0,
        n_sampled: int = 2000,
        seed: int = 0,
    ) -> None:
        if not 0 <= percentile <= 100:
            raise ValueError(f"percentile is {percentile}: must be between 0 and 100")
        if n_sampled < 1:
            raise ValueError(f"n_sampled is {n_sampled}: must be at least 1")
        if reference is not None:
            dataset, names = _rows(reference)
        elif model.provenance.get("formulas"):
            dataset = formulas_dataset(model.provenance["formulas"])
            names = np.array(model.provenance["formulas"], dtype=str, ndmin=1)  # reduced already
        else:
            raise ValueError("the model does not hold the formulas it has learned from")
        self.formulas, rows, groups = np.unique(names, return_index=True, return_inverse=True)
        if len(self.formulas) < 2:
            raise InvalidInputError(
                f"the reference has no formula but {self.formulas[0]}: there is no distance in it"
            )
        ends = np.cumsum(np.bincount(groups))[:-1]
        self.structures = np.split(dataset.ids[np.argsort(groups, kind="stable")], ends)
        different = dataset.select(rows)
        self.elements = _fractions(different).max(0) > 0
        self.percentile, self.n_sampled, self.seed = percentile, n_sampled, seed
        self._row = {name: row for row, name in enumerate(self.formulas.tolist())}
        self._model = model
        self._vectors = model.predict_embedding(different)
        self._search = _search(self._vectors)

    @cached_property
    def own_distances(self) -> np.ndarray:
        """From reference formulas to the nearest other one, ascending; of ``n_sampled`` at most."""
        sample = np.arange(len(self._vectors))
        if self.n_sampled < len(sample):
            chance = np.random.default_rng(self.seed)
            sample = chance.choice(sample, self.n_sampled, replace=False)
        distances, found = self._search.kneighbors(self._vectors[sample], 2)
        itself = found[:, 0] == sample  # not so where two formulas have one embedding
        return np.sort(np.where(itself, distances[:, 1], distances[:, 0]))

    @cached_property
    def threshold(self) -> float:
        """The distance above which a formula lies outside."""
        return float(np.percentile(self.own_distances, self.percentile))

    def query(self, formulas: Formulas, k: int = 5) -> pd.DataFrame:
        """The nearest reference formulas of each formula, and whether it lies outside.

        An :class:`OutsideDomainWarning` says how many do, if any.

        Parameters
        ----------
        formulas : dc.data.Dataset of n graphs, or iterable of n formulas
        k : int
            Reference formulas to name, at most all m of them.

        Returns
        -------
        pandas.DataFrame, n * k rows, indexed by the ids of the formulas
            ``outside`` (bool); ``unseen``, symbols of the elements that the reference lacks, with
            spaces between; ``percentile``, the share (in %) of the reference's own distances that
            are below that of the nearest formula; ``rank``, 1 ... k; ``nearest``, a reduced
            formula of the reference; ``distance`` to it, exactly 0 for the same reduced formula;
            ``n_structures`` and ``structures``, how many rows of the reference have it, and an
            array of their ids.

        Raises
        ------
        InvalidInputError
            A bad formula or row, which is named.
        ValueError
            ``k`` is not between 1 and m.

        Examples
        --------
        >>> import polysrl_dc
        >>> model = polysrl_dc.PolySRLModel.from_pretrained("polysrl-mp")
        >>> found = Domain(model, ["NaCl", "KCl"]).query(["NaCl"], k=1)
        >>> found[["outside", "percentile", "nearest", "distance"]].values.tolist()
        [[False, 0.0, 'NaCl', 0.0]]
        """
        if not 1 <= k <= len(self.formulas):
            raise ValueError(f"k is {k}: must be between 1 and {len(self.formulas)}, the reference")
        dataset, names = _rows(formulas)
        missing = self._unseen(dataset)
        symbols = np.array([Element.from_Z(z).symbol for z in range(1, missing.shape[1])])
        unseen = np.array([" ".join(symbols[row[1:]]) for row in missing], dtype=object)
        distances, rows = self._nearest(dataset, names, k)
        outside = missing.any(1) | (distances[:, 0] > self.threshold)
        percentile = 100 * np.searchsorted(self.own_distances, distances[:, 0])
        if outside.any():
            self._warn(names, outside, unseen, distances[:, 0])
        structures = [self.structures[row] for row in rows.ravel()]
        columns = {
            "outside": np.repeat(outside, k),
            "unseen": np.repeat(unseen, k),
            "percentile": np.repeat(percentile / len(self.own_distances), k),
            "rank": np.tile(np.arange(1, k + 1), len(rows)),
            "nearest": self.formulas[rows.ravel()],
            "distance": distances.ravel(),
            "n_structures": [len(ids) for ids in structures],
            "structures": structures,
        }
        return pd.DataFrame(columns, index=np.repeat(dataset.ids, k))

    def distance(self, formulas: Formulas) -> np.ndarray:
        """From each formula to the nearest of the reference.

        Parameters
        ----------
        formulas : dc.data.Dataset of n graphs, or iterable of n formulas

        Returns
        -------
        numpy.ndarray, shape (n,), float64
            0 to 2, without a unit.

        Raises
        ------
        InvalidInputError
            A bad formula or row, which is named.

        Examples
        --------
        >>> import polysrl_dc
        >>> model = polysrl_dc.PolySRLModel.from_pretrained("polysrl-mp")
        >>> Domain(model, ["NaCl", "KCl"]).distance(["Na2Cl2", "RbCl"]).round(1).tolist()
        [0.0, 0.5]
        """
        return _to_nearest(self._search, self._model, formulas)

    def outside(self, formulas: Formulas, distance: np.ndarray | None = None) -> np.ndarray:
        """Whether each formula lies outside: what :meth:`query` says, and faster.

        Parameters
        ----------
        formulas : dc.data.Dataset of n graphs, or iterable of n formulas
        distance : numpy.ndarray, shape (n,), optional
            What :meth:`distance` says of them, if it is there already.

        Returns
        -------
        numpy.ndarray, shape (n,), bool

        Raises
        ------
        InvalidInputError
            A bad formula or row, which is named.
        ValueError
            ``distance`` has another shape.

        Examples
        --------
        >>> import polysrl_dc
        >>> model = polysrl_dc.PolySRLModel.from_pretrained("polysrl-mp")
        >>> Domain(model, ["NaCl", "KCl"]).outside(["Na2Cl2", "UN"]).tolist()
        [False, True]
        """
        dataset = formulas_dataset(formulas)
        distance = self.distance(dataset) if distance is None else distance
        if np.shape(distance) != (len(dataset),):
            raise ValueError(f"distance has shape {np.shape(distance)}, not {(len(dataset),)}")
        return self._unseen(dataset).any(1) | (distance > self.threshold)

    def _unseen(self, dataset: Dataset) -> np.ndarray:
        """Which elements of each formula the reference lacks, (n, 119) by atomic number."""
        return (_fractions(dataset) > 0) & ~self.elements

    def _nearest(
        self, dataset: Dataset, names: np.ndarray, k: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Distances and reference rows, (n, k); a formula of the reference is its own nearest."""
        distances, rows = self._search.kneighbors(self._model.predict_embedding(dataset), k)
        known = np.array([self._row.get(name, -1) for name in names])[:, None]
        lost = (known[:, 0] >= 0) & (rows != known).all(1)  # others have the same embedding
        rows[lost, -1] = known[lost, 0]
        distances[rows == known] = 0.0
        order = np.argsort(np.where(rows == known, -1.0, distances), axis=1, kind="stable")
        return np.take_along_axis(distances, order, 1), np.take_along_axis(rows, order, 1)

    def _warn(
        self, names: np.ndarray, outside: np.ndarray, unseen: np.ndarray, distance: np.ndarray
    ) -> None:
        """One warning for all formulas, naming the first that lies outside."""
        row = int(np.argmax(outside))
        how = f"at {distance[row]:.3f}, further than {self.threshold:.3f}, from the nearest formula"
        if unseen[row]:
            how = f"with elements that the reference lacks ({unseen[row]})"
        warnings.warn(
            f"{outside.sum():,} of {len(names):,} formulas lie outside the reference; the first is "
            f"{names[row]}, {how}",
            OutsideDomainWarning,
            stacklevel=3,
        )


def keep_formulas(model: EmbeddingModel, dataset: Dataset) -> None:
    """Put the formulas that a model has learned from into it, where :class:`Domain` finds them.

    They are written in clear into the file of the model, and forgotten when it learns more.

    Parameters
    ----------
    model : PolySRLModel
        Its ``provenance["formulas"]`` become the different reduced formulas, sorted.
    dataset : dc.data.Dataset of stoichiometry or structure graphs

    Raises
    ------
    InvalidInputError
        A row is no graph, naming row and id.

    Examples
    --------
    >>> import deepchem as dc, numpy as np, polysrl_dc
    >>> graphs = dc.feat.StoichiometryGraphFeaturizer().featurize(["NaCl", "KCl", "MgO", "CaO"])
    >>> dataset = dc.data.NumpyDataset(graphs, np.array([8.5, 8.4, 7.8, 7.1]))
    >>> model = dc.models.PolySRLModel(freeze_encoder=True)
    >>> loss = model.fit(dataset)
    >>> keep_formulas(model, dataset)
    >>> Domain(model).outside(["Mg2O2", "UN"]).tolist()
    [False, True]
    """
    model.provenance["formulas"] = np.unique(reduced_formulas(dataset)).tolist()


def distances_to(model: EmbeddingModel, reference: Dataset, dataset: Dataset) -> np.ndarray:
    """Distance of each row to the nearest of the reference, whatever it holds.

    Parameters
    ----------
    model : PolySRLModel
    reference : dc.data.Dataset of graphs
    dataset : dc.data.Dataset of n graphs

    Returns
    -------
    numpy.ndarray, shape (n,), float64
        0 to 2, without a unit.
    """
    return _to_nearest(_search(model.predict_embedding(reference)), model, dataset)


def _to_nearest(search: NearestNeighbors, model: EmbeddingModel, formulas: Formulas) -> np.ndarray:
    return search.kneighbors(model.predict_embedding(formulas), 1)[0][:, 0]


def _search(vectors: np.ndarray) -> NearestNeighbors:
    return NearestNeighbors(algorithm="brute").fit(vectors)


def _rows(source: Formulas) -> tuple[Dataset, np.ndarray]:
    """Formulas as a dataset of stoichiometry graphs, and the reduced formula of each row."""
    if isinstance(source, PolymorphDataset):
        names, rows = np.unique(source.formulas, return_inverse=True)
        graphs = formulas_dataset(names).X[rows]
        return NumpyDataset(graphs, ids=source.ids), names[rows]
    source = formulas_dataset(source)
    dataset = NumpyDataset(source.X, ids=np.asarray(source.ids, dtype=object))
    _fractions(dataset)  # whose refusal of a row that is no graph says what to do
    return dataset, reduced_formulas(dataset)


def _fractions(dataset: Dataset) -> np.ndarray:
    """Atomic fractions by atomic number, shape (n, 119); a bad row is refused."""
    return stoichiometries(list(dataset.X), dataset.ids).fractions.numpy()
