"""``PolySRLModel`` on disk and over time: files, checkpoints, callbacks, pretraining."""

import copy
import gc
import io
import pickle
from dataclasses import replace
from pathlib import Path

import deepchem as dc
import numpy as np
import pytest
import torch
from models import CONFIG, MAE, SIGNAL, N, assert_same_state, data, fitted, make, state
from processes import crystals as prototypes

from polysrl_dc.checkpoints import CheckpointError, load_checkpoint, save_checkpoint
from polysrl_dc.errors import InvalidInputError

# ---------------------------------------------------------------------- files


@pytest.mark.parametrize("kwargs", [{}, {"task": "classification"}, {"freeze_encoder": True}])
def test_save_and_from_pretrained(kwargs, tmp_path):
    labels = (SIGNAL > 0).astype(float)
    model = fitted(dataset=data(labels), **kwargs)
    model.save(tmp_path)
    again = dc.models.PolySRLModel.from_pretrained(tmp_path)
    assert_same_state(state(model), state(again))
    assert again.config == model.config and again.settings == model.settings
    np.testing.assert_array_equal(model.predict(data()), again.predict(data()))
    again.fit(data(labels), nb_epoch=1)
    with pytest.raises(ValueError, match="path is empty"):
        model.save("")
    with pytest.raises(ValueError, match="n_tasks"):
        dc.models.PolySRLModel.from_pretrained(tmp_path, n_tasks=2)
    with pytest.raises(TypeError, match="dropout"):
        dc.models.PolySRLModel.from_pretrained(tmp_path, dropout=2)


def test_a_folder_called_like_a_shipped_encoder_is_told_from_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = fitted()
    given = [("graphcl-mp", model), (Path("graphcl-mp"), model)]
    for path, written in [*given, (None, fitted(model_dir="graphcl-mp"))]:
        with pytest.raises(ValueError, match=r'^graphcl-mp would .* text "\./graphcl-mp", or'):
            written.save(path)
    for path in ("./graphcl-mp", tmp_path / "graphcl-mp"):
        model.save(path)
        assert_same_state(state(model), state(dc.models.PolySRLModel.from_pretrained(path)))


def test_provenance_is_kept_in_the_file(tmp_path):
    model = fitted()
    assert model.provenance == {}
    model.provenance = {"data": {"rows": 36, "excluded": None}, "seed": 0}
    model.save(tmp_path)
    again = dc.models.PolySRLModel.from_pretrained(tmp_path)
    assert again.provenance == model.provenance
    assert fitted().provenance == {}  # not one for all models
    tensors, manifest = load_checkpoint(tmp_path / "model.safetensors")
    del manifest["provenance"]  # as files had it before
    save_checkpoint(tmp_path / "model.safetensors", tensors, manifest)
    assert dc.models.PolySRLModel.from_pretrained(tmp_path).provenance == {}


def test_provenance_comes_back_with_the_weights(tmp_path):
    model = make(model_dir=str(tmp_path))
    model.provenance = {"data": "gaps"}
    model.fit(data(), nb_epoch=1)
    model.save()
    for name in ("reload", "restore"):
        again = make(model_dir=str(tmp_path))
        getattr(again, name)()
        assert again.provenance == {"data": "gaps"}


def test_which_variances_were_trained_is_kept_in_the_file(tmp_path):
    encoder = make("pretraining")
    assert encoder.variance_trained == [False]
    encoder.fit(prototypes(), nb_epoch=1)
    encoder.save(tmp_path / "encoder")
    model = make(pretrained=[None, tmp_path / "encoder"], model_dir=str(tmp_path))
    model.fit(data(), nb_epoch=1)
    model.save()
    expected = model.predict_polymorphism(data())
    read = [dc.models.PolySRLModel.from_pretrained(tmp_path)]
    for name in ("reload", "restore"):
        read.append(make(n_ensemble=2, model_dir=str(tmp_path)))
        getattr(read[-1], name)()
    for again in read:
        assert again.variance_trained == [False, True]
        np.testing.assert_array_equal(again.predict_polymorphism(data()), expected)


