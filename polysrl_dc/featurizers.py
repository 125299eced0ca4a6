"""DeepChem featurizers for both kinds of graphs, and the one policy for bad input."""

import logging
from collections.abc import Iterable, Iterator, Mapping, Set
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
from deepchem.data import Dataset, NumpyDataset
from deepchem.feat import Featurizer
from pymatgen.core import Element, IStructure, Structure
from pymatgen.core.structure import SiteCollection

from polysrl_dc.crystal import check_cell, neighbor_list
from polysrl_dc.elements import N_ELEMENTS, has_embedding
from polysrl_dc.errors import InvalidInputError
from polysrl_dc.graphs import StoichiometryGraph, StructureGraph
from polysrl_dc.stoichiometry import ISOTOPES, parse_formula

logger = logging.getLogger(__name__)
#: Whatever :func:`formulas_dataset` reads.
Formulas: TypeAlias = Dataset | Iterable[Any]


class _GraphFeaturizer(Featurizer):
    """Apply ``_featurize`` to one or many inputs; what a bad one does is said by ``on_error``."""

    #: Types that are one input although they can be iterated over: a set has no order of rows,
    #: and a DataFrame would give the names of its columns.
    _single: tuple[type, ...] = (str, bytes, Mapping, SiteCollection, Set, pd.DataFrame)

    def __init__(self, on_error: str = "raise") -> None:
        if on_error not in ("raise", "skip"):
            raise ValueError(f"on_error is {on_error!r}: raise or skip")
        self.on_error = on_error
        #: (row, message) of every input skipped by the last call.
        self.skipped: list[tuple[Any, str]] = []

    def featurize(self, datapoints: Any, log_every_n: int = 1000, **kwargs: Any) -> np.ndarray:
        """Featurize one input or many.

        Parameters
        ----------
        datapoints : one input or an iterable of them
            A pandas Series names rows by its index, other iterables by position; a single input
            has no row.
        log_every_n : int
            Progress is logged every so many inputs.
        **kwargs
            DeepChem's; none has a meaning here.

        Returns
        -------
        numpy.ndarray, shape (n_inputs,), object
            Graphs. Under ``on_error="skip"`` a bad input leaves an empty array in its place,
            DeepChem's mark for a failed row: CSV and JSON loaders drop such rows with their label
            and weight, ``polysrl_dc.datasets.drop_skipped`` does so for any other dataset, and
            models refuse them.

        Raises
        ------
        InvalidInputError
            Under ``on_error="raise"``, naming row and value.
        TypeError
            An argument is unknown.
        ValueError
            Limits of :class:`StructureGraphFeaturizer` are not positive, or ``cutoff`` is too
            large.
        """
        if kwargs:
            raise TypeError(f"unknown arguments {sorted(kwargs)}")
        values, single = self._values(datapoints)
        rows = datapoints.index if isinstance(datapoints, pd.Series) else range(len(values))
        graphs = np.empty(len(values), dtype=object)
        self.skipped = []
        for i, value in enumerate(values):
            if i % log_every_n == 0:
                logger.info("Featurizing datapoint %d of %d", i, len(values))
            try:
                graphs[i] = self._featurize(value)
            except InvalidInputError as error:
                message = str(error) if single else f"row {rows[i]}: {error}"
                if self.on_error == "raise":
                    raise InvalidInputError(message) from error
                logger.warning("skipped %s", message)
                self.skipped.append((rows[i], str(error)))
                graphs[i] = np.array([])
        return graphs

    def _values(self, datapoints: Any) -> tuple[list[Any], bool]:
        """The inputs, and whether it is a single one that does not come in a sequence."""
        if isinstance(datapoints, np.ndarray) and datapoints.ndim == 0:
            datapoints = datapoints.item()
        single = isinstance(datapoints, self._single) or not isinstance(datapoints, Iterable)
        return ([datapoints] if single else list(datapoints)), single


class StoichiometryGraphFeaturizer(_GraphFeaturizer):
    """Formulas -> :class:`~polysrl_dc.graphs.StoichiometryGraph` (paper Section 3.1).

    A graph stays what it is, and of a structure graph its formula is taken.

    Parameters
    ----------
    on_error : {"raise", "skip"}
        What a bad formula does; see :meth:`featurize`.

    Attributes
    ----------
    skipped : list of (row, message)
        Inputs that the last call has skipped.

    Raises
    ------
    ValueError
        ``on_error`` is neither.

    Examples
    --------
    >>> import deepchem as dc, polysrl_dc
    >>> featurizer = dc.feat.StoichiometryGraphFeaturizer()
    >>> [graph.formula for graph in featurizer(["Fe4O6", {"Na": 1, "Cl": 1}])]
    ['Fe2O3', 'NaCl']
    """

    def _featurize(self, datapoint: Any, **kwargs: Any) -> StoichiometryGraph:
        graph = getattr(datapoint, "stoichiometry", datapoint)
        if isinstance(graph, StoichiometryGraph):
            return graph
        numbers, amounts = parse_formula(datapoint)
        return StoichiometryGraph(numbers, amounts / amounts.sum(), amounts=amounts)


