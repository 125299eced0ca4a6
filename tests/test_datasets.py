"""Every DeepChem input form through featurizer, splitter, fit and evaluate; bad rows; splits."""

import doctest
import json
from dataclasses import replace

import deepchem as dc
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pymatgen.core import Lattice, Structure

import polysrl_dc
from polysrl_dc import batches, datasets
from polysrl_dc.batches import batch_rows
from polysrl_dc.errors import InvalidInputError

CONFIG = replace(polysrl_dc.PolySRLConfig.named("default"), n_features=16, head_hidden=8)
MAE = dc.metrics.Metric(dc.metrics.mae_score)
CATIONS = ["Li", "Na", "K", "Rb", "Mg", "Ca", "Sr", "Ba", "Zn", "Cd"]
FORMULAS = [cation + anion for cation in CATIONS for anion in ("O", "S", "Cl2", "F2")]
LABELS = [0.5 * i for i in range(len(FORMULAS))]
#: A list with one formula that is none, in row 7.
BAD_FORMULAS = [*FORMULAS[:7], "Xx2O3", *FORMULAS[7:]]
BAD_LABELS = [*LABELS[:7], 1e6, *LABELS[7:]]


def featurizer(on_error="raise"):
    return dc.feat.StoichiometryGraphFeaturizer(on_error=on_error)


def rock_salt(formula, **changes):
    cation, anion = formula[:-1], formula[-1]
    cell = Structure(Lattice.cubic(4.5), [cation, anion], [[0.0] * 3, [0.5] * 3])
    return {**cell.as_dict(), **changes}


def from_csv(path, formulas, labels, on_error):
    pd.DataFrame({"formula": formulas, "gap": labels}).to_csv(path / "d.csv", index=False)
    loader = dc.data.CSVLoader(["gap"], feature_field="formula", featurizer=featurizer(on_error))
    return loader.create_dataset(str(path / "d.csv"), data_dir=str(path / "csv"))


def from_json(path, formulas, labels, on_error):
    rows = [
        json.dumps({"formula": f, "gap": y, "number": i})
        for i, (f, y) in enumerate(zip(formulas, labels, strict=True))
    ]
    (path / "d.json").write_text("\n".join(rows))
    loader = dc.data.JsonLoader(
        ["gap"], "formula", featurizer(on_error), label_field="gap", id_field="number"
    )
    return loader.create_dataset(str(path / "d.json"), data_dir=str(path / "json"))


def from_memory(path, formulas, labels, on_error):
    loader = dc.data.InMemoryLoader(["gap"], featurizer=featurizer(on_error))
    return loader.create_dataset(list(zip(formulas, labels, strict=True)), str(path / "memory"))


def numpy_dataset(path, formulas, labels, on_error):
    return dc.data.NumpyDataset(featurizer(on_error)(formulas), np.array(labels))


def disk_dataset(path, formulas, labels, on_error):
    return dc.data.DiskDataset.from_numpy(
        featurizer(on_error)(formulas), np.array(labels), data_dir=str(path / "disk")
    )


LOADERS = [from_csv, from_json, from_memory, numpy_dataset, disk_dataset]


def train_and_evaluate(dataset, splitter, **kwargs):
    train, valid, test = splitter.train_valid_test_split(dataset, seed=0, **kwargs)
    model = dc.models.PolySRLModel(config=CONFIG, batch_size=8, learning_rate=1e-2)
    losses: list[float] = []
    model.fit(train, nb_epoch=2, all_losses=losses, checkpoint_interval=0)
    assert np.isfinite(losses).all()
    scores = model.evaluate(test, [MAE])
    assert 0 < scores["mae_score"] < 100
    assert model.predict(test).shape == (len(test), 1)
    expected = np.abs(model.predict(test).ravel() - np.ravel(test.y).astype(float)).mean()
    assert scores["mae_score"] == pytest.approx(expected, rel=1e-5)
    return train, valid, test


