"""Recipes: whole training folds, nothing chosen, finished folds kept."""

import json
import runpy
import shutil
import subprocess
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import recipes
import summarize
from check_submission import check_records
from folds import split_validation
from paper_records import load_record
from sklearn.metrics import mean_absolute_error
from submission import run_file
from targets import HELD_BACK, SMALL_TASKS, Target, small_targets
from transfer import dataset_of

import polysrl_dc
from polysrl_dc import RECIPES, PolySRLModel, cross_val_predict, keep_formulas, suitable_recipe

FOLDER = "single_frozen_std_calibrated_recipe_seed1"


@pytest.fixture
def target(monkeypatch):
    formulas = np.array([f"{metal}{i}Cl" for metal in ("Na", "K", "Li") for i in range(1, 51)])
    target = Target("metallic", "eV", formulas, np.linspace(1, 2, 150), 10.0, 8)
    monkeypatch.setattr(recipes, "wetlab_targets", lambda _: [target])
    short = {name: replace(recipe, epochs=1) for name, recipe in recipes.RECIPES.items()}
    monkeypatch.setattr(recipes, "RECIPES", short)
    return target


def test_scores_are_those_of_models_of_whole_training_folds(target, tmp_path, capsys):
    recipes.main(["--recipes", "single", "single, frozen", "--output-dir", str(tmp_path)])
    table = pd.read_csv(tmp_path / "recipes.csv")
    assert set(table["protocol"]) == {"recipe"} and set(table["suite"]) == {"wetlab"}
    assert len(table) == 2 * 5 * 2
    train, test = target.splits()[3]
    model = PolySRLModel(freeze_encoder=True)
    model.fit(dataset_of(target, train), nb_epoch=1)
    error = 10 * mean_absolute_error(target.values[test], model.predict(dataset_of(target, test)))
    found = table.query("model == 'single, frozen' and fold == 3 and metric == 'mae'")
    assert found["value"].item() == pytest.approx(error, rel=1e-5)
    means = table[table["metric"] == "mae"].groupby("model")["value"].mean()
    own = pd.read_csv(tmp_path / "calibration.csv")
    assert set(own["method"]) == {"its own"} and set(own["protocol"]) == {"recipe"}
    unscaled = own.query("metric == 'mae'").groupby("encoder")["value"].mean()
    np.testing.assert_allclose(10 * unscaled[means.index], means, rtol=1e-4)
    printed = capsys.readouterr().out.splitlines()
    row = next(line for line in printed if line.startswith("| metallic "))
    assert [f"{means[name]:.3f}".rstrip("0") in row for name in means.index] == [True, True]
    inside = own.query("metric == 'coverage_95' and encoder == 'single'")["value"].mean()
    cells = next(line for line in printed if line.startswith("| single ")).split("|")
    assert [float(cell) for cell in cells[4:7]] == pytest.approx([inside] * 3, abs=6e-4)


@pytest.fixture
def spread(target):
    """The same with formulas far from all others, whose values no model of the others can tell."""
    formulas, values = target.formulas.copy(), target.values.copy()
    formulas[::10] = "U Xe PuO2 WC OsO4 IrF6 CBr4 BN Tc Ba3N2 P Hg S8 DyAl2 H2".split()
    values[::10] = np.where(np.arange(15) % 2, -9, 9)
    return replace(target, formulas=formulas, values=values)


@pytest.mark.parametrize("distance", ["", ", distance"])
def test_a_held_out_part_calibrates_and_is_not_learned_from(spread, distance):
    target = spread
    train, test = target.splits()[1]
    name = f"frozen, std calibrated{distance}"
    mean, std, _ = recipes.predict_fold(target, (train, test), name, seed=2)
    learned, kept = (train[part] for part in split_validation(target.formulas[train], 0.2, 2))
    model = PolySRLModel(seed=2, **RECIPES["frozen"].settings)
    model.fit(dataset_of(target, learned), nb_epoch=1)
    np.testing.assert_array_equal(mean, model.predict(dataset_of(target, test))[:, 0])
    if distance:
        keep_formulas(model, dataset_of(target, learned))
    calibration = model.calibrate(dataset_of(target, kept))
    assert calibration.needs_distance == bool(distance)
    np.testing.assert_array_equal(std, model.predict_uncertainty(dataset_of(target, test))[1][:, 0])


