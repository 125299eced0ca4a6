"""Estimators for scikit-learn: formulas in, predictions out, trained in the way that suits them.

They do in one call what ``polysrl train`` does, and fit into scikit-learn's model selection. What
they have trained is a :class:`~polysrl_dc.model.PolySRLModel`, which saves itself.
"""

import numbers
import warnings
from collections.abc import Hashable, Sequence
from typing import Any, Self

import numpy as np
import pandas as pd
from deepchem.data import Dataset, NumpyDataset
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted

from polysrl_dc.batches import checked_labels
from polysrl_dc.cross_validation import cross_val_predict
from polysrl_dc.domain import keep_formulas
from polysrl_dc.errors import InvalidInputError
from polysrl_dc.featurizers import Formulas, formulas_dataset
from polysrl_dc.model import PolySRLModel
from polysrl_dc.recalibration import UncalibratedWarning
from polysrl_dc.recipes import RECIPES, suitable_recipe


class _FormulaEstimator(BaseEstimator):
    """What both estimators share: parameters, and training by a recipe."""

    _task: str

    def __init__(
        self,
        *,
        recipe: str | None = None,
        n_folds: int | None = None,
        random_state: int | np.random.RandomState | None = 0,
    ) -> None:
        self.recipe = recipe
        self.n_folds = n_folds
        self.random_state = random_state

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = False
        tags.input_tags.one_d_array = tags.input_tags.string = True
        tags.target_tags.multi_output = self._task == "regression"
        return tags

    def _fit(
        self,
        X: Any,
        y: np.ndarray,
        weights: Sequence[float] | None,
        groups: Sequence[Hashable] | None,
        targets: list[str],
    ) -> None:
        """Train on labels of shape (n,) or (n, n_tasks), of which NaN and None are missing."""
        dataset = _labeled(X, y, weights)
        if groups is not None and len(groups) != len(dataset):
            raise ValueError(f"{len(dataset)} formulas, {len(groups)} groups")
        if groups is not None and self.n_folds is None:
            raise ValueError("groups are kept together in the parts of n_folds, which is None")
        if self.recipe is not None and self.recipe not in RECIPES:
            raise ValueError(f"recipe is {self.recipe!r}: must be one of {sorted(RECIPES)}")
        n_tasks = dataset.y.shape[1]
        _, w = checked_labels(dataset, n_tasks, classification=self._task == "classification")
        learned = np.flatnonzero(w.any(1))
        name = self.recipe or suitable_recipe(len(learned))
        seed, recipe = self.random_state, RECIPES[name]
        if not isinstance(seed, numbers.Integral):
            seed = check_random_state(seed).randint(2**31 - 1)

        def train(part: Dataset) -> PolySRLModel:
            settings = {"seed": int(seed), **recipe.settings}
            model = PolySRLModel(self._task, n_tasks, **settings)
            model.fit(part, nb_epoch=recipe.epochs, checkpoint_interval=0)
            return model

        predicted = None
        if self.n_folds is not None:
            predicted = cross_val_predict(
                train, dataset, self.n_folds, seed=int(seed), groups=groups
            )
        model = train(dataset)
        keep_formulas(model, dataset.select(learned))
        model.provenance |= {"recipe": name, **({"targets": targets} if targets else {})}
        self.__dict__.pop("cv_predictions_", None)  # of what it had learned before
        if predicted is not None:
            self.cv_predictions_ = predicted.mean.reshape(y.shape)
        if predicted is not None and self._task == "regression":
            try:
                model.calibrate(dataset, predicted=predicted)
            except InvalidInputError as error:
                warnings.warn(str(error), UncalibratedWarning, stacklevel=3)
        self.model_ = model


