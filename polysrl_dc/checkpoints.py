"""Weights and their manifest in one safetensors file: no pickle, written atomically, verified.

The metadata of the file has the one key ``polysrl_dc`` with a JSON object of ``format``,
``version``, ``sha256`` and ``manifest``. The digest covers the manifest and name, type, shape and
bytes of every tensor.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import get_native_id
from typing import Any

import torch
from deepchem.models.optimizers import LearningRateSchedule, LinearCosineDecay, PolynomialDecay
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from polysrl_dc.errors import InvalidInputError

FORMAT = "polysrl-dc-checkpoint"
VERSION = 1
MODEL_FILE = "model.safetensors"
DEFAULT_ENCODER = "polysrl-mp"
SHIPPED = Path(__file__).parent / "encoders"
LARGEST = 2**32  # bytes; a model of one member takes 6 MB, its checkpoint with optimizer 18 MB
_KEY = "polysrl_dc"
_FIELDS = {"format", "version", "sha256", "manifest"}


class CheckpointError(InvalidInputError):
    """A checkpoint that is damaged, foreign or of another model; the message names it.

    Examples
    --------
    >>> issubclass(CheckpointError, ValueError)
    True
    """


@contextmanager
def content_of(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn whatever the content of a file makes fail into a CheckpointError that names the file.

    Parameters
    ----------
    path : path-like

    Raises
    ------
    CheckpointError
        The block has raised a ValueError, TypeError, LookupError or the like.
    """
    try:
        yield
    except CheckpointError as error:
        known = str(path) in str(error)
        raise error if known else CheckpointError(f"{path}: {error}") from error
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as e:
        raise CheckpointError(f"{path} does not hold what it should: {e!r:.300}") from e


def shipped_encoders() -> list[str]:
    """Names of the pretrained encoders that come with the package.

    Returns
    -------
    list of str
        Sorted.

    Examples
    --------
    >>> isinstance(shipped_encoders(), list)
    True
    """
    return sorted(path.name.partition(".")[0] for path in SHIPPED.glob("*.formulas.safetensors"))


def check_folder(path: str | os.PathLike[str]) -> None:
    """Refuse to write to a folder that :func:`checkpoint_path` would not find by its name.

    Raises
    ------
    ValueError
        It is that of a shipped encoder.
    """
    if str(path) in shipped_encoders():
        text = "would be read as the shipped encoder of this name"
        raise ValueError(f'{path} {text}: give the text "./{path}", or another name')


def checkpoint_path(path: str | os.PathLike[str]) -> Path:
    """The file that is meant: by the name of a shipped encoder, a folder of a model, or a file."""
    if str(path) in shipped_encoders():
        return SHIPPED / f"{path}.formulas.safetensors"
    path = Path(path)
    return path / MODEL_FILE if path.is_dir() else path


def save_checkpoint(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], manifest: Mapping[str, Any]
) -> None:
    """Write tensors and manifest; the file is either complete or not there.

    Parameters
    ----------
    path : path-like
        File to write or to replace; its folder is made if it is missing.
    tensors : mapping of str to torch.Tensor
        As from ``Module.state_dict()``; any shapes, on any device.
    manifest : mapping
        What JSON can hold: configuration, units, provenance.

    Raises
    ------
    TypeError, ValueError
        The manifest cannot be written as JSON, or has a NaN.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_checkpoint(f"{folder}/w.safetensors", {"w": torch.ones(2)}, {"epoch": 3})
    ...     tensors, manifest = load_checkpoint(f"{folder}/w.safetensors")
    >>> tensors["w"].tolist(), manifest
    ([1.0, 1.0], {'epoch': 3})
    """
    path = Path(path)
    plain = json.loads(json.dumps(dict(manifest), allow_nan=False))
    # clone: safetensors refuses tensors that share memory, as tied weights do
    own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    header = {
        "format": FORMAT,
        "version": VERSION,
        "sha256": content_digest(own, plain),
        "manifest": plain,
    }
    content = save(own, metadata={_KEY: json.dumps(header, sort_keys=True)})
    write_atomic(path, content)


