"""``PolySRLModel`` as a user meets it: arguments, units, weights, uncertainty, batches."""

import io
import json
from contextlib import nullcontext
from dataclasses import fields, replace

import deepchem as dc
import numpy as np
import pytest
import torch
from models import FORMULAS, MAE, PLAIN, SIGNAL, N, assert_same_state, data, fitted, make, state
from sklearn import metrics as sk
from sklearn.metrics import roc_auc_score

import polysrl_dc
from polysrl_dc.batches import LabeledData
from polysrl_dc.config import _RANGES
from polysrl_dc.errors import InvalidInputError
from polysrl_dc.graphs import StoichiometryBatch
from polysrl_dc.losses import polysrl_loss
from polysrl_dc.recipes import RECIPES

# ------------------------------------------------------------------ arguments


@pytest.mark.parametrize(
    "kwargs",
    [
        {"task": "regresion"},
        {"n_tasks": 0},
        {"n_ensemble": 0},
        {"batch_size": 1},
        {"schedule": "cosine"},
        {"config": "papre"},
        {"task": "pretraining", "objective": "none"},
        {"objective": "none"},
        {"task": "pretraining", "n_tasks": 2},
        {"task": "pretraining", "n_ensemble": 3},
        {"task": "pretraining", "freeze_encoder": True},
        {"task": "pretraining", "polymorphs_per_batch": 0},
        {"polymorphs_per_batch": -1},
        {"max_edges": 0},
        {"seed": -1},
        {"seed": 2**43},
        {"weight_decay": -1.0},
        {"weight_decay": float("nan")},
        {"log_frequency": 0},
        {"learning_rate": -1e-3},
        {"learning_rate": float("nan")},
        {"learning_rate": "1e-3"},
        {"learning_rate": None},
    ],
    ids=str,
)
def test_values_that_mean_nothing_are_refused(kwargs):
    name, value = list(kwargs.items())[-1]
    with pytest.raises(ValueError, match=rf"{name}.* {value!r}"):
        make(**kwargs)


def test_scalars_of_numpy_are_those_of_python():
    whole = {"n_tasks": 1, "n_ensemble": 2, "batch_size": 8, "seed": 3, "log_frequency": 7}
    real = {"learning_rate": 0.5, "weight_decay": 0.25}  # without loss in single precision
    model = make(
        **{name: np.int64(value) for name, value in whole.items()},
        **{name: np.float32(value) for name, value in real.items()},
        freeze_encoder=np.bool_(True),
    )
    plain = make(**whole, **real, freeze_encoder=True)
    assert json.dumps([model.settings, model.training]) == json.dumps(
        [plain.settings, plain.training]
    )
    assert type(model.get_params()["log_frequency"]) is int
    model.fit(data(), nb_epoch=np.int64(2), deterministic=np.bool_(True), checkpoint_interval=3)
    plain.fit(data(), nb_epoch=2, deterministic=True)
    assert_same_state(state(plain), state(model))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("grad_clip", -2), ("grad_clip", 0), ("head_scale", 0), ("gaussian_step", 0)),
        *(("cutoff", -1), ("c_init", 0.0), ("d_init", np.inf), ("beta", -1), ("beta", True)),
        ("d_init", -3.0),
        *(("whitening", 2), ("whitening", -1), ("message_power", -0.5), ("attention_power", -1)),
        *(("set2set_steps", True), ("set2set_steps", 0), ("n_samples", 10**9)),
        *(("log_sigma_shift", "0"), ("feature_norm", 1), ("polymorph_sum", "no")),
    ],
)
def test_constants_out_of_their_range_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value!r}: "):
        replace(PLAIN, **{name: value})


def test_every_constant_has_a_range_and_its_bounds_are_legal():
    named = [name for _, _, names in _RANGES.values() for name in names]
    assert sorted(named) == sorted(f.name for f in fields(PLAIN) if f.type is float)
    for name in ("beta", "whitening", "message_power", "attention_power", "log_sigma_shift"):
        assert getattr(replace(PLAIN, **{name: 0}), name) == 0
    assert replace(PLAIN, whitening=1, log_sigma_shift=-4, grad_clip=1e-9).whitening == 1


def test_the_constants_of_the_paper_are_those_that_it_states():
    """Table 3 and Appendix B.3, as the configuration and as the defaults of the loss."""
    paper = polysrl_dc.PolySRLConfig.named("paper")
    assert (paper.stoichiometry_layers, paper.structure_layers, paper.n_features) == (3, 3, 200)
    assert (paper.n_samples, paper.beta, paper.c_init, paper.d_init) == (8, 1e-8, 20, 20)
    assert paper.grad_clip == 2
    defaults = polysrl_loss.__kwdefaults__
    assert (defaults["n_samples"], defaults["beta"]) == (paper.n_samples, paper.beta)


