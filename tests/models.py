"""A small model and a small data set for the tests of ``PolySRLModel``."""

from dataclasses import replace

import deepchem as dc
import numpy as np
import torch

import polysrl_dc

CONFIG = replace(polysrl_dc.PolySRLConfig.named("default"), n_features=16, head_hidden=8)
PLAIN = replace(CONFIG, heteroscedastic=False)
MAE = dc.metrics.Metric(dc.metrics.mae_score)
CATIONS = ["Li", "Na", "K", "Rb", "Mg", "Ca", "Sr", "Ba", "Zn", "Cd", "Al", "Ga"]
FORMULAS = [cation + anion for cation in CATIONS for anion in ("O", "S", "Cl2")]
N = len(FORMULAS)
#: A property of the anion and, a little, of the cation; mean 0 and of unit size.
SIGNAL = np.array([float(i % 3 - 1) + 0.05 * (i // 3 - 5.5) for i in range(N)])


def data(y=SIGNAL, w=None, formulas=FORMULAS):
    return dc.data.NumpyDataset(dc.feat.StoichiometryGraphFeaturizer()(formulas), y, w)


def dataset_of(graphs, **kwargs):
    """Graphs of whatever kind, labels and ids as a dataset."""
    X = np.empty(len(graphs), dtype=object)
    X[:] = graphs
    return dc.data.NumpyDataset(X, **kwargs)


def make(*args, **kwargs):
    settings = {"config": CONFIG, "pretrained": None, "batch_size": 8, "learning_rate": 1e-2}
    return dc.models.PolySRLModel(*args, **{**settings, **kwargs})


def fitted(*args, dataset=None, nb_epoch=2, **kwargs):
    model = make(*args, **kwargs)
    model.fit(data() if dataset is None else dataset, nb_epoch=nb_epoch, checkpoint_interval=0)
    return model


def state(model, prefix=""):
    return {k: v.clone() for k, v in model.model.state_dict().items() if k.startswith(prefix)}


def assert_same_state(one, other):
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
