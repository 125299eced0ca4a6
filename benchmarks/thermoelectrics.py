"""Physical validity of the wet-lab predictions: the figure of merit ZT, Figures 7 and 8, Table 1.

    python benchmarks/thermoelectrics.py --data-dir DATA --seeds 3

Electrical conductivity, thermal conductivity and Seebeck coefficient that ``run_wetlab.py`` has
predicted for the rows of ESTM are brought back to physical units and combined to ZT at 300 and
600 K. The truth is ZT of the three measured values by the same formula. Nothing is trained; what
has no record is named and left out. ``thermoelectrics.csv`` (scores of each seed; fold -1: all rows
at once), ``thermoelectrics_outliers.csv`` and ``figures/*.png`` in the output folder are replaced,
and hold the models of the command.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from command_line import refusing, runner_parser
from files import write_csv
from magpie import BASELINES
from numpy.typing import ArrayLike
from paired import published
from paper_models import MODELS
from paper_protocol import PROTOCOLS, RUNNERS
from paper_records import load_record, prediction_scores
from scores import COLUMNS
from sklearn.metrics import precision_recall_fscore_support
from targets import Target, estm_rows
from tasks import find_data_dir
from thermoelectrics_figures import scatter_figure, screening_figure
from uncertainty_figures import save

SUITE = "wetlab"
#: ZT from which a material counts as found, by temperature in K (Appendix F.3).
THRESHOLDS = {300: 0.8, 600: 1.1}
#: Columns of ESTM and units, in the order of all arrays (3, n) here; and the names of the targets.
PROPERTIES = {
    "electrical_conductivity": "S/m",
    "thermal_conductivity": "W/mK",
    "seebeck_coefficient": "µV/K",
}
TARGETS = ("electrical_conductivity", "thermal_conductivity", "seebeck")
N_OUTLIERS = 10


def zt(sigma: ArrayLike, kappa: ArrayLike, seebeck: ArrayLike, kelvin: ArrayLike) -> np.ndarray:
    """Figure of merit of a thermoelectric, ZT = S² sigma T / kappa (Section 5.2).

    Parameters
    ----------
    sigma, kappa, seebeck : array_like, shape (n,)
        Electrical conductivity in S/m, thermal conductivity in W/mK, Seebeck coefficient in µV/K.
    kelvin : array_like
        Temperature in K.

    Returns
    -------
    numpy.ndarray, shape (n,)
        Without unit.

    Examples
    --------
    >>> zt([1e5], [1.0], [-200.0], 300).round(6)
    array([1.2])
    """
    volts = np.asarray(seebeck, dtype=float) * 1e-6
    return volts**2 * np.asarray(sigma) * np.asarray(kelvin) / np.asarray(kappa)


def screening(true: np.ndarray, predicted: np.ndarray, threshold: float) -> dict[str, float]:
    """How well predictions find the materials at or above a threshold (Figure 8).

    Parameters
    ----------
    true, predicted : numpy.ndarray, shape (n,)
    threshold : float
        In the same unit.

    Returns
    -------
    dict
        precision, recall, f1 (0 where undefined), n_true and n_predicted (rows at or above it).

    Examples
    --------
    >>> screening(np.array([1.0, 0.9, 0.1]), np.array([0.8, 0.7, 0.2]), 0.8)["recall"]
    0.5
    """
    wanted, found = true >= threshold, predicted >= threshold
    scores = precision_recall_fscore_support(wanted, found, average="binary", zero_division=0)
    named = {name: float(scores[i]) for i, name in enumerate(("precision", "recall", "f1"))}
    return {**named, "n_true": float(wanted.sum()), "n_predicted": float(found.sum())}


@dataclass(frozen=True)
class Measured:
    """The rows of ESTM near a temperature.

    Attributes
    ----------
    kelvin : {300, 600}
        Temperature of the formula, for truth and predictions; that of a row is up to 8 K from it.
    rows : pandas.DataFrame, n rows
        Of :func:`targets.estm_rows`.
    """

    kelvin: int
    rows: pd.DataFrame

    @property
    def threshold(self) -> float:
        """ZT of :data:`THRESHOLDS`."""
        return THRESHOLDS[self.kelvin]

    @cached_property
    def properties(self) -> np.ndarray:
        """The measured properties, (3, n)."""
        return self.rows[list(PROPERTIES)].to_numpy(float).T

    @cached_property
    def target(self) -> Target:
        """ZT as a target; it has the folds of the three, which depend on the number of rows."""
        formulas, truth = self.rows["Formula"].to_numpy(str), self.zt(self.properties)
        return Target(f"estm{self.kelvin}_zt", "1", formulas, truth, 1.0, 32)

    def zt(self, properties: np.ndarray) -> np.ndarray:
        """Figure of merit (n,) of physical properties (3, n)."""
        sigma, kappa, seebeck = properties
        return zt(sigma, kappa, seebeck, self.kelvin)

    def physical(self, predictions: np.ndarray) -> np.ndarray:
        """Undo the transforms of the targets (Appendix C).

        Parameters
        ----------
        predictions : numpy.ndarray, shape (3, n)
            ln S/m, ln W/mK, and Seebeck coefficients scaled by those of all rows to 0 ... 1.

        Returns
        -------
        numpy.ndarray, shape (3, n)
            S/m, W/mK, µV/K.
        """
        low, high = self.properties[2].min(), self.properties[2].max()
        sigma, kappa, seebeck = predictions
        return np.stack([np.exp(sigma), np.exp(kappa), low + seebeck * (high - low)])

    def account(self) -> str:
        """Size of the set, and how its ZT differs from the column of the source."""
        truth, column = self.target.values, self.rows["ZT"].to_numpy(float)
        difference, limit = np.abs(truth - column), self.threshold
        worst = int(difference.argmax())
        return (
            f"{self.kelvin} K: {len(truth)} rows, ZT of the measured properties up to "
            f"{truth.max():.2f}, {(truth >= limit).sum()} rows at {limit} or more "
            f"({(column >= limit).sum()} by the file's ZT); differs from the file's ZT by "
            f"{difference.mean():.4f} on average, {difference.max():.3f} at most "
            f"({self.rows['Formula'][worst]}: {truth[worst]:.3f}, file {column[worst]:.3f})"
        )


@dataclass(frozen=True)
class Run:
    """Predictions of a model at a temperature: physical properties (3, n) by seed."""

    model: str
    protocol: str
    measured: Measured
    by_seed: dict[int, np.ndarray]
    mean: np.ndarray
    """Properties (3, n) of the seeds' mean prediction, taken before the transforms are undone."""

    @property
    def zt(self) -> np.ndarray:
        """ZT (n,) of the mean prediction."""
        return self.measured.zt(self.mean)

    def scores(self) -> pd.DataFrame:
        """Errors of ZT by seed and fold; screening by seed, as fold -1."""
        target, parts = self.measured.target, []
        for seed, properties in self.by_seed.items():
            predicted = self.measured.zt(properties)
            key = (SUITE, self.protocol, self.model, seed)
            parts.append(prediction_scores(target, predicted, target.splits(), *key))
            found = screening(target.values, predicted, self.measured.threshold)
            whole = (SUITE, target.name, self.protocol, self.model, seed, -1)
            rows = [(*whole, metric, value) for metric, value in found.items()]
            parts.append(pd.DataFrame(rows, columns=COLUMNS))
        return pd.concat(parts, ignore_index=True)

    def outliers(self) -> pd.DataFrame:
        """The rows whose ZT of the mean prediction is farthest from the truth, the worst first."""
        rows = self.measured.rows
        table = pd.DataFrame(
            {
                "task": self.measured.target.name,
                "protocol": self.protocol,
                "model": self.model,
                "seeds": len(self.by_seed),
                "formula": rows["Formula"],
                "temperature(K)": rows["temperature"],
                "true_ZT": self.measured.target.values,
                "predicted_ZT": self.zt,
            }
        )
        for (name, unit), true, predicted in zip(
            PROPERTIES.items(), self.measured.properties, self.mean, strict=True
        ):
            table[f"true_{name}({unit})"], table[f"predicted_{name}({unit})"] = true, predicted
        errors = (table["predicted_ZT"] - table["true_ZT"]).abs()
        return table.loc[errors.nlargest(N_OUTLIERS).index]


