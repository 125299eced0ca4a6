"""The console command, run in this process on small tables."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import deepchem as dc
import numpy as np
import pandas as pd
import pytest
import torch
from pymatgen.core import Lattice, Structure

from polysrl_dc import (
    PolymorphDataset,
    PolySRLModel,
    StoichiometryGraphFeaturizer,
    StoichiometrySplitter,
    __version__,
    cli,
    cross_val_predict,
    keep_formulas,
)
from polysrl_dc.checkpoints import load_checkpoint
from polysrl_dc.cli import main
from polysrl_dc.cross_validation import HeldOut
from polysrl_dc.errors import InvalidInputError
from polysrl_dc.inputs import remarks
from polysrl_dc.recipes import LEAST_ROWS, RECIPES, suitable_recipe

FORMULAS = ["NaCl", "KCl", "LiF", "NaF", "KBr", "MgO", "CaO", "ZnO", "GaN", "AlN", "TiO2", "SiO2"]


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "data.csv"
    frame = pd.DataFrame({"name": FORMULAS, "gap": np.linspace(1.0, 9.0, len(FORMULAS))})
    frame["oxide"] = [int("O" in formula) for formula in FORMULAS]
    frame["empty"], frame["one"] = "", [1.0, *[""] * (len(FORMULAS) - 1)]
    frame.to_csv(path, index=False)
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    frame = pd.DataFrame({"formula": FORMULAS, "gap": np.linspace(1.0, 9.0, len(FORMULAS))})
    frame.loc[3, "gap"] = np.nan
    frame.to_csv(folder / "data.csv", index=False)
    command = ["train", "--input", f"{folder}/data.csv", "--target", "gap", "--epochs", "2"]
    assert main([*command, "--output-dir", f"{folder}/model"]) == 0
    return folder / "model"


def error_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The last line on standard error of a command that must fail with status 2."""
    capsys.readouterr()
    try:
        status = main(arguments)
    except SystemExit as usage:
        status = usage.code
    assert status == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    return captured.err.strip().splitlines()[-1]


def test_embed_writes_embedding_and_polymorphism(tmp_path: Path, table: Path) -> None:
    for suffix, read in ((".csv", pd.read_csv), (".parquet", pd.read_parquet)):
        output = f"{tmp_path}/out{suffix}"
        assert main(["embed", "--input", str(table), "--column", "name", "--output", output]) == 0
        frame = read(output)
        assert frame["name"].tolist() == FORMULAS
        vectors = frame.filter(like="embedding_").to_numpy()
        assert vectors.shape == (len(FORMULAS), 200)
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-4)
        assert len(np.unique(vectors.round(6), axis=0)) == len(FORMULAS)
        assert (frame["polymorphism"] > 0).all()


def test_embed_prints_csv_without_output(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["embed", "Fe2O3", "Fe4O6"]) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[0].startswith("formula,polymorphism,embedding_0,")
    first, second = (np.array(line.split(",")[1:], dtype=float) for line in lines[1:])
    np.testing.assert_allclose(first, second, atol=1e-5)


