"""Crystals that hypothesis draws: known cells in disguise, neighbors by brute force, bad ones."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from hypothesis import strategies as st
from pymatgen.core import Composition, IStructure, Lattice, Molecule, Structure

Array = np.ndarray


@dataclass(frozen=True)
class Crystal:
    """What is given to a featurizer, and the plain cell that it is; None if it must be refused.

    Attributes
    ----------
    given : Any
    cell : numpy.ndarray, shape (3, 3)
        Rows in Å, near to orthogonal.
    coords : numpy.ndarray, shape (n, 3)
        Fractional, in [0, 1).
    numbers : numpy.ndarray, shape (n,)
    site : numpy.ndarray
        Which site of ``cell`` each site of ``given`` is.
    """

    given: Any
    cell: Array | None = None
    coords: Array | None = None
    numbers: Array | None = None
    site: Array | None = None


def neighbors(cell: Array, coords: Array, cutoff: float = 8.0) -> list[tuple[Array, Array]]:
    """Distances, ascending, and sites of all neighbors of each site: every image is tried."""
    heights = abs(np.linalg.det(cell)) / np.linalg.norm(
        np.cross(np.roll(cell, -1, 0), np.roll(cell, -2, 0)), axis=1
    )
    reach = [range(-n, n + 1) for n in np.ceil(cutoff / heights).astype(int) + 1]
    images = np.array(list(product(*reach)))
    found = []
    for i, center in enumerate(coords):
        apart = (coords[None] - center + images[:, None]) @ cell  # (n_images, n, 3)
        distances = np.linalg.norm(apart, axis=2)
        itself = (images == 0).all(1)[:, None] & (np.arange(len(coords)) == i)
        image, site = np.nonzero(~itself & (distances <= cutoff + 1e-6))
        order = np.argsort(distances[image, site])
        found.append((distances[image, site][order], site[order]))
    return found


def closest(cell: Array, coords: Array) -> float:
    """The least distance between two sites, or a site and its own image, in Å."""
    return min((d[0] for d, _ in neighbors(cell, coords, 4.0) if len(d)), default=4.0)


# ---------------------------------------------------------------- plain cells


def triclinic(rng: np.random.Generator, n_sites: int) -> tuple[Array, Array]:
    """Nothing equal, no two atoms in one place."""
    while True:
        cell = np.diag(rng.uniform(3.5, 7, 3)) + rng.normal(0, 0.5, (3, 3))
        coords = rng.random((n_sites, 3))
        if closest(cell, coords) > 0.6:
            return cell, coords
        n_sites = max(1, n_sites - 1)


def cubic(rng: np.random.Generator, n_sites: int) -> tuple[Array, Array]:
    """Many equal distances."""
    corners = np.array(list(product([0, 0.5], repeat=3))) + rng.choice([0, 0.25]) * rng.integers(2)
    return rng.uniform(3, 6) * np.eye(3), rng.permutation(corners)[:n_sites]


def isolated(rng: np.random.Generator, n_sites: int) -> tuple[Array, Array]:
    """Fewer than twelve neighbors, or none."""
    return np.diag(rng.uniform(15, 60, 3)), rng.random((min(n_sites, 3), 3))


def needle(rng: np.random.Generator, n_sites: int) -> tuple[Array, Array]:
    """Two short vectors and a long one, in any order."""
    cell = np.diag(rng.permutation([rng.uniform(2, 3), rng.uniform(2, 3), rng.uniform(80, 200)]))
    return cell, rng.random((min(n_sites, 4), 3))


def close(rng: np.random.Generator, n_sites: int) -> tuple[Array, Array]:
    """Two sites as near to one another as no atoms are, yet two sites."""
    cell, coords = triclinic(rng, n_sites)
    step = rng.normal(size=3)
    step *= rng.uniform(0.02, 0.4) / np.linalg.norm(step)
    return cell, np.vstack([coords, (coords[0] + step @ np.linalg.inv(cell)) % 1])


PLAIN = [triclinic, cubic, isolated, needle, close]


# ------------------------------------------------------------------ disguises


def rotation(rng: np.random.Generator) -> Array:
    """Any rotation, or one with a reflection: then the cell becomes left-handed."""
    return np.linalg.qr(rng.normal(size=(3, 3)))[0]


def unimodular(rng: np.random.Generator, largest: int) -> Array:
    """Other unit vectors of the same lattice, longer by up to ``largest`` and more."""
    matrix = np.eye(3, dtype=int)
    for _ in range(3):
        i, j = rng.choice(3, 2, replace=False)
        step = np.eye(3, dtype=int)
        step[i, j] = rng.integers(-largest, largest + 1)
        matrix = step @ matrix
    return matrix


def supercell(cell: Array, coords: Array, matrix: Array) -> tuple[Array, Array, Array]:
    """Cell ``matrix @ cell``, its sites, and which site of ``cell`` each of them is.

    The images of the whole cell follow one another; pymatgen puts those of a site together.
    """
    inverse = np.linalg.inv(matrix)
    corners = np.array(list(product([0, 1], repeat=3))) @ matrix
    reach = [range(a, b + 1) for a, b in zip(corners.min(0), corners.max(0), strict=True)]
    images = np.array(list(product(*reach)))
    inside = images @ inverse
    chosen = images[((inside > -1e-9) & (inside < 1 - 1e-9)).all(1)]
    assert len(chosen) == round(abs(np.linalg.det(matrix)))
    copies = (coords[None] + chosen[:, None]).reshape(-1, 3) @ inverse
    return matrix @ cell, copies, np.tile(np.arange(len(coords)), len(chosen))


def disguised(rng: np.random.Generator, cell: Array, coords: Array) -> tuple[Array, Array, Array]:
    """The same crystal: rotated, mirrored, moved, in other unit vectors, sites in any order."""
    matrix = unimodular(rng, int(rng.choice([0, 1, 3, 40])))
    if np.abs(matrix @ cell).max() > 5e5:  # longer than a million Å is refused
        matrix = np.eye(3, dtype=int)
    order = rng.permutation(len(coords))
    moved = (coords[order] + rng.random(3)) @ np.linalg.inv(matrix)
    moved = moved + rng.integers(-3, 4, moved.shape) * rng.choice([0, 1, 100])
    return matrix @ cell @ rotation(rng), moved, order


def _charged(structure: Structure) -> Structure:
    return structure.copy().add_oxidation_state_by_site([0] * len(structure))


FORMS: list[Callable[[Structure], Any]] = [
    lambda structure: structure,
    lambda structure: IStructure.from_sites(structure.sites),
    lambda structure: structure.as_dict(),
    lambda structure: json.loads(json.dumps(structure.as_dict())),
    _charged,
]


@st.composite
def good_crystals(draw: Callable) -> Crystal:
    """A crystal of 1 to 9 sites, or of about 1,000, in disguise and in any form."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    cell, coords = draw(st.sampled_from(PLAIN))(rng, draw(st.integers(1, 8)))
    numbers = rng.integers(1, 104, len(coords))
    form = draw(st.sampled_from(FORMS))
    if draw(st.integers(0, 19)) == 0:
        times = np.diag([10, 10, 10 // len(coords) or 1])
        given, copies, site = supercell(cell, coords, times)
        order = rng.permutation(len(copies))
        given, copies, site, form = given, copies[order], site[order], FORMS[0]
    else:
        given, copies, site = disguised(rng, cell, coords)
    structure = Structure(Lattice(given), numbers[site], copies)
    return Crystal(form(structure), cell, coords, numbers, site)


# ---------------------------------------------------------------- bad crystals


def _edit(lattice: Callable[[Array], Any] | None = None, site: Callable | None = None) -> Callable:
    """Change the dict of a structure."""

    def edit(rng: np.random.Generator, structure: Structure) -> dict:
        given = structure.as_dict()
        if lattice is not None:
            given["lattice"] = {"matrix": lattice(structure.lattice.matrix.copy())}
        if site is not None:
            site(given["sites"][rng.integers(len(structure))])
        return given

    return edit


def _put(*path: Any, value: Any) -> Callable:
    def put(site: dict) -> None:
        for key in path[:-1]:
            site = site[key]
        site[path[-1]] = value

    return put


def _element(symbol: str) -> Callable:
    return _edit(site=_put("species", 0, "element", value=symbol))


def _twice(rng: np.random.Generator, structure: Structure) -> Structure:
    """A site that is given again, at most 0.005 Å away, in another image."""
    step = rng.normal(size=3)
    step *= rng.uniform(0, 0.005) / np.linalg.norm(step)
    again = structure.frac_coords[rng.integers(len(structure))] + rng.integers(-2, 3, 3)
    coords = [*structure.frac_coords, again + step @ np.linalg.inv(structure.lattice.matrix)]
    return Structure(structure.lattice, [*structure.species, "Fe"], coords)


def _far_apart(rng: np.random.Generator, structure: Structure) -> Structure:
    """Two sites in a box that cannot be searched."""
    return Structure(Lattice.cubic(rng.uniform(4e3, 9e5)), ["H", "H"], [[0, 0, 0], [0.5] * 3])


def _flat(matrix: Array) -> Array:
    matrix[2] = matrix[0] - 2 * matrix[1]
    return matrix


def _slab(rng: np.random.Generator, structure: Structure) -> Structure:
    lattice = Lattice(structure.lattice.matrix, pbc=(True, True, False))
    return Structure(lattice, structure.species, structure.frac_coords)


def _without(key: str) -> Callable:
    return lambda rng, structure: {k: v for k, v in structure.as_dict().items() if k != key}


BAD: dict[str, Callable[[np.random.Generator, Structure], Any]] = {
    "one site twice": _twice,
    "NaN coordinate": _edit(site=_put("abc", 1, value=float("nan"))),
    "infinite coordinate": _edit(site=_put("abc", 2, value=float("-inf"))),
    "coordinate without digits": _edit(site=_put("abc", 0, value=1e17)),
    "text as coordinate": _edit(site=_put("abc", 0, value="x")),
    "missing coordinate": _edit(site=_put("abc", value=[0.5, 0.5])),
    "no coordinate": _edit(site=_put("abc", value=None)),
    "integer beyond floats": _edit(site=_put("abc", 0, value=10**400)),
    "NaN cell": _edit(lambda matrix: matrix * [1, 1, np.nan]),
    "infinite cell": _edit(lambda matrix: matrix * np.inf),
    "endless cell": _edit(lambda matrix: 1e200 * np.eye(3)),
    "flat cell": _edit(_flat),
    "point": _edit(lambda matrix: 0 * matrix),
    "tiny cell": _edit(lambda matrix: 0.01 * np.eye(3)),
    "needle thinner than an atom": _edit(lambda matrix: np.diag([0.004, 200, 200])),
    "skew beyond floats": _edit(lambda matrix: np.array([[1, 0, 0], [1e15, 1, 0], [0, 1e15, 1.0]])),
    "two-dimensional cell": _edit(lambda matrix: matrix[:2]),
    "text as cell": _edit(lambda matrix: "cubic"),
    "far apart": _far_apart,
    "slab": _slab,
    "partial occupancy": _edit(site=_put("species", 0, "occu", value=0.5)),
    "occupied twice": _edit(site=_put("species", 0, "occu", value=2.0)),
    "NaN occupancy": _edit(site=_put("species", 0, "occu", value=float("nan"))),
    "two atoms on a site": _edit(
        site=_put("species", value=[{"element": "Cu", "occu": 0.5}, {"element": "Au", "occu": 0.5}])
    ),
    "vacancy": _edit(site=_put("species", value=[])),
    "dummy": _element("Xx"),
    "isotope": _element("D"),
    "no embedding": _element("Og"),
    "unknown element": _element("Q7"),
    "text": lambda rng, structure: structure.to(fmt="poscar"),
    "molecule": lambda rng, structure: Molecule(["H"], [[0, 0, 0]]),
    "composition": lambda rng, structure: Composition("NaCl"),
    "no lattice": _without("lattice"),
    "no sites": _without("sites"),
    "empty": lambda rng, structure: Structure(structure.lattice, [], []),
    "sites": lambda rng, structure: list(structure),
    "matrix": lambda rng, structure: structure.frac_coords,
    "None": lambda rng, structure: None,
    "NaN": lambda rng, structure: float("nan"),
    "number": lambda rng, structure: 7,
    "file name": lambda rng, structure: "structure.cif",
}


@st.composite
def bad_crystals(draw: Callable) -> Crystal:
    """A crystal with one thing wrong, or no crystal."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    cell, coords = triclinic(rng, draw(st.integers(1, 4)))
    structure = Structure(Lattice(cell), rng.integers(1, 104, len(coords)), coords)
    return Crystal(BAD[draw(st.sampled_from(sorted(BAD)))](rng, structure))
