"""Graphs to PyTorch Geometric and back, and what a batch holds."""

import pickle

import numpy as np
import pytest
import torch
from pymatgen.core import Lattice, Structure
from torch_geometric.data import Batch

import polysrl_dc
from polysrl_dc.graphs import (
    StoichiometryBatch,
    StoichiometryGraph,
    StructureBatch,
    StructureGraph,
)

FORMULAS = ["NaCl", "Fe2O3", "Xe", "LiFePO4"]


def stoichiometry_graphs():
    return list(polysrl_dc.StoichiometryGraphFeaturizer()(FORMULAS))


def structure_graphs():
    box = Lattice.cubic(30)
    return list(
        polysrl_dc.StructureGraphFeaturizer()(
            [
                Structure.from_spacegroup(
                    "Fm-3m", Lattice.cubic(5.69), ["Na", "Cl"], [[0.0] * 3, [0.5] * 3]
                ),
                Structure(box, ["He"], [[0, 0, 0]]),
                Structure(box, ["H", "F", "Ar"], [[0.0] * 3, [0.1, 0.0, 0.0], [0.5] * 3]),
            ]
        )
    )


PUBLIC = {
    StoichiometryGraph: ("numbers", "fractions", "formula"),
    StructureGraph: ("numbers", "indptr", "neighbors", "distances", "stoichiometry"),
}


def assert_equal(one, other):
    for name in PUBLIC[type(one)]:
        a, b = getattr(one, name), getattr(other, name)
        if isinstance(a, StoichiometryGraph):
            assert_equal(a, b)
        elif isinstance(a, np.ndarray):
            assert a.dtype == b.dtype, name
            np.testing.assert_array_equal(a, b)
        else:
            assert a == b


@pytest.mark.parametrize("make", [stoichiometry_graphs, structure_graphs])
def test_round_trips(make):
    for graph in make():
        assert_equal(graph, type(graph).from_pyg(graph.to_pyg()))
        assert_equal(graph, pickle.loads(pickle.dumps(graph)))


def test_pyg_stoichiometry_is_fully_connected_with_self_loops():
    data = stoichiometry_graphs()[3].to_pyg()
    assert data.validate() and data.num_nodes == 4 and data.has_self_loops()
    edges = {tuple(edge) for edge in data.edge_index.T.tolist()}
    assert edges == {(i, j) for i in range(4) for j in range(4)} and data.num_edges == 16
    assert data.numbers.tolist() == [3, 8, 15, 26]


def test_the_formula_is_that_of_the_amounts():
    """Of these fractions no denominator up to 10,000 tells the amounts."""
    amounts = np.array([1.0, 20_000.0])
    numbers = np.array([1, 8], np.uint8)
    graph = StoichiometryGraph(numbers, amounts / amounts.sum(), amounts=amounts)
    assert graph.formula == "HO20000"


def test_pyg_data_survives_the_other_way_round():
    for graph in structure_graphs():
        data = graph.to_pyg()
        again = StructureGraph.from_pyg(data).to_pyg()
        assert data.validate()
        assert torch.equal(data.edge_index, again.edge_index)
        assert torch.equal(data.distances, again.distances)
        assert data.num_nodes == again.num_nodes


def test_unsorted_edges_are_refused():
    data = structure_graphs()[0].to_pyg()
    data.edge_index = data.edge_index.flip(1)
    with pytest.raises(ValueError, match="sorted"):
        StructureGraph.from_pyg(data)


def test_stoichiometry_batch_is_the_matrix_of_fractions():
    batch = StoichiometryBatch.from_graphs(stoichiometry_graphs())
    assert len(batch) == 4 and batch.fractions.shape == (4, 119)
    assert batch.fractions.dtype == torch.float32
    torch.testing.assert_close(batch.fractions.sum(1), torch.ones(4))
    assert batch.fractions[1].nonzero().ravel().tolist() == [8, 26]
    torch.testing.assert_close(batch.fractions[1, [8, 26]], torch.tensor([0.6, 0.4]))
    assert torch.equal(batch[torch.tensor([2, 0])].fractions, batch.fractions[[2, 0]])
    assert torch.equal(batch[1:3].to("cpu").fractions, batch.fractions[1:3])
    assert len(StoichiometryBatch.from_graphs([])) == 0


def test_structure_batch_without_symmetry_equals_that_of_pyg():
    rng = np.random.default_rng(0)
    cells = [Structure(Lattice.cubic(7), ["Si"] * 5, rng.random((5, 3))) for _ in range(4)]
    many = list(polysrl_dc.StructureGraphFeaturizer()(cells))
    batch = StructureBatch.from_graphs(many).to("cpu")
    reference = Batch.from_data_list([graph.to_pyg() for graph in many])
    assert len(batch) == batch.num_graphs == reference.num_graphs == 4 and batch.rounds == 3
    assert torch.equal(batch.index, reference.batch)
    assert (batch.multiplicity == 1).all() and (batch.edge_multiplicity == 1).all()
    assert torch.equal(torch.stack([batch.centers, batch.neighbors]), reference.edge_index)
    # a table of distances, in which each one stands once and to the last bit
    assert torch.equal(batch.distances[batch.distance_index], reference.distances)
    assert torch.equal(batch.distances, reference.distances.unique())


def test_equivalent_sites_of_a_structure_batch_are_one_node():
    batch = StructureBatch.from_graphs(structure_graphs())
    assert batch.index.tolist() == [0, 1, 2, 2]  # rock salt; helium; hydrogen with fluorine, argon
    assert batch.multiplicity.tolist() == [8, 1, 2, 1] and batch.multiplicity.dtype == torch.float32
    assert batch.centers.tolist() == [0, 0, 2] and batch.neighbors.tolist() == [0, 0, 2]
    assert batch.edge_multiplicity.tolist() == [6, 6, 1]
    distances = torch.tensor([5.69 / 2, 5.69 / 2**0.5, 3.0])[[0, 2, 1]]
    found = batch.distances[batch.distance_index]
    torch.testing.assert_close(found, distances[[0, 2, 1]], atol=1e-5, rtol=0)
    coarse = StructureBatch.from_graphs(structure_graphs(), rounds=5, resolution=0.1)
    assert coarse.rounds == 5
    torch.testing.assert_close(coarse.distances, torch.tensor([2.8, 3.0, 4.0]))


def test_structure_batch_of_isolated_atoms_has_no_edge_and_an_empty_one_is_refused():
    batch = StructureBatch.from_graphs([structure_graphs()[1]] * 2)
    assert batch.index.tolist() == [0, 1] and len(batch.centers) == len(batch.distance_index) == 0
    with pytest.raises(ValueError, match="at least one"):
        StructureBatch.from_graphs([])