def test_the_shipped_encoders_have_the_default_configuration():
    """So that a user who names it compares with what was measured."""
    for name in RECIPES["frozen"].settings["pretrained"]:
        config = polysrl_dc.PolySRLModel.from_pretrained(name).config
        assert config == polysrl_dc.PolySRLConfig.named("default")


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, np.float32(2)])
def test_constants_that_no_file_can_hold_are_refused(value):
    with pytest.raises(ValueError, match=r"grad_clip is .*: no finite number"):
        replace(PLAIN, grad_clip=value)


def test_the_greatest_seed_trains():
    assert np.isfinite(fitted(seed=2**43 - 1).predict(data())).all()


def test_unknown_arguments_are_refused():
    for kwargs in ({"dropout": 0.1}, {"n_task": 2}, {"tensorboard": True}, {"wandb": True}):
        with pytest.raises(TypeError, match=next(iter(kwargs))):
            make(**kwargs)
    model = make()
    with pytest.raises(TypeError, match="epochs"):
        model.fit(data(), epochs=3)
    with pytest.raises(ValueError, match="freeze_encoder"):
        model.fit(data(), variables=list(model.model.parameters()))
    with pytest.raises(NotImplementedError, match="fit"):
        model.fit_generator(iter([]))
    with pytest.raises(NotImplementedError, match="load_encoder"):
        model.load_from_pretrained(model)


def test_predicting_before_fitting_is_refused():
    with pytest.raises(ValueError, match="not fitted"):
        make().predict(data())
    with pytest.raises(ValueError, match="no labels"):
        make("pretraining").predict(data())
    with pytest.raises(ValueError, match=r"no labels to predict.*pretrained="):
        make("pretraining").predict_uncertainty(data())


# ------------------------------------------------------------ labels and units


def test_predictions_are_in_label_units():
    y = 1000 + 5 * SIGNAL
    dataset = data(y)
    model = fitted(dataset=dataset, nb_epoch=1, learning_rate=1e-4)
    assert np.abs(model.predict(dataset) - 1000).max() < 50
    model.fit(dataset, nb_epoch=1)
    trained = fitted(dataset=dataset, nb_epoch=30)
    assert trained.evaluate(dataset, [MAE])["mae_score"] < 2  # the spread of the labels is 4


def test_shift_and_scale_of_the_labels_shift_and_scale_the_predictions():
    one = fitted(nb_epoch=3)
    other = fitted(nb_epoch=3, dataset=data(1000 + 64 * SIGNAL))
    np.testing.assert_allclose(other.predict(data()), 1000 + 64 * one.predict(data()), atol=0.2)
    np.testing.assert_allclose(
        other.predict_uncertainty(data())[1], 64 * one.predict_uncertainty(data())[1], rtol=0.02
    )


@pytest.mark.parametrize("unit", [1e-9, 1e-25, 1e15])
def test_the_unit_of_the_labels_does_not_matter(unit):
    one, other = fitted(nb_epoch=3), fitted(nb_epoch=3, dataset=data(unit * SIGNAL))
    np.testing.assert_allclose(other.predict(data()), unit * one.predict(data()), rtol=1e-3)
    found, expected = (model.predict_uncertainty(data())[1] for model in (other, one))
    np.testing.assert_allclose(found, unit * expected, rtol=1e-3)


@pytest.mark.parametrize("labels", [1e8 + SIGNAL, 300 + 1e-5 * SIGNAL, 1e-31 * SIGNAL])
def test_labels_that_single_precision_cannot_tell_apart_are_refused(labels):
    with pytest.raises(InvalidInputError, match="labels of task 0 differ by"):
        fitted(dataset=data(labels))


@pytest.mark.parametrize("task", ["regression", "classification"])
def test_a_task_without_a_label_is_refused(task):
    y, w = np.tile(SIGNAL[:, None] > 0, 2), np.ones((N, 2))
    w[:, 1] = 0
    with pytest.raises(InvalidInputError, match="task 1 has no label to learn from"):
        fitted(dataset=data(y, w), n_tasks=2, task=task)


@pytest.mark.parametrize("constant", [0.0, 1234.5, 1e-12])
def test_constant_labels_are_predicted(constant):
    dataset = data(np.full(N, constant))
    prediction = fitted(dataset=dataset, nb_epoch=20).predict(dataset)
    np.testing.assert_allclose(prediction, constant, atol=0.5)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30, -5.0])
def test_a_missing_label_does_not_matter_whatever_stands_there(value):
    w = np.ones(N)
    w[[3, 20]] = 0
    predictions = []
    for filler in (0.0, value):
        y = SIGNAL.copy()
        y[[3, 20]] = filler
        predictions.append(fitted(dataset=data(y, w)).predict(data()))
    np.testing.assert_array_equal(*predictions)
    assert np.isfinite(predictions[0]).all()


