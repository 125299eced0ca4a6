"""The stoichiometry encoder against literal forms in double precision, and feature norms."""

from dataclasses import replace

import numpy as np
import pytest
import reference
import torch
from torch.nn import functional
from torch_geometric.data import Batch
from torch_geometric.nn.aggr import Set2Set

from polysrl_dc.config import PolySRLConfig
from polysrl_dc.graphs import StoichiometryBatch
from polysrl_dc.layers import CompositionSet2Set, FeatureNorm
from polysrl_dc.stoichiometry_encoder import StoichiometryEncoder

PAPER = PolySRLConfig.named("paper")


def make_encoder(**changes):
    """A float64 encoder with weights well away from their start, in evaluation mode."""
    encoder = StoichiometryEncoder(replace(PAPER, **changes)).double().eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        buffers = dict(encoder.mean_norm.named_buffers())
        buffers["running_mean"].normal_()
        buffers["running_var"].uniform_(0.5, 2)
    return encoder


def random_formulas(n=24):
    """Graphs of one to six elements as (numbers, fractions), in random order."""
    generator = np.random.default_rng(1)
    formulas = []
    for i in range(n):
        numbers = generator.choice(np.arange(1, 104), 1 + i % 6, replace=False)
        amounts = generator.uniform(0.05, 5, len(numbers))
        formulas.append((torch.tensor(numbers), torch.tensor(amounts / amounts.sum())))
    return formulas


def to_batch(formulas):
    fractions = torch.zeros(len(formulas), 119, dtype=torch.float64)
    for row, (numbers, amounts) in zip(fractions, formulas, strict=True):
        row[numbers] = amounts
    return StoichiometryBatch(fractions)


def published(encoder, formulas):
    """Equations 9 to 12 by PyTorch Geometric's GCN and Set2Set with the same weights."""
    literal = reference.ReferenceStoichiometryEncoder(encoder.config).double().eval()
    reference.load_weights(literal, encoder.state_dict())
    data = [reference._formula_data(z.tolist(), r.tolist()) for z, r in formulas]
    batch = Batch.from_data_list(data)
    batch.fractions = torch.cat([fractions for _, fractions in formulas])
    return literal, literal(batch)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"n_features": 16},
        {"n_features": 24, "feature_norm": True},
        {"n_features": 8, "stoichiometry_layers": 1, "set2set_steps": 1},
        {"n_features": 8, "stoichiometry_layers": 5, "set2set_steps": 4},
    ],
    ids=str,
)
def test_fast_form_equals_the_literal_one(changes):
    encoder = make_encoder(**changes)
    formulas = random_formulas()
    mean, log_sigma = encoder(to_batch(formulas))
    _, (expected_mean, expected_log_sigma) = published(encoder, formulas)
    torch.testing.assert_close(mean, expected_mean, rtol=0, atol=1e-10)
    torch.testing.assert_close(log_sigma, expected_log_sigma, rtol=0, atol=1e-10)
    torch.testing.assert_close(encoder.mean(to_batch(formulas)), mean, rtol=0, atol=1e-12)


def test_gradients_equal_those_of_the_literal_form():
    encoder = make_encoder(n_features=8)
    formulas = random_formulas(6)

    literal, outputs = published(encoder, formulas)

    def gradient(weight, mean, log_sigma):
        return torch.autograd.grad(mean[:, 0].sum() + log_sigma.sum(), weight)[0]

    fast = gradient(encoder.input.weight, *encoder(to_batch(formulas)))
    slow = gradient(literal.input.weight, *outputs)
    torch.testing.assert_close(fast, slow, rtol=0, atol=1e-10)
    assert fast.abs().max() > 1e-3


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_messages_by_fraction_equal_a_loop_over_the_elements(power):
    encoder = make_encoder(n_features=16, message_power=power)
    formulas = random_formulas(12)
    elements, graphs = encoder.embed_elements(to_batch(formulas).fractions)
    for row, (numbers, fractions) in enumerate(formulas):
        h = [encoder.input(encoder.element_features[z]) for z in numbers]
        levels = [[vector] for vector in h]
        weights = fractions**power / (fractions**power).sum()
        for convolution in encoder.convolutions:
            message = sum(weight * vector for weight, vector in zip(weights, h, strict=True))
            h = [vector + functional.elu(convolution(message)) for vector in h]
            for level, vector in zip(levels, h, strict=True):
                level.append(vector)
        for number, level in zip(numbers, levels, strict=True):
            expected = encoder.jumping_knowledge(torch.cat(level))
            torch.testing.assert_close(elements[number] + graphs[row], expected)


