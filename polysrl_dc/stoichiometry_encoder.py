"""Probabilistic stoichiometry encoder f^a (Section 4.2, Appendix B.2)."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from polysrl_dc.config import PolySRLConfig
from polysrl_dc.elements import N_FEATURES, element_features
from polysrl_dc.graphs import StoichiometryBatch
from polysrl_dc.layers import CompositionSet2Set, FeatureNorm, at_least_float32


class StoichiometryEncoder(nn.Module):
    """A formula becomes a Gaussian N(z_mu, diag(sigma^2)) in F dimensions (eq. 2, 3, 9 to 12).

    On a fully connected graph with self-loops the propagation of a GCN layer is the mean over the
    elements (weighed by ``fraction ** message_power``), so the layer adds the same vector to every
    element of a graph: the state of element ``i`` after any layer is its input feature plus a
    vector of the graph. Everything below is exact and works on one vector per graph and one per
    chemical element.

    Where the paper can be read in two ways, without a measurement: elements are weighed by their
    fractions, not by raw amounts, so that Fe2O3 and Fe4O6 are one; eq. 12 gives log sigma, not log
    sigma^2, a factor of two that its last layer can learn.

    Parameters
    ----------
    config : PolySRLConfig
        ``n_features``, ``element_source``, ``stoichiometry_layers``, ``convolution_init``,
        ``message_power``, ``attention_power``, ``set2set_steps``, ``feature_norm``, ``whitening``,
        ``log_sigma_shift``.

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
        features = torch.from_numpy(element_features(config.element_source).copy())
        self.register_buffer("element_features", features)
        self.input = nn.Identity() if width == N_FEATURES else nn.Linear(N_FEATURES, width)
        self.convolutions = nn.ModuleList(
            _convolution(width, config.convolution_init) for _ in range(config.stoichiometry_layers)
        )
        self.jumping_knowledge = nn.Linear(levels * width, width)
        pooling = (width, config.set2set_steps, config.attention_power)
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
        senders = fractions.to(features.dtype) ** self.config.message_power
        senders = senders.masked_fill(fractions == 0, 0.0)  # 0 ** 0 is 1
        mean = (senders / senders.sum(-1, keepdim=True)) @ features
        shift = torch.zeros_like(mean)
        shifts = []
        for convolution in self.convolutions:
            shift = shift + functional.elu(convolution(mean + shift))
            shifts.append(shift)
        weight, bias = self.jumping_knowledge.weight, self.jumping_knowledge.bias
        width = features.shape[-1]
        elements = functional.linear(features, weight.unflatten(1, (-1, width)).sum(1))
        graphs = functional.linear(torch.cat(shifts, dim=-1), weight[:, width:], bias)
        return elements, graphs

    def forward(self, batch: StoichiometryBatch) -> tuple[Tensor, Tensor]:
        """Mean and logarithm of the standard deviation of each formula.

        Parameters
        ----------
        batch : StoichiometryBatch

        Returns
        -------
        mean : torch.Tensor, shape (n_graphs, F)
            z_mu of eq. 11, of unit length.
        log_sigma : torch.Tensor, shape (n_graphs, F)
            Natural logarithm of the standard deviation, eq. 12.
        """
        parts = self._pooled(batch.fractions)
        return self._mean(batch.fractions, *parts), self._log_sigma(batch.fractions, *parts)

    def mean(self, batch: StoichiometryBatch) -> Tensor:
        """The representation alone, shape (n_graphs, F); half the cost of :meth:`forward`."""
        return self._mean(batch.fractions, *self._pooled(batch.fractions))

    def log_sigma(self, batch: StoichiometryBatch) -> Tensor:
        """The logarithm of the standard deviation alone, shape (n_graphs, F)."""
        return self._log_sigma(batch.fractions, *self._pooled(batch.fractions))

    def variance_parameters(self) -> Iterator[nn.Parameter]:
        """The weights that only the standard deviation depends on."""
        yield from self.sigma_pooling.parameters()
        yield from self.sigma_output.parameters()

    def _pooled(self, fractions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Elements and graphs of :meth:`embed_elements`, and z^a, the fraction-weighted sum.

        From here on all is in float32 at least, also under autocast.
        """
        elements, graphs = map(at_least_float32, self.embed_elements(fractions))
        with torch.autocast(fractions.device.type, enabled=False):
            return elements, graphs, fractions @ elements + graphs

    def _mean(self, fractions: Tensor, elements: Tensor, graphs: Tensor, pooled: Tensor) -> Tensor:
        with torch.autocast(fractions.device.type, enabled=False):
            mean = self.mean_output(self.mean_pooling(fractions, elements, graphs)) + pooled
            return functional.normalize(self.mean_norm(mean), dim=-1)

    def _log_sigma(
        self, fractions: Tensor, elements: Tensor, graphs: Tensor, pooled: Tensor
    ) -> Tensor:
        with torch.autocast(fractions.device.type, enabled=False):
            read = self.sigma_output(self.sigma_pooling(fractions, elements, graphs))
            return read + pooled + self.config.log_sigma_shift


def _convolution(width: int, init: str) -> nn.Linear:
    """The linear part of a GCN layer."""
    linear = nn.Linear(width, width)
    if init == "glorot":
        nn.init.xavier_uniform_(linear.weight)
        nn.init.zeros_(linear.bias)
    return linear
