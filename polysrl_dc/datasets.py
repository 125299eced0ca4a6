"""Polymorphic structures as a DeepChem dataset, the formula-grouped splitter, skipped rows."""

from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from deepchem.data import Dataset, NumpyDataset
from deepchem.splits import Splitter
from monty.serialization import loadfn
from pymatgen.analysis import prototypes
from pymatgen.core import Element, Lattice, Structure
from pymatgen.core.structure import StructureError
from sklearn.model_selection import GroupKFold
from tqdm import tqdm

from polysrl_dc.errors import InvalidInputError
from polysrl_dc.featurizers import StructureGraphFeaturizer
from polysrl_dc.graphs import StoichiometryGraph, StructureGraph

PARQUET_COLUMNS = ("material_id", "cell", "numbers", "frac_coords")


class PolymorphDataset(NumpyDataset):
    """Structure graphs of a Parquet file, a list of structures, or pymatgen's AFLOW prototypes.

    Parameters
    ----------
    source : str, path or sequence of pymatgen Structure
        A Parquet file with the columns ``material_id``, ``cell`` (a, b, c in Å and three angles in
        degrees), ``numbers`` (atomic number of each site) and ``frac_coords`` (flattened);
        ``"aflow"`` for the prototype library packaged with pymatgen; or structures.
    max_structures : int, optional
        Take a random sample of this size, in the order of the source.
    max_sites : int, optional
        Leave out larger cells.
    seed : int
        Of the sample.
    on_error : {"raise", "skip"}
        Policy for bad structures; skipped ones are listed in ``skipped``.
    progress : bool
        Show a progress bar.

    Attributes
    ----------
    skipped : list of (id, message)

    Examples
    --------
    >>> from pymatgen.core import Lattice, Structure
    >>> salt = Structure.from_spacegroup("Fm-3m", Lattice.cubic(5.69), ["Na", "Cl"],
    ...                                  [[0, 0, 0], [0.5, 0.5, 0.5]])
    >>> len(PolymorphDataset([salt, salt], progress=False))
    2
    """

    def __init__(
        self,
        source: str | Path | Sequence[Structure],
        *,
        max_structures: int | None = None,
        max_sites: int | None = None,
        seed: int = 0,
        on_error: str = "raise",
        progress: bool = True,
    ) -> None:
        if on_error not in ("raise", "skip"):
            raise ValueError(f"on_error is {on_error!r}: raise or skip")
        featurizer = StructureGraphFeaturizer()
        total, structures = _open(source, max_structures, max_sites, seed)
        graphs: list[StructureGraph] = []
        ids: list[Any] = []
        self.skipped: list[tuple[Any, str]] = []
        for row_id, read in tqdm(
            structures, total=total, desc="structures", disable=not progress
        ):
            try:
                graphs.append(featurizer.featurize(read())[0])
            except (ValueError, StructureError) as error:  # the row may make no structure
                if on_error == "raise":
                    raise InvalidInputError(f"structure {row_id}: {error}") from error
                self.skipped.append((row_id, str(error)))
            else:
                ids.append(row_id)
        X = np.empty(len(graphs), dtype=object)
        X[:] = graphs
        super().__init__(X, ids=np.array(ids, dtype=object))


def _open(
    source: Any, max_structures: int | None, max_sites: int | None, seed: int
) -> tuple[int, Iterator[tuple[Any, Callable[[], Structure]]]]:
    """Number of structures, and an iterator of (id, function that makes the structure)."""
    if isinstance(source, str | Path) and str(source) != "aflow":
        table = pq.read_table(source)
        missing = set(PARQUET_COLUMNS) - set(table.column_names)
        if missing:
            raise InvalidInputError(f"{source} lacks the columns {sorted(missing)}")
        sizes = table["numbers"].combine_chunks().value_lengths().to_numpy()
        rows = _choose(sizes, max_structures, max_sites, seed)
        return len(rows), _read_rows(table.select(PARQUET_COLUMNS).take(rows))
    structures: list[Structure]
    names: list[Any]
    if isinstance(source, str | Path):
        structures, names = _aflow_prototypes()
    else:
        structures, names = list(source), list(range(len(source)))
    sizes = np.array([len(structure) for structure in structures])
    rows = _choose(sizes, max_structures, max_sites, seed)
    return len(rows), ((names[row], partial(structures.__getitem__, row)) for row in rows)


def _choose(
    sizes: np.ndarray, max_structures: int | None, max_sites: int | None, seed: int
) -> np.ndarray:
    rows = np.arange(len(sizes))
    if max_sites is not None:
        rows = rows[sizes <= max_sites]
    if max_structures is not None and max_structures < len(rows):
        rows = np.sort(np.random.default_rng(seed).choice(rows, max_structures, replace=False))
    return rows