@pytest.mark.parametrize(
    ("provenance", "trained"),
    [
        *(({}, False), ({"objective": "polysrl"}, True), ({"objective": "graphcl"}, False)),
        ({"objective": "without_sampling", "variance": {"n_steps": 2000}}, True),
    ],
    ids=str,
)
def test_of_files_that_do_not_say_it_the_provenance_does(provenance, trained, tmp_path):
    fitted().save(tmp_path)
    tensors, manifest = load_checkpoint(tmp_path / "model.safetensors")
    del manifest["variance_trained"]  # as files were before
    manifest["provenance"] = provenance
    save_checkpoint(tmp_path / "model.safetensors", tensors, manifest)
    assert dc.models.PolySRLModel.from_pretrained(tmp_path).variance_trained == [trained]
    assert make(pretrained=tmp_path).variance_trained == [trained]
    for wrong in ([], [1], [True, True], None, "True"):
        manifest["variance_trained"] = wrong
        save_checkpoint(tmp_path / "model.safetensors", tensors, manifest)
        with pytest.raises(CheckpointError, match=r"model\.safetensors"):
            dc.models.PolySRLModel.from_pretrained(tmp_path)


def test_steps_and_epochs_are_counted_on(tmp_path):
    assert make().get_global_step() == 0
    fitted().save(tmp_path)
    for steps, epochs in ((10, 2), (15, 3)):
        again = dc.models.PolySRLModel.from_pretrained(tmp_path)
        again.save(tmp_path)
        _, manifest = load_checkpoint(tmp_path / "model.safetensors")
        assert (again.get_global_step(), again.epochs_trained) == (steps, epochs)
        assert (manifest["step"], manifest["epoch"]) == (steps, epochs)
        again.fit(data(), nb_epoch=1, checkpoint_interval=0)
        again.save(tmp_path)
    assert make(pretrained=tmp_path).epochs_trained == 0  # a training of its own


@pytest.mark.parametrize("change", [{"step": -1}, {"epoch": "3"}, {"epoch": None}], ids=str)
def test_steps_and_epochs_that_are_none_are_refused(change, tmp_path):
    fitted().save(tmp_path)
    tensors, manifest = load_checkpoint(tmp_path / "model.safetensors")
    save_checkpoint(tmp_path / "model.safetensors", tensors, manifest | change)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: step .*, epoch "):
        dc.models.PolySRLModel.from_pretrained(tmp_path)


def test_a_file_of_several_encoders_is_no_start(tmp_path):
    fitted(n_ensemble=3).save(tmp_path)
    for start in (lambda: make(pretrained=tmp_path), lambda: make().load_encoder(tmp_path)):
        with pytest.raises(CheckpointError, match=r"model\.safetensors has 3 encoders"):
            start()


@pytest.mark.parametrize("frozen", [False, True])
def test_files_that_do_not_say_how_many_encoders_there_are(frozen, tmp_path):
    model = fitted(model_dir=str(tmp_path), n_ensemble=2, freeze_encoder=frozen)
    model.save()
    tensors, manifest = load_checkpoint(tmp_path / "model.safetensors")
    del manifest["settings"]["n_encoders"]  # as files were before
    save_checkpoint(tmp_path / "model.safetensors", tensors, manifest)
    model.reload()
    again = dc.models.PolySRLModel.from_pretrained(tmp_path)
    assert_same_state(state(model), state(again))
    assert again.settings == model.settings


def test_reload_reads_the_saved_model_back(tmp_path):
    model = fitted(model_dir=str(tmp_path))
    model.save()
    saved = state(model)
    model.fit(data(), nb_epoch=1, checkpoint_interval=0)
    model.reload()
    assert_same_state(saved, state(model))
    assert (model.get_global_step(), model.epochs_trained) == (10, 2)
    again = dc.models.PolySRLModel.from_pretrained(tmp_path)
    for each in (model, again):
        each.fit(data(), nb_epoch=1, checkpoint_interval=0)
        assert (each.get_global_step(), each.epochs_trained) == (15, 3)
    assert_same_state(state(model), state(again))


def test_a_reloaded_model_is_saved_with_its_position(tmp_path):
    fitted(model_dir=str(tmp_path)).save()
    other = make(model_dir=str(tmp_path))
    other.reload()
    other.save()
    manifest = load_checkpoint(tmp_path / "model.safetensors")[1]
    assert (manifest["step"], manifest["epoch"]) == (10, 2)


