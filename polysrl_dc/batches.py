"""DeepChem datasets -> tensors, with every row checked; the last stop before the networks."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from deepchem.data import Dataset
from torch import Tensor

from polysrl_dc.errors import InvalidInputError
from polysrl_dc.graphs import StoichiometryBatch, StoichiometryGraph, StructureBatch, StructureGraph

_GREATEST_LABEL = 1e18  # squares of labels and errors must stay finite in single precision


def stoichiometries(X: Sequence[Any], ids: Sequence[Any], first_row: int = 0) -> StoichiometryBatch:
    """Batch the formulas of dataset rows.

    Parameters
    ----------
    X : sequence of StoichiometryGraph or StructureGraph
    ids : sequence
        Identifiers named in errors.
    first_row : int
        Row number of ``X[0]`` in its dataset.

    Raises
    ------
    InvalidInputError
        For the first row that is neither, naming row and id.
    """
    graphs = []
    for i, (graph, row_id) in enumerate(zip(X, ids, strict=True)):
        if isinstance(graph, StructureGraph):
            graph = graph.stoichiometry
        if not isinstance(graph, StoichiometryGraph):
            raise InvalidInputError(
                f"row {first_row + i} (id {row_id}) is {_what(graph)}, not a graph; featurize it "
                "with StoichiometryGraphFeaturizer, and remove rows skipped by a featurizer with "
                "polysrl_dc.datasets.drop_skipped"
            )
        graphs.append(graph)
    return StoichiometryBatch.from_graphs(graphs)


def _what(value: Any) -> str:
    if isinstance(value, np.ndarray) and value.size == 0:
        return "the empty array of a failed featurization"
    return f"a {type(value).__name__}"


@dataclass(frozen=True)
class LabeledData:
    """Formulas (or their frozen embeddings), labels and weights of a dataset.

    Attributes
    ----------
    inputs : StoichiometryBatch
    labels, weights : torch.Tensor, shape (n_graphs, n_tasks), float32
        Labels of weight 0 are missing and stored as 0.
    embeddings : torch.Tensor, shape (1, n_graphs, F), optional
    """

    inputs: StoichiometryBatch
    labels: Tensor
    weights: Tensor
    embeddings: Tensor | None = None

    @classmethod
    def from_dataset(cls, dataset: Dataset, n_tasks: int, classification: bool) -> "LabeledData":
        """Read and check a whole dataset; errors name row and id."""
        if len(dataset) == 0:
            raise InvalidInputError("the dataset has no row")
        y = np.asarray(dataset.y, dtype=np.float64).reshape(len(dataset), -1)
        w = np.broadcast_to(np.asarray(dataset.w, np.float64).reshape(len(dataset), -1), y.shape)
        if y.shape[1] != n_tasks:
            raise InvalidInputError(f"the labels have {y.shape[1]} columns, the model {n_tasks}")
        bad = (w != 0) & ~(np.abs(y) <= _GREATEST_LABEL)
        problem = "mark missing labels by weight 0"
        if classification and not bad.any():
            bad, problem = (w != 0) & ~np.isin(y, (0, 1)), "classes are 0 and 1"
        if bad.any():
            row, column = np.argwhere(bad)[0]
            raise InvalidInputError(
                f"row {row} (id {dataset.ids[row]}): label {y[row, column]} of task {column}; "
                f"{problem}"
            )
        if not np.isfinite(w).all() or (w < 0).any() or not w.any():
            raise InvalidInputError("weights must be finite, not negative, and not all zero")
        return cls(
            stoichiometries(dataset.X, dataset.ids),
            torch.as_tensor(np.where(w != 0, y, 0.0), dtype=torch.float32),
            torch.as_tensor(np.array(w), dtype=torch.float32),
        )

    def __len__(self) -> int:
        return len(self.labels)

    def label_statistics(self) -> tuple[Tensor, Tensor]:
        """Weighted mean and standard deviation per task, each (n_tasks,); 1 where it is 0."""
        labels, weights = self.labels.double(), self.weights.double()
        total = weights.sum(0).clamp_min(1e-12)
        mean = (labels * weights).sum(0) / total
        std = ((labels - mean) ** 2 * weights).sum(0).div(total).sqrt()
        return mean.float(), torch.where(std > 1e-8 * (1 + mean.abs()), std, 1.0).float()

    def to(self, device: torch.device) -> "LabeledData":
        """Copy on ``device``."""
        return LabeledData(
            self.inputs.to(device), self.labels.to(device), self.weights.to(device)
        )

    def with_embeddings(self, embeddings: Tensor) -> "LabeledData":
        """With the output of a frozen encoder, which is then not run again."""
        return replace(self, embeddings=embeddings)

    def loss(self, network: Any, rows: np.ndarray, generator: torch.Generator) -> Tensor:
        """Loss of one batch per member, rows (n_ensemble, b), scalar; nothing in it is random."""
        index = torch.as_tensor(rows, device=self.labels.device)
        if self.embeddings is None:
            embeddings = network.embed_each([self.inputs[member] for member in index])
        else:
            embeddings = self.embeddings[0, index]  # of the one frozen encoder
        return network.loss(embeddings, self.labels[index], self.weights[index])


@dataclass(frozen=True)
class PolymorphData:
    """Structure graphs of a dataset and the group (reduced formula) of each.

    Attributes
    ----------
    graphs : sequence of StructureGraph
    groups : numpy.ndarray, shape (n_graphs,), int64
        Equal for polymorphs.
    """

    graphs: Sequence[StructureGraph]
    groups: np.ndarray

    @classmethod
    def from_dataset(cls, dataset: Dataset) -> "PolymorphData":
        """Read and check a whole dataset; errors name row and id."""
        graphs = list(dataset.X)
        for row, graph in enumerate(graphs):
            if not isinstance(graph, StructureGraph):
                raise InvalidInputError(
                    f"row {row} (id {dataset.ids[row]}) is {_what(graph)}: pretraining needs the "
                    "graphs of StructureGraphFeaturizer"
                )
        if len(graphs) < 2:
            raise InvalidInputError("pretraining contrasts structures and needs at least two")
        formulas = [graph.stoichiometry.formula for graph in graphs]
        return cls(graphs, np.unique(formulas, return_inverse=True)[1])

    def __len__(self) -> int:
        return len(self.graphs)

    def to(self, device: torch.device) -> "PolymorphData":
        """Itself: batches are moved one at a time."""
        return self

    def loss(self, network: Any, rows: np.ndarray, generator: torch.Generator) -> Tensor:
        """Loss of the batch of these rows, (1, b), scalar."""
        (rows,) = rows
        device = next(network.parameters()).device
        graphs = [self.graphs[row] for row in rows]
        return network.loss(
            StoichiometryBatch.from_graphs([graph.stoichiometry for graph in graphs]).to(device),
            StructureBatch.from_graphs(graphs).to(device),
            torch.as_tensor(self.groups[rows], device=device),
            generator,
        )


def batch_rows(n: int, batch_size: int) -> Iterator[np.ndarray]:
    """Row numbers of one epoch in batches; the last one is smaller, never padded by duplicates.

    A last batch of a single row joins the one before it, because one row has neither negatives
    nor a variance.
    """
    starts = list(range(0, n, batch_size))
    if len(starts) > 1 and n - starts[-1] == 1:
        starts.pop()
    for start, end in zip(starts, [*starts[1:], n], strict=True):
        yield np.arange(start, end)
