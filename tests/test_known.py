"""Errors on compounds that pretraining has seen, and on others."""

import known
import numpy as np
import pandas as pd
import pytest
from known import gain, main
from paper_records import absolute_errors, save_predictions
from targets import Target

FORMULAS = np.array([f"Na{i}Cl" for i in range(1, 6)] + [f"K{i}Br" for i in range(1, 6)])


@pytest.fixture
def target():
    return Target("band_gap", "eV", FORMULAS, np.linspace(1, 2, 10), 10.0, 8)


def record(folder, target, model, error, seed=0):
    settings = {"encoder": "none", "arguments": []}
    run = (model, "representation", seed, target.values + error, [{}] * 5, settings)
    save_predictions(folder, target, *run, "run_wetlab.py")


def test_errors_are_means_over_the_recorded_seeds_in_reported_units(tmp_path, target):
    for seed, error in enumerate((0.2, -0.4)):
        record(tmp_path, target, "polysrl", error, seed)
    np.testing.assert_allclose(absolute_errors(target, tmp_path, "polysrl"), 3.0, rtol=1e-5)
    with pytest.raises(FileNotFoundError, match="no record of graphcl, representation, band_gap"):
        absolute_errors(target, tmp_path, "graphcl")


def test_known_rows_are_told_from_others_by_their_composition(
    tmp_path, target, monkeypatch, capsys
):
    monkeypatch.setattr(known, "wetlab_targets", lambda _: [target])
    monkeypatch.setenv("POLYSRL_DATA", str(tmp_path))
    seen = {"polysrl": {"Na1Cl1", *target.compositions[:5]}, "graphcl": set()}
    monkeypatch.setattr(known, "seen_by", lambda *_: seen)
    half = np.where(np.arange(10) < 5, 0.1, 0.3)
    for model, error in (("rand_init", 0.4), ("polysrl", half), ("graphcl", 0.2)):
        record(tmp_path, target, model, error)
    main(["--output-dir", str(tmp_path)])
    table = pd.read_csv(tmp_path / "known.csv").set_index("model")
    assert table.loc["polysrl", ["n_known", "n_other"]].tolist() == [5, 5]
    assert table.loc["polysrl", ["known", "other"]].tolist() == [-0.75, -0.25]
    assert table.loc["graphcl", "n_known"] == 0 and np.isnan(table.loc["graphcl", "known"])
    assert table.loc["graphcl", "other"] == -0.5 and "polysrl" in capsys.readouterr().out


def test_p_is_that_of_the_differences():
    rng = np.random.default_rng(0)
    errors, start, rows = rng.random(40), rng.random(40), np.arange(40) < 20
    assert gain(errors, start, rows)["p"] > 0.05
    assert gain(errors - 2 * rows, start, rows)["p"] < 1e-6