def write_atomic(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file so that a reader sees the old or the new content, never a part of it.

    Of several processes or threads that write at once, one is the last. The folder is made if it is
    missing. What processes that were killed have left of this file is removed.

    Parameters
    ----------
    path : path-like
    content : bytes

    Raises
    ------
    OSError
        The disk is full or cannot be written; it names the file, and the old content stays.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_atomic(f"{folder}/a.txt", b"content")
    ...     Path(folder, "a.txt").read_text()
    'content'
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{get_native_id()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno and not error.filename:  # of a full disk
            error.filename = str(path)
        raise
    finally:
        with suppress(OSError):  # of a disk that cannot be written
            temporary.unlink(missing_ok=True)
            _remove_leftovers(path)


def _remove_leftovers(path: Path) -> None:
    """Remove temporary files of exactly this file whose process no longer lives."""
    name = re.compile(re.escape(f".{path.name}.") + r"(\d+)(-\d+)?\.tmp")
    for left in path.parent.iterdir():
        found = name.fullmatch(left.name)
        if found and not _lives(int(found[1])):
            left.unlink(missing_ok=True)


def _lives(process: int) -> bool:
    """Whether there is a process of this number; yes where that cannot be told."""
    if os.name == "nt":  # there a signal of 0 is no question
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def load_checkpoint(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read and verify what :func:`save_checkpoint` wrote.

    Parameters
    ----------
    path : path-like

    Returns
    -------
    tensors : dict of str to torch.Tensor
        On the CPU, with the types and shapes they were saved with.
    manifest : dict

    Raises
    ------
    CheckpointError
        The file is truncated, altered, of another format or version, or larger than 4 GiB.
    FileNotFoundError
        There is no file.
    """
    path = Path(path)
    if not path.exists():
        known = f"those that are shipped: {', '.join(shipped_encoders())}"
        if any(path.parent.glob("checkpoint*.safetensors")):
            known = "those beside it are read by restore(), of a model with the same arguments"
        raise FileNotFoundError(f"no checkpoint at {path}; {known}")
    if not path.is_file() or path.stat().st_size > LARGEST:
        raise CheckpointError(f"{path} is not a file of at most {LARGEST:,} bytes")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError, RuntimeError, TypeError, ValueError) as error:
        text = " ".join(str(error).split())
        raise CheckpointError(f"{path} is not a complete safetensors file: {text:.300}") from error
    try:
        header = json.loads(metadata[_KEY])
    except (KeyError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} has no readable {FORMAT} metadata") from error
    if not isinstance(header, dict) or header.keys() != _FIELDS or header["format"] != FORMAT:
        raise CheckpointError(f"{path} is not a {FORMAT}")
    if header["version"] != VERSION:
        raise CheckpointError(
            f"{path} has version {header['version']!r} of {FORMAT}; this program reads {VERSION}"
        )
    if header["sha256"] != content_digest(tensors, header["manifest"]):
        raise CheckpointError(f"{path} is damaged: its content does not have its own sha256")
    return tensors, header["manifest"]


def load_into(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy tensors into the parameters and buffers of a module; all of them, and no others.

    Parameters
    ----------
    module : torch.nn.Module
    tensors : mapping of str to torch.Tensor

    Raises
    ------
    CheckpointError
        A tensor is missing, unexpected or of another shape. The module is then unchanged.

    Examples
    --------
    >>> load_into(nn.Linear(2, 1), {"weight": torch.ones(1, 2)})
    Traceback (most recent call last):
        ...
    polysrl_dc.checkpoints.CheckpointError: Linear: missing ['bias']
    """
    check_tensors(type(module).__name__, module.state_dict(), tensors)
    module.load_state_dict(dict(tensors), strict=True)


def check_tensors(what: str, own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors that differ from ``own`` in name, shape or kind of number.

    Raises
    ------
    CheckpointError
        Names ``what`` and up to four tensors of each kind.
    """
    problems = {
        "missing": sorted(own.keys() - tensors.keys()),
        "unexpected": sorted(tensors.keys() - own.keys()),
        "of another shape": [
            f"{name}: {tuple(tensors[name].shape)}, not {tuple(own[name].shape)}"
            for name in sorted(own.keys() & tensors.keys())
            if own[name].shape != tensors[name].shape
        ],
        "of another type": [
            f"{name}: {tensors[name].dtype}, not {own[name].dtype}"
            for name in sorted(own.keys() & tensors.keys())
            if own[name].is_floating_point() != tensors[name].is_floating_point()
        ],
    }
    found = [
        f"{problem} {names[:4]}{f' and {len(names) - 4} more' if len(names) > 4 else ''}"
        for problem, names in problems.items()
        if names
    ]
    if found:
        raise CheckpointError(f"{what}: {'; '.join(found)}")


def flatten_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """State of an optimizer as tensors named ``optimizer.<parameter>.<entry>``."""
    state = optimizer.state_dict()["state"]
    return {
        f"optimizer.{index}.{name}": torch.as_tensor(value)
        for index, entries in state.items()
        for name, value in entries.items()
    }


def unflatten_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Any]) -> None:
    """Inverse of :func:`flatten_optimizer`; rates and weight decay stay those of ``optimizer``."""
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        _, number, name = key.split(".", 2)
        state.setdefault(int(number), {})[name] = value
    own = dict(enumerate(p for group in optimizer.param_groups for p in group["params"]))
    for index, entries in state.items():
        expected = {"step": torch.zeros(()), "exp_avg": own[index], "exp_avg_sq": own[index]}
        check_tensors(f"state {index} of the optimizer", expected, entries)
    optimizer.load_state_dict(
        {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
    )


def load_schedule(schedule: torch.optim.lr_scheduler.LRScheduler, state: dict[str, Any]) -> None:
    """Put a schedule, and the rates of its optimizer, where the state says.

    Raises
    ------
    CheckpointError
        It is the state of another kind of schedule.
    """
    if state.keys() != schedule.state_dict().keys():
        raise CheckpointError(f"the state of a learning rate schedule has {sorted(state)}")
    schedule.load_state_dict(state)
    for group, rate in zip(schedule.optimizer.param_groups, schedule.get_last_lr(), strict=True):
        group["lr"] = rate


def deepchem_schedule(rate: LearningRateSchedule, optimizer: torch.optim.Optimizer) -> Any:
    """A schedule of DeepChem, two of which give PyTorch a rate where it expects a factor."""
    schedule = rate._create_pytorch_schedule(optimizer)
    squared = optimizer.param_groups[0]["lr"] < rate.initial_rate / 2
    if squared and isinstance(rate, PolynomialDecay | LinearCosineDecay):
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] = 1.0
        schedule = rate._create_pytorch_schedule(optimizer)
    return schedule


def described_rate(rate: float | LearningRateSchedule) -> float | str:
    """A learning rate, or a schedule of DeepChem by its name and constants, to be compared."""
    if not isinstance(rate, LearningRateSchedule):
        return rate
    plain = int | float | str | list | tuple | dict | None
    values = [f"{k}={v}" for k, v in vars(rate).items() if isinstance(v, plain)]
    return f"{type(rate).__name__}({', '.join(values)})"


def content_digest(tensors: Mapping[str, Tensor], manifest: Any) -> str:
    """SHA-256 over the manifest and over name, type, shape and bytes of every tensor.

    Examples
    --------
    >>> content_digest({"w": torch.ones(2)}, {"epoch": 3})[:8]
    '952b7ad7'
    """
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
