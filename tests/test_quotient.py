"""Merged graphs give what all sites and edges give, and merge no more than that allows."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from crystals import (
    PROTOTYPES,
    embed,
    embed_all_sites,
    graph_of,
    isolated,
    make_encoder,
    prototype_graphs,
    published,
    random_covers,
)
from pymatgen.core import Lattice, Structure
from reference import reference_name

from polysrl_dc.featurizers import StructureGraphFeaturizer
from polysrl_dc.graphs import StructureBatch
from polysrl_dc.quotient import quotient_graphs

SOURCES = [prototype_graphs, random_covers, isolated]


def merged(graphs, rounds=3, resolution=1e-5):
    return quotient_graphs(
        np.array([len(graph.numbers) for graph in graphs], dtype=np.int64),
        np.concatenate([np.empty(0, np.int64), *(np.diff(graph.indptr) for graph in graphs)]),
        np.concatenate([np.empty(0, np.int32), *(graph.neighbors for graph in graphs)]),
        np.concatenate([np.empty(0), *(graph.distances for graph in graphs)]).astype(np.float64),
        rounds=rounds,
        resolution=resolution,
    )


def chain(n, distance=2.0):
    """Sites in a row, each seeing the sites beside it."""
    beside = [[j for j in (i - 1, i + 1) if 0 <= j < n] for i in range(n)]
    return graph_of([len(b) for b in beside], np.concatenate(beside), [distance] * (2 * n - 2))


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("pooling", ["sum", "mean"])
def test_embeddings_and_gradients_equal_those_of_all_sites_and_edges(source, pooling):
    graphs = source()
    encoder = make_encoder(structure_pooling=pooling)
    literal = published(encoder, structure_pooling=pooling)
    ours, theirs = embed(encoder, graphs), embed_all_sites(literal, graphs)
    torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=0)
    weights = torch.randn_like(ours)
    (ours * weights).sum().backward()
    (theirs * weights).sum().backward()
    expected = dict(literal.named_parameters())
    largest = 0.0
    for ours_name, parameter in encoder.named_parameters():
        name = reference_name(ours_name)
        torch.testing.assert_close(parameter.grad, expected[name].grad, atol=1e-9, rtol=1e-9)
        largest = max(largest, parameter.grad.abs().max().item())
    assert largest > 1e-2


@pytest.mark.parametrize("layers", [1, 2, 4])
def test_as_many_rounds_as_blocks_or_more(layers):
    graphs = [*random_covers(4), chain(7)]
    encoder = make_encoder(structure_layers=layers)
    theirs = embed_all_sites(published(encoder, structure_layers=layers), graphs)
    for rounds in (layers, layers + 3):
        ours = embed(encoder, graphs, rounds=rounds)
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=0)
    if layers > 1:
        with pytest.raises(ValueError, match=f"{layers} blocks.*{layers - 1} rounds"):
            embed(encoder, graphs, rounds=layers - 1)


def test_fewer_rounds_would_be_wrong():
    """The refusal guards something: a batch that claims more rounds than it had is off."""
    graphs, encoder = [chain(7)], make_encoder()
    batch = StructureBatch.from_graphs(graphs, rounds=1)
    literal = embed_all_sites(published(encoder), graphs)
    claimed = encoder(replace(batch, rounds=3, **{k: getattr(batch, k).double() for k in (
        "multiplicity", "edge_multiplicity", "distances")}))  # fmt: skip
    assert (claimed - literal).abs().max() > 1e-6


def test_each_round_tells_the_ends_of_a_chain_apart_one_site_further():
    sites = [merged([chain(9)], rounds=rounds).multiplicity.tolist() for rounds in range(6)]
    assert sites == [[9], [2, 7], [2, 2, 5], [2, 2, 2, 3], [2, 2, 2, 2, 1], [2, 2, 2, 2, 1]]


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("rounds", [1, 3])
def test_nothing_is_lost(source, rounds):
    graphs = source()
    found = merged(graphs, rounds)
    sites = np.array([len(graph.numbers) for graph in graphs])
    assert (found.node_counts <= sites).all() and (found.node_counts > 0).all()
    node_graph = np.repeat(np.arange(len(graphs)), found.node_counts)
    np.testing.assert_array_equal(np.bincount(node_graph, found.multiplicity), sites)
    node = np.repeat(np.arange(len(found.multiplicity)), found.edge_counts)
    assert (found.neighbors < found.node_counts[node_graph[node]]).all()
    # every site of a node has all the edges of the node
    edges = np.bincount(
        node_graph[node], found.edge_multiplicity * found.multiplicity[node], len(graphs)
    )
    np.testing.assert_array_equal(edges, [len(graph.neighbors) for graph in graphs])
    lengths = np.sort(np.repeat(found.steps, found.edge_multiplicity * found.multiplicity[node]))
    expected = np.sort(np.rint(np.concatenate([g.distances for g in graphs]) / 1e-5))
    np.testing.assert_array_equal(lengths, expected)


def test_symmetry_merges_sites():
    salt = Structure.from_spacegroup(
        "Fm-3m", Lattice.cubic(5.6), ["Na", "Cl"], [[0.0] * 3, [0.5] * 3]
    )
    diamond = Structure.from_spacegroup("Fd-3m", Lattice.cubic(3.57), ["C"], [[0.0] * 3])
    graphs = StructureGraphFeaturizer(max_neighbors=6)([salt, diamond, salt])
    found = merged(graphs)
    assert found.node_counts.tolist() == [1, 1, 1] and found.multiplicity.tolist() == [8, 8, 8]
    assert found.edge_multiplicity.tolist()[:1] == [6]
    whole = merged(prototype_graphs())
    assert len(whole.multiplicity) < 0.6 * sum(map(len, PROTOTYPES))


def test_copies_of_a_site_are_merged_and_nothing_beyond_what_differs():
    rng = np.random.default_rng(3)
    for graph in random_covers():
        found = merged([graph], rounds=20)
        # literal color refinement
        colors = [0] * len(graph.numbers)
        for _ in range(20):
            signatures = [
                (colors[i], *sorted(
                    (float(graph.distances[e]), colors[graph.neighbors[e]])
                    for e in range(graph.indptr[i], graph.indptr[i + 1])
                ))
                for i in range(len(colors))
            ]  # fmt: skip
            names = {signature: k for k, signature in enumerate(dict.fromkeys(signatures))}
            colors = [names[signature] for signature in signatures]
        np.testing.assert_array_equal(found.multiplicity, np.bincount(colors))
    assert merged([graph_of([0] * 5, [], [])]).multiplicity.tolist() == [5]
    ring = graph_of([2] * 6, [1, 5, 0, 2, 1, 3, 2, 4, 3, 5, 0, 4], rng.permutation(12) / 2 + 1)
    assert merged([ring]).multiplicity.tolist() == [1] * 6


def test_which_neighbor_is_at_which_distance_matters():
    """Two sites with the same distances and the same neighbors, but the other way round."""
    graph = graph_of([2, 2, 1, 1], [2, 3, 2, 3, 2, 3], [1.0, 2.0, 2.0, 1.0, 5.0, 6.0])
    assert merged([graph]).multiplicity.tolist() == [1, 1, 1, 1]


def test_resolution_decides_which_distances_are_equal():
    graph = graph_of([1, 1], [1, 0], [2.001, 2.004])
    assert merged([graph], resolution=0.01).multiplicity.tolist() == [2]
    assert merged([graph], resolution=0.001).multiplicity.tolist() == [1, 1]
    assert merged([graph], resolution=0.001).steps.tolist() == [2001, 2004]


#: 12 neighbors end at a complete shell, so that no cell can choose others among equal ones.
COMPLETE = {
    "copper": Structure.from_spacegroup("Fm-3m", Lattice.cubic(3.6), ["Cu"], [[0.0] * 3]),
    "magnesium": Structure(
        Lattice.hexagonal(3.21, 5.3), ["Mg"] * 2, [[1 / 3, 2 / 3, 0.25], [2 / 3, 1 / 3, 0.75]]
    ),
    "no symmetry": Structure(
        Lattice([[5.1, 0.4, 0], [0.2, 4.6, 1.1], [0.9, 0, 6.2]]),
        ["Si", "O", "O", "Al"],
        np.random.default_rng(5).permutation(12).reshape(4, 3) / 12 + 0.03,
    ),
}


def variants(structure):
    rng = np.random.default_rng(0)
    rotation = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    lattice, coords = structure.lattice.matrix, structure.frac_coords
    species = structure.species
    order = rng.permutation(len(structure))
    return {
        "supercell": structure * (2, 1, 3),
        "permuted": Structure(lattice, [species[i] for i in order], coords[order]),
        "rotated": Structure(lattice @ rotation, species, coords),
        "mirrored": Structure(lattice * [1, 1, -1], species, coords),
        "translated": Structure(lattice, species, coords + rng.random(3)),
        "other unit vectors": Structure(
            np.array([[1, 0, 0], [2, 1, 0], [-1, 1, 1]]) @ lattice,
            species,
            coords @ np.linalg.inv([[1, 0, 0], [2, 1, 0], [-1, 1, 1]]),
        ),
    }


@pytest.mark.parametrize("name", COMPLETE)
@pytest.mark.parametrize("pooling", ["mean", "sum"])
def test_invariance(name, pooling):
    """To 1e-4 of unit length: distances are rounded to 1e-5 Å, up or down."""
    structure, encoder = COMPLETE[name], make_encoder(structure_pooling=pooling)
    others = variants(structure)
    strained = structure.copy()
    strained.apply_strain(0.03)
    graphs = StructureGraphFeaturizer()([structure, strained, *others.values()])
    z = embed(encoder, graphs)
    for row, what in enumerate(others, start=2):
        torch.testing.assert_close(z[row], z[0], atol=1e-4, rtol=0, msg=what)
    assert (z[1] - z[0]).abs().max() > 1e-3
    counts = merged(graphs, resolution=0.001).node_counts
    assert counts[2] <= len(structure)  # a supercell has no more nodes than the cell


def test_limits_are_refused_and_nothing_is_fine():
    assert merged([]).node_counts.shape == (0,) and merged([]).steps.shape == (0,)
    with pytest.raises(ValueError, match="steps of distance"):
        merged([graph_of([1, 1], [1, 0], [12.0, 12.0])])
    assert merged([graph_of([1, 1], [1, 0], [12.0, 12.0])], resolution=1e-4).steps[0] == 120_000
