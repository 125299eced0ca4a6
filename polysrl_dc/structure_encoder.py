"""Structure encoder f^b: a graph network over sites and distances (Section 4.1, Appendix B.1)."""

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from polysrl_dc.config import PolySRLConfig
from polysrl_dc.graphs import StructureBatch
from polysrl_dc.layers import FeatureNorm, at_least_float32


class StructureEncoder(nn.Module):
    """A crystal structure becomes a vector of unit length; geometry only, no species.

    Every site starts from one learnable vector, every edge from its distance on a Gaussian basis
    (eq. 7). Blocks pass messages (eq. 8), sites are pooled (eq. 1) and the result L2-normalized.

    The paper says "two-layer MLP with non-linearity". Each one here is Linear, LayerNorm, PReLU,
    Linear; blocks have residual connections; node MLPs are ``2 * n_features`` wide inside.

    Parameters
    ----------
    config : PolySRLConfig
        ``n_features``, ``edge_hidden``, ``structure_layers``, ``n_gaussians``, ``gaussian_step``,
        ``structure_pooling``, ``feature_norm``, ``whitening``.

    Examples
    --------
    >>> import numpy as np
    >>> from polysrl_dc.crystal import neighbor_list
    >>> from polysrl_dc.graphs import StoichiometryGraph, StructureGraph
    >>> iron = StoichiometryGraph(np.array([26], np.uint8), np.array([1.0]), "Fe")
    >>> edges = neighbor_list(2.87 * np.eye(3), [[0, 0, 0], [0.5, 0.5, 0.5]])
    >>> graph = StructureGraph(np.array([26, 26], np.uint8), *edges, iron)
    >>> encoder = StructureEncoder(PolySRLConfig.named("paper"))
    >>> encoder(StructureBatch.from_graphs([graph, graph])).shape
    torch.Size([2, 200])
    """

    def __init__(self, config: PolySRLConfig) -> None:
        super().__init__()
        width = config.n_features
        self.pooling = config.structure_pooling
        self.site = nn.Parameter(torch.randn(1, width))
        self.distance_basis = GaussianBasis(config.n_gaussians, config.gaussian_step)
        self.node_encoder = _mlp(width, 2 * width, width)
        self.edge_encoder = _mlp(config.n_gaussians, config.edge_hidden, width)
        self.blocks = nn.ModuleList(
            GraphNetworkBlock(width, config.edge_hidden) for _ in range(config.structure_layers)
        )
        self.norm = FeatureNorm(width, config.feature_norm, config.whitening)

    def forward(self, batch: StructureBatch) -> Tensor:
        """Embed.

        Parameters
        ----------
        batch : StructureBatch
            Distances in Å.

        Returns
        -------
        torch.Tensor, shape (n_graphs, F)
            z^b; every row has unit length.

        Raises
        ------
        ValueError
            There are more blocks than rounds for which the sites of the batch were merged.
        """
        if len(self.blocks) > batch.rounds:
            raise ValueError(
                f"{len(self.blocks)} blocks, but the sites of the batch were merged for "
                f"{batch.rounds} rounds of message passing"
            )
        edges = EdgeStates(batch, self.edge_encoder(self.distance_basis(batch.distances)))
        nodes = self.node_encoder(self.site)  # one row that stands for all: they start alike
        for block in self.blocks:
            nodes = block(nodes, edges)
        pooled = _weighted_sums(nodes, batch.multiplicity, batch.index, batch.num_graphs)
        if self.pooling == "mean":
            sites = batch.multiplicity.to(pooled).unsqueeze(1)
            pooled = pooled / _sums(sites, batch.index, batch.num_graphs)
        return functional.normalize(self.norm(pooled), dim=-1)


class GaussianBasis(nn.Module):
    """Distances on Gaussians exp(-((d - mu) / step)^2) with mu = 0, step, 2 step, ... in Å.

    The form of CGCNN (Xie & Grossman 2018, without the factor 1/2), which Appendix A refers to.

    Parameters
    ----------
    n_gaussians : int
        Number of centers.
    step : float
        Spacing of the centers and width of each Gaussian, in Å.

    Examples
    --------
    >>> GaussianBasis(3, 0.5)(torch.tensor([0.5])).round(decimals=3).tolist()
    [[0.36800000071525574, 1.0, 0.36800000071525574]]
    """

    centers: Tensor

    def __init__(self, n_gaussians: int, step: float) -> None:
        super().__init__()
        self.step = step
        self.register_buffer("centers", torch.arange(n_gaussians) * step, persistent=False)

    def forward(self, distances: Tensor) -> Tensor:
        """Expand.

        Parameters
        ----------
        distances : torch.Tensor, shape (n_edges,)
            In Å.

        Returns
        -------
        torch.Tensor, shape (n_edges, n_gaussians)
            0 to 1.
        """
        return torch.exp(-(((distances.unsqueeze(-1) - self.centers) / self.step) ** 2))


