"""Every DeepChem input form through featurizer, splitter, fit and evaluate; bad rows; splits."""

import json
from dataclasses import replace

import deepchem as dc
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pymatgen.core import Lattice, Structure

import polysrl_dc
from polysrl_dc import StoichiometryGraphFeaturizer, StoichiometrySplitter, datasets
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
    model = dc.models.PolySRLModel(config=CONFIG, pretrained=None, batch_size=8, learning_rate=1e-2)
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
    model = dc.models.PolySRLModel(config=CONFIG, pretrained=None)
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
    model = dc.models.PolySRLModel(config=CONFIG, pretrained=None)
    with pytest.raises(InvalidInputError, match="row 4100 "):
        model.predict_embedding(dc.data.NumpyDataset(X))


def test_an_empty_label_of_a_csv_file_is_a_missing_label(tmp_path):
    labels = [*LABELS[:5], None, *LABELS[6:]]
    dataset = from_csv(tmp_path, FORMULAS, labels, "raise")
    assert dataset.w[5, 0] == 0 and dataset.w.sum() == len(FORMULAS) - 1
    model = dc.models.PolySRLModel(config=CONFIG, pretrained=None)
    model.fit(dataset, nb_epoch=1)
    known = [y for y in labels if y is not None]
    assert model.model.label_mean.item() == pytest.approx(np.mean(known), rel=1e-5)


def test_a_missing_label_of_a_json_file_is_one_though_it_is_a_word(tmp_path):
    dataset = from_json(tmp_path, FORMULAS, [*LABELS[:-1], float("nan")], "raise")
    assert dataset.y[-1] == "" and dataset.w[-1, 0] == 0
    model = dc.models.PolySRLModel(config=CONFIG, pretrained=None)
    model.fit(dataset, nb_epoch=1)
    assert model.model.label_mean.item() == pytest.approx(np.mean(LABELS[:-1]), rel=1e-5)


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


def test_folds_are_as_equal_as_repeated_formulas_allow():
    formulas = [f"Na{n}Cl" for n in range(1, 6) for _ in range(20)]
    formulas += [f"K{n}Cl" for n in range(1, 21)]
    graphs = StoichiometryGraphFeaturizer().featurize(formulas)
    folds = StoichiometrySplitter().k_fold_split(dc.data.NumpyDataset(graphs), 5, seed=3)
    assert [len(test) for _, test in folds] == [24] * 5


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


def crystals():
    """Twenty crystals of nine formulas, of 2, 4 or 6 sites, without symmetry."""
    rng = np.random.default_rng(0)
    pairs = [("Na", "Cl"), ("Mg", "O"), ("Zn", "S"), ("Ca", "O"), ("Li", "F"), ("K", "Br"),
             ("Ga", "N"), ("Ti", "C"), ("Na", "F")]  # fmt: skip
    made = []
    for i in range(20):
        cell = Structure(Lattice.cubic(4 + 0.05 * i), pairs[i % 9], [[0.0] * 3, [0.5] * 3])
        cell = cell * (1 + i % 3, 1, 1)
        coords = cell.frac_coords + rng.uniform(-0.03, 0.03, (len(cell), 3))
        made.append(Structure(cell.lattice, cell.species, coords))
    return made


def to_parquet(structures, path):
    columns = {
        "material_id": [f"mp-{i}" for i in range(len(structures))],
        "cell": [[*s.lattice.abc, *s.lattice.angles] for s in structures],
        "numbers": [[site.specie.Z for site in s] for s in structures],
        "frac_coords": [s.frac_coords.ravel().tolist() for s in structures],
    }
    pq.write_table(pa.table(columns), path)
    return path


@pytest.fixture(scope="module")
def polymorphs(tmp_path_factory):
    path = to_parquet(crystals(), tmp_path_factory.mktemp("crystals") / "s.parquet")
    return open_polymorphs(path)


def open_polymorphs(path, **kwargs):
    return polysrl_dc.PolymorphDataset(
        path, cache_dir=path.parent / "cache", progress=False, processes=1, **kwargs
    )


def same_graph(one, other):
    return (
        np.array_equal(one.numbers, other.numbers)
        and np.array_equal(one.neighbors, other.neighbors)
        and np.array_equal(one.distances, other.distances)
        and one.stoichiometry.formula == other.stoichiometry.formula
    )


