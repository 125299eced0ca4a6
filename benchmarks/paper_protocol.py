"""The paper's two protocols on its targets: every model, the same five folds.

Representation: the encoder is frozen and run once; heads of all folds and seeds are trained side by
side, 300 epochs at 1e-3. Transfer: encoder and head are trained together for 500 epochs, at a rate
that is chosen on a fifth of each training fold, once, with seed 0; Roost and CrabNet, which are no
encoders of ours, by their own recipes. Folds are Matbench's, so all models are paired. Predictions
go to ``<output-dir>/<suite>_v0.1/`` in Matbench's format, a record for each model, protocol and
seed; scores to ``<output-dir>/<suite>_scores.csv``. What is there is not run again.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import transfer
from command_line import chosen_targets, refusing, runner_parser
from folds import FoldStore, in_parallel, output_folder, unfinished_folder
from magpie import BASELINES, predict_baseline
from paired import comparison
from paper_models import MODELS, encoder_embeddings, encoder_of
from paper_records import Run
from peers import PEERS, lacking, peer_settings, predict_peer_fold
from representation import EPOCHS, on_same_formulas, predict_targets, start_of
from targets import N_FOLDS, PARTS, Splits, Target
from tasks import find_data_dir
from tqdm import tqdm

from polysrl_dc import PolySRLConfig
from polysrl_dc.checkpoints import checkpoint_path

PROTOCOLS = ("representation", "transfer")
#: Command that makes the records of a suite.
RUNNERS = {"wetlab": "run_wetlab.py", "paper": "run_matbench.py --paper"}
TargetsOf = Callable[[Path | None], list[Target]]
PredictFold = Callable[..., tuple[np.ndarray, np.ndarray | None, dict[str, Any]]]
#: The seed whose trials choose the learning rate of each fold of the transfer protocol.
RATE_SEED = 0


def part_of_training(fraction: float) -> Callable[[Target], Splits]:
    """The folds of a target with the first ``fraction`` of each shuffled training part."""

    def splits(target: Target) -> Splits:
        return [
            (np.random.default_rng(fold).permutation(train)[: round(fraction * len(train))], test)
            for fold, (train, test) in enumerate(target.splits())
        ]

    return splits


#: Ways to make the five folds; all but the first are marked in the suite of the table of scores.
#: No composition is on both sides of ``grouped`` folds, no publication of those by publication.
FOLDS: dict[str, Callable[[Target], Splits]] = {
    "matbench": Target.splits,
    "grouped": lambda target: target.splits(target.compositions),
    "publication": lambda target: target.splits(target.publications),
    **{name: part_of_training(part) for name, part in PARTS.items()},
}


def suite_name(suite: str, folds: str) -> str:
    """Value of the column suite: ``wetlab``, ``wetlab_grouped``, ``wetlab_10%``, ..."""
    return suite if folds == "matbench" else f"{suite}_{folds}"


def run_representation(
    model: str, encoder: str | None, targets: list[Target], arguments: argparse.Namespace
) -> None:
    """Train what is missing of a model's heads; write records and scores."""
    runs, seeds = runs_of(model, encoder, "representation", arguments, EPOCHS), arguments.seeds
    for folds, splits_of in FOLDS.items():
        if folds not in ("matbench", *arguments.folds):
            continue
        suite = suite_name(arguments.suite, folds)
        todo = [
            target
            for target in targets
            if (folds != "publication" or target.publications is not None)
            and not all(run.is_done(target, suite) for run in runs)
        ]
        for group in on_same_formulas(todo):
            if model in BASELINES:
                found = predict_baseline(model, group, seeds, splits_of)
            else:
                embed = encoder_embeddings(encoder, seeds, arguments.config)
                found = predict_targets(embed, group, seeds, splits_of, EPOCHS, progress=True)
            for target in group:
                for run, predictions in zip(runs, found[target.name], strict=True):
                    if folds == "matbench":
                        run.save(target, predictions, [{}] * N_FOLDS)
                    run.score(target, predictions, suite, splits_of(target))


def run_transfer(
    model: str, encoder: str | None, targets: list[Target], arguments: argparse.Namespace
) -> None:
    """Train the folds of a model that are missing, seed after seed; write records and scores."""
    runs = runs_of(model, encoder, "transfer", arguments, transfer.EPOCHS)
    if model not in PEERS and RATE_SEED not in arguments.seeds:
        runs.insert(0, replace(runs[0], seed=RATE_SEED))  # whose rates the others take
    for run in runs:
        for target in targets:
            if run.is_done(target, arguments.suite):
                continue
            key = {**run.made_by, "seed": run.seed}
            predict: PredictFold = predict_peer_fold
            calls: list[tuple[Any, ...]] = [(model, run.seed)] * N_FOLDS
            if model not in PEERS:
                rates = _rates(target, run)
                key["rates"] = [list(part) for part in rates]
                predict = transfer.predict_fold
                calls = [(encoder, run.seed, tried) for tried in rates]
            predictions, std, params = train_folds(target, predict, calls, key, arguments)
            run.save(target, predictions, params, std)
            run.score(target, predictions, arguments.suite, target.splits())


