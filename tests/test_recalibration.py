"""Calibrated standard deviations: what they hold, what keeps and what forgets them."""

import math
import pickle
from dataclasses import asdict

import deepchem as dc
import numpy as np
import pytest
from models import FORMULAS, SIGNAL, N, data, fitted, make

from polysrl_dc.checkpoints import CheckpointError, load_checkpoint, save_checkpoint
from polysrl_dc.domain import Domain, keep_formulas
from polysrl_dc.errors import InvalidInputError
from polysrl_dc.recalibration import Calibration, UncalibratedWarning

OTHER = SIGNAL + np.sin(7.0 * np.arange(N))  # labels that the model has not learned
KNOWN = np.ones((N, 1), bool)
WIDE = 100  # labels, beside errors that shall grow without bounds
ASKED = [FORMULAS[0], "UTe5", "Xe", "CsBr"]


def test_standard_deviations_that_are_right_but_for_a_factor_become_right():
    rng = np.random.default_rng(0)
    own = rng.uniform(1, 1.01, (100_000, 1))
    errors = 7 * own * rng.laplace(scale=math.sqrt(0.5), size=own.shape)
    std = Calibration.fit(errors, own, np.ones(own.shape, bool), False).apply(own)
    np.testing.assert_allclose(std, 7 * own, rtol=0.02)
    inside = np.abs(errors) <= -math.log(0.05) / math.sqrt(2) * std  # 2.12
    assert inside.mean() == pytest.approx(0.95, abs=0.003)


@pytest.mark.parametrize("n", [20, 33, 500])
def test_so_many_errors_are_inside_whatever_their_distribution(n):
    rng = np.random.default_rng(n)
    own, errors = np.exp(rng.normal(size=(n, 1))), rng.standard_t(1, size=(n, 1))
    std = Calibration.fit(errors, own, np.ones(own.shape, bool), False).apply(own)
    assert (np.abs(errors) <= 2.118 * std).sum() == math.floor(0.95 * (n + 1))


def test_of_few_errors_one_more_is_inside_as_often_as_promised():
    errors = np.random.default_rng(0).uniform(size=(4000, 30, 1))
    known, own = np.ones((30, 1), bool), np.ones((30, 1))
    ends = [2.118 * Calibration.fit(e, own, known, False).apply(own)[0, 0] for e in errors]
    assert np.minimum(ends, 1).mean() == pytest.approx(0.95, abs=0.003)  # 5 standard errors


def test_neither_the_order_of_rows_nor_the_unit_matters():
    rng = np.random.default_rng(2)
    own, errors = np.exp(rng.normal(size=(50, 2))), rng.normal(size=(50, 2))
    known = rng.random((50, 2)) < 0.9
    found = Calibration.fit(errors, own, known, False)
    order = rng.permutation(50)
    assert Calibration.fit(-errors[order], own[order], known[order], False) == found
    other = Calibration.fit(1000 * errors, 1000 * own, known, False)
    np.testing.assert_allclose(other.factors, found.factors)
    np.testing.assert_allclose(other.apply(1000 * own), 1000 * found.apply(own))


def test_rows_that_the_model_is_too_certain_of_do_not_widen_all():
    own, errors = np.ones((40, 1)), np.where(np.arange(40) % 2, 1.0, -1.0)[:, None]
    known = np.ones(own.shape, bool)
    plain = Calibration.fit(errors, own, known, False).apply(own)
    own[:8] = 1e-9
    std = Calibration.fit(errors, own, known, False).apply(own)
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
            Calibration.fit(errors, own, known, False)


def grown(n, rate, seed=0):
    """Errors whose scale grows with the distance at a rate, standard deviations that do not."""
    rng = np.random.default_rng(seed)
    distance = rng.uniform(0, 1, n)
    errors = 0.3 * np.exp(rate * distance)[:, None] * rng.laplace(size=(n, 1))
    return errors, np.ones((n, 1)), np.ones((n, 1), bool), distance


@pytest.mark.parametrize("rate", [0.5, 2.0, 4.5])
def test_standard_deviations_grow_with_the_distance_as_the_errors_do(rate):
    errors, own, known, distance = grown(50_000, rate)
    found = Calibration.fit(errors, own, known, False, distance, WIDE * errors)
    assert found.needs_distance and found.rates[0] == pytest.approx(rate, abs=0.05)
    std = found.apply(own, distance)
    np.testing.assert_allclose(std[:, 0], 0.3 * math.sqrt(2) * np.exp(rate * distance), rtol=0.05)
    inside = np.abs(errors[:, 0]) <= 2.118 * std[:, 0]
    without = Calibration.fit(errors, own, known, False).apply(own)
    plain = np.abs(errors[:, 0]) <= 2.118 * without[:, 0]
    for part in (distance < 0.2, distance > 0.8):
        assert inside[part].mean() == pytest.approx(0.95, abs=0.01)
        assert abs(plain[part].mean() - 0.95) > 0.01


