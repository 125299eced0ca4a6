"""Representation protocol of the paper (Appendix E) on the nine wet-lab targets.

    python benchmarks/run_wetlab.py --data-dir DATA --encoder none --seeds 3

The encoder is frozen and run once; a head is trained for 300 epochs at a learning rate of 1e-3
on each of five random folds. Scores go to ``<output-dir>/wetlab_scores.csv``. The heads read
embeddings of unit length: ``head_scale`` of an encoder's configuration plays no part here.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import deepchem as dc
import numpy as np
import pandas as pd
import torch
from representation import Embed, evaluate_encoder
from scores import merge_scores
from tasks import find_data_dir
from wetlab import WetlabTarget, wetlab_targets

from polysrl_dc import PolySRLModel, StoichiometryGraphFeaturizer

PAIR = ["task", "seed", "fold"]


def encoder_embeddings(encoder: str | None, seeds: Sequence[int], config: str = "paper") -> Embed:
    """The embedding function of a saved model, or of random encoders, one for each seed.

    Parameters
    ----------
    encoder : str or None
        Folder or file of a saved model; None for random weights.
    seeds : sequence of int
        Of the random weights.
    config : str
        Configuration of the random encoders.
    """
    if encoder is not None:
        models = [PolySRLModel.from_pretrained(encoder)]
    else:
        models = [PolySRLModel(config=config, pretrained=None, seed=seed) for seed in seeds]

    def embed(formulas: list[str]) -> np.ndarray:
        dataset = dc.data.NumpyDataset(StoichiometryGraphFeaturizer().featurize(formulas))
        parts = np.stack([model.predict_embedding(dataset) for model in models])
        return parts[0] if encoder is not None else parts

    return embed


def paired_differences(scores: pd.DataFrame, model: str, baseline: str) -> pd.DataFrame:
    """Mean absolute errors of two models on the same seeds and folds, by target.

    Returns
    -------
    pandas.DataFrame
        Columns mae, baseline, difference, standard_error (of the difference, over the pairs),
        pairs; reported units. Without a row where the two share no fold.
    """
    errors = scores[(scores["metric"] == "mae") & (scores["protocol"] == "representation")]
    errors = errors[errors["suite"] == "wetlab"]
    ours, theirs = (
        errors[errors["model"] == name].set_index(PAIR)["value"] for name in (model, baseline)
    )
    pairs = pd.DataFrame({"mae": ours, "baseline": theirs}).dropna()
    pairs["difference"] = pairs["mae"] - pairs["baseline"]
    by_task = pairs.groupby("task", sort=False)
    table = by_task.mean()
    table["standard_error"] = by_task["difference"].sem()
    table["pairs"] = by_task.size()
    return table


def published(data_dir: Path) -> pd.Series | None:
    """Table 1 of the paper, its PolySRL: MAE by target, if the file lies beside the data."""
    path = data_dir / ".." / "paper" / "tables.csv"
    if not path.exists():
        return None
    rows = pd.read_csv(path).query(
        "table == 1 and protocol == 'representation' and model == 'polysrl' and metric == 'mae'"
    )
    return rows.set_index("dataset")["mean"].rename("paper")


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    add = parser.add_argument
    add("--data-dir", help="layout of the shared data; or POLYSRL_DATA")
    add("--output-dir", default="benchmarks")
    add("--encoder", default="none", help="saved model (folder or file), or none")
    add("--config", default="paper", choices=("paper", "default"), help="of the random start")
    add("--name", help="label in the column model; by default that of the folder, or rand_init")
    add("--baseline", help="model of the scores to compare with, fold by fold")
    add("--seed", type=int, default=0, help="first seed")
    add("--seeds", type=int, default=1, help="number of seeds")
    add("--threads", type=int, default=1)
    add("--dry-run", action="store_true", help="show what would run; train and write nothing")
    arguments = parser.parse_args(argv)
    arguments.data_dir = find_data_dir(arguments.data_dir)
    if arguments.data_dir is None:
        parser.error("no data: pass --data-dir or set POLYSRL_DATA")
    if arguments.encoder == "none":
        arguments.encoder = None
    if arguments.name is None:
        arguments.name = Path(arguments.encoder).name if arguments.encoder else "rand_init"
    return arguments


def _print_plan(targets: Sequence[WetlabTarget], seeds: range, name: str) -> None:
    print(f"dry run: nothing is trained or written; model {name}, seeds {list(seeds)}, 5 folds")
    for target in targets:
        print(f"  {target.name}: {len(target.values)} formulas, batch size {target.batch_size}")


def main(argv: list[str] | None = None) -> pd.DataFrame | None:
    """Run the protocol; print the means over seeds and folds, or the table of paired differences.

    Returns
    -------
    pandas.DataFrame or None
        All scores of the file; None after a dry run.
    """
    arguments = _arguments(argv)
    name, baseline = arguments.name, arguments.baseline
    torch.set_num_threads(arguments.threads)
    targets = wetlab_targets(arguments.data_dir)
    seeds = range(arguments.seed, arguments.seed + arguments.seeds)
    if arguments.dry_run:
        _print_plan(targets, seeds, name)
        return None
    embed = encoder_embeddings(arguments.encoder, seeds, arguments.config)
    fresh = evaluate_encoder(embed, targets, seeds, name, progress=True)
    scores = merge_scores(Path(arguments.output_dir) / "wetlab_scores.csv", fresh)
    errors = fresh[fresh["metric"] == "mae"].groupby("task", sort=False)["value"]
    table = errors.agg(["mean", "std", "count"])
    known = baseline is not None and bool((scores["model"] == baseline).any())
    if known:
        runs = scores[(scores["model"] != name) | scores["seed"].isin(seeds)]
        table = paired_differences(runs, name, baseline).reindex(table.index)
    paper = published(arguments.data_dir)
    if paper is not None:
        table = table.join(paper)
    print(table.round(3).to_string())
    if known:
        better = int((table["difference"] < 0).sum())
        print(f"{name} is better than {baseline} on {better} of {len(table)} targets")
    elif baseline is not None:
        print(f"no scores of {baseline} to compare with")
    return scores


if __name__ == "__main__":
    main()
