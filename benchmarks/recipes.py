"""Ways to train ``PolySRLModel``, on the nine wet-lab targets or on Matbench's small tasks.

    python benchmarks/recipes.py --data-dir DATA
    python benchmarks/recipes.py --data-dir DATA --matbench    # as polysrl train would

Each recipe learns from a whole training fold and chooses nothing on a part of it. *single*,
*fine-tuned* and *frozen* are those of the package (``polysrl train --recipe``), the others differ
from one of them in what their names add. Those with a calibrated standard deviation learn from four
fifths and calibrate on the rest (``--hold-out 0.2``) or, cross-validated, learn from all rows and
calibrate by models of four fifths each (``--folds 5``); with the distance in them as ``polysrl
train`` does both, or without. *polysrl train* is the one that the command takes for so many rows:
*frozen*, *fine-tuned* or *large*, uncalibrated.

The folds are those of ``run_wetlab.py`` and, of Matbench, of ``run_matbench.py --paper``.
Predictions go to records as theirs do, scores to ``recipes.csv``, which ``summarize.py`` reads, and
for the first seed of the wet lab those of the uncertainty that the models predict along to
``calibration.csv``. What is there is not trained again.
"""

from __future__ import annotations

import argparse
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from calibration import keep, score_own
from command_line import chosen_targets, refusing, runner_parser
from folds import output_folder, split_validation
from graph_data import Dataset, dataset_of
from paper_protocol import train_folds
from paper_records import Run
from representation import start_of
from scores import read_scores
from targets import N_FOLDS, Target, small_targets, wetlab_targets
from tasks import find_data_dir
from training_state import trained

import polysrl_dc
from polysrl_dc import PolySRLModel, cross_val_predict, keep_formulas, suitable_recipe
from polysrl_dc.checkpoints import DEFAULT_ENCODER
from polysrl_dc.cross_validation import HeldOut
from polysrl_dc.domain import distances_to


@dataclass(frozen=True)
class Recipe:
    """How to train: ``settings`` are arguments of ``PolySRLModel``.

    ``held_out``: part of the training rows that only calibrates the standard deviations;
    ``folds``: parts of a cross-validation that calibrates them instead; ``distance``: whether they
    grow with the distance to the formulas learned from, as those of ``polysrl train`` do.
    """

    epochs: int
    settings: Mapping[str, Any]
    held_out: float
    folds: int
    distance: bool


def _like(
    name: str,
    epochs: int | None = None,
    held_out: float = 0.0,
    folds: int = 0,
    distance: bool = False,
    **changes: Any,
) -> Recipe:
    """A recipe of the package, in which some settings differ."""
    own = polysrl_dc.RECIPES[name]
    return Recipe(epochs or own.epochs, {**own.settings, **changes}, held_out, folds, distance)


#: The smallest rate of the paper's transfer protocol, without the choice among four.
SLOWLY: dict[str, Any] = {"epochs": 500, "schedule": "constant", "learning_rate": 1e-4}
#: The epochs of the frozen recipe, for one encoder.
FROZEN: dict[str, Any] = {"epochs": polysrl_dc.RECIPES["frozen"].epochs, "freeze_encoder": True}
RECIPES = {
    "single": _like("single"),
    "single, batches of 128": _like("single", batch_size=128),
    "single, batches of 128, random start": _like("single", batch_size=128, pretrained=None),
    "single, three members": _like("single", n_ensemble=3),
    "single, random start": _like("single", pretrained=None),
    "single, std calibrated": _like("single", held_out=0.2),
    "single, 500 epochs at 1e-4": _like("single", **SLOWLY),
    "single, 500 epochs at 1e-4, random start": _like("single", **SLOWLY, pretrained=None),
    "single, frozen": _like("single", **FROZEN),
    "single, frozen, std calibrated": _like("single", **FROZEN, held_out=0.2),
    "single, frozen, three heads": _like("single", **FROZEN, n_ensemble=3),
    "fine-tuned": _like("fine-tuned"),
    "fine-tuned, std calibrated": _like("fine-tuned", held_out=0.2),
    "fine-tuned, std calibrated, distance": _like("fine-tuned", held_out=0.2, distance=True),
    "fine-tuned, std cross-validated": _like("fine-tuned", folds=5),
    "fine-tuned, std cross-validated, distance": _like("fine-tuned", folds=5, distance=True),
    "frozen": _like("frozen"),
    "frozen, std calibrated": _like("frozen", held_out=0.2),
    "frozen, std calibrated, distance": _like("frozen", held_out=0.2, distance=True),
    "frozen, std cross-validated": _like("frozen", folds=5),
    "frozen, std cross-validated, distance": _like("frozen", folds=5, distance=True),
}
#: The recipe of the package that suits the rows of a fold.
AS_COMMAND = "polysrl train"
SCORES = "recipes.csv"
#: What :func:`held_out` has found of the folds trained last.
_LATEST: dict[Hashable, tuple[PolySRLModel, Dataset, HeldOut]] = {}
#: All are compared with these: the simplest, what ``polysrl train`` does with so few rows, and
#: what tells whether the encoder helps where no rate is chosen.
FIRST, RECOMMENDED = "single", "frozen"
FIXED_RATE = "single, 500 epochs at 1e-4"
#: As many epochs and rows in a batch as Roost's authors take.
AS_ROOST = "single, batches of 128"


