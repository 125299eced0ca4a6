"""Structure encoder f^b: a graph network over sites and distances (Section 4.1, Appendix B.1)."""

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch_geometric.utils import scatter

from polysrl_dc.config import PolySRLConfig
from polysrl_dc.graphs import StructureBatch
from polysrl_dc.layers import FeatureNorm


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
        ``structure_pooling``, ``feature_norm``.

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
        self.norm = FeatureNorm(width, config.feature_norm)

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
        """
        nodes = self.node_encoder(self.site).expand(len(batch.index), -1)
        edges = self.edge_encoder(self.distance_basis(batch.distances))
        for block in self.blocks:
            nodes, edges = block(nodes, edges, batch.centers, batch.neighbors)
        nodes = nodes.to(torch.promote_types(nodes.dtype, torch.float32))  # large cells, bfloat16
        pooled = scatter(nodes, batch.index, dim_size=batch.num_graphs, reduce=self.pooling)
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
        """Shape (n_edges, n_gaussians) from distances in Å, shape (n_edges,)."""
        return torch.exp(-(((distances.unsqueeze(-1) - self.centers) / self.step) ** 2))


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
    >>> block = GraphNetworkBlock(4, 8)
    >>> centers, neighbors = torch.tensor([0, 1]), torch.tensor([1, 0])
    >>> nodes, edges = block(torch.rand(2, 4), torch.rand(2, 4), centers, neighbors)
    >>> nodes.shape, edges.shape
    (torch.Size([2, 4]), torch.Size([2, 4]))
    """

    def __init__(self, width: int, edge_hidden: int) -> None:
        super().__init__()
        self.width = width
        self.edge_input = nn.Linear(3 * width, edge_hidden)
        self.edge_output = _after_first_layer(edge_hidden, width)
        self.node_mlp = _mlp(2 * width, 2 * width, width)

    def forward(
        self, nodes: Tensor, edges: Tensor, centers: Tensor, neighbors: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Update edges from their two ends, then nodes from the edges they are the center of.

        The first layer of the edge MLP, a linear map of [h_i, h_j, b_ij], is split so that its
        node terms are computed once per node and not once per edge; the result is the same.

        Parameters
        ----------
        nodes : torch.Tensor, shape (n_sites, F)
            h.
        edges : torch.Tensor, shape (n_edges, F)
            b.
        centers, neighbors : torch.Tensor, shape (n_edges,), int64
            i and j of each edge.

        Returns
        -------
        nodes : torch.Tensor, shape (n_sites, F)
        edges : torch.Tensor, shape (n_edges, F)
        """
        weight, bias = self.edge_input.weight, self.edge_input.bias
        from_center, from_neighbor, from_edge = weight.split(self.width, dim=1)
        hidden = functional.linear(edges, from_edge, bias)
        hidden = hidden + functional.linear(nodes, from_center).index_select(0, centers)
        hidden = hidden + functional.linear(nodes, from_neighbor).index_select(0, neighbors)
        edges = edges + self.edge_output(hidden)
        received = scatter(edges, centers, dim_size=len(nodes), reduce="sum")
        return nodes + self.node_mlp(torch.cat([nodes, received], dim=-1)), edges


def _mlp(n_inputs: int, hidden: int, n_outputs: int) -> nn.Sequential:
    """Two-layer perceptron with LayerNorm and PReLU between the layers."""
    return nn.Sequential(nn.Linear(n_inputs, hidden), *_after_first_layer(hidden, n_outputs))


def _after_first_layer(hidden: int, n_outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(hidden), nn.PReLU(), nn.Linear(hidden, n_outputs))