@pytest.mark.parametrize("word", [None, "n/a", ""])
def test_a_missing_label_may_be_a_word(word):
    y, w = SIGNAL.astype(object), np.ones(N)
    y[[3, 20]], w[[3, 20]] = word, 0
    expected = fitted(dataset=data(np.where(w, SIGNAL, 0.0), w)).predict(data())
    np.testing.assert_array_equal(fitted(dataset=data(y, w)).predict(data()), expected)
    with pytest.raises(InvalidInputError, match=r"row 5 \(id 5\): label 'large'"):
        y[5] = "large"
        fitted(dataset=data(y, w))


@pytest.mark.parametrize("freeze_encoder", [False, True])
def test_a_row_without_a_label_does_not_matter(freeze_encoder):
    w = np.ones((N, 2))
    w[[3, 20, 21]], w[7, 0], w[8, 1] = 0, 0, 0
    whole = data(np.stack([SIGNAL, -SIGNAL], axis=1), w)
    settings = {"n_tasks": 2, "freeze_encoder": freeze_encoder}
    model = fitted(dataset=whole, **settings)
    other = fitted(dataset=whole.select(np.flatnonzero(w.any(1))), **settings)
    assert_same_state(state(model), state(other))
    assert model.get_global_step() == other.get_global_step()


def test_weights_are_used():
    w = np.where(SIGNAL > 0.5, 1.0, 1e-6)
    model = fitted(dataset=data(w=w), nb_epoch=30)
    assert model.predict(data()).mean() > 0.5


@pytest.mark.parametrize("batch_size", [8, 64])
def test_a_weight_counts_in_the_whole_dataset_not_in_its_batch(batch_size):
    labels, weights = np.repeat([0.0, 1.0], [4, 60]), np.repeat([1.0, 0.01], [4, 60])
    dataset = data(labels, weights, ["NaCl"] * 64)
    settings = {"batch_size": batch_size, "freeze_encoder": True}
    model = fitted(dataset=dataset, nb_epoch=4 * batch_size, **settings)
    assert abs(model.predict(dataset)).max() < 0.1  # the weighted median; the mean is 0.13


@pytest.mark.parametrize(
    ("value", "rule"),
    [
        *((value, "weight 0") for value in (np.nan, np.inf, -np.inf)),
        *((sign * 1e39, r"beyond 1e\+18") for sign in (1, -1)),
    ],
)
def test_a_label_that_is_no_number_is_refused_by_row_and_id(value, rule):
    y = SIGNAL.copy()
    y[5] = value
    dataset = dc.data.NumpyDataset(data().X, y, ids=[f"mp-{i}" for i in range(N)])
    with pytest.raises(InvalidInputError, match=rf"row 5 \(id mp-5\).*{rule}"):
        make().fit(dataset)


def test_other_bad_labels_and_weights_are_refused():
    for dataset, words in [
        (data(np.ones((N, 2))), "2 columns"),
        (data(w=np.zeros(N)), "weights"),
        (data(w=np.full(N, -1.0)), "weights"),
        (data(w=np.full(N, np.nan)), "weights"),
        (data(y=None), "weights"),
        (data().select([]), "no row"),
        (dc.data.NumpyDataset(np.zeros((3, 5)), np.zeros(3)), "row 0"),
        (dc.data.NumpyDataset(np.array(["NaCl"], dtype=object), np.zeros(1)), "featurize"),
    ]:
        with pytest.raises(InvalidInputError, match=words):
            make().fit(dataset)
    with pytest.raises(InvalidInputError, match="no row"):
        fitted().predict(data().select([]))


def test_several_tasks_with_missing_labels():
    y = np.stack([SIGNAL, 100 * SIGNAL, 7 - SIGNAL], axis=1)
    w = np.ones((N, 3))
    w[::4, 1] = 0
    y[::4, 1] = np.nan
    dataset = data(y, w)
    model = fitted(n_tasks=3, dataset=dataset, nb_epoch=30)
    prediction = model.predict(dataset)
    assert prediction.shape == (N, 3) and np.isfinite(prediction).all()
    assert [part.shape for part in model.predict_uncertainty(dataset)] == [(N, 3)] * 2
    for task in range(3):
        assert np.corrcoef(prediction[:, task], (SIGNAL, SIGNAL, -SIGNAL)[task])[0, 1] > 0.5
    errors = np.abs(prediction - y)
    mean, scores = model.evaluate(dataset, [MAE], per_task_metrics=True)
    assert scores["mae_score"] == pytest.approx(np.nanmean(errors, axis=0), rel=1e-4)
    assert mean["mae_score"] == pytest.approx(np.nanmean(errors, axis=0).mean(), rel=1e-4)
    known = np.flatnonzero(w[:, 1])
    scores = model.evaluate(dataset.select(known), [MAE], per_task_metrics=True)[1]["mae_score"]
    assert scores == pytest.approx(errors[known].mean(0), rel=1e-4)
    with pytest.raises(ValueError, match="missing labels"):
        model.evaluate(dataset, [MAE], use_sample_weights=True)


