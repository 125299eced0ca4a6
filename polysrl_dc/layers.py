"""Set2Set pooling over compositions, and the feature normalization both encoders end with."""

import torch
from torch import Tensor, nn
from torch.nn import functional


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

    Examples
    --------
    >>> pool = CompositionSet2Set(4, processing_steps=2)
    >>> pool(torch.eye(3), torch.rand(3, 4), torch.rand(3, 4)).shape
    torch.Size([3, 8])
    """

    def __init__(self, n_features: int, processing_steps: int) -> None:
        super().__init__()
        self.n_features = n_features
        self.processing_steps = processing_steps
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

    @staticmethod
    def _read(
        query: Tensor, fractions: Tensor, absent: Tensor, elements: Tensor, graphs: Tensor
    ) -> Tensor:
        """Attention-weighted sum (n_graphs, F) of the set for queries (n_graphs or 1, F)."""
        scores = fractions * (query @ elements.T + (query * graphs).sum(-1, keepdim=True))
        attention = torch.softmax(scores.masked_fill(absent, -torch.inf), dim=-1) * fractions
        return attention @ elements + attention.sum(-1, keepdim=True) * graphs


def _lstm_cell(gates: Tensor, cell: Tensor | None) -> tuple[Tensor, Tensor]:
    """Hidden state and cell of an LSTM from its gates, in the gate order of ``nn.LSTM``."""
    take, keep, candidate, give = gates.chunk(4, dim=-1)
    update = torch.sigmoid(take) * torch.tanh(candidate)
    cell = update if cell is None else torch.sigmoid(keep) * cell + update
    return torch.sigmoid(give) * torch.tanh(cell), cell


class FeatureNorm(nn.BatchNorm1d):
    """Normalize each feature over the batch, without learnable scale, or pass through.

    Parameters
    ----------
    n_features : int
        F.
    enabled : bool
        False makes it the identity.

    Examples
    --------
    >>> FeatureNorm(3, enabled=False)(torch.ones(2, 3)).tolist()
    [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
    """

    def __init__(self, n_features: int, enabled: bool) -> None:
        super().__init__(n_features, affine=False)
        self.enabled = enabled

    def forward(self, features: Tensor) -> Tensor:
        """Features, shape (n_graphs, F), normalized; running statistics in evaluation mode."""
        if not self.enabled:
            return features
        if self.training and len(features) == 1:  # a single row has no variance
            self.eval()
            normalized = super().forward(features)
            self.train()
            return normalized
        return super().forward(features)
