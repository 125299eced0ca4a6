"""The training loop: exact resume after any interruption, and losses that are not finite."""

import functools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import deepchem as dc
import numpy as np
import pytest
import torch
from models import SIGNAL, N, assert_same_state, data, make, state
from processes import SMALL, WHITENED, crystals, outcome, pretraining
from pymatgen.core import Lattice, Structure

from polysrl_dc import PolymorphDataset
from polysrl_dc.batches import LabeledData, PolymorphData
from polysrl_dc.callbacks import StopTraining
from polysrl_dc.checkpoints import load_checkpoint
from polysrl_dc.errors import InvalidInputError
from polysrl_dc.sources import PackSettings


class Interrupted(Exception):
    pass


class Record:
    """Notes every step; interrupts the training after the checkpoint of a step, or before it."""

    def __init__(self, stop=None, before=False):
        self.stop, self.before, self.steps, self.epochs = stop, before, {}, []

    def end_step(self, model, loss, n_rows):
        rates = [group["lr"] for group in model._pytorch_optimizer.param_groups]
        self.steps[model._global_step] = (float(loss), n_rows, *rates)
        if self.before and model._global_step == self.stop:
            raise Interrupted

    def end_epoch(self, model):
        self.epochs.append(model._global_step)

    def __call__(self, model, step):
        assert step == model._global_step
        if step == self.stop:
            raise Interrupted


def exponential():
    return dc.models.optimizers.ExponentialDecay(1e-2, 0.5, 4, staircase=False)


def regression(**kwargs):
    return make(n_ensemble=2, device="cpu", **kwargs)


RUNS = {
    "one_cycle": lambda **kw: pretraining(**kw),
    "constant": lambda **kw: pretraining(schedule="constant", **kw),
    "exponential": lambda **kw: pretraining(learning_rate=exponential(), **kw),
    "whitened": lambda **kw: pretraining(config=WHITENED, objective="infomax3d", **kw),
    "capped": lambda **kw: pretraining(max_edges=55, polymorphs_per_batch=4, **kw),
    "ensemble": regression,
}


def dataset_of(name):
    return data() if name == "ensemble" else crystals()


def trained(name, folder, record, nb_epoch=3, **fit):
    model = RUNS[name](model_dir=str(folder))
    model.fit(dataset_of(name), nb_epoch=nb_epoch, callbacks=record, **fit)
    return model


@functools.cache
def undisturbed(name):
    record, model = Record(), RUNS[name]()
    model.fit(dataset_of(name), nb_epoch=3, callbacks=record)
    return model, record


def assert_equal_end(name, model, record, first):
    """That a run which was continued after step ``first`` ended as the undisturbed one."""
    whole, expected = undisturbed(name)
    assert record.steps == {k: v for k, v in expected.steps.items() if k > first}
    assert len(record.steps) > 0
    assert_same_state(state(whole), state(model))
    assert model._epoch == whole._epoch == 3
    (one, _), (other, manifest) = (load_checkpoint(m.get_checkpoints()[0]) for m in (whole, model))
    assert_same_state(one, other)
    assert manifest["run"] is None and manifest["step"] == max(expected.steps)


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize(
    ("stop", "before", "interval", "checkpoint"),
    [(3, False, 2, 2), (8, True, 2, 6), (10, False, 5, 10), (14, True, 7, 7)],
    ids=["first epoch", "within an epoch", "end of an epoch", "within the last"],
)
def test_an_interrupted_run_goes_on_to_the_bit(name, stop, before, interval, checkpoint, tmp_path):
    if stop == 10:  # the very end of the second epoch, also where epochs are not equally long
        stop = interval = checkpoint = undisturbed(name)[1].epochs[1]
    with pytest.raises(Interrupted):
        trained(name, tmp_path, Record(stop, before), checkpoint_interval=interval)
    record = Record()
    model = trained(name, tmp_path, record, checkpoint_interval=interval, restore=True)
    assert_equal_end(name, model, record, checkpoint)


