"""Stoichiometry graph G^a and structure graph G^b of the paper (Sections 3.1, 3.2), and batches.

Graphs store atomic numbers, fractions and distances; features are looked up or expanded by the
encoders. Batches concatenate graphs in compressed sparse rows and move to a device in one call.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch_geometric.data import Data

from polysrl_dc.elements import N_ELEMENTS


@dataclass(frozen=True, slots=True, eq=False)
class StoichiometryGraph:
    """The elements of one formula, fully connected with self-loops (Section 3.1).

    Attributes
    ----------
    numbers : numpy.ndarray, shape (n_elements,), uint8
        Atomic numbers, ascending.
    fractions : numpy.ndarray, shape (n_elements,), float64
        Atomic fractions, adding up to 1.
    formula : str
        Reduced formula; equal for all polymorphs.

    Examples
    --------
    >>> graph = StoichiometryGraph(np.array([11, 17], np.uint8), np.array([0.5, 0.5]), "NaCl")
    >>> graph.to_pyg().num_edges
    4
    """

    numbers: np.ndarray
    fractions: np.ndarray
    formula: str

    def to_pyg(self) -> Data:
        """As PyTorch Geometric ``Data``: ``numbers``, ``fractions``, the full ``edge_index``."""
        n = len(self.numbers)
        nodes = torch.arange(n)
        return Data(
            numbers=torch.as_tensor(self.numbers.astype(np.int64)),
            fractions=torch.as_tensor(self.fractions),
            edge_index=torch.stack([nodes.repeat_interleave(n), nodes.repeat(n)]),
            formula=self.formula,
            num_nodes=n,
        )

    @classmethod
    def from_pyg(cls, data: Data) -> "StoichiometryGraph":
        """The inverse of :meth:`to_pyg`."""
        return cls(data.numbers.numpy().astype(np.uint8), data.fractions.numpy(), data.formula)


@dataclass(frozen=True, slots=True, eq=False)
class StructureGraph:
    """Sites of one crystal structure and their neighbors through periodic images (Section 3.2).

    Attributes
    ----------
    numbers : numpy.ndarray, shape (n_sites,), uint8
        Atomic numbers; the structure encoder does not read them.
    indptr : numpy.ndarray, shape (n_sites + 1,), int64
        Edges ``indptr[i]:indptr[i + 1]`` lead from site ``i`` to its neighbors.
    neighbors : numpy.ndarray, shape (n_edges,), int32
        Site index of each neighbor.
    distances : numpy.ndarray, shape (n_edges,), float32
        Distance to each neighbor in Å.
    stoichiometry : StoichiometryGraph
        The formula of the structure.
    """

    numbers: np.ndarray
    indptr: np.ndarray
    neighbors: np.ndarray
    distances: np.ndarray
    stoichiometry: StoichiometryGraph

    def to_pyg(self) -> Data:
        """As PyTorch Geometric ``Data`` with ``edge_index`` (2, n_edges) from site to neighbor."""
        centers = np.repeat(np.arange(len(self.numbers)), np.diff(self.indptr))
        return Data(
            numbers=torch.as_tensor(self.numbers.astype(np.int64)),
            edge_index=torch.as_tensor(np.stack([centers, self.neighbors]).astype(np.int64)),
            distances=torch.as_tensor(self.distances),
            stoichiometry=self.stoichiometry,
            num_nodes=len(self.numbers),
        )

    @classmethod
    def from_pyg(cls, data: Data) -> "StructureGraph":
        """The inverse of :meth:`to_pyg`; edges must be sorted by their first site."""
        centers = data.edge_index[0].numpy()
        if np.any(np.diff(centers) < 0):
            raise ValueError("edge_index[0] must be sorted")
        indptr = np.searchsorted(centers, np.arange(data.num_nodes + 1))
        return cls(
            data.numbers.numpy().astype(np.uint8),
            indptr,
            data.edge_index[1].numpy().astype(np.int32),
            data.distances.numpy(),
            data.stoichiometry,
        )


@dataclass(frozen=True, slots=True)
class StoichiometryBatch:
    """Fractions of a batch of formulas as one matrix.

    On a fully connected graph with self-loops every graph operation of the stoichiometry encoder
    is a product with this matrix, so no edge list is kept.

    Attributes
    ----------
    fractions : torch.Tensor, shape (n_graphs, 119), float32
        Column ``Z`` is the atomic fraction of the element ``Z``; rows add up to 1.

    Examples
    --------
    >>> graph = StoichiometryGraph(np.array([11, 17], np.uint8), np.array([0.5, 0.5]), "NaCl")
    >>> len(StoichiometryBatch.from_graphs([graph, graph]))
    2
    """

    fractions: Tensor

    @classmethod
    def from_graphs(cls, graphs: Sequence[StoichiometryGraph]) -> "StoichiometryBatch":
        """Batch graphs in the given order."""
        fractions = np.zeros((len(graphs), N_ELEMENTS), dtype=np.float32)
        if len(graphs):
            rows = np.repeat(np.arange(len(graphs)), [len(graph.numbers) for graph in graphs])
            columns = np.concatenate([graph.numbers for graph in graphs])
            fractions[rows, columns] = np.concatenate([graph.fractions for graph in graphs])
        return cls(torch.from_numpy(fractions))

    def __len__(self) -> int:
        return len(self.fractions)

    def __getitem__(self, rows: Tensor | slice) -> "StoichiometryBatch":
        return StoichiometryBatch(self.fractions[rows])

    def to(self, device: torch.device | str) -> "StoichiometryBatch":
        """Copy on ``device``."""
        return StoichiometryBatch(self.fractions.to(device))


@dataclass(frozen=True, slots=True)
class StructureBatch:
    """Structure graphs concatenated in compressed sparse rows.

    Attributes
    ----------
    index : torch.Tensor, shape (n_sites,), int64
        Graph of each site, ascending.
    centers, neighbors : torch.Tensor, shape (n_edges,), int64
        Site indices within the batch; ``centers`` is ascending.
    distances : torch.Tensor, shape (n_edges,), float32
        Edge lengths in Å.
    num_graphs : int
        Number of structures.
    """

    index: Tensor
    centers: Tensor
    neighbors: Tensor
    distances: Tensor
    num_graphs: int

    @classmethod
    def from_graphs(cls, graphs: Sequence[StructureGraph]) -> "StructureBatch":
        """Batch graphs in the given order."""
        if not len(graphs):
            raise ValueError("a batch of structures needs at least one graph")
        n_sites = np.array([len(graph.numbers) for graph in graphs])
        n_edges = np.array([len(graph.neighbors) for graph in graphs])
        first_site = np.concatenate([[0], np.cumsum(n_sites)[:-1]])
        degrees = np.concatenate([np.diff(graph.indptr) for graph in graphs])
        neighbors = np.concatenate([graph.neighbors for graph in graphs]).astype(np.int64)
        return cls(
            torch.from_numpy(np.repeat(np.arange(len(graphs)), n_sites)),
            torch.from_numpy(np.repeat(np.arange(n_sites.sum()), degrees)),
            torch.from_numpy(neighbors + np.repeat(first_site, n_edges)),
            torch.from_numpy(np.concatenate([graph.distances for graph in graphs])),
            len(graphs),
        )

    def __len__(self) -> int:
        return self.num_graphs

    def to(self, device: torch.device | str) -> "StructureBatch":
        """Copy on ``device``."""
        return StructureBatch(
            self.index.to(device),
            self.centers.to(device),
            self.neighbors.to(device),
            self.distances.to(device),
            self.num_graphs,
        )
