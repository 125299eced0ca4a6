"""The shipped encoder, its card, and the runners that make it."""

import re
from dataclasses import replace
from pathlib import Path

import deepchem as dc
import numpy as np
import pandas as pd
import pytest
import search
import ship_encoder
import torch
from targets import wetlab_targets

import polysrl_dc
from polysrl_dc.checkpoints import DEFAULT_ENCODER, SHIPPED, load_checkpoint, shipped_encoders
from polysrl_dc.losses import effective_rank

FORMULAS = ["NaCl", "TiO2", "SiO2", "GaAs", "Bi2Te3", "Fe2O3", "CaTiO3", "ZrC"]


def dataset(formulas=FORMULAS):
    return dc.data.NumpyDataset(dc.feat.StoichiometryGraphFeaturizer()(formulas))


def test_models_start_from_the_shipped_encoder():
    assert DEFAULT_ENCODER in shipped_encoders()
    model = dc.models.PolySRLModel(n_ensemble=2)
    shipped = load_checkpoint(SHIPPED / f"{DEFAULT_ENCODER}.formulas.safetensors")[0]
    for encoder in model.model.encoders:
        for name, value in encoder.state_dict().items():
            assert torch.equal(value, shipped[f"encoders.0.{name}"]), name
    embedding = dc.models.PolySRLModel().predict_embedding(dataset())
    random = dc.models.PolySRLModel(pretrained=None)
    assert not np.allclose(embedding, random.predict_embedding(dataset()))
    pretraining = dc.models.PolySRLModel("pretraining")  # itself starts from random weights
    assert not np.allclose(embedding, pretraining.predict_embedding(dataset()))


def test_by_name_it_is_a_pretraining_model_with_both_encoders():
    model = dc.models.PolySRLModel.from_pretrained(DEFAULT_ENCODER)
    assert model.settings["task"] == "pretraining"
    assert np.allclose(
        model.predict_embedding(dataset()),
        dc.models.PolySRLModel().predict_embedding(dataset()),
        atol=1e-6,
    )
    crystals = polysrl_dc.PolymorphDataset("aflow", progress=False).select(range(16))
    with torch.no_grad():
        structures = model.model.structure_encoder(crystals.batch(np.arange(16))[1])
    assert torch.isfinite(structures).all()
    assert {"objective", "data", "epochs", "seed", "revision"} <= model.provenance.keys()


def test_other_configurations_must_say_what_they_start_from():
    small = replace(polysrl_dc.PolySRLConfig.named("default"), n_features=16)
    with pytest.raises(ValueError, match="pretrained=None"):
        dc.models.PolySRLModel(config=small)
    dc.models.PolySRLModel(config=small, pretrained=None)


def test_the_shipped_encoders_are_known():
    assert shipped_encoders() == ["formation-energy-mp", "graphcl-mp", DEFAULT_ENCODER]


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.safetensors")), ids=lambda path: path.name)
def test_files_are_small_and_say_where_they_come_from(path):
    assert path.stat().st_size < 10e6
    data = load_checkpoint(path)[1]["provenance"]["data"]
    card = (SHIPPED / f"{path.name.partition('.')[0]}.md").read_text()
    assert f"{data['rows']:,}" in card and data["rows"] > 90_000 and "CC BY 4.0" in card
    if "labels" in data:
        assert data["labels"] == "matbench_mp_e_form" and "fair" in card
    else:
        assert re.fullmatch("[0-9a-f]{64}", data["sha256"]) and data["sha256"] in card


@pytest.mark.parametrize("name", ["formation-energy-mp", "graphcl-mp"])
def test_companions_are_property_models_by_their_names(name):
    model = dc.models.PolySRLModel.from_pretrained(name)
    start = dc.models.PolySRLModel(pretrained=name)
    np.testing.assert_array_equal(
        model.predict_embedding(dataset()), start.predict_embedding(dataset())
    )
    if name == "graphcl-mp":
        with pytest.raises(ValueError, match="not fitted"):
            model.predict(dataset())
    else:  # computed formation energies per atom: of the ionic ones far below those of the others
        energies = model.predict(dataset())[:, 0]
        order = [FORMULAS[i] for i in np.argsort(energies)]
        assert set(order[-2:]) == {"GaAs", "Bi2Te3"} and energies.min() > -5 and energies.max() < 0
    with pytest.raises(ValueError, match="without a structure encoder"):
        model.retrieve(dataset(), dataset())


