"""Figure of merit of predicted thermoelectric properties: formula, scaling, screening, command."""

import numpy as np
import pandas as pd
import pytest
import thermoelectrics
from paper_records import save_predictions
from targets import estm_rows, wetlab_targets
from thermoelectrics import Measured, collect, main, screening, table_of, zt

SETTINGS = {"encoder": "none", "config": "default", "epochs": 1, "arguments": []}


@pytest.fixture(scope="session")
def estm(data_dir):
    """The six ESTM targets of the real data, by name."""
    return {t.name: t for t in wetlab_targets(data_dir) if t.name.startswith("estm")}


@pytest.fixture
def record(estm, tmp_path):
    """Write records of true values plus an error in units of the targets."""

    def write(model, seed=0, error=0.0, leave_out=(), protocol="representation", **changed):
        for name, target in estm.items():
            if name not in leave_out:
                run = (model, protocol, seed, target.values + error, [{}] * 5)
                settings = {**SETTINGS, **changed}
                save_predictions(tmp_path, target, *run, settings, "run_wetlab.py")

    return write


@pytest.fixture
def command(data_dir, tmp_path):
    return lambda *given: main([*given, "--data-dir", str(data_dir), "--output-dir", str(tmp_path)])


def test_figure_of_merit_by_hand():
    assert zt(1e5, 2.0, -100.0, 300.0) == pytest.approx(0.15)  # 1e-8 V²/K² * 1e5 * 300 / 2
    found = zt([1e5, 2e5], [1.0, 2.0], [200.0, 200.0], [300.0, 600.0])
    np.testing.assert_allclose(found, [1.2, 2.4])


@pytest.mark.parametrize("kelvin", [300, 600])
def test_physical_units_are_those_of_the_source(data_dir, estm, kelvin):
    rows = estm_rows(data_dir, kelvin)
    measured = Measured(kelvin, rows)
    names = [f"estm{kelvin}_{name}" for name in thermoelectrics.TARGETS]
    sigma, kappa, seebeck = measured.physical(np.stack([estm[name].values for name in names]))
    np.testing.assert_allclose(sigma, rows["electrical_conductivity"], rtol=1e-9)
    np.testing.assert_allclose(kappa, rows["thermal_conductivity"], rtol=1e-9)
    np.testing.assert_allclose(seebeck, rows["seebeck_coefficient"], atol=1e-9)
    ours = kelvin * rows["electrical_conductivity"] * (rows["seebeck_coefficient"] / 1e6) ** 2
    truth = ours / rows["thermal_conductivity"]
    np.testing.assert_allclose(measured.zt(np.stack([sigma, kappa, seebeck])), truth, atol=1e-12)
    np.testing.assert_allclose(measured.target.values, truth, rtol=1e-12)
    for name in names:
        for ours, theirs in zip(measured.target.splits(), estm[name].splits(), strict=True):
            np.testing.assert_array_equal(ours[1], theirs[1])
    # The source has rounded its own ZT; a handful of rows disagree with their own properties.
    assert np.median(np.abs(truth - rows["ZT"])) < 1e-3
    assert f"{len(rows)} rows" in measured.account()