def _rates(target: Target, run: Run) -> list[Sequence[float]]:
    """The learning rates to try on each fold: the one that the first seed has chosen, or all."""
    first = replace(run, seed=RATE_SEED).load(target)
    if first and run.seed != RATE_SEED:
        return [(params["learning_rate"],) for params in first.params]
    return [transfer.LEARNING_RATES] * N_FOLDS


def train_folds(
    target: Target,
    predict: PredictFold,
    calls: Sequence[tuple[Any, ...]],
    key: dict[str, Any],
    arguments: argparse.Namespace,
) -> tuple[np.ndarray, np.ndarray | None, list[dict[str, Any]]]:
    """All folds of a target, those aside that an interrupted run has left behind.

    Parameters
    ----------
    target : Target
    predict : callable
        ``predict(target, split, *call, unfinished=folder)`` trains on a fold and gives its
        predictions, their standard deviations or None, and what it chose. The folder keeps what has
        been trained until the fold is finished; None while another process is at work in it.
    calls : sequence of tuple
        For each fold.
    key : dict
        All that changes the predictions; its ``model`` and ``seed`` are shown.
    arguments : argparse.Namespace
        Its ``output_dir`` and ``jobs``.

    Returns
    -------
    predictions : numpy.ndarray, shape (n,)
    std : numpy.ndarray, shape (n,), or None
    params : list of dict
    """
    splits, task = target.splits(), target.task
    store = FoldStore(arguments.output_dir / "folds", task.dataset_name, key)
    tests = [task.validation[name].test for name in task.folds_keys]
    kept = {fold: store.load(fold, ids) for fold, ids in enumerate(tests)}
    missing = [fold for fold, record in kept.items() if record is None]
    tasks = [
        (fold, store.unfinished(fold), predict, target, splits[fold], *calls[fold])
        for fold in missing
    ]
    with tqdm(total=len(splits), initial=len(splits) - len(missing), unit="fold") as bar:
        bar.set_description(f"{key['model']}, seed {key['seed']}, {target.name}")
        for fold, predictions, std, params in in_parallel(_train_fold, tasks, arguments.jobs):
            spread = None if std is None else std.tolist()
            store.save(fold, tests[fold], predictions.tolist(), spread, params)
            bar.update()
    records = [store.load(fold, ids) or {} for fold, ids in enumerate(tests)]
    predictions, std = np.empty((2, len(target.values)))
    for (_, test), record in zip(splits, records, strict=True):
        predictions[test] = record["predictions"]
        std[test] = np.nan if record["std"] is None else record["std"]
    known = None if np.isnan(std).any() else std
    return predictions, known, [record["params"] for record in records]


def _train_fold(
    fold: int, unfinished: Path, predict: PredictFold, *call: Any
) -> tuple[int, np.ndarray, np.ndarray | None, dict[str, Any]]:
    with unfinished_folder(unfinished) as place:
        return fold, *predict(*call, unfinished=place)


def runs_of(
    model: str,
    encoder: str | None,
    protocol: str,
    arguments: argparse.Namespace,
    epochs: int,
) -> list[Run]:
    """The seeds of a model: what makes their predictions, and the command that repeats them."""
    config = transfer.CONFIG if protocol == "transfer" else PolySRLConfig.named(arguments.config)
    named = f"--models {model}"
    if model not in (*MODELS, *BASELINES, *PEERS):
        # a record names no folder of the machine it was made on
        named = f"--encoder {Path(str(encoder)).name} --name {model}"
    command = f"{named} --protocols {protocol} --seeds {arguments.seeds[-1] + 1}"
    if arguments.config != "default":
        command += f" --config {arguments.config}"
    made_by = {"encoder": start_of(encoder, config), "config": arguments.config, "epochs": epochs}
    if model in BASELINES:
        made_by["encoder"] = "none"
    elif model in PEERS:
        made_by = peer_settings(model)
    settings = {"model": model, "protocol": protocol, **made_by, "arguments": command.split()}
    suite = arguments.suite
    place = (arguments.output_dir, f"{suite}_scores.csv", RUNNERS[suite])
    return [Run(settings, seed, *place) for seed in arguments.seeds]


