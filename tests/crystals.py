"""Structure graphs of many kinds, and the published encoder on all their sites and edges."""

from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import reference
import torch
from monty.serialization import loadfn
from pymatgen.analysis import prototypes
from torch_geometric.data import Batch

from polysrl_dc.config import PolySRLConfig
from polysrl_dc.featurizers import StructureGraphFeaturizer
from polysrl_dc.graphs import StoichiometryGraph, StructureBatch, StructureGraph
from polysrl_dc.structure_encoder import StructureEncoder

CONFIG = replace(PolySRLConfig.named("paper"), n_features=7, edge_hidden=11)
HYDROGEN = StoichiometryGraph(np.array([1], np.uint8), np.array([1.0]), "H")
AFLOW = loadfn(Path(prototypes.__file__).with_name("aflow_prototypes.json.gz"))
PROTOTYPES = [
    structure
    for structure in (entry["snl"].structure for entry in AFLOW[::12])
    if len(structure) <= 40
]


def prototype_graphs():
    return list(StructureGraphFeaturizer()(PROTOTYPES))


def graph_of(degrees, neighbors, distances):
    """A structure graph from its edges; sites are hydrogen."""
    return StructureGraph(
        np.ones(len(degrees), np.uint8),
        np.concatenate([[0], np.cumsum(degrees, dtype=np.int64)]),
        np.asarray(neighbors, np.int32),
        np.asarray(distances, np.float32),
        HYDROGEN,
    )


def random_cover(rng, n_base=5, folds=3):
    """Copies of a random graph whose edges lead to any copy: ties, isolated sites, 0 to 4 edges.

    All copies of a site are equivalent, whatever copies its edges lead to; sites are shuffled.
    """
    base = rng.integers(0, 5, n_base)
    base[rng.integers(n_base)] = 0
    ends = [rng.integers(0, n_base, k) for k in base]
    lengths = [np.sort(rng.choice([1.5, 2.25, 3.0], k)) for k in base]
    position = rng.permutation(n_base * folds).reshape(folds, n_base)
    sites = {
        int(position[fold, i]): (position[rng.integers(0, folds, base[i]), ends[i]], lengths[i])
        for fold in range(folds)
        for i in range(n_base)
    }
    lists = [sites[site] for site in range(n_base * folds)]
    return graph_of(
        [len(ends) for ends, _ in lists],
        np.concatenate([ends for ends, _ in lists]),
        np.concatenate([lengths for _, lengths in lists]),
    )


def random_covers(n=6):
    rng = np.random.default_rng(0)
    return [random_cover(rng, n_base=2 + i, folds=1 + i % 3) for i in range(n)]


def isolated():
    """Graphs of sites without edges, and of two equal sites that see each other."""
    return [graph_of([0], [], []), graph_of([0] * 3, [], []), graph_of([1, 1], [1, 0], [2.0, 2.0])]


def double(batch):
    """The batch with its floating-point tensors in double precision."""
    values = {field.name: getattr(batch, field.name) for field in fields(batch)}
    changed = {
        name: value.double()
        for name, value in values.items()
        if isinstance(value, torch.Tensor) and value.is_floating_point()
    }
    return replace(batch, **changed)


def make_encoder(**changes):
    """A float64 encoder in which no affine parameter is at its neutral start."""
    encoder = StructureEncoder(replace(CONFIG, **changes)).double().eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return encoder


def embed(encoder, graphs, **quotient):
    return encoder(double(StructureBatch.from_graphs(graphs, **quotient)))


def published(encoder, **changes):
    """The encoder of the paper with the same weights: all sites, the edge MLP on every edge."""
    literal = reference.ReferenceStructureEncoder(replace(CONFIG, **changes)).double().eval()
    reference.load_weights(literal, encoder.state_dict())
    return literal


def embed_all_sites(literal, graphs):
    data = [reference.crystal_from_graph(graph).structure for graph in graphs]
    batch = Batch.from_data_list(data)
    batch.distances = batch.distances.double()
    return literal(batch)
