"""``PolySRLModel``: pretraining, transfer and prediction as one DeepChem ``TorchModel``."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from deepchem.data import Dataset
from deepchem.models.optimizers import Adam, LearningRateSchedule
from deepchem.trans import Transformer, undo_transforms
from torch import Tensor, nn

from polysrl_dc.batches import LabeledData, PolymorphData, batch_rows, stoichiometries
from polysrl_dc.config import PolySRLConfig
from polysrl_dc.errors import InvalidInputError
from polysrl_dc.graphs import StoichiometryBatch
from polysrl_dc.heads import PropertyNetwork
from polysrl_dc.objectives import PretrainingNetwork
from polysrl_dc.persistence import PersistentModel

TASKS = ("regression", "classification", "pretraining")
SCHEDULES = ("one_cycle", "constant")


class PolySRLModel(PersistentModel):
    """Composition model whose representation is pretrained on polymorphic crystal structures.

    Parameters
    ----------
    task : {"regression", "classification", "pretraining"}
        What :meth:`fit` trains: a property of formulas, or the encoder itself on structures.
    n_tasks : int
        Columns of the labels.
    config : str or PolySRLConfig
        ``"default"``, ``"paper"`` or a configuration.
    pretrained : None, str or path
        Encoder to start from: None for random weights, else a folder or file written by
        :meth:`save`. Its configuration of the encoder must equal ``config``.
    freeze_encoder : bool
        Train the head only (the paper's representation protocol); the encoder is run once.
    n_ensemble : int
        Members trained side by side; predictions are their mean.
    objective : str
        Pretraining objective, see :mod:`polysrl_dc.objectives`.
    batch_size : int
    learning_rate : float or dc.models.optimizers.LearningRateSchedule
        A DeepChem schedule is stepped every batch; a float is the peak of ``schedule``.
    schedule : {"one_cycle", "constant"}
        Course of a float learning rate over one call of :meth:`fit`.
    weight_decay : float
        Decoupled (AdamW), on weight matrices only.
    seed : int
        Fixes initial weights, the order of batches and the samples of the Gaussians.
    model_dir : str, optional
        Where checkpoints go; a temporary folder by default.
    device : str or torch.device, optional
    log_frequency : int
        Steps between two entries of ``all_losses``.

    Examples
    --------
    >>> import deepchem as dc, numpy as np, polysrl_dc
    >>> graphs = dc.feat.StoichiometryGraphFeaturizer().featurize(["NaCl", "KCl", "MgO", "CaO"])
    >>> dataset = dc.data.NumpyDataset(graphs, np.array([8.5, 8.4, 7.8, 7.1]))
    >>> model = dc.models.PolySRLModel(n_ensemble=2)
    >>> loss = model.fit(dataset, nb_epoch=2)
    >>> mean, std = model.predict_uncertainty(dataset)
    >>> mean.shape, std.shape, model.predict_embedding(dataset).shape
    ((4, 1), (4, 1), (4, 200))
    """

    def __init__(
        self,
        task: str = "regression",
        n_tasks: int = 1,
        *,
        config: str | PolySRLConfig = "default",
        pretrained: str | Path | None = None,
        freeze_encoder: bool = False,
        n_ensemble: int = 1,
        objective: str = "polysrl",
        batch_size: int = 128,
        learning_rate: float | LearningRateSchedule = 1e-3,
        schedule: str = "one_cycle",
        weight_decay: float = 0.0,
        seed: int = 0,
        model_dir: str | None = None,
        device: str | torch.device | None = None,
        log_frequency: int = 100,
    ) -> None:
        if task not in TASKS:
            raise ValueError(f"task is {task!r}: must be one of {TASKS}")
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule is {schedule!r}: must be one of {SCHEDULES}")
        for name, value in (("n_tasks", n_tasks), ("n_ensemble", n_ensemble)):
            if value < 1:
                raise ValueError(f"{name} is {value}: must be at least 1")
        if batch_size < 2:
            raise ValueError(f"batch_size is {batch_size}: must be at least 2")
        self.config = PolySRLConfig.named(config) if isinstance(config, str) else config
        self.settings: dict[str, Any] = {
            "task": task,
            "n_tasks": n_tasks,
            "freeze_encoder": freeze_encoder,
            "n_ensemble": n_ensemble,
            "objective": objective,
        }
        self.schedule, self.weight_decay, self.seed = schedule, weight_decay, seed
        self.training = {
            "batch_size": batch_size,
            "schedule": schedule,
            "weight_decay": weight_decay,
            "seed": seed,
        }
        network: nn.Module
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if task == "pretraining":
                network = PretrainingNetwork(self.config, objective)
            else:
                network = PropertyNetwork(
                    self.config, n_tasks, task == "classification", n_ensemble, freeze_encoder
                )
        super().__init__(
            network,
            loss=network.loss,
            batch_size=batch_size,
            learning_rate=learning_rate,
            optimizer=Adam(learning_rate=learning_rate),
            model_dir=model_dir,
            device=torch.device(device) if device is not None else None,
            log_frequency=log_frequency,
        )
        self._epoch = 0
        if pretrained is not None:
            self.load_encoder(pretrained)

    # ---------------------------------------------------------------- training

    def _ensure_built(self) -> None:
        if self._built:
            return
        self._built = True
        self._global_step = 0
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        rate = self.optimizer.learning_rate
        scheduled = isinstance(rate, LearningRateSchedule)
        self._pytorch_optimizer = torch.optim.AdamW(
            [
                {
                    "params": [p for p in parameters if p.ndim > 1],
                    "weight_decay": self.weight_decay,
                },
                {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
            ],
            lr=rate.initial_rate if scheduled else rate,
            fused=True,
        )
        self._initial_rates = [group["lr"] for group in self._pytorch_optimizer.param_groups]
        self._lr_schedule = (
            rate._create_pytorch_schedule(self._pytorch_optimizer) if scheduled else None
        )

    def fit(
        self,
        dataset: Dataset,
        nb_epoch: int = 10,
        max_checkpoints_to_keep: int = 5,
        checkpoint_interval: int = 1000,
        deterministic: bool = False,
        restore: bool = False,
        variables: None = None,
        loss: None = None,
        callbacks: Callable | Sequence[Callable] = (),
        all_losses: list[float] | None = None,
    ) -> float:
        """Train; the parameters are those of ``TorchModel.fit``.

        Labels are normalized inside the model by the statistics of the first dataset it is
        fitted to. Labels of weight 0 are missing ones.

        Parameters
        ----------
        dataset : dc.data.Dataset
            X holds stoichiometry graphs (or structure graphs, whose formula is used); structure
            graphs for ``task="pretraining"``.
        nb_epoch : int
        max_checkpoints_to_keep, checkpoint_interval : int
            A checkpoint is written every so many steps and at the end; interval 0 writes none.
        deterministic : bool
            Keep the order of the dataset.
        restore : bool
            Start from the latest checkpoint in ``model_dir``.
        variables, loss : None
            Not supported: ``freeze_encoder`` chooses what is trained, ``task`` the loss.
        callbacks : callable or list of them
            Called as ``f(model, step)`` after each step, e.g. ``dc.models.ValidationCallback``.
        all_losses : list, optional
            Receives the mean loss every ``log_frequency`` steps.

        Returns
        -------
        float
            Mean loss of the last logging interval.

        Raises
        ------
        InvalidInputError
            A row that is no graph, a label that is NaN or infinite, naming row and id.
        """
        if variables is not None or loss is not None:
            raise ValueError("variables and loss must be None: see freeze_encoder and task")
        self._ensure_built()
        if restore:
            self.restore()
        data = self._training_data(dataset)
        steps = nb_epoch * len(list(batch_rows(len(data), self.batch_size)))
        schedule = self._lr_schedule
        if schedule is None and self.schedule == "one_cycle" and steps > 1:
            schedule = torch.optim.lr_scheduler.OneCycleLR(
                self._pytorch_optimizer,
                [group["lr"] for group in self._pytorch_optimizer.param_groups],
                total_steps=steps,
                pct_start=0.1,
                cycle_momentum=False,
            )
        callbacks = list(callbacks) if isinstance(callbacks, Sequence) else [callbacks]
        network, optimizer = self.model, self._pytorch_optimizer
        generator = torch.Generator()
        losses: list[Tensor] = []
        average = 0.0
        network.train()
        for rows in self._epochs(nb_epoch, len(data), deterministic):
            generator.manual_seed(self.seed * 1_000_003 + self._global_step)
            batch_loss = data.loss(network, rows, generator)
            optimizer.zero_grad(set_to_none=True)
            batch_loss.backward()
            for parameters in network.member_parameters():
                nn.utils.clip_grad_norm_(parameters, self.config.grad_clip)
            optimizer.step()
            if schedule is not None:
                schedule.step()
            self._global_step += 1
            losses.append(batch_loss.detach())
            if self._global_step % self.log_frequency == 0:
                average = self._log(losses, all_losses)
            if checkpoint_interval and self._global_step % checkpoint_interval == 0:
                self.save_checkpoint(max_checkpoints_to_keep)
            for callback in callbacks:
                callback(self, self._global_step)
        if losses:
            average = self._log(losses, all_losses)
        if checkpoint_interval:
            self.save_checkpoint(max_checkpoints_to_keep)
        for group, rate in zip(optimizer.param_groups, self._initial_rates, strict=True):
            group["lr"] = rate if self._lr_schedule is None else group["lr"]
        return average

    def fit_generator(self, *args: Any, **kwargs: Any) -> float:
        """Refused: batches of graphs are made by :meth:`fit` from a dataset."""
        raise NotImplementedError("PolySRLModel trains on datasets: use fit(dataset)")

    def _training_data(self, dataset: Dataset) -> LabeledData | PolymorphData:
        """All graphs as tensors, labels checked; the first call sets the label statistics."""
        if self.settings["task"] == "pretraining":
            return PolymorphData.from_dataset(dataset)
        network = self.model
        data = LabeledData.from_dataset(dataset, self.settings["n_tasks"], network.classification)
        if not network.fitted:
            if not network.classification:
                mean, std = data.label_statistics()
                network.label_mean.copy_(mean)
                network.label_std.copy_(std)
            network.fitted.fill_(True)
        data = data.to(self.device)
        if network.frozen:
            network.eval()
            with torch.no_grad():
                data = data.with_embeddings(network.embed(data.inputs))
        return data

    def _epochs(self, nb_epoch: int, n: int, deterministic: bool) -> Iterator[np.ndarray]:
        for _ in range(nb_epoch):
            shuffle = np.random.default_rng([self.seed, self._epoch])
            yield from batch_rows(
                n, self.batch_size, None if deterministic else shuffle.permutation(n)
            )
            self._epoch += 1

    def _log(self, losses: list[Tensor], all_losses: list[float] | None) -> float:
        average = float(torch.stack(losses).mean())
        losses.clear()
        if not np.isfinite(average):
            raise FloatingPointError(f"the loss is {average} at step {self._global_step}")
        if all_losses is not None:
            all_losses.append(average)
        return average

    # -------------------------------------------------------------- prediction

    def _map(self, dataset: Dataset, function: Callable[[StoichiometryBatch], Any]) -> list[Any]:
        """Apply to batches of formulas in evaluation mode; the mode is restored afterwards."""
        self._ensure_built()
        training = self.model.training
        self.model.eval()
        results, row = [], 0
        try:
            with torch.no_grad():
                for X, _, _, ids in dataset.iterbatches(4096, deterministic=True):
                    results.append(function(stoichiometries(X, ids, row).to(self.device)))
                    row += len(X)
        finally:
            self.model.train(training)
        if not results:
            raise InvalidInputError("the dataset has no row")
        return results

    def _mean_and_variance(self, dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
        if self.settings["task"] == "pretraining":
            raise ValueError("a pretraining model has no labels to predict")
        if not self.model.fitted:
            raise ValueError("the model is not fitted; call fit or restore first")
        means, variances = zip(*self._map(dataset, self.model), strict=True)
        return torch.cat(means).cpu().numpy(), torch.cat(variances).cpu().numpy()

    def predict(
        self,
        dataset: Dataset,
        transformers: Sequence[Transformer] = (),
        output_types: None = None,
    ) -> np.ndarray:
        """Predict labels.

        Parameters
        ----------
        dataset : dc.data.Dataset
        transformers : list of dc.trans.Transformer
            Undone on the predictions.
        output_types : None
            Not supported; see :meth:`predict_embedding`.

        Returns
        -------
        numpy.ndarray, shape (n, n_tasks)
            In label units; for classification the probability of class 1.
        """
        if output_types is not None:
            raise ValueError("output_types must be None; see predict_embedding")
        return undo_transforms(self._mean_and_variance(dataset)[0], list(transformers))

    def predict_uncertainty(self, dataset: Dataset, masks: None = None) -> Any:
        """Predict labels and the standard deviation of each.

        The variance is that between the members of the ensemble plus, with a heteroscedastic
        head, the mean variance of their Laplace distributions. It is not calibrated: compare it
        with the errors on validation data. For classification it is p (1 - p).

        Parameters
        ----------
        dataset : dc.data.Dataset
        masks : None
            DeepChem's dropout masks; there is no dropout here.

        Returns
        -------
        mean, std : numpy.ndarray, each of shape (n, n_tasks)
            In label units.
        """
        if masks is not None:
            raise ValueError("masks must be None: the uncertainty does not come from dropout")
        if not (self.model.heteroscedastic or self.model.classification) and (
            self.settings["n_ensemble"] < 2
        ):
            raise ValueError("needs a heteroscedastic configuration or n_ensemble > 1")
        mean, variance = self._mean_and_variance(dataset)
        return mean, np.sqrt(variance)

    def predict_embedding(self, dataset: Dataset) -> np.ndarray:
        """Representation of each formula, z_mu of eq. 11, shape (n, F), of unit length.

        Members of an ensemble that were trained apart are averaged and scaled to unit length.
        """
        means = self._map(dataset, lambda batch: self._gaussian(batch)[0])
        return torch.cat(means).cpu().numpy()

    def predict_polymorphism(self, dataset: Dataset) -> np.ndarray:
        """Uncertainty due to polymorphism, shape (n,): geometric mean of the variances, eq. 12."""
        variances = self._map(
            dataset, lambda batch: torch.exp(2 * self._gaussian(batch)[1].mean(-1))
        )
        return torch.cat(variances).cpu().numpy()

    def _gaussian(self, batch: StoichiometryBatch) -> tuple[Tensor, Tensor]:
        pairs = [encoder(batch) for encoder in self.model.encoders]
        means, log_sigmas = (torch.stack(part).mean(0) for part in zip(*pairs, strict=True))
        return nn.functional.normalize(means, dim=-1), log_sigmas
