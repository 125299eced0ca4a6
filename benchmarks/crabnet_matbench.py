"""Whether CrabNet, as written here, reproduces its published scores on Matbench's official folds.

    python benchmarks/crabnet_matbench.py --data-dir DATA               # 15 folds, hours
    python benchmarks/crabnet_matbench.py --tasks expt_gap --folds 0    # the shortest part of it

Published scores are those of the record ``CrabNet`` in ``matbench/leaderboard.csv``, fold by fold.
Both go to ``crabnet_scores.csv``, which ``summarize.py`` reads, and it ends with them beside one
another; finished folds are kept, and one that was interrupted goes on.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from command_line import refusing, runner_parser
from folds import FoldStore, in_parallel, output_folder, readable, unfinished_folder
from graph_data import graph_dataset
from peers import lacking, peer_model, peer_settings
from scores import COLUMNS, leaderboard, merge_scores
from targets import N_FOLDS
from tasks import find_data_dir, load_task, task_inputs
from tqdm import tqdm

TASKS = ("matbench_expt_gap", "matbench_dielectric", "matbench_log_gvrh")
PROTOCOL = "official folds"
SCORES = "crabnet_scores.csv"


def predict_fold(
    fold: int,
    train_formulas: list[str],
    train_targets: np.ndarray,
    test_formulas: list[str],
    seed: int,
    unfinished: Path,
) -> tuple[int, np.ndarray, int]:
    """Train on a fold as published, and predict its test formulas.

    The folder ``unfinished`` keeps what has been trained until the fold is finished.

    Returns
    -------
    fold : int
    predictions : numpy.ndarray, shape (n_test,)
        The mean of the training targets where a formula holds an element without features.
    epochs : int
        After which training stopped.
    """
    torch.set_num_threads(1)
    learned, asked = (
        np.array([readable(formula) for formula in part])
        for part in (train_formulas, test_formulas)
    )
    model = peer_model("crabnet", seed)
    dataset = graph_dataset(np.array(train_formulas)[learned], train_targets[learned])
    predictions = np.full(len(test_formulas), train_targets.mean())
    with unfinished_folder(unfinished) as place:
        model.fit(dataset, unfinished=place)
        predictions[asked] = model.predict(graph_dataset(np.array(test_formulas)[asked]))[:, 0]
    return fold, predictions, model.history[-1][0]


def run(
    name: str, arguments: argparse.Namespace, data_dir: Path, published: pd.Series
) -> pd.DataFrame:
    """Train the folds of a task that are missing, write all their scores and return the table.

    Parameters
    ----------
    name : str
    arguments : argparse.Namespace
    data_dir : path
    published : pandas.Series
        Mean absolute error by task and fold.
    """
    task = load_task(name, data_dir)
    settings = {**peer_settings("crabnet"), "model": "crabnet", "seed": arguments.seed}
    store = FoldStore(arguments.output_dir / "folds", f"official_{name}", settings)
    tests = {fold: task.validation[f"fold_{fold}"].test for fold in arguments.folds}
    missing = [fold for fold, ids in tests.items() if store.load(fold, ids) is None]
    calls = (
        (fold, *task_inputs(task, fold), arguments.seed, store.unfinished(fold)) for fold in missing
    )
    with tqdm(total=len(tests), initial=len(tests) - len(missing), unit="fold") as bar:
        bar.set_description(f"crabnet, seed {arguments.seed}, {name}")
        for fold, predictions, epochs in in_parallel(predict_fold, calls, arguments.jobs):
            store.save(fold, tests[fold], predictions.tolist(), None, {"epochs": epochs})
            bar.update()
    rows = []
    for fold, ids in tests.items():
        record = store.load(fold, ids) or {}
        errors = task.df.loc[list(ids), task.metadata.target] - record["predictions"]
        for model, metric, value in (
            ("crabnet", "mae", float(errors.abs().mean())),
            ("crabnet", "epochs", record["params"]["epochs"]),
            ("published", "mae", published[name, fold]),
        ):
            rows.append(("matbench", name, PROTOCOL, model, arguments.seed, fold, metric, value))
    return merge_scores(arguments.output_dir / SCORES, pd.DataFrame(rows, columns=COLUMNS))


def beside_published(scores: pd.DataFrame) -> pd.DataFrame:
    """Mean absolute errors of the folds that have been run, ours and the published ones.

    Parameters
    ----------
    scores : pandas.DataFrame
        What :func:`run` returns.

    Returns
    -------
    pandas.DataFrame
        By task of :data:`TASKS`: ``folds``, means ``crabnet`` and ``published`` over them and
        their ``ratio``, and ``within 5 %``, whether they differ by no more.
    """
    errors = scores[(scores["protocol"] == PROTOCOL) & (scores["metric"] == "mae")]
    errors = errors.pivot_table("value", ["task", "fold"], "model")
    found = errors.groupby("task").mean().reindex(TASKS, columns=["crabnet", "published"])
    found.insert(0, "folds", errors.groupby("task").size().reindex(TASKS, fill_value=0))
    found["ratio"] = found["crabnet"] / found["published"]
    found["within 5 %"] = found["ratio"].sub(1).abs() <= 0.05
    return found


def main(argv: list[str] | None = None) -> None:
    """Run what is missing and print the comparison."""
    parser = runner_parser(__doc__)
    add = parser.add_argument
    short = [name.removeprefix("matbench_") for name in TASKS]
    add("--tasks", nargs="+", choices=short, default=short, metavar="TASK", help=", ".join(short))
    add("--folds", nargs="+", type=int, choices=range(N_FOLDS), default=list(range(N_FOLDS)))
    add("--seed", type=int, default=0)
    add("--jobs", type=int, default=1, help="folds trained at once, a process each")
    arguments = parser.parse_args(argv)
    if message := lacking("crabnet"):
        parser.error(message)
    with refusing(parser):
        data_dir = find_data_dir(arguments.data_dir)
    records = leaderboard(data_dir).query("algorithm == 'CrabNet' and metric == 'mae'")
    if data_dir is None or records.empty:
        parser.error("no matbench/leaderboard.csv in --data-dir or POLYSRL_DATA")
    published = records.set_index(["task", "fold"])["value"]
    with output_folder(arguments.output_dir):
        for name in arguments.tasks:
            scores = run(f"matbench_{name}", arguments, data_dir, published)
    print(beside_published(scores).query("folds > 0").round(4).to_markdown())


if __name__ == "__main__":
    main()