def test_members_start_from_all_shipped_encoders():
    model = dc.models.PolySRLModel(pretrained=shipped_encoders(), freeze_encoder=True)
    for i, name in enumerate(shipped_encoders()):
        tensors = load_checkpoint(SHIPPED / f"{name}.formulas.safetensors")[0]
        for key, value in model.model.encoders[i].state_dict().items():
            assert torch.equal(value, tensors[f"encoders.0.{key}"]), (name, key)
    of_one = dc.models.PolySRLModel.from_pretrained(DEFAULT_ENCODER)
    assert model.variance_trained == [name == DEFAULT_ENCODER for name in shipped_encoders()]
    polymorphism = [each.predict_polymorphism(dataset()) for each in (model, of_one)]
    np.testing.assert_allclose(*polymorphism, rtol=1e-5)


def test_its_means_fill_the_space_of_real_formulas(data_dir: Path):
    formulas = wetlab_targets(data_dir)[0].formulas
    means = dc.models.PolySRLModel().predict_embedding(dataset(formulas))
    assert effective_rank(torch.from_numpy(means)) >= 20


def test_a_damaged_encoder_is_refused_by_its_name(tmp_path: Path, monkeypatch):
    name = f"{DEFAULT_ENCODER}.formulas.safetensors"
    content = bytearray((SHIPPED / name).read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / name).write_bytes(content)
    monkeypatch.setattr(polysrl_dc.checkpoints, "SHIPPED", tmp_path)
    with pytest.raises(polysrl_dc.checkpoints.CheckpointError, match=name):
        dc.models.PolySRLModel()


def test_the_card_holds_what_was_measured(tmp_path: Path, monkeypatch):
    run = tmp_path / "run"
    model = dc.models.PolySRLModel("pretraining")
    model.provenance = {
        "objective": "polysrl",
        "data": {
            "structures": "s.parquet",
            "sha256": "0" * 64,
            "rows": 7,
            "stoichiometries": 6,
            "held_out_stoichiometries": 5,
        },
        "element_features": "Matscholar",
        "epochs": 3,
        "batch_size": 4,
        "learning_rate": 1e-3,
        "schedule": "one_cycle",
        "seed": 0,
        "revision": "abc",
        "final_whitening": 0.7,
        "diagnostics": {
            "retrieval@1": 0.71,
            "retrieval@10": 0.9,
            "rank_formulas": 41.0,
            "mean_sigma": 0.02,
        },
    }
    model.save(run)
    keys = {"suite": "wetlab", "protocol": "representation", "metric": "mae", "task": "band_gap"}
    scores = [
        {**keys, "model": name, "seed": 0, "fold": fold, "value": value + fold}
        for name, value in (("rand_init", 2.0), ("mine", 1.5))
        for fold in range(2)
    ]
    pd.DataFrame(scores).to_csv(tmp_path / "wetlab_scores.csv")
    monkeypatch.setattr(ship_encoder, "SHIPPED", tmp_path / "encoders")
    monkeypatch.setattr(ship_encoder, "HERE", tmp_path)
    ship_encoder.main([str(run), "--model", "mine"])
    card = (tmp_path / "encoders" / f"{DEFAULT_ENCODER}.md").read_text()
    said_there = ("71.0%", "of the means 41.0", "-0.5", "`whitening`: 0.5", "power 0.7")
    for said in said_there:
        assert said.lower() in card.lower(), said
    parts = [
        load_checkpoint(tmp_path / "encoders" / f"{DEFAULT_ENCODER}.{part}.safetensors")[0]
        for part in ("formulas", "structures")
    ]
    assert parts[0].keys() | parts[1].keys() == model.model.state_dict().keys()
    assert not parts[0].keys() & parts[1].keys()


