"""Roost, a peer that sees formulas only, from the package that its authors maintain.

Goodall, Lee, Nature Communications 11, 6280 (2020), doi:10.1038/s41467-020-19964-7; the package is
``aviary-models``. Network, loss, optimizer, label normalization, batches and training loop are the
package's own; nothing of them is written here. The settings:

* sizes of the network, and Matscholar elements that are trained along: the defaults of its class;
* the robust L1 loss, AdamW at 3e-4 with weight decay 1e-6, batches of 128, 100 epochs: those of the
  authors' notebook, whose network is smaller, and the defaults of their ``roost-example.py``, which
  their README calls with ``--robust`` and, as a demonstration, for 10 epochs;
* no validation data, no early stopping, the weights of the last epoch: the script's default too,
  which calls this "the only valid model to use".
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from aviary.data import Normalizer
from aviary.roost.data import collate_batch
from aviary.roost.model import Roost
from aviary.utils import initialize_losses, initialize_optim
from graph_data import Dataset
from peer_base import PeerModel, asked, labeled, seeded
from pymatgen.core import Element
from torch import Tensor
from torch.utils.data import DataLoader
from training_state import TrainingState

from polysrl_dc.errors import InvalidInputError
from polysrl_dc.graphs import StoichiometryBatch

EPOCHS = 100
BATCH_SIZE = 128
LEARNING_RATE, WEIGHT_DECAY = 3e-4, 1e-6
VERSION = f"aviary-models {version('aviary-models')}"
TASK = "target"


class RoostModel(PeerModel):
    """Roost, trained by the loop of its package.

    Parameters
    ----------
    seed : int
        Fixes weights and orders; exactly repeatable on a CPU.
    epochs : int
    device, model_dir : optional
        As of :class:`peer_base.PeerModel`.
    **sizes
        Keyword arguments of ``aviary.roost.model.Roost``, to make it smaller.

    Examples
    --------
    >>> from graph_data import graph_dataset
    >>> dataset = graph_dataset(["NaCl", "KCl", "MgO", "CaO"], [8.5, 8.4, 7.8, 7.1])
    >>> model = RoostModel(epochs=1, n_graph=1, trunk_hidden=(8,)).fit(dataset)
    >>> model.predict(dataset).shape
    (4, 1)
    """

    def __init__(
        self,
        seed: int = 0,
        epochs: int = EPOCHS,
        device: str | torch.device | None = None,
        model_dir: str | None = None,
        **sizes: Any,
    ) -> None:
        if epochs < 1:
            raise ValueError(f"epochs is {epochs}: must be at least 1")
        self.sizes = sizes
        super().__init__(seed, epochs, device, model_dir)

    def _untrained(self) -> Roost:
        settings = {"robust": True, "n_targets": [1], "task_dict": {TASK: "regression"}}
        return Roost(**settings, device=str(self.device), **self.sizes).to(self.device)

    def fit(self, dataset: Dataset, unfinished: Path | None = None) -> RoostModel:
        """Train from the initial weights by the package's own loop; returns itself.

        Parameters
        ----------
        dataset : dc.data.Dataset
            X holds stoichiometry graphs, y one column.
        unfinished : path, optional
            Folder from which the same training, if it was interrupted, goes on.

        Raises
        ------
        InvalidInputError
            A row that is no graph, has an element that Roost does not know or has no finite label
            (names row and id), weights that differ, labels that are all the same.
        FloatingPointError
            A weight is not finite.
        KeyboardInterrupt
            As it came; the package's loop would take it for the end of training.
        """
        data = labeled(dataset)
        targets = data.labels[:, 0]
        if not torch.std(targets) > 0:
            raise InvalidInputError("the labels are all the same: there is nothing to learn")
        with seeded(self.seed, self.device), _spared_garbage():
            network = self._untrained()
            loader = self._loader(data.inputs, targets, dataset, BATCH_SIZE, shuffle=True)
            normalizer = Normalizer()
            normalizer.fit(targets)
            optimizer, scheduler = initialize_optim(
                network, "AdamW", LEARNING_RATE, WEIGHT_DECAY, momentum=0.9, device=self.device
            )
            losses = initialize_losses(network.task_dict, {TASK: "L1"}, robust=True)
            made_of = [VERSION, self.epochs, data.fingerprint()]
            parts = {"optimizer": optimizer, "scheduler": scheduler}
            state = TrainingState(unfinished, made_of, self.device, network, **parts)
            state.restore()
            for epoch in range(scheduler.last_epoch, self.epochs):
                network.fit(
                    loader,
                    val_loader=None,
                    optimizer=optimizer,
                    scheduler=scheduler,
                    epochs=1,
                    loss_dict=losses,
                    normalizer_dict={TASK: normalizer},
                    model_name="roost",
                    run_id=0,
                    checkpoint=False,
                    verbose=False,
                )
                if scheduler.last_epoch == epoch:
                    raise KeyboardInterrupt
                state.keep()
        if not all(bool(weight.isfinite().all()) for weight in network.parameters()):
            raise FloatingPointError("a weight is not finite after training")
        self.model, self._scale = network, (normalizer.mean, normalizer.std)
        return self

    def _outputs(self, dataset: Dataset) -> tuple[Tensor, Tensor]:
        formulas = asked(dataset)
        no_targets, size = torch.zeros(len(formulas)), 16 * BATCH_SIZE  # of the authors' script
        loader = self._loader(formulas, no_targets, dataset, size, shuffle=False)
        with seeded(self.seed, self.device):  # even a loader that does not shuffle draws a number
            _, (outputs,), _ = self.model.predict(loader)
        value, log_std = outputs.unbind(1)
        return value, log_std

    def _loader(
        self,
        formulas: StoichiometryBatch,
        targets: Tensor,
        dataset: Dataset,
        size: int,
        shuffle: bool,
    ) -> DataLoader[Any]:
        """Batches of the package, with every element checked.

        Its own ``CompositionData`` makes the same samples from strings, but keeps each of them for
        as long as the process lives, in a cache of the class.
        """
        weight = self.model.elem_embedding.weight.detach().cpu()
        known = torch.zeros(formulas.fractions.shape[1], dtype=torch.bool)
        known[: len(weight)] = weight.any(1)
        for row, z in ((formulas.fractions > 0) & ~known).nonzero().tolist():
            graph = getattr(dataset.X[row], "stoichiometry", dataset.X[row])
            raise InvalidInputError(
                f"row {row} (id {dataset.ids[row]}): Roost does not know the element "
                f"{Element.from_Z(z).symbol} of {graph.formula}"
            )
        samples: Any = []
        for fractions, target in zip(formulas.fractions, targets, strict=True):
            numbers = fractions.nonzero()[:, 0]
            places = torch.arange(len(numbers))
            pairs = places.repeat_interleave(len(places)), places.repeat(len(places))
            inputs = (fractions[numbers].unsqueeze(1), numbers, *pairs)
            samples.append((inputs, [target.reshape(1)]))
        return DataLoader(samples, size, shuffle, collate_fn=collate_batch)


@contextmanager
def _spared_garbage() -> Iterator[None]:
    """Keep what exists out of the garbage collections within.

    The package's loop collects after each epoch, which takes 0.4 s for the modules alone.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
