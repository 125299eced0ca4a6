"""Featurizers: inputs, policies for bad ones, and the neighbors of real and odd cells."""

import logging

import deepchem as dc
import numpy as np
import pandas as pd
import pytest
from pymatgen.core import Composition, Lattice, Structure

import polysrl_dc
from polysrl_dc import featurizers
from polysrl_dc.errors import InvalidInputError
from polysrl_dc.sources import read_structure

COPPER = Structure.from_spacegroup("Fm-3m", Lattice.cubic(3.6), ["Cu"], [[0, 0, 0]])
COPPER_PRIMITIVE = COPPER.get_primitive_structure()
SALT = Structure.from_spacegroup(
    "Fm-3m", Lattice.cubic(5.69), ["Na", "Cl"], [[0.0] * 3, [0.5] * 3]
)


def formulas(**kwargs):
    return dc.feat.StoichiometryGraphFeaturizer(**kwargs)


def structures(**kwargs):
    return dc.feat.StructureGraphFeaturizer(**kwargs)


@pytest.mark.parametrize(
    "one", ["NaCl", np.str_("NaCl"), {"Na": 1, "Cl": 1}, Composition("NaCl")], ids=repr
)
def test_one_formula_is_one_graph(one):
    graphs = formulas().featurize(one)
    assert graphs.shape == (1,) and graphs.dtype == object
    assert graphs[0].numbers.tolist() == [11, 17] and graphs[0].fractions.tolist() == [0.5, 0.5]
    assert graphs[0].formula == "NaCl"


@pytest.mark.parametrize("container", [list, tuple, np.array, pd.Series, iter])
def test_many_formulas_in_any_container(container):
    graphs = formulas()(container(["Fe2O3", "Fe4O6", "NaCl"]))
    assert [graph.formula for graph in graphs] == ["Fe2O3", "Fe2O3", "NaCl"]
    np.testing.assert_allclose(graphs[0].fractions, [0.6, 0.4])
    assert len(formulas()([])) == 0


def test_graphs_stay_what_they_are():
    graphs = formulas()(["Fe4O6", "NaCl"])
    assert formulas()(graphs).tolist() == graphs.tolist()
    (salt,) = structures()(SALT)
    assert formulas()(salt)[0] is salt.stoichiometry


def test_fractions_add_up_to_one_whatever_the_amounts():
    for graph in formulas()(["Zr60Cu30.7Al10", "Hg0.7Cd0.3Te", {"Fe": 1e-3, "O": 7e5}]):
        assert graph.fractions.sum() == pytest.approx(1, abs=1e-12)


def test_raise_names_row_and_value():
    with pytest.raises(InvalidInputError, match=r"row 1: .*Xx2O3"):
        formulas().featurize(["NaCl", "Xx2O3"])
    with pytest.raises(InvalidInputError, match=r"row 70: .*Xx2O3"):
        formulas().featurize(pd.Series(["NaCl", "Xx2O3"], index=[3, 70]))
    with pytest.raises(InvalidInputError, match=r"row 0: .*nan"):
        formulas().featurize([float("nan")])
    with pytest.raises(InvalidInputError, match=r"^formula 'Xx2O3'"):  # one input has no row
        formulas().featurize("Xx2O3")
    with pytest.raises(InvalidInputError, match="None"):
        formulas().featurize(None)


def test_skip_leaves_a_placeholder_and_says_which(caplog):
    featurizer = formulas(on_error="skip")
    with caplog.at_level(logging.WARNING):
        graphs = featurizer(["NaCl", "", "MgO", 3.5])
    assert [np.size(graph) for graph in graphs] == [1, 0, 1, 0]
    assert [row for row, _ in featurizer.skipped] == [1, 3]
    assert "row 1" in caplog.text and "3.5" in caplog.text
    featurizer("NaCl")
    assert featurizer.skipped == []


def test_unknown_arguments_are_refused():
    with pytest.raises(ValueError, match="ignore"):
        formulas(on_error="ignore")
    with pytest.raises(TypeError, match="smiles"):
        formulas().featurize(["NaCl"], smiles=True)
    with pytest.raises(TypeError):
        structures(radius=3)


