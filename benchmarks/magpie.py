"""The honest baseline without a neural network: Magpie features with ridge or a random forest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
from matminer.featurizers.composition import ElementProperty
from pymatgen.core import Composition
from sklearn.ensemble import RandomForestRegressor
from sklearn.feature_selection import VarianceThreshold
from sklearn.linear_model import RidgeCV
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from targets import Splits, Target
from tqdm import tqdm

BASELINES = ("magpie_ridge", "magpie_forest")
TREES = 300
#: What ``info.json`` says of their records.
ABOUT: dict[str, dict[str, Any]] = {
    model: {
        "algorithm": f"Magpie, {name}",
        "algorithm_long": (
            "Statistics of 22 elemental properties over a formula (Magpie, by matminer), and "
            f"{method} of scikit-learn."
        ),
        "bibtex_refs": [
            "@article{magpie, title={A general-purpose machine learning framework for predicting "
            "properties of inorganic materials}, author={Ward, Logan and Agrawal, Ankit and "
            "Choudhary, Alok and Wolverton, Christopher}, journal={npj Computational Materials}, "
            "volume={2}, pages={16028}, year={2016}}"
        ],
    }
    for model, name, method in (
        ("magpie_ridge", "ridge", "ridge regression, its penalty by leave-one-out,"),
        ("magpie_forest", "random forest", f"a random forest of {TREES} trees"),
    )
}


def magpie_features(formulas: Sequence[str]) -> np.ndarray:
    """Statistics of 22 elemental properties over each formula (Ward et al. 2016), as in matminer.

    Returns
    -------
    numpy.ndarray, shape (n, 132)

    Raises
    ------
    ValueError
        A feature is not finite, naming formula and feature.

    Examples
    --------
    >>> magpie_features(["NaCl", "Fe2O3"]).shape
    (2, 132)
    """
    featurizer = ElementProperty.from_preset("magpie", impute_nan=False)
    rows = [featurizer.featurize(Composition(formula)) for formula in formulas]
    features = np.asarray(rows, dtype=float)
    bad = np.argwhere(~np.isfinite(features))
    if len(bad):
        row, column = bad[0]
        raise ValueError(f"{formulas[row]}: {featurizer.feature_labels()[column]} is not finite")
    return features


def predict_baseline(
    model: str,
    targets: Sequence[Target],
    seeds: Sequence[int],
    splits_of: Callable[[Target], Splits] = Target.splits,
) -> dict[str, np.ndarray]:
    """Predictions of a baseline for every formula, trained on the folds without it.

    Parameters
    ----------
    model : {"magpie_ridge", "magpie_forest"}
        Ridge on standardized features, its penalty by leave-one-out among 15 powers of ten, or a
        forest of 300 trees on a third of the features each split. Ridge is the same for every seed.
    targets : sequence of Target
    seeds : sequence of int
    splits_of : callable
        As for :func:`representation.predict_targets`.

    Returns
    -------
    dict of str to numpy.ndarray, shape (n_seeds, n)
        By name of the target.
    """
    features, found = cache(magpie_features), {}
    for target in tqdm(targets, desc=model):
        x = features(tuple(target.formulas))
        predictions = np.full((len(seeds), len(x)), np.nan)
        for train, test in splits_of(target):
            for i, seed in enumerate(seeds):
                if model == "magpie_ridge" and i:
                    predictions[i, test] = predictions[0, test]
                    continue
                fitted = regressor(model, seed).fit(x[train], target.values[train])
                predictions[i, test] = fitted.predict(x[test])
        found[target.name] = predictions
    return found


def regressor(model: str, seed: int) -> Pipeline | RandomForestRegressor:
    """One of :data:`BASELINES`, not yet fitted to features."""
    if model == "magpie_forest":
        return RandomForestRegressor(TREES, max_features=1 / 3, random_state=seed)
    # A column that hardly varies in training would be scaled to thousands in a test row.
    varying = VarianceThreshold(1e-6)
    return make_pipeline(varying, StandardScaler(), RidgeCV(np.logspace(-4, 10, 15)))
