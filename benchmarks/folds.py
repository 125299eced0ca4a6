"""Validation parts of training folds, and files that survive interruption and a full disk."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from files import read_json
from joblib import Parallel, delayed
from sklearn.model_selection import ShuffleSplit

from polysrl_dc.checkpoints import write_atomic
from polysrl_dc.errors import InvalidInputError
from polysrl_dc.resumption import UNFINISHED
from polysrl_dc.stoichiometry import parse_formula, reduced_formula


def readable(formula: str) -> bool:
    """Whether the formula parses and each of its elements has features."""
    try:
        parse_formula(formula)
    except InvalidInputError:
        return False
    return True


@functools.cache
def group_key(formula: str) -> str:
    """The reduced formula, or the text itself where it is no formula."""
    try:
        return reduced_formula(*parse_formula(formula))
    except InvalidInputError:
        return formula


def split_validation(
    formulas: Sequence[str], fraction: float = 0.2, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Carve a validation part out of a training fold; test data is never seen here.

    Rows of one reduced formula may be on both sides: they are in Matbench's folds, too, for whose
    test parts the validation part stands.

    Parameters
    ----------
    formulas : sequence of str, (n,)
        Formulas of the training fold.
    fraction : float
        Part of the formulas that goes to validation (the paper: 0.2).
    seed : int
        Seed of the shuffle.

    Returns
    -------
    train, valid : numpy.ndarray
        Ascending indices, disjoint, together all rows.

    Raises
    ------
    ValueError
        With fewer than two rows.

    Examples
    --------
    >>> train, valid = split_validation(["NaCl", "Na2Cl2", "KCl", "LiF"], 0.34)
    >>> len(train) + len(valid)
    4
    """
    if len(formulas) < 2:
        raise ValueError(f"a validation part needs at least 2 rows, got {len(formulas)}")
    splitter = ShuffleSplit(n_splits=1, test_size=fraction, random_state=seed)
    train, valid = next(splitter.split(np.zeros(len(formulas))))
    return np.sort(train), np.sort(valid)


def settings_hash(settings: dict[str, Any]) -> str:
    """Twelve hexadecimal digits that change with any setting."""
    text = json.dumps(settings, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def record_digest(record: dict[str, Any]) -> str:
    """SHA-256 of a JSON object, its entry ``sha256`` aside."""
    rest = {name: value for name, value in record.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, allow_nan=False).encode()).hexdigest()


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder's lock while a shared file is read, merged and written."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def output_folder(folder: Path, alone: bool = False) -> Iterator[None]:
    """Run a command that writes to a folder; errors of the disk end it with one line, status 2.

    The folder is tried first, so that nothing is trained in vain.

    Parameters
    ----------
    folder : path
        Made if it is missing.
    alone : bool
        Refuse to run beside another command that is alone in the folder, and remove the temporary
        files of one that was killed.
    """
    try:
        with contextlib.ExitStack() as held:
            with locked(folder):  # so that nobody removes what another is writing
                if alone:
                    held.enter_context(_alone(folder))
                write_atomic(folder / ".tried", b"Can be removed.")
                (folder / ".tried").unlink()
            yield
    except OSError as error:
        print(f"error: {error} (output folder {folder})", file=sys.stderr)
        raise SystemExit(2) from error


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    with open(folder / ".running", "w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock, not for its workers
        except BlockingIOError as error:
            raise OSError("another run is writing there") from error
        for left in folder.glob(".*.tmp"):
            left.unlink()
        yield


@contextlib.contextmanager
def unfinished_folder(folder: Path) -> Iterator[Path | None]:
    """A folder for what is trained of a fold, until :meth:`FoldStore.save` has kept all of it.

    Parameters
    ----------
    folder : path
        Made if it is missing.

    Yields
    ------
    path or None
        ``folder``; None if another process is at work in it, or has just removed it.
    """
    lock = folder / ".lock"
    with contextlib.ExitStack() as held:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = held.enter_context(open(lock, "w"))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = os.fstat(file.fileno()).st_ino == lock.stat().st_ino
        except (BlockingIOError, FileNotFoundError):
            mine = False
        yield folder if mine else None


def in_parallel(
    function: Callable[..., Any], calls: Iterable[tuple[Any, ...]], jobs: int
) -> Iterator[Any]:
    """Results as they come, of calls in several processes, which end when this one is killed."""
    tied = (delayed(_tied)(os.getpid(), function, *call) for call in calls)
    return Parallel(n_jobs=jobs, return_as="generator_unordered")(tied)


def _tied(parent: int, function: Callable[..., Any], *call: Any) -> Any:
    if os.getpid() != parent:
        _end_with(parent)
    return function(*call)


@functools.cache
def _end_with(parent: int) -> None:
    """End this process soon after its parent, instead of training what nobody waits for."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        signal.raise_signal(signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


class FoldStore:
    """Finished folds of one task under one set of settings, one JSON file each.

    The folder's name holds the hash of the settings, and so does every file: a fold that was made
    with other settings is never taken for one of these. Nor is a file that was damaged: it holds
    its own digest.

    Parameters
    ----------
    root : path
        Folder of all stores; beside it lies that of unfinished folds.
    task : str
        Name of the task.
    settings : dict
        Everything that changes the predictions: strings, numbers, lists, dicts.
    """

    def __init__(self, root: Path, task: str, settings: dict[str, Any]) -> None:
        self.task = task
        self.settings = settings
        self.key = settings_hash(settings)
        self.folder = Path(root) / task / self.key

    def path(self, fold: int) -> Path:
        """Where a fold is kept."""
        return self.folder / f"fold_{fold}.json"

    def unfinished(self, fold: int) -> Path:
        """Where what is trained of a fold lies until then, for :func:`unfinished_folder`."""
        return self.folder.parents[2] / UNFINISHED / self.task / f"{self.key}_fold{fold}"

    def load(self, fold: int, ids: Sequence[str]) -> dict[str, Any] | None:
        """A finished fold, or ``None`` when it is absent, damaged or of other settings or ids.

        Returns
        -------
        dict or None
            ``predictions`` (n,), ``std`` (n,) or ``None``, ``params``.
        """
        try:
            record = read_json(self.path(fold))
            same = (record["key"], record["task"], record["fold"], record["ids"]) == (
                self.key,
                self.task,
                fold,
                list(ids),
            )
            if not (same and record["sha256"] == record_digest(record)):
                return None
        except (OSError, ValueError, KeyError, TypeError):
            return None
        self._remove_parts(fold)  # of a run that was killed before it could
        return record

    def save(
        self,
        fold: int,
        ids: Sequence[str],
        predictions: Sequence[float],
        std: Sequence[float] | None,
        params: dict[str, Any],
    ) -> None:
        """Keep a finished fold, whose values must be native and finite; its parts are removed."""
        record = {
            "task": self.task,
            "fold": fold,
            "key": self.key,
            "settings": self.settings,
            "ids": list(ids),
            "predictions": list(predictions),
            "std": None if std is None else list(std),
            "params": params,
        }
        record["sha256"] = record_digest(record)
        write_atomic(self.path(fold), json.dumps(record, allow_nan=False).encode())
        self._remove_parts(fold)

    def _remove_parts(self, fold: int) -> None:
        """What was trained of a fold that is kept, unless another process is at work in it."""
        if (parts := self.unfinished(fold)).exists():
            with unfinished_folder(parts) as mine:
                if mine:
                    shutil.rmtree(mine, ignore_errors=True)