def test_csv_json_and_memory_hold_the_same_rows(tmp_path):
    for load in LOADERS:
        dataset = load(tmp_path, FORMULAS, LABELS, "raise")
        assert [graph.formula for graph in dataset.X] == [
            graph.formula for graph in featurizer()(FORMULAS)
        ]
        np.testing.assert_allclose(np.ravel(dataset.y).astype(float), LABELS)


@pytest.mark.parametrize("load", LOADERS)
def test_load_split_fit_evaluate(load, tmp_path):
    dataset = load(tmp_path, FORMULAS, LABELS, "raise")
    parts = train_and_evaluate(dataset, dc.splits.StoichiometrySplitter())
    assert sum(map(len, parts)) == len(FORMULAS)


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize("splitter", [dc.splits.RandomSplitter, dc.splits.IndexSplitter])
def test_splitters_of_deepchem_work(load, splitter, tmp_path):
    train_and_evaluate(load(tmp_path, FORMULAS, LABELS, "raise"), splitter())


def test_json_loader_takes_structures(tmp_path):
    oxides = [cation + anion for cation in CATIONS for anion in "OS"]
    rows = [json.dumps({"structure": rock_salt(f), "e": i}) for i, f in enumerate(oxides)]
    (tmp_path / "d.json").write_text("\n".join(rows))
    loader = dc.data.JsonLoader(
        ["e"], "structure", dc.feat.StructureGraphFeaturizer(), label_field="e"
    )
    dataset = loader.create_dataset(str(tmp_path / "d.json"))
    assert dataset.y.ndim == 1 and set(np.diff(dataset.X[0].indptr)) == {12}
    train_and_evaluate(dataset, dc.splits.StoichiometrySplitter(), frac_train=0.6,
                       frac_valid=0.2, frac_test=0.2)  # fmt: skip
    rows[3] = json.dumps({"structure": rock_salt("CaO", lattice={"matrix": 3 * [[1, 0, 0]]})})
    (tmp_path / "d.json").write_text("\n".join(rows))
    with pytest.raises(InvalidInputError, match="row 3: "):
        loader.create_dataset(str(tmp_path / "d.json"))
    loader.featurizer = dc.feat.StructureGraphFeaturizer(on_error="skip")
    assert len(loader.create_dataset(str(tmp_path / "d.json"))) == len(oxides) - 1


@pytest.mark.parametrize("load", LOADERS)
def test_raise_names_the_bad_row(load, tmp_path):
    row = "" if load is from_memory else "row 7: "  # DeepChem hands over one input at a time
    with pytest.raises(InvalidInputError, match=row + ".*Xx2O3"):
        load(tmp_path, BAD_FORMULAS, BAD_LABELS, "raise")


@pytest.mark.parametrize("load", [from_csv, from_json])
def test_file_loaders_drop_the_bad_row_with_label_and_weight(load, tmp_path, caplog):
    dataset = load(tmp_path, BAD_FORMULAS, BAD_LABELS, "skip")
    assert len(dataset.X) == len(dataset.y) == len(dataset.w) == len(dataset.ids) == len(FORMULAS)
    np.testing.assert_allclose(np.ravel(dataset.y).astype(float), LABELS)
    assert "row 7" in caplog.text and "Xx2O3" in caplog.text
    train_and_evaluate(dataset, dc.splits.StoichiometrySplitter())


@pytest.mark.parametrize("load", [from_memory, numpy_dataset, disk_dataset])
def test_elsewhere_a_placeholder_stays_that_model_and_splitter_refuse(load, tmp_path):
    dataset = load(tmp_path, BAD_FORMULAS, BAD_LABELS, "skip")
    assert len(dataset) == len(BAD_FORMULAS)
    model = dc.models.PolySRLModel(config=CONFIG)
    for use in (model.fit, model.predict_embedding, dc.splits.StoichiometrySplitter().split):
        with pytest.raises(InvalidInputError, match=r"row 7 \(id 7\)"):
            use(dataset)
    with pytest.raises(InvalidInputError, match="drop_skipped"):
        model.fit(dataset)
    repaired = datasets.drop_skipped(dataset)
    np.testing.assert_allclose(np.ravel(repaired.y), LABELS)
    assert 7 not in repaired.ids and len(repaired.w) == len(FORMULAS)
    train_and_evaluate(repaired, dc.splits.StoichiometrySplitter())


