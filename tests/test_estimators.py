"""Estimators for scikit-learn: what they train, what they answer, and scikit-learn's own tools."""

import pickle
from dataclasses import replace

import deepchem as dc
import numpy as np
import pandas as pd
import pytest
from models import FORMULAS, SIGNAL, data
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.utils import get_tags

from polysrl_dc import (
    RECIPES,
    Domain,
    InvalidInputError,
    PolySRLClassifier,
    PolySRLModel,
    PolySRLRegressor,
    cross_val_predict,
    estimators,
    keep_formulas,
)
from polysrl_dc.recalibration import UncalibratedWarning

RISING = np.arange(len(FORMULAS)) % 3 + 2.0  # of the anion alone


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    recipes = {name: replace(recipe, epochs=2) for name, recipe in RECIPES.items()}
    monkeypatch.setattr(estimators, "RECIPES", recipes)


def test_it_trains_as_the_recipe_says_and_answers_as_its_model() -> None:
    regressor = PolySRLRegressor(random_state=3).fit(FORMULAS, SIGNAL)
    recipe = RECIPES["frozen"]
    model = PolySRLModel(seed=3, **recipe.settings)
    model.fit(data(), nb_epoch=2)
    found = regressor.predict(FORMULAS)
    assert found.shape == (len(FORMULAS),)
    np.testing.assert_array_equal(found, model.predict(data())[:, 0])
    with pytest.warns(UncalibratedWarning, match="n_folds=5 calibrates it"):
        mean, std = regressor.predict(FORMULAS, return_std=True)
    np.testing.assert_array_equal(std, model.predict_uncertainty(data())[1][:, 0])
    np.testing.assert_array_equal(mean, found)
    assert Domain(regressor.model_).formulas.tolist() == sorted(x.formula for x in data().X)


def test_folds_calibrate_and_predict_each_formula_by_a_model_without_it() -> None:
    def train(part: dc.data.Dataset) -> PolySRLModel:
        model = PolySRLModel(seed=3, **RECIPES["frozen"].settings)
        model.fit(part, nb_epoch=2)
        return model

    regressor = PolySRLRegressor(n_folds=3, random_state=3)
    regressor.fit(pd.Series(FORMULAS), pd.Series(SIGNAL))
    expected = cross_val_predict(train, data(), 3, seed=3)
    np.testing.assert_array_equal(regressor.cv_predictions_, expected.mean[:, 0])
    model = train(data())
    keep_formulas(model, data())
    assert regressor.model_.calibration == model.calibrate(data(), predicted=expected)
    assert not np.array_equal(regressor.cv_predictions_, regressor.predict(FORMULAS))
    _, std = regressor.predict(FORMULAS, return_std=True)  # and no warning
    np.testing.assert_array_equal(std, regressor.model_.predict_uncertainty(FORMULAS)[1][:, 0])
    inside = np.abs(SIGNAL - regressor.cv_predictions_) <= 2.12 * std
    assert inside.mean() > 0.8
    regressor.set_params(n_folds=None).fit(FORMULAS, SIGNAL)
    assert not hasattr(regressor, "cv_predictions_") and regressor.model_.calibration is None
    with pytest.warns(UncalibratedWarning, match="at least 20 are needed"):
        PolySRLRegressor(n_folds=2).fit(FORMULAS[:9], SIGNAL[:9])


def test_the_calibrated_std_grows_with_the_distance_to_what_was_learned() -> None:
    odd = ["U", "Xe", "WC", "OsO4", "IrF6", "CBr4", "BN", "Tc", "P", "Hg", "S8", "H2"]
    wild = np.where(np.arange(len(odd)) % 2, -9.0, 9.0)  # which none of the others tells
    regressor = PolySRLRegressor(n_folds=3).fit([*FORMULAS, *odd], [*RISING, *wild])
    assert regressor.model_.calibration.needs_distance
    near, far = regressor.predict([FORMULAS[0], "PuO2"], return_std=True)[1]
    assert far > 1.5 * near


@pytest.mark.parametrize("labels", [SIGNAL, np.stack([SIGNAL, 3 - SIGNAL], axis=1), SIGNAL > 0])
def test_groups_stay_in_one_part(labels) -> None:
    estimator = PolySRLClassifier() if labels.dtype == bool else PolySRLRegressor()
    few = clone(estimator).set_params(n_folds=2)
    few.fit(FORMULAS, labels, groups=["a"] * 20 + ["b"] * 16)
    model = estimator.fit(FORMULAS[:20], labels[:20]).model_
    expected = model.predict(FORMULAS[20:]).reshape(labels[20:].shape)
    np.testing.assert_array_equal(few.cv_predictions_[20:], expected)