@pytest.mark.parametrize("distance", ["", ", distance"])
def test_a_cross_validated_std_costs_no_training_row(spread, distance):
    target = spread
    train, test = target.splits()[1]
    whole, own, _ = recipes.predict_fold(target, (train, test), "frozen", 2)
    name = f"frozen, std cross-validated{distance}"
    mean, std, _ = recipes.predict_fold(target, (train, test), name, 2)
    np.testing.assert_array_equal(mean, whole)

    def fitted(dataset):
        model = PolySRLModel(seed=2, **RECIPES["frozen"].settings)
        model.fit(dataset, nb_epoch=1)
        return model

    dataset = dataset_of(target, train)
    model = fitted(dataset)
    if distance:
        keep_formulas(model, dataset)
    calibration = model.calibrate(dataset, predicted=cross_val_predict(fitted, dataset, seed=2))
    assert calibration.needs_distance or not distance
    np.testing.assert_array_equal(std, model.predict_uncertainty(dataset_of(target, test))[1][:, 0])
    assert (std != own).all()


@pytest.mark.parametrize(("calibrated", "models"), [("calibrated", 1), ("cross-validated", 6)])
def test_recipes_that_differ_in_the_distance_share_the_models_of_a_fold(
    calibrated, models, spread, monkeypatch
):
    target = spread
    monkeypatch.setattr(recipes, "_LATEST", {})
    fits, fit = [], PolySRLModel.fit
    monkeypatch.setattr(PolySRLModel, "fit", lambda *a, **k: fits.append(1) or fit(*a, **k))
    splits, name = target.splits(), f"frozen, std {calibrated}"
    std = {
        other: [recipes.predict_fold(target, split, other, 2)[1] for split in splits]
        for other in (name, f"{name}, distance")
    }
    assert len(fits) == len(splits) * models
    assert any((one != two).any() for one, two in zip(*std.values(), strict=True))
    again = recipes.predict_fold(target, splits[1], name, 2)[1]
    np.testing.assert_array_equal(again, std[name][1])  # whatever was asked in between
    recipes.predict_fold(target, splits[0], name, 3)
    assert len(fits) == (len(splits) + 1) * models and len(recipes._LATEST) == len(splits)


def test_what_is_finished_is_kept_and_belongs_to_one_recipe(target, tmp_path, monkeypatch):
    command = ["--output-dir", str(tmp_path), "--recipes"]
    recipes.main([*command, "single"])
    first = pd.read_csv(tmp_path / "recipes.csv")
    with monkeypatch.context() as patch:
        patch.setattr(PolySRLModel, "fit", lambda *_, **__: pytest.fail("trained again"))
        recipes.main([*command, "single"])
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "recipes.csv"), first)
    recipes.main([*command, "single, random start"])
    errors = pd.read_csv(tmp_path / "recipes.csv").pivot_table("value", "metric", "model")
    assert errors.loc["mae"].nunique() == 2
    keys = [frozenset(recipes.settings_of(name, 0, 100).items()) for name in recipes.RECIPES]
    assert len(set(keys)) == len(keys)


def test_predictions_are_a_record_which_is_enough(target, tmp_path, monkeypatch):
    name = "single, frozen, std calibrated"
    command = ["--recipes", name, "--seeds", "2", "--output-dir", str(tmp_path)]
    recipes.main(command)
    assert check_records(list((tmp_path / "wetlab_v0.1").glob("*seed*"))) == []
    record = load_record(tmp_path, "wetlab", name, "recipe", 1)["metallic"]
    train, test = target.splits()[4]
    mean, std, _ = recipes.predict_fold(target, (train, test), name, seed=1)
    np.testing.assert_allclose(record.predictions[test], mean, rtol=1e-6)
    np.testing.assert_allclose(record.std[test], std, rtol=1e-6)
    info = json.loads((tmp_path / "wetlab_v0.1" / FOLDER / "info.json").read_text())
    assert info["algorithm"] == f"PolySRL-DC (frozen encoder, {name}, seed 1)"
    commands = []
    monkeypatch.setattr(subprocess, "run", lambda command, check: commands.append(command))
    runpy.run_path(str(run_file(tmp_path / "wetlab_v0.1" / FOLDER)))
    assert [given[1:] for given in commands] == [["benchmarks/recipes.py", *command[:4]]]

    scores = pd.read_csv(tmp_path / "recipes.csv")
    shutil.rmtree(tmp_path / "folds")
    with monkeypatch.context() as patch:
        patch.setattr(PolySRLModel, "fit", lambda *_, **__: pytest.fail("trained again"))
        recipes.main(command)
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "recipes.csv"), scores)
    longer = {name: replace(recipes.RECIPES[name], epochs=2)}
    monkeypatch.setattr(recipes, "RECIPES", longer)  # another way to train, by the same name
    recipes.main([*command[:2], *command[4:]])
    changed = pd.read_csv(tmp_path / "recipes.csv")
    assert set(changed["seed"]) == {0}  # the other seed is of the earlier way
    assert (changed["value"].to_numpy() != scores.query("seed == 0")["value"].to_numpy()).all()


