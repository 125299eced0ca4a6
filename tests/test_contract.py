"""What anyone may expect of an estimator, for every kind of model that there is."""

import functools
import inspect
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import deepchem as dc
import numpy as np
import pandas as pd
import pytest
from models import CONFIG, FORMULAS, MAE, SIGNAL, assert_same_state, data, make, state
from processes import crystals
from pymatgen.core import Composition
from sklearn.base import clone

import polysrl_dc
from polysrl_dc import InvalidInputError, checkpoints
from polysrl_dc.checkpoints import CheckpointError, load_checkpoint, save_checkpoint

KINDS = {
    "regression": {"learning_rate": 3e-3, "seed": 4},
    "several tasks": {"n_tasks": 3, "weight_decay": 0.01},
    "ensemble": {"n_ensemble": 2, "schedule": "constant"},
    "frozen": {"freeze_encoder": True, "n_ensemble": 2},
    "two frozen encoders": {"freeze_encoder": True, "pretrained": [None] * 2, "n_ensemble": 4},
    "autocast": {"autocast": True},
    "classification": {"task": "classification"},
    "several classes, ensemble": {"task": "classification", "n_tasks": 2, "n_ensemble": 2},
    "pretraining": {"task": "pretraining", "polymorphs_per_batch": 2, "max_edges": 2000},
    "infomax3d": {"task": "pretraining", "objective": "infomax3d"},
    "graphcl": {"task": "pretraining", "objective": "graphcl"},
}
PRETRAINING = {name for name, kwargs in KINDS.items() if kwargs.get("task") == "pretraining"}


@functools.cache
def dataset_of(name):
    if name in PRETRAINING:
        return crystals().select(range(12))
    y = np.stack([SIGNAL, 100 * SIGNAL, 7 - SIGNAL][: KINDS[name].get("n_tasks", 1)], axis=1)
    return data((y > y.mean(axis=0)).astype(float) if "class" in name else y)


def train(name, **kwargs):
    model = make(**{**KINDS[name], **kwargs})
    model.fit(dataset_of(name), nb_epoch=2)
    return model


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A fitted model of a kind, in its folder both as a model and as a checkpoint."""

    @functools.cache
    def of(name):
        model = train(name, model_dir=str(tmp_path_factory.mktemp("model")))
        model.save()
        return model

    return of


def answers(model, name):
    """Everything that a model says about its data."""
    dataset = dataset_of(name)
    found = {"embedding": model.predict_embedding(dataset)}
    if any(model.variance_trained):
        found["polymorphism"] = model.predict_polymorphism(dataset)
    if name in PRETRAINING:
        if name != "graphcl":
            rows, probabilities = model.retrieve(dataset, dataset, k=3)
            found |= {"rows": rows, "probabilities": probabilities}
        return found
    mean, std = model.predict_uncertainty(dataset)
    scores = model.evaluate(dataset, [MAE])
    return {
        **found,
        "prediction": model.predict(dataset),
        "mean": mean,
        "std": std,
        "score": np.array(scores["mae_score"]),
    }


def assert_same_answers(one, other):
    assert one.keys() == other.keys()
    for name, values in one.items():
        np.testing.assert_array_equal(values, other[name], err_msg=name)


@pytest.mark.parametrize("name", KINDS)
def test_the_same_seed_gives_the_same_model(name, trained):
    assert_same_state(state(trained(name)), state(train(name)))
    one, other = answers(trained(name), name), answers(train(name, seed=9), name)
    assert any(not np.array_equal(one[what], other[what]) for what in one)


@pytest.mark.parametrize("name", KINDS)
def test_questions_change_nothing(name, trained):
    model = trained(name)
    before, step = state(model), model.get_global_step()
    first = answers(model, name)
    assert all(np.isfinite(values).all() for values in first.values())
    assert_same_answers(first, answers(model, name))
    assert_same_state(before, state(model))
    assert model.get_global_step() == step > 0


NEW_PROCESS = """
import json, sys, warnings
from pathlib import Path
warnings.simplefilter("ignore")
sys.path[:0] = json.loads(sys.argv[1])
import numpy as np, polysrl_dc, torch
from test_contract import KINDS, answers, make
torch.set_num_threads(1)
for name, (folder, step) in json.loads(sys.argv[2]).items():
    saved = polysrl_dc.PolySRLModel.from_pretrained(folder)
    restored = make(**KINDS[name], model_dir=folder)
    restored.restore()
    assert restored.get_global_step() == step
    for how, model in {"saved": saved, "restored": restored}.items():
        np.savez(Path(folder) / f"{how}.npz", **answers(model, name))
