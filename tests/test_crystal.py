"""Neighbor lists against pymatgen's own, their invariances, and the input they refuse."""

import itertools
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from monty.serialization import loadfn
from pymatgen.analysis import prototypes
from pymatgen.core import Lattice, Structure

from polysrl_dc.crystal import neighbor_list
from polysrl_dc.errors import InvalidInputError

AFLOW = loadfn(Path(prototypes.__file__).with_name("aflow_prototypes.json.gz"))
PROTOTYPES = [entry["snl"].structure for entry in AFLOW[::12]]


def split(structure, **kwargs):
    """Neighbors and distances of each site as a list of pairs of arrays."""
    indptr, neighbors, distances = neighbor_list(
        structure.lattice.matrix, structure.frac_coords, **kwargs
    )
    bounds = list(itertools.pairwise(indptr))
    return [(neighbors[a:b], distances[a:b]) for a, b in bounds]


def check_against_pymatgen(structure, max_neighbors=12, cutoff=8.0):
    found = split(structure, max_neighbors=max_neighbors, cutoff=cutoff)
    expected = structure.get_all_neighbors(cutoff)
    for (neighbors, distances), site in zip(found, expected, strict=True):
        nearest = sorted(site, key=lambda neighbor: neighbor.nn_distance)
        assert len(distances) == min(max_neighbors, len(nearest))
        np.testing.assert_allclose(
            distances, [n.nn_distance for n in nearest[:max_neighbors]], atol=2e-5
        )
        # each kept edge is a neighbor at that distance, counted with its multiplicity
        for j in np.unique(neighbors):
            mine = distances[neighbors == j]
            others = np.sort([n.nn_distance for n in nearest if n.index == j])[: len(mine)]
            np.testing.assert_allclose(mine, others, atol=2e-5)


def rows(data_dir, n):
    table = pd.read_parquet(data_dir / "mp" / "structures.parquet")
    for row in table.iloc[:: len(table) // n].itertuples():
        yield Structure(
            Lattice.from_parameters(*np.asarray(row.cell, dtype=float)),
            row.numbers,
            np.asarray(row.frac_coords, dtype=float).reshape(-1, 3),
        )


def test_aflow_prototypes_agree_with_pymatgen():
    assert len(PROTOTYPES) > 20
    for structure in PROTOTYPES:
        check_against_pymatgen(structure)


def test_materials_project_agrees_with_pymatgen(data_dir):
    for structure in rows(data_dir, 20):
        if len(structure) <= 60:
            check_against_pymatgen(structure)


@pytest.mark.parametrize(("max_neighbors", "cutoff"), [(1, 8.0), (40, 6.0), (12, 3.0), (500, 8.0)])
def test_other_limits(max_neighbors, cutoff):
    for structure in PROTOTYPES[:4]:
        check_against_pymatgen(structure, max_neighbors, cutoff)


def test_one_atom_cell_is_its_own_neighbor():
    indptr, neighbors, distances = neighbor_list(3 * np.eye(3), [[0.4, 0.1, 0.9]])
    assert indptr.tolist() == [0, 12]
    assert (indptr.dtype, neighbors.dtype, distances.dtype) == (np.int64, np.int32, np.float32)
    assert not neighbors.any()
    np.testing.assert_allclose(distances, [3.0] * 6 + [3 * 2**0.5] * 6, rtol=1e-5)


def test_isolated_sites_are_not_padded():
    indptr, neighbors, distances = neighbor_list(20 * np.eye(3), [[0, 0, 0], [0.1, 0, 0]])
    assert indptr.tolist() == [0, 1, 2]
    assert neighbors.tolist() == [1, 0] and distances.tolist() == [2.0, 2.0]
    indptr, neighbors, distances = neighbor_list(20 * np.eye(3), [[0, 0, 0]])
    assert indptr.tolist() == [0, 0] and len(neighbors) == len(distances) == 0


def test_the_cutoff_is_inclusive_and_the_first_radius_hides_nothing():
    assert neighbor_list(8 * np.eye(3), [[0, 0, 0]])[0].tolist() == [0, 6]
    assert neighbor_list(8.001 * np.eye(3), [[0, 0, 0]])[0].tolist() == [0, 0]
    # 12 neighbors of one site within 5 Å, 6 of the other: both complete
    lattice = Lattice.orthorhombic(4.0, 4.0, 40.0)
    structure = Structure(lattice, ["H"] * 3, [[0, 0, 0], [0.5, 0.5, 0.05], [0, 0, 0.5]])
    check_against_pymatgen(structure)


@pytest.mark.parametrize("structure", PROTOTYPES[::6], ids=lambda s: s.formula)
def test_invariances(structure):
    reference = split(structure)
    lattice, frac = structure.lattice.matrix, structure.frac_coords
    rng = np.random.default_rng(0)
    rotation = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    shifted = frac + rng.integers(-3, 4, size=frac.shape)
    skew = np.array([[1, 0, 0], [9, 1, 0], [-4, 7, 1]])  # same crystal, other unit vectors
    variants = {
        "rotated": (lattice @ rotation, frac),
        "mirrored, left-handed": (lattice * [1, 1, -1], frac),
        "translated": (lattice, frac + rng.random(3)),
        "outside the cell": (lattice, shifted),
        "skewed": (skew @ lattice, frac @ np.linalg.inv(skew)),
    }
    for name, (cell, coords) in variants.items():
        indptr, _, distances = neighbor_list(cell, coords)
        expected = np.concatenate([d for _, d in reference])
        assert indptr[-1] == len(expected), name
        np.testing.assert_allclose(distances, expected, atol=2.1e-5, err_msg=name)


@pytest.mark.parametrize("structure", PROTOTYPES[::8], ids=lambda s: s.formula)
def test_supercell_repeats_the_distances(structure):
    expected = sorted(tuple(np.round(d, 3)) for _, d in split(structure) for _ in range(4))
    found = sorted(tuple(np.round(d, 3)) for _, d in split(structure * (2, 1, 2)))
    np.testing.assert_allclose(np.concatenate(found), np.concatenate(expected), atol=2e-3)


def test_permuting_the_sites_permutes_the_lists():
    structure = PROTOTYPES[7]
    order = np.random.default_rng(1).permutation(len(structure))
    reference = split(structure)
    permuted = split(Structure.from_sites([structure[i] for i in order]))
    for (_, distances), i in zip(permuted, order, strict=True):
        np.testing.assert_allclose(distances, reference[i][1], atol=2.1e-5)


def test_ties_do_not_depend_on_float_noise():
    """Rock salt: 6 then 12 equal distances, of which the 12 nearest keep an arbitrary half."""
    salt = Structure.from_spacegroup(
        "Fm-3m", Lattice.cubic(5.64), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]]
    )
    lattice, frac = salt.lattice.matrix, salt.frac_coords
    reference = neighbor_list(lattice, frac)
    rng = np.random.default_rng(0)
    for _ in range(5):
        noise = rng.normal(scale=1e-10, size=frac.shape)
        for array, expected in zip(neighbor_list(lattice, frac + noise), reference, strict=True):
            np.testing.assert_array_equal(array, expected)


