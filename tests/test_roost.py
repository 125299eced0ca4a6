"""Roost: what its package is given, what it makes of it, and what the adapter adds."""

import gc
import random
from functools import partial
from itertools import pairwise

import deepchem as dc
import numpy as np
import pandas as pd
import pytest
import torch
import training_state

pytest.importorskip("aviary", reason="Roost needs the extra 'peers'")

import roost
from aviary.losses import robust_l1_loss
from aviary.roost.data import CompositionData, collate_batch
from aviary.utils import get_element_embedding
from roost import Roost, RoostModel

from polysrl_dc.elements import has_embedding
from polysrl_dc.errors import InvalidInputError
from polysrl_dc.featurizers import StoichiometryGraphFeaturizer

SMALL = {
    **{"elem_fea_len": 16, "n_graph": 1, "elem_heads": 1, "cry_heads": 1},
    **{name: (16,) for name in ("elem_gate", "elem_msg", "cry_gate", "cry_msg")},
    **{"trunk_hidden": (32,), "out_hidden": (16, 8)},
}
METALS = ("Li", "Na", "K", "Rb", "Mg", "Ca", "Sr", "Ba", "Zn", "Cd", "Al", "Ga")
FORMULAS = [metal + anion for metal in METALS for anion in ("O", "S", "Se2", "Cl2", "F3")]
DOPED = ["Bi0.4Sb1.6Te3.0", "Fe", "Pb0.9985Na0.0015Te", "(La0.7Sr0.3)MnO3", "Zr41.2Ti13.8Ni10Be35"]
small = partial(RoostModel, device="cpu", **SMALL)


def dataset(formulas, y=None, w=None):
    graphs = StoichiometryGraphFeaturizer().featurize(formulas)
    return dc.data.NumpyDataset(graphs, y, w, ids=formulas)


@pytest.fixture(scope="module")
def rule():
    """Mean atomic numbers of 60 binary formulas."""
    graphs = StoichiometryGraphFeaturizer().featurize(FORMULAS)
    return dataset(FORMULAS, np.array([graph.numbers @ graph.fractions for graph in graphs]))


@pytest.fixture(scope="module")
def fitted(rule):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(roost, "LEARNING_RATE", 3e-3)
        return small(seed=1, epochs=100).fit(rule)


def test_the_published_size_has_the_number_of_weights_counted_by_hand():
    def mlp(n_inputs, hidden, n_outputs):
        return n_inputs * hidden + hidden + hidden * n_outputs + n_outputs

    def residual(widths, n_outputs):
        pairs = list(pairwise(widths))
        return sum(2 * a * b + b for a, b in pairs) + widths[-1] * n_outputs + n_outputs

    message = 3 * 3 * (mlp(128, 256, 1) + mlp(128, 256, 64) + 1)
    pooling = 3 * (mlp(64, 256, 1) + mlp(64, 256, 64) + 1)
    head = residual((64, 1024, 512), 256) + residual((256, 128, 64), 2)
    by_hand = 104 * 200 + (200 * 63 + 63) + message + pooling + head
    assert RoostModel(device="cpu").n_parameters == by_hand == 2_322_961


def test_the_package_gets_what_it_would_make_of_the_strings():
    """Through the network, for which the order of the elements does not matter."""
    table = pd.DataFrame({"composition": DOPED, "material_id": DOPED, "y": 0.5})
    theirs = CompositionData(table, {"y": "regression"})
    batch = collate_batch([theirs[row] for row in range(len(DOPED))])
    CompositionData.__getitem__.cache_clear()
    model, given = small(), dataset(DOPED, np.full(len(DOPED), 0.5))
    formulas = roost.labeled(given).inputs
    loader = model._loader(formulas, torch.full((len(DOPED),), 0.5), given, 8, shuffle=False)
    (ours,) = list(loader)
    torch.testing.assert_close(ours[1], batch[1])
    model.model.eval()
    torch.testing.assert_close(*(model.model(*part[0]) for part in (ours, batch)))
    sizes = [len(graph.numbers) for graph in given.X]
    assert sizes == [3, 1, 3, 4, 4] and len(ours[0][2]) == sum(n * n for n in sizes)