def test_missing_values_and_weights_are_those_of_the_model() -> None:
    labels = np.stack([SIGNAL, 3 - SIGNAL], axis=1)
    labels[5, 1] = np.nan
    heavy = np.where(np.arange(len(SIGNAL)) < 9, 5.0, 1.0)
    regressor = PolySRLRegressor().fit(FORMULAS, labels, sample_weight=heavy)
    model = PolySRLModel("regression", 2, **RECIPES["frozen"].settings)
    weights = heavy[:, None] * ~np.isnan(labels)
    model.fit(data(np.nan_to_num(labels), weights), nb_epoch=2)
    found = regressor.predict(FORMULAS)
    assert found.shape == (len(FORMULAS), 2)
    np.testing.assert_array_equal(found, model.predict(data()))


def test_values_are_missing_in_any_type_and_rows_of_no_weight_are_not_learned() -> None:
    labels = np.stack([SIGNAL, 3 - SIGNAL], axis=1)
    labels[5, 1] = np.nan
    expected = PolySRLRegressor().fit(FORMULAS, labels).predict(["RbI"])
    nullable = pd.DataFrame(labels, columns=["gap", "size"]).convert_dtypes()
    masked = np.ma.masked_equal(np.nan_to_num(labels, nan=-999.0), -999.0)
    for given in (masked, nullable, labels.astype(object), nullable.astype(object)):
        regressor = PolySRLRegressor().fit(FORMULAS, given)
        np.testing.assert_array_equal(regressor.predict(["RbI"]), expected)
    assert regressor.model_.provenance["targets"] == ["gap", "size"]
    assert regressor.model_.provenance["recipe"] == "frozen"
    assert len(Domain(regressor.model_).formulas) == len(FORMULAS)  # one label of two is enough
    one = PolySRLRegressor().fit(["NaCl", "KCl", "PuO2"], [1, 2, 3], sample_weight=[1, 1, 0])
    assert Domain(one.model_).outside(["PuO2", "KCl"]).tolist() == [True, False]
    other = PolySRLRegressor().fit(["NaCl", "KCl"], [1, 2])
    np.testing.assert_array_equal(one.predict(["RbI"]), other.predict(["RbI"]))


def test_the_recipe_suits_the_rows_that_have_a_weight(monkeypatch) -> None:
    given = []
    monkeypatch.setattr(estimators, "suitable_recipe", lambda n: given.append(n) or "single")
    for n_rows in (7, 36):
        weights = (np.arange(len(FORMULAS)) < n_rows).astype(int)
        assert PolySRLRegressor().fit(FORMULAS, SIGNAL, weights).model_.provenance["recipe"]
    assert given == [7, 36]


def test_weights_are_of_rows_or_of_values() -> None:
    rows = np.where(np.arange(len(SIGNAL)) < 9, 5.0, 1.0)
    labels = np.stack([SIGNAL, 3 - SIGNAL], axis=1)
    expected = PolySRLRegressor().fit(FORMULAS, labels, rows).predict(["RbI"])
    for weights in (rows[:, None], np.stack([rows, rows], axis=1)):
        found = PolySRLRegressor().fit(FORMULAS, labels, weights).predict(["RbI"])
        np.testing.assert_array_equal(found, expected)
    values = np.stack([rows, np.arange(len(rows)) % 3], axis=1)
    model = PolySRLModel("regression", 2, **RECIPES["frozen"].settings)
    model.fit(data(labels, values), nb_epoch=2)
    found = PolySRLRegressor().fit(FORMULAS, labels, values).predict(["RbI"])
    np.testing.assert_array_equal(found, model.predict(["RbI"]))


def test_formulas_may_be_the_only_column_of_a_table() -> None:
    table = pd.DataFrame({"formula": FORMULAS, "gap": SIGNAL}, index=np.arange(len(FORMULAS)) + 7)
    regressor = PolySRLRegressor().fit(table[["formula"]], table["gap"])
    expected = PolySRLRegressor().fit(FORMULAS, SIGNAL).predict(FORMULAS)
    np.testing.assert_array_equal(regressor.predict(table[["formula"]]), expected)
    np.testing.assert_array_equal(regressor.predict(table[["formula"]].to_numpy()), expected)
    assert regressor.model_.provenance["targets"] == ["gap"]
    found = PolySRLRegressor().fit(FORMULAS, SIGNAL[:, None]).predict(FORMULAS)
    np.testing.assert_array_equal(found, expected[:, None])  # as y had it


