"""Structures found for formulas by the match probability of eq. 4."""

from dataclasses import replace
from math import comb

import deepchem as dc
import numpy as np
import pytest
import torch
from crystals import CONFIG
from pymatgen.core import Composition, Structure
from retrieval import RANKS, baselines, chance

from polysrl_dc import PolymorphDataset, PolySRLModel, StoichiometryGraphFeaturizer
from polysrl_dc.errors import InvalidInputError


@pytest.fixture(scope="module")
def prototypes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    return PolymorphDataset("aflow", max_sites=8, cache_dir=folder, progress=False)


def formulas_of(dataset):
    return dc.data.NumpyDataset(StoichiometryGraphFeaturizer().featurize(dataset.formulas))


def matching(config=CONFIG, seed=0):
    """A model as if it had been trained: what it answers does not depend on it."""
    model = PolySRLModel("pretraining", config=config, seed=seed)
    model.variance_trained = [True]
    return model


def test_the_order_is_that_of_the_match_probability(prototypes):
    config = replace(CONFIG, log_sigma_shift=-4.0)  # else the probability is one of rare samples
    model = matching(config, seed=1)
    candidates, asked = prototypes.select(range(20)), formulas_of(prototypes.select(range(5)))
    model.model.train()
    indices, probabilities = model.retrieve(asked, candidates, k=20, n_samples=4000)
    assert model.model.training  # as it was
    network = model.model.eval()
    batch, structures, _ = candidates.batch(np.arange(20))
    with torch.no_grad():
        mean, log_sigma = network.encoder(batch)
        noise = torch.randn(5, 4000, mean.shape[1], generator=torch.Generator().manual_seed(9))
        samples = mean[:5, None] + log_sigma[:5, None].exp() * noise
        distance = torch.cdist(samples, network.structure_encoder(structures)[None])
        expected = torch.sigmoid(network.d - network.c * distance).mean(1).numpy()
    assert (np.diff(probabilities, axis=1) <= 0).all()
    found = np.take_along_axis(expected, indices, 1)
    np.testing.assert_allclose(probabilities, found, rtol=0.1)  # other samples
    assert sorted(indices[0]) == list(range(20))


@pytest.mark.parametrize(("form", "factor"), [("sigmoid", 1), ("hib", 2)])
def test_scale_shift_and_form_are_those_of_the_model(prototypes, form, factor):
    """Without a spread: the probability is that of the mean itself."""
    config = replace(CONFIG, log_sigma_shift=-40.0, c_init=3.0, d_init=2.0, match_form=form)
    model, candidates = matching(config), prototypes.select(range(4))
    asked = formulas_of(candidates)
    indices, probabilities = model.retrieve(asked, candidates, k=4, n_samples=1)
    means, crystals = model.predict_embedding(asked), model.predict_structure_embedding(candidates)
    distance = np.linalg.norm(means[:, None] - crystals, axis=2)
    expected = 1 / (1 + np.exp(factor * (3 * distance - 2)))
    found = np.take_along_axis(expected, indices, 1)
    np.testing.assert_allclose(probabilities, found, rtol=1e-4)


def test_the_shipped_encoder_finds_structures_of_real_formulas(prototypes):
    model = PolySRLModel.from_pretrained("polysrl-mp")
    asked = formulas_of(prototypes)
    indices, probabilities = model.retrieve(asked, prototypes, k=10)
    again = model.retrieve(asked, prototypes, k=10)
    np.testing.assert_array_equal(indices, again[0])
    assert ((probabilities >= 0) & (probabilities <= 1)).all()
    hit = prototypes.groups[indices] == prototypes.groups[:, None]
    assert hit.any(1).mean() > 0.5 > 3 * 10 / len(prototypes)  # by chance: 10 / n


def test_other_rows_do_not_matter(prototypes, monkeypatch):
    model = matching()
    candidates = prototypes.select(range(20))
    indices, probabilities = model.retrieve(formulas_of(prototypes), candidates)
    last = formulas_of(prototypes.select([len(prototypes) - 1]))
    monkeypatch.setattr("polysrl_dc.retrieval._PAIRS", 1)
    alone, probability = model.retrieve(last, candidates)
    np.testing.assert_array_equal(alone[0], indices[-1])
    np.testing.assert_allclose(probability[0], probabilities[-1], rtol=1e-5)


def test_structures_of_other_limits_are_refused(prototypes):
    model = matching(replace(CONFIG, max_neighbors=6))
    with pytest.raises(InvalidInputError, match=r"max_neighbors .* is 12, .* 6: set"):
        model.retrieve(formulas_of(prototypes), prototypes)


def test_chunks_do_not_matter(prototypes, monkeypatch):
    model = PolySRLModel("pretraining", config=CONFIG)
    whole = model.predict_structure_embedding(prototypes)
    monkeypatch.setattr("polysrl_dc.retrieval._STRUCTURES", 7)
    np.testing.assert_allclose(model.predict_structure_embedding(prototypes), whole, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(whole, axis=1), 1, atol=1e-5)


