"""Ways to train ``PolySRLModel`` on a small data set, on the nine wet-lab targets.

    python benchmarks/recipes.py --data-dir DATA

Each recipe learns from a whole training fold and chooses nothing on a part of it; it has one
member, which starts from ``polysrl-mp``, unless its name says otherwise. The package's own are
*fine-tuned* (``polysrl train --recipe single``), *fine-tuned, three encoders* and *frozen, 300
epochs, three encoders* (``--recipe frozen``, what it does below a thousand rows). Those with a
calibrated standard deviation learn from four fifths and calibrate on the rest (``--hold-out 0.2``)
or, cross-validated, learn from all rows and calibrate by models of four fifths each (``--folds
5``). The folds are those of ``run_wetlab.py``. Scores go to ``recipes.csv``, which
``summarize.py`` reads, and for the first seed those of the uncertainty that the models predict
along to ``calibration.csv``; finished folds are kept.
"""

from __future__ import annotations

import argparse
from dataclasses import astuple, dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from calibration import merge, score_own
from command_line import refusing, runner_parser
from folds import output_folder, split_validation
from graph_data import Dataset, dataset_of
from paper_protocol import train_folds
from paper_records import prediction_scores
from representation import representation_digest
from scores import merge_scores
from targets import N_FOLDS, Target, wetlab_targets
from tasks import find_data_dir

import polysrl_dc
from polysrl_dc import PolySRLModel, cross_val_predict
from polysrl_dc.checkpoints import DEFAULT_ENCODER


@dataclass(frozen=True)
class Recipe:
    """How to train: ``settings`` are what differs from the defaults of ``PolySRLModel``.

    ``held_out``: part of the training rows that only calibrates the standard deviations;
    ``folds``: parts of a cross-validation that calibrates them instead.
    """

    epochs: int = 100
    settings: dict[str, Any] = field(default_factory=dict)
    held_out: float = 0.0
    folds: int = 0


#: The smallest rate of the paper's transfer protocol, without the choice among four.
SLOWLY = {"schedule": "constant", "learning_rate": 1e-4}
#: A member on each of three encoders, which stay as they are.
THREE = dict(polysrl_dc.RECIPES["frozen"].settings)
RECIPES = {
    "fine-tuned": Recipe(),
    "fine-tuned, batches of 128": Recipe(settings={"batch_size": 128}),
    "fine-tuned, random start": Recipe(settings={"pretrained": None}),
    "fine-tuned, three encoders": Recipe(settings={"pretrained": THREE["pretrained"]}),
    "fine-tuned, std calibrated": Recipe(held_out=0.2),
    "fine-tuned, 500 epochs at 1e-4": Recipe(500, SLOWLY),
    "fine-tuned, 500 epochs at 1e-4, random start": Recipe(500, {**SLOWLY, "pretrained": None}),
    "frozen, 300 epochs": Recipe(300, {"freeze_encoder": True}),
    "frozen, 300 epochs, std calibrated": Recipe(300, {"freeze_encoder": True}, held_out=0.2),
    "frozen, 300 epochs, three heads": Recipe(300, {"freeze_encoder": True, "n_ensemble": 3}),
    "frozen, 300 epochs, three encoders": Recipe(300, THREE),
    "frozen, 300 epochs, three encoders, std calibrated": Recipe(300, THREE, held_out=0.2),
    "frozen, 300 epochs, three encoders, std cross-validated": Recipe(300, THREE, folds=5),
}
#: All are compared with these: the simplest, what ``polysrl train`` does with so few rows, and
#: what tells whether the encoder helps where no rate is chosen.
FIRST, RECOMMENDED = "fine-tuned", "frozen, 300 epochs, three encoders"
FIXED_RATE = "fine-tuned, 500 epochs at 1e-4"