def test_chance_is_that_of_scikit_learn() -> None:
    one, other = (
        PolySRLRegressor(random_state=np.random.RandomState(3)).fit(FORMULAS, SIGNAL)
        for _ in range(2)
    )
    np.testing.assert_array_equal(one.predict(FORMULAS), other.predict(FORMULAS))
    again = one.fit(FORMULAS, SIGNAL)  # whose generator has gone on
    assert not np.array_equal(again.predict(FORMULAS), other.predict(FORMULAS))
    assert PolySRLRegressor(random_state=None).fit(FORMULAS, SIGNAL).predict(["RbI"]).shape == (1,)


def test_a_fit_that_fails_leaves_what_was_learned_before() -> None:
    regressor = PolySRLRegressor(n_folds=2).fit(FORMULAS, SIGNAL)
    before, predicted = regressor.predict(FORMULAS), regressor.cv_predictions_
    with pytest.raises(InvalidInputError):
        regressor.fit(["NaCl", "Qq"], [1, 2])
    np.testing.assert_array_equal(regressor.predict(FORMULAS), before)
    assert regressor.cv_predictions_ is predicted


def test_classes_have_any_names() -> None:
    names = pd.Series(np.where(SIGNAL > 0, "wide", "narrow"), name="gap")
    heavy = np.where(np.arange(len(SIGNAL)) < 9, 5.0, 1.0)
    classifier = PolySRLClassifier(n_folds=2).fit(FORMULAS, names, sample_weight=heavy)
    assert classifier.model_.provenance["targets"] == ["gap"]
    probability = classifier.predict_proba(FORMULAS)
    np.testing.assert_allclose(probability.sum(1), 1)
    np.testing.assert_array_equal(classifier.predict_log_proba(FORMULAS), np.log(probability))
    expected = np.where(probability[:, 1] > 0.5, "wide", "narrow")
    assert classifier.classes_.tolist() == ["narrow", "wide"]
    assert classifier.predict(FORMULAS).tolist() == expected.tolist()
    assert ((classifier.cv_predictions_ > 0) & (classifier.cv_predictions_ < 1)).all()
    assert classifier.score(FORMULAS, expected) == 1
    model = PolySRLModel("classification", **RECIPES["frozen"].settings)
    model.fit(data((SIGNAL > 0).astype(float), heavy), nb_epoch=2)
    np.testing.assert_array_equal(probability[:, 1], model.predict(data())[:, 0])


def test_the_tools_of_scikit_learn_take_it() -> None:
    regressor = PolySRLRegressor()
    scores = cross_val_score(regressor, FORMULAS, RISING, cv=2, scoring="neg_mean_absolute_error")
    assert scores.shape == (2,) and (scores < 0).all()
    search = GridSearchCV(regressor, {"random_state": [0, 1]}, cv=2).fit(np.array(FORMULAS), RISING)
    assert search.predict(FORMULAS).shape == (len(FORMULAS),)
    assert clone(regressor).get_params() == regressor.get_params()
    assert get_tags(regressor).input_tags.string and get_tags(regressor).target_tags.multi_output
    tags = get_tags(PolySRLClassifier())
    assert not (tags.target_tags.multi_output or tags.classifier_tags.multi_class)
    again = pickle.loads(pickle.dumps(search.best_estimator_))
    np.testing.assert_array_equal(again.predict(FORMULAS), search.predict(FORMULAS))


def test_deepchem_wraps_it(tmp_path) -> None:
    dataset = data(SIGNAL[:, None], np.ones((len(FORMULAS), 1)))
    model = dc.models.SklearnModel(PolySRLRegressor(), str(tmp_path))
    model.fit(dataset)
    expected = PolySRLRegressor().fit(FORMULAS, SIGNAL).predict(FORMULAS)
    np.testing.assert_array_equal(model.predict(dataset), expected)
    scores = model.evaluate(dataset, [dc.metrics.Metric(dc.metrics.mae_score)])
    assert scores["mae_score"] == pytest.approx(np.abs(expected - SIGNAL).mean())
    model.save()
    model.reload()
    np.testing.assert_array_equal(model.predict(dataset), expected)


def test_what_it_has_trained_is_saved_and_read(tmp_path) -> None:
    regressor = PolySRLRegressor().fit(FORMULAS, SIGNAL)
    regressor.model_.save(tmp_path)
    again = dc.models.PolySRLModel.from_pretrained(tmp_path)
    np.testing.assert_array_equal(again.predict(["RbI"])[:, 0], regressor.predict(["RbI"]))
    assert Domain(again).outside(["UN", FORMULAS[0]]).tolist() == [True, False]


