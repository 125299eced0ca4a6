"""Predictions of rows by models that have not learned from them."""

import gc
import tempfile

import deepchem as dc
import numpy as np
import pandas as pd
import pytest
from deepchem.molnet.load_function.molnet_loader import _MolnetLoader
from models import FORMULAS, SIGNAL, N, data, fitted, make

from polysrl_dc import InvalidInputError, cross_val_predict
from polysrl_dc.cross_validation import row_groups
from polysrl_dc.domain import Domain

TWICE = [*FORMULAS, *reversed(FORMULAS)]
LABELS = np.concatenate([SIGNAL, SIGNAL[::-1] + 0.1])


@pytest.mark.parametrize("task", ["regression", "classification"])
def test_each_row_is_predicted_by_a_model_without_its_formula(task):
    labels = LABELS if task == "regression" else (LABELS > 0).astype(float)
    dataset = dc.data.NumpyDataset(data(formulas=TWICE, y=labels).X, labels, ids=TWICE)
    made = []

    def train(part):
        made.append((set(part.ids), fitted(task, dataset=part, nb_epoch=1)))
        return made[-1][1]

    mean, std, distance = cross_val_predict(train, dataset, n_folds=4)
    assert len(made) == 4 and mean.shape == std.shape == (len(TWICE), 1)
    assert distance.shape == (len(TWICE),)
    for row, formula in enumerate(TWICE):
        ((learned, model),) = (pair for pair in made if formula not in pair[0])
        alone = model.predict_uncertainty(dataset.select([row]), polymorphs=task == "regression")
        expected = np.array(alone)[:, 0]
        np.testing.assert_allclose((mean[row], std[row]), expected, rtol=1e-4, atol=1e-6)
        far = Domain(model, sorted(learned)).distance(formula)
        np.testing.assert_allclose(distance[row], far, atol=1e-4)


def test_distances_are_those_to_formulas_with_a_label():
    weights = np.ones(N)
    weights[1::3] = 0  # no sulfide
    learned = []

    def train(part):
        learned.append(set(part.ids))
        return fitted(dataset=part, nb_epoch=1, freeze_encoder=True)

    found = cross_val_predict(train, data(w=weights), n_folds=3).distance
    vectors = make(freeze_encoder=True).predict_embedding(FORMULAS)
    distance = np.linalg.norm(vectors[:, None] - vectors, axis=2)
    for row in range(N):
        (known,) = (part for part in learned if row not in part)
        nearest = min(distance[row, i] for i in known if weights[i])
        assert found[row] == pytest.approx(nearest, abs=1e-4)