class PolySRLRegressor(RegressorMixin, _FormulaEstimator):
    """Regression on chemical formulas, as an estimator of scikit-learn.

    Parameters
    ----------
    recipe : str, optional
        A key of :data:`polysrl_dc.RECIPES`; default: the one that suits the number of rows that
        have a weight.
    n_folds : int, optional
        Train so many more models, each without one part of the formulas: their predictions of it
        become ``cv_predictions_``, and calibrate the standard deviations, which without are too
        small.
    random_state : int, numpy.random.RandomState or None
        Of all chance: weights, orders of rows, parts. None: another one with every call of ``fit``.

    Attributes
    ----------
    model_ : PolySRLModel
        ``model_.save(folder)`` writes it; ``polysrl predict`` and ``PolySRLModel.from_pretrained``
        read it. It holds the reduced formulas it has learned from (:class:`polysrl_dc.Domain`).
    cv_predictions_ : numpy.ndarray, of the shape of y
        Of each row by a model that has not learned from its formula; only with ``n_folds``.

    Notes
    -----
    Splitters of scikit-learn know nothing of formulas and may leave one on both sides, as
    ``Fe2O3`` and ``Fe4O6``; ``n_folds`` does not, nor does ``GroupKFold`` by
    ``polysrl_dc.reduced_formulas``.

    Examples
    --------
    >>> formulas = ["NaCl", "KCl", "MgO", "CaO", "LiF", "ZnO"]
    >>> regressor = PolySRLRegressor().fit(formulas, [8.5, 8.4, 7.8, 7.1, 13.6, 3.4])
    >>> regressor.predict(["RbCl", "SrO"]).shape
    (2,)
    """

    _task = "regression"

    def fit(
        self,
        X: Any,
        y: Any,
        sample_weight: Sequence[float] | None = None,
        groups: Sequence[Hashable] | None = None,
    ) -> Self:
        """Train on formulas and values.

        Parameters
        ----------
        X : iterable of n formulas, table of one column, or dc.data.Dataset of their graphs
            Text, compositions or mappings.
        y : array-like, shape (n,) or (n, n_tasks)
            In any unit; NaN, or masked, where a value is missing, but not all of a row.
        sample_weight : array-like, shape (n,), (n, 1) or (n, n_tasks), optional
            Values of weight 0 are not learned from.
        groups : sequence, shape (n,), optional
            Rows of one group, such as a publication, stay in one part of ``n_folds``; not without.

        Returns
        -------
        PolySRLRegressor
            Itself.

        Raises
        ------
        InvalidInputError
            A bad formula, value, weight or group, or a row without a value; names the row.
        ValueError
            Lengths differ, ``y`` has more than two dimensions, ``recipe`` is unknown, ``n_folds``
            (k, in the message) not between 2 and the number of different formulas, or None, but
            there are ``groups``.
        TypeError
            ``n_folds`` is no whole number.
        """
        self._fit(X, _values(y), sample_weight, groups, _names(y))
        self._one_column = np.ndim(y) == 1
        return self

    def predict(
        self, X: Any, return_std: bool = False
    ) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
        """Predict values, in the unit of those learned from.

        Parameters
        ----------
        X : as in :meth:`fit`
        return_std : bool
            Also return standard deviations; 2.12 of them hold 95 % where ``n_folds`` has calibrated
            them.

        Returns
        -------
        numpy.ndarray, shape (n,) or (n, n_tasks), as y had, or two of them

        Raises
        ------
        InvalidInputError
            A bad formula, which is named.
        sklearn.exceptions.NotFittedError
            :meth:`fit` comes first.
        """
        check_is_fitted(self)
        columns = 0 if self._one_column else slice(None)
        if not return_std:
            return self.model_.predict(_column(X))[:, columns]
        if self.model_.calibration is None:
            text = "std is not calibrated and too small: n_folds=5 calibrates it"
            warnings.warn(text, UncalibratedWarning, stacklevel=2)
        mean, std = self.model_.predict_uncertainty(_column(X))
        return mean[:, columns], std[:, columns]