def arguments_of(
    argv: list[str] | None, suite: str, targets_of: TargetsOf, description: str
) -> argparse.Namespace:
    """Parse the command line; what cannot be run ends it with one line."""
    parser = runner_parser(f"{description}\n{__doc__}")
    add = parser.add_argument
    known = (*MODELS, *BASELINES)
    every = (*known, *PEERS)
    add("--models", nargs="+", choices=every, default=known, metavar="MODEL", help=", ".join(every))
    add("--protocols", nargs="+", choices=PROTOCOLS, default=PROTOCOLS)
    add("--targets", nargs="+", metavar="TARGET", help="names; default: all")
    folds = "representation only; publication: of the targets whose rows name theirs (ESTM)"
    add("--folds", nargs="+", choices=list(FOLDS), default=["matbench"], help=folds)
    add("--encoder", help="run this saved model (name, folder or file) instead of the models")
    add("--name", help="label of --encoder in the column model; default: name of its folder")
    add("--config", default="default", choices=("paper", "default"), help="of random weights")
    add("--baseline", default="rand_init", help="model to compare with, fold by fold")
    add("--seed", type=int, default=0, help="first seed; transfer trains seed 0 before it")
    add("--seeds", type=int, default=1, help="number of seeds")
    add("--jobs", type=int, default=1, help="folds trained at once in transfer, a process each")
    add("--threads", type=int, default=1, help="of the representation protocol")
    add("--dry-run", action="store_true", help="show what would run; train and write nothing")
    arguments = parser.parse_args(argv)
    arguments.suite = suite
    if min(arguments.seeds, arguments.jobs, arguments.threads) < 1:
        parser.error("--seeds, --jobs and --threads must be at least 1")
    if arguments.name and not arguments.encoder:
        parser.error("--name is the label of --encoder, which is not given")
    arguments.seeds = list(range(arguments.seed, arguments.seed + arguments.seeds))
    if arguments.encoder:
        name = arguments.name or Path(arguments.encoder).name
        arguments.models = {name: arguments.encoder}
    else:
        arguments.models = {
            model: encoder_of(model) if model in MODELS else None for model in arguments.models
        }
    random = arguments.models == {"rand_init": None} and arguments.protocols == ["representation"]
    if arguments.config != "default" and not random:
        needed = "--models rand_init --protocols representation"
        parser.error(f"--config {arguments.config} is of random weights only: give {needed}")
    with refusing(parser):
        arguments.data_dir = find_data_dir(arguments.data_dir)
        targets = targets_of(arguments.data_dir)
    for model, encoder in arguments.models.items():
        if model in PEERS and (line := lacking(model)):
            parser.error(line)
        if encoder is not None and not checkpoint_path(encoder).is_file():
            parser.error(f"{model}: no encoder in {encoder}")
    arguments.targets = chosen_targets(parser, targets, arguments.targets)
    return arguments


def main(
    argv: list[str] | None, suite: str, targets_of: TargetsOf, description: str
) -> pd.DataFrame | None:
    """Run what is missing; print each model beside the baseline and the paper.

    Parameters
    ----------
    argv : list of str or None
    suite : {"wetlab", "paper"}
    targets_of : callable
        Data folder -> targets of the suite.
    description : str
        Of the command.

    Returns
    -------
    pandas.DataFrame or None
        All scores of the file; None after a dry run.
    """
    arguments = arguments_of(argv, suite, targets_of, description)
    for target in arguments.targets:
        print(f"{target.name}: {target.account}; batch size {target.batch_size}")
    if arguments.dry_run:
        print("DRY RUN: nothing is trained and nothing is written")
        print(f"models {', '.join(arguments.models)}; protocols {', '.join(arguments.protocols)}")
        print(f"seeds {arguments.seeds}, 5 folds")
        return None
    torch.set_num_threads(arguments.threads)
    with output_folder(arguments.output_dir):
        for model, encoder in arguments.models.items():
            if "representation" in arguments.protocols and model not in PEERS:
                run_representation(model, encoder, arguments.targets, arguments)
            if "transfer" in arguments.protocols and model not in BASELINES:
                run_transfer(model, encoder, arguments.targets, arguments)
    scores = pd.read_csv(arguments.output_dir / f"{suite}_scores.csv")
    names = [target.name for target in arguments.targets]
    known = (arguments.suite, names, arguments.data_dir, (*MODELS, *PEERS))
    for model in arguments.models:
        if text := comparison(scores, model, arguments.baseline, *known):
            print(text, end="\n\n")
    return scores
