"""How often a formula finds its structures among thousands of others.

    python benchmarks/retrieval.py --data-dir DATA

The stoichiometries are those that ``pretrain.py`` held out (same seed); the candidates are all
their structures, filled up with random others. A formula counts as found at k if one of its
polymorphs is among the k likeliest candidates. Scores go to ``<output-dir>/retrieval.csv``.

The encoder of structures sees sites and distances: neither elements nor their proportions. Beside
it stand four ways to rank that need no encoder:

- *chance*: in random order;
- *distances*: by how far the mean and the shortest distance between neighbors are from those that a
  linear map of the atomic fractions expects, learned from structures of pretraining;
- *proportions*: told those of each candidate (AB2), the same ones first, in random order;
- *proportions and distances*: the same ones first, by their distances.

With *proportions and encoder* the encoder is told them as well: the same ones first, by its order
(``retrieve(..., same_proportions=True)``).
"""

from __future__ import annotations

import time

import numpy as np
import pandas as pd
import torch
from command_line import refusing, runner_parser
from files import write_csv
from graph_data import graph_dataset
from pretrain import split
from scipy.spatial.distance import cdist
from scipy.stats import hypergeom
from sklearn.linear_model import Ridge
from tasks import structures_path

from polysrl_dc import PolymorphDataset, PolySRLModel
from polysrl_dc.graphs import StoichiometryBatch
from polysrl_dc.retrieval import ROUNDING, proportions

RANKS = (1, 10, 100)


def recall(indices: np.ndarray, groups: np.ndarray, wanted: np.ndarray) -> dict[int, float]:
    """Share of the formulas with a structure of theirs among the first k, by k.

    Parameters
    ----------
    indices : numpy.ndarray, shape (n, 100) or more
        Candidates of each formula, the likeliest first.
    groups : numpy.ndarray, shape (m,)
        Formula of each candidate.
    wanted : numpy.ndarray, shape (n,)
        Formula that was asked for.

    Examples
    --------
    >>> recall(np.array([[0, 1], [1, 0]]), np.array([7, 8]), np.array([7, 7]))[1]
    0.5
    """
    hits = groups[indices[:, : max(RANKS)]] == wanted[:, None]
    return {k: float(hits[:, :k].any(axis=1).mean()) for k in RANKS}


def chance(hits: np.ndarray, candidates: np.ndarray | int) -> dict[int, float]:
    """Expected recall of candidates in random order, by k.

    Parameters
    ----------
    hits : numpy.ndarray, shape (n,)
        Structures of each formula among its candidates.
    candidates : numpy.ndarray, shape (n,), or int

    Examples
    --------
    >>> chance(np.array([1, 2]), 4)[1]
    0.375
    """
    drawn = {k: np.minimum(k, candidates) for k in RANKS}
    return {k: float(hypergeom.sf(0, candidates, hits, drawn[k]).mean()) for k in RANKS}


def features(structures: PolymorphDataset) -> tuple[StoichiometryBatch, np.ndarray]:
    """The n formulas, and the mean and shortest distance between neighbors, (n, 2)."""
    graphs = structures.X
    formulas = StoichiometryBatch.from_graphs([graph.stoichiometry for graph in graphs])
    found = [graph.distances if len(graph.distances) else [0.0] for graph in graphs]
    return formulas, np.array([(np.mean(each), np.min(each)) for each in found])


def baselines(
    candidates: PolymorphDataset, asked: np.ndarray, others: PolymorphDataset
) -> dict[str, dict[int, float]]:
    """Recall without an encoder, by way to rank and k.

    Parameters
    ----------
    candidates : PolymorphDataset of m structures
    asked : numpy.ndarray, shape (n,)
        A candidate of each formula that is asked for.
    others : PolymorphDataset
        Structures to learn distances from.
    """
    groups, (formulas, distances) = candidates.groups, features(candidates)
    amounts = proportions(formulas).numpy()
    alike = cdist(amounts[asked], amounts, "chebyshev") < ROUNDING
    known, learned = features(others)
    expected = Ridge(alpha=1e-3).fit(known.fractions, learned).predict(formulas.fractions[asked])
    apart = cdist(expected, distances)
    first = np.where(alike, apart, apart + apart.max() + 1)
    by_distance, by_both = (
        recall(np.argsort(by, axis=1, kind="stable"), groups, groups[asked])
        for by in (apart, first)
    )
    hits = (groups == groups[asked, None]).sum(1)
    return {
        "chance": chance(hits, len(candidates)),
        "distances": by_distance,
        "proportions": chance(hits, alike.sum(1)),
        "proportions and distances": by_both,
    }


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = runner_parser(__doc__, cache=True)
    add = parser.add_argument
    add("--structures", help="as for pretrain.py; default: DATA/mp")
    add("--encoder", default="polysrl-mp", help="saved pretraining model")
    add("--candidates", type=int, default=10_000)
    add("--hold-out", type=int, default=2000, help="as in the pretraining")
    add("--seed", type=int, default=0, help="as in the pretraining")
    add("--threads", type=int, default=1)
    add("--dry-run", action="store_true", help="say what would be done, and stop")
    arguments = parser.parse_args(argv)
    with refusing(parser):
        path = structures_path(arguments.structures, arguments.data_dir)
    torch.set_num_threads(arguments.threads)
    dataset = PolymorphDataset(path, on_error="skip", cache_dir=arguments.cache_dir)
    rest, held_out = split(dataset, arguments.hold_out, set(), arguments.seed)
    others = max(0, min(arguments.candidates - len(held_out), len(rest)))
    chosen = np.random.default_rng(arguments.seed).choice(len(rest), others, replace=False)
    is_held = np.isin(dataset.groups, held_out.groups)
    rows = np.concatenate([np.flatnonzero(is_held), np.flatnonzero(~is_held)[chosen]])
    candidates = dataset.select(rows)
    wanted, first = np.unique(held_out.groups, return_index=True)
    print(f"{len(wanted):,} held-out stoichiometries, {len(candidates):,} candidate structures")
    if arguments.dry_run:
        return
    model = PolySRLModel.from_pretrained(arguments.encoder)
    queries = graph_dataset(held_out.formulas[first])
    start = time.perf_counter()
    indices, _ = model.retrieve(queries, candidates, k=max(RANKS))
    seconds = time.perf_counter() - start
    found = recall(indices, candidates.groups, wanted)
    told, _ = model.retrieve(queries, candidates, k=max(RANKS), same_proportions=True)
    sizes = np.bincount(np.searchsorted(wanted, held_out.groups))
    alone = recall(indices[sizes == 1], candidates.groups, wanted[sizes == 1])
    many = recall(indices[sizes > 1], candidates.groups, wanted[sizes > 1])
    random = np.random.default_rng(arguments.seed)
    learned = rest.select(random.permutation(len(rest))[: arguments.candidates])
    table = pd.DataFrame(
        {
            "all": found,
            "one structure": alone,
            "several polymorphs": many,
            **baselines(candidates, first, learned),
            "proportions and encoder": recall(told, candidates.groups, wanted),
        }
    ).rename_axis("k")
    print(table.round(3).to_markdown())
    print(f"{seconds:.0f} s, structures embedded included")
    write_csv(arguments.output_dir / "retrieval.csv", table.reset_index())


if __name__ == "__main__":
    main()
