"""Recipes by the number of rows: nested parts of one training fold, no test row, kept scores."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import recipe_sizes
from folds import split_validation
from graph_data import graph_dataset
from sklearn.metrics import mean_absolute_error, roc_auc_score
from targets import Target

from polysrl_dc import PolySRLModel

FORMULAS = np.array([f"Na{i}Cl{j}" for i in range(1, 11) for j in range(1, 11)] + ["RfO2"])
TARGET = Target("gap", "eV", FORMULAS, np.linspace(0, 1, 101), 1.0, 8)


@pytest.fixture
def command(tmp_path, monkeypatch):
    quick = {name: replace(recipe, epochs=1) for name, recipe in recipe_sizes.WAYS.items()}
    monkeypatch.setattr(recipe_sizes, "WAYS", quick)
    monkeypatch.setattr(recipe_sizes, "load_task", lambda *_: TARGET.task)
    return ["--output-dir", str(tmp_path), "--tasks", "gap", "--rows", "20", "40", "900"]


def test_scores_are_those_of_models_of_so_many_training_rows(command, tmp_path, capsys):
    recipe_sizes.main([*command, "--recipes", "single"])
    table = pd.read_csv(tmp_path / "recipe_sizes.csv")
    assert table["protocol"].tolist() == ["20 rows", "40 rows"]  # and not 900, of which are none
    assert set(table["model"]) == {"single"} and set(table["metric"]) == {"mae"}
    train, _ = TARGET.splits()[0]
    train = train[FORMULAS[train] != "RfO2"]
    rest, valid = split_validation(list(FORMULAS[train]), 0.2, seed=0)
    rows, valid = train[np.random.default_rng(0).permutation(rest)[:40]], train[valid]
    model = PolySRLModel()
    model.fit(graph_dataset(FORMULAS[rows], TARGET.values[rows]), nb_epoch=1)
    error = mean_absolute_error(TARGET.values[valid], model.predict(graph_dataset(FORMULAS[valid])))
    assert table["value"].iloc[1] == pytest.approx(error)
    assert f"{error:.4f}".rstrip("0") in capsys.readouterr().out.splitlines()[-1]


def test_what_averaging_gains_is_that_of_members_on_one_encoder():
    averaged, single = (recipe_sizes.WAYS[name] for name in (recipe_sizes.AVERAGED, "single"))
    assert averaged.settings == {**single.settings, "n_ensemble": 3}
    assert averaged.epochs == single.epochs
    assert PolySRLModel(**averaged.settings).settings["n_encoders"] == 3


def test_parts_are_nested_and_share_no_row_with_the_validation_part():
    *train, valid = recipe_sizes.parts(np.array([f"Na{i}Cl" for i in range(1, 51)]), (5, 30, 45), 3)
    assert [len(rows) for rows in (*train, valid)] == [5, 30, 10]  # 45 are too many
    assert set(train[0]) < set(train[1]) and not set(train[1]) & set(valid)


def test_classes_are_scored_by_the_probability_of_the_second(command):
    train, valid = np.arange(60), np.arange(60, 100)
    classes = (np.arange(100) % 3 == 0).astype(float)
    parts = [(FORMULAS[rows], classes[rows]) for rows in (train, valid)]
    found = recipe_sizes.score("single", *parts, True, seed=1)
    model = PolySRLModel("classification", seed=1)
    model.fit(graph_dataset(*parts[0]), nb_epoch=recipe_sizes.WAYS["single"].epochs)
    probability = model.predict_uncertainty(graph_dataset(FORMULAS[valid]))[0]
    assert found == pytest.approx(roc_auc_score(classes[valid], probability[:, 0]))


def test_what_is_scored_is_not_trained_again(command, tmp_path, monkeypatch):
    recipe_sizes.main([*command, "--recipes", "single"])
    first = pd.read_csv(tmp_path / "recipe_sizes.csv")
    trained = []
    monkeypatch.setattr(recipe_sizes, "score", lambda *call: trained.append(call[0]) or 0.5)
    recipe_sizes.main([*command, "--recipes", "single", "frozen"])
    assert trained == ["frozen", "frozen"]
    table = pd.read_csv(tmp_path / "recipe_sizes.csv")
    kept = table[table["model"] == "single"].reset_index(drop=True)
    pd.testing.assert_frame_equal(kept, first)


def test_a_dry_run_says_what_is_missing_and_writes_nothing(command, tmp_path, capsys):
    recipe_sizes.main([*command, "--recipes", "single", "--rows", "20"])
    there = (tmp_path / "recipe_sizes.csv").read_bytes()
    capsys.readouterr()
    recipe_sizes.main([*command, "--recipes", "single", "--dry-run"])
    name = TARGET.task.dataset_name
    expected = [f"{name}, 20 rows, single, 0, is there", f"{name}, 40 rows, single, 0, would run"]
    assert capsys.readouterr().out.splitlines() == expected
    assert (tmp_path / "recipe_sizes.csv").read_bytes() == there


def test_an_encoder_that_has_learned_the_labels_is_refused(command, tmp_path, monkeypatch, capsys):
    task = SimpleNamespace(dataset_name="matbench_mp_e_form")
    monkeypatch.setattr(recipe_sizes, "load_task", lambda *_: task)
    with pytest.raises(SystemExit):
        recipe_sizes.main([*command, "--recipes", "single", "fine-tuned"])
    said = "formation-energy-mp was pretrained on labels of test rows of matbench_mp_e_form"
    assert said in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_missing_data_end_it_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("POLYSRL_DATA", raising=False)
    with pytest.raises(SystemExit):
        recipe_sizes.main(["--data-dir", str(tmp_path / "absent"), "--output-dir", str(tmp_path)])
    assert "absent" in capsys.readouterr().err.splitlines()[-1]