def test_screening_counts():
    true = np.array([0.8, 0.9, 1.0, 0.1, 0.2, 0.79])
    predicted = np.array([0.8, 0.7, 2.0, 0.9, 0.0, 0.1])
    found = screening(true, predicted, 0.8)
    expected = {"precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3, "n_true": 3, "n_predicted": 3}
    assert found == pytest.approx(expected)
    none = screening(true, np.zeros(6), 0.8)
    assert none == {"precision": 0, "recall": 0, "f1": 0, "n_true": 3, "n_predicted": 0}


def test_perfect_predictions(record, command, tmp_path):
    record("polysrl")
    record("polysrl", seed=1)
    assert command("--models", "polysrl", "--protocols", "representation", "--seeds", "2") == 0
    scores = pd.read_csv(tmp_path / "thermoelectrics.csv")
    assert list(scores.columns) == thermoelectrics.COLUMNS
    assert set(scores["suite"]) == {"wetlab"}
    assert set(scores["task"]) == {"estm300_zt", "estm600_zt"}
    means = scores.groupby("metric")["value"].mean()
    assert means["mae"] < 1e-5  # records keep seven digits
    assert means[["r2", "precision", "recall", "f1"]].to_numpy() == pytest.approx(1, abs=1e-6)
    assert (scores.query("metric == 'mae'").groupby(["task", "seed"])["fold"].nunique() == 5).all()
    counts = scores.query("metric == 'n_true'").groupby("task")["value"].unique()
    assert counts.map(list).to_dict() == {"estm300_zt": [6], "estm600_zt": [8]}
    assert set(scores[scores["fold"] == -1]["metric"]) == set(screening(np.ones(1), np.ones(1), 1))
    pictures = sorted(path.name for path in (tmp_path / "figures").iterdir())
    kinds = ("screening", "zt_300K", "zt_600K")
    assert pictures == [f"{kind}_representation.png" for kind in kinds]
    assert all((tmp_path / "figures" / name).read_bytes()[:4] == b"\x89PNG" for name in pictures)


def test_panels_say_how_many_seeds_a_mean_has_where_these_differ(record, data_dir, tmp_path):
    record("polysrl")
    record("polysrl", seed=1)
    record("graphcl")
    sets = [Measured(300, estm_rows(data_dir, 300))]
    runs, _ = collect(tmp_path, ["graphcl", "polysrl"], ["representation"], [0, 1], sets)
    assert list(thermoelectrics.labelled(runs)) == ["graphcl, 1 seed", "polysrl, 2 seeds"]
    assert list(thermoelectrics.labelled(runs[1:])) == ["polysrl"]


def test_outliers_are_named_worst_first_and_agree_with_their_properties(
    record, command, tmp_path, estm
):
    kappa = estm["estm300_thermal_conductivity"]
    shift = np.zeros(len(kappa.values))
    shift[7] = 1.0  # one row is wrong: e times more thermal conductivity, e times less ZT
    record("polysrl", leave_out=[kappa.name, *(name for name in estm if "600" in name)])
    run = ("polysrl", "representation", 0, kappa.values + shift, [{}] * 5, SETTINGS)
    save_predictions(tmp_path, kappa, *run, "run_wetlab.py")
    assert command("--models", "polysrl", "--seeds", "1") == 0
    table = pd.read_csv(tmp_path / "thermoelectrics_outliers.csv")
    assert len(table) == thermoelectrics.N_OUTLIERS and set(table["task"]) == {"estm300_zt"}
    worst = table.iloc[0]
    assert worst["formula"] == kappa.formulas[7]
    assert worst["predicted_ZT"] == pytest.approx(worst["true_ZT"] / np.e, rel=1e-3)
    units = thermoelectrics.PROPERTIES.items()
    predicted = [worst[f"predicted_{name}({unit})"] for name, unit in units]
    assert zt(*predicted, 300) == pytest.approx(worst["predicted_ZT"], rel=1e-3)


def test_what_is_missing_is_named_and_skipped(record, command, data_dir, tmp_path, capsys):
    record("polysrl")
    record("graphcl", leave_out=["estm600_seebeck"])
    record("infomax3d", error=0.1, encoder="a")
    record("infomax3d", seed=1, error=0.1, encoder="a", config="paper")
    models = ["polysrl", "graphcl", "rand_init", "infomax3d"]
    sets = [Measured(kelvin, estm_rows(data_dir, kelvin)) for kelvin in (300, 600)]
    runs, notes = collect(tmp_path, models, ["representation"], [0, 1], sets)
    found = [(run.model, run.measured.kelvin, list(run.by_seed)) for run in runs]
    assert found == [
        ("polysrl", 300, [0]),
        ("polysrl", 600, [0]),
        ("graphcl", 300, [0]),
        ("infomax3d", 300, [0, 1]),
        ("infomax3d", 600, [0, 1]),
    ]
    assert notes == [
        "polysrl, representation: no record of seeds [1]",
        "graphcl, representation: no record of seeds [1]; no estm600_seebeck of seeds [0]",
        "rand_init, representation: no record of seeds [0, 1]",
        "infomax3d, representation: 2 settings are mixed",
    ]
    assert command("--models", *models, "--protocols", "representation", "--seeds", "2") == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith(" | ".join(notes))
    scores = pd.read_csv(tmp_path / "thermoelectrics.csv")
    assert set(scores[scores["task"] == "estm600_zt"]["model"]) == {"polysrl", "infomax3d"}


def test_records_of_other_rows_are_not_used(record, data_dir, tmp_path):
    record("polysrl")
    rows = estm_rows(data_dir, 300).iloc[:-1]
    runs, notes = collect(tmp_path, ["polysrl"], ["representation"], [0], [Measured(300, rows)])
    assert runs == [] and "no estm300_seebeck of seeds [0]" in notes[0]


def test_no_record_at_all_is_one_line(command, capsys, tmp_path):
    assert command() == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "no record" in error and "run_wetlab.py" in error
    assert list(tmp_path.iterdir()) == []


def test_no_data_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--data-dir", str(tmp_path), "--output-dir", str(tmp_path)])
    assert ended.value.code == 2 and "estm.csv is missing" in capsys.readouterr().err


def test_dry_run_writes_nothing(record, command, tmp_path, capsys):
    record("polysrl", error=0.05)
    before = sorted(tmp_path.rglob("*"))
    assert command("--dry-run", "--models", "polysrl") == 0
    assert sorted(tmp_path.rglob("*")) == before
    printed = capsys.readouterr().out
    assert "DRY RUN" in printed and "368 rows" in printed


def test_table_of_results_has_the_paper_beside_it(tmp_path):
    keys = ("wetlab", "estm300_zt", "representation", "polysrl", 0)
    rows = [(*keys, fold, "mae", value) for fold, value in enumerate((0.1, 0.3))]
    rows += [(*keys, -1, name, 0.5) for name in screening(np.ones(1), np.ones(1), 1)]
    (tmp_path / "data").mkdir()
    (tmp_path / "paper").mkdir()
    line = "1,representation,polysrl,estm300_zt,mae,0.07,0.014"
    header = "table,protocol,model,dataset,metric,mean,std"
    (tmp_path / "paper" / "tables.csv").write_text(f"{header}\n{line}\n")
    scores = pd.DataFrame(rows, columns=thermoelectrics.COLUMNS)
    row = table_of(scores, tmp_path / "data").iloc[0]
    assert row["mae"] == pytest.approx(0.2) and row["paper"] == 0.07 and row["seeds"] == 1
    assert row["std"] == pytest.approx(np.sqrt(0.02)) and row["precision"] == 0.5
    assert "paper" not in table_of(scores, None)