def test_copper_has_twelve_neighbors_at_one_distance_in_either_cell():
    for cell, n_sites in ((COPPER, 4), (COPPER_PRIMITIVE, 1)):
        graph = structures()(cell)[0]
        assert graph.indptr.tolist() == list(range(0, 12 * n_sites + 1, 12))
        np.testing.assert_allclose(graph.distances, 3.6 / 2**0.5, atol=1e-4)
        assert graph.numbers.tolist() == [29] * n_sites and graph.stoichiometry.formula == "Cu"
        assert graph.neighbors.max() < n_sites


def test_fewer_neighbors_where_fewer_exist_and_none_is_made_up():
    box = Lattice.cubic(30)
    alone = structures()(Structure(box, ["He"], [[0, 0, 0]]))[0]
    assert alone.indptr.tolist() == [0, 0] and len(alone.neighbors) == len(alone.distances) == 0
    pair = structures()(Structure(box, ["H", "F"], [[0.0] * 3, [0.1, 0.0, 0.0]]))[0]
    assert pair.indptr.tolist() == [0, 1, 2] and pair.neighbors.tolist() == [1, 0]
    np.testing.assert_allclose(pair.distances, 3, atol=1e-5)


def test_max_neighbors_and_cutoff_are_used():
    six = structures(max_neighbors=6)(SALT)[0]
    assert set(np.diff(six.indptr)) == {6} and np.allclose(six.distances, 5.69 / 2, atol=1e-4)
    assert len(structures(cutoff=2.0)(SALT)[0].neighbors) == 0


def test_structures_dicts_and_oxidation_states_give_the_same_graph():
    charged = SALT.copy()
    charged.add_oxidation_state_by_element({"Na": 1, "Cl": -1})
    expected = structures()(SALT)[0]
    for value in (SALT.as_dict(), charged, [SALT], (charged.as_dict(),)):
        graph = structures()(value)[0]
        for name in ("numbers", "indptr", "neighbors", "distances"):
            np.testing.assert_array_equal(getattr(graph, name), getattr(expected, name))
        assert graph.stoichiometry.formula == "NaCl"


def test_a_file_with_oxidation_states_gives_the_same_graph(tmp_path):
    charged = SALT.copy()
    charged.add_oxidation_state_by_element({"Na": 1, "Cl": -1})
    charged.to(tmp_path / "salt.cif")
    assert "Na+" in (tmp_path / "salt.cif").read_text()
    graph = structures()(read_structure(tmp_path / "salt.cif"))[0]
    assert graph.stoichiometry.formula == "NaCl" and len(graph.numbers) == len(SALT)


def bad_structures():
    nan_cell = SALT.as_dict()
    nan_cell["lattice"]["matrix"][0][0] = float("nan")
    no_matrix = SALT.as_dict()
    del no_matrix["lattice"]["matrix"]
    no_matrix["lattice"]["a"] *= -1
    unknown = SALT.as_dict()
    unknown["sites"][0]["species"][0]["element"] = "Q7"
    return {
        "partial occupancy": Structure(Lattice.cubic(3), [{"Cu": 0.5, "Au": 0.5}], [[0, 0, 0]]),
        "vacancy": Structure(Lattice.cubic(3), [{"Cu": 0.9}], [[0, 0, 0]]),
        "zero volume": Structure(
            Lattice([[3, 0, 0], [0, 3, 0], [3, 3, 0]]), ["Cu"], [[0, 0, 0]]
        ),
        "NaN coordinates": Structure(Lattice.cubic(3), ["Cu"], [[float("nan"), 0.0, 0.0]]),
        "NaN cell": nan_cell,
        "negative length": no_matrix,
        "dummy species": Structure(Lattice.cubic(3), ["Xx"], [[0, 0, 0]]),
        "unknown species": unknown,
        "no embedding": Structure(Lattice.cubic(3), ["Rf"], [[0, 0, 0]]),
        "isotope": Structure(Lattice.cubic(3), ["D"], [[0, 0, 0]]),
        "no site": Structure(Lattice.cubic(3), [], []),
        "one site twice": Structure(Lattice.cubic(3), ["Cu", "Cu"], [[0, 0, 0], [0, 0, 0]]),
        "empty dict": {},
        "half a dict": {"lattice": {"a": 3}},
        "formula": "NaCl",
        "None": None,
        "number": 3.5,
    }


