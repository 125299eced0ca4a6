"""Calibrated standard deviations: what they hold, what keeps and what forgets them."""

import math
from dataclasses import asdict

import deepchem as dc
import numpy as np
import pytest
from models import SIGNAL, N, data, fitted, make

from polysrl_dc.checkpoints import CheckpointError, load_checkpoint, save_checkpoint
from polysrl_dc.errors import InvalidInputError
from polysrl_dc.recalibration import Calibration, UncalibratedWarning

OTHER = SIGNAL + np.sin(7.0 * np.arange(N))  # labels that the model has not learned
KNOWN = np.ones((N, 1), bool)


def test_standard_deviations_that_are_right_but_for_a_factor_become_right():
    rng = np.random.default_rng(0)
    own = rng.uniform(1, 1.01, (100_000, 1))
    errors = 7 * own * rng.laplace(scale=math.sqrt(0.5), size=own.shape)
    std = Calibration.fit(errors, own, np.ones(own.shape, bool), 0).apply(own)
    np.testing.assert_allclose(std, 7 * own, rtol=0.02)
    inside = np.abs(errors) <= -math.log(0.05) / math.sqrt(2) * std  # 2.12
    assert inside.mean() == pytest.approx(0.95, abs=0.003)


@pytest.mark.parametrize("n", [20, 33, 500])
def test_so_many_errors_are_inside_whatever_their_distribution(n):
    rng = np.random.default_rng(n)
    own, errors = np.exp(rng.normal(size=(n, 1))), rng.standard_t(1, size=(n, 1))
    std = Calibration.fit(errors, own, np.ones(own.shape, bool), 0).apply(own)
    assert (np.abs(errors) <= 2.118 * std).sum() == 1 + math.floor(0.95 * (n - 1))


def test_neither_the_order_of_rows_nor_the_unit_matters():
    rng = np.random.default_rng(2)
    own, errors = np.exp(rng.normal(size=(50, 2))), rng.normal(size=(50, 2))
    known = rng.random((50, 2)) < 0.9
    found = Calibration.fit(errors, own, known, 0)
    order = rng.permutation(50)
    assert Calibration.fit(-errors[order], own[order], known[order], 0) == found
    other = Calibration.fit(1000 * errors, 1000 * own, known, 0)
    np.testing.assert_allclose(other.factors, found.factors)
    np.testing.assert_allclose(other.apply(1000 * own), 1000 * found.apply(own))


def test_rows_that_the_model_is_too_certain_of_do_not_widen_all():
    own, errors = np.ones((40, 1)), np.where(np.arange(40) % 2, 1.0, -1.0)[:, None]
    known = np.ones(own.shape, bool)
    plain = Calibration.fit(errors, own, known, 0).apply(own)
    own[:8] = 1e-9
    std = Calibration.fit(errors, own, known, 0).apply(own)
    np.testing.assert_allclose(std[:8], plain[:8], rtol=1e-6)
    np.testing.assert_allclose(std[8:], 2 * plain[8:], rtol=1e-6)


