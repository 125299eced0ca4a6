"""The check of CrabNet against its published scores: official folds, kept, compared one by one."""

from dataclasses import dataclass, field

import crabnet_matbench
import numpy as np
import pandas as pd
import pytest
from targets import Target

pytest.importorskip("pytorch_optimizer", reason="CrabNet needs the extra 'peers'")

FORMULAS = np.array([f"Na{i}Cl" for i in range(1, 40)] + ["RfO2"])
TARGET = Target("gap", "eV", FORMULAS, np.linspace(0, 1, 40), 1.0, 8)


@dataclass
class Constant:
    """A model that has learned the greatest label."""

    seed: int
    history: list = field(default_factory=lambda: [(20, 0.5), (40, 0.4)])

    def fit(self, dataset, unfinished):
        assert unfinished.is_dir()
        self.value = dataset.y.max() + self.seed
        return self

    def predict(self, dataset):
        return np.full((len(dataset), 1), self.value)


@pytest.fixture
def command(tmp_path, monkeypatch):
    monkeypatch.setattr(crabnet_matbench, "load_task", lambda *_: TARGET.task)
    monkeypatch.setattr(crabnet_matbench, "peer_model", lambda name, seed: Constant(seed))
    (tmp_path / "matbench").mkdir()
    published = [
        (algorithm, f"matbench_{task}", fold, metric, value)
        for algorithm, shift in (("CrabNet", 0.0), ("CrabNet_v1.2.1", 9.0))
        for task in ("expt_gap", "dielectric")
        for fold in range(5)
        for metric, value in (("mae", 0.5 + 0.1 * fold + shift), ("rmse", 7.0))
    ]
    table = pd.DataFrame(published, columns=["algorithm", "task", "fold", "metric", "value"])
    table.to_csv(tmp_path / "matbench" / "leaderboard.csv", index=False)
    return ["--output-dir", str(tmp_path), "--data-dir", str(tmp_path), "--tasks", "expt_gap"]


def error_of(fold, seed=0):
    """The mean absolute error of the constant model: a formula without features gets the mean."""
    train, test = TARGET.splits()[fold]
    known = train[FORMULAS[train] != "RfO2"]
    guess = np.where(
        FORMULAS[test] == "RfO2",
        TARGET.values[train].mean(),
        TARGET.values[known].max() + seed,
    )
    return np.abs(guess - TARGET.values[test]).mean()


def test_folds_that_have_been_run_are_compared_with_the_same_published_ones(command, capsys):
    crabnet_matbench.main([*command, "--folds", "1", "3"])
    ours, published = (error_of(1) + error_of(3)) / 2, (0.6 + 0.8) / 2
    row = capsys.readouterr().out.splitlines()[-1]
    cells = [cell.strip() for cell in row.split("|")[1:-1]]
    assert cells[:2] == ["matbench_expt_gap", "2"]
    found = [float(cell) for cell in cells[2:5]]
    assert found == pytest.approx([ours, published, ours / published], abs=1e-4)
    assert cells[5] == str(abs(ours / published - 1) <= 0.05)


def test_finished_folds_are_kept_and_seeds_are_not_mixed(command, tmp_path, monkeypatch, capsys):
    crabnet_matbench.main([*command, "--folds", "0", "1"])
    trained = []
    fit = Constant.fit

    def counted(model, dataset, unfinished):
        trained.append(unfinished)
        return fit(model, dataset, unfinished)

    monkeypatch.setattr(Constant, "fit", counted)
    crabnet_matbench.main([*command, "--folds", "0", "1", "2"])
    assert len(trained) == 1
    crabnet_matbench.main([*command, "--folds", "2", "--seed", "1"])
    assert len(trained) == 2 and len(set(trained)) == 2
    assert not any(folder.exists() for folder in trained)
    scores = pd.read_csv(tmp_path / "crabnet_scores.csv")
    found = scores[scores["model"] == "crabnet"].pivot_table("value", ["seed", "fold"], "metric")
    expected = [error_of(0), error_of(1), error_of(2), error_of(2, seed=1)]
    assert found["mae"].tolist() == pytest.approx(expected)
    assert set(found["epochs"]) == {40}


def test_what_is_missing_is_said_in_one_line(command, tmp_path, capsys):
    (tmp_path / "matbench" / "leaderboard.csv").unlink()
    with pytest.raises(SystemExit):
        crabnet_matbench.main(command)
    assert "no matbench/leaderboard.csv" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        crabnet_matbench.main([*command, "--folds", "5"])
    assert not (tmp_path / "crabnet_scores.csv").exists()
