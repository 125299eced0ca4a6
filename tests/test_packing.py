"""The cache of structures: every source, bad input, damage, killed and simultaneous builds."""

import functools
import json
import multiprocessing
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from crystals import AFLOW, graph_of
from pymatgen.core import IStructure, Lattice, Structure

from polysrl_dc import PolymorphDataset, StructureGraphFeaturizer, packing, sources
from polysrl_dc.errors import InvalidInputError
from polysrl_dc.graphs import StoichiometryBatch, StructureBatch
from polysrl_dc.packing import graph_arrays, pack, read_cache
from polysrl_dc.sources import PackSettings

FORK = multiprocessing.get_context("fork")  # children see what a test has patched
PAIRS = ["NaCl", "MgO", "CsCl", "ZnS", "CaO", "NaF", "LiF", "KBr", "GaN", "TiC", "NaCl"]
N = len(PAIRS)


def structures():
    """Cells of two to four sites without symmetry; the first and the last are polymorphs."""
    rng = np.random.default_rng(0)
    made = []
    for i, formula in enumerate(PAIRS):
        split = next(k for k in range(1, len(formula)) if formula[k].isupper())
        lattice = Lattice.from_parameters(4 + 0.2 * i, 4.5, 5, 90, 80 + i, 95)
        pair = Structure(lattice, [formula[:split], formula[split:]], [[0.0] * 3, [0.4, 0.5, 0.6]])
        cell = pair * (1 + i % 2, 1, 1)
        coords = cell.frac_coords + rng.uniform(-0.02, 0.02, (len(cell), 3))
        made.append(Structure(cell.lattice, cell.species, coords))
    return made


def table(made=None, **changes):
    made = structures() if made is None else made
    columns = {
        "material_id": [f"mp-{i}" for i in range(len(made))],
        "cell": [[*s.lattice.abc, *s.lattice.angles] for s in made],
        "numbers": [[site.specie.Z for site in s] for s in made],
        "frac_coords": [s.frac_coords.ravel().tolist() for s in made],
    }
    columns.update(changes)
    return pa.table({name: column for name, column in columns.items() if column is not None})


def changed(name, row, value):
    """The table with one value replaced."""
    column = table()[name].to_pylist()
    column[row] = value
    return table(**{name: column})


def write(path, content=None, **kwargs):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table() if content is None else content, path, **kwargs)
    return path


@pytest.fixture
def small_parts(monkeypatch):
    """Parts of two structures."""
    monkeypatch.setattr(sources, "_PART", 2)
    monkeypatch.setattr(sources, "_SMALL_PART", 2)


@pytest.fixture
def written(monkeypatch):
    """Names of the parts that this process has built."""
    names = []

    def counted(arguments, original=packing._write_part):
        names.append(arguments[1].name)
        original(arguments)

    monkeypatch.setattr(packing, "_write_part", counted)
    return names


def build(source, cache, settings=None, processes=1):
    return pack(source, cache, settings, processes=processes, progress=False)


def open_dataset(source, cache, **kwargs):
    return PolymorphDataset(source, cache_dir=cache, processes=1, progress=False, **kwargs)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_same_arrays(one, other, *but):
    (a, _), (b, _) = read_cache(one), read_cache(other)
    for name in a.keys() - set(but):
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def assert_same_tensors(one, other):
    for name in type(one).__slots__:
        a, b = getattr(one, name), getattr(other, name)
        same = torch.equal(a, b) and a.dtype == b.dtype if torch.is_tensor(a) else a == b
        assert same, name


def assert_same_graph(one, other, atol=0.0):
    for name in ("numbers", "indptr", "neighbors"):
        a, b = getattr(one, name), getattr(other, name)
        assert a.dtype == b.dtype, name
        np.testing.assert_array_equal(a, b)
    np.testing.assert_allclose(one.distances, other.distances, atol=atol, rtol=0)
    assert one.stoichiometry.formula == other.stoichiometry.formula
    np.testing.assert_array_equal(one.stoichiometry.fractions, other.stoichiometry.fractions)
    np.testing.assert_array_equal(one.stoichiometry.numbers, other.stoichiometry.numbers)


