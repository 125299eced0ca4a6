"""Curves of the search: Figures 3 and 9."""

import numpy as np
import pandas as pd
import pytest
import sensitivity
from search import BETAS, ROWS
from sensitivity import CURVES, curves, trend


def results_of(rows):
    """A table of the search in which row ``i`` has errors and variances that are known."""
    lines = []
    for i, row in enumerate(rows):
        for task in ("band_gap", "metallic"):
            lines += [(row, task, 0, fold, "mae", 1.0 + i + 0.1 * fold) for fold in range(5)]
        for metric, value in (("mean_variance", 10.0**-i), ("collapsed_1e-4", i / 10)):
            lines.append((row, None, None, None, metric, value))
        lines.append((row, None, None, None, "collapsed_1e-6", 0.0))
    return pd.DataFrame(lines, columns=["row", "task", "seed", "fold", "metric", "value"])


def test_every_row_of_a_curve_is_one_of_the_search():
    assert {row for rows in CURVES.values() for row in rows.values()} <= set(ROWS)
    assert [float(value) for value in BETAS] == sorted(CURVES["beta"])


def test_curves_are_in_order_and_have_their_errors():
    rows = [f"beta {beta}" for beta in BETAS]
    found = curves(results_of(["default", *rows[::-1]]))
    beta = found[found["curve"] == "beta"]
    assert beta["row"].tolist() == rows and beta["value"].is_monotonic_increasing
    np.testing.assert_allclose(beta["band_gap"], np.arange(len(rows), 0, -1) + 1.2)
    np.testing.assert_allclose(beta["band_gap_error"], 0.1 * np.sqrt(2.5 / 5))
    assert trend(beta, "mean_variance") == pytest.approx(1)
    assert trend(beta, "collapsed_1e-4") == pytest.approx(-1)
    only = found[found["curve"] == "J"]
    assert only["value"].tolist() == [8] and np.isnan(trend(only, "band_gap"))


def test_the_command_draws_what_is_there(tmp_path, capsys):
    results_of(["default", *CURVES["J"].values()]).to_csv(
        tmp_path / "pretraining_search.csv", index=False
    )
    sensitivity.main(["--output-dir", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "| J 16 " in printed and "correlation with J:" in printed
    drawn = sorted(path.name for path in (tmp_path / "figures").iterdir())
    assert drawn == [
        "sensitivity_J.png", "sensitivity_beta.png", "sensitivity_start_of_c_and_d.png"
    ]  # fmt: skip