def _read_rows(table: Any) -> Iterator[tuple[str, Callable[[], Structure]]]:
    for batch in table.to_batches(max_chunksize=1024):
        for row in batch.to_pylist():
            yield row["material_id"], partial(_structure, row)


def _structure(row: dict[str, Any]) -> Structure:
    species = [Element.from_Z(z) for z in row["numbers"]]
    coordinates = np.reshape(row["frac_coords"], (-1, 3))
    return Structure(Lattice.from_parameters(*row["cell"]), species, coordinates)


@cache
def _aflow_prototypes() -> tuple[list[Structure], list[str]]:
    """The AFLOW Library of Crystallographic Prototypes (Mehl et al. 2017) packaged in pymatgen."""
    entries = loadfn(Path(prototypes.__file__).parent / "aflow_prototypes.json.gz")
    structures = [entry["snl"].structure for entry in entries]
    return structures, [entry["tags"]["aflow"] for entry in entries]


def drop_skipped(dataset: Dataset) -> Dataset:
    """The rows of a dataset that were featurized, with their labels, weights and ids.

    Parameters
    ----------
    dataset : dc.data.Dataset
        X may hold the empty arrays that ``on_error="skip"`` leaves for bad rows.

    Examples
    --------
    >>> import deepchem as dc, polysrl_dc
    >>> featurizer = dc.feat.StoichiometryGraphFeaturizer(on_error="skip")
    >>> dataset = dc.data.NumpyDataset(featurizer(["NaCl", "Xx2O3"]), [8.5, 1.0])
    >>> drop_skipped(dataset).y.tolist()
    [8.5]
    """
    kept = [
        row for row, graph in enumerate(dataset.X)
        if isinstance(graph, StoichiometryGraph | StructureGraph)
    ]
    return dataset.select(kept)


class StoichiometrySplitter(Splitter):
    """Split so that no reduced formula stands on both sides.

    Works on datasets whose X holds the graphs of this package. Sizes follow the fractions as far
    as whole groups allow; the split depends on the seed only.

    Examples
    --------
    >>> import deepchem as dc, polysrl_dc
    >>> graphs = dc.feat.StoichiometryGraphFeaturizer()(["NaCl", "Na2Cl2", "MgO", "CaO", "KCl"])
    >>> splitter = dc.splits.StoichiometrySplitter()
    >>> [len(fold) for _, fold in splitter.k_fold_split(dc.data.NumpyDataset(graphs), 2)]
    [3, 2]
    """

    def split(
        self,
        dataset: Dataset,
        frac_train: float = 0.8,
        frac_valid: float = 0.1,
        frac_test: float = 0.1,
        seed: int | None = None,
        log_every_n: int | None = None,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Row numbers of the three parts; groups are shuffled and cut where the rows add up."""
        fractions = np.array([frac_train, frac_valid, frac_test])
        if (fractions < 0).any() or not np.isclose(fractions.sum(), 1):
            raise ValueError(f"fractions {fractions.tolist()} must not be negative and add up to 1")
        groups = _groups(dataset)
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
        dataset : dc.data.Dataset
        k : int
        directories : list of str, optional
            2 k folders for the parts of a DiskDataset.
        seed : int, optional
        """
        if kwargs:
            raise TypeError(f"unknown arguments {sorted(kwargs)}")
        groups = _groups(dataset)
        if not 2 <= k <= groups.max() + 1:
            raise ValueError(f"k is {k}: must be between 2 and the {groups.max() + 1} formulas")
        if directories is not None and len(directories) != 2 * k:
            raise ValueError(f"{len(directories)} directories for {2 * k} parts")
        folders: Iterator[str | None] = iter(directories) if directories else repeat(None)
        random_state = 0 if seed is None else seed
        folds = GroupKFold(k, shuffle=True, random_state=random_state).split(groups, groups=groups)
        return [
            (dataset.select(train, next(folders)), dataset.select(test, next(folders)))
            for train, test in folds
        ]


def _groups(dataset: Dataset) -> np.ndarray:
    """Group number of the reduced formula of each row."""
    formulas = []
    for row, graph in enumerate(dataset.X):
        if isinstance(graph, StructureGraph):
            graph = graph.stoichiometry
        if not isinstance(graph, StoichiometryGraph):
            raise InvalidInputError(f"row {row} (id {dataset.ids[row]}) is not a graph")
        formulas.append(graph.formula)
    if not formulas:
        raise InvalidInputError("the dataset has no row")
    return np.unique(formulas, return_inverse=True)[1]
