"""Standard deviations that mean what they say, scaled on rows that the model has not learned from.

A model of few rows is too certain, and of some rows by far. So its standard deviations are shifted
and scaled (standard deviation scaling, Levi et al. 2022, doi:10.3390/s22155540; by a quantile and a
shift, as in normalized conformal prediction, Papadopoulos et al. 2008). A factor of the greatest
likelihood would not hold 95 % where errors have heavy tails.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from polysrl_dc.errors import InvalidInputError

LEVEL = 0.95
#: Standard deviations of a Laplace distribution that hold :data:`LEVEL` of it on either side.
LAPLACE_95 = -math.log(1 - LEVEL) / math.sqrt(2)  # 2.12
#: Rows of which one is not within :data:`LEVEL`.
LEAST = 20


class UncalibratedWarning(UserWarning):
    """The standard deviations of some tasks cannot be calibrated, those of others can."""


@dataclass(frozen=True)
class Calibration:
    """Calibrated standard deviation = factor * (the model's own + offset), task by task.

    Parameters
    ----------
    factors : tuple of float, (n_tasks,)
        Positive.
    offsets : tuple of float, (n_tasks,)
        In label units; not negative.
    n_samples : int
        Samples of the Gaussian of each formula that the model's own is made with.

    Attributes
    ----------
    uncalibrated : tuple of int
        Tasks of factor 1 and offset 0, whose standard deviations stay the model's own.

    Raises
    ------
    ValueError
        A value is out of range.

    Examples
    --------
    >>> Calibration((2.0,), (0.1,), n_samples=0).apply(np.array([[0.1], [0.4]])).tolist()
    [[0.4], [1.0]]
    """

    factors: tuple[float, ...]
    offsets: tuple[float, ...]
    n_samples: int

    def __post_init__(self) -> None:
        if not all(0 < factor < math.inf for factor in self.factors):
            raise ValueError(f"factors are {self.factors}: must be positive and finite")
        if not all(0 <= offset < math.inf for offset in self.offsets):
            raise ValueError(f"offsets are {self.offsets}: must be finite and not negative")
        if not isinstance(self.n_samples, int) or self.n_samples < 0:
            raise ValueError(f"n_samples is {self.n_samples!r}: must be 0 or more")

    @property
    def uncalibrated(self) -> tuple[int, ...]:
        pairs = enumerate(zip(self.factors, self.offsets, strict=True))
        return tuple(task for task, pair in pairs if pair == (1, 0))

    @classmethod
    def fit(
        cls, errors: np.ndarray, std: np.ndarray, known: np.ndarray, n_samples: int
    ) -> Calibration:
        """Bring 95 % of the errors within 2.12 standard deviations.

        They are meant as those of Laplace distributions, as the model's own are. The offset is the
        median of these, so that rows that the model is far too certain of do not widen all others.

        A task is left with factor 1 and offset 0 if it has fewer than 20 labels, or no error or
        standard deviation other than zero; an :class:`UncalibratedWarning` names it.

        Parameters
        ----------
        errors : numpy.ndarray, shape (n, n_tasks)
            Label minus prediction, of rows that the model has not learned from.
        std : numpy.ndarray, shape (n, n_tasks)
            The model's own.
        known : numpy.ndarray of bool, shape (n, n_tasks)
            Where there is a label.
        n_samples : int

        Raises
        ------
        InvalidInputError
            No task can be calibrated.
        ValueError
            The arrays differ in shape, or hold a value that is not finite.

        Examples
        --------
        >>> errors = np.random.default_rng(0).laplace(scale=3.0, size=(100_000, 1))
        >>> found = Calibration.fit(errors, np.ones_like(errors), errors < np.inf, n_samples=0)
        >>> found.apply(np.ones(1)).round(1).tolist()  # 3 sqrt(2)
        [4.2]
        """
        if not errors.shape == np.shape(std) == known.shape:
            raise ValueError(
                f"errors {errors.shape}, std {np.shape(std)}, known {known.shape}: shapes differ"
            )
        if not (np.isfinite(errors[known]).all() and np.isfinite(std[known]).all()):
            raise ValueError("an error or standard deviation is not finite")
        pairs, reasons = [], []
        for task, rows in enumerate(known.T):
            pairs.append((1.0, 0.0))
            if rows.sum() < LEAST:
                reasons.append(
                    f"{rows.sum()} labels of task {task} are too few, at least {LEAST} are needed"
                )
                continue
            own = std[rows, task].astype(float)
            offset = float(np.median(own))
            with np.errstate(divide="ignore", invalid="ignore"):
                ratios = np.abs(errors[rows, task]) / (own + offset)
            factor = float(np.quantile(ratios, LEVEL)) / LAPLACE_95
            if 0 < factor < math.inf:
                pairs[task] = factor, offset
            else:
                reasons.append(f"task {task}: no error, or no standard deviation but zero")
        why = "; ".join(reasons)
        if len(reasons) == len(pairs):
            raise InvalidInputError(why)
        if reasons:
            warnings.warn(f"std is not calibrated: {why}", UncalibratedWarning, stacklevel=3)
        factors, offsets = zip(*pairs, strict=True)
        return cls(factors, offsets, n_samples)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], n_tasks: int) -> Calibration:
        """Read what ``dataclasses.asdict`` wrote, for a model of ``n_tasks``."""
        pairs = {name: tuple(values[name]) for name in ("factors", "offsets")}
        if {len(pair) for pair in pairs.values()} != {n_tasks}:
            raise ValueError(f"factors and offsets {pairs} are not those of {n_tasks} tasks")
        return cls(**{**values, **pairs})

    def apply(self, std: np.ndarray) -> np.ndarray:
        """Calibrated standard deviations, shape (n, n_tasks), of the model's own."""
        shift, scale = np.array(self.offsets, std.dtype), np.array(self.factors, std.dtype)
        return scale * (std + shift)
