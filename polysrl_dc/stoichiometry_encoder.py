"""Probabilistic stoichiometry encoder f^a (Section 4.2, Appendix B.2)."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from polysrl_dc.config import PolySRLConfig
from polysrl_dc.elements import N_FEATURES, element_features
from polysrl_dc.graphs import StoichiometryBatch
from polysrl_dc.layers import CompositionSet2Set, FeatureNorm


class StoichiometryEncoder(nn.Module):
    """A formula becomes a Gaussian N(z_mu, diag(sigma^2)) in F dimensions (eq. 2, 3, 9 to 12).

    On a fully connected graph with self-loops the propagation of a GCN layer is the mean over the
    elements, so the layer adds the same vector to every element of a graph: the state of element
    ``i`` after any layer is its input feature plus a vector of the graph. Everything below is
    exact and works on one vector per graph and one per chemical element.

    Parameters
    ----------
    config : PolySRLConfig
        ``n_features``, ``stoichiometry_layers``, ``set2set_steps``, ``feature_norm``.

    Examples
    --------
    >>> import polysrl_dc
    >>> graphs = polysrl_dc.StoichiometryGraphFeaturizer().featurize(["NaCl", "Fe2O3"])
    >>> encoder = StoichiometryEncoder(PolySRLConfig.named("paper"))
    >>> mean, log_sigma = encoder(StoichiometryBatch.from_graphs(graphs))
    >>> mean.shape, log_sigma.shape
    (torch.Size([2, 200]), torch.Size([2, 200]))
    """

    element_features: Tensor

    def __init__(self, config: PolySRLConfig) -> None:
        super().__init__()
        width = config.n_features
        levels = config.stoichiometry_layers + 1
        self.config = config
        self.register_buffer("element_features", torch.from_numpy(element_features().copy()))
        self.input = nn.Identity() if width == N_FEATURES else nn.Linear(N_FEATURES, width)
        self.convolutions = nn.ModuleList(
            _convolution(width, config.convolution_init) for _ in range(config.stoichiometry_layers)
        )
        self.jumping_knowledge = nn.Linear(levels * width, width)
        pooling = (width, config.set2set_steps, config.weighted_messages)
        self.mean_pooling = CompositionSet2Set(*pooling)
        self.mean_output = nn.Linear(2 * width, width)
        self.sigma_pooling = CompositionSet2Set(*pooling)
        self.sigma_output = nn.Linear(2 * width, width)
        self.mean_norm = FeatureNorm(width, config.feature_norm, config.whitening)

    def embed_elements(self, fractions: Tensor) -> tuple[Tensor, Tensor]:
        """Z^a of eq. 2 as ``element + graph``: eq. 9 (GCN layers) and eq. 10 (jumping knowledge).

        Parameters
        ----------
        fractions : torch.Tensor, shape (n_graphs, 119)

        Returns
        -------
        elements : torch.Tensor, shape (119, F)
        graphs : torch.Tensor, shape (n_graphs, F)
            Row ``i`` of Z^a of graph ``b`` is ``elements[Z_i] + graphs[b]``.
        """
        features = self.input(self.element_features)
        if self.config.weighted_messages:
            mean = fractions.to(features.dtype) @ features
        else:
            present = (fractions > 0).to(features.dtype)
            mean = (present / present.sum(-1, keepdim=True)) @ features
        weights = self.jumping_knowledge.weight.chunk(len(self.convolutions) + 1, dim=1)
        shift = torch.zeros_like(mean)
        shifts = []
        for convolution in self.convolutions:
            shift = shift + functional.elu(convolution(mean + shift))
            shifts.append(shift)
        elements = functional.linear(features, torch.stack(weights).sum(0))
        graphs = functional.linear(
            torch.cat(shifts, dim=-1), torch.cat(weights[1:], dim=1), self.jumping_knowledge.bias
        )
        return elements, graphs

    def forward(self, batch: StoichiometryBatch) -> tuple[Tensor, Tensor]:
        """Mean and logarithm of the standard deviation of each formula.

        Returns
        -------
        mean : torch.Tensor, shape (n_graphs, F)
            z_mu of eq. 11, of unit length.
        log_sigma : torch.Tensor, shape (n_graphs, F)
            Natural logarithm of the standard deviation, eq. 12.
        """
        elements, graphs, pooled = self._pooled(batch.fractions)
        log_sigma = self.sigma_pooling(batch.fractions, elements, graphs)
        return self._mean(batch.fractions, elements, graphs, pooled), (
            self.sigma_output(log_sigma) + pooled + self.config.log_sigma_shift
        )

    def mean(self, batch: StoichiometryBatch) -> Tensor:
        """The representation alone, shape (n_graphs, F); half the cost of :meth:`forward`."""
        return self._mean(batch.fractions, *self._pooled(batch.fractions))

    def _pooled(self, fractions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Elements and graphs of :meth:`embed_elements`, and z^a, the fraction-weighted sum."""
        elements, graphs = self.embed_elements(fractions)
        return elements, graphs, fractions @ elements + graphs

    def _mean(self, fractions: Tensor, elements: Tensor, graphs: Tensor, pooled: Tensor) -> Tensor:
        mean = self.mean_output(self.mean_pooling(fractions, elements, graphs)) + pooled
        return functional.normalize(self.mean_norm(mean), dim=-1)


def _convolution(width: int, init: str) -> nn.Linear:
    """The linear part of a GCN layer."""
    linear = nn.Linear(width, width)
    if init == "glorot":
        nn.init.xavier_uniform_(linear.weight)
        nn.init.zeros_(linear.bias)
    return linear
