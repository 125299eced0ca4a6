"""Variance of Gaussians, calibrated intervals and their metrics, against what is known exactly."""

from dataclasses import replace

import calibration
import numpy as np
import pandas as pd
import pytest
import torch
from calibration import Settings, cross_predict, record_coverage
from intervals import (
    Constant,
    Laplace,
    Normalized,
    Scaled,
    ause,
    evaluate,
    remaining_errors,
    symmetric_crps,
)
from models import FORMULAS, PLAIN, SIGNAL, N, data, fitted
from paper_records import save_predictions
from scipy.stats import laplace, norm
from submission import record_fold, write_record
from targets import Target
from tasks import load_task

from polysrl_dc.graphs import StoichiometryBatch
from polysrl_dc.recalibration import LAPLACE_95

pytestmark = pytest.mark.filterwarnings("ignore:the no. of calibration examples:UserWarning")
QUICK = Settings(epochs=1, ensemble=1, inner_folds=3)
TRAIN, TEST = np.arange(0, N, 2), np.arange(1, N, 2)


def toy(n, seed):
    """Gaussian errors whose spread is known and differs a hundredfold."""
    rng = np.random.default_rng(seed)
    std = np.exp(rng.uniform(0, np.log(100), n))
    return std * rng.standard_normal(n), std


def toy_target(values=SIGNAL):
    return Target("toy", "1", np.array(FORMULAS), values.copy(), 1.0, 8)


# ------------------------------------------------------------------- variance of the Gaussians


def gaussians(network):
    """Mean and sigma of the formulas by each encoder, and what a head multiplies them with."""
    with torch.no_grad():
        graphs = StoichiometryBatch.from_graphs(list(data().X))
        for encoder in network.encoders:
            mean, log_sigma = encoder(graphs)
            yield mean * PLAIN.head_scale, log_sigma.exp() * PLAIN.head_scale


def test_no_polymorphs_is_the_default_to_the_bit():
    model = fitted(n_ensemble=2)
    plain = model.predict_uncertainty(data())
    np.testing.assert_array_equal(plain, model.predict_uncertainty(data(), polymorphs=False))
    mean, std = model.predict_uncertainty(data(), polymorphs=True)
    np.testing.assert_array_equal(mean, plain[0])
    assert (std > plain[1]).all()


def test_a_linear_head_has_the_variance_that_it_must_have():
    model = fitted(config=PLAIN)
    network = model.model
    network.heads[0] = torch.nn.Linear(PLAIN.n_features, 1)
    _, std = model.predict_uncertainty(data(), polymorphs=True)
    [(_, sigma)] = gaussians(network)
    with torch.no_grad():
        expected = (sigma**2 @ network.heads[0].weight[0] ** 2).sqrt() * network.label_std
    np.testing.assert_allclose(std[:, 0], expected.numpy(), rtol=1e-5)


@pytest.mark.parametrize("frozen", [True, False])
def test_total_variance_is_that_of_the_mixture_of_members_and_their_gaussians(frozen):
    labels = data(np.stack([SIGNAL, -SIGNAL], axis=1))
    model = fitted(n_ensemble=3, n_tasks=2, freeze_encoder=frozen, dataset=labels)
    network, n_samples = model.model.eval(), 20_000
    for encoder in network.encoders:  # so narrow that a network is linear in it
        encoder.config = replace(encoder.config, log_sigma_shift=encoder.config.log_sigma_shift - 3)
    each = list(gaussians(network))
    noise = torch.randn(n_samples, PLAIN.n_features, generator=torch.Generator().manual_seed(0))
    row, locations, variances = 3, [], []
    with torch.no_grad():
        for member in range(3):
            mean, sigma = each[0 if frozen else member]
            read = mean[row] + sigma[row] * noise
            locations.append(network.heads[member](read))
            variances.append(2 * torch.exp(2 * network.scale_heads[member](read)))
        variance = torch.cat(locations).var(0) + torch.cat(variances).mean(0)
        expected = variance.sqrt() * network.label_std
    _, std = model.predict_uncertainty(data(), polymorphs=True)
    np.testing.assert_allclose(std[row], expected.numpy(), rtol=0.01)
    without = model.predict_uncertainty(data(), polymorphs=False)[1]
    assert (std[row] > without[row]).all()


