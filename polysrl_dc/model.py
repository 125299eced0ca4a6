"""``PolySRLModel``: pretraining, transfer and prediction as one DeepChem ``TorchModel``."""

from collections.abc import Sequence
from inspect import signature
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from deepchem.models.optimizers import Adam, LearningRateSchedule

from polysrl_dc.checkpoints import (
    DEFAULT_ENCODER,
    CheckpointError,
    checkpoint_path,
    content_of,
    load_checkpoint,
    load_into,
)
from polysrl_dc.config import PolySRLConfig
from polysrl_dc.heads import PropertyNetwork
from polysrl_dc.objectives import OBJECTIVES, PretrainingNetwork
from polysrl_dc.persistence import TRAINING_FIELDS, variance_trained_of
from polysrl_dc.training import TrainableModel

TASKS = ("regression", "classification", "pretraining")
SCHEDULES = ("one_cycle", "constant")
#: What the configurations of two models must have alike for one to take the encoder of the other.
ENCODER_FIELDS = (
    "n_features",
    "element_source",
    "stoichiometry_layers",
    "message_power",
    "attention_power",
    "set2set_steps",
    "feature_norm",
    "whitening",
    "log_sigma_shift",
)
_SEEDING = Lock()  # of the generator that all threads share


class PolySRLModel(TrainableModel):
    """Composition model whose representation is pretrained on polymorphic crystal structures.

    Parameters
    ----------
    task : {"regression", "classification", "pretraining"}
        What :meth:`fit` trains: a property of formulas, or the encoder itself on structures, for
        which ``n_tasks``, ``n_ensemble`` and ``freeze_encoder`` must be left alone.
    n_tasks : int
        Columns of the labels.
    config : str or PolySRLConfig
        ``"default"``, ``"paper"`` or a configuration.
    pretrained : str, path, None or list of them
        Encoder to start from: the name of a shipped one, a folder or file written by
        :meth:`save`, or None for random weights. Its configuration of the encoder must equal
        ``config``. ``"default"`` is the shipped encoder ``"polysrl-mp"``; pretraining itself
        starts from random weights. Of a list, member ``i`` of the ensemble starts from entry ``i``.
    freeze_encoder : bool
        Train the head only (the paper's representation protocol); the encoder is run once.
    n_ensemble : int, optional
        Members trained side by side; predictions are their mean. Default: one for each encoder in
        ``pretrained``, of which it must be a multiple.
    objective : str
        Pretraining objective, see :mod:`polysrl_dc.objectives`.
    polymorphs_per_batch : int
        Pretraining: polymorphs of a formula that are kept together in a batch, at most.
    max_edges : int, optional
        Pretraining: edges of a batch at most, which bounds memory.
    compile : bool
        Pretraining: fuse the structure encoder with ``torch.compile`` (needs a C++ compiler).
    autocast : bool
        Compute in bfloat16 up to the pooled sums of both encoders, and in the heads; pooling,
        normalization and losses stay in float32.
    batch_size : int, optional
        Default: 32, as steps count for more than rows on small data; 256 for
        pretraining, where the rest of a batch are the negatives.
    learning_rate : float or dc.models.optimizers.LearningRateSchedule
        A DeepChem schedule is stepped every batch; a float is the peak of ``schedule``.
    schedule : {"one_cycle", "constant"}
        Course of a float learning rate over one call of :meth:`fit`.
    weight_decay : float
        Decoupled (AdamW), on weight matrices only.
    seed : int
        Fixes initial weights, the order of batches and the samples of the Gaussians; less than
        2**43.
    model_dir : str, optional
        Where checkpoints go; a temporary folder by default.
    device : str or torch.device, optional
    log_frequency : int
        Steps between two entries of ``all_losses``.

    Raises
    ------
    FileNotFoundError, CheckpointError
        There is no encoder by the name or path ``pretrained``; it is damaged, of another
        configuration or one of several in its file.
    ValueError
        An argument is out of range, or goes with another ``task``.

    Examples
    --------
    >>> import deepchem as dc, numpy as np, polysrl_dc
    >>> graphs = dc.feat.StoichiometryGraphFeaturizer().featurize(["NaCl", "KCl", "MgO", "CaO"])
    >>> dataset = dc.data.NumpyDataset(graphs, np.array([8.5, 8.4, 7.8, 7.1]))
    >>> model = dc.models.PolySRLModel(n_ensemble=2)
    >>> loss = model.fit(dataset, nb_epoch=2)
    >>> mean, std = model.predict_uncertainty(dataset)
    >>> mean.shape, std.shape, model.predict_embedding(dataset).shape
    ((4, 1), (4, 1), (4, 400))
    """

    def __init__(
        self,
        task: str = "regression",
        n_tasks: int = 1,
        *,
        config: str | PolySRLConfig = "default",
        pretrained: str | Path | Sequence[str | Path | None] | None = "default",
        freeze_encoder: bool = False,
        n_ensemble: int | None = None,
        objective: str = "polysrl",
        polymorphs_per_batch: int = 1,
        max_edges: int | None = None,
        compile: bool = False,
        autocast: bool = False,
        batch_size: int | None = None,
        learning_rate: float | LearningRateSchedule = 1e-3,
        schedule: str = "one_cycle",
        weight_decay: float = 0.0,
        seed: int = 0,
        model_dir: str | None = None,
        device: str | torch.device | None = None,
        log_frequency: int = 100,
    ) -> None:
        if batch_size is None:
            batch_size = 256 if task == "pretraining" else 32
        n_tasks, n_ensemble, batch_size = map(_plain, (n_tasks, n_ensemble, batch_size))
        freeze_encoder, seed, learning_rate = map(_plain, (freeze_encoder, seed, learning_rate))
        given = locals()
        self._given = {name: _plain(given[name]) for name in signature(PolySRLModel).parameters}
        if pretrained is None or isinstance(pretrained, str | Path):
            pretrained = [pretrained]
        starts = list(pretrained)
        n_ensemble = n_ensemble if n_ensemble is not None else len(starts)
        if task not in TASKS:
            raise ValueError(f"task is {task!r}: must be one of {TASKS}")
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule is {schedule!r}: must be one of {SCHEDULES}")
        if objective not in OBJECTIVES:
            raise ValueError(f"objective is {objective!r}: must be one of {OBJECTIVES}")
        positive = {"n_tasks": n_tasks, "n_ensemble": n_ensemble}
        positive |= {"polymorphs_per_batch": polymorphs_per_batch, "max_edges": max_edges}
        positive["log_frequency"] = log_frequency
        for name, value in positive.items():
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}: must be at least 1")
        if not starts or n_ensemble % len(starts):
            raise ValueError(f"n_ensemble is {n_ensemble}: no multiple of {len(starts)} encoders")
        if task == "pretraining" and len(starts) > 1:
            raise ValueError(f"pretrained has {len(starts)} encoders: pretraining has one")
        if task == "pretraining":
            for name, value in (("n_tasks", n_tasks), ("n_ensemble", n_ensemble)):
                if value > 1:
                    raise ValueError(f"{name} is {value}: must be 1 for pretraining")
            if freeze_encoder:
                raise ValueError(f"freeze_encoder is {freeze_encoder}: pretraining trains it")
        if batch_size < 2:
            raise ValueError(f"batch_size is {batch_size}: must be at least 2")
        if not 0 <= seed < 2**43:  # times a million, it seeds a generator of 64 bits
            raise ValueError(f"seed is {seed}: must be at least 0 and less than 2**43")
        if not 0 <= weight_decay < float("inf"):
            raise ValueError(f"weight_decay is {weight_decay}: must be finite and at least 0")
        if not isinstance(learning_rate, LearningRateSchedule) and not (
            isinstance(learning_rate, int | float) and 0 <= learning_rate < float("inf")
        ):
            known = "must be a finite number, at least 0, or a schedule of DeepChem"
            raise ValueError(f"learning_rate is {learning_rate!r}: {known}")
        self.config = PolySRLConfig.named(config) if isinstance(config, str) else config
        self.settings: dict[str, Any] = {
            "task": task,
            "n_tasks": n_tasks,
            "freeze_encoder": freeze_encoder,
            "n_ensemble": n_ensemble,
            "n_encoders": len(starts) if freeze_encoder else n_ensemble,
            "objective": objective,
        }
        self.schedule = schedule
        self.training = {
            name: self._given[name]
            for name in TRAINING_FIELDS
            if not isinstance(self._given[name], LearningRateSchedule)
        }
        with _SEEDING, torch.random.fork_rng(devices=[]), torch.device("cpu"):
            # that of the CPU alone: those of GPUs are the user's, and torch.manual_seed seeds them
            torch.default_generator.manual_seed(seed)
            network = self._network(self.config, **self.settings)
        if compile and task == "pretraining":
            network.structure_encoder.compile(dynamic=True)
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
        self.model.eval()
        self._epoch = 0
        self._run: dict[str, Any] | None = None
        self.provenance = {}
        self.calibration = None
        self.variance_trained = [False] * self.settings["n_encoders"]
        default = None if task == "pretraining" else DEFAULT_ENCODER
        starts = [default if start == "default" else start for start in starts]
        for i, start in enumerate(starts):
            if start is not None:
                self._load_encoder(start, slice(i, None, len(starts)))

    @staticmethod
    def _network(
        config: PolySRLConfig,
        task: str,
        n_tasks: int,
        freeze_encoder: bool,
        n_ensemble: int,
        n_encoders: int,
        objective: str,
    ) -> Any:
        """The network that configuration and settings describe."""
        if task == "pretraining":
            return PretrainingNetwork(config, objective).float()
        members, classes = (n_ensemble, n_encoders, freeze_encoder), task == "classification"
        return PropertyNetwork(config, n_tasks, classes, *members).float()  # whatever the default

    def load_encoder(self, path: str | Path) -> None:
        """Start every encoder of this model from that of another one.

        Calibration and formulas learned from are forgotten; heads stay as they are.

        Parameters
        ----------
        path : str or path
            Folder or file of a model that has one encoder, or the name of a shipped one.

        Raises
        ------
        FileNotFoundError, CheckpointError
            There is no such model; its file is damaged, its encoder is of another configuration, or
            it has several.
        """
        self._load_encoder(path, slice(None))
        self._forget_weights()

    def _load_encoder(self, path: str | Path, chosen: slice) -> None:
        file = checkpoint_path(path)
        tensors, manifest = load_checkpoint(file)
        prefix = "encoders.0."
        encoder = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        encoders = self.model.encoders[chosen]
        found = {name.split(".")[1] for name in tensors if name.startswith("encoders.")}
        if len(found) > 1:
            raise CheckpointError(
                f"{file} has {len(found)} encoders: each member starts from a file that has one"
            )
        with content_of(file):
            for field in ENCODER_FIELDS:
                theirs, ours = manifest["config"].get(field), getattr(self.config, field)
                if theirs != ours:
                    raise CheckpointError(
                        f"{field} is {theirs}, this configuration has {ours}; "
                        "pretrained=None starts from random weights"
                    )
            trained = variance_trained_of(manifest, 1) * len(encoders)
            for module in encoders:
                load_into(module, encoder)
        self.variance_trained[chosen] = trained

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Arguments of the constructor, for ``sklearn.base.clone``: an unfitted model like this.

        A model that was read from a file has ``pretrained=None``, so its clone starts from random
        weights.

        Parameters
        ----------
        deep : bool
            Not used: no argument is an estimator.

        Returns
        -------
        dict of str to object

        Examples
        --------
        >>> from sklearn.base import clone
        >>> model = PolySRLModel(n_ensemble=2, pretrained=None)
        >>> clone(model).get_params()["n_ensemble"]
        2
        """
        return dict(self._given)


def _plain(value: Any) -> Any:
    """A scalar of NumPy as one of Python, which a manifest can hold; else the value itself."""
    return value.item() if isinstance(value, np.generic) else value