def test_matbench_is_trained_as_the_command_would(target, tmp_path, monkeypatch, capsys):
    small = replace(target, suite="paper", held_back=HELD_BACK)
    monkeypatch.setattr(recipes, "small_targets", lambda _: [small])
    ways = {name: replace(recipe, epochs=1) for name, recipe in RECIPES.items()}
    monkeypatch.setattr(polysrl_dc, "RECIPES", ways)
    recipes.main(["--output-dir", str(tmp_path), "--matbench"])
    assert "| metallic |" in capsys.readouterr().out
    assert [path.name for path in tmp_path.glob("*.csv")] == ["recipes.csv"]
    table = pd.read_csv(tmp_path / "recipes.csv")
    assert set(table["suite"]) == {"paper"} and set(table["model"]) == {recipes.AS_COMMAND}
    record = load_record(tmp_path, "paper", recipes.AS_COMMAND, "recipe", 0)["metallic"]
    train, test = small.splits()[2]
    assert len(train) == 108
    model = PolySRLModel(**ways["frozen"].settings)
    model.fit(dataset_of(small, train), nb_epoch=1)
    expected = model.predict(dataset_of(small, test))[:, 0]
    np.testing.assert_allclose(record.predictions[test], expected, rtol=1e-6)
    assert record.settings["freeze_encoder"] and record.settings["epochs"] == 1
    large = recipes.settings_of(recipes.AS_COMMAND, 0, 5000)
    assert (large["batch_size"], large["freeze_encoder"]) == (512, False)

    folder = tmp_path / "paper_v0.1" / "polysrl_train_recipe_seed0"
    said = [json.loads((folder / "info.json").read_text())]
    monkeypatch.setattr(recipes, "suitable_recipe", lambda n_rows: "single")
    monkeypatch.setattr(recipes, "small_targets", lambda _: [replace(small, name="other")])
    recipes.main(["--output-dir", str(tmp_path), "--matbench"])
    said.append(json.loads((folder / "info.json").read_text()))
    assert ["frozen encoder" in info["algorithm"] for info in said] == [True, False]
    assert "frozen on some tasks; on the others" in said[1]["algorithm_long"]
    assert check_records([folder]) == []


def test_the_page_names_the_recipes_of_the_small_tasks(data_dir):
    taken = {t.name: suitable_recipe(len(t.splits()[0][0])) for t in small_targets(data_dir)}
    others = {"matbench_jdft2d": "frozen", "matbench_dielectric": "fine-tuned"}
    assert taken == dict.fromkeys(SMALL_TASKS, "large") | others
    said = "*frozen* for jdft2d, *fine-tuned* for dielectric, else *large*"
    assert said in " ".join(summarize.INTRODUCTION.split())


def test_a_recipe_has_the_epochs_and_batches_of_roost():
    pytest.importorskip("aviary")
    import roost

    way = recipes.RECIPES[recipes.AS_ROOST]
    assert (way.epochs, way.settings["batch_size"]) == (roost.EPOCHS, roost.BATCH_SIZE)


def test_nothing_is_written_in_a_dry_run_or_for_an_unknown_target(target, tmp_path, capsys):
    recipes.main(["--dry-run", "--output-dir", str(tmp_path)])
    for wrong, message in (
        (["--targets", "glass"], "no target is named 'glass'; the targets are: metallic"),
        (["--seeds", "0"], "must be at least 1"),
        (["--data-dir", str(tmp_path / "absent")], "absent"),
    ):
        with pytest.raises(SystemExit):
            recipes.main([*wrong, "--output-dir", str(tmp_path)])
        assert message in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.iterdir())