def test_they_grow_no_further_than_the_labels_spread():
    errors, own, known, distance = grown(1000, 2.0)
    labels = np.random.default_rng(1).normal(7, 0.2, (1000, 1))
    found = Calibration.fit(errors, own, known, False, distance, labels)
    differences = np.abs(labels - labels.T)
    assert 2.118 * found.ceilings[0] == pytest.approx(np.quantile(differences, 0.95), rel=0.05)
    assert found.rates == Calibration.fit(errors, own, known, False, distance, errors).rates
    std = found.apply(np.array([[0.0], [0.0], [0.0], [9.0]]), np.array([0, 0.01, 1, 1]))[:, 0]
    assert std[0] < std[1] < std[2] == pytest.approx(found.ceilings[0])
    near = found.factors[0] * (9 + found.offsets[0])
    assert std[3] == pytest.approx(near) and near > found.ceilings[0]  # its own is not cut


def test_rows_without_a_label_count_nowhere():
    errors, own, known, distance = grown(400, 2.0)
    labels = np.random.default_rng(1).normal(7, 0.2, (400, 1))
    known[::2] = False
    rows = known[:, 0]
    alone = (part[rows] for part in (errors, own, known))
    expected = Calibration.fit(*alone, False, distance[rows], labels[rows])
    for part, wrong in ((errors, 99.0), (own, 99.0), (labels, 0.0)):
        part[~rows] = wrong
    assert Calibration.fit(errors, own, known, False, distance, labels) == expected


def test_the_rate_is_the_likeliest_one_and_small_where_rows_are_few():
    errors, own, known, distance = grown(200, 1.5)
    ratios = np.abs(errors[:, 0]) / 2

    def objective(rate, weight=1.0):
        scale = np.exp(rate * distance)
        laplace = np.log(scale).sum() + len(ratios) * math.log((ratios / scale).mean())
        return laplace + weight * rate

    found = Calibration.fit(errors, own, known, False, distance, errors).rates[0]
    grid = np.linspace(0, 5, 5001)
    assert found == pytest.approx(grid[np.argmin([objective(rate) for rate in grid])], abs=2e-3)
    likeliest = []
    for seed in range(100):
        errors, own, known, distance = grown(20, float(seed >= 50), seed)
        likeliest += Calibration.fit(errors, own, known, False, distance, errors).rates
    assert np.mean(likeliest[:50]) < 0.4 < np.mean(likeliest[50:]) < 1


def test_errors_that_do_not_grow_leave_the_distance_out():
    errors, own, known, distance = grown(100, -0.5)
    found = Calibration.fit(errors, own, known, False, distance, errors)
    assert found == Calibration.fit(errors, own, known, False) and not found.needs_distance
    np.testing.assert_array_equal(found.apply(own, distance), found.apply(own))
    same = Calibration.fit(errors, own, known, False, np.full(100, 0.7), errors)
    assert same.rates == (0.0,)
    only = np.where(distance[:, None] > 0.99, 1.0, 0.0) + 1e-9 * (distance[:, None] > 0.9)
    assert Calibration.fit(only, own, known, False, distance, errors).rates == (5.0,)  # and it ends


def test_distances_that_are_none_are_refused():
    errors, own, known, distance = grown(30, 2.0)
    for wrong in (distance[:-1], distance[:, None]):
        with pytest.raises(ValueError, match="distances have shape"):
            Calibration.fit(errors, own, known, False, wrong, errors)
    for value in (-0.1, 2.1, np.nan, np.inf):
        with pytest.raises(ValueError, match="distances are not all between 0 and 2"):
            wrong = np.where(distance > 0.5, value, distance)
            Calibration.fit(errors, own, known, False, wrong, errors)
    with pytest.raises(ValueError, match="distance and labels go together"):
        Calibration.fit(errors, own, known, False, distance)
    for given, told in ((None, "none"), (distance[:1], r"of shape \(1,\)")):
        with pytest.raises(ValueError, match=f"distance is {told}: this calibration needs shape"):
            Calibration.fit(errors, own, known, False, distance, errors).apply(own, given)