def test_rows_in_later_shards_and_batches_keep_their_number(tmp_path):
    pd.DataFrame({"formula": BAD_FORMULAS, "gap": BAD_LABELS}).to_csv(tmp_path / "d.csv")
    loader = dc.data.CSVLoader(["gap"], feature_field="formula", featurizer=featurizer())
    with pytest.raises(InvalidInputError, match="row 7: "):
        loader.create_dataset(str(tmp_path / "d.csv"), shard_size=3)
    X = np.concatenate([featurizer()(["NaCl"] * 4100), featurizer("skip")(["?"])])
    with pytest.raises(InvalidInputError, match="row 4100 "):
        dc.models.PolySRLModel(config=CONFIG).predict_embedding(dc.data.NumpyDataset(X))


def test_an_empty_label_of_a_csv_file_is_a_missing_label(tmp_path):
    labels = [*LABELS[:5], None, *LABELS[6:]]
    dataset = from_csv(tmp_path, FORMULAS, labels, "raise")
    assert dataset.w[5, 0] == 0 and dataset.w.sum() == len(FORMULAS) - 1
    model = dc.models.PolySRLModel(config=CONFIG)
    model.fit(dataset, nb_epoch=1)
    known = [y for y in labels if y is not None]
    assert model.model.label_mean.item() == pytest.approx(np.mean(known), rel=1e-5)


def test_a_missing_label_that_json_loader_leaves_unmarked_is_refused(tmp_path):
    dataset = from_json(tmp_path, FORMULAS, [*LABELS[:-1], float("nan")], "raise")
    with pytest.raises(ValueError, match=r"row 39|convert"):
        dc.models.PolySRLModel(config=CONFIG).fit(dataset)


# ------------------------------------------------------------------- splitter


def repeated(n_formulas=60, seed=0, disk=None):
    """A dataset in which each formula stands one to six times, written differently."""
    generator = np.random.default_rng(seed)
    names = [f"Na{i}O{i + 1}" for i in range(1, n_formulas + 1)]
    rows = [
        f"Na{i * k}O{(i + 1) * k}"
        for i in range(1, n_formulas + 1)
        for k in range(1, 1 + int(generator.integers(1, 7)))
    ]
    rows = list(generator.permutation(rows))
    X, y = featurizer()(rows), np.arange(len(rows), dtype=float)
    assert len({graph.formula for graph in X}) == len(names)
    if disk is None:
        return dc.data.NumpyDataset(X, y)
    return dc.data.DiskDataset.from_numpy(X, y, data_dir=str(disk))


def keys(dataset):
    return {graph.formula for graph in dataset.X}


@pytest.mark.parametrize("fractions", [(0.8, 0.1, 0.1), (0.5, 0.25, 0.25), (0.7, 0.0, 0.3)])
def test_no_formula_on_two_sides_and_sizes_near_the_fractions(fractions):
    dataset = repeated()
    for seed in range(5):
        parts = dc.splits.StoichiometrySplitter().split(dataset, *fractions, seed=seed)
        assert sorted(np.concatenate(parts)) == list(range(len(dataset)))
        for i, part in enumerate(parts):
            assert abs(len(part) - fractions[i] * len(dataset)) <= 6
            others = np.setdiff1d(np.arange(len(dataset)), part)
            assert not keys(dataset.select(part)) & keys(dataset.select(others))


