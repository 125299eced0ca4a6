"""Polymorphic structures as a DeepChem dataset, and rows that a featurizer has skipped."""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from deepchem.data import Dataset
from pymatgen.core import Structure
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
    rows and is for small selections. There are no labels: ``y`` and ``w`` are zero.

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
        Policy for bad structures; ``skipped`` lists the id and message of each that is skipped.
    progress : bool
        Show a progress bar.
    cache_dir : path, optional
        Default: ``POLYSRL_CACHE``, else ``~/.cache/polysrl_dc``.
    settings : PackSettings, optional
    processes : int, optional
        For the packing; default: the CPUs of this process.
    verify : bool
        Check the SHA-256 of the cache (about 1 s per GB).

    Raises
    ------
    InvalidInputError, ValueError
        An argument is wrong, there is no such source, it is damaged or holds no usable structure,
        all cells have too many sites or, under ``on_error="raise"``, one is bad, which is named.

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
    #: Whether a featurizer has made the graphs, whose settings are not known then.
    _featurized = False

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
        if max_structures is not None and max_structures < 1:
            raise ValueError(f"max_structures is {max_structures}: must be at least 1")
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
        most = np.inf if max_sites is None else max_sites
        rows = np.flatnonzero(arrays["site_counts"] <= most)
        if not len(rows):
            raise InvalidInputError(f"no structure has at most {max_sites} sites")
        if max_structures is not None and max_structures < len(rows):
            rows = np.sort(np.random.default_rng(seed).choice(rows, max_structures, replace=False))
        self._rows = rows

    @classmethod
    def from_graphs(
        cls,
        graphs: Sequence[StructureGraph] | np.ndarray,
        ids: Sequence[Any] | None = None,
        settings: PackSettings | None = None,
    ) -> "PolymorphDataset":
        """A dataset in memory of graphs that a featurizer has made; they have its limits.

        Parameters
        ----------
        graphs : sequence of n StructureGraph
        ids : sequence, shape (n,), optional
            Default: 0 ... n - 1.
        settings : PackSettings, optional
            Of which ``rounds`` and ``resolution`` count.

        Returns
        -------
        PolymorphDataset

        Raises
        ------
        InvalidInputError, ValueError
            A row is no structure graph, naming row and id; there are not n ids.
        """
        settings = settings or PackSettings()
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
        dataset._featurized = True
        return dataset

    def _open(
        self, arrays: dict[str, np.ndarray], settings: PackSettings, skipped: list[tuple[str, str]]
    ) -> None:
        self._arrays, self._settings, self.skipped = arrays, settings, skipped
        counts = ("element", "site", "pair", "node", "edge")
        self._starts = {what: _starts(arrays[f"{what}_counts"]) for what in counts}
        self._rows = np.arange(len(arrays["ids"]))

    def fingerprint(self) -> str:
        """Hash of ids, formulas and merged graphs: what a checkpoint remembers of its data."""
        digest = hashlib.sha256()
        for name in ("ids", "formulas"):
            digest.update(b"\n".join(self._arrays[name][self._rows].tolist()))
        for what in ("site", "pair", "node", "edge"):
            digest.update(self._arrays[f"{what}_counts"][self._rows].tobytes())
        for part in np.array_split(self._rows, len(self) // 4096 + 1):
            edges = _ranges(self._starts["edge"][part], self._arrays["edge_counts"][part])
            for name in ("edge_neighbors", "edge_steps", "edge_multiplicity"):
                digest.update(self._arrays[name][edges].tobytes())
        return digest.hexdigest()

    def checked(self, config: Any) -> "PolymorphDataset":
        """Itself, if the configuration fits; else refused.

        ``max_neighbors`` and ``cutoff`` must be equal; graphs that a featurizer has made tell only
        whether they exceed them. ``rounds`` must be as many as ``structure_layers`` at least.

        Parameters
        ----------
        config : PolySRLConfig

        Returns
        -------
        PolymorphDataset

        Raises
        ------
        InvalidInputError
            Naming the limit and both values.
        """
        limits = {"max_neighbors": config.max_neighbors, "cutoff": config.cutoff}
        built = {name: getattr(self._settings, name) for name in limits}
        if self._featurized:
            most = int(self._arrays["degrees"].max(initial=0))
            farthest = round(float(self._arrays["distances"].max(initial=0)), 4)
            built = {
                "max_neighbors": max(most, config.max_neighbors),
                "cutoff": max(farthest, config.cutoff),
            }
        for name, value in limits.items():
            if built[name] != value:
                raise InvalidInputError(
                    f"{name} of the structures is {built[name]}, of the configuration {value}: set "
                    "both alike, the first in PackSettings or StructureGraphFeaturizer"
                )
        rounds, layers = self._settings.rounds, config.structure_layers
        if rounds < layers:
            raise InvalidInputError(
                f"the structures were packed for {rounds} rounds of message passing, fewer than "
                f"the {layers} structure_layers: settings=PackSettings(rounds={layers})"
            )
        return self

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def groups(self) -> np.ndarray:
        """Numbers, shape (n,), int64; equal for polymorphs, structures of one reduced formula."""
        return self._arrays["groups"][self._rows]

    @property
    def n_edges(self) -> np.ndarray:
        """Edges of each merged graph, shape (n,), int32: the cost of a structure in a batch."""
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

        Returns
        -------
        StoichiometryBatch, StructureBatch, and torch.Tensor of shape (b,), int64
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
        """Zeros, shape (n, 1), as DeepChem marks missing labels."""
        return np.zeros((len(self), 1))

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
        """X, y, w and ids of each batch; ``pad_batches`` is refused by a ValueError."""
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
            yield self.graph(row), np.zeros(1), np.zeros(1), name

    def select(self, indices: Any, select_dir: str | None = None) -> "PolymorphDataset":
        """A view of some rows, in the given order; nothing is copied.

        Parameters
        ----------
        indices : sequence of int, or of bool for each row
        select_dir : str, optional
            Not used: DeepChem's splitters hand one over, and nothing is written.

        Returns
        -------
        PolymorphDataset
        """
        view = object.__new__(PolymorphDataset)
        view.__dict__.update(self.__dict__)
        indices = np.asarray(indices)
        view._rows = self._rows[indices if len(indices) else []]
        return view

    def transform(self, transformer: Any, **args: Any) -> Dataset:
        """Refused by a NotImplementedError: there are no labels to transform."""
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

    Returns
    -------
    dc.data.Dataset

    Raises
    ------
    InvalidInputError, TypeError
        The lengths of X, y, w and ids differ; it is no dataset.

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
        row
        for row, graph in enumerate(dataset.X)
        if isinstance(graph, StoichiometryGraph | StructureGraph)
    ]
    return dataset.select(kept)
