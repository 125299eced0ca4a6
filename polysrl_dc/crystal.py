"""Nearest neighbors of every site of a crystal through its periodic images; pure functions."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pymatgen.core import Lattice
from pymatgen.optimization.neighbors import find_points_in_spheres

from polysrl_dc.errors import InvalidInputError

_FIRST_RADIUS = 5.0  # Å; holds 12 neighbors of every site in most crystals
_STEP = 1e-5  # Å; distances are multiples of it: far below any physical meaning, above float noise
_SITE_BITS = 19  # of a packed pair: 19 bits for a site, 24 for a distance, 19 for its neighbor
_SITE_SHIFT = 43
_GREATEST_SITE = 2**_SITE_BITS - 1
_GREATEST_STEP = 2 ** (_SITE_SHIFT - _SITE_BITS) - 1
_SELF_DISTANCE = 1e-8  # Å; a site and itself
_COINCIDENT = 0.01  # Å; two sites closer than this are one site given twice
_VOLUME_PER_SITE = 0.1  # Å^3; solid hydrogen at 500 GPa takes about 1
_SKEWED = 20.0  # |a||b||c| / volume from which on the search works in a reduced cell
_TOO_SKEWED = 1e12  # and from which on floating point cannot reduce it
_FARTHEST = 1e6  # Å or cells; numbers beyond it would lose digits of a position
_GREATEST_BOX = 1e9  # Å^3; the search divides the box around the sites into cubes
_PERIODIC = np.ones(3, dtype=np.int64)


def neighbor_list(
    lattice: ArrayLike, frac_coords: ArrayLike, max_neighbors: int = 12, cutoff: float = 8.0
) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.float32]]:
    """The nearest neighbors of each site, as a multi-edge graph (Section 3.2, Appendix A).

    A site is no neighbor of itself, but its periodic images are. A site with fewer than
    ``max_neighbors`` sites within the cutoff keeps those it has; nothing is padded. Distances are
    rounded to 1e-5 Å before they are compared, and equal ones are ordered by site index, so that
    neither floating-point noise nor the choice of the unit vectors decides which neighbor of a
    shell is kept. The order of the sites does; it matters where neighbors in a shell that is cut
    have other surroundings (2 % of the Materials Project).

    Parameters
    ----------
    lattice : array_like, shape (3, 3)
        Unit vectors as rows, in Å; any handedness and skew.
    frac_coords : array_like, shape (n_sites, 3)
        Fractional coordinates; values outside [0, 1) are meant modulo 1.
    max_neighbors : int
        Neighbors per site at most.
    cutoff : float
        Greatest distance in Å, inclusive.

    Returns
    -------
    indptr : numpy.ndarray, shape (n_sites + 1,), int64
        Edges of site ``i`` are ``indptr[i]:indptr[i + 1]``.
    neighbors : numpy.ndarray, shape (n_edges,), int32
        Site index of each neighbor.
    distances : numpy.ndarray, shape (n_edges,), float32
        In Å, ascending within a site.

    Raises
    ------
    InvalidInputError
        A shape is wrong, a number is not finite or above a million, the cell has no volume or is
        too skewed or too large (1000 Å), or two sites (or a site and its own image) are less than
        0.01 Å apart.
    ValueError
        ``max_neighbors`` or ``cutoff`` is not positive, or the second is more than 168 Å.

    Examples
    --------
    >>> import numpy as np
    >>> indptr, neighbors, distances = neighbor_list(3 * np.eye(3), [[0, 0, 0]], max_neighbors=6)
    >>> indptr.tolist(), distances.tolist()
    ([0, 6], [3.0, 3.0, 3.0, 3.0, 3.0, 3.0])
    """
    if max_neighbors < 1 or not cutoff > 0:
        raise ValueError(
            f"max_neighbors is {max_neighbors} and cutoff {cutoff}: both must be positive"
        )
    if cutoff > _GREATEST_STEP * _STEP:
        raise ValueError(f"cutoff is {cutoff} Å: more than {_GREATEST_STEP * _STEP:.0f} Å")
    cell, coords = _checked(lattice, frac_coords)
    n_sites = len(coords)
    radius = min(_FIRST_RADIUS, cutoff)
    centers, neighbors, distances = _pairs_within(cell, coords, radius)
    if radius < cutoff and np.bincount(centers, minlength=n_sites).min() < max_neighbors:
        centers, neighbors, distances = _pairs_within(cell, coords, cutoff)
    # One sort of one integer per pair (site, distance, neighbor) in place of a sort by three keys.
    pairs = np.sort((centers << _SITE_SHIFT) | (distances << _SITE_BITS) | neighbors)
    centers = pairs >> _SITE_SHIFT
    degrees = np.bincount(centers, minlength=n_sites)
    indptr = np.zeros(n_sites + 1, dtype=np.int64)
    np.cumsum(np.minimum(degrees, max_neighbors), out=indptr[1:])
    first = np.cumsum(degrees) - degrees
    nearest = np.arange(indptr[-1]) + np.repeat(first - indptr[:-1], np.diff(indptr))
    pairs = pairs[nearest]
    steps = (pairs >> _SITE_BITS) & _GREATEST_STEP
    return indptr, (pairs & _GREATEST_SITE).astype(np.int32), (steps * _STEP).astype(np.float32)


def _checked(
    lattice: ArrayLike, frac_coords: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Unit vectors (3, 3) and Cartesian coordinates (n_sites, 3) in Å, or InvalidInputError."""
    try:
        cell = np.array(lattice, dtype=np.float64, order="C")
        fractional = np.array(frac_coords, dtype=np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidInputError(
            f"lattice or fractional coordinates are not numbers: {error}"
        ) from error
    if cell.shape != (3, 3):
        raise InvalidInputError(f"lattice has shape {cell.shape}, not (3, 3)")
    if fractional.ndim != 2 or fractional.shape[1] != 3 or not len(fractional):
        raise InvalidInputError(
            f"fractional coordinates have shape {fractional.shape}, not (n_sites, 3)"
        )
    if not (np.abs(cell) <= _FARTHEST).all():
        raise InvalidInputError(
            f"lattice has values that are not finite or above {_FARTHEST:g} Å: {cell.tolist()}"
        )
    if len(fractional) > _GREATEST_SITE:
        raise InvalidInputError(f"cell has {len(fractional)} sites, more than {_GREATEST_SITE}")
    usable = (np.abs(fractional) <= _FARTHEST).all(axis=1)
    if not usable.all():
        site = int(np.argmin(usable))
        raise InvalidInputError(
            f"fractional coordinates of site {site} are not finite or above {_FARTHEST:g}: "
            f"{fractional[site].tolist()}"
        )
    volume = abs(np.linalg.det(cell))
    if volume < _VOLUME_PER_SITE * len(fractional):
        raise InvalidInputError(
            f"cell has a volume of {volume:.3g} Å^3 for {len(fractional)} sites: {cell.tolist()}"
        )
    fractional -= np.floor(fractional)
    coords = np.ascontiguousarray(fractional @ cell)
    skew = np.linalg.norm(cell, axis=1).prod() / volume
    if skew > _TOO_SKEWED:
        raise InvalidInputError(f"cell is too skewed to be reduced: {cell.tolist()}")
    if skew > _SKEWED:
        cell = np.ascontiguousarray(Lattice(cell).get_lll_reduced_lattice().matrix)
        fractional = coords @ np.linalg.inv(cell)
        coords = np.ascontiguousarray((fractional - np.floor(fractional)) @ cell)
    box = np.ptp(coords, axis=0) + 2 * _FIRST_RADIUS
    if box.prod() > _GREATEST_BOX:
        raise InvalidInputError(
            f"the sites lie in a box of {box.round().tolist()} Å, more than {_GREATEST_BOX:g} Å^3"
        )
    shortest = np.linalg.norm(cell, axis=1).min()
    if shortest < _COINCIDENT:
        raise InvalidInputError(
            f"every site and its own image are {shortest:.2g} Å apart, less than {_COINCIDENT} Å"
        )
    return cell, coords


def _pairs_within(
    cell: NDArray[np.float64], coords: NDArray[np.float64], radius: float
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Centers, neighbors and distances in steps of all pairs of sites at most ``radius`` apart."""
    centers, neighbors, _, distances = find_points_in_spheres(
        coords, coords, r=radius, pbc=_PERIODIC, lattice=cell, tol=_STEP
    )
    other = (centers != neighbors) | (distances > _SELF_DISTANCE)
    coincident = np.flatnonzero(other & (distances < _COINCIDENT))
    if len(coincident):
        pair = coincident[0]
        raise InvalidInputError(
            f"sites {centers[pair]} and {neighbors[pair]} (or an image) are "
            f"{distances[pair]:.2g} Å apart, less than {_COINCIDENT} Å"
        )
    steps = np.rint(distances / _STEP).astype(np.int64)
    kept = other & (steps <= round(radius / _STEP))
    return centers[kept], neighbors[kept], steps[kept]


def check_cell(cell: Sequence[float]) -> None:
    """Refuse what are no three lengths and three angles; their volume is looked at later.

    Raises
    ------
    InvalidInputError
        One is not above 0, or an angle not below 180 degrees.
    """
    if not (all(0 < value for value in cell) and all(value < 180 for value in cell[3:])):
        raise InvalidInputError(f"lengths or angles of the cell not above 0 or below 180: {cell}")
