"""Predictions on the paper's targets, kept as records in Matbench's format, and their scores.

One record for each model, protocol and seed: ``wetlab_v0.1/polysrl_transfer_seed0`` holds the
predictions of the five folds of every target that is done. The protocols are the paper's two, and
``recipe`` for the ways to train of ``recipes.py``.
"""

from __future__ import annotations

import functools
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import magpie
import numpy as np
import pandas as pd
import peers
from scores import COLUMNS, KEYS, keep_scores, merge_scores, read_scores
from sklearn.metrics import mean_absolute_error, r2_score
from submission import RESULTS_FILE, read_benchmark, record_fold, recorded_fold, write_record
from targets import Splits, Target
from tasks import FOLD_RULE_KEYS

from polysrl_dc.errors import InvalidInputError

#: What ``info.json`` says of the records of models that are not ours.
ABOUT = {**magpie.ABOUT, **peers.ABOUT}
#: What it says of the settings of ours, by protocol.
CHOSEN = {
    "representation": "Predictions are those of one model, whose settings are fixed.",
    "transfer": (
        "Predictions are those of one model, whose learning rate is chosen on a fifth of each "
        "training fold; the other settings are fixed."
    ),
    "recipe": (
        "Predictions are the mean of the members. The settings are fixed; encoders, epochs and "
        "batches were found after a look at test errors of the wet-lab targets and at parts of "
        "training folds of Matbench."
    ),
}


def record_path(output_dir: str | Path, suite: str, model: str, protocol: str, seed: int) -> Path:
    """Folder of the record of a run; the suite is ``wetlab`` or ``paper``."""
    name = re.sub(r"[^\w.-]+", "_", model)
    return Path(output_dir) / FOLD_RULE_KEYS[suite] / f"{name}_{protocol}_seed{seed}"


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
    output_dir : path
        Of all records.
    target : Target
    model, protocol, seed
        Name the run.
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
    frozen = not about and settings.get("freeze_encoder", protocol == "representation")
    trained = "frozen" if frozen else "finetune"
    chosen = CHOSEN[protocol]
    write_record(folder, [task], described, trained, "", variant, runner, about, chosen)
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


def load_seeds(target: Target, output_dir: Path, model: str, protocol: str) -> dict[int, Record]:
    """The records of a target by seed, of the first three; empty if there are none.

    Raises
    ------
    InvalidInputError
        They were made by different settings.
    """
    records = {
        seed: load_record(output_dir, target.suite, model, protocol, seed).get(target.name)
        for seed in range(3)
    }
    found = {seed: record for seed, record in records.items() if record}
    ways = [_that_count(record.settings) for record in found.values()]
    if any(way != ways[0] for way in ways):
        what = f"{model}, {protocol}, {target.name}"
        raise InvalidInputError(f"{what}: different settings made the seeds {list(found)}")
    return found


def _that_count(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in ("arguments", "seed")}


@dataclass(frozen=True)
class Run:
    """A seed of a model: what makes its predictions, its record and its scores.

    Attributes
    ----------
    settings : dict
        All that changes the predictions, of which ``model`` and ``protocol`` name the run; and,
        which do not count, the seed and ``arguments`` of the command that repeats it.
    seed : int
    output_dir : path
    table : str
        Name of the file with the scores.
    runner : str
        The command.
    """

    settings: dict[str, Any]
    seed: int
    output_dir: Path
    table: str
    runner: str

    @property
    def _name(self) -> tuple[str, str, int]:
        return self.settings["model"], self.settings["protocol"], self.seed

    @property
    def made_by(self) -> dict[str, Any]:
        """The settings that count, as they are read back from a record."""
        return json.loads(json.dumps(_that_count(self.settings)))

    def load(self, target: Target) -> Record | None:
        """The record of a target if it was made by the same settings, else None."""
        record = load_record(self.output_dir, target.suite, *self._name).get(target.name)
        return record if record and self.made_by.items() <= record.settings.items() else None

    def is_done(self, target: Target, suite: str) -> bool:
        """Whether a target is in the record, by the same settings, and in the scores of a suite."""
        path = self.output_dir / self.table
        if not self.load(target) or not path.exists():
            return False
        model, protocol, seed = self._name
        wanted = (suite, target.name, protocol, model, seed)
        return wanted in read_scores(path)[KEYS].itertuples(index=False)

    def save(
        self,
        target: Target,
        predictions: np.ndarray,
        params: list[dict[str, Any]],
        std: np.ndarray | None = None,
    ) -> None:
        """Record predictions; scores that other settings made, of whatever seed, go before."""
        model, protocol, _ = self._name

        def is_same(seed: int) -> bool:
            return replace(self, seed=seed).load(target) is not None

        keep_scores(self.output_dir / self.table, target.name, protocol, model, is_same)
        place = (self.output_dir, target, *self._name)
        save_predictions(*place, predictions, params, self.settings, self.runner, std)

    def score(self, target: Target, predictions: np.ndarray, suite: str, splits: Splits) -> None:
        """Write the scores of predictions on some folds."""
        model, protocol, seed = self._name
        fresh = prediction_scores(target, predictions, splits, suite, protocol, model, seed)
        merge_scores(self.output_dir / self.table, fresh)


def absolute_errors(target: Target, output_dir: Path, model: str) -> np.ndarray:
    """Mean absolute error of each row over the recorded seeds, (n,), on the reporting scale.

    Those of the representation protocol.

    Raises
    ------
    FileNotFoundError
        No seed is recorded.
    InvalidInputError
        The seeds were made by different settings.
    """
    known = load_seeds(target, output_dir, model, "representation")
    if not known:
        raise FileNotFoundError(f"no record of {model}, representation, {target.name}")
    found = [np.abs(record.predictions - target.values) for record in known.values()]
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
    target : Target
    predictions : numpy.ndarray, shape (n,)
        In units of the target.
    splits : list of pairs of row numbers
        Those learned from and those predicted, of each fold.
    suite, protocol, model, seed
        Columns of the result.

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
