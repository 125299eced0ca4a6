"""Whether predictions are worse for formulas that lie far from a reference.

    python benchmarks/domain.py --data-dir DATA

Two references: the formulas that a fold was trained on, and the stoichiometries of the encoder's
pretraining. The errors are those of the shipped encoder in the representation protocol, the mean
over the seeds of its records. For what ``polysrl predict`` writes, the first reference once more
with the three encoders of the recipe *frozen*, and whether its cross-validated standard deviations,
without and with the distance in them, know what lies outside. Writes ``domain.csv``.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from command_line import refusing, runner_parser
from files import write_csv
from paper_records import absolute_errors, load_record
from scipy.stats import spearmanr
from targets import Target, wetlab_targets
from tasks import required_data_dir, structures_path

from polysrl_dc import RECIPES, Domain, PolymorphDataset, PolySRLModel
from polysrl_dc.domain import OutsideDomainWarning
from polysrl_dc.recalibration import LAPLACE_95

#: Recipes that cross-validate their standard deviations; the second is ``polysrl train --folds 5``.
CALIBRATED = ("frozen, std cross-validated", "frozen, std cross-validated, distance")


def by_distance(
    distance: np.ndarray,
    outside: np.ndarray,
    errors: np.ndarray,
    std: np.ndarray | None = None,
) -> dict[str, float]:
    """How errors go with the distance to the nearest formula of the reference.

    Parameters
    ----------
    distance : numpy.ndarray, shape (n,)
    outside : numpy.ndarray, shape (n,), bool
    errors : numpy.ndarray, shape (n,)
    std : numpy.ndarray, shape (n,), optional
        In the unit of the errors.

    Returns
    -------
    dict
        ``spearman`` and its ``p``, mean errors ``inside``, ``outside``, of the ``nearest`` and the
        ``farthest`` quarter; NaN where there is no row. With standard deviations also their means
        and the shares of errors within 95 % intervals of the same four parts.

    Examples
    --------
    >>> far = np.array([False, False, True])
    >>> by_distance(np.array([0.0, 0.1, 0.9]), far, np.array([1.0, 2.0, 6.0]))["outside"]
    6.0
    >>> args = np.array([0.0, 0.1, 0.9]), far, np.array([1.0, 2.0, 6.0]), np.array([0.4, 1.0, 3.0])
    >>> found = by_distance(*args)
    >>> found["in_95_inside"], found["in_95_outside"], found["std_outside"]
    (0.5, 1.0, 3.0)
    """

    test = spearmanr(distance, errors)
    found = {
        "n": len(errors),
        "n_outside": int(outside.sum()),
        "spearman": test.statistic,
        "p": test.pvalue,
    }
    parts = {
        "inside": ~outside,
        "outside": outside,
        "nearest": distance <= np.quantile(distance, 0.25),
        "farthest": distance >= np.quantile(distance, 0.75),
    }
    values = {"": errors}
    if std is not None:
        values |= {"std_": std, "in_95_": errors <= LAPLACE_95 * std}
    for prefix, each in values.items():
        for name, part in parts.items():
            found[prefix + name] = float(each[part].mean()) if part.any() else np.nan
    return found


def errors_and_std(target: Target, output_dir: Path, recipe: str) -> tuple[np.ndarray, np.ndarray]:
    """Those of a recipe, (n,) each, on the reporting scale.

    Raises
    ------
    FileNotFoundError
        They have not been recorded.
    """
    record = load_record(output_dir, target.suite, recipe, "recipe", 0).get(target.name)
    if record is None or record.std is None:
        raise FileNotFoundError(f"no record of {recipe}, {target.name}: recipes.py makes it")
    errors = np.abs(record.predictions - target.values)
    return errors * target.scale, record.std * target.scale


def to_training_formulas(model: PolySRLModel, target: Target) -> tuple[np.ndarray, np.ndarray]:
    """Distance of each row to the formulas its fold was trained on, and whether it is outside."""
    distance, outside = np.empty(len(target.values)), np.empty(len(target.values), bool)
    for train, test in target.splits():
        found = Domain(model, target.formulas[train]).query(target.formulas[test], k=1)
        distance[test], outside[test] = found["distance"], found["outside"]
    return distance, outside


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = runner_parser(__doc__, cache=True)
    add = parser.add_argument
    add("--threads", type=int, default=1)
    arguments = parser.parse_args(argv)
    with refusing(parser):
        data_dir = required_data_dir(arguments.data_dir)
        measured = [
            (
                target,
                absolute_errors(target, arguments.output_dir, "polysrl"),
                [errors_and_std(target, arguments.output_dir, recipe) for recipe in CALIBRATED],
            )
            for target in wetlab_targets(data_dir)
        ]
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore", OutsideDomainWarning)  # they are counted
    model = PolySRLModel.from_pretrained("polysrl-mp")
    path = structures_path(None, data_dir)
    structures = PolymorphDataset(path, on_error="skip", cache_dir=arguments.cache_dir)
    pretraining = Domain(model, structures)
    three = PolySRLModel("regression", **RECIPES["frozen"].settings)
    rows = []
    for target, errors, calibrated in measured:
        found = pretraining.query(target.formulas, k=1)
        to_three = to_training_formulas(three, target)
        name = "training formulas, three encoders"
        parts = {
            f"{name}, distance in std": (*to_three, *calibrated[1]),
            name: (*to_three, *calibrated[0]),
            "training formulas": (*to_training_formulas(model, target), errors),
            "pretraining": (found["distance"].to_numpy(), found["outside"].to_numpy(), errors),
        }
        rows += [
            {"reference": name, "target": target.name, **by_distance(*part)}
            for name, part in parts.items()
        ]
    table = pd.DataFrame(rows).sort_values("reference", ascending=False, kind="stable")
    print(table.round(3).to_markdown(index=False))
    write_csv(arguments.output_dir / "domain.csv", table, digits=4)


if __name__ == "__main__":
    main()