def test_restore_brings_back_weights_buffers_and_step(tmp_path):
    model = make(model_dir=str(tmp_path))
    model.fit(data(9 + SIGNAL), nb_epoch=2)
    saved, step = state(model), model.get_global_step()
    model.fit(data(), nb_epoch=1, checkpoint_interval=0)
    model.restore()
    assert_same_state(saved, state(model))
    assert model.get_global_step() == step == 10
    other = make(model_dir=str(tmp_path), seed=9)
    other.restore()
    assert_same_state(saved, state(other))
    np.testing.assert_array_equal(model.predict(data()), other.predict(data()))


def test_an_interrupted_fit_continues_as_if_nothing_had_happened(tmp_path):
    whole = make(schedule="constant")
    whole.fit(data(), nb_epoch=4)
    first = make(schedule="constant", model_dir=str(tmp_path))
    first.fit(data(), nb_epoch=2)
    second = make(schedule="constant", model_dir=str(tmp_path))
    second.fit(data(), nb_epoch=2, restore=True)
    assert second.get_global_step() == whole.get_global_step() == 20
    assert_same_state(state(whole), state(second))


def test_a_deepchem_learning_rate_schedule_continues_after_restore(tmp_path):
    def decay():
        return dc.models.optimizers.ExponentialDecay(1e-2, 0.5, 4, staircase=False)

    whole = make(learning_rate=decay())
    whole.fit(data(), nb_epoch=4)
    make(learning_rate=decay(), model_dir=str(tmp_path)).fit(data(), nb_epoch=2)
    second = make(learning_rate=decay(), model_dir=str(tmp_path))
    second.fit(data(), nb_epoch=2, restore=True)
    assert second._pytorch_optimizer.param_groups[0]["lr"] == pytest.approx(1e-2 * 0.5**5)
    assert_same_state(state(whole), state(second))


