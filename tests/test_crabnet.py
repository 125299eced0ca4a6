"""CrabNet: its parts against literal formulas, and its training on a rule it must find."""

import math
from dataclasses import replace
from functools import partial

import deepchem as dc
import numpy as np
import pytest
import torch
import training_state

pytest.importorskip("pytorch_optimizer", reason="CrabNet needs the extra 'peers'")

from crabnet import (
    AttentionLayer,
    CrabNet,
    CrabNetConfig,
    CrabNetModel,
    FractionEncoding,
    WeightAverage,
    batch_size,
    crabnet_optimizer,
    robust_l1,
)
from training_state import TrainingState

from polysrl_dc.batches import stoichiometries
from polysrl_dc.errors import InvalidInputError
from polysrl_dc.featurizers import StoichiometryGraphFeaturizer

SMALL = CrabNetConfig(width=32, layers=1, heads=2, feed_forward=32, head=(32, 16))
METALS = ("Li", "Na", "K", "Rb", "Mg", "Ca", "Sr", "Ba", "Zn", "Cd", "Al", "Ga")
FORMULAS = [metal + anion for metal in METALS for anion in ("O", "S", "Se2", "Cl2", "F3")]


def dataset(formulas, y=None, w=None):
    graphs = StoichiometryGraphFeaturizer().featurize(formulas)
    return dc.data.NumpyDataset(graphs, y, w, ids=formulas)


def fractions(*formulas):
    graphs = dataset(formulas)
    return stoichiometries(graphs.X, graphs.ids).fractions


@pytest.fixture(scope="module")
def rule():
    """Mean atomic numbers of 60 binary formulas."""
    graphs = StoichiometryGraphFeaturizer().featurize(FORMULAS)
    return dataset(FORMULAS, np.array([graph.numbers @ graph.fractions for graph in graphs]))


@pytest.fixture(params=["element", "mean"])
def network(request):
    torch.manual_seed(0)
    return CrabNet(replace(SMALL, gate=request.param)).eval()


def test_the_published_size_has_the_published_number_of_weights():
    attention = 4 * (512 * 512 + 512)
    feed_forward = 512 * 2048 + 2048 + 2048 * 512 + 512
    layer = attention + feed_forward + 2 * (512 + 512)
    widths = [(512, 1024), (1024, 512), (512, 256), (256, 128)]
    head = sum(2 * a * b + b for a, b in widths) + 128 * 3 + 3
    by_hand = 200 * 512 + 512 + 3 + 3 * layer + head
    assert CrabNetModel().n_parameters == by_hand == 11_987_206


@pytest.mark.parametrize("training", [False, True])
def test_a_layer_is_that_of_torch_without_the_padding(training):
    torch.manual_seed(0)
    ours = AttentionLayer(32, 4, 64, dropout=0.0).train(training)
    theirs = torch.nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    theirs.load_state_dict(ours.state_dict())
    present = torch.arange(5) < torch.tensor([[2], [5], [1]])
    padded = torch.randn(3, 5, 32)
    output = ours(padded[present], present)
    expected = theirs(padded, src_key_padding_mask=~present)[present]
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)
    weights = zip(ours.parameters(), theirs.parameters(), strict=True)
    output.square().sum().backward()
    expected.square().sum().backward()
    for one, other in weights:
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-4)


def test_dropout_acts_in_training_only():
    torch.manual_seed(0)
    layer, x, present = AttentionLayer(32, 4, 64, dropout=0.5), torch.randn(6, 32), torch.ones(2, 3)
    assert not torch.equal(layer(x, present > 0), layer(x, present > 0))
    layer.eval()
    assert torch.equal(layer(x, present > 0), layer(x, present > 0))


def test_each_element_counts_with_its_fraction(network):
    values, log_std = network(fractions("BaTiO3", "Ba3TiO", "BaTi3O"))
    assert values.shape == log_std.shape == (3,)
    assert (values[1:] - values[0]).abs().min() > 1e-4


def test_what_stands_beside_a_formula_does_not_change_its_prediction(network):
    alone = network(fractions("NaCl"))
    beside = network(fractions("LiNi0.3Mn0.3Co0.4O2", "NaCl", "Si"))
    for one, other in zip(alone, beside, strict=True):
        assert one.shape == (1,) and other.shape == (3,)
        torch.testing.assert_close(one, other[1:2], rtol=0, atol=1e-5)


