"""DeepChem datasets -> tensors, with every row checked; the last stop before the networks."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from deepchem.data import Dataset
from torch import Tensor

from polysrl_dc.config import PolySRLConfig
from polysrl_dc.datasets import PolymorphDataset
from polysrl_dc.distributed import process_count, process_rank
from polysrl_dc.elements import has_embedding
from polysrl_dc.errors import InvalidInputError
from polysrl_dc.featurizers import check_lengths
from polysrl_dc.graphs import StoichiometryBatch, StoichiometryGraph, StructureGraph
from polysrl_dc.sources import PackSettings

GREATEST_LABEL = 1e18  # squares of labels and errors must stay finite in single precision
_LEAST_LABEL = 1e-30
_LEAST_SPREAD = 1e-4  # of the greatest label; single precision keeps a thousandth of it
_SAME = 1e-12  # of the greatest label: differences of rounding


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
        For the first row that is neither, or whose fractions are none, naming row and id.
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
    batch = StoichiometryBatch.from_graphs(graphs)
    fractions = batch.fractions.numpy()
    sound = np.abs(fractions.sum(1) - 1) < 1e-3
    sound &= (fractions.min(1, initial=0.0) >= 0) & ~fractions[:, ~has_embedding()].any(1)
    if not sound.all():
        row = int(np.argmin(sound))
        raise InvalidInputError(
            f"row {first_row + row} (id {ids[row]}): fractions {graphs[row].fractions.tolist()} of "
            f"elements {graphs[row].numbers.tolist()}; they must add up to 1 and have embeddings"
        )
    return batch


def _numbers(values: Any, ids: Sequence[Any], what: str) -> np.ndarray:
    """Labels or weights as float64, (n_rows, columns); masked ones are NaN."""
    array = values if np.ma.is_masked(values) else np.asarray(values)

    def named(row: int) -> str:
        return f"row {row} (id {ids[row]}): {what} {np.asarray(array[row]).tolist()!r:.80}"

    if array.dtype.kind not in "biufOSU":  # complex numbers and dates would be converted
        raise InvalidInputError(f"{named(0)} is of type {array.dtype}")
    try:
        return np.ma.filled(array.astype(np.float64), np.nan).reshape(len(array), -1)
    except (TypeError, ValueError, OverflowError) as error:
        row = next((row for row, value in enumerate(array) if not _is_number(value)), 0)
        raise InvalidInputError(f"{named(row)}: {error}") from error


def checked_labels(
    dataset: Dataset, n_tasks: int, classification: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Labels and weights of a dataset, each (n_rows, n_tasks) float64; missing labels are 0.

    Raises
    ------
    InvalidInputError
        A label that is no finite number or class, or a bad weight, naming row and id.
    """
    check_lengths(dataset)
    ids = dataset.ids
    w = _numbers(dataset.w, ids, "weight")
    given = np.ma.asarray(dataset.y)
    if given.dtype.kind in "OSU" and given.size in (w.size, w.size * n_tasks):
        missing = np.broadcast_to(w, (len(w), given.size // len(w))).reshape(given.shape) == 0
        given = np.ma.where(missing, None, given.astype(object))
    y = _numbers(given, ids, "label")
    if y.shape[1] != n_tasks:
        raise InvalidInputError(f"the labels have {y.shape[1]} columns, the model {n_tasks}")
    if w.shape[1] not in (1, n_tasks):
        raise InvalidInputError(f"the weights have {w.shape[1]} columns, the model {n_tasks}")
    w = np.broadcast_to(w, y.shape)

    def refuse(bad: np.ndarray, what: str, values: np.ndarray, rule: str) -> None:
        if bad.any():
            row, task = np.argwhere(bad)[0]
            raise InvalidInputError(
                f"row {row} (id {ids[row]}): {what} {values[row, task]} of task {task}; {rule}"
            )

    refuse(~((w >= 0) & (w < np.inf)), "weight", w, "weights are finite and not negative")
    if not w.any():
        raise InvalidInputError("all weights are zero: every label is missing")
    known = w != 0
    refuse(known & ~np.isfinite(y), "label", y, "mark missing ones by weight 0")
    refuse(known & ~(np.abs(y) <= GREATEST_LABEL), "label", y, f"beyond {GREATEST_LABEL:g}")
    if classification:
        refuse(known & ~np.isin(y, (0, 1)), "label", y, "classes are 0 and 1")
    return np.where(known, y, 0.0), w


def _refuse_lost_differences(labels: np.ndarray, weights: np.ndarray) -> None:
    """Refuse labels of a task that single precision would hardly tell from one another."""
    for task, known in enumerate((weights != 0).T):
        values = labels[known, task]
        spread, size = (np.ptp(values), np.abs(values).max()) if len(values) else (0.0, 0.0)
        if _SAME * size < spread < max(_LEAST_SPREAD * size, _LEAST_LABEL):
            raise InvalidInputError(
                f"the labels of task {task} differ by {spread:.2g} only, beside values of "
                f"{size:.6g}: subtract a constant, or change the unit"
            )


def _is_number(value: Any) -> bool:
    try:
        np.asarray(value).astype(np.float64)
    except (TypeError, ValueError, OverflowError):
        return False
    return True


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
        Labels of weight 0 are missing and stored as 0. The others have a mean weight of 1.
    embeddings : torch.Tensor, shape (n_encoders, n_graphs, F), optional
    """

    #: Whether all epochs have the same number of batches.
    equal_epochs = True

    inputs: StoichiometryBatch
    labels: Tensor
    weights: Tensor
    embeddings: Tensor | None = None

    @classmethod
    def from_dataset(cls, dataset: Dataset, n_tasks: int, classification: bool) -> "LabeledData":
        """Read and check a whole dataset; errors name row and id."""
        labels, weights = checked_labels(dataset, n_tasks, classification)
        _refuse_lost_differences(labels, weights)
        weights = weights / weights.max()  # so that their sum is finite
        return cls(
            stoichiometries(dataset.X, dataset.ids),
            torch.as_tensor(labels, dtype=torch.float32),
            torch.as_tensor(weights / weights[weights > 0].mean(), dtype=torch.float32),
        )

    def __len__(self) -> int:
        return len(self.labels)

    def fingerprint(self) -> str:
        """Hash of formulas, labels and weights: what a checkpoint remembers of its data."""
        digest = hashlib.sha256()
        for tensor in (self.inputs.fractions, self.labels, self.weights):
            digest.update(tensor.cpu().numpy().tobytes())
        return digest.hexdigest()

    def label_statistics(self) -> tuple[Tensor, Tensor]:
        """Weighted mean and standard deviation per task, each (n_tasks,).

        Raises
        ------
        InvalidInputError
            A task has no label.
        """
        labels, weights = self.labels.double(), self.weights.double()
        total = weights.sum(0)
        if (total == 0).any():
            raise InvalidInputError(f"task {int(total.argmin())} has no label to learn from")
        mean = (labels * weights).sum(0) / total
        std = ((labels - mean) ** 2 * weights).sum(0).div(total).sqrt()
        return mean.float(), torch.where(std > 1e-8 * mean.abs(), std, 0.0).float()

    def to(self, device: torch.device) -> "LabeledData":
        """Copy on ``device``."""
        embeddings = None if self.embeddings is None else self.embeddings.to(device)
        labels, weights = self.labels.to(device), self.weights.to(device)
        return LabeledData(self.inputs.to(device), labels, weights, embeddings)

    def labeled(self) -> "LabeledData":
        """The rows with a label: others would fill batches and count in running statistics."""
        rows = self.weights.any(1)
        return LabeledData(self.inputs[rows], self.labels[rows], self.weights[rows])

    def with_embeddings(self, embeddings: Tensor) -> "LabeledData":
        """With the output of a frozen encoder, which is then not run again."""
        return replace(self, embeddings=embeddings)

    def epoch(
        self, batch_size: int, members: int, random: np.random.Generator | None
    ) -> Iterator[np.ndarray]:
        """Row numbers of each batch of an epoch, (members, b); in order where ``random`` is None.

        Members meet the rows in orders of their own. With one order for all, their errors resemble
        one another more: an ensemble of four had 0.359 eV on matbench_expt_gap, fold 0, against
        0.354 with an order each. Two or three rows are no last batch: their mean and variance
        spoil the running ones that predictions are made with. Without it the error on six samples
        of expt_gap that leave so many over was 3 % lower to 0.5 % higher, 1 % lower on average
        (measured by hand).
        """
        orders = np.tile(np.arange(len(self)), (members, 1))
        if random is not None:
            orders = random.permuted(orders, axis=1)
        return (orders[:, columns] for columns in batch_rows(len(self), batch_size, 4))

    def loss(self, network: Any, rows: np.ndarray, generator: torch.Generator) -> Tensor:
        """Loss of one batch per member, rows (members, b), scalar; nothing in it is random."""
        index = torch.as_tensor(rows, device=self.labels.device)
        if self.embeddings is None:
            embeddings = network.embed_each([self.inputs[member] for member in index])
        else:
            encoder = torch.arange(len(index), device=index.device) % len(self.embeddings)
            embeddings = self.embeddings[encoder.unsqueeze(1), index]  # of frozen encoders
        return network.loss(embeddings, self.labels[index], self.weights[index])


@dataclass(frozen=True)
class PolymorphData:
    """Structures to pretrain on, and how they are put into batches.

    Attributes
    ----------
    dataset : PolymorphDataset
    polymorphs_per_batch : int
        Polymorphs of a formula that are kept together in a batch, at most; 1 leaves it to chance.
    max_edges : int, optional
        Edges of a batch at most; a batch is cut short where the next structure would exceed it.
        A structure that is then alone is left out of the epoch: it has nothing to be told from.
    """

    dataset: PolymorphDataset
    polymorphs_per_batch: int = 1
    max_edges: int | None = None

    @classmethod
    def from_dataset(
        cls, dataset: Dataset, config: PolySRLConfig, least: int = 2, **sampling: Any
    ) -> "PolymorphData":
        """Check a dataset; one that is no PolymorphDataset is packed; errors name row and id."""
        if not isinstance(dataset, PolymorphDataset):
            for row, graph in enumerate(dataset.X):
                if not isinstance(graph, StructureGraph):
                    raise InvalidInputError(
                        f"row {row} (id {dataset.ids[row]}) is {_what(graph)}: pretraining needs "
                        "the graphs of StructureGraphFeaturizer"
                    )
            settings = PackSettings(rounds=max(PackSettings.rounds, config.structure_layers))
            dataset = PolymorphDataset.from_graphs(dataset.X, dataset.ids, settings)
        if len(dataset) < least:
            raise InvalidInputError("pretraining contrasts structures and needs at least two")
        return cls(dataset.checked(config), **sampling)

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def equal_epochs(self) -> bool:
        """Whether all epochs have the same number of batches."""
        return self.max_edges is None

    def fingerprint(self) -> str:
        """Hash of ids, formulas and graphs: what a checkpoint remembers of its data."""
        return self.dataset.fingerprint()

    def epoch(
        self, batch_size: int, members: int, random: np.random.Generator | None
    ) -> Iterator[np.ndarray]:
        """Row numbers of each batch of an epoch, (1, b).

        Batches differ in size by one row at most: with full batches and a small rest, the one step
        on the rest, few rows with the same learning rate, undid much of an epoch (retrieval@1 of
        0.47 in its middle and 0.09 at its end).
        """
        order = np.arange(len(self))
        if random is not None:
            order = polymorphs_together(self.dataset.groups, self.polymorphs_per_batch, random)
        if self.max_edges is None:
            n_batches = -(-len(self) // batch_size)
            batches = iter(np.array_split(np.arange(len(self)), n_batches))
        else:
            batches = capped_rows(self.dataset.n_edges[order], batch_size, self.max_edges)
        return (order[np.newaxis, columns] for columns in batches if len(columns) > 1)

    def loss(self, network: Any, rows: np.ndarray, generator: torch.Generator) -> Tensor:
        """Loss of the batch of these rows, (1, b), scalar; over processes each embeds its part."""
        parts = np.array_split(rows[0], process_count())
        formulas, structures, groups = self.dataset.batch(parts[process_rank()])
        device = next(network.parameters()).device
        return network(formulas.to(device), structures.to(device), groups.to(device), generator)


def polymorphs_together(
    groups: np.ndarray, together: int, random: np.random.Generator
) -> np.ndarray:
    """Random order of rows in which up to ``together`` rows of a group follow one another.

    Parameters
    ----------
    groups : numpy.ndarray, shape (n,), integer
    together : int
        1 for an order that does not look at the groups.
    random : numpy.random.Generator

    Returns
    -------
    numpy.ndarray, shape (n,), int64

    Examples
    --------
    >>> order = polymorphs_together(np.array([0, 1, 0, 1]), 2, np.random.default_rng(0))
    >>> np.array([0, 1, 0, 1])[order].tolist()
    [1, 1, 0, 0]
    """
    order = random.permutation(len(groups))
    if together == 1:
        return order
    order = order[np.argsort(groups[order], kind="stable")]
    _, first, sizes = np.unique(groups[order], return_index=True, return_counts=True)
    place = np.arange(len(order)) - np.repeat(first, sizes)
    run = np.cumsum(place % together == 0) - 1  # at most `together` rows of one group
    key = random.permutation(run[-1] + 1)[run]
    return order[np.argsort(key, kind="stable")]


def capped_rows(n_edges: np.ndarray, batch_size: int, max_edges: int) -> Iterator[np.ndarray]:
    """Consecutive rows in batches of at most ``batch_size`` rows and ``max_edges`` edges.

    Raises
    ------
    InvalidInputError
        A single row exceeds the cap.
    """
    too_large = np.flatnonzero(n_edges > max_edges)
    if len(too_large):
        row = too_large[0]
        raise InvalidInputError(f"a structure has {n_edges[row]} edges, more than {max_edges}")
    ends = np.cumsum(n_edges, dtype=np.int64)
    start = 0
    while start < len(ends):
        limit = max_edges + (ends[start - 1] if start else 0)
        end = min(start + batch_size, int(np.searchsorted(ends, limit, side="right")))
        if len(ends) - end == 1 and end - start > 2:
            end -= 1  # the last row alone would have no negatives
        yield np.arange(start, end)
        start = end


def batch_rows(n: int, batch_size: int, least: int = 2) -> Iterator[np.ndarray]:
    """Row numbers of one epoch in batches; the last one is smaller, never padded by duplicates.

    A last batch of fewer than ``least`` rows joins the one before it: one row has no variance.
    """
    starts = list(range(0, n, batch_size))
    if len(starts) > 1 and n - starts[-1] < least:
        starts.pop()
    for start, end in zip(starts, [*starts[1:], n], strict=True):
        yield np.arange(start, end)