def collect(
    output_dir: str | Path,
    models: Sequence[str],
    protocols: Sequence[str],
    seeds: Sequence[int],
    sets: Sequence[Measured],
) -> tuple[list[Run], list[str]]:
    """Read the records of ``run_wetlab.py``.

    Returns
    -------
    runs : list of Run
        By protocol, model and temperature, where at least one seed has all three targets.
    notes : list of str
        What is missing, by model and protocol, and where the seeds are not of the same settings.
    """
    runs, notes = [], []
    for protocol, model in itertools.product(protocols, models):
        if protocol == "transfer" and model in BASELINES:
            continue
        records = {seed: load_record(output_dir, SUITE, model, protocol, seed) for seed in seeds}
        missing: dict[str, list[int]] = {}
        ways: set[tuple[Any, ...]] = set()
        for measured in sets:
            names, scaled = [f"estm{measured.kelvin}_{name}" for name in TARGETS], {}
            for seed, record in records.items():
                known = {name: len(record[name].predictions) for name in names if name in record}
                lacking = [name for name in names if known.get(name) != len(measured.rows)]
                for name in lacking if record else ["record"]:
                    missing.setdefault(name, []).append(seed)
                if not lacking:
                    scaled[seed] = np.stack([record[name].predictions for name in names])
                    used = [record[name].settings for name in names]
                    ways |= {tuple(map(one.get, ("encoder", "config", "epochs"))) for one in used}
            if scaled:
                by_seed = {seed: measured.physical(values) for seed, values in scaled.items()}
                mean = measured.physical(np.mean(list(scaled.values()), axis=0))
                runs.append(Run(model, protocol, measured, by_seed, mean))
        gaps = [f"no {name} of seeds {sorted(set(found))}" for name, found in missing.items()]
        if len(ways) > 1:
            gaps.append(f"{len(ways)} settings are mixed")
        if gaps:
            notes.append(f"{model}, {protocol}: {'; '.join(gaps)}")
    return runs, notes