def test_extreme_skew_is_quick():
    lattice = [[3, 0, 0], [30000, 3, 0], [15000, -30000, 3]]
    indptr, _, distances = neighbor_list(lattice, [[0.1, 0.2, 0.3]])
    assert indptr[-1] == 12
    np.testing.assert_allclose(distances, [3.0] * 6 + [3 * 2**0.5] * 6, rtol=1e-4)


NAN = float("nan")
CELL = (4 * np.eye(3)).tolist()


@pytest.mark.parametrize(
    ("lattice", "frac_coords", "message"),
    [
        (np.full((3, 3), NAN), [[0, 0, 0]], "not finite"),
        (CELL, [[0, 0, 0], [0, NAN, 0]], "site 1 are not finite"),
        (CELL, [[0, 0, float("inf")]], "site 0 are not finite"),
        (np.zeros((3, 3)), [[0, 0, 0]], "volume"),
        ([[1, 0, 0], [2, 0, 0], [0, 0, 3]], [[0, 0, 0]], "volume"),
        (CELL[:2], [[0, 0, 0]], r"shape \(2, 3\)"),
        (CELL, [0, 0, 0], r"shape \(3,\)"),
        (CELL, np.zeros((0, 3)), r"shape \(0, 3\)"),
        (CELL, [["a", "b", "c"]], "not numbers"),
        (CELL, [[0, 0, 0], [0, 0]], "not numbers"),
        (CELL, [[10**400, 0, 0]], "not numbers"),
        (CELL, [[0, 0, 0], [0.5, 0.5, 0.5], [0.5, 0.5, 0.5]], "sites 1 and 2"),
        (CELL, [[0, 0, 0.999], [0.5, 0.5, 0.5], [0, 0, 0.0005]], "sites 0 and 2"),
        (np.diag([0.005, 100, 100]), [[0, 0, 0]], "its own image"),
    ],
)
def test_refused_input(lattice, frac_coords, message):
    with pytest.raises(InvalidInputError, match=message):
        neighbor_list(lattice, frac_coords)


def test_neighbors_at_one_distance_are_ordered_by_site():
    salt = Structure.from_spacegroup(
        "Fm-3m", Lattice.cubic(5.64), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]]
    )
    for neighbors, distances in split(salt):
        assert np.diff(distances).min() >= 0
        assert (np.diff(neighbors)[np.diff(distances) == 0] >= 0).all()


def test_distances_are_multiples_of_a_step_and_survive_noise_below_it():
    for structure in PROTOTYPES[:4]:
        lattice, frac = structure.lattice.matrix, structure.frac_coords
        distances = neighbor_list(lattice, frac)[2]
        steps = np.rint(distances.astype(np.float64) / 1e-5)
        np.testing.assert_array_equal((steps * 1e-5).astype(np.float32), distances)


def test_cells_and_cutoffs_too_large_to_be_sorted_are_refused():
    with pytest.raises(InvalidInputError, match="524288 sites, more than 524287"):
        neighbor_list(1e3 * np.eye(3), np.zeros((524288, 3)))
    with pytest.raises(ValueError, match="more than 168 Å"):
        neighbor_list(CELL, [[0, 0, 0]], cutoff=168.0)
    far = neighbor_list(160 * np.eye(3), [[0, 0, 0], [0, 0, 0.5]], cutoff=160.0)
    assert far[0].tolist() == [0, 8, 16] and far[2].tolist() == ([80.0] * 2 + [160.0] * 6) * 2


@pytest.mark.parametrize("limits", [(0, 8.0), (12, 0.0), (12, NAN)])
def test_refused_limits(limits):
    with pytest.raises(ValueError, match="must be positive"):
        neighbor_list(CELL, [[0, 0, 0]], *limits)