def test_the_epochs_of_the_capped_run_differ():
    """Else the tests above show nothing about them."""
    lengths = np.diff([0, *undisturbed("capped")[1].epochs])
    assert len(lengths) == 3 and len(set(lengths)) > 1
    assert max(n_rows for _, n_rows, *_ in undisturbed("capped")[1].steps.values()) <= 8


def test_a_run_interrupted_twice_continues_to_the_bit(tmp_path):
    for stop, restore in ((4, False), (9, True)):
        with pytest.raises(Interrupted):
            trained("one_cycle", tmp_path, Record(stop), checkpoint_interval=2, restore=restore)
    record = Record()
    model = trained("one_cycle", tmp_path, record, checkpoint_interval=2, restore=True)
    assert_equal_end("one_cycle", model, record, 8)


@pytest.mark.parametrize(
    ("name", "checkpoint"), [("in_epoch", 6), ("while_writing", 4), ("while_rotating", 4)]
)
def test_a_killed_run_continues_to_the_bit(name, checkpoint):
    folder = outcome() / name
    record = Record()
    model = trained("one_cycle", folder, record, checkpoint_interval=2, restore=True)
    assert_equal_end("one_cycle", model, record, checkpoint)


def test_another_plan_is_refused_when_an_interrupted_run_is_continued(tmp_path):
    with pytest.raises(Interrupted):
        trained("one_cycle", tmp_path, Record(7), checkpoint_interval=2)
    rows = np.arange(len(crystals()))
    for problem, fit, kwargs in (
        ("epochs", {"nb_epoch": 4}, {}),
        ("data", {"dataset": crystals().select(rows[1:])}, {}),
        ("data", {"dataset": crystals().select(rows[::-1])}, {}),
        ("deterministic", {"deterministic": True}, {}),
        ("batch_size", {}, {"batch_size": 9}),
        ("seed", {}, {"seed": 1}),
        ("learning_rate: 0.01, not 0.02", {}, {"learning_rate": 2e-2}),
        ("learning_rate: 0.01, not Exp", {}, {"learning_rate": exponential()}),
        ("schedule: one_cycle, not constant", {}, {"schedule": "constant"}),
        ("weight_decay: 0.0, not 0.1", {}, {"weight_decay": 0.1}),
        ("autocast: False, not True", {}, {"autocast": True}),
    ):
        model = pretraining(model_dir=str(tmp_path), **kwargs)
        fit = {"dataset": crystals(), "nb_epoch": 3, **fit}
        with pytest.raises(InvalidInputError, match=f"another {problem}"):
            model.fit(restore=True, **fit)
    folder = tmp_path / "deepchem"
    with pytest.raises(Interrupted):
        trained("exponential", folder, Record(7), checkpoint_interval=2)
    other = dc.models.optimizers.ExponentialDecay(1e-2, 0.6, 4, staircase=False)
    with pytest.raises(InvalidInputError, match=r"learning_rate: .*rate=0\.5.*, not .*rate=0\.6"):
        pretraining(model_dir=str(folder), learning_rate=other).fit(
            crystals(), nb_epoch=3, restore=True
        )
    folder = tmp_path / "labels"
    with pytest.raises(Interrupted):
        trained("ensemble", folder, Record(7), checkpoint_interval=2)
    with pytest.raises(ValueError, match="another data"):
        regression(model_dir=str(folder)).fit(data(np.arange(N)), nb_epoch=3, restore=True)