def test_a_polymorph_dataset_is_a_dataset_of_deepchem(polymorphs):
    assert isinstance(polymorphs, dc.data.Dataset) and len(polymorphs) == 20
    assert polymorphs.get_shape() == ((20,), (20, 1), (20, 1), (20,))
    arrays = polymorphs.X, polymorphs.y, polymorphs.w, polymorphs.ids
    assert tuple(array.shape for array in arrays) == polymorphs.get_shape()
    assert not polymorphs.y.any() and not polymorphs.w.any()
    with pytest.raises(InvalidInputError, match="every label is missing"):
        dc.models.PolySRLModel().fit(polymorphs, nb_epoch=1)
    assert len(polymorphs.get_task_names()) == 1
    assert polymorphs.ids.tolist() == [f"mp-{i}" for i in range(20)]
    expected = dc.feat.StructureGraphFeaturizer()(crystals())
    formulas = [graph.stoichiometry.formula for graph in expected]
    assert [graph.stoichiometry.formula for graph in polymorphs.X] == formulas
    assert polymorphs.formulas.tolist() == formulas
    same = np.equal.outer(polymorphs.groups, polymorphs.groups)
    np.testing.assert_array_equal(same, np.equal.outer(formulas, formulas))
    assert "mp-0" in str(polymorphs) and len(polymorphs.to_dataframe()) == 20
    metric = dc.metrics.Metric(dc.metrics.mae_score)
    assert metric.compute_metric(polymorphs.y, np.full((20, 1), 0.5), polymorphs.w) == 0.5
    with pytest.raises(NotImplementedError, match="no labels"):
        polymorphs.transform(None)


def test_iteration(polymorphs):
    X = polymorphs.X
    batches = list(polymorphs.iterbatches(batch_size=8, epochs=2, deterministic=True))
    assert [len(ids) for *_, ids in batches] == [8, 8, 4] * 2
    for a, b, c, d in zip(*(np.concatenate(p) for p in zip(*batches, strict=True)), strict=True):
        row = int(d.removeprefix("mp-"))
        assert same_graph(a, X[row]) and (b, c) == (0, 0)
    ids = np.concatenate([ids for *_, ids in batches])
    np.testing.assert_array_equal(ids, np.tile(polymorphs.ids, 2))
    shuffled = [ids for *_, ids in polymorphs.iterbatches(batch_size=20)]
    assert len(shuffled) == 1 and sorted(shuffled[0]) == sorted(polymorphs.ids)
    assert shuffled[0].tolist() != polymorphs.ids.tolist()
    assert [len(ids) for *_, ids in polymorphs.iterbatches()] == [20]
    samples = list(polymorphs.itersamples())
    assert [name for *_, name in samples] == polymorphs.ids.tolist()
    assert all(same_graph(sample[0], X[row]) for row, sample in enumerate(samples))
    with pytest.raises(ValueError, match="pad_batches"):
        next(polymorphs.iterbatches(8, pad_batches=True))


def test_a_selection_is_a_view_in_the_given_order(polymorphs):
    rows = [17, 3, 3, 8]
    view = polymorphs.select(rows)
    assert view.ids.tolist() == ["mp-17", "mp-3", "mp-3", "mp-8"] and len(polymorphs) == 20
    assert view._arrays["distances"] is polymorphs._arrays["distances"]
    assert all(map(same_graph, view.X, polymorphs.X[rows]))
    np.testing.assert_array_equal(view.n_edges, polymorphs.n_edges[rows])
    expected = polymorphs.batch(np.array(rows))
    for ours, theirs in zip(view.batch(np.arange(4)), expected, strict=True):
        for name in getattr(type(ours), "__slots__", ()):
            a, b = getattr(ours, name), getattr(theirs, name)
            assert torch.equal(a, b) if torch.is_tensor(a) else a == b, name
    assert view.select([2, 0]).ids.tolist() == ["mp-3", "mp-17"]
    mask = np.arange(20) >= 18
    assert polymorphs.select(mask).ids.tolist() == ["mp-18", "mp-19"]
    assert len(polymorphs.select([])) == 0
    assert view.fingerprint() == polymorphs.select(rows).fingerprint() != polymorphs.fingerprint()
    with pytest.raises(IndexError):
        polymorphs.select([20])


def test_a_fingerprint_tells_formulas_sizes_and_distances_apart_beside_equal_ids():
    def fingerprint(anion="Cl", cells=1, a=5.7, ids=None):
        made = [
            Structure(Lattice.cubic(a), [metal, anion], [[0.0] * 3, [0.5] * 3]) * (1, 1, cells)
            for metal in ("Li", "Na", "K", "Rb")
        ]
        graphs = dc.feat.StructureGraphFeaturizer()(made)
        return polysrl_dc.PolymorphDataset.from_graphs(graphs, ids).fingerprint()

    assert fingerprint() == fingerprint()
    others = [fingerprint("F"), fingerprint(cells=2), fingerprint(a=8.5), fingerprint(ids="abcd")]
    assert len({fingerprint(), fingerprint(a=5.75), *others}) == 6


def test_splitters_keep_polymorphs_together(polymorphs):
    splitter = dc.splits.StoichiometrySplitter()
    parts = splitter.train_valid_test_split(
        polymorphs, frac_train=0.5, frac_valid=0.25, frac_test=0.25, seed=0
    )
    assert sorted(np.concatenate([part.ids for part in parts])) == sorted(polymorphs.ids)
    assert not set(parts[0].formulas) & set(parts[2].formulas) and min(map(len, parts)) > 0
    folds = splitter.k_fold_split(polymorphs, 3, seed=0)
    assert sorted(np.concatenate([test.ids for _, test in folds])) == sorted(polymorphs.ids)
    for train, test in folds:
        assert isinstance(test, polysrl_dc.PolymorphDataset)
        assert not set(train.formulas) & set(test.formulas) and len(train) + len(test) == 20
    # the same split as that of the same graphs in memory
    other = splitter.split(dc.data.NumpyDataset(polymorphs.X), seed=5)
    for a, b in zip(splitter.split(polymorphs, seed=5), other, strict=True):
        np.testing.assert_array_equal(a, b)
    train, test = dc.splits.RandomSplitter().train_test_split(polymorphs, seed=0)
    assert len(train) == 16 and len(test) == 4
    with pytest.raises(InvalidInputError, match="no row"):
        splitter.split(polymorphs.select([]))


