"""What Roost and CrabNet are to DeepChem: models of one task, that predict in label units."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from graph_data import Dataset, Model, undo_transforms
from torch import Tensor, nn

from polysrl_dc.batches import LabeledData, stoichiometries
from polysrl_dc.checkpoints import (
    MODEL_FILE,
    content_of,
    load_checkpoint,
    load_into,
    save_checkpoint,
)
from polysrl_dc.errors import InvalidInputError
from polysrl_dc.graphs import StoichiometryBatch


class PeerModel(Model):
    """A model of DeepChem for one regression task, whose ``fit`` is that of its authors.

    It is no ``TorchModel``: of that loop, which has no validation data, nothing would be left.

    Parameters
    ----------
    seed : int
        Fixes weights and orders; exactly repeatable on a CPU.
    epochs : int
    device : str or torch.device, optional
        Default: CUDA if there is any.
    model_dir : str, optional
        Folder of :meth:`save` and :meth:`reload`; default: a temporary one.
    """

    def __init__(
        self,
        seed: int,
        epochs: int,
        device: str | torch.device | None = None,
        model_dir: str | None = None,
    ) -> None:
        self.seed, self.epochs = seed, epochs
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._scale: tuple[Tensor, Tensor] | None = None
        with seeded(seed, self.device):
            super().__init__(self._untrained(), model_dir)

    def _untrained(self) -> nn.Module:
        """The network, its weights drawn from torch's generators."""
        raise NotImplementedError

    def _outputs(self, dataset: Dataset) -> tuple[Tensor, Tensor]:
        """Value and logarithm of its standard deviation, (n,) each, of normalized labels."""
        raise NotImplementedError

    def fit(self, dataset: Dataset, unfinished: Path | None = None) -> Self:
        """Train from the initial weights, or on from ``unfinished``; returns itself."""
        raise NotImplementedError

    @property
    def n_parameters(self) -> int:
        """Trainable weights."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    def predict(self, dataset: Dataset, transformers: Sequence[Any] = ()) -> np.ndarray:
        """Predicted labels, (n, 1), in label units; those before the transformers, if given."""
        return undo_transforms(self.predict_uncertainty(dataset)[0], list(transformers))

    def predict_uncertainty(self, dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
        """Predicted labels and the standard deviations of their noise, each (n, 1)."""
        center, scale = self._fitted()
        value, log_std = self._outputs(dataset)
        mean, std = value * scale + center, log_std.exp() * scale
        return mean.unsqueeze(1).cpu().numpy(), std.unsqueeze(1).cpu().numpy()

    def save(self) -> None:
        """Write weights and scale of the labels into ``model_dir``."""
        tensors = {**self.model.state_dict(), "labels": torch.stack(self._fitted())}
        save_checkpoint(self._path, tensors, {"model": type(self).__name__})

    def reload(self) -> None:
        """Read what :meth:`save` has written; a ``CheckpointError`` names a file that is not it."""
        tensors, _ = load_checkpoint(self._path)
        with content_of(self._path):
            center, scale = tensors.pop("labels").to(self.device)
            load_into(self.model, tensors)
        self._scale = center, scale

    @property
    def _path(self) -> Path:
        return Path(self.model_dir) / MODEL_FILE

    def get_task_type(self) -> str:
        """Always regression."""
        return "regression"

    def get_num_tasks(self) -> int:
        """Always one."""
        return 1

    def _fitted(self) -> tuple[Tensor, Tensor]:
        if self._scale is None:
            raise ValueError("the model is not fitted; call fit first")
        return self._scale


def labeled(dataset: Dataset) -> LabeledData:
    """A dataset with every row checked; the losses of both peers have no weights.

    Raises
    ------
    InvalidInputError
        A row that is no graph or has no finite label (names row and id), weights that differ.
    """
    data = LabeledData.from_dataset(dataset, 1, False)
    if len(data.weights.unique()) > 1:
        raise InvalidInputError("the weights differ, which the losses of Roost and CrabNet lack")
    return data


def asked(dataset: Dataset) -> StoichiometryBatch:
    """The formulas of a dataset to predict.

    Raises
    ------
    InvalidInputError
        It has no row, or a row that is no graph (names row and id).
    """
    if len(dataset) == 0:
        raise InvalidInputError("the dataset has no row")
    return stoichiometries(dataset.X, dataset.ids)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Draw from the seed within, and leave torch's global generators as they were."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