def test_the_variance_of_a_row_does_not_depend_on_the_others():
    model = fitted()
    rows = [5, 2, 30]
    _, all_rows = model.predict_uncertainty(data(), polymorphs=True)
    _, some = model.predict_uncertainty(data().select(rows), polymorphs=True)
    np.testing.assert_allclose(some, all_rows[rows], rtol=1e-4)


def test_polymorphs_are_a_source_of_uncertainty_for_regression_only():
    _, std = fitted(config=PLAIN).predict_uncertainty(data(), polymorphs=True)
    assert (std > 0).all()
    model = fitted("classification", dataset=data((SIGNAL > 0.5).astype(float)))
    with pytest.raises(ValueError, match="polymorphs is True: only regression"):
        model.predict_uncertainty(data(), polymorphs=True)


# ------------------------------------------------------------------------- calibrated intervals


@pytest.mark.parametrize("kind", [Scaled, Normalized, Constant])
def test_intervals_hold_what_they_promise(kind):
    n = 4000
    intervals = kind(*toy(n, 0))
    scores = evaluate(intervals, *toy(n, 1))
    levels = {0.95} if kind is Scaled else {0.5, 0.8, 0.95}
    for level in levels:
        error = np.sqrt(2 * level * (1 - level) / n)  # of the calibration and of the test
        assert abs(scores[f"coverage_{100 * level:.0f}"] - level) < 4 * error
    assert scores["miscalibration_area"] < 0.03


def test_a_factor_on_the_standard_deviations_does_not_matter():
    residuals, std = toy(500, 0)
    errors, test_std = toy(500, 1)
    for kind in (Scaled, Normalized, Constant):
        one = evaluate(kind(residuals, std), errors, test_std)
        other = evaluate(kind(residuals, 9 * std), errors, 9 * test_std)
        assert one == pytest.approx(other)


def test_known_spread_makes_intervals_sharper_and_the_rest_better():
    kinds = (Scaled, Normalized, Constant)
    scores = {kind: evaluate(kind(*toy(4000, 0)), *toy(4000, 1)) for kind in kinds}
    constant = scores[Constant]
    for kind in (Scaled, Normalized):
        better = scores[kind]
        assert better["width_95"] < 0.8 * constant["width_95"]
        assert better["width_95"] < 0.8 * better["equal_width_95"]
        assert better["crps"] < constant["crps"] and better["ause"] < 0.5 * constant["ause"]
        assert better["mae_kept"] < 0.8 * better["mae"]
    assert constant["mae_kept"] == pytest.approx(constant["mae"])
    assert constant["equal_width_95"] == pytest.approx(constant["width_95"], rel=0.1)
    perfect = toy(4000, 1)[1].mean() / np.sqrt(np.pi)  # expected of a Gaussian that is right
    assert scores[Scaled]["crps"] == pytest.approx(perfect, rel=0.05)


def test_a_few_rows_too_certain_do_not_widen_all_intervals():
    residuals, std = toy(1000, 0)
    errors, test_std = toy(1000, 1)
    lowered = std.copy()
    lowered[::10] = 1e-3
    plain = evaluate(Normalized(residuals, std), errors, test_std)
    robust = evaluate(Normalized(residuals, lowered), errors, test_std)
    assert robust["width_95"] < 2 * plain["width_95"]
    scales = Normalized(residuals, lowered).scales(test_std)
    np.testing.assert_allclose(scales, test_std + np.median(lowered))
    assert evaluate(Scaled(residuals, lowered), errors, test_std)["width_95"] > 100


# --------------------------------------------------------------------------------- the metrics


def test_crps_is_its_integral():
    rng = np.random.default_rng(0)
    sizes, errors = rng.exponential(size=7), rng.normal(size=5)
    atoms = np.sort(np.r_[sizes, -sizes])
    x = np.linspace(-20, 20, 400_001)
    distribution = np.searchsorted(atoms, x, side="right") / len(atoms)
    expected = [((distribution - (x >= z)) ** 2).sum() * (x[1] - x[0]) for z in errors]
    np.testing.assert_allclose(symmetric_crps(errors, sizes), expected, atol=2e-4)


