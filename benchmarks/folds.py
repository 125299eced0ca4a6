"""Validation parts of training folds, and a store of finished folds that survives interruption."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.model_selection import GroupShuffleSplit, ShuffleSplit

from polysrl_dc.errors import InvalidInputError
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
    formulas: Sequence[str], fraction: float = 0.2, seed: int = 0, grouped: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Carve a validation part out of a training fold; test data is never seen here.

    Parameters
    ----------
    formulas : sequence of str, (n,)
        Formulas of the training fold.
    fraction : float
        Part of the formulas that goes to validation (the paper: 0.2).
    seed : int
        Seed of the shuffle.
    grouped : bool
        Keep rows of one reduced formula on one side, unless all rows have the same one. Matbench's
        folds do not, so a validation part that stands for its test folds does not either.

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
    groups = [group_key(formula) for formula in formulas] if grouped else formulas
    grouped = grouped and len(set(groups)) > 1
    splitter = (GroupShuffleSplit if grouped else ShuffleSplit)(
        n_splits=1, test_size=fraction, random_state=seed
    )
    train, valid = next(splitter.split(np.zeros(len(groups)), groups=groups if grouped else None))
    return np.sort(train), np.sort(valid)


def settings_hash(settings: dict[str, Any]) -> str:
    """Twelve hexadecimal digits that change with any setting."""
    text = json.dumps(settings, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees the old or the new content, never a part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            os.fchmod(file.fileno(), 0o644)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder's lock while a shared file is read, merged and written."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class FoldStore:
    """Finished folds of one task under one set of settings, one JSON file each.

    The folder's name holds the hash of the settings, and so does every file: a fold that was made
    with other settings is never taken for one of these.

    Parameters
    ----------
    root : path
        Folder of all stores.
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

    def load(self, fold: int, ids: Sequence[str]) -> dict[str, Any] | None:
        """A finished fold, or ``None`` when it is absent, unreadable or of other settings or ids.

        Returns
        -------
        dict or None
            ``predictions`` (n,), ``std`` (n,) or ``None``, ``params``.
        """
        try:
            record = json.loads(self.path(fold).read_text())
            same = (record["key"], record["task"], record["fold"], record["ids"]) == (
                self.key,
                self.task,
                fold,
                list(ids),
            )
            return record if same else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def save(
        self,
        fold: int,
        ids: Sequence[str],
        predictions: Sequence[float],
        std: Sequence[float] | None,
        params: dict[str, Any],
    ) -> None:
        """Keep a finished fold; the values must be native and finite."""
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
        write_atomic(self.path(fold), json.dumps(record, allow_nan=False).encode())
