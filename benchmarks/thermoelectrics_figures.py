"""Figures 7 and 8 of the paper: true and predicted ZT, and screening by a threshold on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.metrics import mean_absolute_error


def scatter_figure(truth: np.ndarray, predicted: Mapping[str, np.ndarray], title: str) -> Figure:
    """A panel of true and predicted ZT for each model (Figure 7), with the error of its points.

    Predictions beyond the axes are triangles at the border, and counted.

    Parameters
    ----------
    truth : numpy.ndarray, shape (n,)
    predicted : mapping of str to numpy.ndarray, shape (n,)
        By model.
    title : str

    Examples
    --------
    >>> len(scatter_figure(np.array([0.1, 1.0]), {"a": np.array([0.2, 9.0])}, "300 K").axes)
    1
    """
    figure, panels = _panels(len(predicted), 3, (2.2, 2.4))
    limit = np.ceil(truth.max() * 12) / 10
    for axes, (model, values) in zip(panels, predicted.items(), strict=True):
        beyond = values > limit
        axes.plot([0, limit], [0, limit], color="0.4", linewidth=0.8, zorder=3)
        axes.scatter(truth[~beyond], values[~beyond], s=9, alpha=0.5, linewidths=0)
        if beyond.any():
            border = np.full(beyond.sum(), limit)
            axes.scatter(truth[beyond], border, s=22, marker="^", color="C3", clip_on=False)
        ticks = np.arange(0, limit + 0.01, 0.5)
        axes.set(xlim=(0, limit), ylim=(0, limit), xticks=ticks, yticks=ticks, aspect="equal")
        above = f", {beyond.sum()} above" if beyond.any() else ""
        error = f"MAE {mean_absolute_error(truth, values):.3f}"
        axes.set_title(f"{model}\n{error}{above}", fontsize=9)
    figure.suptitle(title, fontsize=10)
    figure.supxlabel("ZT of measured properties", fontsize=10)
    figure.supylabel("ZT of predicted properties", fontsize=10)
    return figure


def screening_figure(
    panels: Mapping[str, pd.DataFrame], models: Sequence[str], title: str
) -> Figure:
    """Precision and recall of each model, a panel for each threshold (Figure 8).

    Bars are means over the seeds and dots the seeds; the number at the right is how many rows are
    predicted to reach the threshold, a mean as well.

    Parameters
    ----------
    panels : mapping of str to pandas.DataFrame
        Scores by the title of the panel: columns model, seed, metric, value; the metrics
        ``precision, recall, n_predicted``.
    models : sequence of str
        From top to bottom.
    title : str
    """
    places = np.arange(len(models))
    figure, grid = _panels(len(panels), 2, (3.4, 1.2 + 0.32 * len(models)))
    for axes, (name, scores) in zip(grid, panels.items(), strict=True):
        means = scores.pivot_table(index="model", columns="metric", values="value").reindex(models)
        for shift, metric in ((-0.19, "precision"), (0.19, "recall")):
            axes.barh(places + shift, means[metric], height=0.36, label=metric)
            seeds = scores[scores["metric"] == metric]
            rows = seeds["model"].map(models.index) + shift
            axes.plot(seeds["value"], rows, ".k", markersize=3, clip_on=False)
        for place, count in enumerate(means["n_predicted"]):
            axes.text(1.04, place, "-" if np.isnan(count) else f"{count:.1f}", va="center", size=8)
        axes.set_title(name, fontsize=9)
        axes.set(xlim=(0, 1), ylim=(len(models) - 0.5, -0.5), xlabel="precision, recall")
        axes.set_yticks(places, models)
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    note = "bars: mean of seeds; dots: seeds; numbers: rows predicted at or above the threshold"
    figure.suptitle(f"{title}\n{note}", fontsize=9)
    return figure


def _panels(count: int, columns: int, size: tuple[float, float]) -> tuple[Figure, list[Axes]]:
    """A figure of panels with shared axes, row by row, of a size in inches each."""
    columns = min(columns, count)
    rows = -(-count // columns)
    figure = Figure((size[0] * columns + 0.4, size[1] * rows + 0.4), dpi=200, layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
    for axes in grid[count:]:
        axes.remove()
    for axes in grid[count - columns : count]:
        axes.tick_params(labelbottom=True)
    return figure, list(grid[:count])