def test_inherited_methods_that_would_fail_say_what_to_use():
    model = make()
    for name in ("fit_generator", "predict_on_generator", "predict_uncertainty_on_batch"):
        with pytest.raises(NotImplementedError, match="use "):
            getattr(model, name)([])


def test_label_statistics_are_weighted_and_of_the_first_fit():
    w = np.arange(N) % 3 + 0.5
    mean, std = LabeledData.from_dataset(data(w=w), 1, False).label_statistics()
    expected = np.average(SIGNAL, weights=w)
    assert mean.item() == pytest.approx(expected, abs=1e-5)
    variance = np.average((SIGNAL - expected) ** 2, weights=w)
    assert std.item() == pytest.approx(variance**0.5, rel=1e-5)
    model = fitted()
    before = state(model, "label_")
    model.fit(data(SIGNAL + 50), nb_epoch=1)
    assert_same_state(before, state(model, "label_"))


def test_transformers_are_undone():
    plain = data(1000 + 5 * SIGNAL)
    transformer = dc.trans.NormalizationTransformer(transform_y=True, dataset=plain)
    model = fitted(dataset=transformer.transform(plain), nb_epoch=5)
    prediction = model.predict(plain, [transformer])
    np.testing.assert_allclose(
        prediction, model.predict(plain) * plain.y.std() + plain.y.mean(), rtol=1e-5
    )
    scores = model.evaluate(transformer.transform(plain), [MAE], [transformer])
    expected = np.abs(prediction.ravel() - plain.y.ravel()).mean()
    assert scores["mae_score"] == pytest.approx(expected, rel=1e-4)


def test_transformers_are_undone_on_a_single_row_of_several_tasks():
    plain = data(np.stack([5 + SIGNAL, 50_000 - 1000 * SIGNAL], axis=1))
    transformer = dc.trans.NormalizationTransformer(transform_y=True, dataset=plain)
    dataset = transformer.transform(plain)
    model = fitted(n_tasks=2, dataset=dataset)
    whole, one = model.predict(dataset, [transformer]), dataset.select([0])
    np.testing.assert_allclose(model.predict(one, [transformer]), whole[:1], rtol=1e-5)
    scores = model.evaluate(one, [MAE], [transformer], per_task_metrics=True)[1]["mae_score"]
    np.testing.assert_allclose(scores, np.abs(whole[0] - plain.y[0]), rtol=1e-3)


# ------------------------------------------------------------- classification


def test_classification_gives_probabilities_and_their_roc_auc():
    y = (SIGNAL > 0.5).astype(float)
    dataset = data(y)
    model = fitted("classification", dataset=dataset, nb_epoch=10)
    probability = model.predict(dataset)
    assert probability.shape == (N, 1) and ((probability > 0) & (probability < 1)).all()
    scores = model.evaluate(dataset, [dc.metrics.Metric(dc.metrics.roc_auc_score)])
    assert scores["roc_auc_score"] == pytest.approx(roc_auc_score(y, probability.ravel()))
    assert scores["roc_auc_score"] > 0.8
    mean, std = model.predict_uncertainty(dataset)
    np.testing.assert_allclose(std, np.sqrt(mean * (1 - mean)), rtol=1e-5)


@pytest.mark.parametrize("wrong", [2.0, -1.0, 0.5, np.nan])
def test_classes_other_than_0_and_1_are_refused(wrong):
    y = (SIGNAL > 0).astype(float)
    y[4] = wrong
    with pytest.raises(InvalidInputError, match=r"row 4 \(id 4\)"):
        make("classification").fit(data(y))
    w = np.ones(N)
    w[4] = 0
    fitted("classification", dataset=data(y, w), nb_epoch=1)


def test_several_classification_tasks():
    y = np.stack([SIGNAL > 0.5, SIGNAL < 0], axis=1).astype(float)
    model = fitted("classification", n_tasks=2, dataset=data(y), nb_epoch=10)
    metric = dc.metrics.Metric(dc.metrics.roc_auc_score, np.mean)
    expected = np.mean([roc_auc_score(y[:, i], model.predict(data())[:, i]) for i in (0, 1)])
    score = model.evaluate(data(y), [metric])["mean-roc_auc_score"]
    assert score == pytest.approx(expected)


def area(truth, found):
    precision, recall, _ = sk.precision_recall_curve(truth, found)
    return sk.auc(recall, precision)


#: By name, of labels and probabilities of one task.
SCORES = {
    "accuracy_score": lambda y, p, **w: sk.accuracy_score(y, p > 0.5, **w),
    "f1_score": lambda y, p, **w: sk.f1_score(y, p > 0.5, **w),
    "matthews_corrcoef": lambda y, p, **w: sk.matthews_corrcoef(y, p > 0.5, **w),
    "roc_auc_score": sk.roc_auc_score,
    "prc_auc_score": area,
}
CLASS_METRICS = [dc.metrics.Metric(getattr(dc.metrics, name)) for name in SCORES]


