"""Roost and CrabNet as models of DeepChem."""

import deepchem as dc
import numpy as np
import pytest
import torch
from graph_data import graph_dataset

from polysrl_dc.checkpoints import CheckpointError

pytest.importorskip("aviary", reason="Roost needs the extra 'peers'")
pytest.importorskip("pytorch_optimizer", reason="CrabNet needs the extra 'peers'")

from crabnet import CrabNetConfig, CrabNetModel
from roost import RoostModel

TINY = CrabNetConfig(width=8, layers=1, heads=2, feed_forward=8, head=(4,))
MODELS = {
    "roost": lambda **given: RoostModel(epochs=1, n_graph=1, trunk_hidden=(8,), **given),
    "crabnet": lambda **given: CrabNetModel(epochs=20, config=TINY, **given),
}
ERROR = dc.metrics.Metric(dc.metrics.mean_absolute_error, name="mae")


@pytest.fixture(scope="module")
def gaps():
    values = np.array([8.5, 8.4, 7.8, 7.1, 13.6, 3.4, 9.2, 6.3])
    return graph_dataset(["NaCl", "KCl", "MgO", "CaO", "LiF", "ZnO", "BaF2", "KI"], values)


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_peers_are_evaluated_as_models_of_deepchem(make, gaps):
    model = make().fit(gaps)
    assert isinstance(model, dc.models.Model)
    assert (model.get_task_type(), model.get_num_tasks()) == ("regression", 1)
    error = np.abs(model.predict(gaps) - gaps.y).mean()
    assert model.evaluate(gaps, [ERROR])["mae"] == pytest.approx(error, rel=1e-6)
    scaler = dc.trans.NormalizationTransformer(transform_y=True, dataset=gaps)
    model, scaled = make(), scaler.transform(gaps)
    model.fit(scaled)
    error = np.abs(scaler.untransform(model.predict(scaled)) - gaps.y).mean()
    assert model.evaluate(scaled, [ERROR], [scaler])["mae"] == pytest.approx(error, rel=1e-6)


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_a_saved_peer_predicts_the_same(make, gaps, tmp_path):
    with pytest.raises(ValueError, match="not fitted"):
        make(model_dir=str(tmp_path)).save()
    model = make(model_dir=str(tmp_path)).fit(gaps)
    model.save()
    again = make(model_dir=str(tmp_path), seed=5)
    again.reload()
    for ours, theirs in zip(
        again.predict_uncertainty(gaps), model.predict_uncertainty(gaps), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)


def test_the_file_of_another_model_is_refused(gaps, tmp_path):
    MODELS["roost"](model_dir=str(tmp_path)).fit(gaps).save()
    model = MODELS["crabnet"](model_dir=str(tmp_path))
    before = {name: value.clone() for name, value in model.model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        model.reload()
    assert all(torch.equal(value, before[name]) for name, value in model.model.state_dict().items())
    with pytest.raises(ValueError, match="not fitted"):
        model.predict(gaps)