def test_a_model_that_holds_its_formulas_widens_with_their_distance(tmp_path):
    model = fitted()
    without = model.calibrate(data(OTHER), False)
    keep_formulas(model, data())
    distances = Domain(model).distance(ASKED)
    assert distances[0] < 1e-3 and 0.1 < distances[1:].min()
    labels = np.where(np.arange(N) % 3 == 2, 5.0, 0.1) * OTHER  # of chlorides, far from oxides
    rest = [row for row in range(N) if row % 3 < 2]
    model.provenance["formulas"] = sorted(np.array(FORMULAS)[rest])
    distance = Domain(model).distance(data())
    mean, own = model.predict_uncertainty(data(), polymorphs=False)
    found = model.calibrate(data(labels), False)
    labels = labels[:, None]
    assert found == Calibration.fit(labels - mean, own, KNOWN, False, distance, labels)
    assert found.needs_distance and found != without
    again, std = model.predict_uncertainty(ASKED)
    np.testing.assert_array_equal(again, model.predict(ASKED))
    own = model.predict_uncertainty(ASKED, polymorphs=False)[1]
    far = Domain(model).distance(ASKED)
    np.testing.assert_allclose(std, found.apply(own, far), rtol=1e-6)
    np.testing.assert_allclose(model.predict_uncertainty(f for f in ASKED)[1], std, rtol=1e-6)
    at_once = model.predict_uncertainty(ASKED, distance=model.domain.distance(ASKED))[1]
    np.testing.assert_array_equal(at_once, std)
    with pytest.raises(ValueError, match="needs shape"):
        model.predict_uncertainty(ASKED, distance=far[1:])
    model.save(tmp_path)
    for copied in (
        dc.models.PolySRLModel.from_pretrained(tmp_path),
        pickle.loads(pickle.dumps(model)),
    ):
        assert copied.calibration == found
        np.testing.assert_allclose(copied.predict_uncertainty(ASKED)[1], std, rtol=1e-6)
    predicted = (mean, np.ones_like(mean), distance)
    assert model.calibrate(data(labels), False, predicted).needs_distance
    assert not model.calibrate(data(labels), False, predicted[:2]).needs_distance
    model.calibrate(data(labels), False, predicted)
    del model.provenance["formulas"]
    with pytest.raises(ValueError, match="learned from have been removed"):
        model.predict_uncertainty(ASKED)
    model.predict_uncertainty(ASKED, polymorphs=False)
    assert not model.calibrate(data(labels), False, predicted).needs_distance


@pytest.mark.parametrize("polymorphs", [False, True])
def test_a_calibrated_model_has_another_std_and_nothing_else(polymorphs):
    model = fitted(n_ensemble=2)
    mean, own = model.predict_uncertainty(data(), polymorphs=polymorphs)
    calibration = model.calibrate(data(OTHER), polymorphs)
    again, std = model.predict_uncertainty(data())
    np.testing.assert_array_equal(mean, again)
    np.testing.assert_array_equal(mean, model.predict(data()))
    np.testing.assert_array_equal(std, calibration.apply(own))
    assert calibration == Calibration.fit(OTHER[:, None] - mean, own, KNOWN, polymorphs)
    np.testing.assert_array_equal(own, model.predict_uncertainty(data(), polymorphs=polymorphs)[1])


def test_predictions_of_other_models_calibrate_a_model_that_has_learned_from_the_rows():
    model, other = fitted(), fitted(seed=1)
    predicted = other.predict_uncertainty(data(OTHER), polymorphs=True)
    assert model.calibrate(data(OTHER), True, predicted) == other.calibrate(data(OTHER), True)
    assert model.calibrate(data(OTHER), True, np.stack(predicted)) == other.calibration
    own = model.predict_uncertainty(data(), polymorphs=True)[1]
    np.testing.assert_array_equal(
        model.predict_uncertainty(data())[1], other.calibration.apply(own)
    )
    mean, std = predicted
    for wrong in ((mean[:-1], std[:-1]), (mean, std[:, 0]), (mean[:, 0], std), (mean, np.nan * std),
                  (np.inf * mean, std)):  # fmt: skip
        with pytest.raises(ValueError, match=r"shape|finite"):
            model.calibrate(data(OTHER), True, wrong)
    assert model.calibration == other.calibration  # as before


