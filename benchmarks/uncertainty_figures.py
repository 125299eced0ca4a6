"""Figures of ``uncertainty.py``: readable in print, without color."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from polysrl_dc.checkpoints import write_atomic

LABEL = "uncertainty: mean of ln sigma"


def count_figure(counts: np.ndarray, sigma: np.ndarray) -> Figure:
    """Mean of ln sigma with its 95 % interval by number of known structures (Figure 4a).

    Parameters
    ----------
    counts : numpy.ndarray, shape (n,), int
        The greatest stands for more, too.
    sigma : numpy.ndarray, shape (n,)

    Examples
    --------
    >>> len(count_figure(np.array([0, 1, 1]), np.array([0.1, 0.2, 0.3])).axes)
    1
    """
    most = counts.max()
    groups = {
        f"{count}+" if count == most else str(count): np.log(sigma[counts == count])
        for count in np.unique(counts)
    }
    figure = group_figure(groups)
    figure.axes[0].set_xlabel("known structures of the formula")
    return figure


def group_figure(groups: Mapping[str, np.ndarray]) -> Figure:
    """Means of groups with their 95 % intervals, and how many values each has.

    Parameters
    ----------
    groups : mapping of str to numpy.ndarray, shape (n,)
        Values, natural logarithms of sigma, by label.
    """
    figure = Figure((0.6 * len(groups) + 1.6, 2.8), dpi=200, layout="constrained")
    axes = figure.subplots()
    for place, values in enumerate(groups.values()):
        error = 1.96 * values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else 0.0
        axes.errorbar(place, values.mean(), error, fmt="ok", markersize=4, capsize=3)
        axes.annotate(f"{len(values):,}", (place, 1.0), xycoords=("data", "axes fraction"),
                      xytext=(0, 3), textcoords="offset points", ha="center", fontsize=7)
    axes.set_xticks(range(len(groups)), list(groups))
    axes.margins(x=0.08)
    axes.set_ylabel(LABEL)
    axes.grid(axis="y", linewidth=0.4, color="0.85")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def save(folder: Path, name: str, figure: Figure) -> None:
    """Write ``figures/<name>.png`` at once."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    write_atomic(folder / "figures" / f"{name}.png", picture.getvalue())
