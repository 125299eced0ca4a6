"""Stoichiometry graph G^a and structure graph G^b of the paper (Sections 3.1, 3.2), and batches.

Graphs store atomic numbers, fractions and distances; features are looked up or expanded by the
encoders. Batches concatenate graphs in compressed sparse rows and move to a device in one call.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch_geometric.data import Data

from polysrl_dc.elements import N_ELEMENTS
from polysrl_dc.quotient import Quotient, quotient_graphs
from polysrl_dc.stoichiometry import reduced_formula


class StoichiometryGraph:
    """The elements of one formula, fully connected with self-loops (Section 3.1).

    Parameters
    ----------
    numbers : numpy.ndarray, shape (n_elements,), uint8
        Atomic numbers, ascending.
    fractions : numpy.ndarray, shape (n_elements,), float64
        Atomic fractions, adding up to 1.
    formula : str, optional
        Reduced formula; equal for all polymorphs. Found from ``amounts`` when first asked for,
        which takes longer than all the rest.
    amounts : numpy.ndarray, shape (n_elements,), optional
        As in the formula; default: the fractions.

    Examples
    --------
    >>> graph = StoichiometryGraph(np.array([11, 17], np.uint8), np.array([0.5, 0.5]), "NaCl")
    >>> graph.to_pyg().num_edges
    4
    """

    __slots__ = ("_amounts", "_formula", "fractions", "numbers")

    def __init__(
        self,
        numbers: np.ndarray,
        fractions: np.ndarray,
        formula: str | None = None,
        amounts: np.ndarray | None = None,
    ) -> None:
        self.numbers, self.fractions = numbers, fractions
        self._formula = formula
        self._amounts = fractions if amounts is None else amounts

    @property
    def formula(self) -> str:
        """Reduced formula; equal for all polymorphs."""
        if self._formula is None:
            self._formula = reduced_formula(self.numbers, self._amounts)
        return self._formula

    def __repr__(self) -> str:
        return f"StoichiometryGraph({self.formula})"

    def to_pyg(self) -> Data:
        """As a graph of PyTorch Geometric.

        Returns
        -------
        torch_geometric.data.Data
            ``numbers``, ``fractions``, ``formula`` and the full ``edge_index`` (2, n_elements^2).
        """
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

    Examples
    --------
    >>> iron = StoichiometryGraph(np.array([26], np.uint8), np.array([1.0]), "Fe")
    >>> distances = np.full(6, 3, np.float32)
    >>> graph = StructureGraph(iron.numbers, np.array([0, 6]), np.zeros(6, int), distances, iron)
    >>> graph.to_pyg().num_edges, len(StructureBatch.from_graphs([graph]))
    (6, 1)
    """

    numbers: np.ndarray
    indptr: np.ndarray
    neighbors: np.ndarray
    distances: np.ndarray
    stoichiometry: StoichiometryGraph

    def to_pyg(self) -> Data:
        """As a graph of PyTorch Geometric.

        Returns
        -------
        torch_geometric.data.Data
            ``numbers``, ``distances`` in Å, ``stoichiometry`` and ``edge_index`` (2, n_edges) from
            site to neighbor.
        """
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
        """The inverse of :meth:`to_pyg`.

        Parameters
        ----------
        data : torch_geometric.data.Data
            Edges sorted by their first site.

        Returns
        -------
        StructureGraph

        Raises
        ------
        ValueError
            They are not.
        """
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
    """Quotient graphs of crystal structures, concatenated in compressed sparse rows.

    Sites that message passing cannot tell apart are one node (:mod:`polysrl_dc.quotient`), and
    each distance of the batch stands once in a table that edges refer to.

    Attributes
    ----------
    index : torch.Tensor, shape (n_nodes,), int64
        Graph of each node, ascending.
    multiplicity : torch.Tensor, shape (n_nodes,), float32
        Sites that the node stands for.
    centers, neighbors : torch.Tensor, shape (n_edges,), int64
        Nodes within the batch; ``centers`` is ascending.
    edge_multiplicity : torch.Tensor, shape (n_edges,), float32
        Edges of one site that the edge stands for.
    distance_index : torch.Tensor, shape (n_edges,), int64
        Row of ``distances``.
    distances : torch.Tensor, shape (n_distances,), float32
        The distances that occur, in Å.
    num_graphs : int
        Number of structures.
    rounds : int
        Blocks of message passing for which the nodes stand for their sites.
    """

    index: Tensor
    multiplicity: Tensor
    centers: Tensor
    neighbors: Tensor
    edge_multiplicity: Tensor
    distance_index: Tensor
    distances: Tensor
    num_graphs: int
    rounds: int

    @classmethod
    def from_graphs(
        cls, graphs: Sequence[StructureGraph], rounds: int = 3, resolution: float = 1e-5
    ) -> "StructureBatch":
        """Batch graphs in the given order.

        Parameters
        ----------
        graphs : sequence of StructureGraph
        rounds, resolution
            As in :func:`~polysrl_dc.quotient.quotient_graphs`, the second in Å.

        Returns
        -------
        StructureBatch

        Raises
        ------
        ValueError
            There is no graph.
        """
        if not len(graphs):
            raise ValueError("a batch of structures needs at least one graph")
        quotient = quotient_graphs(
            np.array([len(graph.numbers) for graph in graphs]),
            np.concatenate([np.diff(graph.indptr) for graph in graphs]),
            np.concatenate([graph.neighbors for graph in graphs]),
            np.concatenate([graph.distances for graph in graphs]).astype(np.float64),
            rounds=rounds,
            resolution=resolution,
        )
        return cls.from_quotient(quotient, rounds, resolution)

    @classmethod
    def from_quotient(cls, quotient: Quotient, rounds: int, resolution: float) -> "StructureBatch":
        """Batch all graphs of a quotient.

        Parameters
        ----------
        quotient : Quotient
        rounds, resolution
            That it was made with.

        Returns
        -------
        StructureBatch
        """
        index = np.repeat(np.arange(len(quotient.node_counts)), quotient.node_counts)
        centers = np.repeat(np.arange(len(index)), quotient.edge_counts)
        first_node = np.cumsum(quotient.node_counts) - quotient.node_counts
        occurs = np.zeros(quotient.steps.max(initial=0) + 1, dtype=bool)
        occurs[quotient.steps] = True
        row_of_step = np.cumsum(occurs) - 1
        return cls(
            torch.from_numpy(index),
            torch.from_numpy(quotient.multiplicity.astype(np.float32)),
            torch.from_numpy(centers),
            torch.from_numpy(quotient.neighbors + first_node[index[centers]]),
            torch.from_numpy(quotient.edge_multiplicity.astype(np.float32)),
            torch.from_numpy(row_of_step[quotient.steps]),
            torch.from_numpy((np.flatnonzero(occurs) * resolution).astype(np.float32)),
            len(quotient.node_counts),
            rounds,
        )

    def __len__(self) -> int:
        return self.num_graphs

    def to(self, device: torch.device | str) -> "StructureBatch":
        """Copy on ``device``."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {
            k: value.to(device) for k, value in values.items() if isinstance(value, Tensor)
        }
        return replace(self, **moved)