def formulas_dataset(formulas: Formulas) -> Dataset:
    """A dataset of stoichiometry graphs: the given one, or of formulas, which become its ids.

    Parameters
    ----------
    formulas : dc.data.Dataset, one formula or an iterable of them
        What :class:`StoichiometryGraphFeaturizer` reads: text, compositions or mappings.

    Returns
    -------
    dc.data.Dataset

    Raises
    ------
    InvalidInputError
        A bad formula, naming row and value; there is none; or a dataset whose parts differ in
        length.

    Examples
    --------
    >>> dataset = formulas_dataset(["Fe4O6", {"Na": 1, "Cl": 1}])
    >>> [graph.formula for graph in dataset.X], dataset.ids.tolist()
    (['Fe2O3', 'NaCl'], ['Fe4O6', "{'Na': 1, 'Cl': 1}"])
    """
    if isinstance(formulas, Dataset):
        check_lengths(formulas)
        return formulas
    if isinstance(formulas, Iterator):
        formulas = list(formulas)
    featurizer = StoichiometryGraphFeaturizer()
    graphs = featurizer.featurize(formulas)
    if len(graphs) == 0:
        raise InvalidInputError("there is no formula")
    ids = [str(formula) for formula in featurizer._values(formulas)[0]]
    return NumpyDataset(graphs, ids=np.array(ids, dtype=object))


def reduced_formulas(source: Formulas) -> np.ndarray:
    """The reduced formula of each row: the key that polymorphs have in common.

    Parameters
    ----------
    source : dc.data.Dataset of stoichiometry or structure graphs, or iterable of formulas

    Returns
    -------
    numpy.ndarray, shape (n,), str

    Raises
    ------
    InvalidInputError
        A bad formula, or a row that is no graph, which is named; or the parts of the dataset differ
        in length.

    Examples
    --------
    >>> reduced_formulas(["Fe4O6", "NaCl"]).tolist()
    ['Fe2O3', 'NaCl']
    """
    dataset = formulas_dataset(source)
    formulas = []
    for row, graph in enumerate(dataset.X):
        graph = getattr(graph, "stoichiometry", graph)
        if not isinstance(graph, StoichiometryGraph):
            raise InvalidInputError(f"row {row} (id {dataset.ids[row]}) is not a graph")
        formulas.append(graph.formula)
    return np.array(formulas)


class StructureGraphFeaturizer(_GraphFeaturizer):
    """Crystal structures -> :class:`~polysrl_dc.graphs.StructureGraph` (Section 3.2, Appendix A).

    Parameters
    ----------
    max_neighbors : int
        Neighbors per site at most; fewer where fewer lie within the cutoff.
    cutoff : float
        Greatest distance in Å.
    on_error : {"raise", "skip"}
        What a bad structure does; see :meth:`featurize`.

    Attributes
    ----------
    skipped : list of (row, message)
        Inputs that the last call has skipped.

    Raises
    ------
    ValueError
        ``on_error`` is neither.

    Examples
    --------
    >>> import deepchem as dc, polysrl_dc
    >>> from pymatgen.core import Lattice, Structure
    >>> salt = Structure.from_spacegroup("Fm-3m", Lattice.cubic(5.69), ["Na", "Cl"],
    ...                                  [[0, 0, 0], [0.5, 0.5, 0.5]])
    >>> graph = dc.feat.StructureGraphFeaturizer()(salt)[0]
    >>> len(graph.numbers), len(graph.neighbors), graph.stoichiometry.formula
    (8, 96, 'NaCl')
    """

    def __init__(
        self, max_neighbors: int = 12, cutoff: float = 8.0, on_error: str = "raise"
    ) -> None:
        super().__init__(on_error)
        self.max_neighbors = max_neighbors
        self.cutoff = cutoff

    def _featurize(self, datapoint: Any, **kwargs: Any) -> StructureGraph:
        structure = _as_structure(datapoint)
        if not structure.is_ordered:
            raise InvalidInputError(f"structure {structure.formula} has partial occupancy")
        if not all(structure.lattice.pbc):
            raise InvalidInputError(f"structure {structure.formula} is not periodic in a, b and c")
        species = structure.species
        if any(type(kind) is not Element or kind.name in ISOTOPES for kind in set(species)):
            parse_formula(structure.composition)  # refuses dummies and isotopes
        return structure_graph(
            np.array([kind.Z for kind in species]),
            structure.lattice.matrix,
            structure.frac_coords,
            self.max_neighbors,
            self.cutoff,
        )


