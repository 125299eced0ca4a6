"""The published formulas written out, without any rewrite for speed.

One statement per formula of the paper, on PyTorch Geometric's own graphs and layers: neighbors by
``Structure.get_all_neighbors`` in a Python loop (Appendix A), GCN layers and Set2Set on a fully
connected graph (Appendix B.2), the edge MLP on the concatenation of every edge (eq. 8), the loss
on the tensor of all differences (eq. 4). ``tests/test_reference.py`` holds ``polysrl_dc`` to it,
and ``speed.py`` times the two beside each other.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from pymatgen.core import Composition, Structure
from torch import Tensor, nn
from torch.nn import functional
from torch_geometric.data import Batch, Data
from torch_geometric.nn import GCNConv, Set2Set
from torch_geometric.utils import scatter

from polysrl_dc.config import PolySRLConfig
from polysrl_dc.elements import N_FEATURES, element_features
from polysrl_dc.graphs import StoichiometryGraph, StructureGraph

# ------------------------------------------------------------------------------------ graphs


@dataclass(frozen=True)
class Crystal:
    """The two graphs of one structure.

    Attributes
    ----------
    formula : Data
        ``numbers``, ``fractions``, ``edge_index`` of the fully connected graph (Section 3.1); the
        self-loops are added by the GCN layers.
    structure : Data
        ``edge_index`` from each site to its neighbors and ``distances`` in Å (Section 3.2).
    reduced_formula : str
        Equal for polymorphs.
    """

    formula: Data
    structure: Data
    reduced_formula: str


def formula_data(composition: Composition) -> Data:
    """Graph of a composition: one node per element, every two different ones connected."""
    amounts = composition.get_el_amt_dict()
    elements = sorted(composition.elements, key=lambda element: element.Z)
    total = sum(amounts.values())
    return _formula_data(
        [element.Z for element in elements],
        [amounts[element.symbol] / total for element in elements],
    )


def _formula_data(numbers: Sequence[int], fractions: Sequence[float]) -> Data:
    n = len(numbers)
    pairs = [(i, j) for i in range(n) for j in range(n) if i != j]
    return Data(
        numbers=torch.tensor(numbers, dtype=torch.int64),
        fractions=torch.tensor(fractions, dtype=torch.float32),
        edge_index=torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).T,
        num_nodes=n,
    )


def crystal_from_structure(
    structure: Structure, max_neighbors: int = 12, cutoff: float = 8.0
) -> Crystal:
    """Both graphs of a structure, neighbors as CGCNN (Xie & Grossman 2018) searches them.

    All neighbors of every site within the cutoff, sorted by distance, the first 12 kept. CGCNN
    pads sites that have fewer; here they keep those they have.
    """
    centers, neighbors, distances = [], [], []
    for site, found in enumerate(structure.get_all_neighbors(cutoff)):
        for neighbor in sorted(found, key=lambda neighbor: neighbor.nn_distance)[:max_neighbors]:
            centers.append(site)
            neighbors.append(neighbor.index)
            distances.append(neighbor.nn_distance)
    edges = Data(
        edge_index=torch.tensor([centers, neighbors], dtype=torch.int64),
        distances=torch.tensor(distances, dtype=torch.float32),
        num_nodes=len(structure),
    )
    composition = structure.composition
    return Crystal(formula_data(composition), edges, composition.reduced_formula)


def crystal_from_graph(graph: StructureGraph) -> Crystal:
    """The same graphs from a graph of ``polysrl_dc``, so that both sides see equal edges."""
    centers = np.repeat(np.arange(len(graph.numbers)), np.diff(graph.indptr))
    edges = Data(
        edge_index=torch.as_tensor(np.stack([centers, graph.neighbors]).astype(np.int64)),
        distances=torch.as_tensor(graph.distances),
        num_nodes=len(graph.numbers),
    )
    formula: StoichiometryGraph = graph.stoichiometry
    return Crystal(
        _formula_data(formula.numbers.tolist(), formula.fractions.tolist()), edges, formula.formula
    )


def collate(crystals: Sequence[Crystal]) -> tuple[Batch, Batch, Tensor]:
    """Batches of formulas and of structures, and the groups of equal formulas, (n_graphs,)."""
    groups = np.unique([crystal.reduced_formula for crystal in crystals], return_inverse=True)[1]
    return (
        Batch.from_data_list([crystal.formula for crystal in crystals]),
        Batch.from_data_list([crystal.structure for crystal in crystals]),
        torch.from_numpy(groups),
    )


# ---------------------------------------------------------------------------------- networks


class ReferenceStoichiometryEncoder(nn.Module):
    """f^a with its mean and variance modules (eq. 2, 3 and 9 to 12).

    The paper leaves open, and both sides have: ELU and residuals in the GCN layers, a linear map
    from the 2 F of Set2Set to F, the L2 norm of the mean, and log sigma as what eq. 12 gives.
    """

    element_features: Tensor

    def __init__(self, config: PolySRLConfig) -> None:
        super().__init__()
        width, layers = config.n_features, config.stoichiometry_layers
        self.feature_norm = config.feature_norm
        self.register_buffer("element_features", torch.tensor(element_features()))
        self.input = nn.Identity() if width == N_FEATURES else nn.Linear(N_FEATURES, width)
        self.convolutions = nn.ModuleList(GCNConv(width, width) for _ in range(layers))
        self.jumping_knowledge = nn.Linear((layers + 1) * width, width)
        self.mean_pooling = Set2Set(width, config.set2set_steps)
        self.mean_output = nn.Linear(2 * width, width)
        self.sigma_pooling = Set2Set(width, config.set2set_steps)
        self.sigma_output = nn.Linear(2 * width, width)
        self.mean_norm = nn.BatchNorm1d(width, affine=False)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """z_mu and log sigma, each (n_graphs, F)."""
        nodes = self.input(self.element_features[batch.numbers])
        levels = [nodes]
        for convolution in self.convolutions:
            nodes = nodes + functional.elu(convolution(nodes, batch.edge_index))  # eq. 9
            levels.append(nodes)
        elements = self.jumping_knowledge(torch.cat(levels, dim=-1))  # eq. 10
        weighted = batch.fractions.to(elements.dtype).unsqueeze(-1) * elements
        pooled = scatter(weighted, batch.batch, dim_size=batch.num_graphs, reduce="sum")  # eq. 2
        mean = self.mean_output(self.mean_pooling(weighted, batch.batch)) + pooled  # eq. 11
        log_sigma = self.sigma_output(self.sigma_pooling(weighted, batch.batch)) + pooled  # eq. 12
        if self.feature_norm:
            mean = self.mean_norm(mean)
        return functional.normalize(mean, dim=-1), log_sigma


class ReferenceStructureEncoder(nn.Module):
    """f^b: encoders of nodes and edges (eq. 7), message passing (eq. 8), pooling (eq. 1)."""

    centers: Tensor

    def __init__(self, config: PolySRLConfig) -> None:
        super().__init__()
        width = config.n_features
        self.config = config
        centers = torch.arange(config.n_gaussians) * config.gaussian_step
        self.register_buffer("centers", centers, persistent=False)
        self.site = nn.Parameter(torch.randn(1, width))
        self.node_encoder = _mlp(width, 2 * width, width)
        self.edge_encoder = _mlp(config.n_gaussians, config.edge_hidden, width)
        self.blocks = nn.ModuleList(
            ReferenceBlock(width, config.edge_hidden) for _ in range(config.structure_layers)
        )
        self.norm = nn.BatchNorm1d(width, affine=False)

    def forward(self, batch: Batch) -> Tensor:
        """z^b (n_graphs, F)."""
        offsets = batch.distances.unsqueeze(-1) - self.centers
        gaussians = torch.exp(-((offsets / self.config.gaussian_step) ** 2))
        nodes = self.node_encoder(self.site.expand(batch.num_nodes, -1))
        edges = self.edge_encoder(gaussians)
        for block in self.blocks:
            nodes, edges = block(nodes, edges, batch.edge_index)
        pooling = self.config.structure_pooling
        pooled = scatter(nodes, batch.batch, dim_size=batch.num_graphs, reduce=pooling)
        if self.config.feature_norm:
            pooled = self.norm(pooled)
        return functional.normalize(pooled, dim=-1)


class ReferenceBlock(nn.Module):
    """Eq. 8 with residuals on edges and nodes."""

    def __init__(self, width: int, edge_hidden: int) -> None:
        super().__init__()
        self.edge_mlp = _mlp(3 * width, edge_hidden, width)
        self.node_mlp = _mlp(2 * width, 2 * width, width)

    def forward(self, nodes: Tensor, edges: Tensor, edge_index: Tensor) -> tuple[Tensor, Tensor]:
        """Nodes (n_sites, F) and edges (n_edges, F) after one step."""
        i, j = edge_index
        edges = edges + self.edge_mlp(torch.cat([nodes[i], nodes[j], edges], dim=-1))
        received = scatter(edges, i, dim_size=len(nodes), reduce="sum")
        return nodes + self.node_mlp(torch.cat([nodes, received], dim=-1)), edges


def _mlp(n_inputs: int, hidden: int, n_outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(n_inputs, hidden), nn.LayerNorm(hidden), nn.PReLU(), nn.Linear(hidden, n_outputs)
    )


class ReferenceNetwork(nn.Module):
    """Both encoders and the loss of eq. 6, as ``polysrl_dc.objectives.PretrainingNetwork``.

    Examples
    --------
    >>> from pymatgen.core import Lattice
    >>> salt = Structure(Lattice.cubic(3.3), ["Cs", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])
    >>> iron = Structure(Lattice.cubic(2.9), ["Fe", "Fe"], [[0, 0, 0], [0.5, 0.5, 0.5]])
    >>> batch = collate([crystal_from_structure(structure) for structure in (salt, iron)])
    >>> ReferenceNetwork(PolySRLConfig.named("paper")).loss(*batch).shape
    torch.Size([])
    """

    def __init__(self, config: PolySRLConfig) -> None:
        super().__init__()
        self.config = config
        self.encoders = nn.ModuleList([ReferenceStoichiometryEncoder(config)])
        self.structure_encoder = ReferenceStructureEncoder(config)
        self.c = nn.Parameter(torch.tensor(config.c_init))
        self.d = nn.Parameter(torch.tensor(config.d_init))

    def loss(
        self,
        formulas: Batch,
        structures: Batch,
        groups: Tensor,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Scalar loss of a batch of :func:`collate`."""
        mean, log_sigma = self.encoders[0](formulas)
        crystal = self.structure_encoder(structures)
        return reference_loss(
            mean,
            log_sigma,
            crystal,
            groups,
            groups,
            self.c,
            self.d,
            n_samples=self.config.n_samples,
            beta=self.config.beta,
            generator=generator,
        )