@pytest.mark.parametrize(
    ("fit", "error", "text"),
    [
        (lambda r: r.fit(["NaCl", "Xx2"], [1, 2]), InvalidInputError, "row 1: .*Xx2"),
        (
            lambda r: r.fit(["NaCl", "KCl"], [1, np.nan]),
            InvalidInputError,
            "row 1 .*KCl.* no label",
        ),
        (lambda r: r.fit(["NaCl", "KCl"], [1, "x"]), InvalidInputError, r"row 1 \(id KCl\).*'x'"),
        (
            lambda r: r.fit(["NaCl", "KCl"], ["1.5", "3,2"]),
            InvalidInputError,
            r"^row 1 \(id KCl\): label \['3,2'\]: could not convert",
        ),
        (lambda r: r.fit(["NaCl", "KCl"], [1, np.inf]), InvalidInputError, r"row 1 \(id KCl\)"),
        (lambda r: r.fit(["NaCl", "KCl"], [1]), ValueError, "2 formulas, 1 labels"),
        (lambda r: r.fit(["NaCl", "KCl"], [1, 2], [1]), ValueError, "2 labels, 1 weights"),
        (lambda r: r.fit(["NaCl", "KCl"], [1, 2], 1.0), ValueError, r"weights of shape \(\), not"),
        (
            lambda r: r.fit(["NaCl", "KCl"], [1, 2], np.ones((2, 2))),
            ValueError,
            r"2 labels, 4 weights of shape \(2, 2\), not \(n,\), \(n, 1\) or \(n, n_tasks\)",
        ),
        (lambda r: r.fit(["NaCl", "KCl"], [1, 2], [1, -1]), InvalidInputError, "weight -1.0"),
        (lambda r: r.fit(["NaCl", "KCl"], [1, 2], [0, 0]), InvalidInputError, "weights are zero"),
        (
            lambda r: r.fit(["NaCl", "KCl"], [1, 2], np.ma.masked_equal([1, 7], 7)),
            InvalidInputError,
            r"row 1 \(id KCl\): weight nan",
        ),
        (lambda r: r.fit([], []), InvalidInputError, "there is no formula"),
        (
            lambda r: r.fit(pd.DataFrame({"NaCl": [1], "KCl": [2]}), [1]),
            InvalidInputError,
            "DataFrame",
        ),
        (lambda r: r.fit(["NaCl"], np.ones((1, 1, 1))), ValueError, "not .n,. or .n, n_tasks."),
        (lambda r: r.fit(["NaCl"], {0: 8.5}.values()), ValueError, r"shape \(\), not \(n,\)"),
        (lambda r: r.fit(["NaCl"], None), ValueError, r"shape \(\), not \(n,\)"),
        (lambda r: r.fit(["NaCl"], [1], groups=["a", "b"]), ValueError, "1 formulas, 2 groups"),
        (lambda r: r.set_params(n_folds=0).fit(["NaCl"], [1]), ValueError, "k is 0"),
        (lambda r: r.set_params(recipe="x").fit(["NaCl"], [1]), ValueError, "recipe is 'x'"),
        (lambda r: r.set_params(n_folds=5).fit(["NaCl"], [1]), ValueError, "k is 5"),
        (lambda r: r.set_params(n_folds="5").fit(["NaCl"], [1]), TypeError, "k is '5'"),
        (lambda r: r.set_params(n_folds=2.5).fit(["NaCl"], [1]), TypeError, "k is 2.5"),
        (lambda r: r.fit(["NaCl"], [1], groups=["a"]), ValueError, "n_folds, which is None"),
        (lambda r: r.predict(["NaCl"]), NotFittedError, "not fitted"),
        (lambda r: r.predict(["NaCl"], return_std=True), NotFittedError, "not fitted"),
    ],
)
def test_bad_input_is_named(fit, error, text) -> None:
    with pytest.raises(error, match=text):
        fit(PolySRLRegressor())


@pytest.mark.parametrize(
    "labels",
    [
        [1, 1, np.nan, 1],
        ["a", "b", None, "a"],
        pd.Series([True, False, pd.NA]),
        np.ma.masked_equal([1, 0, -999, 1, 0], -999),
        np.ma.masked_equal(["a", "b", "?", "a"], "?"),
    ],
)
def test_a_missing_class_is_no_class(labels) -> None:
    with pytest.raises(InvalidInputError, match="row 2 of y has no class"):
        PolySRLClassifier().fit(FORMULAS[: len(labels)], labels)


@pytest.mark.parametrize("labels", [[1, 1], [0, 1, 2], [[0], [1]]])
def test_a_classifier_learns_two_classes(labels) -> None:
    with pytest.raises(ValueError, match="classes, not"):
        PolySRLClassifier().fit(FORMULAS[: len(labels)], labels)
    with pytest.raises(NotFittedError):
        PolySRLClassifier().predict(["NaCl"])
