"""Sizes that a file claims: none is believed before memory is taken or time is spent."""

import contextlib
import gzip
import json
import resource
import struct
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import submission
import tasks
import torch
from check_submission import check_records
from hostile import STRUCTURES, csv_file, record, rehash, table, task_table
from models import data, fitted, make
from pymatgen.core import Lattice, Structure
from safetensors.torch import save_file

import polysrl_dc
from polysrl_dc import inputs, sources
from polysrl_dc.checkpoints import CheckpointError, load_checkpoint, save_checkpoint
from polysrl_dc.errors import InvalidInputError
from polysrl_dc.inputs import listed_structures
from polysrl_dc.packing import pack, read_cache
from polysrl_dc.sources import read_structure

DEEP = 100_000


@pytest.fixture
def little_memory():
    """Two gigabytes more than now, so that a size that is believed is an error of its own."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**31, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def test_sizes_in_a_checkpoint_are_not_believed(tmp_path, little_memory):
    path = tmp_path / "w.safetensors"
    entries = {
        "a petabyte": {"dtype": "F32", "shape": [2**48], "data_offsets": [0, 2**50]},
        "more than an integer": {"dtype": "F32", "shape": [0, 2**63], "data_offsets": [0, 0]},
        "overflow": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 8]},
    }
    headers = [json.dumps({"w": entry}).encode() for entry in entries.values()]
    headers += [b"[" * DEEP, b'{"w":' * DEEP]
    contents = [struct.pack("<Q", len(header)) + header for header in headers]
    contents += [struct.pack("<Q", length) + b"{}" for length in (2**40, 2**63, 2**64 - 1)]
    for content in contents:
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"w\.safetensors"):
            load_checkpoint(path)
    save_file({"w": torch.ones(1)}, path, metadata={"polysrl_dc": "[" * DEEP})
    with pytest.raises(CheckpointError, match=r"w\.safetensors has no readable"):
        load_checkpoint(path)
    with open(path, "wb") as file:
        file.truncate(2**40)  # a hole: nothing is on the disk
    with pytest.raises(CheckpointError, match=r"w\.safetensors is not a file of at most"):
        load_checkpoint(path)


def _changed(manifest, place, value):
    *parents, last = place
    inner = manifest
    for name in parents:
        inner = inner[name]
    if value is None:
        del inner[last]
    else:
        inner[last] = value


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (["config", "n_features"], 10**9),
        (["config", "n_features"], 10_000),
        (["config", "stoichiometry_layers"], 10_000),
        (["config", "set2set_steps"], 10**9),
        (["config", "head_hidden"], 9999),
        (["config", "head_hidden"], "8"),
        (["config", "beta"], None),
        (["config", "unknown"], 1),
        (["settings", "n_ensemble"], 10**12),
        (["settings", "n_ensemble"], "2"),
        (["settings", "n_ensemble"], 0),
        *((["settings", "n_encoders"], n) for n in (10**12, "2", 2, 0, -1, 0.5)),
        (["settings", "n_tasks"], 10**15),
        (["settings", "task"], "no task"),
        (["settings", "task"], None),
        (["settings", "unknown"], 1),
        (["training", "model_dir"], "/elsewhere"),
        (["training", "device"], "cuda:99"),
        (["training", "batch_size"], "8"),
        (["training"], [1]),
        (["config"], "default"),
        (["settings"], None),
    ],
    ids=str,
)
def test_a_manifest_with_a_right_digest_is_not_believed(place, value, tmp_path, little_memory):
    path = tmp_path / "model.safetensors"
    fitted().save(tmp_path)
    tensors, manifest = load_checkpoint(path)
    _changed(manifest, place, value)
    save_checkpoint(path, tensors, manifest)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        polysrl_dc.PolySRLModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors, manifest: tensors.pop("model.fitted"),
        lambda tensors, manifest: tensors.update(foreign=torch.ones(1)),
        lambda tensors, manifest: tensors.update({"optimizer.0.exp_avg": torch.ones(3)}),
        lambda tensors, manifest: tensors.update({"optimizer.999.exp_avg": torch.ones(3)}),
        lambda tensors, manifest: tensors.update({"optimizer.-1.step": torch.ones(())}),
        lambda tensors, manifest: tensors.update({"optimizer.x": torch.ones(())}),
        lambda tensors, manifest: tensors.pop("optimizer.0.step"),
        lambda tensors, manifest: manifest.update(step=-1),
        lambda tensors, manifest: manifest.update(epoch="3"),
        lambda tensors, manifest: manifest.pop("run"),
        lambda tensors, manifest: manifest["config"].update(message_power=0.25),
        lambda tensors, manifest: manifest["settings"].update(freeze_encoder=True),
    ],
)
def test_a_checkpoint_of_something_else_changes_nothing(change, tmp_path):
    model = make(model_dir=str(tmp_path))
    model.fit(dataset := data(), nb_epoch=1)
    path = tmp_path / "checkpoint1.safetensors"
    tensors, manifest = load_checkpoint(path)
    change(tensors, manifest)
    save_checkpoint(path, tensors, manifest)
    model.fit(dataset, nb_epoch=1, checkpoint_interval=0)
    before = model.predict(dataset), model.get_global_step()
    with pytest.raises(CheckpointError, match=r"checkpoint1\.safetensors"):
        model.restore()
    np.testing.assert_array_equal(model.predict(dataset), before[0])
    assert model.get_global_step() == before[1]


# ------------------------------------------------------------- caches and structures


def test_sizes_in_a_cache_are_not_believed(tmp_path, little_memory):
    folder = pack(STRUCTURES, tmp_path, processes=1, progress=False)
    original = {path: path.read_bytes() for path in folder.iterdir()}
    manifest = folder / "manifest.json"

    def refused(words):
        with pytest.raises(InvalidInputError, match=words):
            read_cache(folder)
        for path, content in original.items():
            path.write_bytes(content)

    for text in (b"[" * DEEP, b'{"files":' * DEEP):
        manifest.write_bytes(text)
        refused(folder.name)
    with open(manifest, "wb") as file:
        file.truncate(2**40)
    refused(r"manifest\.json is larger")
    plain = json.loads(manifest.read_text())
    plain["settings"]["resolution"] = 0.5
    manifest.write_text(json.dumps(plain))
    refused(r"manifest\.json is that of another cache")
    del plain["settings"]
    manifest.write_text(json.dumps(plain))
    refused(r"manifest\.json lacks 'settings'")
    for shape in (
        "(1000000000000000,)",
        "(-1,)",
        "(99999999999999999999,)",
        "(2, 2)",
        "(",
        "((1,),)",
    ):
        _rewritten(folder, "distances", shape)
        refused(r"distances\.npy")
    for name, array in (
        ("distances", np.zeros(3, np.float32)),
        ("site_counts", np.array([3, -1, 3, 3], np.int32)),
        ("site_counts", np.array([9, 9, 9, 9], np.int32)),
        ("formulas", np.array([b"NaCl"])),
        ("groups", np.array(["0", "1", "2", "3"])),
    ):
        _rewritten(folder, name, None, array)
        refused(rf"{folder.name}.*\.npy")


def _rewritten(folder, name, shape, array=None):
    """Another array, or another shape in its header, with a digest that fits."""
    path = folder / f"{name}.npy"
    if array is not None:
        np.save(path, array)
    else:
        head = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
        path.write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head.encode())
    manifest = json.loads((folder / "manifest.json").read_text())
    entry = {"size": path.stat().st_size, "sha256": sources.file_digest(path)}
    manifest["files"][name] = entry
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_counts_in_a_parquet_file_are_not_believed(tmp_path, little_memory, monkeypatch):
    path = tmp_path / "s.parquet"
    rows = pa.concat_tables([table(STRUCTURES)] * 25_000)
    pq.write_table(rows.combine_chunks(), path)  # a dictionary and run lengths
    with pytest.raises(InvalidInputError, match=r"s\.parquet claims 100,000 structures in"):
        pack(path, tmp_path, progress=False)
    pq.write_table(table(STRUCTURES), path)
    monkeypatch.setattr(sources, "_LARGEST_GROUP", 100)
    with pytest.raises(InvalidInputError, match=r"s\.parquet has a row group of"):
        pack(path, tmp_path, progress=False)


def test_structure_files_of_absurd_size_are_refused(tmp_path, little_memory):
    salt = Structure(Lattice.cubic(300), ["Na"], [[0.1, 0.2, 0.3]])
    salt.to(filename=str(tmp_path / "s.cif"))
    text = (tmp_path / "s.cif").read_text()
    row = text.splitlines()[-1] + "\n"
    files = {
        "rows.cif": (text + row * 11_000, "up to 11,001 sites"),
        "symmetry.cif": (
            text.replace("'P 1'", "'F m -3 m'").replace("_symmetry_equiv_pos_as_xyz", "_x")
            + row * 60,
            "up to 11,712 sites",
        ),
        "long.cif": (text + " " * 2**24, "more than 16,777,216 bytes"),
        "two.cif": (text + text.replace("data_", "data_other"), "2 structures"),
        "none.cif": ("data_x\n", "0 structures"),
        "deep.json": ("[" * DEEP, "Recursion"),
        "list.json": ("[1, 2]", "2 structures in one file"),
        "numbers.json": (json.dumps({"lattice": {"matrix": 1e999}, "sites": []}), "shape"),
    }
    for name, (content, words) in files.items():
        (tmp_path / name).write_text(content)
        with pytest.raises(InvalidInputError, match=rf"{name} (cannot be read: .*|holds ){words}"):
            read_structure(tmp_path / name)
    (tmp_path / "bomb.cif.gz").write_bytes(gzip.compress(bytes(2**30)))
    with pytest.raises(InvalidInputError, match=r"bomb\.cif\.gz.*16,777,216"):
        read_structure(tmp_path / "bomb.cif.gz")


def test_a_list_of_structures_has_a_limit_of_its_own(tmp_path, monkeypatch):
    path = tmp_path / "s.json"
    path.write_text(json.dumps([{}, [], 3]))
    monkeypatch.setattr(sources, "_LARGEST_FILE", 5)
    assert listed_structures(str(path), "s.json") == {"s.json:0": {}, "s.json:1": [], "s.json:2": 3}
    path.write_text("[" * DEEP)
    assert listed_structures(str(path), "s.json") == {}
    monkeypatch.setattr(inputs, "_LARGEST_LIST", 5)
    with pytest.raises(InvalidInputError, match=r"s\.json holds more than 5 bytes"):
        listed_structures(str(path), "s.json")


def test_a_cif_file_must_add_up(tmp_path):
    path = tmp_path / "s.cif"
    salt = Structure.from_spacegroup(
        "Fm-3m", Lattice.cubic(5.69), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]]
    )
    salt.to(filename=str(path), symprec=0.01)
    text = path.read_text()
    assert read_structure(path).composition == salt.composition
    for old, new, words in (
        ("_symmetry_equiv_pos_as_xyz", "_symmetry_equiv_pos_as_xyy", "2 sites instead of 4 times"),
        ("  Na  Na0", "  Nq  Nq0", "the sites are N4 Cl4, the file says Na4 Cl4"),
        ("'x, y, z'", "'x, y, x'", "operations distort"),
        ("'x, y, z'", "'-x, -y, z'", "lack the identity"),
        ("alpha   90.0", "alpha   990.0", "angles of the cell"),
        ("alpha   90.0", "alpha  9 90.0", "has the values"),
    ):
        assert old in text
        # a label that is no operation of a known group, so that the operations themselves count
        path.write_text(text.replace(old, new).replace("Fm-3m", "none").replace("   225", "   1"))
        with pytest.raises(InvalidInputError, match=rf"s\.cif cannot be read: .*{words}"):
            read_structure(path)


# ------------------------------------------------------------------ tables and records


def test_bombs_and_long_fields_in_tables(tmp_path, little_memory):
    (source := task_table(tmp_path).files[0]).write_bytes(gzip.compress(bytes(2**28)))
    with pytest.raises(InvalidInputError, match=r"matbench_steels\.csv\.gz holds more than"):
        tasks.load_task("steels", tmp_path)
    (tmp_path / "cli").mkdir()
    kind = csv_file(tmp_path / "cli")
    kind.files[0].write_text("formula,gap\n" + "N" * 10**8 + ",1\n")
    with pytest.raises(InvalidInputError, match="row 0") as caught:
        kind.load()
    assert len(str(caught.value)) < 500
    assert source.exists()


@pytest.mark.parametrize("name", [submission.RESULTS_FILE, submission.INFO_FILE])
def test_bombs_in_a_record(name, tmp_path, little_memory):
    path = tmp_path / name
    record(tmp_path)
    compress = gzip.compress if path.suffix == ".gz" else bytes
    for text in (b"[" * DEEP, b'{"tasks":' * DEEP, bytes(2**28), b"9" * 10**5, b"\xff"):
        path.write_bytes(compress(text))
        problems = check_records([tmp_path])
        assert any(f"{name} cannot be read" in p or f"{name} holds more" in p for p in problems)
        assert all(p.isprintable() and len(p) < 500 for p in problems), problems
        if path.suffix == ".gz":
            with pytest.raises(InvalidInputError, match=name):
                submission.read_benchmark(tmp_path)


def test_as_many_ids_as_a_record_claims_are_never_made(tmp_path, monkeypatch):
    kind = record(tmp_path)
    content = kind.load()
    content["user_metadata"]["tasks"]["wetlab_gap"]["n_samples"] = 10**6
    kind.files[0].write_bytes(rehash(content))
    made = []

    def noted(name, n_samples, original=tasks.fold_rule_ids):
        made.append(n_samples)
        return original(name, n_samples)

    monkeypatch.setattr(tasks, "fold_rule_ids", noted)
    assert "required indices are missing" in check_records([tmp_path])[0]
    assert made == []


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (["user_metadata", "tasks", "wetlab_gap", "n_samples"], 10**15),
        (["user_metadata", "tasks", "wetlab_gap", "n_samples"], "many"),
        (["user_metadata"], [1]),
        (["tasks", "wetlab_gap"], []),
        (["tasks", "wetlab_gap", "results"], [1]),
        (["tasks", "wetlab_gap", "results", "fold_0"], [1]),
        (["tasks", "wetlab_gap", "results", "fold_0", "data"], [1]),
        (["tasks", "wetlab_gap", "results", "fold_0", "scores"], 1),
        (["tasks", "wetlab_gap", "results", "fold_0", "uncertainty"], {"a\x1b[2J\n": 1}),
        (["benchmark_name"], ["wetlab_v0.1"]),
        (["tasks"], "none"),
    ],
    ids=str,
)
def test_a_record_of_another_shape_with_a_right_hash(place, value, tmp_path, little_memory):
    kind = record(tmp_path)
    content = kind.load()
    _changed(content, place, value)
    kind.files[0].write_bytes(rehash(content))
    problems = check_records([tmp_path])
    assert problems and all(p.isprintable() and len(p) < 500 for p in problems), problems
    with contextlib.suppress(InvalidInputError):  # Matbench reads some of it
        submission.read_benchmark(tmp_path)