@pytest.mark.parametrize("name", ["graphcl-mp", "formation-energy-mp"])
def test_embed_leaves_out_a_variance_that_was_not_trained(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["embed", "TiO2", "--model", name]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("formula,embedding_0,")
    assert f"no column polymorphism: {name} has no trained variance\n" in captured.err


def test_embed_with_a_trained_model(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["embed", "NaCl", "--model", str(trained)]) == 0
    with_model = capsys.readouterr().out
    assert with_model.startswith("formula,polymorphism,")  # of its first encoder
    assert main(["embed", "NaCl", "--model", str(trained)]) == 0
    assert capsys.readouterr().out == with_model


def test_predict_gives_prediction_and_std(trained: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.csv"
    command = ["predict", "--model", str(trained), "NaCl", "RbI", "--output", str(output)]
    assert main(command) == 0
    frame = pd.read_csv(output)
    assert frame.columns.tolist() == ["formula", "prediction", "std", "outside"]
    assert frame["outside"].dtype == bool
    assert np.isfinite(frame["prediction"]).all()
    assert (frame["std"] > 0).all()


def test_predictions_of_a_model_from_python_have_the_names_of_its_tasks(tmp_path: Path) -> None:
    frame = pd.DataFrame({"formula": FORMULAS, "gap": np.arange(12.0), "size": np.arange(12.0)})
    frame.to_csv(tmp_path / "data.csv", index=False)
    featurizer = StoichiometryGraphFeaturizer()
    loader = dc.data.CSVLoader(["gap", "size"], feature_field="formula", featurizer=featurizer)
    part = loader.create_dataset(str(tmp_path / "data.csv")).select(range(8))
    for names, dataset in (
        (["gap", "size"], part),
        ([0, 1], dc.data.NumpyDataset(part.X, part.y)),  # which has no names
    ):
        model = PolySRLModel(n_tasks=2, freeze_encoder=True)
        model.fit(dataset, nb_epoch=1)
        model.save(tmp_path / "model")
        output = str(tmp_path / "out.csv")
        assert main(["predict", "--model", f"{tmp_path}/model", "NaCl", "--output", output]) == 0
        columns = [f"{column}_{name}" for column in ("prediction", "std") for name in names]
        assert pd.read_csv(output).columns.tolist() == ["formula", *columns]


def test_train_scores_on_held_out_formulas(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", "--input", str(table), "--column", "name", "--target", "gap", "oxide"]
    folder = str(tmp_path / "two")
    assert main([*command, "--epochs", "1", "--hold-out", "0.25", "--output-dir", folder]) == 0
    error = capsys.readouterr().err
    assert "mae_score of gap: " in error and "mae_score of oxide: " in error
    assert error.count(" on 3 held-out labels") == 2
    assert "std is not calibrated: 3 labels of gap are too few, at least 20 are needed" in error
    assert main(["predict", "--model", folder, "NaCl", "--interval", "0.95"]) == 2
    refused = "--interval needs a calibrated std; not so: std_gap, std_oxide"
    assert capsys.readouterr().err.endswith(f"error: {refused}\n")
    assert main(["predict", "--model", folder, "NaCl", "UN"]) == 0
    out, error = capsys.readouterr()
    header, *rows = out.splitlines()
    assert error.startswith(
        "not calibrated and too small: std_gap, std_oxide\n1 of 2 formulas lie "
    )
    assert error.endswith(" from all 9 of the reference\n")
    assert header == "formula,prediction_gap,prediction_oxide,std_gap,std_oxide,outside"
    assert [row.split(",")[-1] for row in rows] == ["False", "True"]


def train_command(tmp_path: Path, n_rows: int, *options: str) -> list[str]:
    """``polysrl train`` on so many formulas, for one epoch."""
    table = tmp_path / "rows.csv"
    formulas = [f"Na{i}Cl{j}" for i in range(1, 20) for j in range(1, 20)][:n_rows]
    pd.DataFrame({"formula": formulas, "gap": np.sin(np.arange(n_rows))}).to_csv(table, index=False)
    folder = ["--output-dir", str(tmp_path / "model")]
    return ["train", "--input", str(table), "--target", "gap", *folder, *options]


@pytest.mark.parametrize(
    "options, recipe, encoders, frozen, training",
    [
        ([], "frozen", 3, True, (1, 32, 1e-3)),
        (["--batch-size", "8"], "frozen", 3, True, (1, 8, 1e-3)),
        (["--recipe", "fine-tuned"], "fine-tuned", 3, False, (1, 32, 1e-3)),
        (["--recipe", "large"], "large", 3, False, (1, 512, 3e-3)),
        (["--pretrained", "none"], "single", 1, False, (1, 32, 1e-3)),
        (["--freeze-encoder"], "single", 1, True, (1, 32, 1e-3)),
        (["--ensemble", "2"], "single", 2, False, (1, 32, 1e-3)),
        (["--recipe", "frozen", "--pretrained", "none"], "frozen", 1, True, (1, 32, 1e-3)),
    ],
)
def test_train_follows_a_recipe_where_no_option_says_otherwise(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    recipe: str,
    encoders: int,
    frozen: bool,
    training: tuple[int, int, float],
) -> None:
    assert main(train_command(tmp_path, 12, "--epochs", "1", *options)) == 0
    epochs, batch_size, rate = training
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith(f"recipe {recipe}: {'heads' if frozen else 'encoders and heads'} on ")
    assert said[0].endswith(f", {epochs} epochs, {batch_size} rows a step, learning rate {rate:g}")
    assert said[1] == "std is not calibrated and too small: that needs 20 labels"
    model = PolySRLModel.from_pretrained(tmp_path / "model")
    assert (model.settings["n_encoders"], model.settings["freeze_encoder"]) == (encoders, frozen)
    formulas = model.provenance.pop("formulas")
    assert len(formulas) == 12 and formulas == sorted(formulas) and "NaCl" in formulas
    assert model.provenance == {"targets": ["gap"], "recipe": recipe}
    assert model.epochs_trained == epochs and model.get_global_step() == -(-12 // batch_size)


def test_train_says_what_else_was_meant_perhaps(tmp_path: Path, capsys) -> None:
    command = train_command(tmp_path, 24, "--epochs", "1")
    assert main(command) == 0
    said = capsys.readouterr().err.splitlines()
    assert said[-1] == f"model written to {tmp_path / 'model'}"
    assert said[-2] == "std is not calibrated and too small: --folds 5 calibrates it"
    frame = pd.read_csv(tmp_path / "rows.csv")
    frame.assign(gap=np.arange(24) % 2).to_csv(tmp_path / "rows.csv", index=False)
    assert main(command) == 0
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("the labels of 'gap' are 0 and 1: --task classification ")
    assert said[-1] == f"model written to {tmp_path / 'model'}, in place of another"
    assert main([*command, "--task", "classification"]) == 0
    assert "are 0 and 1" not in capsys.readouterr().err
    frame.rename(columns={"formula": "composition"}).to_csv(tmp_path / "rows.csv", index=False)
    message = error_of(command, capsys)
    assert message.endswith("only ['composition', 'gap']; --column names another one of formulas")


def test_train_says_how_close_formulas_alone_can_come(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("formula,gap,other\nNaCl,1,2\nKCl,4,\nClNa,3,2\nNa2Cl2,8,2\nKF,5,1\n")
    command = ["train", "--input", str(path), "--epochs", "1", "--output-dir", f"{tmp_path}/model"]
    assert main([*command, "--target", "gap", "other"]) == 0
    said = capsys.readouterr().err
    assert "the labels of 'gap' are 5 of 3 formulas; they lie 1.4 from the median of" in said
    assert "'other'" not in said  # whose three labels of NaCl agree


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (np.geomspace(1e-3, 1e3, 40), "span orders of magnitude (0.002 to 503): "),
        (np.geomspace(1, 1000, 40), ""),
        ([0.0, *np.geomspace(1e-3, 1e3, 40)], ""),
        ([1e-9, *np.linspace(1, 2, 40)], ""),  # one small label among many
    ],
)
def test_labels_of_several_orders_of_magnitude_are_told(labels, said) -> None:
    found = list(remarks(np.array(labels), np.arange(len(labels))))
    assert len(found) == bool(said) and all(text.startswith(said) for text in found)


def test_info_tells_what_a_model_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [str(tmp_path / "model"), str(tmp_path / "other")]
    assert main(train_command(tmp_path, 24, "--epochs", "2", "--folds", "2")) == 0
    model = PolySRLModel.from_pretrained(folders[0])
    for rate, ending in ((1.0, ", grows with the distance to what was learned from"), (0.0, "")):
        model.calibration = replace(model.calibration, rates=(rate,), ceilings=(1.0,))
        model.save(folders[0])
        capsys.readouterr()
        assert main(["info", folders[0]]) == 0
        assert (
            capsys.readouterr()
            .out.splitlines()[-1]
            .endswith(f"calibrated on held-out labels{ending}")
        )
    model = PolySRLModel("regression", 2, n_ensemble=2, pretrained=None, batch_size=8)
    model.save(folders[1])
    capsys.readouterr()
    assert main(["info", *folders]) == 0
    first, other = capsys.readouterr().out.split("\n\n")
    facts, others = (
        dict(line.split(":", 1) for line in text.splitlines()) for text in (first, other)
    )
    expected = {
        "model": folders[0],
        "predicts": "gap (regression)",
        "learned from": "22 reduced formulas, kept in it",
        "trained for": "2 epochs of 32 rows a step, learning rate 0.001, recipe frozen",
        "network": "3 heads on 3 encoders of formulas that stay as they are, 4,467,414 parameters",
        "polymorphism": "variance trained in 1 of 3 encoders",
        "std": "calibrated on held-out labels",
    }
    assert {name: text.strip() for name, text in facts.items()} == expected
    assert "not recorded" in others["learned from"] and others["polymorphism"].endswith(
        "0 of 2 encoders"
    )
    assert "std" not in others and others["predicts"].strip() == "embeddings of formulas"
    assert main(["info"]) == 0
    shipped = capsys.readouterr().out
    assert [line.split()[1] for line in shipped.splitlines() if line.startswith("model:")] == [
        "formation-energy-mp",
        "graphcl-mp",
        "polysrl-mp",
    ]
    assert "152,106 rows of structures.parquet, objective polysrl" in shipped
    for data, expected in (
        ("OQMD", "OQMD"),
        ({"source": "x"}, "{'source': 'x'}"),
        (None, "not rec"),
    ):
        model.provenance = {"data": data, "formulas": None}
        model.save(folders[1])
        assert main(["info", folders[1]]) == 0
        assert f"learned from: {expected}" in capsys.readouterr().out
    assert "no checkpoint at" in error_of(["info", "nowhere"], capsys)


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"polysrl {__version__}\n"


@pytest.mark.parametrize("n_rows", [0, -1])
def test_no_recipe_suits_no_row(n_rows: int) -> None:
    with pytest.raises(ValueError, match=f"n_rows is {n_rows}: must be at least 1"):
        suitable_recipe(n_rows)


def test_the_recipes_are_those_that_were_measured() -> None:
    """Numbers of rows and epochs as the README and the findings of the benchmarks state them."""
    suitable = [suitable_recipe(n) for n in (1, 999, 1_000, 4_999, 5_000)]
    assert suitable == ["frozen", "frozen", "fine-tuned", "fine-tuned", "large"]
    epochs = {name: recipe.epochs for name, recipe in RECIPES.items()}
    assert epochs == {"frozen": 300, "fine-tuned": 100, "single": 100, "large": 100}


def test_the_recipe_depends_on_the_number_of_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(LEAST_ROWS, "fine-tuned", 12)
    for n_rows, recipe in ((11, "frozen"), (12, "fine-tuned")):
        assert main(train_command(tmp_path, n_rows, "--epochs", "1")) == 0
        assert capsys.readouterr().err.startswith(f"recipe {recipe}: ")
    monkeypatch.setitem(LEAST_ROWS, "large", 12)
    for told, encoders in (([], 3), (["--ensemble", "2"], 2), (["--pretrained", "none"], 1)):
        assert main(train_command(tmp_path, 12, "--epochs", "1", *told)) == 0
        said = capsys.readouterr().err.splitlines()[0]
        assert said.startswith("recipe large: ")
        assert said.endswith(" 512 rows a step, learning rate 0.003")
        assert PolySRLModel.from_pretrained(tmp_path / "model").settings["n_encoders"] == encoders
    monkeypatch.undo()
    monkeypatch.setitem(LEAST_ROWS, "fine-tuned", 12)
    # that of all rows, also for the models of a cross-validation, which learn from fewer
    assert main(train_command(tmp_path, 12, "--epochs", "1", "--folds", "2")) == 0
    said = capsys.readouterr().err
    assert said.startswith("recipe fine-tuned: ") and said.count("rows a step") == 1


def test_of_several_recipes_the_one_with_the_lowest_error_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    off, trained = iter([0.5, 0.25, 1.0]), []

    def predicted(train: Any, dataset: Any, n_folds: int, seed: int, groups: Any) -> HeldOut:
        trained.append(train(dataset).provenance["recipe"])
        n_rows = len(dataset)
        return HeldOut(dataset.y + next(off), np.ones((n_rows, 1)), np.zeros(n_rows))

    monkeypatch.setattr(cli, "cross_val_predict", predicted)
    held_out, names = tmp_path / "held_out.csv", ["frozen", "fine-tuned", "single"]
    command = train_command(tmp_path, 24, "--recipe", *names, "--epochs", "1", "--folds", "2")
    assert main([*command, "--predictions", str(held_out)]) == 0
    assert trained == names
    said = capsys.readouterr().err.splitlines()
    described = [line.partition(":")[0] for line in said if "rows a step" in line]
    assert described == [f"recipe {name}" for name in names]
    scores = [line.partition("; ")[0] for line in said if "mae_score" in line]
    *compared, last = (
        f"mae_score of gap: {error} on 24 held-out" for error in (0.5, 0.25, 1, 0.25)
    )
    expected = [f"{name}, {score}" for name, score in zip(names, compared, strict=True)]
    assert scores == [f"{line} labels" for line in (*expected, last)]
    assert "recipe fine-tuned is kept: its error is the lowest" in said
    assert PolySRLModel.from_pretrained(tmp_path / "model").provenance["recipe"] == "fine-tuned"
    table = pd.read_csv(held_out)
    np.testing.assert_allclose(table["prediction"] - table["gap"], 0.25, atol=1e-6)


def test_several_recipes_are_told_apart_by_folds_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    several = ["--recipe", "frozen", "single"]
    for command in ([], ["--hold-out", "0.2"]):
        error = error_of(train_command(tmp_path, 24, *several, *command), capsys)
        assert error.endswith("--recipe with several names needs --folds, which choose")
    twice = train_command(tmp_path, 24, "--recipe", "single", "single", "--folds", "2")
    assert main([*twice, "--epochs", "1"]) == 0
    assert capsys.readouterr().err.count("recipe single") == 1


@pytest.mark.parametrize("rate", ["0", "-1e-3", "nan", "inf", "fast"])
def test_a_learning_rate_is_a_positive_number(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], rate: str
) -> None:
    error = error_of(train_command(tmp_path, 12, f"--learning-rate={rate}"), capsys)
    assert error.endswith(f"argument --learning-rate: {rate} is not a positive number")


def test_held_out_formulas_calibrate_the_std(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    formulas = [f"{metal}{n}{anion}" for metal in ("Li", "Na", "K") for anion in ("O", "S", "Cl")
                for n in range(1, 9)]  # fmt: skip
    table, folder = tmp_path / "many.csv", str(tmp_path / "model")
    pd.DataFrame({"formula": formulas, "gap": np.sin(np.arange(72))}).to_csv(table, index=False)
    command = ["train", "--input", str(table), "--target", "gap", "--epochs", "1"]
    assert main([*command, "--hold-out", "0.5", "--output-dir", folder]) == 0
    error = capsys.readouterr().err
    model = PolySRLModel.from_pretrained(folder)
    assert model.calibration is not None and model.calibration.polymorphs
    graphs = StoichiometryGraphFeaturizer().featurize(formulas)
    dataset = dc.data.NumpyDataset(graphs, np.sin(np.arange(72)), ids=np.arange(72))
    std = model.predict_uncertainty(dataset)[1]
    assert main(["predict", "--model", folder, "--input", str(table)]) == 0
    out, said = capsys.readouterr()
    written = pd.read_csv(StringIO(out))
    np.testing.assert_allclose(written["std"], std[:, 0], rtol=1e-5)
    held_out = StoichiometrySplitter().train_test_split(dataset, frac_train=0.5, seed=0)[1]
    assert f"std is calibrated on {len(held_out)} held-out labels" in error
    assert "not calibrated" not in said
    assert model.calibration == model.calibrate(held_out)


def test_folds_score_and_calibrate_a_model_of_all_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    formulas = [f"{metal}{n}{anion}" for metal in ("Li", "Na", "K") for anion in ("O", "Cl")
                for n in range(1, 9)] + ["unreadable"]  # fmt: skip
    labels, table = np.sin(np.arange(49)), tmp_path / "many.csv"
    pd.DataFrame({"formula": formulas, "gap": labels}).to_csv(table, index=False)
    written, folder = tmp_path / "held_out.csv", str(tmp_path / "model")
    command = ["train", "--input", str(table), "--target", "gap", "--epochs", "1"]
    command += ["--on-error", "skip", "--freeze-encoder", "--output-dir", folder]
    assert main([*command, "--folds", "3", "--predictions", str(written)]) == 0
    graphs = StoichiometryGraphFeaturizer().featurize(formulas[:-1])
    dataset = dc.data.NumpyDataset(graphs, labels[:-1])

    def train(part: dc.data.Dataset) -> PolySRLModel:
        model = PolySRLModel(freeze_encoder=True, batch_size=32)
        model.fit(part, nb_epoch=1)
        return model

    mean, std, distance = predicted = cross_val_predict(train, dataset, n_folds=3)
    whole = train(dataset)
    keep_formulas(whole, dataset)
    calibration = whole.calibrate(dataset, predicted=predicted)
    model = PolySRLModel.from_pretrained(folder)
    assert model.calibration == calibration
    np.testing.assert_array_equal(model.predict(dataset), whole.predict(dataset))
    asked = ["predict", "--model", folder, "--no-outside", "--interval", "0.9", "NaCl", "UTe2"]
    assert main([*asked, "--output", str(tmp_path / "asked.csv")]) == 0
    found = pd.read_csv(tmp_path / "asked.csv")
    assert found.columns.tolist() == ["formula", "prediction", "std", "lower", "upper"]
    mean_asked, std_asked = whole.predict_uncertainty(["NaCl", "UTe2"])
    half = np.log(10) / np.sqrt(2) * std_asked[:, 0]
    np.testing.assert_allclose(found["upper"], mean_asked[:, 0] + half, rtol=1e-5)
    np.testing.assert_allclose(found["lower"], mean_asked[:, 0] - half, rtol=1e-5)
    held_out = pd.read_csv(written)
    assert held_out["formula"].tolist() == formulas[:-1]
    np.testing.assert_allclose(held_out["prediction"], mean[:, 0], rtol=1e-5)
    np.testing.assert_allclose(held_out["std"], calibration.apply(std, distance)[:, 0], rtol=1e-5)
    error = capsys.readouterr().err
    score = np.abs(mean[:, 0] - labels[:-1]).mean()
    assert f"mae_score of gap: {score:.4g} on 48 held-out labels; " in error
    of_one_value = np.abs(labels[:-1] - np.median(labels[:-1])).mean()
    assert f"; {of_one_value:.4g} with their median for all" in error


def test_what_cannot_be_scored_on_is_said_before_training(
    table: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    command = ["train", "--input", str(table), "--column", "name", "--target", "gap"]
    command += ["--output-dir", str(tmp_path / "model")]
    taken = tmp_path / "taken.csv"
    pd.read_csv(table).assign(std=1.0).to_csv(taken, index=False)
    wanted = ["--predictions", str(tmp_path / "out.csv")]
    nowhere = str(tmp_path / "absent" / "out.csv")
    nameless, folder = tmp_path / "nameless.csv", tmp_path / "folder.csv"
    nameless.write_text("\n".join(["name,gap,,", *(f"{name},1,," for name in FORMULAS)]))
    folder.mkdir()
    parquet = ["--predictions", str(tmp_path / "out.parquet")]
    proc = ["--predictions", "/proc/out.csv"]
    fit, learned = PolySRLModel.fit, []

    def counted(model: PolySRLModel, dataset: Any, *args: Any, **kwargs: Any) -> float:
        learned.append(len(dataset))
        return fit(model, dataset, *args, **kwargs)

    monkeypatch.setattr(PolySRLModel, "fit", counted)
    for options, message in (
        (wanted, "--predictions needs --folds or --hold-out"),
        (["--folds", "1"], "--folds 1: must be at least 2 and at most 12, the number of "),
        (["--folds", "13"], "--folds 13: must be at least 2 and at most 12"),
        (["--folds", "two"], "two is not a positive integer"),
        (["--hold-out", "20%"], "20% is not a number from 0 to below 1"),
        (["--output-dir", str(table / "model")], f"{table} is a file, no folder"),
        (["--target", "gap"], "--target names a column twice: gap gap"),
        (["--target", "empty"], "the column 'empty' has no number"),
        (["--target", "name"], "row 0: name is 'NaCl', not a number"),
        (["--learning-rate", "1e30"], "loss"),
        (["--folds", "2", "--input", str(taken), *wanted], "has a column 'std' already"),
        (["--folds", "2", "--hold-out", "0.5"], "not allowed with"),
        (["--folds", "2", "--predictions", nowhere], f"{nowhere} lies in no folder that exists"),
        (["--folds", "2", "--input", str(nameless), *parquet], "out.parquet cannot be written"),
        (["--folds", "2", "--predictions", str(folder)], f"{folder} is a folder"),
        (["--folds", "2", "--target", "one"], "one has no label outside fold "),
        (["--hold-out", "0.9", "--target", "one"], "leaves no label of 'one' to train on"),
        *([(["--folds", "2", *proc], "/proc/out.csv: ")] if Path("/proc").is_dir() else []),
    ):
        assert message in error_of([*command, *options], capsys)
    assert learned == [len(FORMULAS)]  # by the learning rate
    assert not (tmp_path / "model").exists()


def test_members_start_from_several_encoders(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(tmp_path / "model")
    command = ["train", "--input", str(table), "--column", "name", "--target", "gap", "--epochs"]
    command += ["1", "--output-dir", folder, "--freeze-encoder", "--pretrained", "polysrl-mp"]
    assert main([*command, "graphcl-mp"]) == 0
    model = PolySRLModel.from_pretrained(folder)
    assert (model.settings["n_ensemble"], len(model.model.encoders)) == (2, 2)
    starts = PolySRLModel(pretrained=["polysrl-mp", "graphcl-mp"]).model.encoders
    for encoder, start in zip(model.model.encoders, starts, strict=True):
        assert torch.equal(encoder.jumping_knowledge.weight, start.jumping_knowledge.weight)
    assert main(["embed", "NaCl", "--model", folder]) == 0
    assert capsys.readouterr().out.splitlines()[0].endswith(",embedding_399")
    assert main([*command, "graphcl-mp", "--ensemble", "3"]) == 2
    assert "n_ensemble is 3: no multiple of 2 encoders" in capsys.readouterr().err


def test_classification_gives_probabilities(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, output = str(tmp_path / "model"), str(tmp_path / "out.csv")
    command = ["train", "--input", str(table), "--column", "name", "--target", "oxide"]
    options = ["--task", "classification", "--epochs", "1", "--output-dir", folder]
    assert main([*command, *options]) == 0
    assert main(["predict", "--model", folder, "NaCl", "MgO", "--output", output]) == 0
    assert pd.read_csv(output)["prediction"].between(0, 1).all()
    message = error_of(["predict", "--model", folder, "NaCl", "--interval", "0.9"], capsys)
    assert message.endswith("error: --interval is for models of regression")


def test_pretrain_on_structure_files(tmp_path: Path) -> None:
    files = []
    for i, (anion, length) in enumerate([("Cl", 5.6), ("F", 4.6), ("Br", 6.0), ("I", 6.5)]):
        structure = Structure.from_spacegroup(
            "Fm-3m", Lattice.cubic(length), ["Na", anion], [[0, 0, 0], [0.5, 0.5, 0.5]]
        )
        files.append(str(tmp_path / f"{i}.cif"))
        structure.to(files[-1])
    encoder = str(tmp_path / "encoder")
    assert main(["pretrain", *files, "--epochs", "1", "--output-dir", encoder]) == 0
    assert main(["embed", "NaCl", "--model", encoder, "--output", str(tmp_path / "e.csv")]) == 0

    # a folder of them, and their table, are the same data and give the same encoder
    table = tmp_path / "table.parquet"
    structures = [Structure.from_file(name) for name in files]
    pd.DataFrame({
        "material_id": files,
        "cell": [list(s.lattice.parameters) for s in structures],
        "numbers": [[site.specie.Z for site in s] for s in structures],
        "frac_coords": [s.frac_coords.ravel().tolist() for s in structures],
    }).to_parquet(table)  # fmt: skip
    folder = tmp_path / "cifs"
    folder.mkdir()
    for name in files:
        Path(name).rename(folder / Path(name).name)
    weights = [load_checkpoint(f"{encoder}/model.safetensors")[0]]
    for source in (folder, table):
        output = str(tmp_path / f"encoder_{source.stem}")
        assert main(["pretrain", str(source), "--epochs", "1", "--output-dir", output]) == 0
        weights.append(load_checkpoint(f"{output}/model.safetensors")[0])
    for name, value in weights[0].items():
        for other in weights[1:]:
            torch.testing.assert_close(other[name], value, rtol=1e-3, atol=1e-3)


def test_pretrain_names_or_skips_a_file_that_is_no_structure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = []
    for i, length in enumerate((2.9, 3.1, 3.3)):
        iron = Structure(Lattice.cubic(length), ["Fe", "Al"], [[0, 0, 0], [0.5, 0.5, 0.5]])
        files.append(str(tmp_path / f"{i}.cif"))
        iron.to(files[-1])
    bad = tmp_path / "bad.cif"
    bad.write_text("data_x\n_cell_length_a 3\n")
    command = ["pretrain", *files, str(bad), "--epochs", "1", "--output-dir", str(tmp_path / "e")]
    for given in (command, ["pretrain", str(tmp_path), *command[5:]]):
        assert "bad.cif" in error_of(given, capsys)
        assert not (tmp_path / "e").exists()
        assert main([*given, "--on-error", "skip"]) == 0
        assert re.search("skipped .*bad.cif", capsys.readouterr().err)
        (tmp_path / "e" / "model.safetensors").unlink()
        (tmp_path / "e").rmdir()
    assert "bad.cif" in error_of(["pretrain", str(bad), *command[5:]], capsys)


def test_a_bad_row_is_named_or_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, output = tmp_path / "bad.csv", tmp_path / "out.csv"
    path.write_text("formula,note\nNaCl,a\nXx2O3,b\nNaN,c\n")
    command = ["embed", "--input", str(path), "--output", str(output)]
    message = error_of(command, capsys)
    assert "row 1" in message and "Xx2O3" in message
    assert not output.exists()
    assert main([*command, "--on-error", "skip"]) == 0
    frame = pd.read_csv(output, keep_default_na=False)
    assert frame["formula"].tolist() == ["NaCl", "NaN"]
    assert frame["note"].tolist() == ["a", "c"]


def test_names_that_read_as_formulas_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, output = tmp_path / "t.csv", tmp_path / "out.csv"
    path.write_text("formula\nYBCO\nCO\nBSCF\nYBa2Cu3O7\nYBCO\nKOH1\n")
    assert main(["embed", "--input", str(path), "--output", str(output)]) == 0
    said = "read letter by letter, each an element: YBCO, BSCF; if it is a name, write the formula"
    assert said in capsys.readouterr().err.splitlines()
    assert len(pd.read_csv(output)) == 6
    path.write_text("formula\nCO\nYBa2Cu3O7\n")
    assert main(["embed", "--input", str(path), "--output", str(output)]) == 0
    assert "letter by letter" not in capsys.readouterr().err


def test_a_bad_label_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bad.csv"
    path.write_text("formula,gap,metal\nNaCl,8.5,no\nKCl,large,no\nTiO2-x,~3,no\nMgO,7.8,no\n")
    folder = str(tmp_path / "model")
    command = ["train", "--input", str(path), "--epochs", "1", "--output-dir", folder]
    assert "row 2" in error_of([*command, "--target", "gap"], capsys)  # its formula
    path.write_text(path.read_text().replace("TiO2-x", "TiO2"))
    message = error_of([*command, "--target", "gap"], capsys)
    assert "row 1: gap is 'large', not a number" in message
    message = error_of([*command, "--target", "metal", "--task", "classification"], capsys)
    assert "row 0: metal is 'no', not a class: these are 0 and 1" in message
    path.write_text("formula,stable\nNaCl,1\nKF,0\nTiO2,True\nMgO,2\nCaO,\nZnO,1.0\n")
    command = [*command, "--target", "stable", "--task", "classification"]
    for folds in ([], ["--folds", "2"]):
        message = error_of([*command, *folds], capsys)
        assert "row 2: stable is 'True', not a class: these are 0 and 1" in message
    path.write_text(path.read_text().replace("True", "1"))
    message = error_of(command, capsys)
    assert "row 3: stable is '2', not a class: these are 0 and 1" in message
    assert main([*command, "--on-error", "skip"]) == 0
    assert "skipped row 3: stable is '2'" in capsys.readouterr().err
    path.write_text("formula,gap,metal\nNaCl,8.5,no\nKCl,large,no\nTiO2,~3,no\nMgO,7.8,no\n")
    command = ["train", "--input", str(path), "--epochs", "1", "--output-dir", folder]
    assert main([*command, "--target", "gap", "--on-error", "skip"]) == 0
    skipped = capsys.readouterr().err
    assert "skipped row 1: gap is 'large'" in skipped and "skipped row 2: gap is '~3'" in skipped


def test_labels_that_cannot_be_read_leave_those_beside_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, learned = tmp_path / "bad.csv", []
    path.write_text("formula,gap,size\nNaCl,8.5,1\nKCl,large,2\nLiF,x,\nMgO,,\nCaO,7.1,3\nZnO,3,\n")

    def trained(model: PolySRLModel, dataset: Any, *_: Any, **__: Any) -> None:
        learned.append((dataset.ids.tolist(), dataset.y.tolist(), dataset.w.tolist()))
        model.model.fitted.fill_(True)

    monkeypatch.setattr(PolySRLModel, "fit", trained)
    monkeypatch.setitem(LEAST_ROWS, "fine-tuned", 5)  # of six rows, four have a label
    command = ["train", "--input", str(path), "--target", "gap", "size", "--epochs", "1"]
    command += ["--output-dir", str(tmp_path / "model")]
    assert main([*command, "--on-error", "skip"]) == 0
    labels, weights = [[8.5, 1], [0, 2], [7.1, 3], [3, 0]], [[1, 1], [0, 1], [1, 1], [1, 0]]
    assert learned == [([0, 1, 4, 5], labels, weights)]
    *said, recipe = capsys.readouterr().err.splitlines()[:4]
    assert said == [
        "skipped the label in row 1: gap is 'large', not a number",
        "skipped row 2: gap is 'x', not a number",
        "rows without gap or size, left out: 1",
    ]
    assert recipe.startswith("recipe frozen: ")


def test_many_skipped_rows_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "bad.csv"
    monkeypatch.setattr(PolySRLModel, "fit", lambda model, *_, **__: model.model.fitted.fill_(True))
    command = ["train", "--input", str(path), "--target", "gap", "--epochs", "1"]
    command += ["--output-dir", str(tmp_path / "model"), "--on-error", "skip"]
    for n, total in ((10, 0), (11, 1)):
        rows = ["NaCl,8.5", *["NaCl-x,1"] * n, *["KCl,1%"] * n, ","]
        path.write_text("\n".join(["formula,gap", *rows]))
        assert main(command) == 0
        said = capsys.readouterr().err.splitlines()
        assert said.count(f"skipped {n} rows in all") == total
        assert said.count(f"skipped {n + 1} rows in all") == 1


def test_rows_without_a_group_are_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, written = tmp_path / "t.csv", tmp_path / "out.csv"
    frame = pd.DataFrame(
        {"formula": FORMULAS, "gap": range(len(FORMULAS)), "doi": list("abcd") * 3}
    )
    frame.loc[[1, 5], "doi"], frame.loc[5, "gap"] = "", np.nan
    frame["rare"] = np.where(frame.index == 1, 1.0, np.nan)
    frame.to_csv(path, index=False)
    command = ["train", "--input", str(path), "--epochs", "1", "--group", "doi", "--folds", "2"]
    command += ["--on-error", "skip", "--output-dir", str(tmp_path / "model"), "--target", "gap"]
    assert main([*command, "--predictions", str(written)]) == 0
    error = capsys.readouterr().err
    assert error.startswith("rows without gap, left out: 1\nskipped row 1: doi is ''")
    assert pd.read_csv(written)["gap"].tolist() == [0, 2, 3, 4, *range(6, 12)]
    message = error_of([*command, "rare"], capsys)
    assert message.endswith("the column 'rare' has no number in the rows with 'doi'")


def test_a_target_of_few_labels_leaves_the_others_calibrated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, folder = tmp_path / "t.csv", str(tmp_path / "model")
    formulas = [f"{metal}{n}Cl" for metal in ("Li", "Na", "K") for n in range(1, 9)]
    frame = pd.DataFrame({"formula": formulas, "gap": np.sin(np.arange(24.0))})
    frame["rare"] = frame["gap"].where(frame.index < 9)
    frame.to_csv(path, index=False)
    command = ["train", "--input", str(path), "--target", "rare", "gap", "--epochs", "1"]
    assert main([*command, "--folds", "2", "--output-dir", folder]) == 0
    error = capsys.readouterr().err
    assert (
        "std is calibrated on 24 held-out labels\nstd is not calibrated: 9 labels of rare" in error
    )
    calibration = PolySRLModel.from_pretrained(folder).calibration
    assert calibration is not None and calibration.uncalibrated == (0,)
    assert main(["predict", "--model", folder, "NaCl"]) == 0
    assert capsys.readouterr().err == "not calibrated and too small: std_rare\n"


def test_scores_are_printed_though_the_predictions_cannot_be_written(
    table: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(path: str, content: bytes) -> None:
        raise OSError(28, "No space left on device", f"{path}.tmp")

    monkeypatch.setattr("polysrl_dc.tables.write_atomic", full)
    command = ["train", "--input", str(table), "--column", "name", "--target", "gap", "--epochs"]
    command += ["1", "--hold-out", "0.5", "--output-dir", str(tmp_path / "model")]
    assert main([*command, "--predictions", str(tmp_path / "out.csv")]) == 2
    error = capsys.readouterr().err
    assert "mae_score of gap: " in error
    assert error.endswith("out.csv cannot be written: No space left on device\n")


def test_errors_of_training_name_the_column(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "t.csv"
    rows = [f"{formula},{i},{1e6 + 1e-4 * i}" for i, formula in enumerate(FORMULAS)]
    path.write_text("\n".join(["formula,gap,size", *rows]))
    command = ["train", "--input", str(path), "--target", "gap", "size", "--epochs", "1"]
    command += ["--output-dir", str(tmp_path / "model")]
    assert "error: the labels of size differ by" in error_of(command, capsys)
    message = error_of([*command, "--folds", "2"], capsys)
    assert "error: without fold 1 of 2: the labels of size differ by" in message


def test_rows_of_a_group_are_scored_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, folder = tmp_path / "t.csv", str(tmp_path / "model")
    sources = [f"doi {i % 5}" for i in range(len(FORMULAS))]
    frame = pd.DataFrame({"formula": FORMULAS, "gap": range(len(FORMULAS)), "doi": sources})
    frame.to_csv(path, index=False)
    command = ["train", "--input", str(path), "--target", "gap", "--epochs", "1"]
    command += ["--output-dir", folder, "--group", "doi"]
    learned, kind = [], cli._trained

    def trained(options: Any, names: Any, dataset: Any) -> Any:
        learned.append({sources[row] for row in dataset.ids.astype(int)})
        return kind(options, names, dataset)

    monkeypatch.setattr(cli, "_trained", trained)
    assert main([*command, "--folds", "5"]) == 0
    assert sorted(map(len, learned)) == [4] * 5 + [5]
    learned.clear()
    assert main([*command, "--hold-out", "0.4"]) == 0
    assert len(learned[0]) == 3
    assert "--group needs --folds or --hold-out" in error_of(command, capsys)
    message = error_of([*command, "--folds", "6"], capsys)
    assert "at least 2 and at most 5, the number of different groups by 'doi' and form" in message
    assert "no column 'source'" in error_of([*command[:-1], "source", "--folds", "5"], capsys)
    frame.assign(doi=["", *sources[1:]]).to_csv(path, index=False)
    folds = [*command, "--folds", "5"]
    assert "row 0: doi is '', which means that it is missing" in error_of(folds, capsys)
    assert "no column ''" in error_of([*command[:-1], "", "--folds", "5"], capsys)
    frame.assign(doi=["a", "NA", *sources[2:]]).to_csv(path, index=False)
    assert "row 1: doi is 'NA', which means that it is missing" in error_of(folds, capsys)
    for wrong in ({"by": 1}, ["a", "b"]):
        table = tmp_path / "t.json"
        frame.assign(doi=[wrong, *sources[1:]]).to_json(table, orient="records")
        message = error_of([*folds, "--input", str(table)], capsys)
        assert f"row 0: doi is {wrong}, not a name or number" in message


def test_a_model_is_not_trained_for_a_folder_called_like_a_shipped_encoder(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for command in (["train", "--input", str(table), "--target", "gap"], ["pretrain", "aflow"]):
        message = error_of([*command, "--output-dir", "graphcl-mp"], capsys)
        assert "graphcl-mp would be read as the shipped encoder" in message
    assert not Path("graphcl-mp").exists()


@pytest.mark.parametrize(
    ("name", "options", "part"),
    [
        ("embed", ["--output"], "--output {table} is the table that is read"),
        ("domain", ["--reference", "{table}", "--output"], "--output {table} is the table"),
        (
            "train",
            ["--target", "gap", "--hold-out", "0.5", "--predictions"],
            "--predictions {table}",
        ),
    ],
)
def test_what_is_read_is_not_written_over(
    name: str,
    options: list[str],
    part: str,
    table: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    given = table.read_bytes()
    command = [name, "--input", str(table), "--column", "name"]
    command += [option.format(table=table) for option in options]
    if name == "train":
        command[1:1] = ["--output-dir", "model"]
    assert part.format(table=table) in error_of([*command, str(table)], capsys)
    assert "is the table that is read" in error_of([*command, table.name], capsys)
    assert table.read_bytes() == given and not Path("model").exists()


@pytest.mark.parametrize("name", ["retrieve", "domain"])
def test_structures_that_are_read_are_not_written_over(
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "known" / "more"
    folder.mkdir(parents=True)
    table = folder / "a.parquet"
    table.write_bytes(b"structures")
    Path("link").symlink_to(folder.parent)
    command = [name, "NaCl", "--structures"]
    for source, output in (
        (str(table), "known/more/a.parquet"),
        ("known/more/a.parquet", str(table)),
        ("known", str(table)),
        ("known", "link/more/b.parquet"),  # the next run would read it
        ("link", "known/b.parquet"),
        ("a.json", "a.json"),
    ):
        for sources in ([source], ["b.cif", "--structures", source]):
            message = error_of([*command, *sources, "--output", output], capsys)
            assert message.endswith(f"--output {output} is among the structures that are read")
    for source, output in (("known", "known/b.csv"), ("known/more", "known/b.parquet")):
        message = error_of([*command, source, "--output", output], capsys)
        assert "is not a complete Parquet file" in message
    assert table.read_bytes() == b"structures"


@pytest.mark.parametrize(
    ("arguments", "taken"),
    [
        (["embed"], "polymorphism"),
        (["embed"], "embedding_199"),
        (["embed", "--model", "graphcl-mp"], "embedding_0"),
        (["retrieve", "--structures", "nowhere.parquet"], "rank"),
        (["retrieve", "--structures", "nowhere.parquet"], "probability"),
        (["domain", "--structures", "nowhere.parquet"], "outside"),
        (["domain", "--reference", "nowhere.csv"], "structures"),
    ],
)
def test_what_cannot_be_written_is_said_before_the_work(
    arguments: list[str],
    taken: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    embedding, embedded = PolySRLModel.predict_embedding, []

    def counted(model: PolySRLModel, dataset: Any) -> np.ndarray:
        embedded.append(len(dataset))
        return embedding(model, dataset)

    monkeypatch.setattr(PolySRLModel, "predict_embedding", counted)
    table, mixed = tmp_path / "t.csv", tmp_path / "mixed.json"
    table.write_text(f"formula,{taken}\nNaCl,1\nKCl,2\n")
    mixed.write_text('[{"formula": "NaCl", "n": 1}, {"formula": "KCl", "n": "x"}]')
    message = error_of([*arguments, "--input", str(table)], capsys)
    assert message.endswith(f"error: the table has a column {taken!r} already; rename it")
    output = str(tmp_path / "out.parquet")
    message = error_of([*arguments, "--input", str(mixed), "--output", output], capsys)
    assert "out.parquet cannot be written" in message
    assert max(embedded, default=0) <= 1


def test_a_model_that_does_not_suit_is_said_before_anything_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    PolySRLModel(n_tasks=1, pretrained=None).save(tmp_path / "model")
    for model in ("graphcl-mp", "polysrl-mp", str(tmp_path / "model")):
        message = error_of(["predict", "--input", "nowhere.csv", "--model", model], capsys)
        assert message.endswith(f"{model} is not fitted for predictions: use polysrl train")
    command = ["retrieve", "--input", "nowhere.csv", "--structures", "nowhere.parquet", "--model"]
    message = error_of([*command, "formation-energy-mp"], capsys)
    assert "error: the model is one of regression, without a structure encoder" in message
    PolySRLModel("pretraining").save(tmp_path / "new")
    message = error_of([*command, str(tmp_path / "new")], capsys)
    assert "error: nothing has trained the encoder of structures" in message


def test_the_folder_of_a_model_is_tried_before_training(
    table: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", "--input", str(table), "--column", "name", "--target", "gap"]
    weights = (trained / "model.safetensors").read_bytes()
    for folder, part in (
        ("", "no folder is named"),
        (f"{trained}/.", "holds the encoder"),
        *([("/proc/model", "/proc/model: ")] if Path("/proc").is_dir() else []),
    ):
        chosen = [*command, "--pretrained", str(trained), "--output-dir", folder]
        assert part in error_of(chosen, capsys)
    assert (trained / "model.safetensors").read_bytes() == weights
    assert "-1 is not an integer from 0 on" in error_of([*command, "--seed", "-1"], capsys)


def test_a_target_without_held_out_labels_loses_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, written = tmp_path / "rare.csv", tmp_path / "out.csv"
    labels = [str(i) if i < 9 else "" for i in range(len(FORMULAS))]
    frame = pd.DataFrame({"formula": FORMULAS, "gap": range(len(FORMULAS)), "rare": labels})
    for seed in range(20):  # until the held-out formulas have no label of the second
        graphs = StoichiometryGraphFeaturizer().featurize(FORMULAS)
        dataset = dc.data.NumpyDataset(graphs, ids=np.arange(len(FORMULAS)))
        splitter = StoichiometrySplitter()
        held_out = splitter.train_test_split(dataset, frac_train=0.9, seed=seed)[1].ids
        if len(held_out) and held_out.min() >= 9:
            break
    frame.to_csv(path, index=False)
    command = ["train", "--input", str(path), "--target", "gap", "--target", "rare"]
    command += ["--epochs", "1", "--hold-out", "0.1", "--seed", str(seed)]
    command += ["--predictions", str(written)]
    assert main([*command, "--output-dir", str(tmp_path / "model")]) == 0
    error = capsys.readouterr().err
    assert "mae_score of gap" in error and "mae_score of rare" not in error
    assert len(pd.read_csv(written)) == len(held_out)


def test_an_interruption_and_a_reader_that_leaves_end_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("polysrl_dc.cli.PolySRLModel.from_pretrained", interrupted)
    assert main(["embed", "NaCl"]) == 130
    assert capsys.readouterr().err == "polysrl embed: interrupted\n"
    command = [sys.executable, "-m", "polysrl_dc.cli", "embed", *FORMULAS * 40]
    code = "import sys; from polysrl_dc.cli import main; sys.exit(main(sys.argv[1:]))"
    command[1:3] = ["-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        error = process.stderr.read().decode()
    assert process.returncode == 1
    assert "Traceback" not in error and "Skipped loading" not in error


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["embed"], "give either formulas or --input"),
        (["embed", "NaCl", "--input", "x.csv"], "give either formulas or --input"),
        (["embed", "--input", "nowhere.csv"], "nowhere.csv"),
        (["embed", "Qq"], "Qq"),
        (["embed", "NaCl", "--model", "no_such_encoder"], "no_such_encoder"),
        (["embed", "NaCl", "--output", "out.xlsx"], ".parquet"),
        (["predict", "--model", "no_such_model", "NaCl"], "no_such_model"),
        (["pretrain", "no_such.cif", "--output-dir", "x"], "no_such.cif"),
        (["train", "--input", "x.csv", "--target", "y"], "--output-dir"),
    ],
)
def test_errors_are_one_clear_line(
    arguments: list[str], part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert part in error_of(arguments, capsys)


def test_a_missing_column_is_named(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = error_of(["embed", "--input", str(table)], capsys)
    assert "'formula'" in message and "name" in message


def test_help_shows_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for command in ("embed", "predict", "train", "pretrain"):
        assert f"polysrl {command} " in text


def test_help_says_what_each_column_means(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(train_command(tmp_path, 24, "--epochs", "1", "--folds", "2")) == 0
    model = ["--model", str(tmp_path / "model")]
    salt = Structure(Lattice.cubic(4), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])
    salt.to(f"{tmp_path}/NaCl.cif")
    salt.to(f"{tmp_path}/same.cif")
    files = ["--structures", f"{tmp_path}/NaCl.cif", f"{tmp_path}/same.cif"]
    for command in (
        ["embed", "NaCl"],
        ["predict", "NaCl", *model, "--interval", "0.9"],
        ["retrieve", "NaCl", *files],
        ["domain", "NaCl", *model],
    ):
        capsys.readouterr()
        assert main(command) == 0
        names = capsys.readouterr().out.splitlines()[0].split(",")[1:]
        with pytest.raises(SystemExit):
            main([command[0], "--help"])
        told = capsys.readouterr().out.partition("columns written:")[2].partition("examples:")[0]
        heads = {word for line in told.splitlines() for word in line[2:].split("  ")[0].split(", ")}
        assert set(names) - heads <= {f"embedding_{n}" for n in range(200)}


def test_help_says_that_ranks_are_not_of_energy(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["retrieve", "--help"])
    assert "not by energy: metastable as high as stable ones" in capsys.readouterr().out


def test_several_tables_of_structures_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["pretrain", "--output-dir", str(tmp_path / "m")]
    for paths in (["a.parquet", "b.parquet"], [str(tmp_path), "a.cif"]):
        message = error_of([*command, *paths], capsys)
        assert f"{paths[0]} is one of 2 sources: give one table or one folder alone" in message


def test_a_json_list_is_several_structures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("more").mkdir()
    salts: list[Any] = [
        Structure(Lattice.cubic(a), ["Cs", anion], [[0, 0, 0], [0.5, 0.5, 0.5]]).as_dict()
        for anion, a in (("Cl", 4.12), ("Br", 4.29), ("I", 4.56))
    ]
    lists = ["more/salts.json", "one.json"]
    for path, content in zip(lists, (salts, salts[:1]), strict=True):
        Path(path).write_text(json.dumps(content))
    names = [f"salts.json:{i}" for i in range(3)]
    for command in (["retrieve", "CsCl"], ["domain", "CsCl"]):
        column = "structure" if command[0] == "retrieve" else "structures"
        for files in (lists[:1], lists):
            alone = len(files) == 1
            options = ["--structures", *files, "--output", "found.csv"]
            assert main([*command, *options]) == 0
            found = ";".join(pd.read_csv("found.csv")[column]).split(";")
            beside = [f"more/{name}" for name in names] + ["one.json:0"]
            assert sorted(found) == (names if alone else beside)
    with pytest.raises(InvalidInputError, match="3 structures in one file"):
        PolymorphDataset(lists[0], progress=False)
    dataset = PolymorphDataset(json.loads(Path(lists[0]).read_text()), progress=False)
    assert dataset.formulas.tolist() == ["CsCl", "CsBr", "CsI"]
    train = ["--epochs", "1", "--batch-size", "3", "--output-dir", "encoder"]
    assert main(["pretrain", lists[0], *train]) == 0
    salts[1] = {"sites": []}
    Path("bad.json").write_text(json.dumps(salts))
    for files in (["bad.json"], ["bad.json", "one.json"]):
        options = ["--structures", *files]
        capsys.readouterr()
        assert "bad.json:1: not the dict of a structure" in error_of(
            ["retrieve", "CsCl", *options], capsys
        )
        assert main(["retrieve", "CsCl", *options, "--on-error", "skip"]) == 0
        found = capsys.readouterr()
        assert "bad.json:2" in found.out and "bad.json:1" not in found.out
    Path("none.json").write_text("[]")
    message = error_of(["retrieve", "CsCl", "--structures", "none.json"], capsys)
    assert "none.json cannot be read: ValueError('0 structures in one file')" in message


def test_retrieve_ranks_structures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = []
    for anion, length in [("Cl", 5.64), ("F", 4.63), ("I", 6.47)]:
        salt = Structure.from_spacegroup(
            "Fm-3m", Lattice.cubic(length), ["Na", anion], [[0, 0, 0], [0.5, 0.5, 0.5]]
        )
        files.append(f"{tmp_path}/Na{anion}.cif")
        salt.to(files[-1])
    asked = tmp_path / "asked.json"
    pd.DataFrame({"formula": ["NaCl", "NaF"], "note": [1, 2]}).to_json(asked)
    output = f"{tmp_path}/found.parquet"
    command = ["retrieve", "--input", str(asked), "--structures", *files, "--output", output]
    assert main(command) == 0
    frame = pd.read_parquet(output)
    assert frame["formula"].tolist() == ["NaCl"] * 3 + ["NaF"] * 3
    assert frame["note"].tolist() == [1] * 3 + [2] * 3
    assert frame["rank"].tolist() == [1, 2, 3] * 2
    assert set(frame["structure"]) == set(files)
    assert frame["structure_formula"].str.startswith("Na").all()
    assert frame.groupby("formula")["probability"].is_monotonic_decreasing.all()
    one_by_one = [part for name in files for part in ("--structures", name)]
    other = f"{tmp_path}/other.csv"
    assert main(["retrieve", "NaF", *one_by_one, "--output", other]) == 0
    alone, beside = pd.read_csv(other), frame[frame["formula"] == "NaF"].reset_index()
    assert alone["structure"].tolist() == beside["structure"].tolist()
    np.testing.assert_allclose(alone["probability"], beside["probability"], rtol=1e-5)
    assert "only 3 structures: fewer than -k 10" in capsys.readouterr().err.splitlines()
    assert main(["retrieve", "NaCl", "--structures", *files, "-k", "3"]) == 0
    found = capsys.readouterr()
    assert len(found.out.splitlines()) == 4 and "fewer than" not in found.err
    assert main(["domain", "NaCl", "--structures", *files, "-k", "1000"]) == 0
    assert "only 3 formulas: fewer than -k 1000" in capsys.readouterr().err.splitlines()
    assert main(["retrieve", "NaCl", "--structures", *files, "-k", "1"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    silica = Structure(Lattice.cubic(4), ["Si", "O", "O"], [[0, 0, 0], [0.2] * 3, [0.8] * 3])
    silica.to(tmp_path / "silica.cif")
    for formula, place in (("MgF2", 0), ("MgO", -1)):
        given = [formula, "--structures", f"{tmp_path}/silica.cif", *files, "--output", other]
        assert main(["retrieve", *given, "--same-proportions"]) == 0
        assert pd.read_csv(other)["structure_formula"].iloc[place] == "SiO2"
    line = error_of(["retrieve", "NaCl", "--structures", f"{tmp_path}/none.parquet"], capsys)
    assert "none.parquet" in line