def test_split_depends_on_the_seed_and_on_nothing_else():
    dataset, splitter = repeated(), dc.splits.StoichiometrySplitter()
    first = splitter.split(dataset, seed=3)
    np.random.seed(99)  # noqa: NPY002
    for a, b in zip(first, splitter.split(dataset, seed=3), strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(first[2], splitter.split(dataset, seed=4)[2])


def test_row_order_does_not_decide_which_formulas_are_tested_together():
    dataset, splitter = repeated(), dc.splits.StoichiometrySplitter()
    order = np.random.default_rng(1).permutation(len(dataset))
    tested = dataset.select(splitter.split(dataset, seed=0)[2])
    again = dataset.select(order)
    assert keys(tested) == keys(again.select(splitter.split(again, seed=0)[2]))


@pytest.mark.parametrize("on_disk", [False, True])
def test_k_fold_split_tests_every_row_once(on_disk, tmp_path):
    dataset = repeated(disk=tmp_path / "data" if on_disk else None)
    directories = [str(tmp_path / f"part{i}") for i in range(8)] if on_disk else None
    splitter = dc.splits.StoichiometrySplitter()
    folds = splitter.k_fold_split(dataset, 4, directories=directories, seed=1)
    tested = np.concatenate([test.y.ravel() for _, test in folds])
    assert sorted(tested) == sorted(np.ravel(dataset.y))
    for train, test in folds:
        assert not keys(train) & keys(test)
        assert len(train) + len(test) == len(dataset) and len(test) > len(dataset) / 8
    if on_disk:
        assert [part.data_dir for pair in folds for part in pair] == directories
    again = splitter.k_fold_split(repeated(), 4, seed=1)
    other = splitter.k_fold_split(repeated(), 4, seed=2)
    assert [keys(test) for _, test in folds] == [keys(test) for _, test in again]
    assert [keys(test) for _, test in folds] != [keys(test) for _, test in other]


def test_disk_datasets_split_into_directories(tmp_path):
    dataset = repeated(disk=tmp_path / "data")
    folders = [str(tmp_path / name) for name in ("a", "b", "c")]
    parts = dc.splits.StoichiometrySplitter().train_valid_test_split(dataset, *folders, seed=0)
    assert [part.data_dir for part in parts] == folders
    assert sum(map(len, parts)) == len(dataset)
    train, test = dc.splits.StoichiometrySplitter().train_test_split(dataset, seed=0)
    assert not keys(train) & keys(test) and len(train) + len(test) == len(dataset)


def test_one_formula_stays_on_one_side():
    dataset = dc.data.NumpyDataset(featurizer()(["NaCl", "Na2Cl2", "Na3Cl3"]), np.arange(3))
    sizes = [len(p) for p in dc.splits.StoichiometrySplitter().split(dataset, seed=0)]
    assert sizes == [3, 0, 0]
    parts = dc.splits.StoichiometrySplitter().train_valid_test_split(dataset, seed=0)
    assert [len(part) for part in parts] == [3, 0, 0]
    with pytest.raises(ValueError, match="1 formulas"):
        dc.splits.StoichiometrySplitter().k_fold_split(dataset, 2)


def test_bad_splits_are_refused():
    dataset, splitter = repeated(5), dc.splits.StoichiometrySplitter()
    for fractions in [(0.8, 0.1, 0.2), (1.2, -0.1, -0.1), (float("nan"), 0.1, 0.1)]:
        with pytest.raises(ValueError, match="add up to 1"):
            splitter.split(dataset, *fractions)
    with pytest.raises(ValueError, match="k is 1"):
        splitter.k_fold_split(dataset, 1)
    with pytest.raises(ValueError, match="directories"):
        splitter.k_fold_split(dataset, 2, directories=["a"])
    with pytest.raises(TypeError, match="shuffle"):
        splitter.k_fold_split(dataset, 2, shuffle=True)
    with pytest.raises(InvalidInputError, match="row 0"):
        splitter.split(dc.data.NumpyDataset(np.zeros((3, 2))))
    with pytest.raises(InvalidInputError, match="no row"):
        splitter.split(dataset.select([]))


# ---------------------------------------------------------- polymorph dataset


def write_parquet(path, **changes):
    table = {
        "material_id": ["mp-1", "mp-2", "mp-3"],
        "cell": [[4.5, 4.5, 4.5, 90, 90, 90], [4.2, 4.2, 4.2, 90, 90, 90], [3, 3, 3, 60, 60, 60]],
        "numbers": [[11, 17], [12, 8], [29]],
        "frac_coords": [[0, 0, 0, 0.5, 0.5, 0.5], [0, 0, 0, 0.5, 0.5, 0.5], [0, 0, 0]],
    }
    table.update(changes)
    pq.write_table(pa.table({k: v for k, v in table.items() if v is not None}), path)
    return str(path)


def test_parquet_structures(tmp_path):
    dataset = polysrl_dc.PolymorphDataset(write_parquet(tmp_path / "s.parquet"), progress=False)
    assert dataset.ids.tolist() == ["mp-1", "mp-2", "mp-3"] and dataset.skipped == []
    assert [graph.stoichiometry.formula for graph in dataset.X] == ["NaCl", "MgO", "Cu"]
    assert dataset.X[0].distances.min() == pytest.approx(4.5 * 3**0.5 / 2, abs=1e-4)
    small = polysrl_dc.PolymorphDataset(tmp_path / "s.parquet", max_sites=1, progress=False)
    assert small.ids.tolist() == ["mp-3"]
    with pytest.raises(InvalidInputError, match="numbers"):
        polysrl_dc.PolymorphDataset(write_parquet(tmp_path / "t.parquet", numbers=None))


@pytest.mark.parametrize(
    "changes",
    [
        {"numbers": [[11, 17], [12, 200], [29]]},
        {"numbers": [[11, 17], [12, 0], [29]]},
        {"numbers": [[11, 17], [12], [29]]},
        {"frac_coords": [[0, 0, 0, 0.5, 0.5, 0.5], [0, 0, 0, 0.5, 0.5], [0, 0, 0]]},
        {"cell": [[4.5] * 3 + [90] * 3, [4.2, 4.2, float("nan"), 90, 90, 90], [3] * 3 + [60] * 3]},
        {"cell": [[4.5] * 3 + [90] * 3, [4.2, 4.2, 0.0, 90, 90, 90], [3] * 3 + [60] * 3]},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore")
def test_a_bad_structure_of_a_file_is_named_or_skipped(changes, tmp_path):
    path = write_parquet(tmp_path / "s.parquet", **changes)
    with pytest.raises(InvalidInputError, match="structure mp-2: "):
        polysrl_dc.PolymorphDataset(path, progress=False)
    dataset = polysrl_dc.PolymorphDataset(path, on_error="skip", progress=False)
    assert dataset.ids.tolist() == ["mp-1", "mp-3"] and dataset.skipped[0][0] == "mp-2"
    with pytest.raises(ValueError, match="on_error"):
        polysrl_dc.PolymorphDataset(path, on_error="ignore")


def test_aflow_prototypes_are_sampled_by_seed():
    first, same, other = (
        polysrl_dc.PolymorphDataset("aflow", max_structures=5, max_sites=8, seed=s, progress=False)
        for s in (0, 0, 1)
    )
    assert len(first) == 5 and max(len(graph.numbers) for graph in first.X) <= 8
    assert first.ids.tolist() == same.ids.tolist() != other.ids.tolist()


def test_real_structures(data_dir):
    path = data_dir / "mp" / "structures.parquet"
    dataset = polysrl_dc.PolymorphDataset(path, max_structures=20, max_sites=50, progress=False)
    formulas = pq.read_table(path, columns=["material_id", "formula"]).to_pandas()
    expected = formulas.set_index("material_id")["formula"]
    for row_id, graph in zip(dataset.ids, dataset.X, strict=True):
        assert graph.stoichiometry.formula == featurizer()(expected[row_id])[0].formula
        assert np.diff(graph.indptr).max() <= 12 and graph.distances.max() <= 8


# ------------------------------------------------------------------- batching


def test_batches_are_never_padded_and_never_of_one_row():
    for n in range(1, 40):
        parts = list(batch_rows(n, 8))
        assert np.concatenate(parts).tolist() == list(range(n))
        assert all(len(part) <= 9 for part in parts) and (n == 1 or min(map(len, parts)) > 1)


@pytest.mark.parametrize("module", [datasets, batches])
def test_examples(module):
    result = doctest.testmod(module)
    assert not result.failed and (result.attempted or module is batches)
