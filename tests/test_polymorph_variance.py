"""The variance of a formula, fitted to the spread of its polymorphs."""

from dataclasses import replace

import deepchem as dc
import numpy as np
import pytest
import torch
from crystals import CONFIG
from pymatgen.core import Lattice, Structure

from polysrl_dc import PolymorphDataset, PolySRLModel, StoichiometryGraphFeaturizer
from polysrl_dc.errors import InvalidInputError
from polysrl_dc.graphs import StoichiometryBatch
from polysrl_dc.polymorph_variance import doped, fit_polymorph_variance, polymorph_spread

CATIONS = ["Na", "K", "Rb", "Mg", "Ca", "Sr"]
HALF = [0.5, 0.5, 0.5]


def halide(cation, group):
    return Structure.from_spacegroup(group, Lattice.cubic(5.6), [cation, "Cl"], [[0, 0, 0], HALF])


@pytest.fixture(scope="module")
def chlorides():
    """Of every other cation two structures, of the rest one."""
    structures = [halide(cation, "Fm-3m") for cation in CATIONS]
    structures += [halide(cation, "Pm-3m") for cation in CATIONS[::2]]
    return PolymorphDataset(structures, progress=False, processes=1)


def model_of(objective="polysrl", log_sigma_shift=-3.0):
    config = replace(CONFIG, log_sigma_shift=log_sigma_shift)
    return PolySRLModel("pretraining", config=config, objective=objective)


def formulas(names):
    return dc.data.NumpyDataset(StoichiometryGraphFeaturizer().featurize(names))


def weights(model):
    return {name: value.clone() for name, value in model.model.state_dict().items()}


def test_spread_is_the_biased_variance_of_each_formula():
    rng = np.random.default_rng(0)
    values, groups = rng.normal(size=(30, 4)), rng.integers(0, 5, 30)
    expected = [values[groups == group].var(0) for group in range(5)]
    np.testing.assert_allclose(polymorph_spread(values, groups), expected)


def test_a_doped_formula_is_its_host_but_for_a_part_of_one_element():
    names = ["NaCl", "MgO", "Fe2O3", "Si", "BaTiO3"] * 20
    hosts = StoichiometryBatch.from_graphs(list(StoichiometryGraphFeaturizer().featurize(names)))
    found = doped(hosts, torch.Generator().manual_seed(0), vacant=0.0).fractions
    change = found - hosts.fractions
    torch.testing.assert_close(found.sum(1), torch.ones(len(names)))
    assert (found >= 0).all()
    lost = -change.clamp(max=0).sum(1)
    share = lost / (hosts.fractions * (change < -1e-6)).sum(1)
    changed = lost > 1e-6  # the dopant may be the element that it replaces
    assert changed.float().mean() > 0.6
    assert ((change[changed] < -1e-6).sum(1) == 1).all()
    assert share[changed].min() > 0.004
    assert share[changed].max() < 0.31
    others = hosts.fractions.sum(0) > 0
    assert not (found[:, ~others] > 0).any()
    empty = doped(hosts, torch.Generator().manual_seed(0), vacant=1.0).fractions
    assert ((empty > 0) == (hosts.fractions > 0)).all()


def test_only_what_the_variance_depends_on_is_trained(chlorides):
    model = model_of("without_sampling")
    model.model.train()
    asked = formulas([f"{cation}Cl" for cation in CATIONS])
    before, means = weights(model), model.predict_embedding(asked)
    assert model.variance_trained == [False]
    fit_polymorph_variance(model, chlorides, n_steps=10, batch_size=4)
    assert model.variance_trained == [True]
    after = weights(model)
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed
    assert all(".sigma_" in name for name in changed)
    np.testing.assert_array_equal(model.predict_embedding(asked), means)
    assert model.model.training  # as it was


def test_sigma_becomes_the_spread_of_the_polymorphs(chlorides):
    model = PolySRLModel.from_pretrained("polysrl-mp")
    losses = fit_polymorph_variance(
        model, chlorides, n_steps=800, batch_size=6, unknown=0.0, noise=0.02
    )
    assert losses[-1] < losses[0]
    asked = formulas([f"{cation}Cl" for cation in CATIONS])
    sigma = np.sqrt(model.predict_polymorphism(asked))
    one, two = sigma[1::2], sigma[::2]
    np.testing.assert_allclose(one, 0.02, rtol=0.2)  # nothing but the noise
    embeddings = model.predict_structure_embedding(chlorides)
    groups = np.unique(chlorides.groups, return_inverse=True)[1]
    spread = polymorph_spread(embeddings, groups) + 0.02**2
    expected = np.exp(np.log(spread).mean(1) / 2)
    several = np.bincount(groups) > 1
    np.testing.assert_allclose(np.sort(two), np.sort(expected[several]), rtol=0.15)
    assert two.min() > one.max()


def test_doped_formulas_get_the_variance_of_those_with_several_structures(chlorides):
    asked = formulas(["Na0.93K0.07Cl", "Ca0.95Sr0.05Cl", "Rb0.9Mg0.1Cl"])
    known = formulas(["KCl", "MgCl", "SrCl"])  # of one structure each
    model = PolySRLModel.from_pretrained("polysrl-mp")
    fit_polymorph_variance(model, chlorides, n_steps=800, batch_size=6, unknown=1.0)
    assert model.predict_polymorphism(asked).mean() > 2 * model.predict_polymorphism(known).mean()


def test_doped_formulas_count_by_their_share(chlorides):
    """Before the first step, when sigma is nearly the same for all."""
    none, half, whole = (
        fit_polymorph_variance(model_of(), chlorides, n_steps=1, batch_size=4, unknown=unknown)[0]
        for unknown in (0, 0.5, 1)
    )
    assert whole - none == pytest.approx(2 * (half - none), rel=0.2)


def test_gradients_are_clipped(chlorides, monkeypatch):
    """They are great where sigma is far below the spread."""
    norms, step = [], torch.optim.Adam.step

    def noted(optimizer, *args, **kwargs):
        (group,) = optimizer.param_groups
        norms.append(torch.stack([p.grad.norm() for p in group["params"]]).norm().item())
        return step(optimizer, *args, **kwargs)

    monkeypatch.setattr(torch.optim.Adam, "step", noted)
    model = model_of(log_sigma_shift=-9.0)
    fit_polymorph_variance(model, chlorides, n_steps=2, batch_size=4)
    np.testing.assert_allclose(norms, model.config.grad_clip, rtol=1e-3)


def test_the_same_seed_gives_the_same_weights(chlorides):
    models = [model_of() for _ in range(3)]
    for model, seed in zip(models, (0, 0, 1), strict=True):
        losses = fit_polymorph_variance(model, chlorides, n_steps=3, batch_size=4, seed=seed)
        assert len(losses) == 3 and np.isfinite(losses).all()
    first, second, third = (model.predict_polymorphism(formulas(["NaCl"])) for model in models)
    assert first == second
    assert first != third


def test_what_cannot_be_fitted_is_refused(chlorides):
    single = chlorides.select(range(len(CATIONS)))
    with pytest.raises(InvalidInputError, match="no formula has several structures"):
        fit_polymorph_variance(model_of(), single, n_steps=1)
    with pytest.raises(ValueError, match=r"unknown is 1\.5"):
        fit_polymorph_variance(model_of(), chlorides, unknown=1.5)
    with pytest.raises(ValueError, match="n_steps is 0"):
        fit_polymorph_variance(model_of(), chlorides, n_steps=0)
    with pytest.raises(ValueError, match="without a structure encoder"):
        fit_polymorph_variance(PolySRLModel(), chlorides, n_steps=1)
