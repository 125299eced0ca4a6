"""Predictions of the paper's protocols, kept as records in Matbench's format, and their scores.

One record for each model, protocol and seed: ``wetlab_v0.1/polysrl_transfer_seed0`` holds the
predictions of the five folds of every target that is done.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from peers import ABOUT
from scores import COLUMNS
from sklearn.metrics import mean_absolute_error, r2_score
from submission import RESULTS_FILE, read_benchmark, record_fold, recorded_fold, write_record
from targets import Splits, Target
from tasks import FOLD_RULE_KEYS


def record_path(output_dir: str | Path, suite: str, model: str, protocol: str, seed: int) -> Path:
    """Folder of the record of a run; the suite is ``wetlab`` or ``paper``."""
    return Path(output_dir) / FOLD_RULE_KEYS[suite] / f"{model}_{protocol}_seed{seed}"


def save_predictions(
    output_dir: str | Path,
    target: Target,
    model: str,
    protocol: str,
    seed: int,
    predictions: np.ndarray,
    params: list[dict[str, Any]],
    settings: dict[str, Any],
    runner: str,
    std: np.ndarray | None = None,
) -> Path:
    """Add a target, or replace it, in the record of a run.

    Parameters
    ----------
    predictions : numpy.ndarray, shape (n,)
        Each of the fold that holds the row out; kept with seven digits.
    params : list of dict
        What was chosen on each fold.
    settings : dict
        What made the predictions, such as the encoder's digest; with ``arguments`` of the runner.
    runner : str
        The command, ``run_wetlab.py``.
    std : numpy.ndarray, shape (n,), optional
        Standard deviations of the predictions, in units of the target.
    """
    task = target.task
    for fold, (_, test) in enumerate(target.splits()):
        spread = None if std is None else _rounded(std[test])
        record_fold(task, fold, _rounded(predictions[test]), spread, params[fold])
    folder = record_path(output_dir, target.suite, model, protocol, seed)
    about = ABOUT.get(model)
    variant = f"seed {seed}" if about else f"{model}, seed {seed}"
    described = {task.dataset_name: {**settings, "account": target.account}}
    write_record(folder, [task], described, protocol, "", variant, runner, about)
    return folder


def _rounded(values: np.ndarray) -> list[float]:
    return [float(f"{value:.7g}") for value in values]


class Record(NamedTuple):
    """What a record holds of a target, in the order of the target's rows.

    Attributes
    ----------
    predictions : numpy.ndarray, shape (n,)
        In units of the target.
    std : numpy.ndarray, shape (n,), or None
        Their standard deviations, in the same units, where the model gave them for every row.
    params : list of dict
        What was chosen on each fold.
    settings : dict
        What made the predictions.
    """

    predictions: np.ndarray
    std: np.ndarray | None
    params: list[dict[str, Any]]
    settings: dict[str, Any]


def load_record(
    output_dir: str | Path, suite: str, model: str, protocol: str, seed: int
) -> dict[str, Record]:
    """What a record holds, by name of the target; empty if there is no record."""
    path = record_path(output_dir, suite, model, protocol, seed) / RESULTS_FILE
    return _load(path, path.stat().st_mtime_ns) if path.exists() else {}


@functools.lru_cache(maxsize=64)
def _load(path: Path, _changed: int) -> dict[str, Record]:
    benchmark = read_benchmark(path.parent)
    found = {}
    for name, task in benchmark.tasks_map.items():
        parts, params = [], []
        for fold in range(len(task.folds)):
            ids, values, std, chosen = recorded_fold(task, fold)
            parts.append(pd.DataFrame({"value": values, "std": std}, ids, dtype=float))
            params.append(dict(chosen))
        rows = pd.concat(parts).sort_index()
        known = None if rows["std"].isna().any() else rows["std"].to_numpy()
        settings = dict(benchmark.user_metadata["tasks"][name])
        record = Record(rows["value"].to_numpy(), known, params, settings)
        found[name.partition("_")[2]] = record
    return found


def absolute_errors(target: Target, output_dir: Path, model: str) -> np.ndarray:
    """Mean absolute error of each row over the recorded seeds, (n,), on the reporting scale.

    Those of the representation protocol.

    Raises
    ------
    FileNotFoundError
        No seed is recorded.
    """
    run = (output_dir, target.suite, model, "representation")
    records = [load_record(*run, seed) for seed in range(3)]
    known = [record[target.name] for record in records if target.name in record]
    if not known:
        raise FileNotFoundError(f"no record of {model}, representation, {target.name}")
    found = [np.abs(record.predictions - target.values) for record in known]
    return np.mean(found, axis=0) * target.scale


def prediction_scores(
    target: Target,
    predictions: np.ndarray,
    splits: Splits,
    suite: str,
    protocol: str,
    model: str,
    seed: int,
) -> pd.DataFrame:
    """MAE, in reported units, and R² of each fold.

    Parameters
    ----------
    predictions : numpy.ndarray, shape (n,)

    Returns
    -------
    pandas.DataFrame
        Columns suite, task, protocol, model, seed, fold, metric, value.
    """
    rows: list[tuple[Any, ...]] = []
    for fold, (_, test) in enumerate(splits):
        key = (suite, target.name, protocol, model, seed, fold)
        truth, output = target.values[test], predictions[test]
        mae = float(mean_absolute_error(truth, output)) * target.scale
        rows += [(*key, "mae", mae), (*key, "r2", float(r2_score(truth, output)))]
    return pd.DataFrame(rows, columns=COLUMNS)