@pytest.mark.parametrize(
    "tasks",
    [
        [[0.9997, 0.9997, 0.9993, 0.9993]],
        [[0.2, 0.9, 0.9, 0.2], [0.6, 0.4, 0.6, 0.7]],
        [[0.3, 0.3, 0.3, 0.3], [0.9, 0.8, 0.1, 0.9], [0.9, 0.9, 0.0, 0.9]],
    ],
)
@pytest.mark.parametrize("missing", [False, True])
def test_few_probabilities_are_not_taken_for_classes(tasks, missing, monkeypatch):
    found, n_tasks = np.float32(tasks).T, len(tasks)
    labels = np.stack([[1, 1, 0, 1], [0, 1, 1, 0], [1, 1, 0, 1]][:n_tasks], axis=1)
    weights = np.ones(labels.shape)
    weights[3, 0] = not missing
    model = fitted("classification", n_tasks=n_tasks, dataset=data(SIGNAL[:, None] > [0] * n_tasks))
    monkeypatch.setattr(model, "_mean_and_std", lambda _: [found])
    dataset = data(labels, weights, FORMULAS[:4])
    scores, per_task = model.evaluate(dataset, CLASS_METRICS, per_task_metrics=True)
    for name, score in SCORES.items():
        known = [np.flatnonzero(column) for column in weights.T]
        expected = [score(labels[k, i], found[k, i]) for i, k in enumerate(known)]
        np.testing.assert_allclose(per_task[name], expected if n_tasks > 1 else expected[0])
        assert scores[name] == pytest.approx(np.mean(expected))


def test_sample_weights_count_where_probabilities_are_few(monkeypatch):
    labels, found = np.array([1, 1, 0, 0]), np.float32([0.9, 0.3, 0.9, 0.3])
    model = fitted("classification", dataset=data(SIGNAL > 0))
    monkeypatch.setattr(model, "_mean_and_std", lambda _: [found[:, None]])
    weights = np.array([1.0, 2.0, 3.0, 4.0])
    dataset = data(labels, weights, FORMULAS[:4])
    for metric in CLASS_METRICS[:4]:
        (score,) = model.evaluate(dataset, [metric], use_sample_weights=True).values()
        expected = SCORES[metric.name](labels, found, sample_weight=weights)
        assert score == pytest.approx(expected), metric.name


@pytest.mark.parametrize("n_tasks", [1, 2])
def test_scores_of_many_probabilities_are_those_of_deepchem(n_tasks):
    labels = np.stack([SIGNAL > 0.5, SIGNAL < 0][:n_tasks], axis=1).astype(float)
    dataset = data(labels, np.arange(1.0, N + 1)[:, None] * np.ones(n_tasks))
    model = fitted("classification", n_tasks=n_tasks, dataset=dataset)
    for metrics, told in (
        (CLASS_METRICS, {"per_task_metrics": True}),
        (CLASS_METRICS[:4], {"use_sample_weights": True}),
        ([dc.metrics.Metric(dc.metrics.roc_auc_score, max if n_tasks > 1 else np.max)], {}),
        ([dc.metrics.Metric(dc.metrics.rms_score)], {}),  # the root of the Brier score
    ):
        expected = dc.utils.evaluate.Evaluator(model, dataset, []).compute_model_performance(
            metrics, **told
        )
        assert model.evaluate(dataset, metrics, **told) == expected


def test_early_stopping_scores_few_probabilities_as_probabilities(monkeypatch):
    model = make("classification")
    monkeypatch.setattr(model, "_mean_and_std", lambda _: [np.float32([[0.9997], [0.9993]])])
    valid, log = data([1, 1], formulas=FORMULAS[:2]), io.StringIO()
    stop = polysrl_dc.EarlyStopping(valid, CLASS_METRICS[0], 1, 9, output_file=log)
    model.fit(data(SIGNAL > 0), nb_epoch=1, callbacks=stop)
    assert stop.get_best_score() == 1


# ---------------------------------------------------------------- uncertainty


@pytest.mark.parametrize("kwargs", [{}, {"n_ensemble": 2}, {"n_ensemble": 2, "config": PLAIN}])
def test_uncertainty_is_positive_and_its_mean_is_the_prediction(kwargs):
    model = fitted(**kwargs)
    mean, std = model.predict_uncertainty(data())
    assert mean.shape == std.shape == (N, 1)
    assert (std > 0).all() and np.isfinite(std).all() and np.ptp(std) > 0
    np.testing.assert_array_equal(mean, model.predict(data()))


def test_uncertainty_without_a_source_is_refused():
    model = fitted(config=PLAIN)
    with pytest.raises(ValueError, match="n_ensemble"):
        model.predict_uncertainty(data())
    with pytest.raises(ValueError, match="dropout"):
        fitted().predict_uncertainty(data(), masks=50)


