"""The structure encoder: symmetries, gradients, batches without edges, low precision.

``test_quotient.py`` compares it with the published form on all sites and edges.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from crystals import CONFIG, double, graph_of, make_encoder

from polysrl_dc.config import PolySRLConfig
from polysrl_dc.graphs import StructureBatch
from polysrl_dc.structure_encoder import GaussianBasis, StructureEncoder


def six_nodes():
    """Two graphs of four and two sites without symmetry, one site without any edge."""
    rng = np.random.default_rng(0)
    return [
        graph_of([2, 3, 1, 0], [1, 3, 0, 2, 2, 1], rng.uniform(1, 7, 6).round(2)),
        graph_of([2, 1], [1, 0, 0], rng.uniform(1, 7, 3).round(2)),
    ]


def make_batch(graphs=None):
    return double(StructureBatch.from_graphs(six_nodes() if graphs is None else graphs))


def test_the_distance_basis_is_that_of_equation_7():
    d = torch.linspace(0.1, 9, 20, dtype=torch.float64)
    found = GaussianBasis(41, 0.2).double()(d)
    expected = [[np.exp(-(((x - 0.2 * k) / 0.2) ** 2)) for k in range(41)] for x in d.tolist()]
    # centers are float32 constants
    torch.testing.assert_close(found, torch.tensor(expected).double(), atol=5e-6, rtol=0)


def test_has_the_published_sizes():
    encoder = StructureEncoder(PolySRLConfig.named("paper"))
    assert len(encoder.blocks) == 3
    assert [encoder.blocks[0].edge_input.weight.shape] == [(400, 600)]
    centers = encoder.distance_basis.centers
    assert len(centers) == 41 and centers[-1] == 8.0
    assert not any("centers" in name for name in encoder.state_dict())


@pytest.mark.parametrize("pooling", ["sum", "mean"])
def test_unit_length_and_independence_of_the_rest_of_the_batch(pooling):
    encoder = make_encoder(structure_pooling=pooling)
    both = encoder(make_batch())
    torch.testing.assert_close(both.norm(dim=-1), torch.ones(2, dtype=torch.float64))
    alone = encoder(make_batch(six_nodes()[:1]))
    torch.testing.assert_close(alone[0], both[0])
    assert (both[0] - both[1]).abs().max() > 1e-2


def test_permutation_of_nodes_and_edges():
    encoder, batch = make_encoder(), make_batch()
    order = torch.tensor([2, 0, 3, 1, 5, 4])  # new position of each node; graphs stay together
    edges = torch.randperm(9)
    multiplicity = torch.empty_like(batch.multiplicity)
    multiplicity[order] = batch.multiplicity
    permuted = replace(
        batch,
        multiplicity=multiplicity,
        centers=order[batch.centers][edges],
        neighbors=order[batch.neighbors][edges],
        edge_multiplicity=batch.edge_multiplicity[edges],
        distance_index=batch.distance_index[edges],
    )
    torch.testing.assert_close(encoder(permuted), encoder(batch))


def test_direction_of_edges_and_multiplicities_matter():
    encoder, batch = make_encoder(), make_batch()
    assert len(batch.index) == 6 and (batch.multiplicity == 1).all()
    changed = [
        replace(batch, centers=batch.neighbors, neighbors=batch.centers),
        replace(batch, multiplicity=batch.multiplicity + torch.arange(6)),
        replace(batch, edge_multiplicity=batch.edge_multiplicity + 1),
    ]
    for other in changed:
        assert (encoder(other) - encoder(batch)).abs().max() > 1e-3


def test_gradients_reach_every_parameter():
    encoder = make_encoder()
    (encoder(make_batch()) * torch.rand(2, 7)).sum().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_gradient_is_right():
    encoder, batch = make_encoder(), make_batch()
    distances = batch.distances.requires_grad_()
    assert torch.autograd.gradcheck(lambda d: encoder(replace(batch, distances=d)), distances)


def test_feature_norm_is_over_the_batch_and_before_the_unit_length():
    encoder, batch = make_encoder(), make_batch()
    normed = make_encoder(feature_norm=True).train()
    normed.load_state_dict(encoder.state_dict())
    pooled = []
    normed.norm.register_forward_pre_hook(lambda _, inputs: pooled.append(inputs[0]))
    z = normed(batch)
    x = (pooled[0] - pooled[0].mean(0)) / (pooled[0].var(0, unbiased=False) + 1e-5).sqrt()
    torch.testing.assert_close(z, x / x.norm(dim=1, keepdim=True))


def test_structures_without_edges():
    batch = StructureBatch.from_graphs([graph_of([0], [], []), graph_of([0, 0], [], [])])
    assert batch.index.tolist() == [0, 1] and batch.multiplicity.tolist() == [1, 2]
    z = StructureEncoder(CONFIG)(batch)
    torch.testing.assert_close(z.norm(dim=-1), torch.ones(2))
    torch.testing.assert_close(z[0], z[1])


def test_runs_in_bfloat16_autocast():
    batch = StructureBatch.from_graphs(six_nodes())
    encoder = StructureEncoder(CONFIG).eval()
    with torch.autocast("cpu", torch.bfloat16):
        z = encoder(batch)
    assert z.dtype == torch.float32
    torch.testing.assert_close(z, encoder(batch), atol=0.05, rtol=0)