def table_of(scores: pd.DataFrame, data_dir: Path | None) -> pd.DataFrame:
    """A row for each protocol, model and temperature: ZT MAE beside the paper's, and screening.

    Mean and standard deviation of the MAE are over seeds and folds, all else are means over seeds.
    """
    keys = ["protocol", "model", "task"]
    errors = scores[scores["metric"] == "mae"].groupby(keys, sort=False)["value"]
    table = errors.agg(mae="mean", std="std")
    for key in table.index:
        paper = published(data_dir, key[0], key[1])
        if paper is not None and key[2] in paper:
            table.loc[key, "paper"] = paper[key[2]]
    whole = scores[scores["fold"] == -1]
    means = whole.pivot_table(index=keys, columns="metric", values="value")
    table = table.join(means[["precision", "recall", "f1", "n_true", "n_predicted"]])
    return table.join(whole.groupby(keys)["seed"].nunique().rename("seeds"))


def labelled(runs: Sequence[Run]) -> dict[str, np.ndarray]:
    """ZT by model, with the number of its seeds where these differ: a mean of more errs less."""
    counts = [len(run.by_seed) for run in runs]
    labels = [
        run.model if len(set(counts)) == 1 else f"{run.model}, {n} seed{'s' * (n > 1)}"
        for run, n in zip(runs, counts, strict=True)
    ]
    return {label: run.zt for label, run in zip(labels, runs, strict=True)}


def write_all(output_dir: Path, runs: Sequence[Run], scores: pd.DataFrame) -> None:
    """Write both tables and the figures, each at once."""
    outliers = pd.concat([run.outliers() for run in runs])
    write_csv(output_dir / "thermoelectrics.csv", scores, digits=None)
    write_csv(output_dir / "thermoelectrics_outliers.csv", outliers, digits=5)
    for protocol in dict.fromkeys(run.protocol for run in runs):
        ours = [run for run in runs if run.protocol == protocol]
        panels = {}
        for measured in {run.measured.kelvin: run.measured for run in ours}.values():
            kelvin, truth, limit = measured.kelvin, measured.target.values, measured.threshold
            shown = labelled([run for run in ours if run.measured is measured])
            title = f"{protocol}, {kelvin} K\nmean prediction of the seeds"
            name = f"zt_{kelvin}K_{protocol}"
            save(output_dir, name, scatter_figure(truth, shown, title))
            found = scores.query("protocol == @protocol and task == @measured.target.name")
            title = f"{kelvin} K: {(truth >= limit).sum()} of {len(truth)} have ZT ≥ {limit}"
            panels[title] = found[found["fold"] == -1]
        models = list(dict.fromkeys(run.model for run in ours))
        figure = screening_figure(panels, models, protocol)
        save(output_dir, f"screening_{protocol}", figure)


def arguments_of(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; missing data ends it with one line."""
    parser = runner_parser(__doc__)
    add, known = parser.add_argument, (*MODELS, *BASELINES)
    add("--models", nargs="+", default=known, metavar="MODEL", help=", ".join(known))
    add("--protocols", nargs="+", choices=PROTOCOLS, default=PROTOCOLS)
    add("--seed", type=int, default=0, help="first seed")
    add("--seeds", type=int, default=3, help="number of seeds")
    add("--dry-run", action="store_true", help="show what there is; write nothing")
    arguments = parser.parse_args(argv)
    if arguments.seeds < 1:
        parser.error("--seeds must be at least 1")
    with refusing(parser):
        arguments.data_dir = find_data_dir(arguments.data_dir)
        arguments.sets = [
            Measured(kelvin, estm_rows(arguments.data_dir, kelvin)) for kelvin in THRESHOLDS
        ]
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Run the command; 2 if there is no record at all."""
    arguments = arguments_of(argv)
    seeds = range(arguments.seed, arguments.seed + arguments.seeds)
    chosen = (arguments.models, arguments.protocols, seeds)
    runs, notes = collect(arguments.output_dir, *chosen, arguments.sets)
    if not runs:
        where = f"{arguments.output_dir} has no record with the three ESTM targets of any model"
        print(f"error: {where}; {RUNNERS[SUITE]} makes them", file=sys.stderr)
        return 2
    for measured in arguments.sets:
        print(measured.account())
    scores = pd.concat([run.scores() for run in runs], ignore_index=True)
    if arguments.dry_run:
        print("DRY RUN: nothing is written")
    else:
        write_all(arguments.output_dir, runs, scores)
    print(table_of(scores, arguments.data_dir).round(3).to_string(na_rep="-"))
    print("without complete records: " + (" | ".join(notes) or "none"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
