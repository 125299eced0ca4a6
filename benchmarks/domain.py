"""Whether predictions are worse for formulas that lie far from a reference.

    python benchmarks/domain.py --data-dir DATA

Two references: the formulas that a fold was trained on, and the stoichiometries of the encoder's
pretraining. The errors are those of the shipped encoder in the representation protocol, the mean
over the seeds of its records. Writes ``domain.csv``.
"""

from __future__ import annotations

import warnings

import numpy as np
import pandas as pd
import torch
from command_line import refusing, runner_parser
from files import write_csv
from paper_records import absolute_errors
from scipy.stats import spearmanr
from targets import Target, wetlab_targets
from tasks import required_data_dir, structures_path

from polysrl_dc import Domain, PolymorphDataset, PolySRLModel
from polysrl_dc.domain import OutsideDomainWarning


def by_distance(distance: np.ndarray, outside: np.ndarray, errors: np.ndarray) -> dict[str, float]:
    """How errors go with the distance to the nearest formula of the reference.

    Parameters
    ----------
    distance, errors : numpy.ndarray, shape (n,)
    outside : numpy.ndarray, shape (n,), bool

    Returns
    -------
    dict
        ``spearman`` and its ``p``, mean errors ``inside``, ``outside``, of the ``nearest`` and the
        ``farthest`` quarter; NaN where there is no row.

    Examples
    --------
    >>> far = np.array([False, False, True])
    >>> by_distance(np.array([0.0, 0.1, 0.9]), far, np.array([1.0, 2.0, 6.0]))["outside"]
    6.0
    """

    def mean(rows: np.ndarray) -> float:
        return float(errors[rows].mean()) if rows.any() else np.nan

    test = spearmanr(distance, errors)
    return {
        "n": len(errors),
        "n_outside": int(outside.sum()),
        "spearman": test.statistic,
        "p": test.pvalue,
        "inside": mean(~outside),
        "outside": mean(outside),
        "nearest": mean(distance <= np.quantile(distance, 0.25)),
        "farthest": mean(distance >= np.quantile(distance, 0.75)),
    }


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
            (target, absolute_errors(target, arguments.output_dir, "polysrl"))
            for target in wetlab_targets(data_dir)
        ]
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore", OutsideDomainWarning)  # they are counted
    model = PolySRLModel.from_pretrained("polysrl-mp")
    path = structures_path(None, data_dir)
    structures = PolymorphDataset(path, on_error="skip", cache_dir=arguments.cache_dir)
    pretraining = Domain(model, structures)
    rows = []
    for target, errors in measured:
        found = pretraining.query(target.formulas, k=1)
        pairs = {
            "training formulas": to_training_formulas(model, target),
            "pretraining": (found["distance"].to_numpy(), found["outside"].to_numpy()),
        }
        rows += [
            {"reference": name, "target": target.name, **by_distance(*pair, errors)}
            for name, pair in pairs.items()
        ]
    table = pd.DataFrame(rows).sort_values("reference", ascending=False, kind="stable")
    print(table.round(3).to_markdown(index=False))
    write_csv(arguments.output_dir / "domain.csv", table, digits=4)


if __name__ == "__main__":
    main()
