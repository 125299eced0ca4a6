"""Predictive distributions from calibration residuals, and how good they are; pure functions.

All are symmetric about the prediction, and of one shape times a scale of each row. Shapes: n
calibration rows, m test rows. Widths and scores are in the units of the residuals.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import uncertainty_toolbox as uct
from crepes import ConformalRegressor
from scipy.stats import norm

from polysrl_dc.recalibration import half_width

LEVELS = (0.5, 0.8, 0.95)
#: Of the curve whose distance from the diagonal is the miscalibration area.
GRID = np.linspace(0.01, 0.99, 99)
DISCARDED = 0.2


class Intervals(ABC):
    """Intervals about predictions, fitted to residuals of rows that the model was not fitted to.

    Parameters
    ----------
    residuals : numpy.ndarray, shape (n,)
        Value minus prediction of the calibration rows.
    std : numpy.ndarray, shape (n,)
        Predicted standard deviations, positive.
    """

    @abstractmethod
    def __init__(self, residuals: np.ndarray, std: np.ndarray) -> None: ...

    @abstractmethod
    def scales(self, std: np.ndarray) -> np.ndarray:
        """Scale of each row, shape (m,): rows are ranked by it."""

    @abstractmethod
    def half_widths(self, std: np.ndarray, level: float) -> np.ndarray:
        """Of the intervals that hold a value with a probability, shape (m,)."""

    @abstractmethod
    def crps(self, errors: np.ndarray, std: np.ndarray) -> float:
        """Mean continuous ranked probability score; ``errors`` are value minus prediction."""


class Scaled(Intervals):
    """Gaussian: standard deviations times the factor that brings 95 % of the residuals inside."""

    def __init__(self, residuals: np.ndarray, std: np.ndarray) -> None:
        self.factor = np.quantile(np.abs(residuals) / std, 0.95) / norm.ppf(0.975)

    def scales(self, std: np.ndarray) -> np.ndarray:
        return self.factor * std

    def half_widths(self, std: np.ndarray, level: float) -> np.ndarray:
        return norm.ppf((1 + level) / 2) * self.scales(std)

    def crps(self, errors: np.ndarray, std: np.ndarray) -> float:
        return float(uct.crps_gaussian(np.zeros(len(errors)), self.scales(std), errors))


class Normalized(Intervals):
    """Normalized conformal regression (Papadopoulos et al. 2008).

    The difficulty of a row is its standard deviation plus their median in the calibration, so that
    a few that are far too small do not widen all intervals.
    """

    def __init__(self, residuals: np.ndarray, std: np.ndarray) -> None:
        self.median = float(np.median(std))
        self.regressor = ConformalRegressor().fit(residuals, sigmas=self.scales(std))

    def scales(self, std: np.ndarray) -> np.ndarray:
        return std + self.median

    def half_widths(self, std: np.ndarray, level: float) -> np.ndarray:
        zero, scales = np.zeros(len(std)), self.scales(std)
        return self.regressor.predict_int(zero, sigmas=scales, confidence=level)[:, 1]

    def crps(self, errors: np.ndarray, std: np.ndarray) -> float:
        scales = self.scales(std)
        return float((scales * symmetric_crps(errors / scales, self.regressor.alphas)).mean())


class Constant(Normalized):
    """Conformal regression: intervals of one width, whatever the standard deviations."""

    def scales(self, std: np.ndarray) -> np.ndarray:
        return np.ones(len(std))


class Laplace(Intervals):
    """What a model with a Laplace loss says itself: nothing is fitted to residuals."""

    def __init__(self) -> None: ...

    def scales(self, std: np.ndarray) -> np.ndarray:
        return std / np.sqrt(2)

    def half_widths(self, std: np.ndarray, level: float) -> np.ndarray:
        return half_width(level) * std

    def crps(self, errors: np.ndarray, std: np.ndarray) -> float:
        scales, sizes = self.scales(std), np.abs(errors)
        return float((sizes + scales * (np.exp(-sizes / scales) - 0.75)).mean())


def symmetric_crps(errors: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Score of the distribution that is each of ``sizes`` with either sign, equally likely.

    CRPS = E|A - z| - E|A - A'| / 2 (Gneiting & Raftery 2007, eq. 21). crepes has one, which
    multiplies a part of the score by the scale twice.

    Parameters
    ----------
    errors : numpy.ndarray, shape (m,)
    sizes : numpy.ndarray, shape (n,)

    Returns
    -------
    numpy.ndarray, shape (m,)

    Examples
    --------
    >>> symmetric_crps(np.array([0.0, 3.0]), np.array([1.0])).tolist()
    [0.5, 2.5]
    """
    atoms = np.sort(np.r_[sizes, -sizes])
    count, sums = len(atoms), np.r_[0.0, np.cumsum(atoms)]
    below = np.searchsorted(atoms, errors)
    to_error = (errors * (2 * below - count) - 2 * sums[below] + sums[-1]) / count
    between = 2 * (atoms * (2 * np.arange(count) + 1 - count)).sum() / count**2
    return to_error - between / 2


