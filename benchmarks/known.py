"""Whether pretraining helps beyond the compounds that it has seen.

    python benchmarks/known.py --data-dir DATA

Of each encoder and wet-lab target: the mean error over the formulas whose composition is among
those of pretraining and over the others, beside that of the random start on the same rows. Errors
are those of the representation protocol, means over the seeds of its records. Writes ``known.csv``.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from command_line import refusing, runner_parser
from files import write_csv
from folds import group_key
from labels import MP_PROPERTIES
from paper_records import absolute_errors
from scipy.stats import ttest_ind
from targets import matbench_target, wetlab_targets
from tasks import required_data_dir, structures_path

from polysrl_dc import PolymorphDataset

START = "rand_init"


def gain(errors: np.ndarray, start: np.ndarray, known: np.ndarray) -> dict[str, float]:
    """How much lower errors are than those of a start, by whether the rows are known.

    Parameters
    ----------
    errors, start : numpy.ndarray, shape (n,)
        Absolute errors.
    known : numpy.ndarray, shape (n,), bool

    Returns
    -------
    dict
        Numbers of rows, relative changes of the mean error (negative: lower), NaN where there is no
        row, and p of Welch's t-test between the differences of known and other rows.

    Examples
    --------
    >>> known = np.array([True, True, False, False])
    >>> found = gain(np.array([1.0, 2.0, 3.0, 3.0]), np.array([2.0, 2.0, 3.0, 3.0]), known)
    >>> found["known"], found["other"]
    (-0.25, 0.0)
    """
    change = errors - start
    parts = {"known": known, "other": ~known}
    sizes = {f"n_{name}": int(rows.sum()) for name, rows in parts.items()}
    means = {
        name: float(change[rows].mean() / start[rows].mean()) if rows.any() else np.nan
        for name, rows in parts.items()
    }
    enough = min(sizes.values()) > 1
    p = ttest_ind(change[known], change[~known], equal_var=False).pvalue if enough else np.nan
    return {**sizes, **means, "p": float(p)}


def seen_by(data_dir: Path, cache_dir: str | None) -> dict[str, set[str]]:
    """Reduced formulas that each encoder's pretraining has seen."""
    structures = PolymorphDataset(
        structures_path(None, data_dir), on_error="skip", cache_dir=cache_dir
    )
    shown = {group_key(formula) for formula in structures.formulas}
    labelled = {
        model: set(matbench_target(name, data_dir).formulas)
        for model, name in MP_PROPERTIES.items()
    }
    return {**labelled, **dict.fromkeys(("graphcl", "infomax3d", "polysrl"), shown)}


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = runner_parser(__doc__, cache=True)
    arguments = parser.parse_args(argv)
    place, rows = arguments.output_dir, []
    with refusing(parser):
        data_dir = required_data_dir(arguments.data_dir)
        seen = seen_by(data_dir, arguments.cache_dir)
        for target in wetlab_targets(data_dir):
            start = absolute_errors(target, place, START)
            for model, formulas in seen.items():
                known = np.array([formula in formulas for formula in target.compositions])
                found = gain(absolute_errors(target, place, model), start, known)
                rows.append({"target": target.name, "model": model, **found})
    table = pd.DataFrame(rows)
    print(table.round(3).to_markdown(index=False))
    write_csv(place / "known.csv", table, digits=4)


if __name__ == "__main__":
    main()