class EdgeStates:
    """Edge features b_ij through the blocks, never built as one (n_edges, F) tensor.

    They start as a function of the distance and every block adds a linear map of its activations,
    ``b_ij = table[distance] + sum over blocks of (W_m a_m,ij + bias_m)``. So the table, the
    activations and the maps say it all: a sum over the edges of a node is taken before the map,
    and the first layer of the next block is one product of each ``a_m`` with two matrices merged
    beforehand.

    Parameters
    ----------
    batch : StructureBatch
    table : torch.Tensor, shape (n_distances, F)
        Edge features by distance.
    """

    #: Sum of the b_ij of each node, (n_nodes, F), after the first block.
    received: Tensor | None = None

    def __init__(self, batch: StructureBatch, table: Tensor) -> None:
        self.batch = batch
        self.table = table
        self.added: list[tuple[Tensor, nn.Linear]] = []

    def project(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor | None]:
        """``weight @ b_ij + bias`` as a part by distance, and a part by edge once there is one.

        Parameters
        ----------
        weight : torch.Tensor, shape (width, F)
        bias : torch.Tensor, shape (width,)

        Returns
        -------
        by_distance : torch.Tensor, shape (n_distances, width)
        by_edge : torch.Tensor, shape (n_edges, width), or None
        """
        by_edge = None
        for activation, output in self.added:
            bias = bias + weight @ output.bias
            term = functional.linear(activation, weight @ output.weight)
            by_edge = term if by_edge is None else by_edge + term
        return functional.linear(self.table, weight, bias), by_edge

    def add(self, activation: Tensor, output: nn.Linear) -> Tensor:
        """Add a linear map of activations: by distance in the first block, then by edge.

        Parameters
        ----------
        activation : torch.Tensor, shape (n_distances, hidden), later (n_edges, hidden)
        output : torch.nn.Linear
            From hidden to F.

        Returns
        -------
        torch.Tensor, shape (n_nodes, F)
            The sum of the b_ij of each node as they are now.
        """
        batch = self.batch
        n_nodes = len(batch.index)
        if self.received is None:
            self.table = self.table + output(activation)
            values, rows = self.table.index_select(0, batch.distance_index), batch.centers
            self.received = _weighted_sums(values, batch.edge_multiplicity, rows, n_nodes)
            return self.received
        self.added.append((activation, output))
        sums = _weighted_sums(activation, batch.edge_multiplicity, batch.centers, n_nodes)
        degrees = _sums(batch.edge_multiplicity.to(sums).unsqueeze(1), batch.centers, n_nodes)
        mapped = functional.linear(sums, output.weight) + degrees * output.bias
        self.received = self.received + mapped
        return self.received


class GraphNetworkBlock(nn.Module):
    """One step of message passing (eq. 8), with residual connections on edges and nodes.

    Parameters
    ----------
    width : int
        F of node and edge states.
    edge_hidden : int
        Hidden width of the edge MLP.

    Examples
    --------
    >>> edge = {"centers": torch.tensor([0]), "neighbors": torch.tensor([0])}
    >>> edge |= {"edge_multiplicity": torch.tensor([6.0]), "distance_index": torch.tensor([0])}
    >>> batch = StructureBatch(torch.tensor([0]), torch.ones(1), **edge,
    ...                        distances=torch.tensor([3.0]), num_graphs=1, rounds=1)
    >>> GraphNetworkBlock(8, 4)(torch.ones(1, 8), EdgeStates(batch, torch.ones(1, 8))).shape
    torch.Size([1, 8])
    """

    def __init__(self, width: int, edge_hidden: int) -> None:
        super().__init__()
        self.width = width
        self.edge_input = nn.Linear(3 * width, edge_hidden)
        self.edge_output = _after_first_layer(edge_hidden, width)
        self.node_mlp = _mlp(2 * width, 2 * width, width)

    def forward(self, nodes: Tensor, edges: EdgeStates) -> Tensor:
        """Update edges from their two ends, then nodes from the edges they are the center of.

        The first layer of an MLP, a linear map of a concatenation such as [h_i, h_j, b_ij], is
        split so that each term is computed once per node or distance; the result is the same.

        Parameters
        ----------
        nodes : torch.Tensor, shape (n_nodes, F); in the first block (1, F)
            h; the single row stands for all nodes.
        edges : EdgeStates
            b; changed in place.

        Returns
        -------
        torch.Tensor, shape (n_nodes, F)
        """
        weight, bias = self.edge_input.weight, self.edge_input.bias
        of_center, of_neighbor, of_edge = weight.split(self.width, dim=1)
        by_distance, by_edge = edges.project(of_edge, bias)
        *activation, output = self.edge_output
        if edges.received is None:  # first block: nodes are alike, edges differ by distance only
            hidden = by_distance + functional.linear(nodes, of_center + of_neighbor)
        else:
            batch = edges.batch
            hidden = by_distance.index_select(0, batch.distance_index)
            hidden = hidden + functional.linear(nodes, of_center).index_select(0, batch.centers)
            hidden = hidden + functional.linear(nodes, of_neighbor).index_select(0, batch.neighbors)
            if by_edge is not None:
                hidden = hidden + by_edge
        for layer in activation:
            hidden = layer(hidden)
        received = edges.add(hidden, cast(nn.Linear, output))
        first, *rest = self.node_mlp
        of_node, of_received = cast(nn.Linear, first).weight.split(self.width, dim=1)
        hidden = functional.linear(nodes, of_node, cast(nn.Linear, first).bias)
        hidden = hidden + functional.linear(received, of_received)
        for layer in rest:
            hidden = layer(hidden)
        return nodes + hidden


def _weighted_sums(values: Tensor, weights: Tensor, rows: Tensor, n_rows: int) -> Tensor:
    """Sums of weighted values by row, (n_rows, F), in float32 at least: large cells, bfloat16."""
    values = at_least_float32(values)
    return _sums(values * weights.to(values).unsqueeze(1), rows, n_rows)


def _sums(values: Tensor, rows: Tensor, n_rows: int) -> Tensor:
    return values.new_zeros(n_rows, values.shape[1]).index_add_(0, rows, values)


def _mlp(n_inputs: int, hidden: int, n_outputs: int) -> nn.Sequential:
    """Two-layer perceptron with LayerNorm and PReLU between the layers."""
    return nn.Sequential(nn.Linear(n_inputs, hidden), *_after_first_layer(hidden, n_outputs))


def _after_first_layer(hidden: int, n_outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(hidden), nn.PReLU(), nn.Linear(hidden, n_outputs))
