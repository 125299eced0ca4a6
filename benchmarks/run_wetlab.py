"""Representation protocol of the paper (Appendix E) on the nine wet-lab targets.

    python benchmarks/run_wetlab.py --data-dir DATA --encoder none --seeds 3

The encoder is frozen and run once; a head is trained for 300 epochs at a learning rate of 1e-3
on each of five random folds. Scores go to ``<output-dir>/wetlab_scores.csv``.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import deepchem as dc
import pandas as pd
import torch
from folds import write_atomic
from sklearn.metrics import mean_absolute_error, r2_score
from sklearn.model_selection import KFold
from tasks import find_data_dir
from tqdm import tqdm
from wetlab import WetlabTarget, wetlab_targets

from polysrl_dc import PolySRLConfig, PolySRLModel, StoichiometryGraphFeaturizer


def representation_scores(
    target: WetlabTarget, encoder: str | None, seed: int, epochs: int = 300
) -> list[dict[str, object]]:
    """Scores of one target, five folds; ``encoder`` is a saved model, None for random weights.

    Returns
    -------
    list of dict
        Rows of the columns suite, task, protocol, model, seed, fold, metric, value; errors are
        in reported units.
    """
    graphs = StoichiometryGraphFeaturizer().featurize(target.formulas)
    config = PolySRLConfig.named("paper")
    if encoder is not None:
        trained = PolySRLModel.from_pretrained(encoder).config
        config = replace(config, feature_norm=trained.feature_norm)
    rows = []
    for fold, (train, test) in enumerate(
        KFold(5, shuffle=True, random_state=seed).split(target.values)
    ):
        model = PolySRLModel(
            config=config,
            pretrained=encoder,
            freeze_encoder=True,
            batch_size=target.batch_size,
            learning_rate=1e-3,
            schedule="constant",
            seed=seed,
        )
        model.fit(
            dc.data.NumpyDataset(graphs[train], target.values[train]),
            nb_epoch=epochs,
            checkpoint_interval=0,
        )
        predicted = model.predict(dc.data.NumpyDataset(graphs[test]))[:, 0]
        truth = target.values[test]
        for metric, value in (
            ("mae", mean_absolute_error(truth, predicted) * target.scale),
            ("r2", r2_score(truth, predicted)),
        ):
            rows.append(
                {
                    "suite": "wetlab",
                    "task": target.name,
                    "protocol": "representation",
                    "model": "rand_init" if encoder is None else Path(encoder).name,
                    "seed": seed,
                    "fold": fold,
                    "metric": metric,
                    "value": float(value),
                }
            )
    return rows


def main(argv: list[str] | None = None) -> pd.DataFrame:
    """Run the protocol and print the mean over seeds and folds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", help="layout of the shared data; or POLYSRL_DATA")
    parser.add_argument("--output-dir", default="benchmarks")
    parser.add_argument("--encoder", default="none", help="folder of a saved model, or none")
    parser.add_argument("--seed", type=int, default=0, help="first seed")
    parser.add_argument("--seeds", type=int, default=1, help="number of seeds")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    data_dir = find_data_dir(arguments.data_dir)
    if data_dir is None:
        parser.error("no data: pass --data-dir or set POLYSRL_DATA")
    encoder = None if arguments.encoder == "none" else arguments.encoder
    seeds = range(arguments.seed, arguments.seed + arguments.seeds)
    runs = [(target, seed) for target in wetlab_targets(data_dir) for seed in seeds]
    rows = [
        row
        for target, seed in tqdm(runs, desc="targets x seeds")
        for row in representation_scores(target, encoder, seed)
    ]
    scores = pd.DataFrame(rows)
    keys = ["suite", "task", "protocol", "model", "seed"]
    path = Path(arguments.output_dir) / "wetlab_scores.csv"
    if path.exists():
        old = pd.read_csv(path)
        done = set(scores[keys].itertuples(index=False, name=None))
        kept = [row not in done for row in old[keys].itertuples(index=False, name=None)]
        scores = pd.concat([old[kept], scores], ignore_index=True)
    write_atomic(path, scores.to_csv(index=False).encode())
    fresh = pd.DataFrame(rows)
    table = fresh[fresh["metric"] == "mae"].groupby("task", sort=False)["value"]
    print(table.agg(["mean", "std", "count"]).round(3).to_string())
    return scores


if __name__ == "__main__":
    main()