def test_uncertainty_is_greater_where_labels_are_noisy():
    noise = np.random.default_rng(0).normal(size=(20, N))
    noisy = np.array(["Cl2" in formula for formula in FORMULAS])
    y = np.where(noisy, noise, 0.01 * noise).ravel()
    dataset = data(y, formulas=FORMULAS * 20)
    model = fitted(dataset=dataset, nb_epoch=10, batch_size=32)
    _, std = model.predict_uncertainty(data())
    assert std[noisy].mean() > 2 * std[~noisy].mean()


# ------------------------------------------------------ encoder, seed, batches


def test_a_frozen_encoder_stays_as_it_is():
    model = make(freeze_encoder=True, n_ensemble=2)
    before, embedding = state(model, "encoders."), model.predict_embedding(data())
    heads = state(model, "heads.")
    model.fit(data(), nb_epoch=3)
    assert_same_state(before, state(model, "encoders."))
    np.testing.assert_array_equal(embedding, model.predict_embedding(data()))
    assert not torch.equal(heads["heads.1.0.weight"], model.model.heads[1][0].weight)
    free = make()
    before = state(free, "encoders.")
    free.fit(data(), nb_epoch=1)
    assert not torch.equal(
        before["encoders.0.mean_output.weight"], free.model.encoders[0].mean_output.weight
    )


@pytest.fixture(scope="module")
def two_encoders(tmp_path_factory):
    folders = [tmp_path_factory.mktemp("encoder") for _ in range(2)]
    for seed, folder in enumerate(folders):
        make(seed=seed + 10).save(folder)
    return folders


@pytest.mark.parametrize("freeze_encoder", [False, True])
def test_members_start_from_the_encoders_of_a_list(two_encoders, freeze_encoder):
    model = make(pretrained=two_encoders, freeze_encoder=freeze_encoder, n_ensemble=4)
    singles = [make(pretrained=folder) for folder in two_encoders]
    assert len(model.model.encoders) == (2 if freeze_encoder else 4)
    for i, encoder in enumerate(model.model.encoders):
        single = singles[i % 2].model.encoders[0].state_dict()
        assert_same_state(single, encoder.state_dict())
    model.fit(data(), nb_epoch=2)
    graphs = StoichiometryBatch.from_graphs(data().X)
    network = model.model.eval()
    with torch.no_grad():
        found = network.outputs(network.embed(graphs))[0]
        for i, head in enumerate(network.heads):
            mean = network.encoders[i % len(network.encoders)].mean(graphs)
            expected = head(mean * model.config.head_scale)
            torch.testing.assert_close(found[i], expected, rtol=1e-4, atol=1e-5)
    assert make(pretrained=two_encoders).settings["n_ensemble"] == 2
    for wrong in ({"n_ensemble": 3}, {"pretrained": []}):
        with pytest.raises(ValueError, match="n_ensemble is"):
            make(**{"pretrained": two_encoders, **wrong})
    with pytest.raises(ValueError, match="pretraining has one"):
        make("pretraining", pretrained=two_encoders)


def test_a_head_is_trained_on_the_encoder_that_it_reads(two_encoders):
    both = make(pretrained=two_encoders, freeze_encoder=True, n_ensemble=4).model.eval()
    labeled = LabeledData.from_dataset(data(), 1, False)
    with torch.no_grad():
        prepared = labeled.with_embeddings(both.embed(labeled.inputs))
        rows = np.stack([np.arange(i, i + 5) for i in range(4)])
        loss = float(prepared.loss(both, rows, torch.Generator()))
        means = [both.encoders[i % 2].mean(labeled.inputs[rows[i]]) for i in range(4)]
        index = torch.as_tensor(rows)
        expected = both.loss(torch.stack(means), labeled.labels[index], labeled.weights[index])
    assert loss == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("freeze_encoder", [False, True])
def test_embeddings_of_encoders_stand_side_by_side(two_encoders, freeze_encoder):
    model = make(pretrained=two_encoders, freeze_encoder=freeze_encoder)
    singles = [make(pretrained=folder) for folder in two_encoders]
    both, apart = model.predict_embedding(data()), [m.predict_embedding(data()) for m in singles]
    assert both.shape == (N, 32)
    np.testing.assert_allclose(both @ both.T, np.mean([x @ x.T for x in apart], 0), atol=1e-5)


def test_embeddings_have_unit_length():
    embedding = fitted(n_ensemble=2).predict_embedding(data())
    assert embedding.shape == (N, 2 * 16)
    np.testing.assert_allclose(np.linalg.norm(embedding, axis=1), 1, rtol=1e-5)


