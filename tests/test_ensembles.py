"""Means of recorded predictions, scored on the same folds."""

import ensembles
import numpy as np
import pandas as pd
import pytest
from ensembles import main
from paper_records import save_predictions
from sklearn.metrics import mean_absolute_error
from targets import Target

FORMULAS = np.array([f"Na{i}Cl" for i in range(1, 11)])


def test_predictions_are_averaged_before_they_are_scored(tmp_path, monkeypatch, capsys):
    target = Target("band_gap", "eV", FORMULAS, np.linspace(1, 2, 10), 10.0, 8)
    monkeypatch.setattr(ensembles, "wetlab_targets", lambda _: [target])
    shifts = np.random.default_rng(0).normal(0, 0.3, (3, 10))
    for seed, shift in enumerate(shifts):
        run = ("polysrl", "transfer", seed, target.values + shift, [{}] * 5, {"arguments": []})
        save_predictions(tmp_path, target, *run, "run_wetlab.py")
    command = ["--output-dir", str(tmp_path), "--means"]
    of_seeds = "mean of three seeds, transfer, polysrl"
    main([*command, of_seeds])
    scores = pd.read_csv(tmp_path / "recipes.csv").query("metric == 'mae'")
    assert set(scores["model"]) == {of_seeds}
    expected = [
        10 * mean_absolute_error(shifts.mean(0)[test], np.zeros(len(test)))
        for _, test in target.splits()
    ]
    np.testing.assert_allclose(scores.sort_values("fold")["value"], expected, rtol=1e-5)
    assert len(scores) == 5

    with pytest.raises(SystemExit):
        main([*command, "mean of three seeds, transfer, roost"])
    assert "no record of roost, transfer, seed 0, band_gap" in capsys.readouterr().err

    run = ("polysrl", "transfer", 2, target.values, [{}] * 5, {"arguments": [], "epochs": 7})
    save_predictions(tmp_path, target, *run, "run_wetlab.py")
    with pytest.raises(SystemExit):
        main([*command, of_seeds])
    assert "band_gap: different settings made the seeds [0, 1, 2]" in capsys.readouterr().err


def test_ways_to_train_are_averaged_as_well(tmp_path, monkeypatch):
    target = Target("band_gap", "eV", FORMULAS, np.linspace(1, 2, 10), 10.0, 8)
    monkeypatch.setattr(ensembles, "wetlab_targets", lambda _: [target])
    for model, shift in (("frozen", 0.3), ("fine-tuned", -0.1)):
        run = (model, "recipe", 0, target.values + shift, [{}] * 5, {"arguments": []})
        save_predictions(tmp_path, target, *run, "recipes.py")
    main(["--means", "mean of frozen and fine-tuned", "--output-dir", str(tmp_path)])
    scores = pd.read_csv(tmp_path / "recipes.csv").query("metric == 'mae'")
    np.testing.assert_allclose(scores["value"], 10 * 0.1, rtol=1e-5)
