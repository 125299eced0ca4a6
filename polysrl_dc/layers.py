"""Set2Set pooling over compositions, and the feature normalization both encoders end with."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from polysrl_dc.distributed import process_count, sum_over_processes


def at_least_float32(values: Tensor) -> Tensor:
    """Values in float32 where they are narrower, as autocast leaves them; else themselves.

    Parameters
    ----------
    values : torch.Tensor

    Returns
    -------
    torch.Tensor, of the same shape

    Examples
    --------
    >>> at_least_float32(torch.ones(2, dtype=torch.bfloat16)).dtype
    torch.float32
    """
    return values.to(torch.promote_types(values.dtype, torch.float32))


class CompositionSet2Set(nn.Module):
    """Set2Set (Vinyals et al. 2015; eq. 11 and 12 of the paper) over the elements of a formula.

    The set of graph ``b`` is ``x_i = r_i (e_i + g_b)`` with the fraction ``r_i``, a vector ``e_i``
    per element and a vector ``g_b`` per graph. Scores and readouts are then matrix products with
    the (n_graphs, n_elements) fractions, without an edge or node list. The first query does not
    depend on the input and is computed once. Same parameters and result as
    ``torch_geometric.nn.aggr.Set2Set``.

    Parameters
    ----------
    n_features : int
        F.
    processing_steps : int
        Number of queries.
    attention_power : float
        At 0 the set is ``r_i (e_i + g_b)``. Above, it is ``e_i + g_b`` and the attention of an
        element is proportional to ``r_i ** attention_power * exp(query . x_i)``.

    Examples
    --------
    >>> pool = CompositionSet2Set(4, processing_steps=2)
    >>> pool(torch.eye(3), torch.rand(3, 4), torch.rand(3, 4)).shape
    torch.Size([3, 8])
    """

    def __init__(
        self, n_features: int, processing_steps: int, attention_power: float = 0.0
    ) -> None:
        super().__init__()
        self.n_features = n_features
        self.processing_steps = processing_steps
        self.attention_power = attention_power
        self.lstm = nn.LSTM(2 * n_features, n_features)

    def forward(self, fractions: Tensor, elements: Tensor, graphs: Tensor) -> Tensor:
        """Pool.

        Parameters
        ----------
        fractions : torch.Tensor, shape (n_graphs, n_elements)
            r; zero where the element is absent.
        elements : torch.Tensor, shape (n_elements, F)
            e.
        graphs : torch.Tensor, shape (n_graphs, F)
            g.

        Returns
        -------
        torch.Tensor, shape (n_graphs, 2 F)
            Last query and last readout.
        """
        lstm = self.lstm
        absent = fractions == 0
        into_gates, recurrent, bias_into, bias_recurrent = lstm.all_weights[0]
        bias = bias_into + bias_recurrent
        from_query, from_readout = into_gates.split(self.n_features, dim=1)
        from_query = from_query + recurrent  # the query is the hidden state

        query, cell = _lstm_cell(bias.unsqueeze(0), None)
        readout = self._read(query, fractions, absent, elements, graphs)
        for _ in range(self.processing_steps - 1):
            gates = functional.linear(readout, from_readout, bias)
            query, cell = _lstm_cell(gates + functional.linear(query, from_query), cell)
            readout = self._read(query, fractions, absent, elements, graphs)
        return torch.cat([query.expand_as(readout), readout], dim=-1)

    def _read(
        self, query: Tensor, fractions: Tensor, absent: Tensor, elements: Tensor, graphs: Tensor
    ) -> Tensor:
        """Attention-weighted sum (n_graphs, F) of the set for queries (n_graphs or 1, F)."""
        scores = query @ elements.T + (query * graphs).sum(-1, keepdim=True)
        if self.attention_power:
            prior = self.attention_power * fractions.masked_fill(absent, 1.0).log()
            attention = torch.softmax((scores + prior).masked_fill(absent, -torch.inf), dim=-1)
        else:
            scores = (fractions * scores).masked_fill(absent, -torch.inf)
            attention = torch.softmax(scores, dim=-1) * fractions
        return attention @ elements + attention.sum(-1, keepdim=True) * graphs


def _lstm_cell(gates: Tensor, cell: Tensor | None) -> tuple[Tensor, Tensor]:
    """Hidden state and cell of an LSTM from its gates, in the gate order of ``nn.LSTM``."""
    take, keep, candidate, give = gates.chunk(4, dim=-1)
    update = torch.sigmoid(take) * torch.tanh(candidate)
    cell = update if cell is None else torch.sigmoid(keep) * cell + update
    return torch.sigmoid(give) * torch.tanh(cell), cell


class FeatureNorm(nn.BatchNorm1d):
    """Normalize each feature over the batch, without learnable scale, and decorrelate features.

    The covariance ``C`` of the normalized features is followed as a slow average over batches, and
    features are multiplied by ``C^(-whitening / 2)``. That matrix passes no gradient: a batch of
    256 is too small to whiten 200 features by itself. It is adapted in pretraining only.

    Parameters
    ----------
    n_features : int
        F.
    enabled : bool
        False makes it the identity.
    whitening : float
        0 leaves correlations as they are, 1 removes them.

    Attributes
    ----------
    adaptive : bool
        Whether batches in training mode change the covariance.

    Examples
    --------
    >>> FeatureNorm(3, enabled=False)(torch.ones(2, 3)).tolist()
    [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
    """

    covariance: Tensor
    decorrelation: Tensor

    #: Weight of a batch in the average of covariances.
    covariance_momentum = 0.02

    def __init__(self, n_features: int, enabled: bool, whitening: float = 0.0) -> None:
        super().__init__(n_features, affine=False)
        self.enabled = enabled
        self.whitening = whitening
        self.adaptive = False
        if whitening:
            self.register_buffer("covariance", torch.eye(n_features))
            self.register_buffer("decorrelation", torch.eye(n_features))

    def forward(self, features: Tensor) -> Tensor:
        """Normalize; by running statistics in evaluation mode.

        Parameters
        ----------
        features : torch.Tensor, shape (n_graphs, F)

        Returns
        -------
        torch.Tensor, shape (n_graphs, F)
        """
        if not self.enabled:
            return features
        with torch.autocast(features.device.type, enabled=False):
            normalized = self._normalized(at_least_float32(features))
            if not self.whitening:
                return normalized
            if self.training and self.adaptive:
                self._adapt(normalized.detach())
            return normalized @ self.decorrelation.to(normalized.dtype)

    def _normalized(self, features: Tensor) -> Tensor:
        if self.training and process_count() > 1:
            return self._over_processes(features)
        if self.training and len(features) == 1:  # a single row has no variance
            self.eval()
            normalized = super().forward(features)
            self.train()
            return normalized
        return super().forward(features)

    def _over_processes(self, features: Tensor) -> Tensor:
        """The same with the mean and variance of the batch of all processes."""
        n = sum_over_processes(features.new_full((), len(features)))
        mean = sum_over_processes(features.sum(0)) / n
        variance = sum_over_processes(((features - mean) ** 2).sum(0)) / n
        with torch.no_grad():
            cast(Tensor, self.num_batches_tracked).add_(1)
            cast(Tensor, self.running_mean).lerp_(mean, cast(float, self.momentum))
            cast(Tensor, self.running_var).lerp_(variance * n / (n - 1), cast(float, self.momentum))
        return (features - mean) * torch.rsqrt(variance + self.eps)

    @torch.no_grad()
    def _adapt(self, normalized: Tensor) -> None:
        """Follow the covariance, and set the matrix that decorrelates."""
        normalized = normalized.to(self.covariance.dtype)
        n = sum_over_processes(normalized.new_full((), len(normalized)))
        covariance = sum_over_processes(normalized.T @ normalized) / n
        finite = torch.isfinite(covariance).all()  # else the loss ends the training
        covariance = torch.where(finite, covariance, self.covariance)
        self.covariance.lerp_(covariance, self.covariance_momentum)
        self.decorrelate(self.whitening)

    @torch.no_grad()
    def decorrelate(self, power: float) -> None:
        """Set the matrix to ``C^(-power / 2)``, also to another power than that of the training.

        Parameters
        ----------
        power : float
            Between 0 and 1.
        """
        variances, directions = torch.linalg.eigh(self.covariance)
        scales = variances.clamp_min(self.eps) ** (-power / 2)
        self.decorrelation.copy_((directions * scales) @ directions.T)


def running_statistics(network: nn.Module) -> list[Tensor]:
    """The buffers of a network that a batch changes: those of feature norms in training mode.

    Parameters
    ----------
    network : torch.nn.Module

    Returns
    -------
    list of torch.Tensor
    """
    norms = [m for m in network.modules() if isinstance(m, FeatureNorm) and m.training]
    return [buffer for norm in norms for buffer in norm.buffers()]


@contextmanager
def restored_if_it_fails(running: list[Tensor]) -> Iterator[None]:
    """Put running statistics back where a step fails or is interrupted: there has been none.

    Parameters
    ----------
    running : list of torch.Tensor
        As :func:`running_statistics` gives them.
    """
    before = [buffer.clone() for buffer in running]
    try:
        yield
    except BaseException:
        for buffer, value in zip(running, before, strict=True):
            buffer.copy_(value)
        raise