def test_each_task_has_its_own_and_missing_labels_do_not_count():
    labels = np.stack([SIGNAL, 100 * OTHER, SIGNAL], axis=1)
    model = fitted(n_tasks=3, dataset=data(labels))
    weights = np.ones_like(labels)
    weights[:10, 1] = 0
    wrong = labels + 1
    wrong[:10, 1] = np.nan
    calibration = model.calibrate(data(wrong, weights), False)
    mean, own = model.predict_uncertainty(data(), polymorphs=False)
    assert len(set(calibration.factors)) == len(set(calibration.offsets)) == 3
    alone = Calibration.fit((wrong - mean)[10:, 1:2], own[10:, 1:2], KNOWN[10:], False)
    assert (calibration.factors[1], calibration.offsets[1]) == (*alone.factors, *alone.offsets)
    calibrated = model.predict_uncertainty(data())[1]
    np.testing.assert_array_equal(calibrated[:, 1:2], alone.apply(own[:, 1:2]))
    assert calibration.uncalibrated == ()


def test_tasks_of_few_labels_stay_as_they_are_and_are_named():
    labels = np.stack([OTHER, SIGNAL, OTHER], axis=1)
    model = fitted(n_tasks=3, dataset=data(labels))
    mean, own = model.predict_uncertainty(data(), polymorphs=False)
    weights = np.ones_like(labels)
    weights[19:, 1] = 0
    named = "not calibrated: 19 labels of task 1 are too few, at least 20 are needed$"
    with pytest.warns(UncalibratedWarning, match=named) as said:
        calibration = model.calibrate(data(labels, weights), False)
    assert said[0].filename == __file__ and calibration.uncalibrated == (1,)
    std = model.predict_uncertainty(data())[1]
    np.testing.assert_array_equal(std[:, 1], own[:, 1])
    alone = Calibration.fit(
        labels[:, [0, 2]] - mean[:, [0, 2]], own[:, [0, 2]], weights[:, ::2] > 0, False
    )
    np.testing.assert_array_equal(std[:, [0, 2]], alone.apply(own[:, [0, 2]]))
    weights[19:] = 0
    with pytest.raises(InvalidInputError, match=r"19 labels of task 0 .* 19 labels of task 2 are"):
        model.calibrate(data(labels, weights), False)
    assert model.calibration == calibration  # as before
    perfect = np.stack([mean[:, 0], *labels.T[1:]], axis=1)
    with pytest.warns(UncalibratedWarning, match="task 0: no error"):
        assert model.calibrate(data(perfect), False).uncalibrated == (0,)


def test_it_is_saved_with_the_model_and_with_a_checkpoint(tmp_path):
    model = fitted(model_dir=str(tmp_path))
    model.save_checkpoint()
    model.calibrate(data(OTHER), True)
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
    right = asdict(Calibration((1.0,), (0.0,), (0.5,), (2.0,), True))
    save_checkpoint(path, tensors, {**manifest, "calibration": right})
    assert dc.models.PolySRLModel.from_pretrained(tmp_path).calibration is not None
    for wrong in (
        *({}, [], 1, False, {"factors": [1.0]}, {**right, "level": 0.9}),
        *({**right, "factors": factors} for factors in ([], [0.0], [-1.0], ["1"], [None], [1, 1])),
        *({**right, "offsets": offsets} for offsets in ([], [-0.1], [[0.1]], 1.0)),
        *({**right, "rates": rates} for rates in ([], [-0.1], ["1"], [None], [1, 1])),
        *({**right, "ceilings": ceilings} for ceilings in ([], [-0.1], [None], [1, 1])),
        *({**right, "polymorphs": value} for value in (1, "yes", None)),
    ):
        save_checkpoint(path, tensors, {**manifest, "calibration": wrong})
        with pytest.raises(CheckpointError, match=r"model\.safetensors"):
            dc.models.PolySRLModel.from_pretrained(tmp_path)
    del right["rates"], right["ceilings"], right["polymorphs"]
    for n_samples in (-1, 0.5, None, 0, 64):  # as files were before
        values = {**right, "n_samples": n_samples}
        save_checkpoint(path, tensors, {**manifest, "calibration": values})
        if n_samples in (0, 64):
            found = dc.models.PolySRLModel.from_pretrained(tmp_path).calibration
            assert found.rates == (0.0,) and found.polymorphs is (n_samples > 0)
        else:
            with pytest.raises(CheckpointError, match=r"model\.safetensors"):
                dc.models.PolySRLModel.from_pretrained(tmp_path)
    del manifest["calibration"]  # and still earlier
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
    with pytest.raises(InvalidInputError, match="row 2 "):
        fitted().calibrate(data(np.where(np.arange(N) == 2, np.nan, SIGNAL)))