@pytest.mark.parametrize(("name", "value"), [("max_neighbors", 5), ("cutoff", 4.0)])
def test_structures_that_were_built_with_other_limits_are_refused(name, value, tmp_path):
    other = replace(SMALL, **{name: value})
    with pytest.raises(
        InvalidInputError, match=f"{name} of the structures is .*, of the configuration {value}:"
    ):
        pretraining(config=other).fit(crystals(), nb_epoch=1)
    salts = [
        Structure(Lattice.cubic(a), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]]) for a in (4, 4.2, 5)
    ]
    settings = PackSettings(**{name: value})
    built = PolymorphDataset(salts, cache_dir=tmp_path, settings=settings, progress=False)
    pretraining(config=other).fit(built, nb_epoch=1, checkpoint_interval=0)
    with pytest.raises(InvalidInputError, match=f"{name} of the structures is {value}"):
        pretraining().fit(built, nb_epoch=1)
    for limits, fits in (({name: value}, True), ({}, False)):  # all that graphs tell
        graphs = dc.feat.StructureGraphFeaturizer(**limits)(salts)
        dataset = dc.data.NumpyDataset(graphs)
        if fits:
            pretraining(config=other).fit(dataset, nb_epoch=1, checkpoint_interval=0)
        else:
            with pytest.raises(InvalidInputError, match=f"{name} of the structures is"):
                pretraining(config=other).fit(dataset, nb_epoch=1)


@pytest.mark.parametrize("name", ["one_cycle", "exponential", "capped"])
def test_a_finished_run_that_is_restored_trains_more_epochs(name, tmp_path):
    whole = trained(name, tmp_path / "whole", Record())
    again, record, other = RUNS[name](model_dir=str(tmp_path / "whole")), Record(), Record()
    again.fit(dataset_of(name), nb_epoch=2, restore=True, callbacks=record)
    whole.fit(dataset_of(name), nb_epoch=2, callbacks=other)
    assert record.steps == other.steps and len(record.epochs) == 2
    assert_same_state(state(whole), state(again))
    assert again._epoch == 5


def test_a_run_restored_after_its_last_step_has_no_loss(tmp_path):
    with pytest.raises(Interrupted):
        trained("ensemble", tmp_path, Record(15), checkpoint_interval=5)
    model = regression(model_dir=str(tmp_path))
    assert np.isnan(model.fit(data(), nb_epoch=3, restore=True))
    assert (model.get_global_step(), model.epochs_trained, model.interrupted) == (15, 3, False)


def test_structures_of_more_rounds_are_packed_for_more_layers(tmp_path):
    deeper, salts = replace(SMALL, structure_layers=4), crystals().select(range(9))
    graphs = dc.data.NumpyDataset(salts.X, ids=salts.ids)
    pretraining(config=deeper).fit(graphs, nb_epoch=1, checkpoint_interval=0)
    with pytest.raises(InvalidInputError, match=r"3 rounds.* 4 .*PackSettings\(rounds=4\)"):
        pretraining(config=deeper).fit(salts, nb_epoch=1)
    packed = PolymorphDataset.from_graphs(salts.X, settings=PackSettings(rounds=4))
    pretraining(config=deeper).fit(packed, nb_epoch=1, checkpoint_interval=0)


def test_an_epoch_without_a_batch_is_refused_and_structures_left_out_are_counted(caplog):
    n_edges = crystals().n_edges
    cap = int(n_edges.max())
    largest = crystals().select(np.flatnonzero(n_edges > cap / 2))
    alone = f"max_edges is {cap}: up to {len(largest)} of {len(largest)} structures"
    model = pretraining(max_edges=cap)
    before = state(model)
    with pytest.raises(InvalidInputError, match=alone):
        model.fit(largest, nb_epoch=2)
    assert_same_state(before, state(model))
    pretraining(max_edges=cap).fit(crystals(), nb_epoch=4, checkpoint_interval=0)
    assert len(caplog.messages) == 1
    assert f" of {len(crystals())} structures of an epoch are alone" in caplog.messages[0]


def test_labels_of_one_row_have_no_other_scale(caplog):
    model = make()
    model.fit(data(1000 * SIGNAL), nb_epoch=1, checkpoint_interval=0)
    few = data(1000 * SIGNAL).select(range(2))
    model.fit_on_batch(few.X[:1], few.y[:1], few.w[:1], checkpoint=False)
    assert caplog.messages == []
    model.fit(few.select([0]), nb_epoch=1, checkpoint_interval=0)
    model.fit(data(np.full(N, 1000.0)), nb_epoch=1, checkpoint_interval=0)
    assert caplog.messages == []
    model.fit(data(np.full(N, 1e5)), nb_epoch=1, checkpoint_interval=0)
    model.fit(data(), nb_epoch=1, checkpoint_interval=0)
    assert len(caplog.messages) == 2


