"""The four pretraining objectives and the augmentation of GraphCL."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from models import assert_same_state, data, make, state
from processes import SMALL, WHITENED, crystals, pretraining

from polysrl_dc import losses
from polysrl_dc.batches import LabeledData
from polysrl_dc.graphs import StoichiometryBatch
from polysrl_dc.objectives import OBJECTIVES, augmented

ROWS = np.arange(24)
PLAIN = replace(SMALL, whitening=0.0)


def step(objective="polysrl", seed=0, config=SMALL, autocast=False):
    """Network and loss after one backward pass."""
    network = pretraining(objective=objective, config=config).model.train()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = network(*crystals().batch(ROWS), torch.Generator().manual_seed(seed))
    loss.backward()
    return network, loss


def without_gradient(network):
    return {name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_what_each_objective_trains(objective):
    network, loss = step(objective)
    assert loss.ndim == 0 and torch.isfinite(loss)
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    unused = without_gradient(network)
    names = {name for name, _ in network.named_parameters()}
    sigma = {name for name in names if "sigma" in name}
    structure = {name for name in names if name.startswith("structure_encoder.")}
    assert sigma and structure
    expected = {
        "polysrl": set(),
        "without_sampling": sigma,
        "infomax3d": sigma | {"c", "d"},
        "graphcl": sigma | structure | {"c", "d"},
    }[objective]
    assert {name for name in unused if name not in expected} <= {
        # an output that the normalization of the batch removes
        name for name in names if name.endswith(("mean_output.bias", "jumping_knowledge.bias"))
    }
    assert expected <= unused


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_few_steps_of_each_objective_lower_the_loss(objective):
    losses_ = []
    model = pretraining(objective=objective, log_frequency=5, batch_size=12)
    model.fit(crystals(), nb_epoch=12, checkpoint_interval=0, all_losses=losses_)
    assert np.isfinite(losses_).all() and losses_[-1] < losses_[0]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_parts_add_up_to_the_loss(objective):
    network, loss = step(objective, config=replace(SMALL, beta=0.01))
    names = {"polysrl": {"contrastive", "kl"}, "without_sampling": {"contrastive"}}
    assert network.parts.keys() == names.get(objective, {"nt_xent"})
    assert sum(network.parts.values()).item() == pytest.approx(loss.item(), rel=1e-6)
    assert all(not part.requires_grad and part > 0 for part in network.parts.values())


def test_losses_are_those_of_the_equations():
    formulas, structures, groups = crystals().batch(ROWS)
    config = replace(SMALL, beta=0.01)
    for objective in ("polysrl", "without_sampling", "infomax3d"):
        network, found = step(objective, config=config)
        fresh = pretraining(objective=objective, config=config).model.train()
        mean, log_sigma = fresh.encoder(formulas)
        crystal = fresh.structure_encoder(structures)
        pairs = (crystal, groups, groups, fresh.c, fresh.d)
        if objective == "polysrl":
            generator = torch.Generator().manual_seed(0)
            expected = losses.polysrl_loss(
                mean, log_sigma, *pairs, n_samples=8, beta=0.01, generator=generator
            )
        elif objective == "infomax3d":
            expected = losses.nt_xent(mean, crystal, network.temperature)
        else:
            expected = losses.soft_contrastive_loss(mean.unsqueeze(1), *pairs)
        torch.testing.assert_close(found, expected)


def test_the_generator_decides_the_samples():
    losses_ = {seed: step(seed=seed)[1].item() for seed in (0, 1)}
    assert losses_[0] == step(seed=0)[1].item() != losses_[1]
    assert step("infomax3d", seed=0)[1].item() == step("infomax3d", seed=1)[1].item()


@pytest.mark.parametrize(
    "change",
    [{"polymorph_sum": True}, {"match_form": "hib"}, {"loss_reduction": "sum"}, {"n_samples": 3}],
    ids=str,
)
def test_variants_of_the_loss_train_and_differ(change):
    network, loss = step(config=replace(SMALL, **change))
    assert torch.isfinite(loss) and not without_gradient(network) & {"c", "d"}
    assert loss.item() != pytest.approx(step()[1].item(), rel=1e-4)
    if "loss_reduction" in change:
        assert loss.item() == pytest.approx(step()[1].item() * len(ROWS) ** 2, rel=1e-3)


def test_whole_numbers_are_constants_too():
    assert step(config=replace(SMALL, c_init=20, d_init=20))[1].item() == step()[1].item()


@pytest.mark.parametrize("config", [PLAIN, WHITENED], ids=["plain", "whitened"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_loss_in_bfloat16_is_that_in_float32(objective, config):
    loss, half = (step(objective, config=config, autocast=cast)[1].item() for cast in (False, True))
    assert half != loss
    # two views of GraphCL are so near that rounding weighs more; by chance it is log(n - 1)
    tolerance = 0.03 * np.log(len(ROWS) - 1) if objective == "graphcl" else 0.02 * loss
    assert half == pytest.approx(loss, abs=tolerance)


def test_pretraining_under_autocast_stays_in_float32_weights():
    model = pretraining(autocast=True, config=WHITENED)
    assert np.isfinite(model.fit(crystals(), nb_epoch=2, checkpoint_interval=0))
    kinds = {value.dtype for value in model.model.state_dict().values()}
    assert kinds == {torch.float32, torch.int64}


def test_an_unknown_objective_and_missing_structures_are_refused():
    with pytest.raises(ValueError, match="objective is 'simclr'"):
        pretraining(objective="simclr")
    network = pretraining().model
    formulas, _, groups = crystals().batch(ROWS)
    with pytest.raises(ValueError, match="needs structures"):
        network(formulas, None, groups)
    network = pretraining(objective="graphcl").model
    assert torch.isfinite(network(formulas, None, groups))


# ------------------------------------------------------------------------- whitening


def test_whitening_adapts_in_pretraining_only(tmp_path):
    names = ("encoders.0.mean_norm.covariance", "encoders.0.mean_norm.decorrelation")
    model = pretraining(config=WHITENED)
    before = state(model)
    model.fit(crystals(), nb_epoch=1, checkpoint_interval=0)
    after = state(model)
    for name in (*names, "structure_encoder.norm.covariance"):
        assert not torch.equal(before[name], after[name])
    model.save(tmp_path)
    tuned = make(config=WHITENED, pretrained=tmp_path, device="cpu")
    tuned.fit(data(), nb_epoch=2, checkpoint_interval=0)
    for name in names:
        torch.testing.assert_close(after[name], state(tuned)[name], rtol=0, atol=0)
    assert not torch.equal(
        after["encoders.0.mean_output.weight"], state(tuned)["encoders.0.mean_output.weight"]
    )
    model.predict_embedding(data())  # nor in evaluation
    assert_same_state(after, state(model))


def test_whitening_removes_correlations():
    def greatest_variance(whitening):
        config = replace(SMALL, whitening=whitening)
        network = pretraining(config=config, batch_size=37).model.train()
        _, structures, _ = crystals().batch(np.arange(len(crystals())))
        norm = network.structure_encoder.norm
        kept = []
        norm.register_forward_hook(lambda module, inputs, output: kept.append(output.detach()))
        for _ in range(200):
            network.structure_encoder(structures)
        return torch.linalg.eigvalsh(torch.cov(kept[-1].T)).max()

    plain, half, full = map(greatest_variance, (0.0, 0.5, 1.0))
    assert plain > 4 and full < half < plain and full < 1.5


# ------------------------------------------------------------------------- augmentation


def formulas():
    texts = ["Fe", "NaCl", "BaTiO3", "Al0.99Cr0.01", "CsPbI3"] * 400
    return LabeledData.from_dataset(data(np.zeros(len(texts)), formulas=texts), 1, False).inputs


def test_views_are_formulas_with_at_most_one_element_less():
    plain, generator = formulas(), torch.Generator().manual_seed(0)
    view = augmented(plain, generator).fractions
    torch.testing.assert_close(view.sum(1), torch.ones(len(plain)))
    assert (view >= 0).all()
    present, kept = plain.fractions > 0, view > 0
    assert not (kept & ~present).any()
    dropped = (present & ~kept).sum(1)
    single = present.sum(1) == 1
    assert (kept.sum(1) > 0).all() and not dropped[single].any()
    torch.testing.assert_close(view[single], plain.fractions[single])
    assert set(dropped.tolist()) == {0, 1}
    share = dropped[~single].float().mean().item()
    assert share == pytest.approx(0.2, abs=0.03)
    salt = (present & ~kept)[1::5]  # NaCl: either element may go
    assert salt[:, 11].any() and salt[:, 17].any()


def test_fractions_are_perturbed_by_a_tenth():
    plain = formulas()
    view = augmented(plain, torch.Generator().manual_seed(0)).fractions
    salt = view[1::5]
    whole = salt[(salt > 0).sum(1) == 2]
    ratio = (whole[:, 11] / whole[:, 17]).log()
    assert ratio.std().item() == pytest.approx(0.1 * 2**0.5, rel=0.15)
    assert ratio.mean().item() == pytest.approx(0.0, abs=0.03)


def test_views_depend_on_the_generator_only():
    plain = formulas()
    before = plain.fractions.clone()
    generator = torch.Generator().manual_seed(4)
    first, second = augmented(plain, generator), augmented(plain, generator)
    torch.testing.assert_close(plain.fractions, before, rtol=0, atol=0)
    torch.manual_seed(99)
    again = augmented(plain, torch.Generator().manual_seed(4))
    assert torch.equal(first.fractions, again.fractions)
    assert not torch.equal(first.fractions, second.fractions)
    several = (before > 0).sum(1) > 1
    assert (first.fractions != before)[several].any(1).all()
    assert isinstance(first, StoichiometryBatch)