def predict_fold(
    target: Target, split: tuple[np.ndarray, np.ndarray], recipe: str, seed: int, threads: int = 1
) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Train on the training rows of a fold by a recipe, and predict its test rows.

    Returns
    -------
    predictions, std : numpy.ndarray, each of shape (n_test,)
        In units of the target; what the model says of its uncertainty.
    params : dict
        What was chosen: nothing.
    """
    torch.set_num_threads(threads)
    train, test = split
    epochs, settings, held_out, folds = astuple(RECIPES[recipe])

    def fitted(dataset: Dataset) -> PolySRLModel:
        model = PolySRLModel(seed=seed, **settings)
        model.fit(dataset, nb_epoch=epochs, checkpoint_interval=0)
        return model

    if held_out:
        learned, kept = split_validation(target.formulas[train], held_out, seed)
        model = fitted(dataset_of(target, train[learned]))
        model.calibrate(dataset_of(target, train[kept]))
    else:
        dataset = dataset_of(target, train)
        model = fitted(dataset)
        if folds:
            model.calibrate(dataset, predicted=cross_val_predict(fitted, dataset, folds, seed=seed))
    mean, std = model.predict_uncertainty(dataset_of(target, test))
    return mean[:, 0], std[:, 0], {}


def main(argv: list[str] | None = None) -> None:
    """Train what is missing, score and print."""
    parser = runner_parser(__doc__)
    add = parser.add_argument
    add("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES), metavar="RECIPE")
    add("--targets", nargs="+", metavar="TARGET", help="names; default: all")
    add("--seeds", type=int, default=1, help="number of seeds")
    add("--jobs", type=int, default=1, help="folds trained at once, a process each")
    add("--dry-run", action="store_true", help="show what would run; train and write nothing")
    arguments = parser.parse_args(argv)
    if min(arguments.seeds, arguments.jobs) < 1:
        parser.error("--seeds and --jobs must be at least 1")
    with refusing(parser):
        found = wetlab_targets(find_data_dir(arguments.data_dir))
    targets = {target.name: target for target in found}
    if unknown := sorted(set(arguments.targets or ()) - set(targets)):
        parser.error(f"no target is named {unknown[0]!r}; the targets are: {', '.join(targets)}")
    chosen = [targets[name] for name in arguments.targets or targets]
    print(f"{', '.join(arguments.recipes)}; {len(chosen)} targets, {arguments.seeds} seeds")
    if arguments.dry_run:
        return
    with output_folder(arguments.output_dir):
        for seed in range(arguments.seeds):
            for target in chosen:
                for recipe in arguments.recipes:
                    scores = run(target, recipe, seed, arguments)
    errors = scores[scores["metric"] == "mae"].pivot_table("value", "task", "model", sort=False)
    print(errors[[recipe for recipe in RECIPES if recipe in errors]].round(3).to_markdown())
    said = uncertainties(pd.read_csv(arguments.output_dir / "calibration.csv"))
    print(f"\nWhat they say of their errors, seed 0:\n\n{said.to_markdown(floatfmt='.3f')}")


def run(target: Target, recipe: str, seed: int, arguments: argparse.Namespace) -> pd.DataFrame:
    """Train the folds that are missing, write the scores, and return all there are."""
    calls, name = [(recipe, seed)] * N_FOLDS, f"recipes_{target.name}"
    key = settings_of(recipe, seed)
    predictions, std, _ = train_folds(target, predict_fold, calls, key, arguments, name)
    if seed == 0 and std is not None:
        own = score_own(target, recipe, "recipe", predictions, std)
        merge(arguments.output_dir / "calibration.csv", own)
    about = (target.suite, "recipe", recipe, seed)
    scores = prediction_scores(target, predictions, target.splits(), *about)
    return merge_scores(arguments.output_dir / "recipes.csv", scores)


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


def settings_of(recipe: str, seed: int) -> dict[str, Any]:
    """Everything that changes the predictions, and the recipe's name.

    Not how ``calibrate`` works: when that changes, the folds of calibrated recipes must be removed.
    """
    epochs, settings, held_out, folds = astuple(RECIPES[recipe])
    model = PolySRLModel(seed=seed, **settings)
    start, encoders = "random weights", settings.get("pretrained", [DEFAULT_ENCODER])
    if encoders is not None:
        start = ", ".join(representation_digest(name) for name in encoders)
    key = {**model.settings, **model.training, "epochs": epochs, "start": start, "model": recipe}
    del key["n_encoders"]  # follows from the start
    parts = {"held_out": held_out, "folds": folds}
    return {**key, **{name: part for name, part in parts.items() if part}}


if __name__ == "__main__":
    main()