def test_training_has_the_published_settings(rule, monkeypatch):
    calls = []

    def fit(self, loader, **settings):
        calls.append((loader, settings))
        for _ in range(settings["epochs"]):
            settings["scheduler"].step()

    monkeypatch.setattr(Roost, "fit", fit)
    RoostModel(device="cpu").fit(rule)
    assert [settings["epochs"] for _, settings in calls] == [1] * 100
    loader, settings = calls[0]
    assert all(call[0] is loader for call in calls)
    for name in ("optimizer", "scheduler", "loss_dict"):
        assert all(call[1][name] is settings[name] for call in calls)
    assert loader.batch_size == 128 and isinstance(
        loader.sampler, torch.utils.data.sampler.RandomSampler
    )
    assert settings["val_loader"] is None
    assert settings["loss_dict"] == {"target": ("regression", robust_l1_loss)}
    optimizer = settings["optimizer"]
    assert type(optimizer) is torch.optim.AdamW
    (group,) = optimizer.param_groups
    assert (group["lr"], group["weight_decay"]) == (3e-4, 1e-6)
    normalizer = settings["normalizer_dict"]["target"]
    assert normalizer.mean.item() == pytest.approx(rule.y.mean())
    assert normalizer.std.item() == pytest.approx(rule.y.std())


def test_a_simple_rule_is_learned(rule, fitted):
    mean, std = fitted.predict_uncertainty(rule)
    assert mean.shape == std.shape == (len(rule), 1)
    assert (std > 0).all() and std.mean() < 0.5 * rule.y.std()
    np.testing.assert_array_equal(fitted.predict(rule), mean)
    assert np.abs(mean[:, 0] - rule.y).mean() < 0.25 * rule.y.std()


def test_predictions_are_the_outputs_in_label_units_of_any_number_of_batches(
    rule, fitted, monkeypatch
):
    formulas = roost.asked(rule)
    (batch,) = fitted._loader(formulas, torch.zeros(len(rule)), rule, len(rule), shuffle=False)
    with torch.no_grad():
        (outputs,) = fitted.model.eval()(*batch[0])
    value, log_std = outputs.double().numpy().T
    monkeypatch.setattr(roost, "BATCH_SIZE", 1)  # of which 16 are predicted at once
    mean, std = fitted.predict_uncertainty(rule)
    np.testing.assert_allclose(mean[:, 0], value * rule.y.std() + rule.y.mean(), rtol=1e-3)
    np.testing.assert_allclose(std[:, 0], np.exp(log_std) * rule.y.std(), rtol=1e-3)


def test_units_of_the_labels_scale_the_predictions(rule):
    other = dc.data.NumpyDataset(rule.X, 1000 * rule.y - 7, ids=rule.ids)
    one, two = (small(epochs=2).fit(part).predict_uncertainty(rule) for part in (rule, other))
    np.testing.assert_allclose(two[0], 1000 * one[0] - 7, rtol=1e-3)
    np.testing.assert_allclose(two[1], 1000 * one[1], rtol=1e-3)


def test_a_seed_fixes_the_model_and_leaves_the_global_state_alone(rule):
    def states():
        return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002

    torch.manual_seed(5)
    before = states()
    model = small(epochs=2).fit(rule)
    first = model.predict(rule)
    assert states() == before and gc.get_freeze_count() == 0
    torch.manual_seed(6)
    np.testing.assert_array_equal(first, small(epochs=2).fit(rule).predict(rule))
    np.testing.assert_array_equal(first, model.fit(rule).predict(rule))
    assert np.abs(first - small(1, epochs=2).fit(rule).predict(rule)).max() > 1e-3