def structure_graph(
    numbers: np.ndarray,
    lattice: np.ndarray,
    frac_coords: np.ndarray,
    max_neighbors: int = 12,
    cutoff: float = 8.0,
) -> StructureGraph:
    """Structure graph from arrays, without a pymatgen ``Structure``.

    Parameters
    ----------
    numbers : numpy.ndarray, shape (n_sites,), integer
        Atomic numbers.
    lattice : numpy.ndarray, shape (3, 3)
        Rows are the lattice vectors in Å.
    frac_coords : numpy.ndarray, shape (n_sites, 3)
    max_neighbors, cutoff
        As in :class:`StructureGraphFeaturizer`.

    Returns
    -------
    StructureGraph

    Raises
    ------
    InvalidInputError
        Elements without an embedding, numbers and sites that do not correspond, and what
        :func:`polysrl_dc.crystal.neighbor_list` refuses, as it does ``max_neighbors`` and
        ``cutoff``, these by a ValueError.

    Examples
    --------
    >>> structure_graph(np.array([29]), 2.6 * np.eye(3), np.zeros((1, 3))).stoichiometry.formula
    'Cu'
    """
    numbers = np.asarray(numbers)
    if numbers.dtype.kind not in "iu" and numbers.size:
        raise InvalidInputError(f"atomic numbers of type {numbers.dtype} are not integers")
    if len(numbers) != len(frac_coords):
        raise InvalidInputError(f"{len(numbers)} atomic numbers for {len(frac_coords)} sites")
    elements, counts = np.unique(numbers, return_counts=True)
    for z in elements.tolist():
        if not (0 < z < N_ELEMENTS and has_embedding()[z]):
            raise InvalidInputError(f"the element with atomic number {z} has no embedding")
    indptr, neighbors, distances = neighbor_list(lattice, frac_coords, max_neighbors, cutoff)
    amounts = counts.astype(float)
    return StructureGraph(
        numbers.astype(np.uint8),
        indptr,
        neighbors,
        distances,
        StoichiometryGraph(elements.astype(np.uint8), amounts / amounts.sum(), amounts=amounts),
    )


def _as_structure(value: Any) -> IStructure:
    if isinstance(value, IStructure):
        return value
    if not isinstance(value, Mapping):
        raise InvalidInputError(
            f"{value!r:.80} of type {type(value).__name__} is not a structure: "
            "expected a pymatgen Structure or its dict"
        )
    return structure_of_dict(value)


def structure_of_dict(given: Mapping[str, Any]) -> Structure:
    """The structure of pymatgen's dict, less what pymatgen would import modules for.

    Parameters
    ----------
    given : mapping
        As ``Structure.as_dict`` gives it.

    Returns
    -------
    pymatgen.core.Structure

    Raises
    ------
    InvalidInputError
        It is no such dict, or its cell has lengths or angles that are none.
    """
    try:
        # for the properties of a site pymatgen would import the modules that they name
        sites = [{k: v for k, v in site.items() if k != "properties"} for site in given["sites"]]
        if "matrix" not in (lattice := given["lattice"]):
            check_cell([lattice[name] for name in ("a", "b", "c", "alpha", "beta", "gamma")])
        structure = Structure.from_dict({"lattice": lattice, "sites": sites})
        np.asarray(structure.frac_coords, dtype=float)  # older pymatgen takes sites of any shape
        return structure
    except InvalidInputError:
        raise
    except Exception as error:  # pymatgen fails in any way on what is no such dict
        raise InvalidInputError(f"not the dict of a structure: {error!r:.200}") from error


def check_lengths(dataset: Dataset) -> None:
    """Refuse a dataset without rows, or whose X, y, w and ids differ in number.

    DeepChem does not compare them; a row too few would shift the labels of those that follow it.

    Parameters
    ----------
    dataset : dc.data.Dataset
        Of featurized formulas, y and w may be empty.

    Raises
    ------
    InvalidInputError
        Naming the four lengths.
    TypeError
        It is no dataset.

    Examples
    --------
    >>> import deepchem as dc
    >>> check_lengths(dc.data.NumpyDataset([1, 2, 3], [0.5, 0.7]))
    Traceback (most recent call last):
    polysrl_dc.errors.InvalidInputError: lengths differ: 3 X, 2 y, 2 w, 3 ids
    """
    if not isinstance(dataset, Dataset):
        made = "dc.data.NumpyDataset(dc.feat.StoichiometryGraphFeaturizer().featurize(formulas))"
        what = f"{type(dataset).__name__} is no DeepChem dataset"
        raise TypeError(f"{what}; of formulas: {made}; of structures: StructureGraphFeaturizer")
    if len(dataset) == 0:
        raise InvalidInputError("the dataset has no row")
    lengths = [shape[0] if len(shape) else 0 for shape in dataset.get_shape()]
    unlabeled = not any(lengths[1:3])
    if len(set(lengths[::3] if unlabeled else lengths)) > 1:
        named = zip(lengths, ("X", "y", "w", "ids"), strict=True)
        raise InvalidInputError("lengths differ: " + ", ".join(f"{n} {name}" for n, name in named))
