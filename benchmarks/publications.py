"""Whether the error and the intervals that cross-validation promises hold for new publications.

    python benchmarks/publications.py --data-dir DATA

The targets whose rows name their publication (ESTM), five folds none of which shares one with its
training rows. On the training rows a model is fitted, by the recipe that suits their number
(*frozen*), and its standard deviation is calibrated by cross-validation, once in parts that share
no formula (``polysrl train --folds 5``) and once in parts that share no publication either
(``--group``), each without and with the distance to what it has learned from (with it in
``polysrl train``).
What both say of the test rows stands beside what happened. Writes ``publications.csv``.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
import torch
from command_line import refusing, runner_parser
from files import write_csv
from folds import output_folder
from graph_data import Dataset, dataset_of
from intervals import Laplace
from sklearn.metrics import mean_absolute_error
from targets import Target, wetlab_targets
from tasks import find_data_dir
from tqdm import tqdm

from polysrl_dc import (
    RECIPES,
    PolySRLModel,
    cross_val_predict,
    keep_formulas,
    suitable_recipe,
)

COLUMNS = ["target", "parts", "distance", "fold", "expected_mae", "mae", "in_95", "half_width"]
Fit = Callable[[Dataset], PolySRLModel]


def fitted(dataset: Dataset) -> PolySRLModel:
    """What ``polysrl train`` makes of these rows."""
    recipe = RECIPES[suitable_recipe(len(dataset))]
    model = PolySRLModel(**recipe.settings)
    model.fit(dataset, nb_epoch=recipe.epochs, checkpoint_interval=0)
    return model


def score_fold(
    target: Target, train: np.ndarray, test: np.ndarray, fit: Fit = fitted
) -> list[dict[str, float | str]]:
    """What two kinds of cross-validation promise of a fold, and what is true.

    Returns
    -------
    list of dict
        Of each kind, without and with ``distance`` to the formulas learned from in the intervals:
        ``expected_mae`` of the cross-validation and ``mae`` on the test rows, the share of these
        inside the 95 % intervals, and the mean half width of the intervals; in reported units.
    """
    learned, asked = dataset_of(target, train), dataset_of(target, test)
    model, found = fit(learned), list[dict[str, float | str]]()
    keep_formulas(model, learned)
    assert target.publications is not None
    parts = {"formula": None, "publication": target.publications[train]}
    for name, groups in parts.items():
        predicted = cross_val_predict(fit, learned, 5, groups=groups)
        expected = mean_absolute_error(target.values[train], predicted.mean[:, 0])
        for distance in (False, True):
            model.calibrate(learned, predicted=predicted if distance else predicted[:2])
            mean, std = (values[:, 0] for values in model.predict_uncertainty(asked))
            errors, half = np.abs(mean - target.values[test]), Laplace().half_widths(std, 0.95)
            found.append(
                {
                    "parts": name,
                    "distance": distance,
                    "expected_mae": float(expected) * target.scale,
                    "mae": float(errors.mean()) * target.scale,
                    "in_95": float((errors <= half).mean()),
                    "half_width": float(half.mean()) * target.scale,
                }
            )
    return found


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = runner_parser(__doc__)
    add = parser.add_argument
    add("--threads", type=int, default=1)
    arguments = parser.parse_args(argv)
    with refusing(parser):
        found = wetlab_targets(find_data_dir(arguments.data_dir))
    torch.set_num_threads(arguments.threads)
    folds = [
        (target, fold, split)
        for target in found
        if target.publications is not None
        for fold, split in enumerate(target.splits(target.publications))
    ]
    with output_folder(arguments.output_dir):
        rows = [
            {"target": target.name, "fold": fold, **row}
            for target, fold, split in tqdm(folds, unit="fold")
            for row in score_fold(target, *split)
        ]
        table = pd.DataFrame(rows, columns=COLUMNS)
        write_csv(arguments.output_dir / "publications.csv", table)
    means = table.groupby(["target", "parts", "distance"], sort=False)[COLUMNS[4:]].mean()
    print(means.round(3).to_markdown())


if __name__ == "__main__":
    main()