def test_an_interruption_does_not_change_the_learning_rate_of_the_next_fit(tmp_path):
    def interrupt(model, step):
        raise KeyboardInterrupt

    def peak(model):
        rates = []
        model.fit(data(), nb_epoch=4, callbacks=lambda m, _: rates.append(
            m._pytorch_optimizer.param_groups[0]["lr"]))  # fmt: skip
        return max(rates)

    model = make(model_dir=str(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        model.fit(data(), nb_epoch=4, callbacks=interrupt)
    assert peak(model) == pytest.approx(peak(make())) == pytest.approx(1e-2, rel=0.2)


def test_a_copy_has_a_temporary_folder_of_its_own():
    model = make()
    model.fit(data(), nb_epoch=1)
    trained, place = state(model), Path(model.model_dir)
    for copied in (copy.deepcopy, lambda given: pickle.loads(pickle.dumps(given))):
        made = copied(model)
        assert made.model_dir != model.model_dir and not made.get_checkpoints()
        made.fit(data(50 * data().y), nb_epoch=1)
        folder = Path(made.model_dir)
        del made
        gc.collect()
        assert place.is_dir() and not folder.exists()
    model.restore()
    assert_same_state(trained, state(model))


def test_a_copy_keeps_a_folder_that_was_given(tmp_path):
    model = make(model_dir=str(tmp_path))
    assert copy.deepcopy(model).model_dir == str(tmp_path)


def test_a_copy_of_a_model_on_a_gpu_is_on_the_cpu_where_there_is_none(monkeypatch):
    def empty(*args, **kwargs):
        if kwargs.get("device") == torch.device("cuda"):
            raise RuntimeError("No CUDA GPUs are available")
        return made_by_torch(*args, **kwargs)

    made_by_torch = torch.empty
    monkeypatch.setattr(torch, "empty", empty)
    model, plain = fitted(), fitted()
    model.device = torch.device("cuda")  # in a test its tensors are not
    made = pickle.loads(pickle.dumps(model))
    assert made.device == torch.device("cpu") and model.device == torch.device("cuda")
    for one in (made, plain):
        one.fit(data(), nb_epoch=1, checkpoint_interval=0)
    assert_same_state(state(made), state(plain))


def test_what_is_pickled_of_a_model_on_a_gpu_is_moved_and_the_model_is_not():
    model = fitted()
    model.device = torch.device("cuda")
    given, network = model.__getstate__(), model.model
    assert given["device"] == torch.device("cuda")
    assert not {*map(id, network.parameters())} & {*map(id, given["model"].parameters())}
    groups = given["_pytorch_optimizer"].param_groups
    learning = {id(parameter) for group in groups for parameter in group["params"]}
    assert learning == {*map(id, given["model"].parameters())}
    given["model"].double()  # as good as another device: the state of the optimizer follows
    made, other = (object.__new__(type(model)) for _ in range(2))
    made.__setstate__({**given, "device": torch.device("cpu")})
    entries = made._pytorch_optimizer.state.values()
    assert {entry["exp_avg"].dtype for entry in entries} == {torch.float64}
    other.__setstate__({**make().__getstate__(), "device": torch.device("meta")})
    assert {value.device.type for value in state(other).values()} == {"meta"}


def test_losses_are_not_pickled(crystals):
    model, _ = pretrain(crystals, nb_epoch=1)
    assert model.model.parts and not pickle.loads(pickle.dumps(model)).model.parts


def test_restoring_without_a_checkpoint_is_refused(tmp_path):
    model = make(model_dir=str(tmp_path / "empty"))
    for use in (model.restore, lambda: model.fit(data(), restore=True)):
        with pytest.raises(ValueError, match="no checkpoint"):
            use()
    with pytest.raises(ValueError, match="strict"):
        model.restore(strict=False)


def test_checkpoints_rotate(tmp_path):
    model = make(model_dir=str(tmp_path))
    states = []
    for _ in range(4):
        model.fit(data(), nb_epoch=1, max_checkpoints_to_keep=3)
        states.append(state(model))
    paths = model.get_checkpoints()
    assert [path[len(str(tmp_path)) + 1 :] for path in paths] == [
        f"checkpoint{i}.safetensors" for i in (1, 2, 3)
    ]
    for path, expected in zip(paths, reversed(states), strict=False):
        model.restore(path)
        assert_same_state(state(model), expected)
    model = make(model_dir=str(tmp_path / "none"))
    model.fit(data(), nb_epoch=1, checkpoint_interval=0)
    for number in (0, -1):
        model.save_checkpoint(number)
    assert not (tmp_path / "none").exists() or not list((tmp_path / "none").iterdir())


def test_checkpoints_are_written_every_so_many_steps(tmp_path):
    steps = []
    model = make(model_dir=str(tmp_path))

    def note(model, step):
        steps.append((step, len(model.get_checkpoints())))

    model.fit(data(), nb_epoch=2, checkpoint_interval=4, callbacks=note)
    assert dict(steps)[3] == 0 and dict(steps)[4] == 1 and dict(steps)[10] == 2


def test_damaged_and_foreign_checkpoints_are_refused(tmp_path):
    model = make(model_dir=str(tmp_path))
    model.fit(data(), nb_epoch=1)
    model.save()
    for name, use in (
        ("checkpoint1.safetensors", model.restore),
        ("model.safetensors", lambda: dc.models.PolySRLModel.from_pretrained(tmp_path)),
    ):
        content = bytearray((tmp_path / name).read_bytes())
        content[-7] ^= 0xFF
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=name):
            use()
    before = state(model)
    wider = make(config=replace(CONFIG, head_hidden=9), model_dir=str(tmp_path / "other"))
    wider.fit(data(), nb_epoch=1)
    with pytest.raises(CheckpointError, match=r"checkpoint1\.safetensors: head_hidden is 9"):
        model.restore(model_dir=str(tmp_path / "other"))
    assert_same_state(before, state(model))


def test_validation_callback_keeps_the_best_model_and_training_goes_on(tmp_path):
    model = make(learning_rate=0.05, schedule="constant")
    valid = data().select(range(0, N, 3))
    log, modes = io.StringIO(), []
    validate = dc.models.ValidationCallback(
        valid, 2, [MAE], output_file=log, save_dir=str(tmp_path / "best")
    )
    model.fit(data(), nb_epoch=8, callbacks=[validate, lambda m, _: modes.append(m.model.training)])
    assert all(modes) and len(modes) == 40
    scores = [float(line.split("=")[1]) for line in log.getvalue().splitlines()]
    assert len(scores) == 20 and min(scores) < scores[-1]  # else the test shows nothing
    assert model.evaluate(valid, [MAE])["mae_score"] == pytest.approx(scores[-1], rel=1e-4)
    model.restore(model_dir=str(tmp_path / "best"))
    assert model.evaluate(valid, [MAE])["mae_score"] == pytest.approx(min(scores), rel=1e-4)
    assert validate.get_best_score() == pytest.approx(min(scores), rel=1e-4)
    with pytest.raises(FileNotFoundError, match=r"read by restore\(\)"):
        dc.models.PolySRLModel.from_pretrained(tmp_path / "best")


def test_evaluating_in_a_callback_does_not_change_the_training():
    quiet = fitted()
    watched = make()
    watched.fit(data(), nb_epoch=2, callbacks=lambda m, _: m.evaluate(data(), [MAE]))
    assert_same_state(state(quiet), state(watched))


# ---------------------------------------------------------------- pretraining


@pytest.fixture(scope="module")
def crystals():
    return prototypes()


def pretrain(dataset, nb_epoch=4, **kwargs):
    losses: list[float] = []
    model = make("pretraining", learning_rate=3e-3, log_frequency=5, batch_size=8, **kwargs)
    model.fit(dataset, nb_epoch=nb_epoch, all_losses=losses, checkpoint_interval=0)
    return model, losses


@pytest.mark.parametrize("objective", ["polysrl", "without_sampling", "infomax3d"])
def test_pretraining_lowers_the_loss(objective, crystals):
    model, losses = pretrain(crystals, objective=objective)
    assert np.isfinite(losses).all() and losses[-1] < losses[0]
    assert model.predict_embedding(data()).shape == (N, 16)


def test_a_property_model_starts_from_exactly_the_pretrained_encoder(crystals, tmp_path):
    model, _ = pretrain(crystals, nb_epoch=1)
    model.save(tmp_path)
    trained = state(model, "encoders.0.")
    for kwargs in ({"freeze_encoder": True}, {"n_ensemble": 2}):
        start = make(pretrained=tmp_path, **kwargs)
        assert_same_state(trained, state(start, "encoders.0."))
        copies = len(start.model.encoders)
        expected = np.tile(model.predict_embedding(data()), copies) / np.sqrt(copies)
        np.testing.assert_allclose(start.predict_embedding(data()), expected, atol=1e-6)
    assert_same_state(
        {k.replace("s.0.", "s.1.", 1): v for k, v in trained.items()}, state(start, "encoders.1.")
    )
    assert start.fit(data(), nb_epoch=1) > 0
    again = dc.models.PolySRLModel.from_pretrained(tmp_path)
    assert_same_state(state(model), state(again))
    for change in ({"n_features": 8}, {"set2set_steps": 3}, {"feature_norm": False}):
        with pytest.raises(ValueError, match=next(iter(change))):
            make(pretrained=tmp_path, config=replace(CONFIG, **change))
    with pytest.raises((OSError, ValueError)):
        make(pretrained=tmp_path / "missing")


def test_pretraining_is_seeded_and_resumable(crystals, tmp_path):
    small = crystals.select(range(12))
    whole = make("pretraining", schedule="constant")
    whole.fit(small, nb_epoch=2)
    make("pretraining", schedule="constant", model_dir=str(tmp_path)).fit(small, nb_epoch=1)
    second = make("pretraining", schedule="constant", model_dir=str(tmp_path))
    second.fit(small, nb_epoch=1, restore=True)
    assert_same_state(state(whole), state(second))


def test_pretraining_refuses_what_it_cannot_contrast(crystals):
    with pytest.raises(InvalidInputError, match="StructureGraphFeaturizer"):
        make("pretraining").fit(data())
    with pytest.raises(InvalidInputError, match="at least two"):
        make("pretraining").fit(crystals.select([0]))


def test_structure_graphs_can_be_used_for_properties(crystals):
    dataset = dc.data.NumpyDataset(crystals.X, np.arange(len(crystals), dtype=float))
    assert fitted(dataset=dataset).predict(dataset).shape == (len(crystals), 1)