def test_structure_graphs_of_a_deepchem_dataset_are_candidates_too(prototypes):
    model = PolySRLModel("pretraining", config=CONFIG)
    graphs = dc.data.NumpyDataset(prototypes.select(range(3)).X)
    expected = model.predict_structure_embedding(prototypes.select(range(3)))
    np.testing.assert_allclose(model.predict_structure_embedding(graphs), expected, atol=1e-5)


def test_what_cannot_be_asked_is_refused(prototypes):
    asked = formulas_of(prototypes.select(range(2)))
    with pytest.raises(ValueError, match="without a structure encoder"):
        PolySRLModel(pretrained=None).retrieve(asked, prototypes)
    graphcl = PolySRLModel("pretraining", config=CONFIG, objective="graphcl")
    graphcl.fit(prototypes.select(range(4)), nb_epoch=1)
    for model in (PolySRLModel("pretraining", config=CONFIG), graphcl):
        with pytest.raises(ValueError, match="nothing has trained the encoder of structures"):
            model.retrieve(asked, prototypes)
    model = matching()
    for k in (0, len(prototypes) + 1):
        with pytest.raises(ValueError, match=f"k is {k}"):
            model.retrieve(asked, prototypes, k=k)
    with pytest.raises(ValueError, match="n_samples is 0"):
        model.retrieve(asked, prototypes, n_samples=0)


def test_structures_alone_are_no_dataset():
    model, structures = matching(), [Structure(np.eye(3), ["Cu"], [[0, 0, 0]])]
    told = r"^list is no DeepChem dataset; .* of structures: StructureGraphFeaturizer$"
    with pytest.raises(TypeError, match=told):
        model.retrieve(["NaCl"], structures)
    with pytest.raises(TypeError, match=told):
        model.predict_structure_embedding(structures)


def test_recall_by_chance_is_that_of_all_draws():
    hits, candidates = np.array([1, 2, 5, 1]), np.array([4, 300, 150, 1])
    for k, found in chance(hits, candidates).items():
        missed = [
            comb(n - m, min(k, n)) / comb(n, min(k, n))
            for m, n in zip(hits.tolist(), candidates.tolist(), strict=True)
        ]
        assert found == pytest.approx(1 - np.mean(missed))
    expected = 1 - comb(9997, 100) / comb(10_000, 100)
    assert chance(np.array([3]), 10_000)[100] == pytest.approx(expected)


def test_baselines_know_distances_and_proportions_and_no_more(prototypes):
    kinds = [Composition(formula).anonymized_formula for formula in prototypes.formulas]
    alone = prototypes.select(np.unique(kinds, return_index=True)[1])  # each of its own proportions
    asked = np.arange(len(alone))
    found = baselines(alone, asked, alone)
    assert found["chance"] == pytest.approx({k: min(k / len(alone), 1) for k in RANKS})
    assert found["proportions"] == found["proportions and distances"] == dict.fromkeys(RANKS, 1.0)
    assert found["distances"][1] > 0.8  # learned from these very structures
    same = np.flatnonzero(np.array(kinds) == "AB")
    alike = prototypes.select(same[np.unique(prototypes.groups[same], return_index=True)[1]])
    found = baselines(alike, np.arange(len(alike)), prototypes)
    assert found["proportions"] == found["chance"]  # which do not tell them apart
    assert found["proportions and distances"] == found["distances"]
    assert found["distances"][10] > found["chance"][10]


def test_candidates_of_the_same_proportions_come_first(prototypes):
    model = PolySRLModel.from_pretrained("polysrl-mp")
    asked, n = ["NaCl", "Mg2SiO4", "Fe4O4", "La0.7Sr0.3MnO3"], len(prototypes)
    plain, likelihood = model.retrieve(asked, prototypes, k=n)
    indices, probabilities = model.retrieve(asked, prototypes, k=n, same_proportions=True)
    kinds = np.array([Composition(name).anonymized_formula for name in prototypes.formulas])
    for row, formula in enumerate(asked):
        alike = kinds[plain[row]] == Composition(formula).anonymized_formula
        order = np.r_[np.flatnonzero(alike), np.flatnonzero(~alike)]
        np.testing.assert_allclose(probabilities[row], likelihood[row][order], rtol=1e-5)
        assert (kinds[indices[row]] == kinds[plain[row]][order]).mean() > 0.99  # but for ties
        assert sorted(indices[row]) == list(range(n))
    assert [sum(kinds == Composition(name).anonymized_formula) > 1 for name in asked] == [
        *(True, True, True, False)
    ]
    few = model.retrieve(asked, prototypes, k=3, same_proportions=True)
    np.testing.assert_array_equal(few[0], indices[:, :3])
    np.testing.assert_array_equal(few[1], probabilities[:, :3])
