"""What cross-validation promises of new publications."""

import itertools
from dataclasses import replace

import numpy as np
import pandas as pd
import publications
import pytest
from graph_data import dataset_of
from models import FORMULAS, N, fitted
from publications import main, score_fold
from targets import Target

from polysrl_dc import cross_val_predict, keep_formulas
from polysrl_dc.recalibration import LAPLACE_95

DOIS = np.array([f"doi {row % 12}" for row in range(N)])


def named(name="estm600_seebeck", **kwargs):
    values = np.sin(np.arange(N))
    return Target(name, "1", np.array(FORMULAS), values, 10.0, 8, publications=DOIS, **kwargs)


def test_parts_and_promises_are_those_of_the_publications():
    target, learned = named(), []
    sources = dict(zip(target.compositions, DOIS, strict=True))

    def fit(dataset):
        learned.append({sources[graph.formula] for graph in dataset.X})
        return fitted(dataset=dataset, nb_epoch=1)

    train, test = target.splits(DOIS)[0]
    found = score_fold(target, train, test, fit)
    assert not set(DOIS[train]) & set(DOIS[test])
    whole, kinds = learned[0], (learned[1:6], learned[6:])
    assert whole == set(DOIS[train])
    assert any(part == whole for part in kinds[0]) and all(part < whole for part in kinds[1])
    assert {row["mae"] for row in found} == {found[0]["mae"]}
    learning, asked = dataset_of(target, train), dataset_of(target, test)
    for row, (groups, distance) in zip(
        found, itertools.product((None, DOIS[train]), (False, True)), strict=True
    ):
        assert row["parts"] == ("formula" if groups is None else "publication")
        assert row["distance"] == distance
        model = quickly(learning)
        if distance:
            keep_formulas(model, learning)
        model.calibrate(learning, predicted=cross_val_predict(quickly, learning, 5, groups=groups))
        mean, std = (values[:, 0] for values in model.predict_uncertainty(asked))
        half = LAPLACE_95 * std  # as calibrate means it
        assert row["half_width"] == pytest.approx(10 * half.mean(), rel=1e-5)
        assert row["in_95"] == (np.abs(mean - target.values[test]) <= half).mean()
        assert row["expected_mae"] > 0


def test_the_command_scores_the_targets_that_name_publications(monkeypatch, tmp_path, capsys):
    other = replace(named(), name="band_gap", publications=None)
    monkeypatch.setattr(publications, "wetlab_targets", lambda _: [named(), other])
    monkeypatch.setattr(
        publications, "score_fold", lambda target, *split: score_fold(target, *split, quickly)
    )
    main(["--output-dir", str(tmp_path)])
    table = pd.read_csv(tmp_path / "publications.csv")
    assert len(table) == 20 and set(table["target"]) == {"estm600_seebeck"}
    assert table["parts"].tolist() == (["formula"] * 2 + ["publication"] * 2) * 5
    assert table["distance"].tolist() == [False, True] * 10
    assert table.notna().all(axis=None) and "publication" in capsys.readouterr().out


def quickly(dataset):
    return fitted(dataset=dataset, nb_epoch=1)