def remaining_errors(errors: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Mean absolute error of the k most certain rows, for k = 1 ... m.

    Rows of one scale count with their mean error, so that their order does not matter.

    Examples
    --------
    >>> remaining_errors(np.array([4.0, -1.0, 2.0]), np.array([3.0, 1.0, 1.0])).round(2).tolist()
    [1.5, 1.5, 2.33]
    """
    _, group = np.unique(scales, return_inverse=True)
    means = np.bincount(group, np.abs(errors)) / np.bincount(group)
    return np.cumsum(means[np.sort(group)]) / np.arange(1, len(errors) + 1)


def ause(errors: np.ndarray, scales: np.ndarray) -> float:
    """Area between the sparsification curve of a ranking and that of the errors themselves.

    In units of the mean absolute error (Ilg et al. 2018): 0 for the order of the errors.

    Examples
    --------
    >>> ause(np.array([1.0, 2.0, 3.0]), np.array([1.0, 2.0, 9.0]))
    0.0
    """
    oracle = remaining_errors(errors, np.abs(errors))
    return float((remaining_errors(errors, scales) - oracle).mean() / np.abs(errors).mean())


def evaluate(intervals: Intervals, errors: np.ndarray, std: np.ndarray) -> dict[str, float]:
    """Metrics of a test fold.

    Parameters
    ----------
    intervals : Intervals
    errors : numpy.ndarray, shape (m,)
        Value minus prediction.
    std : numpy.ndarray, shape (m,)

    Returns
    -------
    dict
        ``coverage_50, width_50``, the same at 80 and 95: share of the values inside and mean
        width. ``equal_width_95``: of intervals of one width that hold as many of these errors as
        those of 95 %, their ends half-way between the last error inside and the first outside.
        ``crps``. ``miscalibration_area``: between the levels and the coverage, 0 to 0.5.
        ``ause``. ``mae``, and ``mae_kept`` without the 20 % that are most uncertain.
    """
    size, scales = np.abs(errors), intervals.scales(std)
    found = {}
    for level in LEVELS:
        half_widths = intervals.half_widths(std, level)
        found[f"coverage_{100 * level:.0f}"] = float((size <= half_widths).mean())
        found[f"width_{100 * level:.0f}"] = float(2 * half_widths.mean())
    inside, sizes = round(found["coverage_95"] * len(size)), np.r_[0, np.sort(size)]
    found["equal_width_95"] = float(sizes[inside] + sizes[min(inside + 1, len(size))])
    found["crps"] = intervals.crps(errors, std)
    observed = [(size <= intervals.half_widths(std, level)).mean() for level in GRID]
    area = uct.metrics_calibration.miscalibration_area_from_proportions
    found["miscalibration_area"] = float(area(np.r_[0, GRID, 1], np.r_[0, observed, 1]))
    found["ause"] = ause(errors, scales)
    kept = len(size) - int(DISCARDED * len(size))
    found["mae"] = float(size.mean())
    found["mae_kept"] = float(remaining_errors(errors, scales)[kept - 1])
    return found