def test_samples_and_limits_of_size(polymorphs, tmp_path):
    path = to_parquet(crystals(), tmp_path / "s.parquet")
    first, same, other = (open_polymorphs(path, max_structures=7, seed=s) for s in (0, 0, 1))
    assert len(first) == 7 and first.ids.tolist() == same.ids.tolist() != other.ids.tolist()
    rows = [int(name.removeprefix("mp-")) for name in first.ids]
    assert rows == sorted(set(rows))
    assert all(map(same_graph, first.X, polymorphs.X[rows]))
    np.testing.assert_array_equal(first.groups, polymorphs.groups[rows])
    small = open_polymorphs(path, max_sites=4)
    expected = [f"mp-{i}" for i, s in enumerate(crystals()) if len(s) <= 4]
    assert small.ids.tolist() == expected and 0 < len(expected) < 20
    both = open_polymorphs(path, max_sites=4, max_structures=5)
    assert len(both) == 5 and set(both.ids) < set(expected)
    assert len(open_polymorphs(path, max_structures=1000)) == 20
    with pytest.raises(InvalidInputError, match="at most 1 sites"):
        open_polymorphs(path, max_sites=1)
    for none in (0, -1):
        with pytest.raises(ValueError, match=f"max_structures is {none}"):
            open_polymorphs(path, max_structures=none)
    with pytest.raises(ValueError, match="on_error"):
        open_polymorphs(path, on_error="ignore")


def test_from_graphs(polymorphs):
    graphs = polymorphs.X
    dataset = polysrl_dc.PolymorphDataset.from_graphs(graphs, polymorphs.ids)
    assert dataset.ids.tolist() == polymorphs.ids.tolist() and dataset.skipped == []
    assert all(map(same_graph, dataset.X, graphs))
    np.testing.assert_array_equal(dataset.groups, polymorphs.groups)
    np.testing.assert_array_equal(dataset.n_edges, polymorphs.n_edges)
    assert dataset.fingerprint() == polymorphs.fingerprint()
    assert polysrl_dc.PolymorphDataset.from_graphs(graphs[:2]).ids.tolist() == ["0", "1"]
    with pytest.raises(ValueError, match="3 ids for 20 graphs"):
        polysrl_dc.PolymorphDataset.from_graphs(graphs, ["a", "b", "c"])
    skipped = dc.feat.StructureGraphFeaturizer(on_error="skip")([crystals()[0], None])
    with pytest.raises(InvalidInputError, match=r"row 1 \(id 1\)"):
        polysrl_dc.PolymorphDataset.from_graphs(skipped)


def test_real_structures(data_dir, tmp_path):
    table = pq.read_table(data_dir / "mp" / "structures.parquet")
    table = table.take(np.arange(0, len(table), len(table) // 300)[:300])
    pq.write_table(table, tmp_path / "s.parquet")
    dataset = open_polymorphs(tmp_path / "s.parquet")
    rows = table.to_pylist()
    assert dataset.ids.tolist() == [row["material_id"] for row in rows] and not dataset.skipped
    for row, graph in zip(rows, dataset.X, strict=True):
        assert graph.stoichiometry.formula == featurizer()(row["formula"])[0].formula
        assert graph.numbers.tolist() == row["numbers"]
        assert np.diff(graph.indptr).max() <= 12 and graph.distances.max(initial=0) <= 8
    for i in range(0, 300, 30):
        structure = Structure(
            Lattice.from_parameters(*rows[i]["cell"]),
            rows[i]["numbers"],
            np.reshape(rows[i]["frac_coords"], (-1, 3)),
        )
        graph = dc.feat.StructureGraphFeaturizer()(structure)[0]
        np.testing.assert_allclose(dataset.graph(i).distances, graph.distances, atol=2.1e-5)
    formulas, structures, groups = dataset.batch(np.arange(300))
    assert len(formulas) == len(structures) == len(groups) == 300
    assert structures.multiplicity.sum() == sum(len(row["numbers"]) for row in rows)
    assert len(structures.index) < 0.8 * structures.multiplicity.sum()
    for part in dc.splits.StoichiometrySplitter().train_test_split(dataset, seed=0):
        assert 0 < len(part) < 300


# ------------------------------------------------------------------- batching


def test_batches_are_never_padded_and_never_of_one_row():
    for n in range(1, 40):
        parts = list(batch_rows(n, 8))
        assert np.concatenate(parts).tolist() == list(range(n))
        assert all(len(part) <= 9 for part in parts) and (n == 1 or min(map(len, parts)) > 1)