class PolySRLClassifier(ClassifierMixin, _FormulaEstimator):
    """Two classes of chemical formulas, as an estimator of scikit-learn.

    Parameters
    ----------
    recipe, n_folds, random_state
        As of :class:`PolySRLRegressor`; nothing is calibrated.

    Attributes
    ----------
    classes_ : numpy.ndarray, shape (2,)
        In ascending order; the second is 1 to the model.
    model_ : PolySRLModel
        As of :class:`PolySRLRegressor`.
    cv_predictions_ : numpy.ndarray, shape (n,)
        The probability of ``classes_[1]``, by a model that has not learned from the formula; only
        with ``n_folds``.

    Examples
    --------
    >>> classifier = PolySRLClassifier(recipe="frozen")
    >>> classifier = classifier.fit(["Cu", "NaCl", "Fe", "MgO"], ["metal", "salt", "metal", "salt"])
    >>> classifier.classes_.tolist(), classifier.predict_proba(["Al", "KCl", "CaO"]).shape
    (['metal', 'salt'], (3, 2))
    """

    _task = "classification"

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_class = False
        return tags

    def fit(
        self,
        X: Any,
        y: Any,
        sample_weight: Sequence[float] | None = None,
        groups: Sequence[Hashable] | None = None,
    ) -> Self:
        """Train on formulas and classes.

        Parameters
        ----------
        X : iterable of n formulas, table of one column, or dc.data.Dataset of their graphs
            Text, compositions or mappings.
        y : array-like, shape (n,)
            Two different values, numbers or text; none is missing.
        sample_weight, groups
            As of :meth:`PolySRLRegressor.fit`.

        Returns
        -------
        PolySRLClassifier
            Itself.

        Raises
        ------
        InvalidInputError
            A row has no class, or a formula, weight or group is bad; names the row.
        ValueError
            There are not two classes, y has not one dimension, lengths differ, ``recipe`` is
            unknown, ``n_folds`` (k, in the message) not between 2 and the number of formulas, or
            None, but there are ``groups``.
        TypeError
            ``n_folds`` is no whole number.
        """
        labels = _values(y)
        missing = pd.isna(labels).ravel()
        if missing.any():
            raise InvalidInputError(f"row {missing.argmax()} of y has no class")
        classes, index = np.unique(labels, return_inverse=True)
        if labels.ndim != 1 or len(classes) != 2:
            raise ValueError(
                f"y has shape {labels.shape} and {len(classes)} classes, not (n,) and 2"
            )
        self._fit(X, index.astype(float), sample_weight, groups, _names(y))
        self.classes_ = classes
        return self

    def predict_proba(self, X: Any) -> np.ndarray:
        """Predict the probability of each class.

        Parameters
        ----------
        X : as in :meth:`fit`

        Returns
        -------
        numpy.ndarray, shape (n, 2)
            In the order of ``classes_``; rows add up to 1.

        Raises
        ------
        InvalidInputError
            A bad formula, which is named.
        sklearn.exceptions.NotFittedError
            :meth:`fit` comes first.
        """
        check_is_fitted(self)
        second = self.model_.predict(_column(X))[:, 0]
        return np.column_stack([1 - second, second])

    def predict_log_proba(self, X: Any) -> np.ndarray:
        """Natural logarithms of :meth:`predict_proba`, of the same shape.

        Parameters
        ----------
        X : as in :meth:`fit`

        Returns
        -------
        numpy.ndarray, shape (n, 2)
            Negative infinity, with NumPy's warning, where a probability is 0.

        Raises
        ------
        InvalidInputError
            A bad formula, which is named.
        sklearn.exceptions.NotFittedError
            :meth:`fit` comes first.
        """
        return np.log(self.predict_proba(X))

    def predict(self, X: Any) -> np.ndarray:
        """Predict the likelier class.

        Parameters
        ----------
        X : as in :meth:`fit`

        Returns
        -------
        numpy.ndarray, shape (n,)
            Values of ``classes_``.

        Raises
        ------
        InvalidInputError
            A bad formula, which is named.
        sklearn.exceptions.NotFittedError
            :meth:`fit` comes first.
        """
        likelier = self.predict_proba(X).argmax(1)
        return self.classes_[likelier]


def _names(y: Any) -> list[str]:
    """Of a pandas object."""
    found = list(getattr(y, "columns", [getattr(y, "name", None)]))
    return found if all(isinstance(name, str) for name in found) else []


def _values(given: Any) -> np.ndarray:
    """As an array, in which None stands for what ``given`` has masked."""
    if not np.ma.is_masked(given):
        return np.asarray(given)
    values = np.asarray(given).astype(object)
    values[np.ma.getmaskarray(given)] = None
    return values


def _column(X: Any) -> Formulas:
    """The only column of a DataFrame or of an array of two dimensions; all else as it is."""
    if isinstance(X, pd.DataFrame | np.ndarray) and X.ndim == 2 and X.shape[1] == 1:
        return np.asarray(X)[:, 0]
    return X


def _labeled(X: Any, y: np.ndarray, weights: Sequence[float] | None) -> Dataset:
    """Formulas with labels (n, n_tasks), of which the missing ones have weight 0."""
    formulas = formulas_dataset(_column(X))
    n = len(formulas)
    if y.ndim not in (1, 2):
        raise ValueError(f"y has shape {y.shape}, not (n,) or (n, n_tasks)")
    if len(y) != n:
        raise ValueError(f"{n} formulas, {len(y)} labels")
    labels, w = y.reshape(n, -1), _values(np.ones(n) if weights is None else weights)
    if w.shape not in ((n,), (n, 1), labels.shape):
        found = f"{w.size} weights of shape {w.shape}"
        raise ValueError(f"{n} labels, {found}, not (n,), (n, 1) or (n, n_tasks)")
    missing = pd.isna(labels)
    for row in np.flatnonzero(missing.all(1)):
        raise InvalidInputError(f"row {row} (id {formulas.ids[row]}) has no label")
    if missing.any():
        labels = np.where(missing, 0, labels)
    return NumpyDataset(formulas.X, labels, np.where(missing, 0, w.reshape(n, -1)), formulas.ids)