def test_crps_of_gaussian_residuals_is_the_closed_form():
    z = np.array([-2.0, 0.0, 0.5, 3.0])
    sizes = norm.ppf((1 + (np.arange(20_000) + 0.5) / 20_000) / 2)
    gaussian = z * (2 * norm.cdf(z) - 1) + 2 * norm.pdf(z) - 1 / np.sqrt(np.pi)
    np.testing.assert_allclose(symmetric_crps(z, sizes), gaussian, atol=1e-3)
    scaled = Scaled(sizes, np.ones(len(sizes)))
    assert scaled.crps(3 * z, np.full(4, 3.0)) == pytest.approx(3 * gaussian.mean(), rel=1e-3)
    conformal = Normalized(sizes, np.ones(len(sizes)))  # a scale of 2 for a deviation of 1
    assert conformal.crps(z, np.ones(4)) == pytest.approx(gaussian.mean(), rel=1e-3)
    assert conformal.crps(3 * z, np.full(4, 5.0)) == pytest.approx(3 * gaussian.mean(), rel=1e-3)


def test_what_a_laplace_model_says_of_itself():
    rng = np.random.default_rng(0)
    std = np.exp(rng.uniform(0, 3, 20_000))
    errors = rng.laplace(scale=std / np.sqrt(2))
    scores = evaluate(Laplace(), errors, std)
    for level in (0.5, 0.8, 0.95):
        assert scores[f"coverage_{100 * level:.0f}"] == pytest.approx(level, abs=0.012)
    assert scores["miscalibration_area"] < 0.01
    x = np.linspace(-60, 60, 400_001)
    below = laplace.cdf(x, scale=1 / np.sqrt(2))
    expected = ((below - (x >= 0.7)) ** 2).sum() * (x[1] - x[0])
    assert Laplace().crps(np.array([0.7]), np.ones(1)) == pytest.approx(expected, abs=1e-3)


def test_area_of_the_sparsification_error_is_the_closed_form():
    m = 9
    errors = np.arange(1.0, m + 1)
    assert ause(errors, errors) == 0
    assert ause(-errors, np.ones(m)) == pytest.approx((m - 1) / (2 * (m + 1)))
    assert ause(errors, -errors) == pytest.approx((m - 1) / (m + 1))
    np.testing.assert_allclose(remaining_errors(errors, -errors)[:2], [9, 8.5])


def test_the_fifth_that_is_discarded_is_the_most_uncertain():
    std = np.arange(10.0) + 1
    errors = np.where(std > 8, 100.0, 1.0)
    scores = evaluate(Scaled(np.ones(10), np.ones(10)), errors, std)
    assert scores["mae_kept"] == 1 and scores["mae"] == pytest.approx(20.8)


def test_miscalibration_is_half_where_everything_or_nothing_is_inside():
    intervals = Scaled(*toy(1000, 0))
    for errors in (np.zeros(50), np.full(50, 1e9)):
        scores = evaluate(intervals, errors, np.ones(50))
        assert scores["miscalibration_area"] == pytest.approx(0.5, abs=0.01)
    assert scores["coverage_95"] == 0


def test_one_width_that_holds_as_many_ends_between_two_errors():
    intervals = Scaled(np.ones(100), np.ones(100))  # half-widths are the standard deviations
    errors = np.array([1.0, -2.0, 4.0, 7.0])
    for std, inside, width in (
        ([5.0, 5.0, 5.0, 5.0], 0.75, 11.0),
        ([9.0, 1.0, 1.0, 1.0], 0.25, 3.0),
        ([0.5, 0.5, 0.5, 0.5], 0.0, 1.0),
        ([9.0, 9.0, 9.0, 9.0], 1.0, 14.0),
    ):
        scores = evaluate(intervals, errors, np.array(std))
        assert scores["coverage_95"] == inside and scores["equal_width_95"] == width


# ------------------------------------------------------------------------- nothing is seen twice


def test_no_label_of_the_test_fold_reaches_the_calibration():
    hidden = SIGNAL.copy()
    hidden[TEST] = np.nan
    seen = cross_predict(toy_target(), TRAIN, TEST, QUICK)
    unseen = cross_predict(toy_target(hidden), TRAIN, TEST, QUICK)
    assert seen.keys() == unseen.keys()
    for name, values in seen.items():
        np.testing.assert_array_equal(values, unseen[name], err_msg=name)
        assert len(values) == len(TEST if name.startswith("test_") else TRAIN)