@pytest.mark.parametrize("freeze_encoder", [False, True])
def test_polymorphism_is_that_of_the_first_encoder_with_a_trained_variance(
    two_encoders, freeze_encoder, tmp_path
):
    pretrained = make("pretraining", seed=12)
    pretrained.variance_trained = [True]
    pretrained.save(tmp_path)
    expected = pretrained.predict_polymorphism(data())
    assert expected.shape == (N,) and (expected > 0).all()
    with torch.no_grad():  # the geometric mean of the variances
        log_sigma = pretrained.model.eval().encoder(StoichiometryBatch.from_graphs(data().X))[1]
    np.testing.assert_allclose(expected, np.exp(2 * log_sigma.numpy().mean(1)), rtol=1e-5)
    starts = [two_encoders[0], tmp_path, two_encoders[1]]
    model = make(pretrained=starts, freeze_encoder=freeze_encoder, n_ensemble=6)
    assert model.variance_trained == [False, True, False] * (1 if freeze_encoder else 2)
    np.testing.assert_allclose(model.predict_polymorphism(data()), expected, rtol=1e-5)
    model.load_encoder(two_encoders[0])
    for untrained in (model, make(n_ensemble=2), make("pretraining", objective="graphcl")):
        with pytest.raises(ValueError, match=r"no encoder .* trained variance: use one"):
            untrained.predict_polymorphism(data())


def test_the_seed_decides_the_result_and_the_global_generators_do_not():
    one = fitted(seed=5)
    torch.manual_seed(77)
    np.random.seed(77)  # noqa: NPY002
    same, other = fitted(seed=5), fitted(seed=6)
    assert_same_state(state(one), state(same))
    assert not np.allclose(one.predict(data()), other.predict(data()))


def test_a_new_model_leaves_the_generators_of_all_devices_as_they_are(monkeypatch):
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    before = torch.get_rng_state()
    make(seed=5)
    assert seeded == [] and torch.equal(torch.get_rng_state(), before)


def test_first_weights_do_not_depend_on_the_default_device():
    expected = state(make(seed=5))
    with torch.device("meta"):
        model = make(seed=5)
    assert_same_state(state(model), expected)


@pytest.mark.parametrize("n", [17, 20, 9, 5])
def test_the_last_batch_is_never_padded(n, monkeypatch):
    seen = []
    loss = LabeledData.loss

    def spy(self, network, rows, generator):
        seen.append(rows[0].tolist())
        return loss(self, network, rows, generator)

    monkeypatch.setattr(LabeledData, "loss", spy)
    make().fit(data().select(range(n)), nb_epoch=1)
    assert sorted(row for rows in seen for row in rows) == list(range(n))
    seen.clear()
    make().fit(data().select(range(n)), nb_epoch=1, deterministic=True)
    assert [row for rows in seen for row in rows] == list(range(n))


def test_one_row_can_be_fitted_and_predicted():
    one = data().select([0])
    assert np.isfinite(fitted(dataset=one).predict(one)).all()