@pytest.mark.parametrize("fraction", [1.0, 0.5, 1 / 3, 0.0124, 1e-4, 1e-7])
def test_fractions_are_encoded_as_published(fraction):
    width, steps = 12, 5000
    encoded = FractionEncoding(width, steps)(torch.tensor([fraction]))[0]
    expected = []
    for x in (fraction, min(1.0, 0.0025 * math.log2(fraction) ** 2)):
        step = round(max(x, 1 / steps) * steps) - 1
        for j in range(width // 2):
            wave = math.cos if j % 2 else math.sin
            expected.append(wave(step / 50 ** (2 * j / (width // 2))))
    np.testing.assert_allclose(encoded.detach(), expected, atol=2e-4)


def test_encodings_tell_fractions_apart_but_not_below_the_resolution():
    one, near, far = FractionEncoding(12, 5000)(torch.tensor([0.5, 0.50001, 0.501]))
    assert torch.equal(one[:6], near[:6])
    assert (one[:6] - far[:6]).abs().max() > 0.1


def test_gates_act_on_each_element_or_on_the_mean():
    torch.manual_seed(0)
    each = CrabNet(SMALL).eval()
    formula, contributions = fractions("BaTiO3"), []
    each.head.register_forward_hook(lambda *call: contributions.append(call[-1]))
    value = each(formula)[0]
    p, _, logit = contributions[0].unbind(-1)
    torch.testing.assert_close(value[0], (p * logit.sigmoid()).mean())
    each.gate = "mean"
    value, log_std = each(formula)
    torch.testing.assert_close(value[0], p.mean() * logit.mean().sigmoid())
    torch.testing.assert_close(log_std[0], contributions[0][:, 1].mean())


def test_the_loss_by_hand():
    value, log_std = torch.tensor([1.0, 4.0]), torch.tensor([0.0, math.log(2.0)])
    loss = robust_l1(value, log_std, torch.tensor([3.0, 3.0]))
    by_hand = (2 * math.sqrt(2) + math.sqrt(2) * 1 / 2 + math.log(2)) / 2
    assert loss.item() == pytest.approx(by_hand, rel=1e-6)


@pytest.mark.parametrize(
    ("n_rows", "size"), [(2, 128), (2048, 128), (2896, 128), (2897, 256), (10_000, 512)]
)
def test_batch_sizes(n_rows, size):
    assert batch_size(n_rows) == size
    assert batch_size(10**7) == 4096


def test_the_optimizer_takes_the_published_steps():
    """Lamb without debiasing by hand; after six steps half-way back to the start."""
    layer = torch.nn.Linear(3, 1, bias=False)
    start = torch.tensor([[3.0, -4.0, 12.0]])  # of norm 13, which counts as 10
    layer.weight.data.copy_(start)
    optimizer = crabnet_optimizer(layer)
    optimizer.param_groups[0]["lr"] = 0.01
    gradient = torch.tensor([[0.5, -0.25, 2.0]])
    weight, first, second = start.clone(), torch.zeros(1, 3), torch.zeros(1, 3)
    for _ in range(6):
        layer.weight.grad = gradient.clone()
        optimizer.step()
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        move = first / (second.sqrt() + 1e-6)
        weight = weight - 0.01 * weight.norm().clamp(max=10) / move.norm() * move
    torch.testing.assert_close(layer.weight.data, (weight + start) / 2)


def test_weights_are_averaged_where_they_validate_well():
    layer = torch.nn.Linear(1, 1, bias=False)
    average = WeightAverage(layer)

    def update(weight, error):
        layer.weight.data.fill_(weight)
        return average.update(layer, error), average.model.module.weight.item()

    assert update(1.0, 2.0) == (True, 1.0)
    assert update(5.0, 2.1) == (False, 1.0)  # 5 % worse than the best
    good, mean = update(2.0, 1.99)  # too small a gain to start anew; the third to be taken in
    assert good and mean == pytest.approx(1 + 3 ** (-1 / 3))
    assert update(3.0, 2.02) == (False, mean)  # 1.5 % worse
    assert update(7.0, 1.9) == (True, 7.0)


@pytest.fixture(scope="module")
def fitted(rule):
    return CrabNetModel(seed=1, epochs=300, device="cpu", config=SMALL).fit(rule)


def test_a_simple_rule_is_learned(rule, fitted):
    mean, std = fitted.predict_uncertainty(rule)
    assert mean.shape == std.shape == (len(rule), 1)
    assert (std > 0).all()
    np.testing.assert_array_equal(fitted.predict(rule), mean)
    assert np.abs(mean[:, 0] - rule.y).mean() < 0.25 * rule.y.std()
    assert fitted.history[0][0] == 20
    assert fitted.history[-1][1] < 0.5 * rule.y.std()


def test_a_seed_fixes_the_model_and_leaves_the_global_state_alone(rule):
    def predictions(seed):
        model = CrabNetModel(seed=seed, epochs=20, device="cpu", config=SMALL)
        return model.fit(rule).predict(rule), model

    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, model = predictions(0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    np.testing.assert_array_equal(first, predictions(0)[0])
    np.testing.assert_array_equal(first, model.fit(rule).predict(rule))
    assert np.abs(first - predictions(1)[0]).max() > 1e-3


@pytest.mark.parametrize("at", [1, 3])
def test_an_interrupted_training_goes_on(at, rule, tmp_path, monkeypatch):
    write, written = TrainingState.write, []

    def interrupted(state, **values):
        write(state, **values)
        written.append(values["history"][-1][0])
        if len(written) == at:
            raise KeyboardInterrupt

    config = replace(SMALL, half_cycle=2)
    model = partial(CrabNetModel, seed=1, epochs=20, device="cpu", config=config)
    whole = model().fit(rule)
    monkeypatch.setattr(training_state, "INTERVAL", 0.0)
    monkeypatch.setattr(TrainingState, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model().fit(rule, unfinished=tmp_path)
    again = model().fit(rule, unfinished=tmp_path)
    assert again.history == whole.history
    assert written == [epoch for epoch, _ in whole.history][: len(written)]  # none twice
    np.testing.assert_array_equal(again.predict(rule), whole.predict(rule))
    other = model(seed=2).fit(rule, unfinished=tmp_path)  # nothing of the first
    assert other.history[0][0] == 4 and other.history[0] != whole.history[0]


def test_given_validation_data_are_not_learned_from(rule):
    train, valid = rule.select(range(40)), rule.select(range(40, 60))
    shifted = dc.data.NumpyDataset(valid.X, valid.y + 7.0, ids=valid.ids)
    models = [
        CrabNetModel(epochs=20, device="cpu", config=SMALL).fit(train, valid=part)
        for part in (valid, shifted)
    ]
    np.testing.assert_array_equal(*(model.predict(valid) for model in models))
    errors = [np.abs(models[0].predict(valid)[:, 0] - part.y).mean() for part in (valid, shifted)]
    assert [model.history for model in models] == [
        [(20, pytest.approx(error, rel=0.05))] for error in errors
    ]


def test_training_stops_after_three_cycles_without_improvement(rule, monkeypatch):
    monkeypatch.setattr(WeightAverage, "update", _improve_twice())
    config = replace(SMALL, half_cycle=1)
    model = CrabNetModel(epochs=40, device="cpu", config=config).fit(rule)
    assert [epoch for epoch, _ in model.history] == [2, 4, 6, 8, 10]


def _improve_twice():
    answers = iter([True, False, True, False, False])
    return lambda *_: next(answers)


def test_bad_input_is_named(rule):
    labels = rule.y.copy()
    labels[3] = np.nan
    model = CrabNetModel(epochs=20, device="cpu", config=SMALL)
    with pytest.raises(ValueError, match="not fitted"):
        model.predict(rule)
    with pytest.raises(InvalidInputError, match=r"row 3 \(id LiCl2\): label nan"):
        model.fit(dataset(FORMULAS, labels))
    with pytest.raises(InvalidInputError, match="weights differ"):
        model.fit(dataset(FORMULAS, rule.y, np.arange(1.0, 61.0)))
    with pytest.raises(InvalidInputError, match="fewer than two rows"):
        model.fit(rule.select([0, 1]))
    with pytest.raises(ValueError, match="multiple of 20"):
        CrabNetModel(epochs=30, config=SMALL)
    with pytest.raises(ValueError, match="gate is 'sum'"):
        replace(SMALL, gate="sum")
