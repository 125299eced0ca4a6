"""``polysrl_dc`` against the published formulas written out, and the speed comparison of both."""

from dataclasses import fields, replace

import numpy as np
import pandas as pd
import pytest
import reference
import speed
import torch
from pymatgen.core import Lattice, Structure

from polysrl_dc import StructureGraphFeaturizer, losses
from polysrl_dc.config import PolySRLConfig
from polysrl_dc.graphs import StoichiometryBatch, StructureBatch
from polysrl_dc.objectives import PretrainingNetwork

PAPER = PolySRLConfig.named("paper")


def crystals():
    """Structures of high and no symmetry, polymorphs, isolated sites, 1 to 9 sites."""
    cubic, rng = Lattice.cubic, np.random.default_rng(0)
    rutile = [
        [0, 0, 0], [0.5, 0.5, 0.5], [0.305, 0.305, 0],
        [0.695, 0.695, 0], [0.805, 0.195, 0.5], [0.195, 0.805, 0.5],
    ]  # fmt: skip
    corners = [[0, 0, 0], [0.5, 0.5, 0.5]]
    grid = np.array(list(np.ndindex(3, 3, 1))) / [3, 3, 1] + rng.uniform(0, 0.1, (9, 3))
    return [
        Structure.from_spacegroup("Fm-3m", cubic(5.69), ["Na", "Cl"], corners),
        Structure(cubic(3.4), ["Na", "Cl"], corners),
        Structure(cubic(2.87), ["Fe", "Fe"], corners),
        Structure(Lattice.tetragonal(4.59, 2.96), ["Ti"] * 2 + ["O"] * 4, rutile),
        Structure(Lattice([[9, 1, 0], [0, 8, 2], [1, 0, 4]]), ["Si", "O", "Al"] * 3, grid),
        Structure(cubic(7.5), ["Xe"], [[0, 0, 0]]),  # 6 neighbors only
        Structure(cubic(9.0), ["Ne", "Ar"], [[0, 0, 0], [0.5, 0.5, 0.5]]),  # 8 each
    ]


def graphs(structures=None):
    """Graphs whose distances are multiples of 0.01 Å, so that no batch can round them further."""
    made = StructureGraphFeaturizer()(crystals() if structures is None else structures)
    return [replace(graph, distances=graph.distances.round(2)) for graph in made]


def double(batch):
    """The batch with its floating-point tensors in double precision."""
    values = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return replace(
        batch,
        **{
            name: value.double()
            for name, value in values.items()
            if isinstance(value, torch.Tensor) and value.is_floating_point()
        },
    )


def our_batch(made):
    formulas = [graph.stoichiometry for graph in made]
    groups = np.unique([formula.formula for formula in formulas], return_inverse=True)[1]
    return (
        double(StoichiometryBatch.from_graphs(formulas)),
        double(StructureBatch.from_graphs(made)),
        torch.from_numpy(groups),
    )


def networks(config):
    """Ours and the reference with equal weights, in double precision, none at its start."""
    ours = PretrainingNetwork(config, "polysrl").double()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        ours.encoders[0].sigma_output.bias -= 2.0  # else all samples are far from everything
    theirs = reference.ReferenceNetwork(config).double()
    reference.load_weights(theirs, ours.state_dict())
    return ours, theirs


def test_neighbors_are_those_of_the_published_search():
    for structure, graph in zip(crystals(), StructureGraphFeaturizer()(crystals()), strict=True):
        crystal = reference.crystal_from_structure(structure)
        ours = reference.crystal_from_graph(graph)
        assert torch.equal(crystal.structure.edge_index[0], ours.structure.edge_index[0])
        torch.testing.assert_close(
            crystal.structure.distances, ours.structure.distances, atol=2e-5, rtol=0
        )
        assert torch.equal(crystal.formula.numbers, ours.formula.numbers)
        assert torch.equal(crystal.formula.edge_index, ours.formula.edge_index)
        torch.testing.assert_close(crystal.formula.fractions, ours.formula.fractions)
        assert crystal.reduced_formula == ours.reduced_formula


CONFIGS = {
    "paper": replace(PAPER, edge_hidden=32),
    "narrow": replace(PAPER, n_features=12, edge_hidden=7, structure_layers=2, set2set_steps=3),
    "norm": replace(PAPER, n_features=16, edge_hidden=8, feature_norm=True),
    "mean": replace(PAPER, n_features=8, edge_hidden=8, structure_pooling="mean", n_samples=3),
}


# In float32 fractions add up to 1, which ours relies on, only to 3e-8, and the distances of the two
# batches may differ in their last bit; the arithmetic itself agrees to 1e-12.
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_outputs_loss_and_gradients_are_equal(config):
    ours, theirs = networks(config)
    made = graphs()
    formulas, structures, groups = our_batch(made)
    their_formulas, their_structures, their_groups = reference.collate(
        [reference.crystal_from_graph(graph) for graph in made]
    )
    assert torch.equal(groups, their_groups) and len(groups.unique()) == len(groups) - 1

    for one, other in zip(
        ours.encoders[0](formulas), theirs.encoders[0](their_formulas), strict=True
    ):
        torch.testing.assert_close(one, other, atol=1e-7, rtol=0)
    one, other = ours.structure_encoder(structures), theirs.structure_encoder(their_structures)
    assert other.std(dim=0).max() > 1e-2
    torch.testing.assert_close(one, other, atol=1e-5, rtol=0)

    def loss(network, batch):
        return network.loss(*batch, torch.Generator().manual_seed(1))

    one = loss(ours, (formulas, structures, groups))
    other = loss(theirs, (their_formulas, their_structures, groups))
    torch.testing.assert_close(one, other, rtol=1e-5, atol=0)
    one.backward()
    other.backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    assert {reference.reference_name(name) for name, _ in ours.named_parameters()} == set(gradients)
    for name, parameter in ours.named_parameters():
        expected = gradients[reference.reference_name(name)]
        size = expected.abs().max().item()
        assert size > 0, name
        # Of a bias before a normalization over the batch the gradient is rounding noise.
        torch.testing.assert_close(
            parameter.grad, expected, rtol=0, atol=1e-4 * size + 1e-12, msg=name
        )


