"""Trainings that go on where they were interrupted: a fold of a large task takes an hour."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from graph_data import Dataset

from polysrl_dc import PolySRLModel
from polysrl_dc.checkpoints import content_digest, load_checkpoint, save_checkpoint
from polysrl_dc.resumption import INTERVAL, fit_in


def trained(
    model: PolySRLModel, dataset: Dataset, epochs: int, name: str, unfinished: Path | None
) -> PolySRLModel:
    """Train a model, or go on from what the same call has left in the folder ``unfinished``.

    ``name`` stands before the progress bar.
    """
    if unfinished is not None:
        return fit_in(unfinished, model, dataset, epochs, name)
    model.fit(dataset, nb_epoch=epochs, checkpoint_interval=0)
    return model


class TrainingState:
    """Everything that the training of a peer goes on from; exactly, on a CPU.

    Parameters
    ----------
    folder : path or None
        None: nothing is kept.
    made_of : list
        What tells this training from others in the folder, besides the initial weights.
    device : torch.device
        Whose generator the training draws from, besides that of the CPU.
    network : torch.nn.Module
        With its initial weights.
    **parts
        What else has a ``state_dict`` and a ``load_state_dict``, by name.

    Examples
    --------
    >>> import tempfile
    >>> layer = torch.nn.Linear(2, 1)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     training = Path(folder), ["three epochs"], torch.device("cpu"), layer
    ...     TrainingState(*training).write(epoch=2)
    ...     TrainingState(*training).restore()
    {'epoch': 2}
    """

    def __init__(
        self,
        folder: Path | None,
        made_of: list[Any],
        device: torch.device,
        network: torch.nn.Module,
        **parts: Any,
    ) -> None:
        self.path: Path | None = None
        if folder is not None:
            key = content_digest(network.state_dict(), made_of)
            self.path = folder / f"{key[:16]}.safetensors"
        self.device, self.parts = device, {"network": network, **parts}
        self._kept_at = time.monotonic()

    def keep(self, **values: Any) -> None:
        """:meth:`write`, unless that was done, or the training begun, a few minutes ago."""
        if time.monotonic() >= self._kept_at + INTERVAL:
            self.write(**values)
            self._kept_at = time.monotonic()

    def write(self, **values: Any) -> None:
        """Write the parts and generators as they are.

        Parameters
        ----------
        **values
            Numbers, lists and tuples that :meth:`restore` gives back.
        """
        if self.path is None:
            return
        parts = {name: part.state_dict() for name, part in self.parts.items()}
        state = {"parts": parts, "generators": self._generators(), "values": values}
        tensors: dict[str, torch.Tensor] = {}
        manifest = _without_tensors(state, tensors)
        save_checkpoint(self.path, tensors, manifest)

    def restore(self) -> dict[str, Any]:
        """Put parts and generators where they stood; the values, or none at the beginning.

        Raises
        ------
        CheckpointError
            The file is damaged.
        """
        if self.path is None or not self.path.exists():
            return {}
        tensors, manifest = load_checkpoint(self.path)
        state = _with_tensors(manifest, tensors)
        for name, part in self.parts.items():
            part.load_state_dict(state["parts"][name])
        torch.set_rng_state(state["generators"][0])
        for generator in state["generators"][1:]:
            torch.cuda.set_rng_state(generator, self.device)
        return state["values"]

    def _generators(self) -> list[torch.Tensor]:
        states = [torch.get_rng_state()]
        if self.device.type == "cuda":
            states.append(torch.cuda.get_rng_state(self.device))
        return states


def _without_tensors(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """A nested state as JSON holds it; its tensors are put into a dictionary and leave a name."""
    if isinstance(value, torch.Tensor):
        tensors[name := str(len(tensors))] = value
        return {"tensor": name}
    if isinstance(value, Mapping):
        parts = [[_without_tensors(part, tensors) for part in pair] for pair in value.items()]
        return {"mapping": parts}
    if isinstance(value, list | tuple):
        parts = [_without_tensors(part, tensors) for part in value]
        return {"tuple": parts} if isinstance(value, tuple) else parts
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    return value


def _with_tensors(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """Inverse of :func:`_without_tensors`."""
    if isinstance(value, list):
        return [_with_tensors(part, tensors) for part in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "float":
        return float(content)
    parts = _with_tensors(content, tensors)
    return tuple(parts) if kind == "tuple" else dict(parts)