def test_the_learning_rate_rises_and_falls_over_one_call():
    rates = []

    class Rates:
        def end_step(self, model, loss, n_rows):  # the rate of the next step
            rates.append(model._pytorch_optimizer.param_groups[0]["lr"])

        def __call__(self, model, step):
            pass

    pretraining().fit(crystals(), nb_epoch=6, checkpoint_interval=0, callbacks=Rates())
    top = int(np.argmax(rates))
    assert rates[top] == pytest.approx(1e-2, rel=0.05) and 0 < top < len(rates) // 4
    assert rates[0] < 0.6 * rates[top] and rates[-2] < 1e-3 * rates[top]
    assert {rate for *_, rate in undisturbed("constant")[1].steps.values()} == {1e-2}


def test_a_fit_too_short_for_a_cycle_does_not_start_from_the_rate_of_an_interrupted_one():
    record, model, rows = Record(), regression(), data()
    with pytest.raises(Interrupted):
        model.fit(rows, nb_epoch=3, callbacks=Record(2))
    model.fit(rows.select(range(8)), nb_epoch=2, callbacks=record)
    assert [rates for _, _, *rates in record.steps.values()] == [[1e-2, 1e-2]] * 2


def test_no_epochs_leave_a_new_model_unfitted_and_less_are_refused(tmp_path):
    model = regression(model_dir=str(tmp_path))
    before = state(model)
    assert np.isnan(model.fit(data(), nb_epoch=0))
    assert_same_state(before, state(model))
    assert not model.model.fitted and model.get_checkpoints() == []
    with pytest.raises(ValueError, match="nb_epoch is -1"):
        model.fit(data(), nb_epoch=-1)


# ------------------------------------------------------------------------- not finite


def spoil_loss(monkeypatch, value, step):
    calls, loss = [], PolymorphData.loss

    def spoiled(self, network, rows, generator):
        calls.append(None)
        factor = value if len(calls) == step else 1.0
        return loss(self, network, rows, generator) * factor

    monkeypatch.setattr(PolymorphData, "loss", spoiled)


class Weights:
    """Keeps weights and running statistics after each step."""

    def __init__(self):
        self.after = {}

    def __call__(self, model, step):
        self.after[step] = state(model)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_the_run(value, monkeypatch, tmp_path):
    weights = Weights()
    model = pretraining(model_dir=str(tmp_path))
    with monkeypatch.context() as patch:
        spoil_loss(patch, value, 8)
        with pytest.raises(FloatingPointError, match="at step 8"):
            model.fit(crystals(), nb_epoch=3, checkpoint_interval=2, callbacks=weights)
    assert max(weights.after) == 7
    assert_same_state(weights.after[7], state(model))
    record = Record()
    again = trained("one_cycle", tmp_path, record, checkpoint_interval=2, restore=True)
    assert_equal_end("one_cycle", again, record, 6)  # of the last checkpoint


@pytest.mark.parametrize("task", ["pretraining", "regression"])
def test_a_gradient_that_is_not_finite_stops_the_run(task, tmp_path):
    pretrains = task == "pretraining"
    model = (pretraining if pretrains else regression)(model_dir=str(tmp_path))
    weights, steps = Weights(), []

    def spoil(gradient):
        steps.append(None)
        return gradient * (float("nan") if len(steps) == 4 else 1.0)

    encoder = model.model.encoders[-1]  # of the second member, where there are two
    encoder.mean_output.weight.register_hook(spoil)
    with pytest.raises(FloatingPointError, match="gradient norm nan at step 4"):
        dataset = crystals() if pretrains else data()
        model.fit(dataset, nb_epoch=3, checkpoint_interval=3, callbacks=weights)
    assert_same_state(weights.after[3], state(model))
    model.restore()
    assert model.get_global_step() == 3
    assert_same_state(weights.after[3], state(model))