@pytest.mark.parametrize("at", [1, 2])
def test_an_interrupted_training_goes_on(at, rule, tmp_path, monkeypatch):
    evaluate, calls = Roost.evaluate, []

    def interrupted(self, *given, **settings):
        calls.append(settings["action"])
        if len(calls) == at + 1:
            raise KeyboardInterrupt
        return evaluate(self, *given, **settings)

    whole = small(epochs=3).fit(rule)
    monkeypatch.setattr(training_state, "INTERVAL", 0.0)
    monkeypatch.setattr(Roost, "evaluate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        small(epochs=3).fit(rule, unfinished=tmp_path)
    again = small(epochs=3).fit(rule, unfinished=tmp_path)
    assert calls == ["train"] * 4  # three epochs, one of them begun twice
    for one, other in zip(again.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    small(epochs=4).fit(rule, unfinished=tmp_path)  # another training
    assert len(calls) == 8
    small(epochs=3).fit(dataset(FORMULAS, -rule.y), unfinished=tmp_path)  # of other labels
    assert len(calls) == 11


def test_an_interruption_is_not_taken_for_the_end_of_training(rule, monkeypatch):
    """The package's loop swallows it, and has counted the epoch by then."""
    evaluate, calls = Roost.evaluate, []

    def interrupted(self, *given, **settings):
        calls.append(given)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return evaluate(self, *given, **settings)

    monkeypatch.setattr(Roost, "evaluate", interrupted)
    model = small(epochs=2)
    with pytest.raises(KeyboardInterrupt):
        model.fit(rule)
    assert gc.get_freeze_count() == 0
    with pytest.raises(ValueError, match="not fitted"):
        model.predict(rule)


def test_bad_input_is_named(rule, fitted, monkeypatch):
    labels = rule.y.copy()
    labels[3] = np.nan
    model = small(epochs=1)
    with pytest.raises(ValueError, match="not fitted"):
        model.predict(rule)
    with pytest.raises(InvalidInputError, match=r"row 3 \(id LiCl2\): label nan"):
        model.fit(dataset(FORMULAS, labels))
    with pytest.raises(InvalidInputError, match="weights differ"):
        model.fit(dataset(FORMULAS, rule.y, np.arange(1.0, 61.0)))
    for rows in ([0], range(2)):
        same = dc.data.NumpyDataset(rule.X[list(rows)], np.ones(len(rows)))
        with pytest.raises(InvalidInputError, match="all the same"):
            model.fit(same)
    with pytest.raises(InvalidInputError, match="no row"):
        fitted.predict(rule.select([]))
    with pytest.raises(ValueError, match="epochs is 0"):
        RoostModel(epochs=0)
    monkeypatch.setattr(roost, "LEARNING_RATE", 1e30)
    with pytest.raises(FloatingPointError):
        small(epochs=3).fit(rule)


def test_an_element_that_roost_does_not_know_is_named(rule, monkeypatch):
    """As if it ended with calcium, and had no sodium; it knows the same elements as we do."""
    table = get_element_embedding("matscholar200").weight.data
    assert table.any(1).tolist() == has_embedding()[: len(table)].tolist()
    assert not has_embedding()[len(table) :].any()
    table = table[:21].clone()
    table[11] = 0.0

    def few(name):
        return torch.nn.Embedding.from_pretrained(table.clone(), freeze=False)

    monkeypatch.setattr("aviary.roost.model.get_element_embedding", few)
    labels = np.arange(3.0)
    model = small(epochs=1).fit(dataset(["LiF", "KCl", "CaO"], labels))
    for formula, symbol in (("NaCl", "Na"), ("BaO", "Ba")):
        unknown = dataset(["LiF", formula, "CaO"], labels)
        message = rf"row 1 \(id {formula}\): Roost does not know the element {symbol} of {formula}"
        for call in (model.predict, small(epochs=1).fit):
            with pytest.raises(InvalidInputError, match=message):
                call(unknown)
