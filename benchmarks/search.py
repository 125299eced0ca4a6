"""The search for what works in pretraining: one change at a time, equal budgets, one table.

    python benchmarks/search.py --data-dir DATA --cache-dir CACHE

Each row pretrains the configuration ``default`` as it was when the search began with one change, on
the same random sample of structures, and scores the encoder by the wet-lab representation protocol
on the same folds, which are not those of the reported scores. Finished rows are kept in
``pretraining_search.csv``, which knows them by their names: all are pretrained with seed 0.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pretrain
import torch
from command_line import refusing, runner_parser
from files import write_csv
from folds import output_folder
from paper_models import encoder_embeddings
from paper_records import prediction_scores
from representation import predict_targets
from sklearn.model_selection import KFold
from targets import Splits, Target, wetlab_targets
from tasks import required_data_dir

from polysrl_dc import PolySRLModel, StoichiometryGraphFeaturizer
from polysrl_dc.graphs import StoichiometryBatch

BUDGET = ["--max-structures", "76800", "--max-sites", "60", "--epochs", "2", "--hold-out", "2000"]
#: The default configuration when the search began; what it found is in that of today.
START = ["--set", "message_power=0", "attention_power=0", "edge_hidden=200"]

BETAS = ("1e-8", "1e-6", "1e-5", "1e-4", "1e-3", "1e-2")
N_SAMPLES = (1, 4, 16)

#: Name of the row -> arguments of pretrain.py that differ from the default.
ROWS: dict[str, list[str]] = {
    "default": [],
    # what normalization and whitening bring by themselves: the weights stay random
    "random weights, statistics only": ["--learning-rate", "1e-12", "--epochs", "1"],
    "paper, its learning rate": [
        *("--config", "paper", "--learning-rate", "5e-5", "--schedule", "constant")
    ],
    "no feature normalization": ["--set", "feature_norm=false", "whitening=0"],
    "no whitening": ["--set", "whitening=0"],
    "whitening 1": ["--set", "whitening=1.0"],
    "sigma starts at 1": ["--set", "log_sigma_shift=0"],
    "sum pooling": ["--set", "structure_pooling=sum"],
    "learning rate 3e-4": ["--learning-rate", "3e-4"],
    "learning rate 3e-3": ["--learning-rate", "3e-3"],
    "constant learning rate": ["--schedule", "constant", "--learning-rate", "5e-4"],
    "batch 1024, rate 2e-3": ["--batch-size", "1024", "--learning-rate", "2e-3"],
    "batch 64": ["--batch-size", "64"],
    "4 polymorphs together": ["--polymorphs-per-batch", "4"],
    "4 together, sum of eq. 4": ["--polymorphs-per-batch", "4", "--set", "polymorph_sum=true"],
    "loss summed over pairs": ["--set", "loss_reduction=sum"],
    "c and d start at 10": ["--set", "c_init=10", "d_init=10"],
    "c and d start at 5": ["--set", "c_init=5", "d_init=5"],
    "c and d start at 40": ["--set", "c_init=40", "d_init=40"],
    # the weight of the divergence (Figure 3; the first is that of the default) and J (Figure 9)
    **{f"beta {beta}": ["--set", f"beta={beta}"] for beta in BETAS},
    **{f"J {n}": ["--set", f"n_samples={n}"] for n in N_SAMPLES},
    "sigmoid of HIB": ["--set", "match_form=hib"],
    "edge hidden 100": ["--set", "edge_hidden=100"],
    "edge hidden 400": ["--set", "edge_hidden=400"],
    "messages by square root": ["--set", "message_power=0.5"],
    "messages by fraction": ["--set", "message_power=1.0"],
    "random element features": ["--set", "element_source=random"],
    "messages, attention by square root": ["--set", "message_power=0.5", "attention_power=0.5"],
    "1 epoch": ["--epochs", "1"],
    "4 epochs": ["--epochs", "4"],
    "without sampling": ["--objective", "without_sampling"],
    "3D Infomax": ["--objective", "infomax3d"],
    "GraphCL": ["--objective", "graphcl"],
    # How much is familiarity: the same budget without the formulas that the encoder is scored on,
    # and, since nearly all stoichiometries are in Matbench, two small sets of about equal size.
    "wet-lab formulas left out": ["--exclude", "wetlab"],
    "wet-lab and Matbench left out": [
        *("--exclude", "wetlab+matbench", "--max-structures", "200000", "--epochs", "10")
    ],
    "as few, nothing left out": ["--max-structures", "17000", "--epochs", "10"],
}


def folds_of(seed: int) -> Callable[[Target], Splits]:
    """Five random folds of each target."""
    folds = KFold(5, shuffle=True, random_state=seed)
    return lambda target: list(folds.split(target.values))


def run_missing(path: Path, arguments: argparse.Namespace) -> None:
    """Add the rows that a table lacks; of a finished one no weights are kept."""
    torch.set_num_threads(arguments.threads)
    for name in arguments.rows:
        results = finished_rows(path)
        if name not in set(results["row"]):
            print(f"{name}: {' '.join(ROWS[name]) or 'nothing changed'}", flush=True)
            results = pd.concat([results, run_row(name, arguments)], ignore_index=True)
            write_csv(path, results)
        for weights in folder_of(name, arguments).glob("*.safetensors"):
            weights.unlink()


def finished_rows(path: Path) -> pd.DataFrame:
    """The table as it stands."""
    return pd.read_csv(path) if path.exists() else pd.DataFrame({"row": []})


def folder_of(name: str, arguments: argparse.Namespace) -> Path:
    """Where the encoder of a row is pretrained."""
    return arguments.output_dir / "runs" / "search" / name.replace(" ", "_").replace(",", "")


def run_row(name: str, arguments: argparse.Namespace) -> pd.DataFrame:
    """Pretrain and score one row: columns row, metric, value, fold, seed, task."""
    folder = folder_of(name, arguments)
    start = time.perf_counter()
    base = [] if "--config" in ROWS[name] else START
    options = [*BUDGET, *base, "--data-dir", str(arguments.data_dir), "--output-dir", str(folder)]
    if arguments.cache_dir:
        options += ["--cache-dir", arguments.cache_dir]
    if arguments.compile:
        options += ["--compile"]
    pretrain.main([*options, *ROWS[name]])
    seconds = time.perf_counter() - start
    torch.set_num_threads(arguments.threads)
    log = pd.read_csv(folder / "log.csv").iloc[-1]
    targets = wetlab_targets(arguments.data_dir)
    embed = encoder_embeddings(str(folder), [0])
    parts = []
    for seed in range(arguments.seeds):
        splits_of = folds_of(seed)
        found = predict_targets(embed, targets, [seed], splits_of)
        for target in targets:
            run = ("wetlab", "representation", name, seed)
            folds = splits_of(target)
            parts.append(prediction_scores(target, found[target.name][0], folds, *run))
    scores = pd.concat(parts).query("metric == 'mae'")
    scores = scores[["task", "seed", "fold", "metric", "value"]]
    diagnostics = {
        "retrieval@1": log["retrieval@1"],
        "retrieval@10": log["retrieval@10"],
        "rank_formulas": log["rank_formulas"],
        "mean_log_sigma": log["mean_log_sigma"],
        **variance_diagnostics(str(folder), targets[0].formulas),
        "structures_per_second": log["structures_per_second"],
        "seconds": seconds,
    }
    return pd.concat(
        [scores, pd.DataFrame({"metric": list(diagnostics), "value": list(diagnostics.values())})]
    ).assign(row=name)


def variance_diagnostics(encoder: str, formulas: np.ndarray) -> dict[str, float]:
    """Mean variance of formulas, and the share of their 200 variances that collapsed (Figure 3).

    At a variance of 1e-4 noise changes the exponent of eq. 4 by some 0.2 (c = 20, distance 1), at
    1e-6 by 0.002: there it has no effect on the loss.
    """
    network = PolySRLModel.from_pretrained(encoder).model.encoders[0].eval()
    graphs = list(StoichiometryGraphFeaturizer().featurize(formulas))
    with torch.no_grad():
        variance = (2 * network.log_sigma(StoichiometryBatch.from_graphs(graphs))).exp()
    return {
        "mean_variance": float(variance.mean()),
        "collapsed_1e-4": float((variance < 1e-4).float().mean()),
        "collapsed_1e-6": float((variance < 1e-6).float().mean()),
    }


def table(results: pd.DataFrame) -> pd.DataFrame:
    """One line a row: diagnostics, MAE of each target, their mean change from the first row."""
    errors = results[results["metric"] == "mae"]
    means = errors.pivot_table("value", "row", "task", sort=False)
    relative = (means / means.reindex(["default"]).iloc[0] - 1) * 100
    others = results[results["metric"] != "mae"]
    lines = others.pivot_table(index="row", columns="metric", values="value").join(means)
    lines["mean change, %"] = relative.mean(axis=1)
    lines["standard error, %"] = relative.std(axis=1) / np.sqrt(relative.shape[1])
    return lines.reindex([row for row in ROWS if row in lines.index])


def main(argv: list[str] | None = None) -> None:
    """Run the rows that are missing and print the table."""
    parser = runner_parser(__doc__, cache=True, allow_abbrev=False)
    add = parser.add_argument
    add("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="ROW")
    add("--seeds", type=int, default=1, help="of the protocol, for rows that are missing")
    add("--threads", type=int, default=1)
    add("--compile", action="store_true")
    add("--dry-run", action="store_true", help="list the rows; run nothing")
    arguments = parser.parse_args(argv)
    with refusing(parser):
        arguments.data_dir = required_data_dir(arguments.data_dir)
    path = arguments.output_dir / "pretraining_search.csv"
    if arguments.dry_run:
        done = set(finished_rows(path)["row"])
        for name in arguments.rows:
            if name not in done:
                print(f"{name}: {' '.join(ROWS[name]) or 'nothing changed'}")
    else:
        with output_folder(arguments.output_dir / "runs" / "search", alone=True):
            run_missing(path, arguments)
    if path.exists():
        print(table(pd.read_csv(path)).round(3).to_markdown())


if __name__ == "__main__":
    main()
