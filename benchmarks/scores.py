"""Scores of finished folds: the long table shared by all runners, and the printed summary."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from files import write_csv
from folds import locked
from matbench.constants import REG_KEY
from matbench.task import MatbenchTask
from sklearn.metrics import roc_auc_score
from tasks import find_data_dir

COLUMNS = ["suite", "task", "protocol", "model", "seed", "fold", "metric", "value"]
KEYS = ["suite", "task", "protocol", "model", "seed"]
LEADERBOARD = ["algorithm", "task", "fold", "metric", "value"]
COMPOSITION_MODELS = (
    *("CrabNet", "Finder_v1.2_composition", "Ax_SAASBO_CrabNet_v1.2.7"),
    *("darwin", "gptchem"),
)
"""Leaderboard names, or parts of them, of models that see no structure on any task.

Of four further CrabNets on one task, the best: that whose settings were searched.
"""


def score_rows(
    task: MatbenchTask, suite: str, protocol: str, model: str, seed: int
) -> pd.DataFrame:
    """Long table of the recorded folds of a task.

    The metrics are Matbench's own. Its ``rocauc`` is computed on labels, so classification tasks
    also get ``rocauc_probability``, computed on the predicted probabilities.

    Returns
    -------
    pandas.DataFrame
        Columns ``suite, task, protocol, model, seed, fold, metric, value``.
    """
    rows: list[tuple[Any, ...]] = []
    for fold in [number for number, recorded in task.is_recorded.items() if recorded]:
        result = task.results[task.folds_map[fold]]
        metrics = {name: float(value) for name, value in result["scores"].items()}
        if task.metadata.task_type != REG_KEY:
            ids = list(result["data"])
            truth = task.df.loc[ids, task.metadata.target].astype(int)
            probabilities = [result["data"][sample] for sample in ids]
            metrics["rocauc_probability"] = float(roc_auc_score(truth, probabilities))
        shared = (suite, task.dataset_name, protocol, model, seed, fold)
        rows += [(*shared, metric, value) for metric, value in metrics.items()]
    return pd.DataFrame(rows, columns=COLUMNS)


def merge_scores(path: Path, fresh: pd.DataFrame) -> pd.DataFrame:
    """Put scores into a CSV file; they replace the earlier ones of the same run and fold."""
    return merge_rows(path, fresh, [*KEYS, "fold"], digits=None)


def merge_rows(
    path: Path, fresh: pd.DataFrame, keys: list[str], digits: int | None = 6
) -> pd.DataFrame:
    """Put rows into a CSV file in place of those that have the same keys, and return the table.

    Several processes may do so at once. Rows are sorted by all columns but the last.
    """
    with locked(Path(path).parent):
        table = fresh
        if Path(path).exists():
            earlier = read_scores(path)
            same = earlier.set_index(keys).index.isin(fresh.set_index(keys).index)
            table = pd.concat([earlier[~same], fresh], ignore_index=True)
        table = table.sort_values(list(fresh)[:-1], ignore_index=True)
        write_csv(path, table, digits)
    return table


def other_folds(path: Path, fresh: pd.DataFrame) -> list[int]:
    """Folds that a CSV file of scores has of the same runs, and that are not in ``fresh``."""
    if not Path(path).exists():
        return []
    earlier = read_scores(path)
    same = earlier.set_index(KEYS).index.isin(fresh.set_index(KEYS).index)
    return sorted({*earlier.loc[same, "fold"].tolist()} - {*fresh["fold"].tolist()})


def keep_scores(
    path: Path, task: str, protocol: str, model: str, keeps: Callable[[int], bool]
) -> None:
    """Of the scores of a model on a task, on whatever folds, keep those of some seeds only."""
    with locked(Path(path).parent):
        if Path(path).exists():
            table = read_scores(path)
            runs = pd.Series({"task": task, "protocol": protocol, "model": model})
            kept = (table[runs.index] != runs).any(axis=1)
            for seed in table["seed"][~kept].unique():
                kept |= (table["seed"] == seed) & keeps(seed)
            write_csv(path, table[kept], digits=None)


def read_scores(path: Path) -> pd.DataFrame:
    """A table of scores, its values to the last digit."""
    return pd.read_csv(path, float_precision="round_trip")


def leaderboard(data_dir: str | Path | None) -> pd.DataFrame:
    """Scores of Matbench's published records, fold by fold.

    Returns
    -------
    pandas.DataFrame
        Columns ``algorithm, task, fold, metric, value``; without a row if there is no file
        ``matbench/leaderboard.csv``.
    """
    folder = find_data_dir(data_dir)
    source = None if folder is None else folder / "matbench" / "leaderboard.csv"
    if source is None or not source.is_file():
        return pd.DataFrame(columns=LEADERBOARD)
    return pd.read_csv(source)


def published(task: MatbenchTask, data_dir: str | Path | None) -> dict[str, tuple[str, float]]:
    """Published scores of a task: CrabNet's, and the best that sees compositions only.

    Returns
    -------
    dict
        ``"CrabNet"`` and ``"best"`` to (algorithm, mean over five folds); empty without the file
        ``matbench/leaderboard.csv``, and without entries for a task nobody submitted.
    """
    metric = headline_metric(task)
    table = leaderboard(data_dir)
    table = table[(table["task"] == task.dataset_name) & (table["metric"] == metric)]
    if task.metadata.input_type != "composition":
        named = [any(part in name for part in COMPOSITION_MODELS) for name in table["algorithm"]]
        table = table[named]
    means = table.groupby("algorithm")["value"].agg(["mean", "count"])
    values = means.loc[means["count"] == 5, "mean"]
    if values.empty:
        return {}
    best = values.idxmin() if metric == "mae" else values.idxmax()
    found = {"best": (str(best), float(values[best]))}
    if "CrabNet" in values:
        found["CrabNet"] = ("CrabNet", float(values["CrabNet"]))
    return found


def headline_metric(task: MatbenchTask) -> str:
    """The metric of the table: ``mae`` or ``rocauc``, as on Matbench's leaderboard."""
    return "mae" if task.metadata.task_type == REG_KEY else "rocauc"


def summary(tasks: list[MatbenchTask], data_dir: str | Path | None = None) -> str:
    """The table a run ends with: mean and standard deviation over the recorded folds."""
    rows = []
    for task in tasks:
        metric = headline_metric(task)
        recorded = [number for number, done in task.is_recorded.items() if done]
        values = [task.results[task.folds_map[fold]]["scores"][metric] for fold in recorded]
        others = published(task, data_dir)
        best = others.get("best")
        rows.append(
            {
                "task": task.dataset_name,
                "metric": metric,
                "unit": task.metadata.unit if metric == "mae" else "",
                "PolySRL": f"{np.mean(values):.4g} +- {np.std(values):.2g}" if values else "-",
                "folds": f"{len(recorded)}/{len(task.folds)}",
                "CrabNet": f"{others['CrabNet'][1]:.4g}" if "CrabNet" in others else "-",
                "best composition-only": f"{best[1]:.4g} ({best[0]})" if best else "-",
            }
        )
    return pd.DataFrame(rows).to_string(index=False)