def predict_fold(
    target: Target,
    split: tuple[np.ndarray, np.ndarray],
    recipe: str,
    seed: int,
    unfinished: Path | None = None,
) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Train on the training rows of a fold by a recipe, and predict its test rows.

    From the folder ``unfinished`` the same trainings, if they were interrupted, go on.

    Returns
    -------
    predictions, std : numpy.ndarray, each of shape (n_test,)
        In units of the target; what the model says of its uncertainty.
    params : dict
        What was chosen: nothing.
    """
    torch.set_num_threads(1)
    train, test = split
    way = way_of(recipe, len(train))
    if way.held_out or way.folds:
        model, rows, predicted = held_out(target, train, way, seed, unfinished)
        model.calibrate(rows, predicted=predicted if way.distance else predicted[:2])
    else:
        model = fitted(way, seed, unfinished, dataset_of(target, train))
    mean, std = model.predict_uncertainty(dataset_of(target, test))
    return mean[:, 0], std[:, 0], {}


def way_of(recipe: str, n_rows: int) -> Recipe:
    """The recipe of that name, for so many training rows."""
    return _like(suitable_recipe(n_rows)) if recipe == AS_COMMAND else RECIPES[recipe]


def fitted(way: Recipe, seed: int, unfinished: Path | None, dataset: Dataset) -> PolySRLModel:
    """A model of all these rows."""
    model = PolySRLModel(seed=seed, **way.settings)
    return trained(model, dataset, way.epochs, "training", unfinished)


def held_out(
    target: Target, train: np.ndarray, way: Recipe, seed: int, unfinished: Path | None
) -> tuple[PolySRLModel, Dataset, HeldOut]:
    """A model, rows to calibrate it on, and predictions of these that have not learned from them.

    Recipes that differ in ``distance`` only share them if they follow one another.
    """
    asked = (str(way.settings), way.epochs, way.held_out, way.folds, seed)
    key = (target.name, train.tobytes(), *asked)
    if key not in _LATEST:
        if len(_LATEST) == N_FOLDS:
            del _LATEST[next(iter(_LATEST))]
        train_on = partial(fitted, way, seed, unfinished)
        if way.folds:
            learned = rows = dataset_of(target, train)
        else:
            parts = split_validation(target.formulas[train], way.held_out, seed)
            learned, rows = (dataset_of(target, train[part]) for part in parts)
        model = train_on(learned)
        keep_formulas(model, learned)
        if way.folds:
            found = cross_val_predict(train_on, rows, way.folds, seed=seed)
        else:
            said = model.predict_uncertainty(rows, polymorphs=True)
            found = HeldOut(*said, distances_to(model, learned, rows))
        _LATEST[key] = model, rows, found
    return _LATEST[key]


def main(argv: list[str] | None = None) -> None:
    """Train what is missing, score and print."""
    parser = runner_parser(__doc__)
    add = parser.add_argument
    every = [*RECIPES, AS_COMMAND]
    said = f"default: all, with --matbench {AS_COMMAND!r}; {'; '.join(every)}"
    add("--recipes", nargs="+", choices=every, metavar="RECIPE", help=said)
    add("--matbench", action="store_true", help="the small tasks of Matbench, not the wet lab")
    add("--targets", nargs="+", metavar="TARGET", help="names; default: all")
    add("--seeds", type=int, default=1, help="number of seeds")
    add("--jobs", type=int, default=1, help="folds trained at once, a process each")
    add("--dry-run", action="store_true", help="show what would run; train and write nothing")
    arguments = parser.parse_args(argv)
    if min(arguments.seeds, arguments.jobs) < 1:
        parser.error("--seeds and --jobs must be at least 1")
    arguments.recipes = arguments.recipes or ([AS_COMMAND] if arguments.matbench else [*RECIPES])
    targets_of = small_targets if arguments.matbench else wetlab_targets
    with refusing(parser):
        found = targets_of(find_data_dir(arguments.data_dir))
    chosen = chosen_targets(parser, found, arguments.targets)
    print(f"{', '.join(arguments.recipes)}; {len(chosen)} targets, {arguments.seeds} seeds")
    if arguments.dry_run:
        return
    with output_folder(arguments.output_dir):
        for seed in range(arguments.seeds):
            for target in chosen:
                for recipe in arguments.recipes:
                    train_missing(target, recipe, seed, arguments)
    scores = read_scores(arguments.output_dir / SCORES)
    scores = scores[(scores["metric"] == "mae") & (scores["suite"] == chosen[0].suite)]
    errors = scores.pivot_table("value", "task", "model", sort=False)
    print(errors[[recipe for recipe in every if recipe in errors]].round(3).to_markdown())
    if arguments.matbench:
        return
    said = uncertainties(pd.read_csv(arguments.output_dir / "calibration.csv"))
    print(f"\nWhat they say of their errors, seed 0:\n\n{said.to_markdown(floatfmt='.3f')}")


def train_missing(target: Target, recipe: str, seed: int, arguments: argparse.Namespace) -> None:
    """Train a recipe on the folds of a target, unless that is done; write record and scores."""
    command = ["--recipes", recipe, "--seeds", str(seed + 1)]
    command += ["--matbench"] * (target.suite == "paper")
    n_rows = len(target.splits()[0][0])
    settings = {**settings_of(recipe, seed, n_rows), "protocol": "recipe", "arguments": command}
    run = Run(settings, seed, arguments.output_dir, SCORES, "recipes.py")
    if run.is_done(target, target.suite):
        return
    calls = [(recipe, seed)] * N_FOLDS
    key = {**run.made_by, "seed": seed}
    predictions, std, params = train_folds(target, predict_fold, calls, key, arguments)
    if seed == 0 and std is not None and target.suite == "wetlab":
        keep(arguments.output_dir, score_own(target, recipe, "recipe", predictions, std))
    run.save(target, predictions, params, std)
    run.score(target, predictions, target.suite, target.splits())


def uncertainties(table: pd.DataFrame) -> pd.DataFrame:
    """Scores of the recipes' own standard deviations: means over their targets, a row for each.

    Parameters
    ----------
    table : pandas.DataFrame
        ``calibration.csv``.
    """
    own = table[table["protocol"] == "recipe"]
    of = own.pivot_table("value", ["encoder", "target"], "metric")
    scores = {
        **{f"in {level} %": of[f"coverage_{level}"] for level in (50, 80, 95)},
        "CRPS / MAE": of["crps"] / of["mae"],
        "miscal. area": of["miscalibration_area"],
        "AUSE": of["ause"],
        "MAE of 80 % / MAE": of["mae_kept"] / of["mae"],
    }
    found = pd.DataFrame(scores).groupby("encoder").mean()
    inside = of["coverage_95"].groupby("encoder")
    found.insert(3, "lowest", inside.min())
    found.insert(4, "highest", inside.max())
    found["targets"] = inside.size()
    return found.loc[[recipe for recipe in RECIPES if recipe in found.index]]


def encoders_of(settings: Mapping[str, Any]) -> Sequence[str]:
    """Encoders that a recipe of such settings starts from; none: random weights."""
    return settings.get("pretrained", (DEFAULT_ENCODER,)) or ()


def settings_of(recipe: str, seed: int, n_rows: int) -> dict[str, Any]:
    """Everything that changes the predictions of so many training rows, and the recipe's name.

    Not how ``calibrate`` works: records of calibrated recipes must be removed when that
    changes.
    """
    way = way_of(recipe, n_rows)
    model = PolySRLModel(seed=seed, **way.settings)
    starts: Sequence[str | None] = encoders_of(way.settings) or [None]
    start = ", ".join(start_of(one, model.config) for one in starts)
    key = {**model.settings, **model.training, "epochs": way.epochs, "start": start}
    del key["n_encoders"]  # follows from the start
    parts = {"held_out": way.held_out, "folds": way.folds, "distance": way.distance}
    return {**key, "model": recipe, **{name: part for name, part in parts.items() if part}}


if __name__ == "__main__":
    main()