def test_a_trace_of_an_element_fades_out_with_the_power_of_its_fraction():
    pure = (torch.tensor([11, 17]), torch.tensor([0.5, 0.5], dtype=torch.float64))
    change = {}
    for power in (0.0, 0.5, 1.0):
        encoder = make_encoder(n_features=32, message_power=power)
        before = encoder.embed_elements(to_batch([pure]).fractions)[1]
        for trace in (1e-4, 1e-6):
            fractions = torch.tensor([0.5 - trace, 0.5, trace], dtype=torch.float64)
            doped = to_batch([(torch.tensor([11, 17, 26]), fractions)]).fractions
            after = encoder.embed_elements(doped)[1]
            change[power, trace] = (after - before).abs().max().item()
    assert change[0.0, 1e-6] == pytest.approx(change[0.0, 1e-4], rel=1e-2)
    assert change[0.5, 1e-6] == pytest.approx(change[0.5, 1e-4] / 10, rel=0.2)
    assert change[1.0, 1e-6] == pytest.approx(change[1.0, 1e-4] / 100, rel=0.2)


def test_gcn_layers_start_as_the_configuration_says():
    """Glorot: weights to sqrt(6 / 2 F), no bias; linear: both to 1 / sqrt(F), as torch has it."""
    for name, greatest in (("glorot", (6 / 400) ** 0.5), ("linear", 200**-0.5)):
        encoder = StoichiometryEncoder(replace(PAPER, convolution_init=name))
        for layer in encoder.convolutions:
            assert layer.weight.abs().max().item() == pytest.approx(greatest, rel=0.01)
            assert layer.bias.any() == (name == "linear")


def test_log_sigma_shift_is_added_to_log_sigma_only():
    encoder = make_encoder(n_features=8)
    shifted = StoichiometryEncoder(replace(encoder.config, log_sigma_shift=-3.0)).double().eval()
    shifted.load_state_dict(encoder.state_dict())
    batch = to_batch(random_formulas(6))
    (mean, log_sigma), (same, lower) = encoder(batch), shifted(batch)
    assert torch.equal(mean, same)
    torch.testing.assert_close(lower, log_sigma - 3)


def test_result_does_not_depend_on_the_order_or_company_of_formulas():
    encoder = make_encoder(n_features=16)
    batch = to_batch(random_formulas())
    mean, log_sigma = encoder(batch)
    order = torch.randperm(len(batch))
    for i, part in enumerate(encoder(batch[order])):
        torch.testing.assert_close(part, (mean, log_sigma)[i][order], rtol=0, atol=1e-12)
    alone = encoder(batch[5:6])[0]
    torch.testing.assert_close(alone, mean[5:6], rtol=0, atol=1e-12)


def test_mean_has_unit_length_and_depends_on_fractions_and_elements():
    encoder = make_encoder(n_features=16)
    sodium, chlorine, potassium = 11, 17, 19
    pair = torch.tensor([0.5, 0.5], dtype=torch.float64)
    skew = torch.tensor([0.4, 0.6], dtype=torch.float64)
    mean, _ = encoder(
        to_batch(
            [
                (torch.tensor([sodium, chlorine]), pair),
                (torch.tensor([sodium, chlorine]), skew),
                (torch.tensor([potassium, chlorine]), pair),
            ]
        )
    )
    torch.testing.assert_close(mean.norm(dim=-1), torch.ones(3, dtype=torch.float64))
    assert (mean[0] - mean[1]).norm() > 1e-3 and (mean[0] - mean[2]).norm() > 1e-3


def test_set2set_equals_that_of_pyg_on_plain_sets():
    pool = CompositionSet2Set(5, processing_steps=3).double()
    reference = Set2Set(5, processing_steps=3).double()
    reference.lstm.load_state_dict(pool.lstm.state_dict())
    elements = torch.randn(4, 5, dtype=torch.float64)
    fractions = torch.tensor([[1.0, 1, 0, 0], [0, 1, 1, 1]], dtype=torch.float64)
    nodes, index = elements[[0, 1, 1, 2, 3]], torch.tensor([0, 0, 1, 1, 1])
    pooled = pool(fractions, elements, torch.zeros(2, 5, dtype=torch.float64))
    torch.testing.assert_close(pooled, reference(nodes, index), rtol=0, atol=1e-12)


def test_feature_norm_takes_a_batch_of_one_and_stays_in_training():
    norm = FeatureNorm(3, enabled=True).train()
    assert norm(torch.ones(1, 3)).isfinite().all() and norm.training
    rows = torch.randn(50, 3) * 4 + 2
    normalized = norm(rows)
    torch.testing.assert_close(normalized.mean(0), torch.zeros(3), rtol=0, atol=1e-5)
    off = FeatureNorm(3, enabled=False).train()
    assert off(rows) is rows and dict(off.named_buffers())["running_mean"].eq(0).all()