# ------------------------------------------------------------------------- callbacks


def test_a_callback_may_end_the_training(tmp_path):
    seen = []

    def stop(model, step):
        seen.append(step)
        if step == 4:
            raise StopTraining

    model = pretraining(model_dir=str(tmp_path))
    model.fit(crystals(), nb_epoch=3, callbacks=stop)
    assert seen == [1, 2, 3, 4] and model.get_global_step() == 4
    again = pretraining(model_dir=str(tmp_path))
    again.restore()
    assert_same_state(state(model), state(again))


def test_logged_losses_are_means_over_the_interval():
    losses, record = [], Record()
    model = pretraining(log_frequency=4)
    last = model.fit(
        crystals(), nb_epoch=2, checkpoint_interval=0, all_losses=losses, callbacks=record
    )
    steps = [loss for loss, *_ in record.steps.values()]
    expected = [np.mean(steps[:4]), np.mean(steps[4:8]), np.mean(steps[8:])]
    assert losses == pytest.approx(expected, rel=1e-5) and last == losses[-1]


def test_every_step_draws_other_samples_and_every_epoch_another_order(monkeypatch):
    def drawn(seed):
        samples, order = [], []

        def loss(self, network, rows, generator):
            samples.append(torch.rand((), generator=generator).item())
            order.extend(rows[0].tolist())
            return sum(p.sum() for p in network.parameters())

        monkeypatch.setattr(LabeledData, "loss", loss)
        regression(seed=seed).fit(data(), nb_epoch=2, checkpoint_interval=0)
        return samples, order[:N], order[N:]

    (samples, first, second), (others, *_) = drawn(0), drawn(1)
    assert len({*samples, *others}) == 2 * len(samples) == 20
    assert sorted(first) == sorted(second) == list(range(N)) and first != second


def test_member_gradients_are_clipped_apart():
    model = regression()
    norms = []

    class Norms:
        def __call__(self, model, step):
            norms.append([
                torch.stack([p.grad.norm() for p in member if p.grad is not None]).norm().item()
                for member in model.model.member_parameters()
            ])  # fmt: skip

    big = LabeledData.loss

    def scaled(self, network, rows, generator):
        return 1e4 * big(self, network, rows, generator)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LabeledData, "loss", scaled)
        model.fit(data(), nb_epoch=1, checkpoint_interval=0, callbacks=Norms())
    np.testing.assert_allclose(norms, model.config.grad_clip, rtol=1e-3)


# ------------------------------------------------------------------- several calls, threads


def test_predictions_of_several_threads_are_those_of_one():
    model = make()
    model.fit(data(), nb_epoch=2, checkpoint_interval=0)
    assert not model.model.training
    parts = [data().select(range(i, i + 6)) for i in range(0, N - 6, 3)]
    alone, before = [model.predict(part) for part in parts], state(model)
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(model.predict, parts * 20))
    np.testing.assert_allclose(together, alone * 20, rtol=1e-4, atol=1e-5)
    assert_same_state(before, state(model))


def test_models_built_in_several_threads_have_the_weights_of_their_seeds():
    seeds = [0, 1, 2, 3] * 4
    alone = [state(make(seed=seed)) for seed in seeds[:4]]
    with ThreadPoolExecutor(4) as pool:
        for seed, found in zip(seeds, pool.map(lambda i: state(make(seed=i)), seeds), strict=True):
            assert_same_state(alone[seed], found)


@pytest.mark.parametrize("error", [KeyboardInterrupt, FloatingPointError])
def test_labels_of_a_call_without_a_step_are_forgotten(error, monkeypatch):
    model, new = make(), make()
    with monkeypatch.context() as patch:
        patch.setattr(LabeledData, "loss", functools.partial(fail, error))
        with pytest.raises(error):
            other = data(1000 * SIGNAL + 7)
            model.fit(dc.data.DiskDataset.from_numpy(other.X, other.y, tasks=["gap"]), nb_epoch=1)
    assert not model.model.fitted and not model.model.training and model.provenance == {}
    with pytest.raises(ValueError, match="not fitted"):
        model.predict(data())
    for each in (model, new):
        each.fit(data(), nb_epoch=1, checkpoint_interval=0)
    assert_same_state(state(new), state(model))


