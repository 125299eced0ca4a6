"""Polymorphic structures as a DeepChem dataset, the formula-grouped splitter, skipped rows."""

import hashlib
from collections.abc import Iterator, Sequence
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch
from deepchem.data import Dataset
from deepchem.splits import Splitter
from pymatgen.core import Structure
from sklearn.model_selection import GroupKFold
from torch import Tensor

from polysrl_dc.elements import N_ELEMENTS
from polysrl_dc.errors import InvalidInputError
from polysrl_dc.featurizers import check_lengths
from polysrl_dc.graphs import StoichiometryBatch, StoichiometryGraph, StructureBatch, StructureGraph
from polysrl_dc.packing import graph_arrays, pack, read_cache
from polysrl_dc.quotient import Quotient
from polysrl_dc.sources import PackSettings


class PolymorphDataset(Dataset):
    """Structure graphs in a memory-mapped cache, batched without a loop over atoms.

    The first use of a source packs it (:func:`polysrl_dc.packing.pack`), later ones map the cache;
    memory stays that of a batch, and some 100 bytes per structure. ``X`` builds the graphs of all
    rows and is for small selections. There are no labels: ``y`` is zero and ``w`` one.

    Parameters
    ----------
    source : str, path or sequence of pymatgen Structure
        As in :func:`polysrl_dc.packing.pack`.
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
    cache_dir : path, optional
        Default: ``POLYSRL_CACHE``, else ``~/.cache/polysrl_dc``.
    settings : PackSettings, optional
    processes : int, optional
        For the packing; default: the CPUs of this process.
    verify : bool
        Check the SHA-256 of the cache (about 1 s per GB).

    Attributes
    ----------
    skipped : list of (id, message)
    groups : numpy.ndarray, shape (n,), int64
        Equal for polymorphs, structures of one reduced formula.
    n_edges : numpy.ndarray, shape (n,), int32
        Edges of each merged graph: the cost of a structure in a batch.

    Examples
    --------
    >>> from pymatgen.core import Lattice, Structure
    >>> salt = Structure.from_spacegroup("Fm-3m", Lattice.cubic(5.69), ["Na", "Cl"],
    ...                                  [[0, 0, 0], [0.5, 0.5, 0.5]])
    >>> dataset = PolymorphDataset([salt, salt], progress=False)
    >>> formulas, structures, groups = dataset.batch(np.array([0, 1]))
    >>> len(dataset), len(structures), groups.tolist()
    (2, 2, [0, 0])
    """

    _rows: np.ndarray

    def __init__(
        self,
        source: str | Path | Sequence[Structure],
        *,
        max_structures: int | None = None,
        max_sites: int | None = None,
        seed: int = 0,
        on_error: str = "raise",
        progress: bool = True,
        cache_dir: str | Path | None = None,
        settings: PackSettings | None = None,
        processes: int | None = None,
        verify: bool = True,
    ) -> None:
        if on_error not in ("raise", "skip"):
            raise ValueError(f"on_error is {on_error!r}: raise or skip")
        folder = pack(source, cache_dir, settings, processes=processes, progress=progress)
        arrays, manifest = read_cache(folder, verify)
        bad = zip(arrays["skipped_ids"], arrays["skipped_messages"], strict=True)
        skipped = [(name.decode(), message.decode()) for name, message in bad]
        if skipped and on_error == "raise":
            raise InvalidInputError("structure {}: {}".format(*skipped[0]))
        if not len(arrays["ids"]):
            first = ": ".join(skipped[0])
            raise InvalidInputError(f"none of the {len(skipped)} structures is usable: {first}")
        self._open(arrays, PackSettings(**manifest["settings"]), skipped)
        rows = np.arange(len(arrays["ids"]))
        if max_sites is not None:
            rows = rows[arrays["site_counts"] <= max_sites]
            if not len(rows):
                raise InvalidInputError(f"no structure has at most {max_sites} sites")
        if max_structures is not None and max_structures < len(rows):
            chosen = np.random.default_rng(seed).choice(rows, max_structures, replace=False)
            rows = np.sort(chosen)
        self._rows = rows

    @classmethod
    def from_graphs(
        cls, graphs: Sequence[StructureGraph] | np.ndarray, ids: Sequence[Any] | None = None
    ) -> "PolymorphDataset":
        """A dataset in memory of graphs that a featurizer has made."""
        settings = PackSettings()
        ids = range(len(graphs)) if ids is None else ids
        if len(ids) != len(graphs):
            raise ValueError(f"{len(ids)} ids for {len(graphs)} graphs")
        for row, graph in enumerate(graphs):
            if not isinstance(graph, StructureGraph):
                raise InvalidInputError(f"row {row} (id {ids[row]}) is not a structure graph")
        arrays = graph_arrays(list(graphs), ids, settings)
        arrays["groups"] = np.unique(arrays["formulas"], return_inverse=True)[1]
        dataset = object.__new__(cls)
        dataset._open(arrays, settings, [])
        return dataset

    def _open(
        self, arrays: dict[str, np.ndarray], settings: PackSettings, skipped: list[tuple[str, str]]
    ) -> None:
        self._arrays, self._settings, self.skipped = arrays, settings, skipped
        counts = ("element", "site", "pair", "node", "edge")
        self._starts = {what: _starts(arrays[f"{what}_counts"]) for what in counts}
        self._rows = np.arange(len(arrays["ids"]))

    def fingerprint(self) -> str:
        """Hash of the ids of the rows in their order: what a checkpoint remembers of its data."""
        return hashlib.sha256(b"\n".join(self._arrays["ids"][self._rows].tolist())).hexdigest()

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def groups(self) -> np.ndarray:
        return self._arrays["groups"][self._rows]

    @property
    def n_edges(self) -> np.ndarray:
        return self._arrays["edge_counts"][self._rows]

    @property
    def formulas(self) -> np.ndarray:
        """Reduced formula of each row, shape (n,), str."""
        return np.char.decode(self._arrays["formulas"][self._rows])

    def batch(self, rows: np.ndarray) -> tuple[StoichiometryBatch, StructureBatch, Tensor]:
        """Formulas, structures and groups of some rows, ready for the encoders.

        Parameters
        ----------
        rows : numpy.ndarray, shape (b,), integer
            In any order.
        """
        rows, arrays, starts = self._rows[rows], self._arrays, self._starts
        elements, nodes, edges = (
            _ranges(starts[what][rows], arrays[f"{what}_counts"][rows])
            for what in ("element", "node", "edge")
        )
        fractions = np.zeros((len(rows), N_ELEMENTS), np.float32)
        graph = np.repeat(np.arange(len(rows)), arrays["element_counts"][rows])
        fractions[graph, arrays["elements"][elements]] = arrays["fractions"][elements]
        quotient = Quotient(
            arrays["node_counts"][rows],
            arrays["node_multiplicity"][nodes],
            arrays["node_edges"][nodes],
            arrays["edge_neighbors"][edges],
            arrays["edge_steps"][edges],
            arrays["edge_multiplicity"][edges],
        )
        structures = StructureBatch.from_quotient(
            quotient, self._settings.rounds, self._settings.resolution
        )
        groups = torch.from_numpy(arrays["groups"][rows])
        return StoichiometryBatch(torch.from_numpy(fractions)), structures, groups

    def graph(self, row: int) -> StructureGraph:
        """The structure graph of one row, nothing merged."""
        at, arrays, starts = int(self._rows[row]), self._arrays, self._starts
        elements, sites, pairs = (
            slice(starts[what][at], starts[what][at] + arrays[f"{what}_counts"][at])
            for what in ("element", "site", "pair")
        )
        return StructureGraph(
            np.array(arrays["numbers"][sites]),
            np.concatenate([[0], np.cumsum(arrays["degrees"][sites], dtype=np.int64)]),
            np.array(arrays["neighbors"][pairs]),
            np.array(arrays["distances"][pairs]),
            StoichiometryGraph(
                np.array(arrays["elements"][elements]),
                np.array(arrays["fractions"][elements]),
                arrays["formulas"][at].decode(),
            ),
        )

    # ------------------------------------------------------- what DeepChem asks of a dataset

    @property
    def X(self) -> np.ndarray:
        """Structure graphs of all rows, shape (n,), object."""
        graphs = np.empty(len(self), dtype=object)
        graphs[:] = [self.graph(row) for row in range(len(self))]
        return graphs

    @property
    def y(self) -> np.ndarray:
        """Zeros, shape (n, 1)."""
        return np.zeros((len(self), 1))

    @property
    def w(self) -> np.ndarray:
        """Ones, shape (n, 1)."""
        return np.ones((len(self), 1))

    @property
    def ids(self) -> np.ndarray:
        """``material_id``, file name or index of each row, shape (n,), str."""
        return np.char.decode(self._arrays["ids"][self._rows]).astype(object)

    def get_shape(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of X, y, w and ids."""
        return (len(self),), (len(self), 1), (len(self), 1), (len(self),)

    def get_task_names(self) -> np.ndarray:
        """``[0]``: the column of zeros in ``y``."""
        return np.arange(1)

    def iterbatches(
        self,
        batch_size: int | None = None,
        epochs: int = 1,
        deterministic: bool = False,
        pad_batches: bool = False,
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
        """X, y, w and ids of one batch after the other."""
        if pad_batches:
            raise ValueError("pad_batches must be False: duplicates are false negatives")
        size, random = batch_size or len(self), np.random.default_rng()
        for _ in range(epochs):
            order = np.arange(len(self)) if deterministic else random.permutation(len(self))
            for start in range(0, len(self), size):
                part = self.select(order[start : start + size])
                yield part.X, part.y, part.w, part.ids

    def itersamples(self) -> Iterator[tuple[StructureGraph, np.ndarray, np.ndarray, Any]]:
        """X, y, w and id of one row after the other."""
        for row, name in enumerate(self.ids):
            yield self.graph(row), np.zeros(1), np.ones(1), name

    def select(self, indices: Any, select_dir: str | None = None) -> "PolymorphDataset":
        """A view of some rows, in the given order; nothing is copied.

        Parameters
        ----------
        indices : sequence of int, or of bool for each row
        select_dir : str, optional
            Not used: DeepChem's splitters hand one over, and nothing is written.
        """
        view = object.__new__(PolymorphDataset)
        view.__dict__.update(self.__dict__)
        indices = np.asarray(indices)
        view._rows = self._rows[indices if len(indices) else []]
        return view

    def transform(self, transformer: Any, **args: Any) -> Dataset:
        """Refused: there are no labels to transform."""
        raise NotImplementedError("transform is not supported: structures have no labels here")


def _starts(counts: np.ndarray) -> np.ndarray:
    return np.cumsum(counts, dtype=np.int64) - counts


def _ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The numbers ``start ... start + count - 1`` of all pairs, one after the other."""
    ends = np.cumsum(counts, dtype=np.int64)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - (ends - counts), counts)


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
    check_lengths(dataset)
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
        seed : int, default: another one with every call
        """
        if kwargs:
            raise TypeError(f"unknown arguments {sorted(kwargs)}")
        groups = _groups(dataset)
        if not 2 <= k <= groups.max() + 1:
            raise ValueError(f"k is {k}: must be between 2 and the {groups.max() + 1} formulas")
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


def _groups(dataset: Dataset) -> np.ndarray:
    """Group number of the reduced formula of each row."""
    check_lengths(dataset)
    if isinstance(dataset, PolymorphDataset):
        return np.unique(dataset.groups, return_inverse=True)[1]
    formulas = []
    for row, graph in enumerate(dataset.X):
        if isinstance(graph, StructureGraph):
            graph = graph.stoichiometry
        if not isinstance(graph, StoichiometryGraph):
            raise InvalidInputError(f"row {row} (id {dataset.ids[row]}) is not a graph")
        formulas.append(graph.formula)
    return np.unique(formulas, return_inverse=True)[1]
