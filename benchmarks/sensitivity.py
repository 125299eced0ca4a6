"""How pretraining depends on beta, J and the start of c and d: Figures 3 and 9 of the paper.

    python benchmarks/search.py --data-dir DATA        # pretrains the rows, hours
    python benchmarks/sensitivity.py                   # prints and draws what is there

Reads ``pretraining_search.csv``: equal, reduced budgets (``search.py``), one seed a row.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
from command_line import HERE
from matplotlib.figure import Figure
from scipy.stats import spearmanr
from search import BETAS, N_SAMPLES, finished_rows, table
from uncertainty_figures import save

#: Curve -> value -> row of the search.
CURVES: dict[str, dict[float, str]] = {
    "beta": {float(beta): f"beta {beta}" for beta in BETAS},
    "J": {8.0: "beta 1e-8"} | {float(n): f"J {n}" for n in N_SAMPLES},
    "start of c and d": {20.0: "beta 1e-8"}
    | {float(start): f"c and d start at {start}" for start in (5, 10, 40)},
}
#: Column of the curves -> label of its axis.
DRAWN = {
    "band_gap": "band gap MAE (eV)",
    "mean change, %": "mean change of nine MAEs (%)",
    "mean_variance": "mean variance",
    "collapsed_1e-4": "collapsed share (variance < 1e-4)",
    "collapsed_1e-6": "collapsed share (variance < 1e-6)",
}


def curves(results: pd.DataFrame) -> pd.DataFrame:
    """The rows of the search that belong to a curve, in its order.

    Parameters
    ----------
    results : pandas.DataFrame
        Content of ``pretraining_search.csv``.

    Returns
    -------
    pandas.DataFrame
        Columns curve, value, row, and those of :data:`DRAWN`; band_gap with its standard error
        over folds in band_gap_error.
    """
    lines = table(results)
    gaps = results[(results["metric"] == "mae") & (results["task"] == "band_gap")]
    lines["band_gap_error"] = gaps.groupby("row")["value"].sem()
    found = [
        {"curve": curve, "value": value, "row": row, **lines.loc[row]}
        for curve, rows in CURVES.items()
        for value, row in sorted(rows.items())
        if row in lines.index
    ]
    columns = ["curve", "value", "row", "band_gap", "band_gap_error", *list(DRAWN)[1:]]
    return pd.DataFrame(found, columns=columns)


def trend(curve: pd.DataFrame, column: str) -> float:
    """Spearman's correlation of a column with the value of the curve; NaN where it has none."""
    known = curve.dropna(subset=[column])
    told = len(known) > 2 and known[column].nunique() > 1
    return spearmanr(known["value"], known[column]).statistic if told else np.nan


def curve_figure(curve: pd.DataFrame, name: str) -> Figure:
    """Error, variance and collapsed share along one curve, one beneath the other.

    Parameters
    ----------
    curve : pandas.DataFrame
        Rows of :func:`curves`.
    name : str
        Label of the horizontal axis.
    """
    figure = Figure((3.6, 5.0), dpi=200, layout="constrained")
    error, variance, collapsed = figure.subplots(3, sharex=True)
    style = {"color": "black", "markersize": 4, "linewidth": 0.8}
    error.errorbar(
        curve["value"], curve["band_gap"], curve["band_gap_error"], fmt="o-", capsize=3, **style
    )
    error.set_ylabel(DRAWN["band_gap"])
    variance.plot(curve["value"], curve["mean_variance"], "o-", **style)
    variance.set(ylabel=DRAWN["mean_variance"], yscale="log")
    for column, marker in (("collapsed_1e-4", "o-"), ("collapsed_1e-6", "s--")):
        below = column.partition("_")[2]
        collapsed.plot(curve["value"], curve[column], marker, label=f"below {below}", **style)
    collapsed.set(ylabel="share of variances", xlabel=name, xscale="log")
    top = max(0.01, curve[["collapsed_1e-4", "collapsed_1e-6"]].max(axis=None))
    collapsed.set_ylim(-0.05 * top, 1.05 * top)
    if name != "beta":
        collapsed.set_xticks(curve["value"], [f"{value:g}" for value in curve["value"]])
        collapsed.set_xticks([], minor=True)
    collapsed.legend(frameon=False, fontsize=7)
    for axes in (error, variance, collapsed):
        axes.grid(axis="y", linewidth=0.4, color="0.85")
        axes.spines[["top", "right"]].set_visible(False)
    figure.align_ylabels()
    return figure


def main(argv: list[str] | None = None) -> None:
    """Print each curve with its trends, and draw it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output-dir", type=Path, default=HERE)
    folder = parser.parse_args(argv).output_dir
    found = curves(finished_rows(folder / "pretraining_search.csv"))
    for name, curve in found.groupby("curve", sort=False):
        print(curve.drop(columns="curve").to_markdown(index=False, floatfmt=".4g"))
        correlations = (f"{label} {trend(curve, column):.2f}" for column, label in DRAWN.items())
        print(f"Spearman's correlation with {name}: {', '.join(correlations)}\n")
        save(folder, f"sensitivity_{str(name).replace(' ', '_')}", curve_figure(curve, str(name)))


if __name__ == "__main__":
    main()