def fail(error, *_):
    raise error


def test_a_failing_call_leaves_a_fitted_model_fitted(monkeypatch):
    model = make()
    model.fit(data(), nb_epoch=1, checkpoint_interval=0)
    before = state(model)
    monkeypatch.setattr(LabeledData, "loss", functools.partial(fail, Interrupted))
    with pytest.raises(Interrupted):
        model.fit(data(), nb_epoch=1)
    assert model.model.fitted
    assert_same_state(before, state(model))


def test_an_interrupted_step_leaves_running_statistics_and_calibration(monkeypatch, caplog):
    model = make()
    model.fit(data(), nb_epoch=1, checkpoint_interval=0)
    calibration, before = model.calibrate(data()), state(model)
    assert not caplog.messages
    loss = LabeledData.loss

    def interrupted(*arguments):
        loss(*arguments)  # which moves the statistics
        raise KeyboardInterrupt

    monkeypatch.setattr(LabeledData, "loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.fit(data(), nb_epoch=1)
    assert_same_state(before, state(model))
    assert model.calibration == calibration
    assert caplog.messages == ["its std is no longer calibrated when it has learned more"]


@pytest.mark.parametrize("labels", [SIGNAL + 50, 100 * SIGNAL, 0.01 * SIGNAL])
def test_labels_in_other_units_than_the_first_are_warned_of(labels, caplog):
    model = make()
    model.fit(data(), nb_epoch=1)
    model.fit(data(3 * SIGNAL + 2), nb_epoch=1)
    assert not caplog.messages
    model.fit(data(labels), nb_epoch=1)
    (message,) = caplog.messages
    assert f"std {labels.std():.4g}, those it learned from first 0 and" in message


def test_callbacks_may_be_none_and_what_is_no_dataset_is_named():
    model = make()
    model.fit(data(), nb_epoch=1, callbacks=None)
    with pytest.raises(TypeError, match=r"list is no DeepChem dataset; of formulas: dc.data"):
        model.fit(["NaCl"], [1.0])


@pytest.mark.parametrize("end", [0.0, 1e-3])
def test_schedules_of_deepchem_have_the_rates_that_they_say(end):
    rates = []
    schedule = dc.models.optimizers.PolynomialDecay(1e-2, end, 10)
    make(learning_rate=schedule).fit(
        data(), nb_epoch=1, callbacks=lambda m, _: rates.append(m._pytorch_optimizer.param_groups)
    )
    steps = len(rates)
    assert rates[-1][0]["lr"] == pytest.approx(1e-2 - (1e-2 - end) * steps / 10)
    model = make(learning_rate=dc.models.optimizers.LinearCosineDecay(1e-2, 10))
    model.fit(data(), nb_epoch=2)
    assert model._pytorch_optimizer.param_groups[0]["lr"] == pytest.approx(1e-5)


def test_the_default_type_of_torch_is_not_that_of_a_model(tmp_path):
    single = make()
    single.fit(data(), nb_epoch=1, checkpoint_interval=0)
    torch.set_default_dtype(torch.float64)
    try:
        model = make()
        model.fit(data(), nb_epoch=1, checkpoint_interval=0)
        mean, std = model.predict_uncertainty(data(), polymorphs=True)
        model.save(tmp_path)
        again = dc.models.PolySRLModel.from_pretrained(tmp_path).predict(data())
        for objective in ("polysrl", "graphcl"):
            pretraining(objective=objective).fit(crystals(), nb_epoch=1, checkpoint_interval=0)
    finally:
        torch.set_default_dtype(torch.float32)
    assert mean.dtype == std.dtype == np.float32
    np.testing.assert_array_equal(again, model.predict(data()))
    assert {tensor.dtype for tensor in state(model).values()} == {
        tensor.dtype for tensor in state(single).values()
    }