"""


def test_a_new_process_says_the_same(trained):
    folders = {name: (trained(name).model_dir, trained(name).get_global_step()) for name in KINDS}
    root = Path(__file__).resolve().parents[1]
    paths = [str(root), str(root / "benchmarks"), str(root / "tests")]
    result = subprocess.run(
        [sys.executable, "-c", NEW_PROCESS, json.dumps(paths), json.dumps(folders)],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    for name, (folder, _) in folders.items():
        expected = answers(trained(name), name)
        for how in ("saved", "restored"):
            with np.load(Path(folder) / f"{how}.npz", allow_pickle=False) as found:
                assert_same_answers(expected, dict(found))


# ------------------------------------------------------------------------- clones


@pytest.mark.parametrize("name", KINDS)
def test_formulas_are_answered_as_their_graphs(name, trained):
    model = trained(name)
    graphs = dc.feat.StoichiometryGraphFeaturizer().featurize(FORMULAS)
    dataset = dc.data.NumpyDataset(graphs)
    questions = [model.predict_embedding]
    if any(model.variance_trained):
        questions.append(model.predict_polymorphism)
    if name not in PRETRAINING:
        questions += [model.predict, model.predict_uncertainty]
    elif name != "graphcl":
        questions.append(lambda given: model.retrieve(given, crystals(), k=2))
    compositions = [Composition(formula) for formula in FORMULAS]
    bad = {
        "row 1: .*'Qq'": ["NaCl", "Qq"],
        "row b: ": pd.Series({"b": "Qq"}),
        "no formula": [],
        "of type DataFrame": pd.DataFrame({"formula": FORMULAS}),
        "row 1: .*of type float": [graphs[0], 3.5],
    }
    for question in questions:
        for given in (FORMULAS, iter(FORMULAS), compositions, pd.Series(FORMULAS), graphs):
            np.testing.assert_equal(question(given), question(dataset))
        np.testing.assert_equal(question("NaCl"), question(["NaCl"]))
        np.testing.assert_equal(question({"Na": 1, "Cl": 1}), question(["NaCl"]))
        for text, given in bad.items():
            with pytest.raises(InvalidInputError, match=text):
                question(given)


@pytest.mark.parametrize("name", KINDS)
def test_a_clone_is_an_unfitted_model_of_the_same_arguments(name, trained):
    model = trained(name)
    before = state(model)
    copy = clone(model)
    given = model.get_params()
    assert given.keys() == inspect.signature(polysrl_dc.PolySRLModel).parameters.keys()
    assert copy.get_params() == given and KINDS[name].items() <= given.items()
    assert copy.settings == model.settings and copy.training == model.training
    assert copy.epochs_trained == 0 and copy is not model
    if name not in PRETRAINING:
        with pytest.raises(ValueError, match="not fitted"):
            copy.predict(data())
    copy.fit(dataset_of(name), nb_epoch=2, checkpoint_interval=0)
    assert_same_state(before, state(copy))
    assert_same_state(before, state(model))


def test_arguments_of_one_model_make_another():
    model = make(n_ensemble=2)
    other = polysrl_dc.PolySRLModel(**{**model.get_params(), "n_ensemble": 3})
    assert other.settings == {**model.settings, "n_ensemble": 3, "n_encoders": 3}
    schedule = dc.models.optimizers.ExponentialDecay(1e-2, 0.5, 4)
    assert clone(make(learning_rate=schedule)).get_params()["learning_rate"].initial_rate == 1e-2


def test_a_model_from_a_file_goes_on_with_the_arguments_it_was_trained_with(trained):
    model = trained("regression")
    again = polysrl_dc.PolySRLModel.from_pretrained(model.model_dir)
    assert again.training == model.training and again.training["learning_rate"] == 3e-3
    assert again.optimizer.learning_rate == 3e-3
    assert clone(again).training == model.training
    changed = polysrl_dc.PolySRLModel.from_pretrained(model.model_dir, learning_rate=1e-4)
    assert changed.optimizer.learning_rate == 1e-4


def test_a_model_from_a_file_warns_when_it_trains_without_its_schedule(tmp_path, caplog):
    schedule = dc.models.optimizers.ExponentialDecay(1e-2, 0.5, 4)
    make(learning_rate=schedule).save(tmp_path)
    for rate in ({}, {"learning_rate": schedule}, {"learning_rate": 1e-2}):
        caplog.clear()
        model = polysrl_dc.PolySRLModel.from_pretrained(tmp_path, **rate)
        assert not caplog.records
        model.fit(dataset_of("regression"), nb_epoch=1, checkpoint_interval=0)
        assert bool(caplog.records) != bool(rate)
        assert all("the learning rate is 0.001" in record.message for record in caplog.records)


# ----------------------------------------------------- other versions, other settings


def readers(model, folder):
    """All that read a file of a model."""
    return {
        "model.safetensors": [
            lambda: polysrl_dc.PolySRLModel.from_pretrained(folder),
            lambda: make(pretrained=folder),
            lambda: make(model_dir=str(folder)).reload(),
        ],
        "checkpoint1.safetensors": [lambda: make(model_dir=str(folder)).restore()],
    }


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("version", "version 0 of polysrl-dc-checkpoint; this program reads 1"),
        ("missing", r"configuration lacks \['message_power'\]|message_power is None"),
        ("unknown", r"unknown \['old_field'\]|old_field is 1, this model has None"),
    ],
)
def test_files_of_other_versions_are_refused_with_the_reason(
    change, reason, trained, tmp_path, monkeypatch
):
    shutil.copytree(trained("regression").model_dir, tmp_path, dirs_exist_ok=True)
    for name, reads in readers(make(), tmp_path).items():
        tensors, manifest = load_checkpoint(tmp_path / name)
        with monkeypatch.context() as patch:
            if change == "version":
                patch.setattr(checkpoints, "VERSION", 0)
            elif change == "missing":
                del manifest["config"]["message_power"]
            else:
                manifest["config"]["old_field"] = 1
            save_checkpoint(tmp_path / name, tensors, manifest)
        for read in reads[: 1 if change == "unknown" else None]:
            with pytest.raises(CheckpointError, match=reason) as caught:
                read()
            assert name in str(caught.value) and "\n" not in str(caught.value)


def test_files_that_did_not_keep_the_learning_rate_are_read(trained, tmp_path):
    shutil.copytree(trained("regression").model_dir, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "model.safetensors"
    tensors, manifest = load_checkpoint(path)
    del manifest["training"]["learning_rate"], manifest["provenance"]
    save_checkpoint(path, tensors, manifest)
    model = polysrl_dc.PolySRLModel.from_pretrained(tmp_path)
    assert_same_state(state(model), state(trained("regression")))
    assert model.training["learning_rate"] == 1e-3


def test_weights_of_a_model_that_computes_something_else_are_refused(trained):
    folder = trained("regression").model_dir
    for change in ({"message_power": 0.0}, {"set2set_steps": 3}, {"head_scale": 1.0}):
        other = make(config=replace(CONFIG, **change), model_dir=folder)
        for read in (other.restore, other.reload):
            with pytest.raises(CheckpointError, match=next(iter(change))):
                read()


# ------------------------------------------------------------------------ precision


def losses(name, **kwargs):
    """Loss of every step of four epochs."""
    found: list[float] = []
    model = make(**{**KINDS[name], "log_frequency": 1, **kwargs})
    model.fit(dataset_of(name), nb_epoch=4, checkpoint_interval=0, all_losses=found)
    return np.array(found)


@pytest.mark.parametrize("name", KINDS)
def test_bfloat16_agrees_within_its_precision(name):
    whole, half = losses(name, autocast=False), losses(name, autocast=True)
    assert not np.array_equal(whole, half)
    # bfloat16 has steps of 0.4 %; NT-Xent divides cosines by a temperature of 0.1
    first, later = (0.1, 0.5) if name in ("infomax3d", "graphcl") else (0.01, 0.25)
    np.testing.assert_allclose(half[0], whole[0], rtol=first)
    np.testing.assert_allclose(half[1:3], whole[1:3], rtol=0, atol=later * np.abs(whole).mean())
    if name != "pretraining":  # each step amplifies, in this one as far as the processor decides
        np.testing.assert_allclose(half.mean(), whole.mean(), rtol=later)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_training_agrees_and_its_file_is_read_without_compiling(deep, tmp_path):
    if not deep:
        pytest.skip("compiling takes a minute: --deep")
    whole, found = losses("pretraining"), []
    model = make(**KINDS["pretraining"], compile=True, log_frequency=1)
    model.fit(dataset_of("pretraining"), nb_epoch=4, checkpoint_interval=0, all_losses=found)
    np.testing.assert_allclose(found[:4], whole[:4], rtol=0.005)  # later ones amplify rounding
    model.save(tmp_path)
    again = polysrl_dc.PolySRLModel.from_pretrained(tmp_path)
    assert not again.get_params()["compile"]
    assert_same_state(state(model), state(again))
    one, other = answers(model, "pretraining"), answers(again, "pretraining")
    np.testing.assert_array_equal(one["embedding"], other["embedding"])
    np.testing.assert_allclose(one["probabilities"], other["probabilities"], rtol=1e-3)