def test_rows_far_too_certain_or_without_error_give_no_calibration():
    for errors, own, known, message in (
        (np.ones((N, 1)), np.ones((N, 1)), np.arange(N)[:, None] < 19, "19 labels of task 0"),
        (np.zeros((N, 1)), np.ones((N, 1)), KNOWN, "task 0: no error"),
        (np.ones((N, 1)), np.zeros((N, 1)), KNOWN, "no standard deviation but zero"),
        (np.zeros((N, 1)), np.zeros((N, 1)), KNOWN, "task 0: no error"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            Calibration.fit(errors, own, known, 0)


@pytest.mark.parametrize("n_samples", [0, 8])
def test_a_calibrated_model_has_another_std_and_nothing_else(n_samples):
    model = fitted(n_ensemble=2)
    mean, own = model.predict_uncertainty(data(), n_samples=n_samples)
    calibration = model.calibrate(data(OTHER), np.int64(n_samples))
    again, std = model.predict_uncertainty(data())
    np.testing.assert_array_equal(mean, again)
    np.testing.assert_array_equal(mean, model.predict(data()))
    np.testing.assert_array_equal(std, calibration.apply(own))
    assert calibration == Calibration.fit(OTHER[:, None] - mean, own, KNOWN, n_samples)
    np.testing.assert_array_equal(own, model.predict_uncertainty(data(), n_samples=n_samples)[1])


def test_predictions_of_other_models_calibrate_a_model_that_has_learned_from_the_rows():
    model, other = fitted(), fitted(seed=1)
    predicted = other.predict_uncertainty(data(OTHER), n_samples=8)
    assert model.calibrate(data(OTHER), 8, predicted) == other.calibrate(data(OTHER), 8)
    assert model.calibrate(data(OTHER), 8, np.stack(predicted)) == other.calibration
    own = model.predict_uncertainty(data(), n_samples=8)[1]
    np.testing.assert_array_equal(
        model.predict_uncertainty(data())[1], other.calibration.apply(own)
    )
    mean, std = predicted
    for wrong in ((mean[:-1], std[:-1]), (mean, std[:, 0]), (mean[:, 0], std), (mean, np.nan * std),
                  (np.inf * mean, std)):  # fmt: skip
        with pytest.raises(ValueError, match=r"shape|finite"):
            model.calibrate(data(OTHER), 8, wrong)
    assert model.calibration == other.calibration  # as before


def test_each_task_has_its_own_and_missing_labels_do_not_count():
    labels = np.stack([SIGNAL, 100 * OTHER, SIGNAL], axis=1)
    model = fitted(n_tasks=3, dataset=data(labels))
    weights = np.ones_like(labels)
    weights[:10, 1] = 0
    wrong = labels + 1
    wrong[:10, 1] = np.nan
    calibration = model.calibrate(data(wrong, weights), 0)
    mean, own = model.predict_uncertainty(data(), n_samples=0)
    assert len(set(calibration.factors)) == len(set(calibration.offsets)) == 3
    alone = Calibration.fit((wrong - mean)[10:, 1:2], own[10:, 1:2], KNOWN[10:], 0)
    assert (calibration.factors[1], calibration.offsets[1]) == (*alone.factors, *alone.offsets)
    calibrated = model.predict_uncertainty(data())[1]
    np.testing.assert_array_equal(calibrated[:, 1:2], alone.apply(own[:, 1:2]))
    assert calibration.uncalibrated == ()


def test_tasks_of_few_labels_stay_as_they_are_and_are_named():
    labels = np.stack([OTHER, SIGNAL, OTHER], axis=1)
    model = fitted(n_tasks=3, dataset=data(labels))
    mean, own = model.predict_uncertainty(data(), n_samples=0)
    weights = np.ones_like(labels)
    weights[19:, 1] = 0
    named = "not calibrated: 19 labels of task 1 are too few, at least 20 are needed$"
    with pytest.warns(UncalibratedWarning, match=named) as said:
        calibration = model.calibrate(data(labels, weights), 0)
    assert said[0].filename == __file__ and calibration.uncalibrated == (1,)
    std = model.predict_uncertainty(data())[1]
    np.testing.assert_array_equal(std[:, 1], own[:, 1])
    alone = Calibration.fit(
        labels[:, [0, 2]] - mean[:, [0, 2]], own[:, [0, 2]], weights[:, ::2] > 0, 0
    )
    np.testing.assert_array_equal(std[:, [0, 2]], alone.apply(own[:, [0, 2]]))
    weights[19:] = 0
    with pytest.raises(InvalidInputError, match=r"19 labels of task 0 .* 19 labels of task 2 are"):
        model.calibrate(data(labels, weights), 0)
    assert model.calibration == calibration  # as before
    perfect = np.stack([mean[:, 0], *labels.T[1:]], axis=1)
    with pytest.warns(UncalibratedWarning, match="task 0: no error"):
        assert model.calibrate(data(perfect), 0).uncalibrated == (0,)


def test_it_is_saved_with_the_model_and_with_a_checkpoint(tmp_path):
    model = fitted(model_dir=str(tmp_path))
    model.save_checkpoint()
    model.calibrate(data(OTHER), 4)
    model.save()
    std = model.predict_uncertainty(data())[1]
    again = dc.models.PolySRLModel.from_pretrained(tmp_path)
    assert again.calibration == model.calibration
    np.testing.assert_array_equal(std, again.predict_uncertainty(data())[1])
    model.restore()  # from before
    assert model.calibration is None
    model.reload()
    assert model.calibration == again.calibration


def test_other_weights_have_none(tmp_path):
    model = fitted()
    model.calibrate(data(OTHER))
    model.save(tmp_path)
    model.fit(data(), nb_epoch=1, checkpoint_interval=0)
    assert model.calibration is None
    model.calibrate(data(OTHER))
    model.load_encoder(tmp_path)
    assert model.calibration is None


def test_files_without_one_are_read_and_wrong_ones_are_not(tmp_path):
    fitted().save(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors, manifest = load_checkpoint(path)
    right = asdict(Calibration((1.0,), (0.0,), 1))
    save_checkpoint(path, tensors, {**manifest, "calibration": right})
    assert dc.models.PolySRLModel.from_pretrained(tmp_path).calibration is not None
    for wrong in (
        *({}, [], 1, False, {"factors": [1.0]}, {**right, "level": 0.9}),
        *({**right, "factors": factors} for factors in ([], [0.0], [-1.0], ["1"], [None], [1, 1])),
        *({**right, "offsets": offsets} for offsets in ([], [-0.1], [[0.1]], 1.0)),
        *({**right, "n_samples": n} for n in (-1, 0.5, None)),
    ):
        save_checkpoint(path, tensors, {**manifest, "calibration": wrong})
        with pytest.raises(CheckpointError, match=r"model\.safetensors"):
            dc.models.PolySRLModel.from_pretrained(tmp_path)
    del manifest["calibration"]  # as files were before
    save_checkpoint(path, tensors, manifest)
    assert dc.models.PolySRLModel.from_pretrained(tmp_path).calibration is None


def test_what_has_no_std_cannot_be_calibrated():
    nothing = "only a fitted model of regression"
    with pytest.raises(ValueError, match=nothing):
        fitted(task="classification", dataset=data((SIGNAL > 0).astype(float))).calibrate(data())
    with pytest.raises(ValueError, match=nothing):
        make().calibrate(data(), predicted=(KNOWN, KNOWN))
    for wrong in (np.zeros((1, 1)), np.zeros(N)):  # both would be broadcast
        with pytest.raises(ValueError, match=r"the mean has shape .*, not \(36, 1\)"):
            fitted().calibrate(data(), predicted=(wrong, np.ones((N, 1))))
    with pytest.raises(TypeError, match="float"):
        fitted().calibrate(None, 8.5)  # before anything is read
    with pytest.raises(ValueError, match="n_samples is -1"):
        fitted().calibrate(data(), -1)
    with pytest.raises(InvalidInputError, match="row 2 "):
        fitted().calibrate(data(np.where(np.arange(N) == 2, np.nan, SIGNAL)))
