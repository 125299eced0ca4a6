"""Sites that message passing cannot tell apart, merged into one node with a multiplicity.

Every site starts from the same vector and sees distances only, so symmetry-equivalent sites (and
all atoms of rock salt, whatever their element) stay equal through every block of the structure
encoder. Color refinement (Weisfeiler & Leman 1968) finds them in advance; the encoder then works
on the quotient graph, and its result is that of the whole graph.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_BITS = 20  # of a distance and of a node in the integer that stands for an edge


@dataclass(frozen=True, slots=True, eq=False)
class Quotient:
    """Quotient graphs of a set of structure graphs, concatenated.

    Attributes
    ----------
    node_counts : numpy.ndarray, shape (n_graphs,), int64
        Nodes (classes of equivalent sites) of each graph.
    multiplicity : numpy.ndarray, shape (n_nodes,), int32
        Sites in each class.
    edge_counts : numpy.ndarray, shape (n_nodes,), int32
        Edges of each node.
    neighbors : numpy.ndarray, shape (n_edges,), int32
        Node at the other end, counted from the first node of its graph.
    steps : numpy.ndarray, shape (n_edges,), int32
        Distances in units of ``resolution``.
    edge_multiplicity : numpy.ndarray, shape (n_edges,), int32
        Equal edges of one site that this edge stands for.

    Examples
    --------
    One site with six edges of 3 Å to its own images:

    >>> one = quotient_graphs(np.array([1]), np.array([6]), np.zeros(6, int), np.full(6, 3.0),
    ...                       rounds=3, resolution=0.01)
    >>> one.edge_counts.tolist(), one.edge_multiplicity.tolist()
    ([1], [6])
    """

    node_counts: NDArray[np.int64]
    multiplicity: NDArray[np.int32]
    edge_counts: NDArray[np.int32]
    neighbors: NDArray[np.int32]
    steps: NDArray[np.int32]
    edge_multiplicity: NDArray[np.int32]


def quotient_graphs(
    site_counts: NDArray[np.integer],
    degrees: NDArray[np.integer],
    neighbors: NDArray[np.integer],
    distances: NDArray[np.floating],
    *,
    rounds: int,
    resolution: float,
) -> Quotient:
    """Merge the sites of each graph that ``rounds`` blocks of message passing cannot tell apart.

    Parameters
    ----------
    site_counts : numpy.ndarray, shape (n_graphs,)
        Sites of each graph.
    degrees : numpy.ndarray, shape (n_sites,)
        Edges of each site.
    neighbors : numpy.ndarray, shape (n_edges,)
        Site index within the graph.
    distances : numpy.ndarray, shape (n_edges,)
        In Å; rounded to multiples of ``resolution``.
    rounds : int
        Blocks of the encoder; more rounds are also right, and merge less.
    resolution : float
        In Å.

    Returns
    -------
    Quotient

    Raises
    ------
    ValueError
        A graph has 2^20 sites or a distance of as many steps, or there are 2^23 nodes, or more.

    Notes
    -----
    Colors are 64-bit hashes: among a million sites two different ones share a color with a
    probability below 1e-7.

    Examples
    --------
    Two equal sites, each with two neighbors at 2 Å and one at 3 Å:

    >>> merged = quotient_graphs(np.array([2]), np.array([3, 3]), np.array([1, 1, 0, 0, 0, 1]),
    ...                          np.array([2, 2, 3, 2, 2, 3.0]), rounds=3, resolution=0.01)
    >>> merged.multiplicity.tolist(), merged.steps.tolist(), merged.edge_multiplicity.tolist()
    ([2], [200, 300], [2, 1])
    """
    n_sites = int(site_counts.sum())
    graph = np.repeat(np.arange(len(site_counts)), site_counts)
    first_site = np.cumsum(site_counts) - site_counts
    centers = np.repeat(np.arange(n_sites), degrees)
    others = neighbors + first_site[graph[centers]]
    steps = np.rint(distances / resolution).astype(np.int64)
    for what, counts in (("steps of distance", steps), ("sites", site_counts)):
        if counts.max(initial=0) >= 2**_BITS:
            raise ValueError(f"{counts.max()} {what} in one graph: more than {2**_BITS - 1}")

    ends = np.cumsum(degrees)
    hashed_steps = _mix(steps)
    color = _mix(graph)
    for _ in range(rounds):
        sums = np.concatenate([[np.uint64(0)], np.cumsum(_mix(hashed_steps + color[others]))])
        color = _mix(_mix(color) + sums[ends] - sums[ends - degrees])

    _, first, inverse = np.unique(color, return_index=True, return_inverse=True)
    rank = np.argsort(np.argsort(first))  # nodes in the order of their first sites: by graph
    node = rank[inverse]
    representatives = np.sort(first)
    node_graph = graph[representatives]
    if len(representatives) >= 2 ** (63 - 2 * _BITS):
        raise ValueError(f"{len(representatives)} nodes: merge fewer graphs at once")
    node_counts = np.bincount(node_graph, minlength=len(site_counts))
    first_node = np.cumsum(node_counts) - node_counts

    chosen = np.zeros(n_sites, dtype=bool)
    chosen[representatives] = True
    kept = chosen[centers]
    center, other, step = node[centers[kept]], node[others[kept]], steps[kept]
    edges, edge_multiplicity = np.unique(
        (center << 2 * _BITS) | (step << _BITS) | (other - first_node[node_graph[center]]),
        return_counts=True,
    )
    return Quotient(
        node_counts,
        np.bincount(node, minlength=len(representatives)).astype(np.int32),
        np.bincount(edges >> 2 * _BITS, minlength=len(representatives)).astype(np.int32),
        (edges & (2**_BITS - 1)).astype(np.int32),
        ((edges >> _BITS) & (2**_BITS - 1)).astype(np.int32),
        edge_multiplicity.astype(np.int32),
    )


def _mix(values: NDArray[np.integer]) -> NDArray[np.uint64]:
    """Scramble 64-bit integers (SplitMix64); arithmetic wraps around."""
    mixed = (values.astype(np.uint64) + np.uint64(1)) * _GOLDEN
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