def test_widths_do_not_depend_on_labels_of_the_test_fold():
    rng, target = np.random.default_rng(0), toy_target()
    train, test = target.splits()[1]
    names = ("mean", "std", "total_std")
    found = {name: rng.uniform(1, 2, len(train)) for name in names}
    found |= {f"test_{name}": rng.uniform(1, 2, len(test)) for name in names}
    other = toy_target()
    other.values[test] += 100
    tables = [calibration.score_fold(one, 1, found) for one in (target, other)]
    widths, others = (table[table["metric"].str.match("width")] for table in tables)
    pd.testing.assert_frame_equal(widths, others)
    inside, none = (table.loc[table["metric"] == "coverage_80", "value"] for table in tables)
    assert (inside > 0).all() and (none == 0).all()


def test_a_row_is_calibrated_by_a_model_that_has_not_seen_its_label():
    changed = SIGNAL.copy()
    changed[TRAIN[4]] += 100
    one = cross_predict(toy_target(), TRAIN, TEST, QUICK)
    other = cross_predict(toy_target(changed), TRAIN, TEST, QUICK)
    same = one["mean"] == other["mean"]
    assert same[4] and same.sum() == len(TRAIN) / QUICK.inner_folds  # its part, and no other row
    assert (one["test_mean"] != other["test_mean"]).all()


# ---------------------------------------------------------------------------------- the command


@pytest.fixture
def job(tmp_path, monkeypatch):
    """The command on a small target; the predictions are counted, not trained."""
    trained = []

    def counted(target, train, test, settings):
        trained.append(target.name)
        rng = np.random.default_rng(len(train))
        shapes = {"": len(train), "test_": len(test)}
        return {
            prefix + name: rng.uniform(1, 2, n)
            for prefix, n in shapes.items()
            for name in ("mean", "std", "total_std")
        }

    monkeypatch.setattr(calibration, "all_targets", lambda data_dir: [toy_target()])
    monkeypatch.setattr(calibration, "cross_predict", counted)
    monkeypatch.setattr(calibration, "EPOCHS", (1,))

    def run(*more):
        calibration.main(["--output-dir", str(tmp_path), *more])
        path = tmp_path / "calibration.csv"
        return len(trained), pd.read_csv(path) if path.exists() else None

    return run


def test_the_command_keeps_what_is_finished(job, capsys):
    assert job("--dry-run") == (0, None)
    count, table = job()
    assert count == 5 and list(table.columns) == calibration.COLUMNS
    assert set(table["method"]) == set(calibration.METHODS)
    assert table.groupby(["fold", "method"]).size().eq(12).all() and len(table) == 5 * 5 * 12
    assert "| toy " in capsys.readouterr().out
    count, again = job()
    assert count == 5
    pd.testing.assert_frame_equal(table, again)
    assert job("--again")[0] == 10
    count, both = job("--fine-tune")
    assert count == 15 and len(both) == 2 * len(table)
    with pytest.raises(SystemExit):
        job("--targets", "nothing")


@pytest.mark.parametrize("other", ["epochs", "ensemble", "inner-folds", "seed"])
def test_the_table_is_of_the_default_settings(job, other, capsys):
    _, table = job()
    capsys.readouterr()
    count, same = job(f"--{other}", "3")
    said = capsys.readouterr().out
    assert count == 10 and "calibration.csv stays as it is" in said and "| toy " in said
    pd.testing.assert_frame_equal(same, table)


def test_epochs_are_chosen_by_the_residuals_of_the_training_fold(
    job, tmp_path, capsys, monkeypatch
):
    target = toy_target()
    odd = [set(train) for train, _ in target.splits()][1::2]

    def trained(_, train, test, settings):
        """Twenty epochs learn the training folds of odd number better, and any test fold worse."""
        off = 0.1 if (settings.epochs == 20) == (set(train) in odd) else 0.2
        on_test = 5.0 if settings.epochs == 20 else 0.0
        found = {"mean": target.values[train] + off, "test_mean": target.values[test] + on_test}
        for name in ("std", "total_std"):
            found |= {name: np.ones(len(train)), f"test_{name}": np.ones(len(test))}
        return found

    monkeypatch.setattr(calibration, "cross_predict", trained)
    monkeypatch.setattr(calibration, "EPOCHS", (10, 20))
    _, table = job()
    assert "epochs [10, 20, 10, 20, 10]" in capsys.readouterr().out
    errors = table[table["metric"] == "mae"].groupby("fold")["value"].mean()
    np.testing.assert_allclose(errors, [0, 5, 0, 5, 0])