def test_whole_data_set_of_structures_agrees(data_dir):
    sample = speed.load_sample(data_dir, 24, 60, seed=1)
    ours, theirs = networks(replace(PAPER, n_features=16, edge_hidden=8))
    made = graphs(sample.structures)
    their_structures = reference.collate([reference.crystal_from_graph(g) for g in made])[1]
    torch.testing.assert_close(
        ours.structure_encoder(our_batch(made)[1]),
        theirs.structure_encoder(their_structures),
        atol=1e-5,
        rtol=0,
    )


def test_weights_load_strictly():
    ours, theirs = networks(replace(PAPER, n_features=8, edge_hidden=8))
    state = ours.state_dict()
    state.pop("structure_encoder.blocks.1.edge_output.0.weight")
    with pytest.raises(RuntimeError, match=r"blocks\.1\.edge_mlp\.1\.weight"):
        reference.load_weights(theirs, state)


@pytest.mark.parametrize("c", [0.5, 20.0])
def test_loss_is_that_of_the_equations(c):
    """Eq. 4 and 5 as printed, in numbers, for pairs; and our loss is the same."""
    n, width, n_samples = 5, 6, 4
    mean = torch.nn.functional.normalize(torch.randn(n, width, dtype=torch.float64), dim=-1)
    log_sigma = torch.randn(n, width, dtype=torch.float64) - 3
    structures = torch.nn.functional.normalize(torch.randn_like(mean), dim=-1)
    groups = torch.tensor([0, 1, 1, 2, 0])
    scale, shift = torch.tensor(c, dtype=torch.float64), torch.tensor(c, dtype=torch.float64)
    noise = torch.randn(
        n, n_samples, width, dtype=torch.float64, generator=torch.Generator().manual_seed(3)
    )
    terms = []
    for a in range(n):
        for b in range(n):
            p = 0.0
            for j in range(n_samples):
                sample = mean[a] + log_sigma[a].exp() * noise[a, j]
                distance = ((sample - structures[b]) ** 2).sum().sqrt()
                p = p + 1 / (1 + torch.exp(c * distance - c)) / n_samples
            terms.append(-torch.log(p if groups[a] == groups[b] else 1 - p))
    variance = (2 * log_sigma).exp()
    kl = 0.5 * (variance + mean**2 - 1 - variance.log()).sum() / n
    expected = torch.stack(terms).mean() + 0.1 * kl
    for loss in (reference.reference_loss, losses.polysrl_loss):
        generator = torch.Generator().manual_seed(3)
        given = {"n_samples": n_samples, "beta": 0.1, "generator": generator}
        value = loss(mean, log_sigma, structures, groups, groups, scale, shift, **given)
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=0)


# ---------------------------------------------------------------------------------- speed.py


def test_speed_measures_every_stage():
    settings = speed.Settings(
        replace(PAPER, n_features=16, edge_hidden=8), torch.device("cpu"), seed=0, threads=1
    )
    sample = speed.Sample(crystals(), ["NaCl", "Fe2O3", "SiO2"], "seven crystals")
    table = speed.measure(sample, settings, n_batches=2, batch_size=5, memory=False)
    assert list(table.columns) == ["stage", "reference", "ours", "ratio", "unit"]
    stages = " ".join(table["stage"])
    for stage in ("structure to graph", "data loading", "forward", "loss", "bfloat16", "strings"):
        assert stage in stages
    assert (table[["reference", "ours", "ratio"]] > 0).all(axis=None)


def test_speed_refuses_to_compare_what_differs(monkeypatch):
    wrong = staticmethod(lambda *inputs, **given: 1.01 * losses.polysrl_loss(*inputs, **given))
    monkeypatch.setattr(speed.Ours, "loss", wrong)
    settings = speed.Settings(
        replace(PAPER, n_features=16, edge_hidden=8), torch.device("cpu"), seed=0, threads=1
    )
    sample = speed.Sample(crystals(), ["NaCl"], "seven crystals")
    with pytest.raises(RuntimeError, match="do not compute the same"):
        speed.measure(sample, settings, n_batches=1, batch_size=5, memory=False)


def test_speed_dry_run_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("POLYSRL_DATA", raising=False)
    arguments = ["--structures", "6", "--batch-size", "4", "--output-dir", str(tmp_path)]
    assert speed.main([*arguments, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "AFLOW" in printed and "nothing was timed" in printed
    assert not list(tmp_path.iterdir())


def test_speed_writes_its_table(tmp_path, monkeypatch):
    table = pd.DataFrame([["loss", 1.0, 2.0, 2.0, "structures/s"]], columns=speed.COLUMNS)
    monkeypatch.setattr(speed, "measure", lambda *_, **__: table)
    monkeypatch.delenv("POLYSRL_DATA", raising=False)
    speed.main(["--structures", "6", "--batch-size", "4", "--output-dir", str(tmp_path)])
    written = pd.read_csv(tmp_path / "speed.csv")
    assert list(written.columns[:5]) == speed.COLUMNS and written["ratio"].tolist() == [2.0]
    assert written["torch"].tolist() == [torch.__version__]