def correlated_rows(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(n, 1, generator=generator)
    return 3 * (torch.randn(n, 6, generator=generator) + 2 * common) + 5


def distance_from_identity(rows):
    return (torch.cov(rows.T) - torch.eye(rows.shape[1])).abs().max().item()


def whitened(whitening, adaptive=True, steps=300):
    norm = FeatureNorm(6, enabled=True, whitening=whitening).train()
    norm.adaptive = adaptive
    for step in range(steps):
        norm(correlated_rows(64, step))
    return norm.eval()


def test_whitening_removes_correlations_once_adapted():
    rows = correlated_rows(5000, seed=999)
    none, half, full = (distance_from_identity(whitened(a)(rows)) for a in (0.0, 0.5, 1.0))
    assert none > 0.7 and full < 0.15 and full < half < none
    plain, all_of_it = whitened(0.0)(rows), whitened(1.0)
    torch.testing.assert_close(all_of_it(rows), plain @ all_of_it.decorrelation)
    # C^(-1) of the covariance that was followed
    product = all_of_it.decorrelation @ all_of_it.covariance @ all_of_it.decorrelation
    torch.testing.assert_close(product, torch.eye(6), atol=1e-3, rtol=0)


def test_whitening_adapts_in_training_and_only_when_asked():
    asleep = whitened(1.0, adaptive=False)
    assert torch.equal(asleep.decorrelation, torch.eye(6))
    assert not FeatureNorm(6, enabled=True, whitening=1.0).adaptive
    awake = whitened(1.0)
    before = awake.decorrelation.clone()
    awake(correlated_rows(64) * torch.arange(1.0, 7))  # evaluation
    assert torch.equal(awake.decorrelation, before) and not torch.equal(before, torch.eye(6))
    rows = correlated_rows(64).requires_grad_()
    awake.train()(rows).square().sum().backward()
    assert rows.grad.isfinite().all() and not awake.decorrelation.requires_grad


def test_a_batch_has_a_fiftieth_of_the_weight_in_the_covariance():
    norm = FeatureNorm(6, enabled=True, whitening=1.0).train()
    norm.adaptive = True
    rows = correlated_rows(64, 0)
    normalized = (rows - rows.mean(0)) / rows.std(0, unbiased=False)
    norm(rows)
    expected = 0.98 * torch.eye(6) + 0.02 * normalized.T @ normalized / 64
    torch.testing.assert_close(norm.covariance, expected, atol=1e-5, rtol=0)


def test_whitening_is_kept_in_buffers():
    adapted = whitened(1.0)
    state = adapted.state_dict()
    assert {"covariance", "decorrelation", "running_mean", "running_var"} <= set(state)
    assert not {"covariance", "decorrelation"} & set(FeatureNorm(6, enabled=True).state_dict())
    loaded = FeatureNorm(6, enabled=True, whitening=1.0).eval()
    loaded.load_state_dict(state)
    rows = correlated_rows(10)
    assert torch.equal(loaded(rows), adapted(rows))


def test_from_pooling_on_all_is_in_float32_under_autocast():
    encoder = StoichiometryEncoder(replace(PAPER, feature_norm=True, whitening=0.5)).eval()
    batch = StoichiometryBatch(to_batch(random_formulas()).fractions.float())
    kinds = []
    for module in (encoder.mean_output, encoder.sigma_output, encoder.mean_norm):
        module.register_forward_hook(lambda _, inputs, out: kinds.extend((*inputs, out)))
    with torch.no_grad():
        mean, log_sigma = encoder(batch)
        with torch.autocast("cpu", torch.bfloat16):
            half = encoder(batch)
    assert {tensor.dtype for tensor in (*kinds, *half)} == {torch.float32}
    torch.testing.assert_close(half[0].norm(dim=1), torch.ones(len(mean)))  # not within 0.4 %
    assert not torch.equal(half[0], mean) and (half[0] - mean).norm(dim=1).mean() < 0.01
    assert not torch.equal(half[1], log_sigma) and (half[1] - log_sigma).abs().max() < 0.01


@pytest.mark.parametrize("whitening", [0.0, 1.0])
def test_feature_norm_of_an_encoder_follows_the_configuration(whitening):
    config = replace(PAPER, n_features=8, feature_norm=True, whitening=whitening)
    norm = StoichiometryEncoder(config).mean_norm
    assert norm.enabled and norm.whitening == whitening
