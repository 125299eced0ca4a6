"""Prediction heads (Appendix E), and the network of encoder, head and label units."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.func import jacrev, vmap
from torch.nn import functional

from polysrl_dc.config import PolySRLConfig
from polysrl_dc.graphs import StoichiometryBatch
from polysrl_dc.layers import at_least_float32
from polysrl_dc.stoichiometry_encoder import StoichiometryEncoder


class PredictionHead(nn.Sequential):
    """Three-layer perceptron F -> hidden -> hidden -> outputs with LeakyReLU.

    Parameters
    ----------
    n_features : int
        F.
    hidden : int
        Width of both hidden layers.
    n_outputs : int
        Outputs per formula.

    Examples
    --------
    >>> PredictionHead(200, 128, 1)(torch.zeros(5, 200)).shape
    torch.Size([5, 1])
    """

    def __init__(self, n_features: int, hidden: int, n_outputs: int) -> None:
        super().__init__(
            nn.Linear(n_features, hidden),
            nn.LeakyReLU(),
            nn.Linear(hidden, hidden),
            nn.LeakyReLU(),
            nn.Linear(hidden, n_outputs),
        )


class PropertyNetwork(nn.Module):
    """An ensemble of members, each an encoder with a head; predicts in label units.

    Member ``i`` has a head of its own and reads encoder ``i % n_encoders``: one of its own, or a
    frozen one, which several members can read.

    Parameters
    ----------
    config : PolySRLConfig
    n_tasks : int
    classification : bool
        One logit per task, trained by cross-entropy; else a location per task, trained by the
        absolute error, and, if ``config.heteroscedastic``, the log scale of a Laplace distribution
        around it. A joint likelihood made the location worse, so the head of the scale is apart
        and passes no gradient to the encoder or the location.
    n_ensemble : int
        Number of members.
    n_encoders : int
        Number of encoders, of which ``n_ensemble`` is a multiple, and the same unless ``frozen``.
    frozen : bool
        Train the heads only.

    Examples
    --------
    >>> network = PropertyNetwork(PolySRLConfig.named("default"), 1, False, 2, 2, False)
    >>> fractions = torch.zeros(3, 119)
    >>> fractions[:, 26] = 1
    >>> mean, std = network(StoichiometryBatch(fractions))
    >>> mean.shape, std.shape
    (torch.Size([3, 1]), torch.Size([3, 1]))
    """

    label_mean: Tensor
    label_std: Tensor
    fitted: Tensor

    def __init__(
        self,
        config: PolySRLConfig,
        n_tasks: int,
        classification: bool,
        n_ensemble: int,
        n_encoders: int,
        frozen: bool,
    ) -> None:
        super().__init__()
        self.config = config
        self.classification = classification
        self.frozen = frozen
        self.heteroscedastic = config.heteroscedastic and not classification
        self.encoders = nn.ModuleList(
            StoichiometryEncoder(config) for _ in range(n_encoders)
        ).requires_grad_(not frozen)
        self.heads = nn.ModuleList(
            PredictionHead(config.n_features, config.head_hidden, n_tasks)
            for _ in range(n_ensemble)
        )
        self.scale_heads = nn.ModuleList(
            PredictionHead(config.n_features, config.head_hidden, n_tasks)
            for _ in range(n_ensemble if self.heteroscedastic else 0)
        )
        self.register_buffer("label_mean", torch.zeros(n_tasks))
        self.register_buffer("label_std", torch.ones(n_tasks))
        self.register_buffer("fitted", torch.tensor(False))

    def train(self, mode: bool = True) -> "PropertyNetwork":
        """Training mode; a frozen encoder stays in evaluation mode.

        Parameters
        ----------
        mode : bool

        Returns
        -------
        PropertyNetwork
            Itself.
        """
        super().train(mode)
        if self.frozen:
            self.encoders.eval()
        return self

    def member_parameters(self) -> list[list[nn.Parameter]]:
        """Trainable parameters of each member, so that gradients are clipped per member.

        Returns
        -------
        list of list of torch.nn.Parameter
            One of each member; those of its scale head are one more.
        """
        members = []
        for i, head in enumerate(self.heads):
            encoder = [] if self.frozen else list(self.encoders[i].parameters())
            members.append([*encoder, *head.parameters()])
        return members + [list(head.parameters()) for head in self.scale_heads]

    def embed(self, batch: StoichiometryBatch) -> Tensor:
        """What the heads read: each encoder's mean, eq. 11.

        Parameters
        ----------
        batch : StoichiometryBatch

        Returns
        -------
        torch.Tensor, shape (n_encoders, n_graphs, F)
        """
        return self.embed_each([batch] * len(self.encoders))

    def embed_each(self, batches: Sequence[StoichiometryBatch]) -> Tensor:
        """The same with a batch of its own for each encoder.

        Parameters
        ----------
        batches : sequence of n_encoders StoichiometryBatch
            Of the same number of formulas.

        Returns
        -------
        torch.Tensor, shape (n_encoders, n_graphs, F)
        """
        pairs = zip(self.encoders, batches, strict=True)
        return torch.stack([cast(StoichiometryEncoder, enc).mean(batch) for enc, batch in pairs])

    def outputs(self, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        """Location (or logit) and log scale of every member.

        Parameters
        ----------
        embeddings : torch.Tensor, shape (n_encoders or n_ensemble, n_graphs, F)

        Returns
        -------
        location, log_scale : torch.Tensor, each of shape (n_ensemble, n_graphs, n_tasks)
            In units of the normalized labels; without a scale head, zeros for the second.
        """
        embeddings = self._read(embeddings)
        location = _apply(self.heads, embeddings)
        if not self.heteroscedastic:
            return location, torch.zeros_like(location)
        return location, _apply(self.scale_heads, embeddings.detach())

    def _read(self, embeddings: Tensor) -> Tensor:
        """What each head takes in, (n_ensemble, n_graphs, F), of encoders or of members."""
        readers = len(self.heads) // len(embeddings)
        return embeddings.expand(readers, *embeddings.shape).flatten(0, 1) * self.config.head_scale

    def loss(self, embeddings: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        """Mean of weight times loss over the labels, summed over the members.

        The members share no parameters. A label counts by its weight in the whole dataset, so it is
        the labels of a batch that are counted, not their weights that are added up.

        Parameters
        ----------
        embeddings : torch.Tensor, shape (n_ensemble, n_graphs, F)
        labels : torch.Tensor, shape (n_ensemble, n_graphs, n_tasks)
            In label units; entries of weight 0 are not read.
        weights : torch.Tensor, shape (n_ensemble, n_graphs, n_tasks)

        Returns
        -------
        torch.Tensor, scalar
            Absolute error (eq. 14) or cross-entropy, plus, if heteroscedastic, the Laplace
            negative log-likelihood of the scale at the error as it stands.
        """
        location, log_scale = map(at_least_float32, self.outputs(embeddings))
        if self.classification:
            losses = functional.binary_cross_entropy_with_logits(location, labels, reduction="none")
        else:
            error = (location - (labels - self.label_mean) / self.label_std).abs()
            losses = error
            if self.heteroscedastic:
                losses = error + error.detach() * torch.exp(-log_scale) + log_scale
        known = weights.count_nonzero((1, 2)).clamp_min(1)
        per_member = (losses * weights).sum((1, 2)) / known
        return per_member.sum()

    def forward(self, batch: StoichiometryBatch, polymorphs: bool = False) -> tuple[Tensor, Tensor]:
        """Predictive mean and standard deviation.

        Regression: mean over members; variance = variance between members + mean over members of
        the Laplace variance 2 b². Classification: probability p of class 1, variance p (1 - p).

        Parameters
        ----------
        batch : StoichiometryBatch
        polymorphs : bool
            Regression: the variance also has what each member's Gaussian N(z_mu, sigma^2) gives, to
            first order. The mean stays that of z_mu.

        Returns
        -------
        mean, std : torch.Tensor, each of shape (n_graphs, n_tasks)
            In label units.
        """
        if polymorphs:
            means, sigmas = self._gaussians(batch)
        else:
            means = self.embed(batch)
        location, log_scale = self.outputs(means)
        mean = location.mean(0)
        if self.classification:
            probability = torch.sigmoid(location).mean(0)
            return probability, (probability * (1 - probability)).sqrt()
        variance = location.var(0, unbiased=False)
        if polymorphs:
            read = self._read(means), self._read(sigmas)
            variance = variance + _first_order_variance(self.heads, *read).mean(0)
        if self.heteroscedastic:
            if polymorphs:  # exp(2 x) of a normal x has the mean exp(2 mean + 2 variance)
                log_scale = log_scale + _first_order_variance(self.scale_heads, *read)
            variance = variance + (2 * torch.exp(2 * log_scale)).mean(0)
        return mean * self.label_std + self.label_mean, variance.sqrt() * self.label_std

    def _gaussians(self, batch: StoichiometryBatch) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation by each encoder, each (n_encoders, n_graphs, F)."""
        each = [cast(StoichiometryEncoder, encoder)(batch) for encoder in self.encoders]
        means, log_sigmas = map(torch.stack, zip(*each, strict=True))
        return means, log_sigmas.exp()


def _apply(heads: nn.ModuleList, embeddings: Tensor) -> Tensor:
    """Each head on its own embedding: (n_ensemble, n_graphs, n_tasks)."""
    return torch.stack([head(row) for head, row in zip(heads, embeddings, strict=True)])


def _first_order_variance(heads: nn.ModuleList, means: Tensor, sigmas: Tensor) -> Tensor:
    """Variance of what each head makes of N(mean, sigma^2): the sum of (slope times sigma)^2.

    Means and sigmas (n_ensemble, n_graphs, F) -> (n_ensemble, n_graphs, n_tasks).
    """
    slopes = torch.stack([vmap(jacrev(head))(row) for head, row in zip(heads, means, strict=True)])
    return (slopes * sigmas[:, :, None]).square().sum(-1)