# -------------------------------------------------------------------- sources


@pytest.mark.parametrize("processes", [1, 2])
def test_a_list_of_structures_is_what_the_featurizer_makes(tmp_path, small_parts, processes):
    folder = build(structures(), tmp_path, processes=processes)
    dataset = open_dataset(structures(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]  # nothing else is left
    graphs = list(StructureGraphFeaturizer()(structures()))
    assert dataset.ids.tolist() == [str(i) for i in range(N)]
    for row, graph in enumerate(graphs):
        assert_same_graph(dataset.graph(row), graph)
        assert_same_graph(dataset.X[row], graph)
    rows = np.array([7, 0, 3, 10, 0])
    formulas, batch, groups = dataset.batch(rows)
    chosen = [graphs[row] for row in rows]
    expected = StructureBatch.from_graphs(chosen, rounds=3, resolution=0.01)
    assert_same_tensors(batch, expected)
    assert_same_tensors(
        formulas, StoichiometryBatch.from_graphs([graph.stoichiometry for graph in chosen])
    )
    assert groups[1] == groups[3] == groups[4] and len(set(groups.tolist())) == 3
    edges = [len(StructureBatch.from_graphs([g], resolution=0.01).centers) for g in graphs]
    assert dataset.n_edges.tolist() == edges
    memory = PolymorphDataset.from_graphs(graphs, dataset.ids)
    assert_same_tensors(memory.batch(rows)[1], expected)
    np.testing.assert_array_equal(memory.groups, dataset.groups)


def test_settings_reach_the_graphs(tmp_path):
    settings = PackSettings(max_neighbors=5, cutoff=4.0, rounds=1, resolution=0.1)
    dataset = open_dataset(structures(), tmp_path, settings=settings)
    graphs = StructureGraphFeaturizer(5, 4.0)(structures())
    for row, graph in enumerate(graphs):
        assert_same_graph(dataset.graph(row), graph)
    batch = dataset.batch(np.arange(N))[1]
    assert_same_tensors(batch, StructureBatch.from_graphs(graphs, rounds=1, resolution=0.1))
    for name in ("max_neighbors", "cutoff", "rounds", "resolution"):
        with pytest.raises(ValueError, match=f"{name} is 0"):
            replace(settings, **{name: 0})


def test_sites_are_merged_for_as_many_rounds_as_the_settings_say():
    """Of nine sites in a row each round tells one more pair apart."""
    beside = [j for i in range(9) for j in (i - 1, i + 1) if 0 <= j < 9]
    row = graph_of([1, *[2] * 7, 1], beside, [2.0] * 16)
    found = [graph_arrays([row], ["row"], PackSettings(rounds=n)) for n in (1, 2, 3)]
    assert [len(arrays["node_multiplicity"]) for arrays in found] == [2, 3, 4]


def test_parquet_file_and_folder_of_shards(tmp_path, small_parts):
    file = build(write(tmp_path / "s.parquet", row_group_size=3), tmp_path / "cache")
    for i, (start, stop) in enumerate([(0, 5), (5, 5), (5, 6), (6, N)]):
        write(tmp_path / "shards" / f"{i}.parquet", table().slice(start, stop - start))
    shards = build(tmp_path / "shards", tmp_path / "cache", processes=2)
    assert file != shards
    assert_same_arrays(file, shards)
    dataset = open_dataset(tmp_path / "s.parquet", tmp_path / "cache")
    assert dataset.ids.tolist() == [f"mp-{i}" for i in range(N)]
    for row, graph in enumerate(StructureGraphFeaturizer()(structures())):
        assert_same_graph(dataset.graph(row), graph, atol=2.1e-5)


def test_types_of_parquet_columns(tmp_path):
    plain = build(write(tmp_path / "plain.parquet"), tmp_path / "cache")
    schema = pa.schema(
        [
            ("material_id", pa.large_string()),
            ("cell", pa.list_(pa.float64(), 6)),
            ("numbers", pa.large_list(pa.uint8())),
            ("frac_coords", pa.list_(pa.float64())),
        ]
    )
    assert_same_arrays(
        plain, build(write(tmp_path / "t.parquet", table().cast(schema)), tmp_path / "cache")
    )
    wrong = [("cell", ["cubic"] * N), ("numbers", [["Na", "Cl"]] * N), ("cell", [1.0] * N)]
    for name, column in wrong:
        path = write(tmp_path / "wrong.parquet", table(**{name: column}))
        with pytest.raises(InvalidInputError, match=rf"wrong\.parquet: {name} is .*not a list of"):
            build(path, tmp_path / "cache")


def test_cif_files(tmp_path, small_parts):
    made = structures()[:5]
    for i, structure in enumerate(made):
        path = tmp_path / "cifs" / f"{i % 2}" / f"{i}.cif"
        path.parent.mkdir(parents=True, exist_ok=True)
        structure.to(filename=str(path))
    dataset = open_dataset(tmp_path / "cifs", tmp_path / "cache")
    assert dataset.ids.tolist() == ["0/0.cif", "0/2.cif", "0/4.cif", "1/1.cif", "1/3.cif"]
    read = [Structure.from_file(tmp_path / "cifs" / name) for name in dataset.ids]
    for row, graph in enumerate(StructureGraphFeaturizer()(read)):
        assert_same_graph(dataset.graph(row), graph)
    assert dataset.formulas.tolist() == ["NaCl", "CsCl", "CaO", "MgO", "ZnS"]
    shouted = tmp_path / "cifs" / "1" / "3.CIF"
    shouted.with_suffix(".cif").rename(shouted)
    assert open_dataset(tmp_path / "cifs", tmp_path / "cache").ids.tolist()[-1] == "1/3.CIF"
    shouted.rename(shouted.with_suffix(".cif"))
    one = open_dataset(tmp_path / "cifs" / "1" / "3.cif", tmp_path / "cache")
    assert one.ids.tolist() == ["3.cif"]
    assert_same_graph(one.graph(0), dataset.graph(4))
    # content decides, not the place: the same cache, and names that hold in both places
    shutil.move(tmp_path / "cifs", tmp_path / "moved")
    assert open_dataset(tmp_path / "moved", tmp_path / "cache").ids.tolist() == dataset.ids.tolist()
    (tmp_path / "moved" / "1" / "9.cif").write_text("data_nothing\n_cell_length_a what\n")
    with pytest.raises(InvalidInputError, match=r"structure 1/9\.cif: "):
        open_dataset(tmp_path / "moved", tmp_path / "cache")
    skipping = open_dataset(tmp_path / "moved", tmp_path / "cache", on_error="skip")
    assert [name for name, _ in skipping.skipped] == ["1/9.cif"] and len(skipping) == 5


def test_aflow():
    dataset = PolymorphDataset("aflow", progress=False)
    assert dataset.ids.tolist() == [entry["tags"]["aflow"] for entry in AFLOW]
    rows = range(0, len(AFLOW), 60)
    graphs = StructureGraphFeaturizer()([AFLOW[row]["snl"].structure for row in rows])
    for row, graph in zip(rows, graphs, strict=True):
        assert_same_graph(dataset.graph(row), graph)
    assert_same_tensors(
        dataset.batch(np.array(rows))[1], StructureBatch.from_graphs(graphs, resolution=0.01)
    )


# -------------------------------------------------------------------- finding


def test_a_cache_is_found_again_and_rebuilt_only_when_content_or_settings_change(
    tmp_path, small_parts, written
):
    path, cache = write(tmp_path / "s.parquet"), tmp_path / "cache"
    first = build(path, cache)
    assert written == [f"{i:06d}" for i in range((N + 1) // 2)]
    times = {file: file.stat().st_mtime_ns for file in first.iterdir()}
    written.clear()
    copy = shutil.copy(path, tmp_path / "copy.parquet")
    assert build(path, cache) == build(copy, cache) == build(str(path), cache) == first
    assert not written and {f: f.stat().st_mtime_ns for f in first.iterdir()} == times
    others = [
        build(path, cache, PackSettings(**changes))
        for changes in ({"rounds": 4}, {"resolution": 0.1}, {"cutoff": 5.0}, {"max_neighbors": 8})
    ]
    pq.write_table(changed("material_id", 3, "other"), path)
    others.append(build(path, cache))
    assert len({first, *others}) == 6 and len(written) == 5 * 6
    made = structures()
    lists = [build(made, cache), build(made[:-1], cache), build(made[::-1], cache)]
    made[0].translate_sites([0], [0.1, 0, 0])
    lists.append(build(made, cache))
    assert len(set(lists)) == 4


def test_where_caches_lie(tmp_path, monkeypatch):
    monkeypatch.setenv("POLYSRL_CACHE", str(tmp_path / "named"))
    assert build(structures()[:1], None).parent == tmp_path / "named"
    monkeypatch.delenv("POLYSRL_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert build(structures()[:1], None).parent == tmp_path / ".cache" / "polysrl_dc"
    assert build(structures()[:1], tmp_path / "given").parent == tmp_path / "given"
    monkeypatch.chdir(tmp_path)
    assert build(structures()[:1], "~/cc").parent == tmp_path / "cc"
    monkeypatch.setenv("POLYSRL_CACHE", "~/named")
    assert build(structures()[:1], None).parent == tmp_path / "named"
    assert not (tmp_path / "~").exists()


# ------------------------------------------------------------------ bad input


NAN = float("nan")
BAD_ROWS = {
    "too few coordinates": (changed("frac_coords", 3, [0, 0, 0, 0.5]), "fractional coordinates"),
    "no coordinates": (changed("frac_coords", 3, None), "0 fractional coordinates"),
    "NaN coordinates": (changed("frac_coords", 3, [0, NAN, 0, *[0.5] * 9]), "not finite"),
    "null coordinate": (changed("frac_coords", 3, [0, None, 0, *[0.5] * 9]), "not finite"),
    "no numbers": (changed("numbers", 3, None), "for 0 sites"),
    "null number": (changed("numbers", 3, [30, None, 30, 16]), "nan"),
    "no element": (changed("numbers", 3, [30, 200, 30, 16]), "200 has no embedding"),
    "negative number": (changed("numbers", 3, [30, -16, 30, 16]), "-16"),
    "greater than a byte": (changed("numbers", 3, [30, 272, 30, 16]), "272"),
    "no sites": (table(numbers=[[1]] * 3 + [[]] + [[1]] * 7,
                       frac_coords=[[0] * 3] * 3 + [[]] + [[0] * 3] * 7), "shape"),
    "no cell": (changed("cell", 3, None), "0 parameters"),
    "short cell": (changed("cell", 3, [4, 4, 4, 90, 90]), "5 parameters"),
    "long cell": (changed("cell", 3, [4, 4, 4, 90, 90, 90, 90]), "7 parameters"),
    "NaN cell": (changed("cell", 3, [4, 4, NAN, 90, 90, 90]), "above 0"),
    "infinite length": (changed("cell", 3, [4, 4, float("inf"), 90, 90, 90]), "not finite"),
    "flat cell": (changed("cell", 3, [4, 4, 4, 90, 90, 0]), "below 180"),
    "impossible angles": (changed("cell", 3, [4, 4, 4, 10, 10, 170]), "volume|finite"),
    "infinite angle": (changed("cell", 3, [4, 4, 4, 90, 90, float("inf")]), "below 180"),
    "negative length": (changed("cell", 3, [-4, 4, 4, 90, 80, 95]), r"not above 0 .*\[-4"),
    **{
        f"angle of {angle}": (changed("cell", 3, [4, 4, 4, 90, angle, 95]), "below 180")
        for angle in (-100, 180, 260, 280)
    },
}  # fmt: skip


@pytest.mark.parametrize("what", BAD_ROWS)
def test_a_bad_row_is_named_or_skipped_and_the_others_are_not_touched(what, tmp_path, small_parts):
    content, message = BAD_ROWS[what]
    path = write(tmp_path / "s.parquet", content)
    with pytest.raises(InvalidInputError, match=f"structure mp-3: .*({message})"):
        open_dataset(path, tmp_path)
    dataset = open_dataset(path, tmp_path, on_error="skip")
    assert [name for name, _ in dataset.skipped] == ["mp-3"]
    others = [i for i in range(N) if i != 3]
    assert dataset.ids.tolist() == [f"mp-{i}" for i in others]
    if what != "no sites":
        graphs = StructureGraphFeaturizer()(structures())
        for row, i in enumerate(others):
            assert_same_graph(dataset.graph(row), graphs[i], atol=2.1e-5)


def test_all_bad_is_an_error_and_a_part_of_bad_rows_is_none(tmp_path, small_parts):
    cells = table()["cell"].to_pylist()
    path = write(tmp_path / "s.parquet", table(cell=[[NAN] * 6] * N))
    with pytest.raises(InvalidInputError, match=f"none of the {N} structures"):
        open_dataset(path, tmp_path, on_error="skip")
    path = write(tmp_path / "t.parquet", table(cell=[[NAN] * 6] * 4 + cells[4:]))
    dataset = open_dataset(path, tmp_path, on_error="skip")
    assert len(dataset.skipped) == 4 and len(dataset) == N - 4
    assert dataset.graph(0).stoichiometry.formula == "CaO"


@pytest.mark.parametrize("bad", [None, "", "a\0", NAN], ids=repr)
def test_an_id_that_is_none_is_refused_by_its_row(bad, tmp_path, small_parts):
    names = [float(i) for i in range(N)] if bad is NAN else [f"mp-{i}" for i in range(N)]
    names[7] = bad
    path = write(tmp_path / "s.parquet", table(material_id=names))
    with pytest.raises(
        InvalidInputError, match=r"structure s\.parquet: row 7 has the id .*: empty, or"
    ):
        open_dataset(path, tmp_path)
    dataset = open_dataset(path, tmp_path, on_error="skip")
    assert dataset.ids.tolist() == [str(name) for i, name in enumerate(names) if i != 7]
    series = pd.Series(structures(), index=pd.Index(names, dtype=object))
    with pytest.raises(InvalidInputError, match=r"^row 7 has the id .*: empty, or"):
        open_dataset(series, tmp_path)


def test_structures_may_have_one_id(tmp_path):
    path = write(tmp_path / "s.parquet", table(material_id=["mp-1"] * N))
    dataset = open_dataset(path, tmp_path)
    assert dataset.ids.tolist() == ["mp-1"] * N and dataset.formulas.tolist()[:2] == PAIRS[:2]


def test_structures_of_a_series_are_named_by_its_index(tmp_path):
    names = [f"mp-{i}" for i in range(3)]
    made = pd.Series(structures()[:3], index=names)
    assert open_dataset(made, tmp_path).ids.tolist() == names
    assert open_dataset(list(made), tmp_path).ids.tolist() == ["0", "1", "2"]


def test_a_worker_that_dies_is_told_from_bad_input(tmp_path, small_parts, monkeypatch):
    monkeypatch.setattr(packing, "_end_with_parent", functools.partial(os._exit, 1))
    with pytest.raises(RuntimeError, match=r"__main__.*processes=1"):
        build(structures(), tmp_path, processes=2)


def test_a_bad_structure_of_a_list(tmp_path):
    alloy = Structure(Lattice.cubic(3), [{"Cu": 0.5, "Au": 0.5}], [[0] * 3])
    made = [*structures()[:2], alloy, None]
    with pytest.raises(InvalidInputError, match=r"structure 2: .*partial occupancy"):
        open_dataset(made, tmp_path)
    skipped = open_dataset(made, tmp_path, on_error="skip").skipped
    assert [name for name, _ in skipped] == ["2", "3"]


def test_bad_sources_are_named(tmp_path, small_parts):
    whole = write(tmp_path / "whole.parquet").read_bytes()
    (tmp_path / "empty").mkdir()
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed" / "a.cif").write_text("data_")
    write(tmp_path / "mixed" / "a.parquet")
    (tmp_path / "truncated.parquet").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "nothing.parquet").write_bytes(b"")
    middle = bytearray(whole)
    middle[10:600] = bytes(590)
    (tmp_path / "overwritten.parquet").write_bytes(middle)
    write(tmp_path / "lacking.parquet", table(numbers=None, cell=None))
    write(tmp_path / "norow.parquet", table().slice(0, 0))
    for name, message in (
        ("truncated.parquet", "truncated.parquet is not a complete Parquet file"),
        ("nothing.parquet", "nothing.parquet is not a complete Parquet file"),
        ("overwritten.parquet", "overwritten.parquet is damaged"),
        ("lacking.parquet", r"lacking.parquet lacks the columns \['cell', 'numbers'\]"),
        ("norow.parquet", "holds no structure"),
        ("no such path", "there is no .*no such path"),
        ("empty", "empty must hold either"),
        ("mixed", "mixed must hold either"),
    ):
        for on_error in ("raise", "skip"):
            with pytest.raises(InvalidInputError, match=message):
                open_dataset(tmp_path / name, tmp_path / "cache", on_error=on_error)
    with pytest.raises(InvalidInputError, match="holds no structure"):
        open_dataset([], tmp_path / "cache")


# --------------------------------------------------------------------- damage


def truncate(path):
    os.truncate(path, path.stat().st_size - 1)


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, flip_a_byte, Path.unlink], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", ["distances", "ids", "groups"])
def test_a_damaged_file_is_named(damage, name, tmp_path):
    folder = build(structures(), tmp_path)
    damage(folder / f"{name}.npy")
    with pytest.raises(InvalidInputError, match=rf"{name}\.npy is (missing|truncated|damaged)"):
        open_dataset(structures(), tmp_path)
    if damage is flip_a_byte:
        assert len(open_dataset(structures(), tmp_path, verify=False)) == N
    else:
        with pytest.raises(InvalidInputError, match=rf"{name}\.npy is missing or truncated"):
            read_cache(folder, verify=False)


@pytest.mark.parametrize(
    "text", [None, "", "{", "[]", "{}", '{"files": 3, "version": 1}', '{"files": {}, "version": 1}',
             '{"files": {"../../x": {"size": 1, "sha256": ""}}, "version": 1}']
)  # fmt: skip
def test_a_foreign_folder_is_named(text, tmp_path):
    folder = build(structures(), tmp_path)
    manifest = folder / "manifest.json"
    manifest.unlink() if text is None else manifest.write_text(text)
    for use in (lambda: read_cache(folder), lambda: open_dataset(structures(), tmp_path)):
        with pytest.raises(InvalidInputError, match=folder.name):
            use()
    with pytest.raises(InvalidInputError, match="no folder"):
        read_cache(tmp_path / "no folder")


def test_no_pickle_is_read(tmp_path):
    folder = build(structures(), tmp_path)
    np.save(folder / "ids.npy", np.array([{"a": 1}] * N, dtype=object), allow_pickle=True)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["ids"] = packing._entry(folder / "ids.npy")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InvalidInputError, match=r"ids\.npy.*[Oo]bject"):
        open_dataset(structures(), tmp_path)


# ------------------------------------------------- killed and simultaneous builds


def run(function, *arguments):
    child = FORK.Process(target=function, args=arguments)
    child.start()
    return child


def killed_build(path, cache, monkeypatch, *, at):
    """Kill a build (SIGKILL) while it saves the third array of part number ``at``."""
    reached = FORK.Event()

    def stuck(file, *args, original=np.save, **kwargs):
        original(file, *args, **kwargs)
        if f".{at:06d}." in str(file) and len(list(Path(file).parent.iterdir())) == 3:
            reached.set()
            time.sleep(60)

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", stuck)
        child = run(build, path, cache)
        assert reached.wait(30)
    child.kill()
    child.join()
    assert child.exitcode == -9
    (parts,) = cache.glob("*.parts")
    return parts


def test_a_killed_build_goes_on_with_its_parts(tmp_path, small_parts, written, monkeypatch):
    path, cache = write(tmp_path / "s.parquet"), tmp_path / "cache"
    parts = killed_build(path, cache, monkeypatch, at=3)
    complete = sorted(p.name for p in parts.iterdir() if p.name[0] != ".")
    assert complete == ["000000", "000001", "000002"]
    assert not written  # it was another process that wrote them
    folder = build(path, cache)
    assert written == ["000003", "000004", "000005"]
    undisturbed = build(path, tmp_path / "other")
    assert contents(folder) == contents(undisturbed)
    assert [p.name for p in cache.iterdir()] == [folder.name]  # nothing of the killed build is left


@pytest.mark.parametrize("damage", [truncate, flip_a_byte, Path.unlink], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", ["degrees.npy", "manifest.json"])
def test_a_damaged_part_of_a_killed_build_is_built_again(
    damage, name, tmp_path, small_parts, written, monkeypatch
):
    path, cache = write(tmp_path / "s.parquet"), tmp_path / "cache"
    parts = killed_build(path, cache, monkeypatch, at=4)
    damage(parts / "000001" / name)
    folder = build(path, cache)
    assert written == ["000001", "000004", "000005"]
    assert contents(folder) == contents(build(path, tmp_path / "other"))


def test_workers_end_with_a_killed_build(tmp_path, small_parts, monkeypatch):
    path = write(tmp_path / "s.parquet")

    def stuck(*args, **kwargs):
        (tmp_path / f"{os.getpid()}.pid").touch()
        time.sleep(60)

    monkeypatch.setattr(np, "save", stuck)
    child = run(build, path, tmp_path / "cache", None, 2)
    wait_until(lambda: len(list(tmp_path.glob("*.pid"))) == 2)
    workers = [int(file.stem) for file in tmp_path.glob("*.pid")]
    assert all(map(is_alive, workers))
    child.kill()
    child.join()
    wait_until(lambda: not any(map(is_alive, workers)))


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_builds_of_one_cache_at_once_all_succeed(tmp_path, small_parts, monkeypatch):
    path, cache = write(tmp_path / "s.parquet"), tmp_path / "cache"
    together = FORK.Barrier(3)

    def start(arguments, original=packing._write_part):
        if arguments[1].name == "000000":
            together.wait(30)
        original(arguments)

    monkeypatch.setattr(packing, "_write_part", start)
    children = [run(build, path, cache) for _ in range(3)]
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0, 0]
    monkeypatch.undo()
    (folder,) = cache.iterdir()
    assert contents(folder) == contents(build(path, tmp_path / "other"))


@pytest.mark.parametrize("at", ["_part_arrays", "_join"])
def test_a_slow_build_accepts_the_cache_of_a_quick_one(at, tmp_path, monkeypatch):
    """The quick one removes the parts while the slow one is about to write or to join them."""
    path, cache = write(tmp_path / "s.parquet"), tmp_path / "cache"
    reached, go_on = FORK.Event(), FORK.Event()
    original = getattr(packing, at)

    def slow(*arguments):
        if at == "_join":
            reached.set()
            go_on.wait(30)
            return original(*arguments)
        made = original(*arguments)
        reached.set()
        go_on.wait(30)
        return made

    with monkeypatch.context() as patch:
        patch.setattr(packing, at, slow)
        child = run(build, path, cache)
        assert reached.wait(30)
    folder = build(path, cache)
    before = contents(folder)
    go_on.set()
    child.join()
    assert child.exitcode == 0 and contents(folder) == before
    assert [p.name for p in cache.iterdir()] == [folder.name]


def test_other_errors_of_a_build_are_not_hidden(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(OSError, match="No space left"):
        build(structures(), tmp_path)
    assert not list(tmp_path.glob("*/manifest.json")) and not list(tmp_path.glob("*/.*"))


@pytest.mark.parametrize("kind", [Structure, IStructure])
def test_structures_that_differ_in_the_seventh_digit_are_other_content(kind):
    cells = (Lattice.cubic(a) for a in (3.4, 3.4000004))
    first, second = (sources.open_source([kind(cell, ["Po"], [[0, 0, 0]])])[0] for cell in cells)
    assert first != second