@pytest.mark.parametrize("what", bad_structures())
@pytest.mark.filterwarnings("ignore")  # pymatgen warns while it makes these
def test_bad_structures_are_refused_or_skipped(what):
    value = bad_structures()[what]
    with pytest.raises(InvalidInputError, match="row 1: "):
        structures().featurize([SALT, value])
    featurizer = structures(on_error="skip")
    graphs = featurizer.featurize([SALT, value, COPPER])
    assert [np.size(graph) for graph in graphs] == [1, 0, 1]
    assert [row for row, _ in featurizer.skipped] == [1]


def test_structure_graph_is_the_featurizer_without_a_structure():
    for structure in (COPPER, SALT):
        numbers = np.array([site.specie.Z for site in structure])
        matrix, coords = structure.lattice.matrix, structure.frac_coords
        for limits in ((12, 8.0), (6, 4.0)):
            graph = featurizers.structure_graph(numbers, matrix, coords, *limits)
            expected = structures(max_neighbors=limits[0], cutoff=limits[1])(structure)[0]
            for name in ("numbers", "indptr", "neighbors", "distances"):
                np.testing.assert_array_equal(getattr(graph, name), getattr(expected, name))
            assert graph.numbers.dtype == np.uint8
            assert graph.stoichiometry.formula == expected.stoichiometry.formula
    assert graph.stoichiometry.numbers.tolist() == [11, 17]
    assert graph.stoichiometry.fractions.tolist() == [0.5, 0.5]


@pytest.mark.parametrize(
    ("numbers", "lattice", "coords", "message"),
    [
        ([11], 4 * np.eye(3), np.zeros((2, 3)), "1 atomic numbers for 2 sites"),
        ([11, 17], 4 * np.eye(3), np.zeros((1, 3)), "2 atomic numbers for 1 sites"),
        ([0], 4 * np.eye(3), np.zeros((1, 3)), "atomic number 0 has no embedding"),
        ([-1], 4 * np.eye(3), np.zeros((1, 3)), "atomic number -1 "),
        ([104], 4 * np.eye(3), np.zeros((1, 3)), "atomic number 104 "),
        ([119], 4 * np.eye(3), np.zeros((1, 3)), "atomic number 119 "),
        ([267], 4 * np.eye(3), np.zeros((1, 3)), "atomic number 267 "),  # 11 in eight bits
        ([11], np.zeros((3, 3)), np.zeros((1, 3)), "volume"),
        ([11], 4 * np.eye(2), np.zeros((1, 3)), r"shape \(2, 2\)"),
        ([11], 4 * np.eye(3), np.full((1, 3), np.nan), "site 0 are not finite"),
        ([11, 17], 4 * np.eye(3), np.zeros((2, 3)), "sites 0 and 1"),
        ([], 4 * np.eye(3), np.zeros((0, 3)), r"shape \(0, 3\)"),
    ],
)
def test_structure_graph_refuses_bad_arrays(numbers, lattice, coords, message):
    with pytest.raises(InvalidInputError, match=message):
        featurizers.structure_graph(np.array(numbers, dtype=np.int64), lattice, coords)


def test_registration_is_repeatable_and_leaves_foreign_objects(monkeypatch):
    polysrl_dc.register()
    assert dc.feat.StructureGraphFeaturizer is polysrl_dc.StructureGraphFeaturizer
    monkeypatch.setattr(dc.feat, "StructureGraphFeaturizer", object)
    with pytest.raises(RuntimeError, match="StructureGraphFeaturizer"):
        polysrl_dc.register()
    assert dc.feat.StructureGraphFeaturizer is object