def test_prediction_does_not_depend_on_the_batch():
    model = fitted()
    whole = model.predict(data())
    parts = [model.predict(data().select([i])) for i in range(4)]
    np.testing.assert_allclose(np.concatenate(parts), whole[:4], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(model.predict_on_batch(data().X), whole)


def test_early_stopping_ends_the_fit_and_restores_the_best(tmp_path):
    valid = data(SIGNAL + 3)  # off by a constant, so that longer training does not help for ever
    model = make(learning_rate=5e-2, schedule="constant")
    with open(tmp_path / "log.txt", "w") as log:
        stop = polysrl_dc.EarlyStopping(valid, MAE, interval=1, patience=3, output_file=log)
        model.fit(data(), nb_epoch=200, checkpoint_interval=0, callbacks=stop)
    lines = (tmp_path / "log.txt").read_text().splitlines()
    scores = [float(line.split("mae_score=")[1]) for line in lines]
    best = int(np.argmin(scores))
    assert len(scores) == best + 1 + 3 < 200 * 5
    assert model.evaluate(valid, [MAE])["mae_score"] == pytest.approx(min(scores), rel=1e-4)
    with pytest.raises(ValueError, match="patience is 0"):
        polysrl_dc.EarlyStopping(valid, MAE, interval=1, patience=0)


def test_early_stopping_keeps_the_highest_score_where_higher_is_better():
    accuracy = dc.metrics.Metric(dc.metrics.accuracy_score)
    error = dc.metrics.Metric(dc.metrics.mean_squared_error)
    r2 = dc.metrics.Metric(dc.metrics.pearson_r2_score)
    for metric, lower in ((accuracy, False), (r2, False), (error, True), (MAE, True)):
        stop = polysrl_dc.EarlyStopping(data(), metric, interval=1, patience=1)
        assert stop.save_on_minimum is lower
    own = dc.metrics.Metric(lambda truth, found: 0.0, name="own", mode="regression")
    with pytest.raises(ValueError, match="save_on_minimum must say it"):
        polysrl_dc.EarlyStopping(data(), own, interval=1, patience=1)
    stop = polysrl_dc.EarlyStopping(data(), own, interval=1, patience=1, save_on_minimum=False)
    assert stop.save_on_minimum is False

    log = io.StringIO()
    stop = polysrl_dc.EarlyStopping(data(), r2, interval=5, patience=3, output_file=log)
    model = make()
    model.fit(data(), nb_epoch=30, checkpoint_interval=0, callbacks=stop)
    scores = [float(line.split("=")[1]) for line in log.getvalue().splitlines()]
    assert stop.get_best_score() == pytest.approx(max(scores), rel=1e-4)
    assert max(scores) > scores[0] and len(scores) > 5
    found = model.evaluate(data(), [r2])["pearson_r2_score"]
    assert found == pytest.approx(max(scores), rel=1e-4)


def stopper(valid, **kwargs):
    return polysrl_dc.EarlyStopping(valid, MAE, interval=1, output_file=io.StringIO(), **kwargs)


@pytest.mark.parametrize("save_on_minimum", [True, False])
def test_early_stopping_without_an_evaluation_has_no_score(save_on_minimum):
    stop = stopper(data(), patience=1, save_on_minimum=save_on_minimum)
    stop.interval = 99
    fitted().fit(data(), nb_epoch=1, callbacks=stop)
    with pytest.raises(ValueError, match="no evaluation so far: one comes every 99 steps"):
        stop.get_best_score()


def test_early_stopping_forgets_one_model_when_it_meets_another():
    stop = stopper(data(), patience=9)
    make().fit(data(100 + SIGNAL), nb_epoch=2, callbacks=stop)
    other, alone = make(seed=1), make(seed=1)
    stop.interval = 99  # it meets the other one at the end only
    other.fit(data(), nb_epoch=2, callbacks=stop)
    alone.fit(data(), nb_epoch=2)
    assert_same_state(state(alone), state(other))
    stop.interval = 1
    other.fit(data(), nb_epoch=2, callbacks=stop)
    assert stop.get_best_score() < 2  # not near 100, as of the first


@pytest.mark.parametrize("fails", [False, True])
def test_early_stopping_starts_anew_in_every_fit(fails, monkeypatch):
    model, stop, states = make(), stopper(data(), patience=2), {}
    scores = iter([1.0, 2.0, 2.0, 5.0, 4.0, 6.0, 6.0])
    monkeypatch.setattr(model, "evaluate", lambda *_: {"mae_score": next(scores)})

    def note(model, step):
        states[step] = state(model)

    def end(model, step):
        if fails and step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) if fails else nullcontext():
        model.fit(data(), nb_epoch=2, callbacks=[note, end, stop])
    next(scores) if fails else assert_same_state(states[1], state(model))
    model.fit(data(), nb_epoch=2, callbacks=[note, stop])
    assert list(states) == [1, 2, 3, 4, 5, 6, 7] and stop.get_best_score() == 4.0
    assert_same_state(states[5], state(model))


def test_a_score_that_is_nan_is_no_better_one(monkeypatch):
    model, stop = make(), stopper(data(), patience=3)
    scores = iter([np.nan, 2.0, np.nan, 1.0, np.nan, 3.0, np.nan])
    monkeypatch.setattr(model, "evaluate", lambda *_: {"mae_score": next(scores)})
    model.fit(data(), nb_epoch=9, callbacks=stop)
    assert stop.get_best_score() == 1.0 and model.get_global_step() == 7


def test_evaluation_is_the_same_with_labels_as_objects_and_metrics_in_a_tuple():
    model, pearson = fitted(), dc.metrics.pearson_r2_score
    metrics = [MAE, pearson, dc.metrics.Metric(dc.metrics.rms_score, name="mae_score")]
    expected = model.evaluate(data(), metrics)
    assert expected.keys() == {"mae_score", "metric-2"}
    for y in (SIGNAL.astype(object), SIGNAL.astype(str)):
        assert model.evaluate(data(y), tuple(metrics)) == pytest.approx(expected, rel=1e-5)
    missing = data([*SIGNAL, 0.0], np.r_[np.ones(N), 0.0], [*FORMULAS, "CsF"])
    assert model.evaluate(missing, tuple(metrics)) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_evaluation_names_the_row_of_a_bad_label(bad):
    labels = SIGNAL.copy()
    labels[3] = bad
    with pytest.raises(InvalidInputError, match=r"row 3 .*label"):
        fitted().evaluate(data(labels), [MAE])


def test_deepchem_searches_its_hyperparameters(tmp_path):
    train, valid = (data(SIGNAL[i::2], formulas=FORMULAS[i::2]) for i in range(2))
    search = dc.hyper.GridHyperparamOpt(make)
    grid = {"learning_rate": [1e-6, 1e-2], "weight_decay": [0.0]}
    settings = {"use_max": False, "nb_epoch": 5, "logdir": str(tmp_path)}
    best, chosen, scores = search.hyperparam_search(grid, train, valid, MAE, **settings)
    assert chosen == {"learning_rate": 1e-2, "weight_decay": 0.0} and len(scores) == 2
    assert best.evaluate(valid, [MAE])["mae_score"] == min(scores.values()) < max(scores.values())
    kept = polysrl_dc.PolySRLModel.from_pretrained(best.model_dir)
    np.testing.assert_array_equal(kept.predict(valid), best.predict(valid))
