"""Saving, loading and checkpointing of a DeepChem model without pickle."""

import copy
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from deepchem.models import TorchModel

from polysrl_dc.checkpoints import (
    MODEL_FILE,
    CheckpointError,
    check_folder,
    check_tensors,
    checkpoint_path,
    content_of,
    flatten_optimizer,
    load_checkpoint,
    load_into,
    load_schedule,
    shipped_encoders,
    unflatten_optimizer,
)
from polysrl_dc.checkpoints import save_checkpoint as save_tensors
from polysrl_dc.config import PolySRLConfig
from polysrl_dc.distributed import process_rank
from polysrl_dc.recalibration import Calibration

#: Arguments of the constructor that a file keeps besides configuration and settings.
TRAINING_FIELDS = (
    "batch_size",
    "learning_rate",
    "schedule",
    "weight_decay",
    "seed",
    "polymorphs_per_batch",
    "max_edges",
    "autocast",
)


class PersistentModel(TorchModel):
    """A ``TorchModel`` whose files are safetensors with a manifest.

    Subclasses set ``config``, ``settings`` (constructor arguments that fix the network) and
    ``training`` (the others worth keeping). DeepChem's own methods pickle, leave out buffers and
    the position in training, and load what does not match; these do not.
    """

    config: PolySRLConfig
    settings: dict[str, Any]
    training: dict[str, Any]
    #: What the weights come from: data, epochs, revision of the code; kept in the manifest.
    provenance: dict[str, Any]
    #: Of the standard deviations, if it has been done for these weights.
    calibration: Calibration | None
    #: Of each encoder, whether its variance was trained by the objective ``polysrl`` or fitted by
    #: :func:`~polysrl_dc.polymorph_variance.fit_polymorph_variance`, here or before it was read.
    variance_trained: list[bool]
    _epoch: int
    #: Steps of the training before it was read from a file.
    _steps_before: int = 0
    _lr_schedule: torch.optim.lr_scheduler.LRScheduler | None
    #: The call of ``fit`` that is under way: its plan, and its learning rate schedule.
    _run: dict[str, Any] | None
    _run_schedule: torch.optim.lr_scheduler.LRScheduler | None = None
    #: Whether it was read from a file of a model that a DeepChem schedule had trained.
    _lost_schedule: bool = False
    #: The network of a configuration and settings.
    _network: Callable[..., Any]

    def __getstate__(self) -> dict[str, Any]:
        """On the CPU, without the embeddings of known formulas: these can be made again."""
        state = {name: value for name, value in self.__dict__.items() if name != "_domain"}
        return state if self.device.type == "cpu" else _moved(copy.deepcopy(state), "cpu")

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy; it has a temporary folder of its own, without checkpoints."""
        try:
            torch.empty(0, device=state["device"])
        except (AssertionError, RuntimeError):  # a GPU that is not here
            state = {**state, "device": torch.device("cpu")}
        self.__dict__.update(_moved(state, state["device"]))
        if self.model_dir_is_temp:
            self.model_dir = tempfile.mkdtemp()

    def __del__(self) -> None:
        """Remove the folder if it is a temporary one."""
        if getattr(self, "model_dir_is_temp", False):
            shutil.rmtree(self.model_dir, ignore_errors=True)

    def _manifest(self) -> dict[str, Any]:
        run = self._run
        if run is not None and self._run_schedule is not None:
            run = {**run, "schedule_state": self._run_schedule.state_dict()}
        return {
            "config": self.config.to_dict(),
            "settings": self.settings,
            "training": self.training,
            "provenance": self.provenance,
            "calibration": asdict(self.calibration) if self.calibration else None,
            "variance_trained": self.variance_trained,
            "step": self._global_step,
            "epoch": self._epoch,
            "schedule": self._lr_schedule.state_dict() if self._lr_schedule else None,
            "run": run,
        }

    def save(self, path: str | Path | None = None) -> None:
        """Write ``model.safetensors``.

        Parameters
        ----------
        path : str or path, optional
            Folder, made if it is missing; default: ``model_dir``.

        Raises
        ------
        OSError
            The folder or the file cannot be written.
        ValueError
            ``path`` is empty, or the name of a shipped encoder.
        """
        self._ensure_built()
        if path == "":
            raise ValueError("path is empty: it names no folder")
        given = self.model_dir if path is None else path
        check_folder(given)
        save_tensors(Path(given) / MODEL_FILE, self.model.state_dict(), self._manifest())

    @classmethod
    def from_pretrained(cls, path: str | Path, **kwargs: Any) -> "PersistentModel":
        """Read a model written by :meth:`save`, or a shipped encoder.

        A further :meth:`fit` counts its steps and epochs on, and so meets the rows in other orders
        than before; the state of the optimizer is in checkpoints only (:meth:`restore`).

        Parameters
        ----------
        path : str or path
            Folder or file of a model, or the name of a shipped encoder: ``"polysrl-mp"`` is a model
            of ``task="pretraining"`` with both encoders, the others are models of regression.
        **kwargs
            Constructor arguments that are not part of the network, e.g. ``device``. Those of
            training are by default what the model was trained with, but for a DeepChem learning
            rate schedule, which no file keeps: without it :meth:`fit` warns of its own default.

        Returns
        -------
        PolySRLModel

        Raises
        ------
        FileNotFoundError, CheckpointError
            There is no such model; its file is damaged.
        ValueError, TypeError
            An argument is fixed by the file or out of range; there is no such argument.
        """
        file = checkpoint_path(path)
        tensors, manifest = load_checkpoint(file)
        if str(path) in shipped_encoders():
            structures = file.with_name(f"{path}.structures.safetensors")
            tensors |= load_checkpoint(structures)[0] if structures.exists() else {}
        with content_of(file):
            config = PolySRLConfig.from_dict(manifest["config"])
            settings, training = _settings_of(manifest), manifest["training"]
            cls._check_size(config, settings, tensors)
            n_encoders = settings.pop("n_encoders")
            starts = [None] * n_encoders if settings["freeze_encoder"] and n_encoders > 1 else None
            foreign = sorted(training.keys() - set(TRAINING_FIELDS))
            if foreign:
                raise CheckpointError(f"unknown fields of training {foreign}")
        fixed = {"config": config, **settings}
        if fixed.keys() & kwargs.keys():
            raise ValueError(f"{sorted(fixed.keys() & kwargs.keys())} are fixed by {path}")
        with nullcontext() if kwargs else content_of(file):
            model = cls(**fixed, pretrained=starts, **{**training, **kwargs})
        with content_of(file):
            load_into(model.model, tensors)
            model.calibration = model._calibration_of(manifest)
            model.variance_trained = variance_trained_of(manifest, n_encoders)
            model._steps_before, model._epoch = _position_of(manifest)
        model.provenance = manifest.get("provenance", {})
        model._lost_schedule = "learning_rate" not in training | kwargs
        return model

    @classmethod
    def _check_size(
        cls, config: PolySRLConfig, settings: dict[str, Any], tensors: Mapping[str, torch.Tensor]
    ) -> None:
        """Refuse a network that has other tensors than its file before memory is taken for it."""
        members, layers = settings["n_ensemble"], config.stoichiometry_layers
        encoders = settings["n_encoders"]
        if settings["task"] == "pretraining":
            members, encoders, layers = 1, 1, layers + config.structure_layers
        if max(members, encoders * layers) > len(tensors):
            raise CheckpointError(f"{members} members of {layers} layers, {len(tensors)} tensors")
        with torch.device("meta"):
            network = cls._network(config, **settings)
        check_tensors(type(network).__name__, network.state_dict(), tensors)

    def reload(self) -> None:
        """Read ``model.safetensors`` of ``model_dir`` back into this model.

        Training goes on as after :meth:`from_pretrained`, with a new optimizer.

        Raises
        ------
        FileNotFoundError, CheckpointError
            There is no such file; it is damaged, or of another configuration or other settings.
        """
        path = checkpoint_path(self.model_dir)
        tensors, manifest = load_checkpoint(path)
        with content_of(path):
            self._check_same(manifest)
            calibration = self._calibration_of(manifest)
            trained = variance_trained_of(manifest, self.settings["n_encoders"])
            step, epoch = _position_of(manifest)
            load_into(self.model, tensors)
        self.calibration, self.provenance = calibration, manifest.get("provenance", {})
        self.variance_trained = trained
        self._steps_before, self._epoch = step, epoch
        self._built, self._run = False, None  # another training, with an optimizer of its own

    def _calibration_of(self, manifest: dict[str, Any]) -> Calibration | None:
        """The calibration in a manifest; files had none before."""
        values = manifest.get("calibration")
        if values is None:
            return None
        return Calibration.from_dict(values, self.settings["n_tasks"])

    def _check_same(self, manifest: dict[str, Any]) -> None:
        """Refuse the weights of a network that computes something else, whatever their shapes."""
        for own, theirs in (
            (self.config.to_dict(), manifest["config"]),
            (self.settings, _settings_of(manifest)),
        ):
            other = sorted(name for name in own.keys() | theirs.keys()
                           if own.get(name) != theirs.get(name))  # fmt: skip
            if other:
                name = other[0]
                raise CheckpointError(
                    f"{name} is {theirs.get(name)!r}, this model has {own.get(name)!r}"
                )

    def _forget_weights(self) -> None:
        """Drop what holds for the weights so far only: calibration and formulas learned from."""
        self.calibration = None
        self.provenance.pop("formulas", None)

    def save_checkpoint(
        self, max_checkpoints_to_keep: int = 5, model_dir: str | None = None
    ) -> None:
        """Write weights and optimizer state as ``checkpoint1.safetensors``; older ones move up.

        Parameters
        ----------
        max_checkpoints_to_keep : int
            Less than 1 writes nothing.
        model_dir : str, optional
            Folder, made if it is missing; default: that of the model.
        """
        if max_checkpoints_to_keep < 1 or process_rank() > 0:
            return
        self._ensure_built()
        folder = Path(model_dir or self.model_dir)
        paths = [folder / f"checkpoint{i + 1}.safetensors" for i in range(max_checkpoints_to_keep)]
        new = folder / "new_checkpoint.safetensors"
        optimizer = flatten_optimizer(self._pytorch_optimizer)
        weights = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        save_tensors(new, {**weights, **optimizer}, self._manifest())
        for older, newer in zip(reversed(paths), [*reversed(paths[:-1]), new], strict=True):
            if newer.exists():
                os.replace(newer, older)

    def get_checkpoints(self, model_dir: str | None = None) -> list[str]:
        """Checkpoint files in a folder.

        Parameters
        ----------
        model_dir : str, optional
            Default: that of the model.

        Returns
        -------
        list of str
            The latest first.
        """
        files = Path(model_dir or self.model_dir).glob("checkpoint*.safetensors")
        return [str(path) for path in sorted(files, key=lambda p: (len(p.name), p.name))]

    def restore(
        self,
        checkpoint: str | None = None,
        model_dir: str | None = None,
        strict: bool = True,
    ) -> None:
        """Read weights, optimizer, schedule and step of a checkpoint.

        Parameters
        ----------
        checkpoint : str, optional
            File; default: the latest in ``model_dir``.
        model_dir : str, optional
            Default: that of the model.
        strict : bool
            Must be True.

        Raises
        ------
        FileNotFoundError, CheckpointError
            There is no such file; it is damaged, or of another configuration or other settings.
        ValueError
            There is no checkpoint in the folder, or ``strict`` is False.
        """
        if not strict:
            raise ValueError("strict must be True: a partial restore is a silent change")
        self._ensure_built()
        if checkpoint is None:
            available = self.get_checkpoints(model_dir)
            if not available:
                raise ValueError(f"no checkpoint in {model_dir or self.model_dir}")
            checkpoint = available[0]
        tensors, manifest = load_checkpoint(checkpoint)
        weights = {
            name.removeprefix("model."): value
            for name, value in tensors.items()
            if name.startswith("model.")
        }
        optimizer = {k: v for k, v in tensors.items() if k.startswith("optimizer.")}
        with content_of(checkpoint):
            self._check_same(manifest)
            calibration = self._calibration_of(manifest)
            trained = variance_trained_of(manifest, self.settings["n_encoders"])
            if len(tensors) != len(weights) + len(optimizer):
                raise CheckpointError("it holds more than a model and its optimizer")
            (step, epoch), run = _position_of(manifest), manifest["run"]
            check_tensors(type(self.model).__name__, self.model.state_dict(), weights)
            unflatten_optimizer(self._pytorch_optimizer, optimizer)
            load_into(self.model, weights)
            self._global_step, self._epoch, self._run = step, epoch, run
            if self._lr_schedule and manifest["schedule"]:
                load_schedule(self._lr_schedule, manifest["schedule"])
        self.calibration, self.provenance = calibration, manifest.get("provenance", {})
        self.variance_trained = trained


def _moved(state: dict[str, Any], device: str | torch.device) -> dict[str, Any]:
    """Attributes of a model after its network, and the state of the optimizer, have been moved."""
    state["model"].to(device)
    if optimizer := state.get("_pytorch_optimizer"):
        optimizer.load_state_dict(optimizer.state_dict())  # to where the parameters are now
    return state


def _settings_of(manifest: dict[str, Any]) -> dict[str, Any]:
    """The settings in a manifest; files did not say how many encoders there are before."""
    settings = manifest["settings"]
    n_encoders = 1 if settings["freeze_encoder"] else settings["n_ensemble"]
    return {"n_encoders": n_encoders, **settings}


def trains_variance(settings: dict[str, Any]) -> bool:
    """Whether the training of a model with these settings reaches the variance."""
    return settings["task"] == "pretraining" and settings["objective"] == "polysrl"


def variance_trained_of(manifest: dict[str, Any], n_encoders: int) -> list[bool]:
    """Of each encoder, whether its variance was trained.

    Files did not say it before: then their provenance does, and without one the answer is no.
    Other than so many booleans is a CheckpointError.
    """
    provenance = manifest.get("provenance", {})
    known = "variance" in provenance or provenance.get("objective") == "polysrl"
    known |= trains_variance(manifest["settings"])
    trained = manifest.get("variance_trained", [known] * n_encoders)
    if len(trained) != n_encoders or {*map(type, trained)} != {bool}:
        raise CheckpointError(f"variance_trained is {trained!r}: not {n_encoders} booleans")
    return trained


def _position_of(manifest: dict[str, Any]) -> tuple[int, int]:
    """Steps and epochs of the training so far."""
    step, epoch = manifest["step"], manifest["epoch"]
    if not (isinstance(step, int) and isinstance(epoch, int) and min(step, epoch) >= 0):
        raise CheckpointError(f"step {step!r}, epoch {epoch!r}")
    return step, epoch