def test_a_split_follows_the_fractions_and_the_seed():
    splitter = dc.splits.StoichiometrySplitter()
    one, same, other = (splitter.split(data(), 0.5, 0.25, 0.25, seed=seed) for seed in (0, 0, 1))
    assert [len(part) for part in one] == [N // 2, N // 4, N // 4]
    assert sorted(np.concatenate(one)) == list(range(N))
    assert one[0].tolist() == same[0].tolist() != other[0].tolist() != list(range(N // 2))


def test_parts_follow_the_seed():
    def train(part):
        return fitted(dataset=part, nb_epoch=1)

    one, again, other = (cross_val_predict(train, data(), 3, seed=seed)[0] for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert (one != other).any()


def test_a_dataset_on_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    def train(part):
        return fitted(dataset=part, nb_epoch=1)

    given = data()
    disk = dc.data.DiskDataset.from_numpy(given.X, given.y, data_dir=str(tmp_path / "data"))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    for found, expected in zip(
        cross_val_predict(train, disk, 3), cross_val_predict(train, given, 3), strict=True
    ):
        np.testing.assert_array_equal(found, expected)
    gc.collect()  # models, which have temporary folders, too
    assert list((tmp_path / "temporary").iterdir()) == []


@pytest.mark.parametrize("n_folds", [1, len(FORMULAS) + 1])
def test_more_parts_than_formulas_or_one_alone_are_refused(n_folds):
    message = f"k is {n_folds}: must be between 2 and the {len(FORMULAS)} formulas"
    with pytest.raises(ValueError, match=message):
        cross_val_predict(lambda _: pytest.fail("trained"), data(), n_folds)


def test_formulas_alone_are_no_dataset():
    with pytest.raises(TypeError, match=r"list is no DeepChem dataset; of formulas: dc.data"):
        cross_val_predict(lambda _: pytest.fail("trained"), FORMULAS, 3)


def test_labels_are_checked_before_a_model_is_trained():
    labels = np.stack([SIGNAL, SIGNAL], axis=1)
    labels[30, 1] = np.nan
    with pytest.raises(InvalidInputError, match=r"row 30 \(id 30\): label nan of task 1"):
        cross_val_predict(lambda _: pytest.fail("trained"), data(labels), 3)
    weights = np.ones_like(labels)
    weights[np.arange(N) != 7, 1] = 0
    with pytest.raises(InvalidInputError, match=r"^task 1 has no label outside fold \d of 3$"):
        cross_val_predict(lambda _: pytest.fail("trained"), data(np.nan_to_num(labels), weights), 3)


def test_what_a_part_is_refused_for_names_it():
    def train(part):
        return fitted(dataset=part, n_tasks=2)

    with pytest.raises(InvalidInputError, match=r"^without fold 1 of 3: the labels have 1 columns"):
        cross_val_predict(train, data(), 3)


def test_groups_stay_in_one_part():
    sources = [f"doi {row % 7}" for row in range(len(TWICE))]
    dataset = dc.data.NumpyDataset(data(formulas=TWICE, y=LABELS).X, LABELS, ids=sources)
    made = []

    def train(part):
        made.append(set(part.ids))
        return fitted(dataset=part, nb_epoch=1)

    with pytest.raises(ValueError, match="the 1 groups"):
        cross_val_predict(train, dataset, 2, groups=["doi"] * len(TWICE))
    once = dataset.select(range(len(FORMULAS)))
    cross_val_predict(train, once, n_folds=3, groups=sources[: len(once)])
    held_out = [set(sources) - learned for learned in made]
    assert sorted(name for part in held_out for name in part) == sorted(set(sources))


def test_rows_belong_together_by_formula_or_label_or_through_others():
    graphs = data(formulas=["NaCl", "KCl", "Na2Cl2", "MgO", "CaO"], y=np.zeros(5))
    assert row_groups(graphs).tolist() == row_groups(graphs, [1, 2, 3, 4, 5]).tolist()
    linked = row_groups(graphs, ["a", "b", "b", "c", "d"])
    assert linked[0] == linked[1] == linked[2] and len(set(linked)) == 3
    other_order = data(formulas=["KCl", "NaCl"], y=np.zeros(2))
    assert row_groups(other_order, ["a", "b"]).tolist() == [0, 1]
    splitter = dc.splits.StoichiometrySplitter(["a", "b", "b", "c", "d"])
    for train, test in splitter.k_fold_split(graphs, 3, seed=0):
        assert len(train) + len(test) == 5 and len(test) in (1, 3)
    for seed in range(9):
        parts = [set(part) for part in splitter.split(graphs, 0.6, 0.2, 0.2, seed=seed)]
        assert sum(bool(part & {0, 1, 2}) for part in parts) == 1


@pytest.mark.parametrize("kind", [list, tuple, np.array, pd.Series])
def test_molnet_keeps_splits_by_other_groups_apart(kind, tmp_path):
    class Loader(_MolnetLoader):
        def create_dataset(self):
            return dc.data.DiskDataset.from_numpy(data().X, SIGNAL, ids=np.arange(N))

    def parts(splitter):
        folder = str(tmp_path)
        loader = Loader(featurizer, splitter, [], ["gap"], folder, folder)
        return [set(part.ids) for part in loader.load_dataset("gaps", reload=True)[1]]

    featurizer = dc.feat.StoichiometryGraphFeaturizer()
    alone = parts(dc.splits.StoichiometrySplitter())
    assert parts(dc.splits.StoichiometrySplitter()) == alone
    for length in (12, 9):
        splitter = dc.splits.StoichiometrySplitter(kind([row // length for row in range(N)]))
        grouped = parts(splitter)
        groups = [{row // length for row in part} for part in grouped]
        assert sum(map(len, groups)) == N // length
        assert parts(splitter) == grouped


@pytest.mark.parametrize("missing", [None, "", float("nan")])
def test_bad_groups_are_named(missing):
    with pytest.raises(InvalidInputError, match=r"row 2 \(id 2\) has no group"):
        row_groups(data(), [0, 1, missing, *range(3, N)])
    with pytest.raises(ValueError, match=f"2 groups for {N} rows"):
        dc.splits.StoichiometrySplitter([0, 1]).k_fold_split(data(), 2)