def reference_loss(
    mean: Tensor,
    log_sigma: Tensor,
    structures: Tensor,
    groups_a: Tensor,
    groups_b: Tensor,
    c: Tensor,
    d: Tensor,
    *,
    n_samples: int = 8,
    beta: float = 1e-8,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Eq. 4 to 6 on the (B, J, B, F) tensor of differences, mean over pairs.

    -log p and -log(1 - p), p the mean over samples of sigmoid(s), are taken as logsumexp of
    logsigmoid(s) and of logsigmoid(-s): the same numbers, but in float32 the probabilities of the
    first steps are 0 and their logarithms infinite.

    Parameters
    ----------
    mean, log_sigma, structures : torch.Tensor, shape (B, F)
    groups_a, groups_b : torch.Tensor, shape (B,)
        Formula of each stoichiometry and of each structure; equal where they match.
    c, d : torch.Tensor, scalar
    n_samples : int
        J.
    beta : float
    generator : torch.Generator, optional

    Returns
    -------
    torch.Tensor, scalar
    """
    n, width = mean.shape
    noise = torch.randn(
        n, n_samples, width, generator=generator, device=mean.device, dtype=mean.dtype
    )
    samples = mean.unsqueeze(1) + log_sigma.exp().unsqueeze(1) * noise
    differences = samples.unsqueeze(2) - structures  # (B, J, B, F)
    logits = -c * differences.norm(dim=-1) + d  # (B, J, B)
    match = (groups_a.unsqueeze(1) == groups_b.unsqueeze(0)).unsqueeze(1)
    log_sigmoids = functional.logsigmoid(torch.where(match, logits, -logits))
    contrastive = -(log_sigmoids.logsumexp(dim=1) - math.log(n_samples)).mean()
    variance = torch.exp(2 * log_sigma)
    kl = 0.5 * (variance + mean**2 - 1 - variance.log()).sum(dim=-1).mean()
    return contrastive + beta * kl


# ----------------------------------------------------------------------------------- weights

#: Names in ``polysrl_dc`` -> names here, where they differ.
_RENAMED = (
    (r"(convolutions\.\d+)\.weight", r"\1.lin.weight"),  # of GCNConv
    (r"(blocks\.\d+)\.edge_input\.", r"\1.edge_mlp.0."),  # one MLP here, in two parts there
    (r"(blocks\.\d+)\.edge_output\.(\d)", lambda m: f"{m[1]}.edge_mlp.{int(m[2]) + 1}"),
)


def reference_name(name: str) -> str:
    """Name in the reference of a parameter or buffer of ``polysrl_dc``.

    Examples
    --------
    >>> reference_name("structure_encoder.blocks.2.edge_output.0.weight")
    'structure_encoder.blocks.2.edge_mlp.1.weight'
    """
    for pattern, replacement in _RENAMED:
        name = re.sub(pattern, replacement, name)
    return name


def load_weights(reference: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load the ``state_dict`` of the counterpart in ``polysrl_dc``, strictly."""
    reference.load_state_dict({reference_name(name): value for name, value in state.items()})
