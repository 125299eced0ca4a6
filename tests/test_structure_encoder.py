"""The structure encoder against literal loops in double precision, and its symmetries."""

import doctest
from dataclasses import replace

import numpy as np
import pytest
import torch

from polysrl_dc import structure_encoder
from polysrl_dc.config import PolySRLConfig
from polysrl_dc.crystal import neighbor_list
from polysrl_dc.graphs import StoichiometryGraph, StructureBatch, StructureGraph
from polysrl_dc.structure_encoder import StructureEncoder

CONFIG = replace(PolySRLConfig.named("paper"), n_features=7, edge_hidden=11)


def crystal_graph(lattice, frac_coords):
    any_formula = StoichiometryGraph(np.array([1], np.uint8), np.array([1.0]), "H")
    edges = neighbor_list(lattice, frac_coords)
    return StructureGraph(np.ones(len(frac_coords), np.uint8), *edges, any_formula)


def make_encoder(**changes):
    """A float64 encoder in which no affine parameter is at its neutral start."""
    encoder = StructureEncoder(replace(CONFIG, **changes)).double().eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return encoder


def six_nodes():
    """Two graphs of four and two nodes, random edges, one node without any."""
    centers = torch.tensor([0, 0, 1, 1, 1, 2, 4, 4, 5])
    neighbors = torch.tensor([1, 3, 0, 2, 2, 1, 5, 4, 4])
    distances = 1 + 6 * torch.rand(9, dtype=torch.float64)
    return StructureBatch(torch.tensor([0, 0, 0, 0, 1, 1]), centers, neighbors, distances, 2)


def literal_mlp(mlp, x):
    """Linear, LayerNorm, PReLU, Linear written out on one vector."""
    first, norm, activation, last = mlp
    x = first.weight @ x + first.bias
    x = (x - x.mean()) / (((x - x.mean()) ** 2).mean() + norm.eps).sqrt() * norm.weight + norm.bias
    x = torch.stack([v if v > 0 else activation.weight[0] * v for v in x])
    return last.weight @ x + last.bias


def literal_forward(encoder, batch, pooling):
    """Equations 7, 8 and 1 with Python loops over nodes and edges."""
    edge_list = list(zip(batch.centers.tolist(), batch.neighbors.tolist(), strict=True))
    n_nodes = len(batch.index)
    h = [literal_mlp(encoder.node_encoder, encoder.site[0]) for _ in range(n_nodes)]
    b = []
    for d in batch.distances:
        basis = torch.stack([torch.exp(-(((d - 0.2 * k) / 0.2) ** 2)) for k in range(41)])
        b.append(literal_mlp(encoder.edge_encoder, basis))
    for block in encoder.blocks:
        b = [
            b[e]
            + literal_mlp([block.edge_input, *block.edge_output], torch.cat([h[i], h[j], b[e]]))
            for e, (i, j) in enumerate(edge_list)
        ]
        received = [torch.zeros(7, dtype=torch.float64) for _ in range(n_nodes)]
        for e, (i, _) in enumerate(edge_list):
            received[i] = received[i] + b[e]
        h = [
            h[i] + literal_mlp(block.node_mlp, torch.cat([h[i], received[i]]))
            for i in range(n_nodes)
        ]
    rows = []
    for g in range(batch.num_graphs):
        members = [h[i] for i in range(n_nodes) if batch.index[i] == g]
        z = sum(members) / (len(members) if pooling == "mean" else 1)
        rows.append(z / (z @ z).sqrt())
    return torch.stack(rows)


def test_docstrings_run():
    assert doctest.testmod(structure_encoder).failed == 0


@pytest.mark.parametrize("pooling", ["sum", "mean"])
def test_equals_a_literal_loop(pooling):
    encoder, batch = make_encoder(structure_pooling=pooling), six_nodes()
    expected = literal_forward(encoder, batch, pooling)
    # basis centers are float32 constants converted to double: 2e-8 relative
    torch.testing.assert_close(encoder(batch), expected, atol=1e-6, rtol=1e-6)


def test_has_the_published_sizes():
    encoder = StructureEncoder(PolySRLConfig.named("paper"))
    assert len(encoder.blocks) == 3
    assert [encoder.blocks[0].edge_input.weight.shape] == [(400, 600)]
    centers = encoder.distance_basis.centers
    assert len(centers) == 41 and centers[-1] == 8.0
    assert not any("centers" in name for name in encoder.state_dict())


