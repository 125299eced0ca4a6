"""Which way to train suits how many rows: recipes on parts of Matbench tasks.

    python benchmarks/recipe_sizes.py --data-dir DATA
    python benchmarks/recipe_sizes.py --tasks mp_gap --rows 16000 --recipes single large

The recipes are those of the package and *single, three members*, which tells what averaging gains
from what the three encoders do. Learns from so many rows of the first training fold of a task,
drawn one after another from the same shuffle, and scores on a validation part of that fold: no test
row is read. Writes ``recipe_sizes.csv``. What is there, by the name of the recipe, is not run
again: when a recipe changes, its rows must be removed.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
import recipes
import torch
from command_line import refusing, runner_parser
from folds import output_folder, readable, split_validation
from graph_data import graph_dataset
from labels import refuse_learned
from matbench.constants import REG_KEY
from matbench.task import MatbenchTask
from scores import COLUMNS, KEYS, merge_scores, read_scores
from sklearn.metrics import mean_absolute_error, roc_auc_score
from targets import N_FOLDS
from tasks import find_data_dir, load_task, task_inputs
from tqdm import tqdm

from polysrl_dc import RECIPES, PolySRLModel

SUITE = "matbench_validation"
SCORES = "recipe_sizes.csv"
TASKS = ("matbench_expt_gap", "matbench_expt_is_metal", "matbench_log_gvrh", "matbench_mp_gap")
ROWS = (500, 1000, 2000, 4000, 8000, 16000)
FOLD = 0
AVERAGED = "single, three members"
WAYS: dict[str, Any] = {**RECIPES, AVERAGED: recipes.RECIPES[AVERAGED]}
VALIDATION_ROWS = 2000  # at most

Rows: TypeAlias = tuple[np.ndarray, np.ndarray]  # formulas and values
Key: TypeAlias = tuple[str, str, str, str, int]  # columns KEYS of the scores
Run: TypeAlias = tuple[Key, str, Rows, Rows]


def protocol(n_rows: int) -> str:
    """The column of that name: from how many rows was learned."""
    return f"{n_rows} rows"


def parts(formulas: np.ndarray, rows: tuple[int, ...], seed: int) -> Iterator[np.ndarray]:
    """Training rows of each size there are enough formulas for, and at last the validation rows."""
    fraction = min(0.2, VALIDATION_ROWS / len(formulas))
    rest, valid = split_validation(list(formulas), fraction, seed)
    order = np.random.default_rng(seed).permutation(rest)
    yield from (order[:size] for size in rows if size <= len(order))
    yield valid


def score(
    recipe: str,
    train: Rows,
    valid: Rows,
    classification: bool,
    seed: int,
) -> float:
    """Mean absolute error, or area under the ROC curve, of a recipe on validation rows."""
    way = WAYS[recipe]
    task = "classification" if classification else "regression"
    model = PolySRLModel(task, seed=seed, **way.settings)
    model.fit(graph_dataset(*train), nb_epoch=way.epochs, checkpoint_interval=0)
    predicted = model.predict_uncertainty(graph_dataset(valid[0]))[0][:, 0]
    metric = roc_auc_score if classification else mean_absolute_error
    return float(metric(valid[1], predicted))


def runs(task: MatbenchTask, arguments: argparse.Namespace) -> Iterator[Run]:
    """What identifies each run in the scores, its metric, and the rows to learn and to score on."""
    inputs, targets, _ = task_inputs(task, FOLD)
    known = np.array([readable(formula) for formula in inputs])
    formulas, targets = np.array(inputs)[known], targets[known]
    *sizes, valid = parts(formulas, tuple(arguments.rows), arguments.seed)
    metric = "mae" if task.metadata.task_type == REG_KEY else "rocauc"
    for rows in sizes:
        for recipe in arguments.recipes:
            key = (SUITE, task.dataset_name, protocol(len(rows)), recipe, arguments.seed)
            yield key, metric, (formulas[rows], targets[rows]), (formulas[valid], targets[valid])


def finished(path: Path) -> set[Key]:
    """The runs whose scores are there; another process may add to them."""
    table = read_scores(path)[KEYS] if path.exists() else pd.DataFrame(columns=KEYS)
    return set(table.itertuples(index=False, name=None))


def by_rows(scores: pd.DataFrame) -> pd.DataFrame:
    """Scores of the recipes, a row for each task and number of rows.

    Parameters
    ----------
    scores : pandas.DataFrame
        Those of this command, and others, which are left out.

    Returns
    -------
    pandas.DataFrame
        Columns of the recipes, NaN where one was not run; indexed by ``task``, ``metric`` and
        ``rows``.
    """
    own = scores[scores["suite"] == SUITE]
    rows = own["protocol"].str.removesuffix(" rows").astype(int)
    table = own.assign(rows=rows).pivot_table("value", ["task", "metric", "rows"], "model")
    return table[[recipe for recipe in WAYS if recipe in table]]


def main(argv: list[str] | None = None) -> None:
    """Train what is missing, score and print."""
    parser = runner_parser(__doc__)
    add = parser.add_argument
    add("--tasks", nargs="+", default=TASKS, help="Matbench names, with or without prefix")
    add("--recipes", nargs="+", choices=WAYS, default=list(WAYS))
    add("--rows", nargs="+", type=int, default=ROWS)
    add("--seed", type=int, default=0)
    add("--dry-run", action="store_true", help="show what would run; train and write nothing")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    path: Path = arguments.output_dir / SCORES
    with refusing(parser):
        data_dir = find_data_dir(arguments.data_dir)
        tasks = [load_task(name, data_dir) for name in arguments.tasks]
        ways = [WAYS[recipe].settings for recipe in arguments.recipes]
        encoders = {encoder for settings in ways for encoder in recipes.encoders_of(settings)}
        for encoder, task in product(encoders, tasks):
            refuse_learned(encoder, task.dataset_name, range(N_FOLDS))
    planned = [run for task in tasks for run in runs(task, arguments)]
    if arguments.dry_run:
        there = finished(path)
        for key, *_ in planned:
            print(*key[1:], "is there" if key in there else "would run", sep=", ")
        return
    with output_folder(arguments.output_dir):
        for key, metric, train, valid in tqdm(planned, unit="run"):
            if key in finished(path):
                continue
            found = score(key[3], train, valid, metric == "rocauc", arguments.seed)
            row = (*key, FOLD, metric, found)
            merge_scores(path, pd.DataFrame([row], columns=COLUMNS))
    print(by_rows(read_scores(path)).round(4).reset_index().to_markdown(index=False))


if __name__ == "__main__":
    main()
