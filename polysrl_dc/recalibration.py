"""Standard deviations that mean what they say, scaled on rows that the model has not learned from.

A model of few rows is too certain, and of some rows by far. So its standard deviations are shifted
and scaled (standard deviation scaling, Levi et al. 2022, doi:10.3390/s22155540; by a quantile and a
shift, as in normalized conformal prediction, Papadopoulos et al. 2008). A factor of the greatest
likelihood would not hold 95 % where errors have heavy tails.

It is most of all too certain far from all that it has learned from: heads that agree on known
formulas go on agreeing where they only extrapolate. So a standard deviation also grows with the
distance to the nearest known formula, at the rate at which the errors do, until it says that
nothing is known: that the label may be any of the known ones.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import brentq

from polysrl_dc.errors import InvalidInputError


def half_width(level: float) -> float:
    """Standard deviations of a Laplace distribution that hold so much of it on either side.

    Parameters
    ----------
    level : float
        From 0 to below 1, the share within this many of the median.

    Returns
    -------
    float

    Raises
    ------
    ValueError
        ``level`` is 1 or more.

    Examples
    --------
    >>> round(half_width(0.95), 2)
    2.12
    """
    return -math.log1p(-level) / math.sqrt(2)


LEVEL = 0.95
LAPLACE_95 = half_width(LEVEL)
#: Rows of which one is not within :data:`LEVEL`.
LEAST = 20
#: Between embeddings of unit length; a little more than that for rounding.
FARTHEST = 2.001
#: Rate that no fit exceeds.
MOST = 5.0


class UncalibratedWarning(UserWarning):
    """The standard deviations of some tasks cannot be calibrated, those of others can."""


@dataclass(frozen=True)
class Calibration:
    """Calibrated std = factor * (the model's own + offset) * exp(rate * distance), task by task.

    The last of these does not lift it above a ceiling.

    Parameters
    ----------
    factors : tuple of float, (n_tasks,)
        Positive.
    offsets : tuple of float, (n_tasks,)
        In label units; not negative.
    rates : tuple of float, (n_tasks,)
        Not negative. The distance is that to the nearest formula that was learned from
        (:meth:`polysrl_dc.Domain.distance`); 0: it does not matter.
    ceilings : tuple of float, (n_tasks,)
        In label units; not negative.
    polymorphs : bool
        Whether the model's own has the variance of each formula's Gaussian in it.

    Attributes
    ----------
    uncalibrated : tuple of int
        Tasks of factor 1 and no offset or rate, whose standard deviations stay the model's own.
    needs_distance : bool
        Whether any rate is other than 0.

    Raises
    ------
    ValueError
        A value is out of range.

    Examples
    --------
    >>> own, distance = np.array([[0.1], [0.4]]), np.array([0.0, 1.0])
    >>> Calibration((2.0,), (0.1,), (0.0,), (0.0,), polymorphs=False).apply(own).tolist()
    [[0.4], [1.0]]
    >>> found = Calibration((2.0,), (0.1,), (0.5,), (2.0,), polymorphs=False)
    >>> found.apply(own, distance).round(2).tolist()
    [[0.4], [1.65]]
    >>> found.apply(own, 3 * distance / 2).round(2).tolist()
    [[0.4], [2.0]]
    """

    factors: tuple[float, ...]
    offsets: tuple[float, ...]
    rates: tuple[float, ...]
    ceilings: tuple[float, ...]
    polymorphs: bool

    def __post_init__(self) -> None:
        if not all(0 < factor < math.inf for factor in self.factors):
            raise ValueError(f"factors are {self.factors}: must be positive and finite")
        for name in ("offsets", "rates", "ceilings"):
            values = getattr(self, name)
            if not all(0 <= value < math.inf for value in values):
                raise ValueError(f"{name} are {values}: must be finite and not negative")
        if not isinstance(self.polymorphs, bool):
            raise ValueError(f"polymorphs is {self.polymorphs!r}: must be True or False")

    @property
    def uncalibrated(self) -> tuple[int, ...]:
        """Tasks of factor 1 and no offset or rate."""
        each = enumerate(zip(self.factors, self.offsets, self.rates, strict=True))
        return tuple(task for task, numbers in each if numbers == (1, 0, 0))

    @property
    def needs_distance(self) -> bool:
        """Whether any rate is other than 0."""
        return any(self.rates)

    @classmethod
    def fit(
        cls,
        errors: np.ndarray,
        std: np.ndarray,
        known: np.ndarray,
        polymorphs: bool,
        distance: np.ndarray | None = None,
        labels: np.ndarray | None = None,
    ) -> Calibration:
        """So that one more error like these is within 2.12 standard deviations with 95 %.

        They are meant as those of Laplace distributions, as the model's own are. The offset is the
        median of these, so that rows that the model is far too certain of do not widen all others.
        The rate is the likeliest one for such distributions, with an exponential prior of mean 1
        that keeps it small where rows are few. The factor comes last. The ceiling is that of the
        difference of two labels, of which 95 % are within sqrt(2) times what holds 95 % of the
        labels around their median.

        A task is left as it is (1, 0, 0 and 0) if it has fewer than 20 labels, or no error or
        standard deviation other than zero; an :class:`UncalibratedWarning` names it.

        Parameters
        ----------
        errors : numpy.ndarray, shape (n, n_tasks)
            Label minus prediction, in label units, of rows that the model has not learned from.
        std : numpy.ndarray, shape (n, n_tasks)
            The model's own.
        known : numpy.ndarray of bool, shape (n, n_tasks)
            Where there is a label.
        polymorphs : bool
        distance : numpy.ndarray, shape (n,), optional
            To the nearest formula that was learned from. Without, the rates are 0.
        labels : numpy.ndarray, shape (n, n_tasks), optional
            In label units; goes with the distance.

        Returns
        -------
        Calibration

        Raises
        ------
        InvalidInputError
            No task can be calibrated.
        ValueError
            The arrays differ in shape, hold a value that is not finite or a distance that is not
            between 0 and 2, or only one of ``distance`` and ``labels`` is given.

        Examples
        --------
        >>> errors = np.random.default_rng(0).laplace(scale=3.0, size=(100_000, 1))
        >>> found = Calibration.fit(errors, np.ones_like(errors), errors < np.inf, polymorphs=False)
        >>> found.apply(np.ones(1)).round(1).tolist()  # 3 sqrt(2)
        [4.2]
        """
        if not errors.shape == np.shape(std) == known.shape:
            raise ValueError(
                f"errors {errors.shape}, std {np.shape(std)}, known {known.shape}: shapes differ"
            )
        if distance is not None and np.shape(distance) != errors.shape[:1]:
            raise ValueError(f"distances have shape {np.shape(distance)}, not {errors.shape[:1]}")
        if not (np.isfinite(errors[known]).all() and np.isfinite(std[known]).all()):
            raise ValueError("an error or standard deviation is not finite")
        if distance is not None and not ((distance >= 0) & (distance <= FARTHEST)).all():
            raise ValueError(f"distances are not all between 0 and {FARTHEST}")
        if (distance is None) != (labels is None):
            raise ValueError("distance and labels go together")
        found, reasons = [], []
        for task, rows in enumerate(known.T):
            found.append((1.0, 0.0, 0.0, 0.0))
            if rows.sum() < LEAST:
                reasons.append(
                    f"{rows.sum()} labels of task {task} are too few, at least {LEAST} are needed"
                )
                continue
            own = std[rows, task].astype(float)
            offset = float(np.median(own))
            with np.errstate(divide="ignore", invalid="ignore"):
                ratios = np.abs(errors[rows, task]) / (own + offset)
            rate, ceiling = 0.0, 0.0
            if distance is not None and labels is not None and 0 < ratios.sum() < math.inf:
                rate = _likeliest_rate(ratios, distance[rows])
                ratios = ratios * np.exp(-rate * distance[rows])
                around = np.abs(labels[rows, task] - np.median(labels[rows, task]))
                if rate:
                    ceiling = math.sqrt(2) * float(np.quantile(around, LEVEL)) / LAPLACE_95
            # "weibull": one error more is within with this probability, however few there are
            factor = float(np.quantile(ratios, LEVEL, method="weibull")) / LAPLACE_95
            if 0 < factor < math.inf:
                found[task] = factor, offset, rate, ceiling
            else:
                reasons.append(f"task {task}: no error, or no standard deviation but zero")
        why = "; ".join(reasons)
        if len(reasons) == len(found):
            raise InvalidInputError(why)
        if reasons:
            warnings.warn(f"std is not calibrated: {why}", UncalibratedWarning, stacklevel=3)
        factors, offsets, rates, ceilings = zip(*found, strict=True)
        return cls(factors, offsets, rates, ceilings, polymorphs)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], n_tasks: int) -> Calibration:
        """Read what ``dataclasses.asdict`` wrote.

        Once there were no rates and ceilings, and samples for the variance of the Gaussians.

        Parameters
        ----------
        values : mapping
            Of field to value.
        n_tasks : int

        Returns
        -------
        Calibration

        Raises
        ------
        ValueError, KeyError, TypeError
            A value is out of range or not one for each task; a field is missing or unknown.
        """
        values = {"rates": [0.0] * n_tasks, "ceilings": [0.0] * n_tasks, **values}
        if isinstance(n_samples := values.pop("n_samples", None), int) and n_samples >= 0:
            values["polymorphs"] = n_samples > 0
        names = ("factors", "offsets", "rates", "ceilings")
        each = {name: tuple(values[name]) for name in names}
        if {len(numbers) for numbers in each.values()} != {n_tasks}:
            raise ValueError(f"{each} are not those of {n_tasks} tasks")
        return cls(**{**values, **each})

    def apply(self, std: np.ndarray, distance: np.ndarray | None = None) -> np.ndarray:
        """Calibrate standard deviations.

        Parameters
        ----------
        std : numpy.ndarray, shape (n, n_tasks)
            The model's own, in label units.
        distance : numpy.ndarray, shape (n,), optional
            Must be given if :attr:`needs_distance`.

        Returns
        -------
        numpy.ndarray, shape (n, n_tasks)
            In label units, of the type of ``std``.

        Raises
        ------
        ValueError
            ``distance`` is needed, and not there or of another shape.
        """
        shift, scale = np.array(self.offsets, std.dtype), np.array(self.factors, std.dtype)
        near = scale * (std + shift)
        if not self.needs_distance:
            return near
        if distance is None or np.shape(distance) != std.shape[:1]:
            got = "none" if distance is None else f"of shape {np.shape(distance)}"
            raise ValueError(f"distance is {got}: this calibration needs shape {std.shape[:1]}")
        far = near * np.exp(np.outer(distance, self.rates)).astype(std.dtype)
        return np.minimum(far, np.maximum(near, np.array(self.ceilings, std.dtype)))


def _likeliest_rate(ratios: np.ndarray, distance: np.ndarray) -> float:
    """Of scales that grow as exp(rate * distance), for Laplace distributed ratios.

    Their negative log-likelihood, least over a common factor, and the prior are convex in the rate:
    n log(sum(ratios exp(-rate distance))) + rate (sum(distance) + 1).
    """

    def slope(rate: float) -> float:
        weights = ratios * np.exp(-rate * distance)
        return float(distance.sum() + 1 - len(ratios) * np.average(distance, weights=weights))

    if slope(0) >= 0:
        return 0.0
    return float(brentq(slope, 0, MOST)) if slope(MOST) > 0 else MOST