def test_peers_are_scored_by_their_own_records(job, tmp_path, capsys):
    assert job("--peers", "roost") == (0, None)
    assert "0 of 1 targets are recorded" in capsys.readouterr().out
    target = toy_target()
    predictions, std = target.values + np.where(np.arange(len(target.values)) % 2, 1, -1), 0.5
    for seed, off in ((0, 1), (1, 2)):
        run = (tmp_path, target, "roost", "transfer", seed)
        spread = np.full(len(predictions), std)
        values = target.values + off * (predictions - target.values)
        save_predictions(*run, values, [{}] * 5, {}, "compare.py", spread)
    count, table = job("--peers", "roost")
    assert count == 0 and len(table) == 2 * 5 * 12
    one = table[table["fold"] == 0].set_index(["method", "metric"])["value"]
    assert set(one.index.levels[0]) == {"its own", "calibrated"}
    assert one["calibrated", "width_95"] == pytest.approx(2, rel=1e-5)  # all errors are 1
    values = one["its own"]
    half = -np.log(0.05) * std / np.sqrt(2)
    assert values["width_95"] == pytest.approx(2 * half, rel=1e-5)
    assert values["mae"] == pytest.approx(1, rel=1e-5) and values["coverage_95"] == 1
    assert values["coverage_80"] == 0


def test_a_fold_is_calibrated_by_the_errors_of_the_others_only():
    target = toy_target()
    rng = np.random.default_rng(0)
    std = rng.uniform(0.5, 2.0, len(target.values))
    errors = 3 * std * rng.laplace(size=len(std)) / np.sqrt(2)
    rest, test = target.splits()[2]
    found = calibration.calibrated_by_other_folds(target, target.values - errors, std)
    ratios = np.abs(errors[rest]) / (std[rest] + np.median(std[rest]))
    expected = np.quantile(ratios, 0.95, method="weibull") / LAPLACE_95
    expected = expected * (std[test] + np.median(std[rest]))
    np.testing.assert_allclose(found[test], expected)
    errors[test] *= 100  # say nothing of their own intervals
    again = calibration.calibrated_by_other_folds(target, target.values - errors, std)
    np.testing.assert_allclose(again[test], expected)


def test_coverage_of_a_submission_is_counted(tmp_path, capsys):
    task = load_task("embedded_seebeck", None)
    truth = task.df[task.metadata.target]
    for fold in task.folds:
        ids = task.validation[task.folds_map[fold]].test
        values = truth.loc[list(ids)].to_numpy(float)
        off = np.where(np.arange(len(values)) % 4 == 0, 3.0, 1.0)  # a quarter is outside
        record_fold(task, fold, values + off, np.ones(len(values)))
    write_record(tmp_path, [task], {}, "finetune")
    table = record_coverage(tmp_path, None)
    assert len(table) == 5 and table["n"].sum() == len(truth)
    np.testing.assert_allclose(table["coverage_95"], 0.75, atol=1 / table["n"].min())
    np.testing.assert_allclose(table["width_95"], 2 * 1.96, atol=0.001)
    calibration.main(["--submission", str(tmp_path)])
    assert "0.75" in capsys.readouterr().out


def test_settings_know_the_encoder_by_its_weights(tmp_path):
    model = QUICK.model(8)
    model.save(tmp_path)
    fingerprint = QUICK.fingerprint()
    assert replace(QUICK, encoder=str(tmp_path)).fingerprint() == fingerprint
    with torch.no_grad():
        model.model.encoders[0].sigma_output.bias += 1
    model.save(tmp_path)
    assert replace(QUICK, encoder=str(tmp_path)).fingerprint() != fingerprint
    assert replace(QUICK, device="cpu").fingerprint() == fingerprint
