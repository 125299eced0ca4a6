"""The training loop, one for every task; it resumes exactly.

Everything random is a function of the seed and of the position in training: the order of the rows
of the seed and the epoch, the samples of a batch of the seed and the step. So weights, optimizer
and position are all that a checkpoint holds.
"""

import logging
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from deepchem.data import Dataset
from deepchem.models.optimizers import LearningRateSchedule
from torch import Tensor, nn

from polysrl_dc.batches import LabeledData, PolymorphData
from polysrl_dc.callbacks import StopTraining
from polysrl_dc.checkpoints import deepchem_schedule, described_rate, load_schedule
from polysrl_dc.distributed import process_count
from polysrl_dc.errors import InvalidInputError
from polysrl_dc.featurizers import check_lengths
from polysrl_dc.layers import restored_if_it_fails, running_statistics
from polysrl_dc.persistence import trains_variance
from polysrl_dc.prediction import CHUNK
from polysrl_dc.retrieval import RetrievingModel

logger = logging.getLogger(__name__)

_FAR = 10  # standard deviations, or times as large or small


class TrainableModel(RetrievingModel):
    """What a :class:`~polysrl_dc.model.PolySRLModel` learns with."""

    schedule: str

    @property
    def epochs_trained(self) -> int:
        """Epochs that calls of :meth:`fit` have completed, also before the model was read."""
        return self._epoch

    @property
    def interrupted(self) -> bool:
        """Whether a call of :meth:`fit` has begun, here or in the checkpoint, and not ended."""
        return self._run is not None

    def get_global_step(self) -> int:
        """Steps of training so far, also before the model was read."""
        self._ensure_built()
        return super().get_global_step()

    def _ensure_built(self) -> None:
        if getattr(self, "_built", False):
            return
        self._built = True
        self._global_step = self._steps_before
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        rate = self.optimizer.learning_rate
        scheduled = isinstance(rate, LearningRateSchedule)
        decay = self.training["weight_decay"]
        self._pytorch_optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in parameters if p.ndim > 1], "weight_decay": decay},
                {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
            ],
            lr=rate.initial_rate if scheduled else rate,
            fused=True,
        )
        self._initial_rates = [group["lr"] for group in self._pytorch_optimizer.param_groups]
        self._lr_schedule = deepchem_schedule(rate, self._pytorch_optimizer) if scheduled else None

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
        callbacks: Callable | Sequence[Callable] | None = (),
        all_losses: list[float] | None = None,
    ) -> float:
        """Train; the parameters are those of ``TorchModel.fit``.

        Labels are normalized inside the model by the statistics of the first dataset it learns
        from; later ones in other units are warned of. Labels of weight 0 are missing ones, and a
        row without any other is left out. What :meth:`calibrate` has found is forgotten. With
        ``torch.distributed`` initialized, pretraining shares every batch between the processes.

        Parameters
        ----------
        dataset : dc.data.Dataset
            X holds stoichiometry graphs (or structure graphs, whose formula is used); structure
            graphs for ``task="pretraining"``.
        nb_epoch : int
            0 trains nothing.
        max_checkpoints_to_keep, checkpoint_interval : int
            A checkpoint is written every so many steps and at the end; interval 0 writes none.
        deterministic : bool
            Keep the order of the dataset.
        restore : bool
            Start from the latest checkpoint in ``model_dir``. If it lies within a call of ``fit``
            that was interrupted, that call is continued: with the same arguments, its losses are
            those of a call that was not interrupted. Else ``nb_epoch`` more epochs follow.
        variables, loss : None
            Not supported: ``freeze_encoder`` chooses what is trained, ``task`` the loss.
        callbacks : callable or list of them
            Called as ``f(model, step)`` after each step, e.g. ``dc.models.ValidationCallback``.
            Methods they may have: ``begin(model)``, ``end_step(model, loss, n_rows)``,
            ``end_epoch(model)`` and ``finish(model)``; see :mod:`polysrl_dc.callbacks`.
        all_losses : list, optional
            Receives the mean loss every ``log_frequency`` steps.

        Returns
        -------
        float
            Mean loss of the last logging interval; NaN if there was no step to do.

        Raises
        ------
        InvalidInputError
            A row that is no graph, a label that is NaN or infinite, naming row and id; structures
            that were built with other limits than the configuration has; ``max_edges`` is exceeded
            by one structure or leaves all of an epoch alone; or ``restore`` finds a ``fit`` that
            was interrupted, with another number of epochs, other data, another order of batches,
            learning rate, schedule, weight decay or ``autocast``.
        FloatingPointError
            A loss or gradient is not finite; weights, running statistics and checkpoints stay as
            before that step.
        ValueError, TypeError
            ``nb_epoch`` is negative, ``variables`` or ``loss`` is given, there is no checkpoint to
            ``restore``, or several processes share labels; ``dataset`` is none.
        """
        if variables is not None or loss is not None:
            raise ValueError("variables and loss must be None: see freeze_encoder and task")
        check_lengths(dataset)
        nb_epoch, deterministic = operator.index(nb_epoch), bool(deterministic)
        if nb_epoch < 0:
            raise ValueError(f"nb_epoch is {nb_epoch}: must not be negative")
        self._ensure_built()
        if restore:
            self.restore()
        if nb_epoch == 0:
            return math.nan
        if self._lost_schedule:
            rate = self.optimizer.learning_rate
            logger.warning("the learning rate is %g: no file keeps the schedule it had", rate)
        if self.calibration:
            logger.warning("its std is no longer calibrated when it has learned more")
        callbacks = [callbacks] if callable(callbacks) else list(callbacks or ())
        keeping = max_checkpoints_to_keep, checkpoint_interval
        labelled = self.settings["task"] != "pretraining"
        unfitted, step = labelled and not self.model.fitted, self._global_step
        provenance = dict(self.provenance)
        try:
            data = self._training_data(dataset)
            run = self._begin(data, nb_epoch, deterministic, restore)
            return self._train(data, run, deterministic, callbacks, all_losses, *keeping)
        finally:
            self.model.eval()  # so that no prediction has to switch it while others run
            if unfitted and self._global_step == step:
                self.model.fitted.fill_(False)
                self.provenance = provenance

    def _train(
        self,
        data: LabeledData | PolymorphData,
        run: dict[str, Any],
        deterministic: bool,
        callbacks: list[Callable],
        all_losses: list[float] | None,
        max_checkpoints_to_keep: int,
        checkpoint_interval: int,
    ) -> float:
        """The steps of a call of ``fit``; the mean loss of its last logging interval."""
        schedule = self._schedule_of(run)
        network, optimizer = self.model, self._pytorch_optimizer
        shared = self._shared(network)
        generator = torch.Generator(self.device)
        losses: list[Tensor] = []
        average = math.nan
        running = running_statistics(network.train())
        _call(callbacks, "begin", self)
        try:
            for rows, last in self._batches(data, run, deterministic):
                generator.manual_seed(self.training["seed"] * 1_000_003 + self._global_step)
                optimizer.zero_grad(set_to_none=True)
                with restored_if_it_fails(running):
                    batch_loss = self._backward(data, shared, rows, generator)
                optimizer.step()
                self._forget_weights()
                if trains_variance(self.settings):
                    self.variance_trained = [True]
                if schedule is not None:
                    schedule.step()
                self._global_step += 1
                losses.append(batch_loss)
                _call(callbacks, "end_step", self, batch_loss, rows.size)
                if self._global_step % self.log_frequency == 0:
                    average = self._log(losses, all_losses)
                if last:
                    self._epoch += 1
                    _call(callbacks, "end_epoch", self)
                if checkpoint_interval and self._global_step % checkpoint_interval == 0:
                    self.save_checkpoint(max_checkpoints_to_keep)
                for callback in callbacks:
                    callback(self, self._global_step)
        except StopTraining:
            pass
        if losses:
            average = self._log(losses, all_losses)
        _call(callbacks, "finish", self)
        self._run = self._run_schedule = None
        if checkpoint_interval:
            self.save_checkpoint(max_checkpoints_to_keep)
        return average

    def _backward(
        self,
        data: LabeledData | PolymorphData,
        network: nn.Module,
        rows: np.ndarray,
        generator: torch.Generator,
    ) -> Tensor:
        """Loss of a batch; its gradients, clipped, stay with the parameters if all are finite."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.training["autocast"]):
            loss = data.loss(network, rows, generator)
        loss.backward()
        norms = [
            nn.utils.clip_grad_norm_(parameters, self.config.grad_clip)
            for parameters in self.model.member_parameters()
        ]
        values = torch.stack([loss.detach(), *norms])
        if not torch.isfinite(values).all():
            raise FloatingPointError(
                f"loss {float(values[0])}, gradient norm {float(values[1:].max())} at step "
                f"{self._global_step + 1}; weights and checkpoints are those before it"
            )
        return loss.detach()

    def _tensors(self, dataset: Dataset) -> LabeledData | PolymorphData:
        """Graphs to learn from as tensors; all are checked, with their labels."""
        if self.settings["task"] == "pretraining":
            return PolymorphData.from_dataset(
                dataset,
                self.config,
                polymorphs_per_batch=self.training["polymorphs_per_batch"],
                max_edges=self.training["max_edges"],
            )
        n_tasks, classification = self.settings["n_tasks"], self.model.classification
        return LabeledData.from_dataset(dataset, n_tasks, classification).labeled()

    def _training_data(self, dataset: Dataset) -> LabeledData | PolymorphData:
        """The tensors to learn from; the first call sets label statistics and task names."""
        data, network = self._tensors(dataset), self.model
        if isinstance(data, PolymorphData):
            return data
        if not network.fitted:
            mean, std = data.label_statistics()
            if not network.classification:
                network.label_mean.copy_(mean)
                network.label_std.copy_(torch.where(std > 0, std, 1.0))
            network.fitted.fill_(True)
            names = [str(name) for name in dataset.get_task_names() if isinstance(name, str)]
            if len(set(names)) == self.settings["n_tasks"]:  # else they are numbers
                self.provenance.setdefault("targets", names)
        elif not network.classification:
            self._compare_labels(*data.label_statistics())
        data = data.to(self.device)
        if network.frozen:
            network.eval()
            with torch.no_grad():
                parts = torch.arange(len(data), device=self.device).split(CHUNK)
                found = [network.embed(data.inputs[part]) for part in parts]
            data = data.with_embeddings(torch.cat(found, dim=1))
        return data

    def _compare_labels(self, mean: Tensor, std: Tensor) -> None:
        """Warn of labels in other units, or of something else, than those learned from first."""
        first, spread = self.model.label_mean.cpu(), self.model.label_std.cpu()
        far = (mean - first).abs() > _FAR * spread
        far |= ((std / spread).log().abs() > math.log(_FAR)) & (std > 0)  # not of one row
        for task in torch.nonzero(far).ravel().tolist():
            logger.warning(
                "labels of task %d have mean %.4g and std %.4g, those it learned from first %.4g "
                "and %.4g, by which they are normalized: a new model learns them better",
                *(task, mean[task], std[task], first[task], spread[task]),
            )

    def _begin(
        self, data: LabeledData | PolymorphData, nb_epoch: int, deterministic: bool, restore: bool
    ) -> dict[str, Any]:
        """The plan of this call of ``fit``, or of the interrupted one that it continues."""
        order = ("batch_size", "seed", "polymorphs_per_batch", "max_edges")
        plan = {
            "epochs": nb_epoch,
            "deterministic": deterministic,
            "data": data.fingerprint(),
            **{name: self.training[name] for name in (*order, "weight_decay", "autocast")},
            "learning_rate": described_rate(self.optimizer.learning_rate),
            "schedule": None if self._lr_schedule else self.schedule,
        }
        if restore and (run := self._run) is not None:
            other = [name for name, value in plan.items() if run.get(name, math.nan) != value]
            if other:
                raise InvalidInputError(
                    f"the checkpoint lies within a call of fit with another {other[0]}: "
                    f"{run.get(other[0])}, not {plan[other[0]]}"
                )
            return run
        epochs = range(self._epoch, self._epoch + nb_epoch)
        counted = epochs[:1] if data.equal_epochs else epochs
        sizes = [
            [rows.shape[1] for rows in self._epoch_rows(data, epoch, deterministic)]
            for epoch in counted
        ]
        steps, left_out = sum(map(len, sizes)), len(data) - min(map(sum, sizes))
        if not data.equal_epochs and left_out:
            text = "max_edges is %d: up to %d of %d structures of an epoch are alone and left out"
            told = self.training["max_edges"], left_out, len(data)
            if not all(sizes):
                raise InvalidInputError(text % told)
            logger.warning(text, *told)
        self._run = {
            **plan,
            "first_step": self._global_step,
            "first_epoch": self._epoch,
            "steps": steps * nb_epoch if data.equal_epochs else steps,
        }
        return self._run

    def _epoch_rows(
        self, data: LabeledData | PolymorphData, epoch: int, deterministic: bool
    ) -> Iterator[np.ndarray]:
        random = None if deterministic else np.random.default_rng([self.training["seed"], epoch])
        members = 1 if self.settings["task"] == "pretraining" else self.settings["n_ensemble"]
        return data.epoch(self.batch_size, members, random)

    def _batches(
        self, data: LabeledData | PolymorphData, run: dict[str, Any], deterministic: bool
    ) -> Iterator[tuple[np.ndarray, bool]]:
        """Rows of each batch that is left to do, and whether it is the last of its epoch."""
        step = run["first_step"]
        for epoch in range(run["first_epoch"], run["first_epoch"] + run["epochs"]):
            batches = list(self._epoch_rows(data, epoch, deterministic))
            for i, rows in enumerate(batches):
                if step >= self._global_step:
                    yield rows, i == len(batches) - 1
                step += 1

    def _schedule_of(self, run: dict[str, Any]) -> Any:
        """The learning rate schedule, where the run stands."""
        self._run_schedule = None
        if self._lr_schedule is not None:
            return self._lr_schedule
        groups = self._pytorch_optimizer.param_groups
        for group, rate in zip(groups, self._initial_rates, strict=True):
            group["lr"] = rate  # not that of the call before
        if self.schedule != "one_cycle" or run["steps"] < 3:
            return None
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            self._pytorch_optimizer,
            self._initial_rates,
            total_steps=run["steps"],
            pct_start=max(0.1, 2 / run["steps"]),  # the rise takes one step at least
            cycle_momentum=False,
        )
        if "schedule_state" in run:
            load_schedule(schedule, run["schedule_state"])
        self._run_schedule = schedule
        return schedule

    def _shared(self, network: nn.Module) -> nn.Module:
        """The network, for training over several processes if there are any."""
        if process_count() == 1:
            return network
        if self.settings["task"] != "pretraining":
            raise ValueError("only pretraining is shared between processes")
        unused = self.settings["objective"] != "polysrl"
        return nn.parallel.DistributedDataParallel(network, find_unused_parameters=unused)

    def _log(self, losses: list[Tensor], all_losses: list[float] | None) -> float:
        average = float(torch.stack(losses).mean())
        losses.clear()
        if all_losses is not None:
            all_losses.append(average)
        return average


def _call(callbacks: Sequence[Callable], method: str, *arguments: Any) -> None:
    """Call a method of the callbacks that have it."""
    for callback in callbacks:
        if hasattr(callback, method):
            getattr(callback, method)(*arguments)