@pytest.mark.parametrize("objective", ["graphcl", "mp_formation_energy", "infomax3d"])
def test_a_companion_is_one_file_with_a_card_of_its_own(objective, tmp_path: Path, monkeypatch):
    run = tmp_path / "run"
    labels = objective == "mp_formation_energy"
    model = dc.models.PolySRLModel(
        "regression" if labels else "pretraining",
        pretrained=None,
        **({} if labels else {"objective": objective}),
    )
    of_structures = {"structures": "s", "sha256": "0" * 64, "stoichiometries": 6}
    model.provenance = {
        **{"objective": objective, "element_features": "Matscholar", "epochs": 3, "seed": 0},
        **{"batch_size": 4, "learning_rate": 1e-3, "schedule": "one_cycle", "revision": None},
        "final_whitening": None,
        "diagnostics": {"retrieval@1": 0.7, "retrieval@10": 0.9, "rank_formulas": 41.0},
        "data": {"rows": 7, "labels": "matbench_mp_e_form"}
        if labels
        else {"rows": 7, "held_out_stoichiometries": 5, **of_structures},
    }
    model.save(run)
    pd.DataFrame(
        {
            **{"suite": "wetlab", "protocol": "representation", "metric": "mae", "seed": 0},
            **{"task": "band_gap", "model": ["rand_init", "mine"] * 2, "fold": [0, 0, 1, 1]},
            "value": [2.0, 1.5, 3.0, 2.5],
        }
    ).to_csv(tmp_path / "scores.csv")
    monkeypatch.setattr(ship_encoder, "SHIPPED", tmp_path / "none")
    command = ["--model", "mine", "--name", "other", "--scores", str(tmp_path / "scores.csv")]
    command += ["--folder", str(tmp_path / "encoders"), "--formulas-only"]
    ship_encoder.main([str(run), *command])
    written = {path.name for path in (tmp_path / "encoders").iterdir()}
    assert written == {"other.md", "other.formulas.safetensors"}
    card = (tmp_path / "encoders" / "other.md").read_text()
    for said in ("# other", "-0.5", "revision not recorded", "`predict_polymorphism` has no"):
        assert said in card
    path = tmp_path / "encoders" / "other.formulas.safetensors"
    shipped = dc.models.PolySRLModel.from_pretrained(path)
    assert shipped.settings["task"] == "regression" and shipped.provenance == model.provenance
    assert shipped.variance_trained == [False]
    np.testing.assert_allclose(
        shipped.predict_embedding(dataset()), model.predict_embedding(dataset()), atol=1e-6
    )


def test_the_search_compares_errors_over_the_folds(tmp_path: Path, monkeypatch, capsys):
    rows = [
        {"row": row, "task": "band_gap", "seed": 0, "fold": fold, "metric": "mae", "value": value}
        for row, folds in (("default", [1, 2, 3, 4, 5]), ("sum pooling", [3.3, 2, 3, 4, 4.2]))
        for fold, value in enumerate(folds)
    ]
    rows += [
        {"row": row, "metric": "retrieval@1", "value": 0.5} for row in ("default", "sum pooling")
    ]
    lines = search.table(pd.DataFrame(rows))
    assert list(lines.index) == ["default", "sum pooling"]
    assert lines["mean change, %"].round(6).tolist() == [0.0, 10.0]
    monkeypatch.setenv("POLYSRL_DATA", str(tmp_path))
    search.main(["--dry-run", "--output-dir", str(tmp_path)])
    assert capsys.readouterr().out.count("\n") == len(search.ROWS)
    assert not list(tmp_path.iterdir())
    with pytest.raises(SystemExit):
        search.main(["--seed", "1", "--dry-run", "--output-dir", str(tmp_path)])
    assert "unrecognized arguments: --seed 1" in capsys.readouterr().err