def test_unit_length_and_independence_of_the_rest_of_the_batch():
    encoder, batch = make_encoder(), six_nodes()
    both = encoder(batch)
    torch.testing.assert_close(both.norm(dim=-1), torch.ones(2, dtype=torch.float64))
    alone = StructureBatch(
        batch.index[:4], batch.centers[:6], batch.neighbors[:6], batch.distances[:6], 1
    )
    torch.testing.assert_close(encoder(alone)[0], both[0])


def test_permutation_of_nodes_and_edges():
    encoder, batch = make_encoder(), six_nodes()
    order = torch.tensor([2, 0, 3, 1, 5, 4])  # new position of each node; graphs stay together
    edges = torch.randperm(9)
    permuted = StructureBatch(
        batch.index,
        order[batch.centers][edges],
        order[batch.neighbors][edges],
        batch.distances[edges],
        2,
    )
    torch.testing.assert_close(encoder(permuted), encoder(batch))


def test_direction_of_edges_matters():
    encoder, batch = make_encoder(), six_nodes()
    turned = replace(batch, centers=batch.neighbors, neighbors=batch.centers)
    assert (encoder(turned) - encoder(batch)).abs().max() > 1e-3


def test_supercell_has_the_embedding_of_the_cell():
    """Rutile: under mean pooling always; under sum pooling because of the L2 normalization."""
    lattice = np.diag([4.59, 4.59, 2.96])
    frac = np.array(
        [
            [0, 0, 0],
            [0.5, 0.5, 0.5],
            [0.305, 0.305, 0],
            [0.695, 0.695, 0],
            [0.805, 0.195, 0.5],
            [0.195, 0.805, 0.5],
        ]
    )
    supercell = np.concatenate([frac, frac + np.array([0, 0, 1])]) / [1, 1, 2]
    other = crystal_graph(lattice * 1.05, frac)
    for pooling in ("mean", "sum"):
        encoder = make_encoder(structure_pooling=pooling)
        graphs = [
            crystal_graph(lattice, frac),
            crystal_graph(lattice * [1, 1, 2], supercell),
            other,
        ]
        batch = StructureBatch.from_graphs(graphs)
        z = encoder(replace(batch, distances=batch.distances.double()))
        torch.testing.assert_close(z[1], z[0], atol=1e-4, rtol=0)
        assert (z[2] - z[0]).abs().max() > 1e-2


def test_gradients_reach_every_parameter():
    encoder = make_encoder()
    (encoder(six_nodes()) * torch.rand(2, 7)).sum().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_gradient_is_right():
    encoder, batch = make_encoder(), six_nodes()
    distances = batch.distances.requires_grad_()
    assert torch.autograd.gradcheck(lambda d: encoder(replace(batch, distances=d)), distances)


def test_feature_norm_is_over_the_batch_and_before_the_unit_length():
    encoder, batch = make_encoder(), six_nodes()
    normed = make_encoder(feature_norm=True).train()
    normed.load_state_dict(encoder.state_dict())
    pooled = []
    normed.norm.register_forward_pre_hook(lambda _, inputs: pooled.append(inputs[0]))
    z = normed(batch)
    x = (pooled[0] - pooled[0].mean(0)) / (pooled[0].var(0, unbiased=False) + 1e-5).sqrt()
    torch.testing.assert_close(z, x / x.norm(dim=1, keepdim=True))


def test_structures_without_edges():
    empty = torch.zeros(0, dtype=torch.int64)
    batch = StructureBatch(torch.tensor([0, 1, 1]), empty, empty, torch.zeros(0), 2)
    z = StructureEncoder(CONFIG)(batch)
    torch.testing.assert_close(z.norm(dim=-1), torch.ones(2))


def test_runs_in_bfloat16_autocast():
    rng = np.random.default_rng(0)
    graphs = [crystal_graph(6 * np.eye(3), rng.random((5, 3))) for _ in range(3)]
    batch = StructureBatch.from_graphs(graphs)
    encoder = StructureEncoder(CONFIG).eval()
    with torch.autocast("cpu", torch.bfloat16):
        z = encoder(batch)
    assert z.dtype == torch.float32
    torch.testing.assert_close(z, encoder(batch), atol=0.05, rtol=0)
