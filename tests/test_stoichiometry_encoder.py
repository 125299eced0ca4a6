"""The stoichiometry encoder against a literal form on node and edge lists in double precision."""

import doctest
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional
from torch_geometric.data import Batch, Data
from torch_geometric.nn import GCNConv
from torch_geometric.nn.aggr import Set2Set
from torch_geometric.utils import scatter

from polysrl_dc import layers, stoichiometry_encoder
from polysrl_dc.config import PolySRLConfig
from polysrl_dc.elements import element_features
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


def copied(linear, module):
    """``module`` in double precision with weight and bias of ``linear``."""
    module = module.double()
    weight = module.lin.weight if isinstance(module, GCNConv) else module.weight
    with torch.no_grad():
        weight.copy_(linear.weight)
        module.bias.copy_(linear.bias)
    return module


def literal_forward(encoder, formulas):
    """Equations 9 to 12 by PyTorch Geometric's GCN, scatter and Set2Set."""
    width = encoder.config.n_features
    data = []
    for numbers, fractions in formulas:
        others = torch.tensor(
            [(i, j) for i in range(len(numbers)) for j in range(len(numbers)) if i != j],
            dtype=torch.int64,
        ).reshape(-1, 2)
        data.append(Data(z=numbers, r=fractions, edge_index=others.T, num_nodes=len(numbers)))
    graph = Batch.from_data_list(data)
    table = torch.tensor(element_features().astype(np.float64))
    h = encoder.input(table[graph.z])
    levels = [h]
    for linear in encoder.convolutions:
        convolution = copied(linear, GCNConv(width, width, add_self_loops=True, normalize=True))
        h = h + functional.elu(convolution(h, graph.edge_index))
        levels.append(h)
    z = encoder.jumping_knowledge(torch.cat(levels, dim=-1))
    weighted = graph.r.unsqueeze(-1) * z
    pooled = scatter(weighted, graph.batch, dim=0, reduce="sum")

    def set2set(ours):
        pool = Set2Set(width, processing_steps=encoder.config.set2set_steps).double()
        pool.lstm.load_state_dict(ours.lstm.state_dict())
        return pool(weighted, graph.batch)

    mean = encoder.mean_output(set2set(encoder.mean_pooling)) + pooled
    if encoder.config.feature_norm:
        norm = encoder.mean_norm
        mean = (mean - norm.running_mean) / (norm.running_var + norm.eps).sqrt()
    log_sigma = encoder.sigma_output(set2set(encoder.sigma_pooling)) + pooled
    return mean / mean.norm(dim=-1, keepdim=True), log_sigma


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
    expected_mean, expected_log_sigma = literal_forward(encoder, formulas)
    torch.testing.assert_close(mean, expected_mean, rtol=0, atol=1e-10)
    torch.testing.assert_close(log_sigma, expected_log_sigma, rtol=0, atol=1e-10)
    torch.testing.assert_close(encoder.mean(to_batch(formulas)), mean, rtol=0, atol=1e-12)


def test_gradients_equal_those_of_the_literal_form():
    encoder = make_encoder(n_features=8)
    formulas = random_formulas(6)

    def gradient(mean, log_sigma):
        return torch.autograd.grad(mean[:, 0].sum() + log_sigma.sum(), encoder.input.weight)[0]

    fast = gradient(*encoder(to_batch(formulas)))
    literal = gradient(*literal_forward(encoder, formulas))
    torch.testing.assert_close(fast, literal, rtol=0, atol=1e-10)
    assert fast.abs().max() > 1e-3


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


@pytest.mark.parametrize("module", [stoichiometry_encoder, layers])
def test_examples(module):
    names = {"torch": torch, "PolySRLConfig": PolySRLConfig}
    result = doctest.testmod(module, extraglobs=names)
    assert result.attempted and not result.failed
