"""Small files of every kind that the project reads, and ways to damage them."""

import contextlib
import csv
import gzip
import io
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import submission
import tasks
from check_submission import check_record
from files import read_json
from folds import FoldStore
from matbench.util import hash_dictionary
from models import FORMULAS, data, fitted, make, state
from pymatgen.core import Lattice, Structure

import polysrl_dc
from polysrl_dc import cli
from polysrl_dc.errors import InvalidInputError
from polysrl_dc.sources import PackSettings, open_source, read_structure

BINARIES = {"NaCl": 5.69, "MgO": 4.21, "CsF": 6.01, "TiN": 4.24}
STRUCTURES = [
    Structure(
        Lattice.from_parameters(length, length + 0.1, length + 0.3, 90, 88, 95),
        [name[:2], name[2:]],
        [[0.02, 0.1, 0.2], [0.47, 0.55, 0.63]],
    )
    for name, length in BINARIES.items()
]


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Attributes
    ----------
    files : list of Path
        Those that are damaged, one at a time.
    load : callable
        Reads the file as a user would and returns what was read, or raises InvalidInputError.
    says : callable, optional
        What another reader finds in the bytes of a file that holds no checksum.
    pack, unpack : callable
        What stands between the bytes that are damaged and those of the file.
    """

    files: list[Path]
    load: Callable[[], Any]
    says: Callable[[bytes], Any] | None = None
    pack: Callable[[bytes], bytes] = bytes
    unpack: Callable[[bytes], bytes] = bytes


def damaged(content: bytes, rng: np.random.Generator) -> bytes:
    """A file that was cut, flipped, overwritten, shifted, or is of another kind."""
    start, length = int(rng.integers(len(content))), int(rng.integers(1, 40))
    end = start + length
    flipped = bytearray(content)
    flipped[start] ^= 1 << int(rng.integers(8))
    changes = [
        bytes(flipped),
        content[:start],
        content[:start] + rng.bytes(length) + content[end:],
        content[:start] + bytes(length) + content[end:],
        content[:start] + content[end:],
        content[:end] + content[start:],
        content[:start] + b"9" * length + content[start:],
        content + rng.bytes(length),
        content[::-1] if start % 2 else rng.bytes(start + 1),
    ]
    return changes[min(int(rng.exponential(3)), len(changes) - 1)]


def outcome(kind: Kind, file: Path, truth: Any, content: bytes) -> str:
    """What becomes of one damaged file."""
    file.write_bytes(content)
    try:
        found = kind.load()
    except InvalidInputError as error:
        text = str(error)
        named = file.name in text or file.parent.name in text or "row " in text
        return "refused" if named and "\n" not in text else f"refused without its name: {text}"
    if same(found, truth):
        return "equal to the original"
    with contextlib.suppress(ValueError, LookupError):  # the other reader may refuse it
        if kind.says is not None and same(found, kind.says(kind.unpack(content))):
            return "read as they are written"
    return "loaded wrongly"


def same(one: Any, other: Any) -> bool:
    """Whether two values are equal, arrays and numbers up to rounding in text."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, float):
        return one == other or math.isclose(one, other, abs_tol=2e-4)
    return one == other


def raw(arrays: dict[str, Any]) -> dict[str, Any]:
    """Arrays or tensors as types, shapes and bytes."""
    arrays = {name: np.asarray(array) for name, array in arrays.items()}
    return {name: (a.dtype.str, a.shape, a.tobytes()) for name, a in arrays.items()}


# ----------------------------------------------------------------- files with a checksum


def model_file(folder: Path) -> Kind:
    fitted().save(folder)

    def load() -> Any:
        model = polysrl_dc.PolySRLModel.from_pretrained(folder)
        return [raw(state(model)), model.config.to_dict(), model.settings, model.training]

    return Kind([folder / "model.safetensors"], load)


def checkpoint_file(folder: Path) -> Kind:
    model = make(model_dir=str(folder))
    model.fit(data(), nb_epoch=1)

    def all_of(model: Any) -> Any:
        entries = model._pytorch_optimizer.state_dict()["state"]
        optimizer = {f"{i} {name}": v for i, e in entries.items() for name, v in e.items()}
        return [raw(state(model)), raw(optimizer), model.get_global_step(), model._epoch]

    def load() -> Any:
        other = make(model_dir=str(folder), seed=1)
        other._ensure_built()
        before = all_of(other)
        try:
            other.restore()
        except InvalidInputError:
            assert all_of(other) == before
            raise
        return all_of(other)

    return Kind([folder / "checkpoint1.safetensors"], load)


def cache(folder: Path) -> Kind:
    def load() -> Any:
        dataset = polysrl_dc.PolymorphDataset(
            STRUCTURES, cache_dir=folder, processes=1, progress=False
        )
        return [raw(dataset._arrays), dataset._settings]

    load()
    return Kind(sorted(next(folder.iterdir()).iterdir()), load)


def table(structures: list[Structure]) -> pa.Table:
    """Structures in the columns of a Parquet source."""
    return pa.table(
        {
            "material_id": [f"mp-{row}" for row in range(len(structures))],
            "cell": [[*s.lattice.abc, *s.lattice.angles] for s in structures],
            "numbers": [[site.specie.Z for site in s] for s in structures],
            "frac_coords": [s.frac_coords.ravel().tolist() for s in structures],
        }
    )


def parquet(folder: Path) -> Kind:
    path = folder / "structures.parquet"
    pq.write_table(table(STRUCTURES), path, write_page_checksum=True)

    def load() -> Any:
        graphs = []
        for part in open_source(path)[1]():
            for name, read in part.graphs(PackSettings()):
                try:
                    graph = read()
                except InvalidInputError as error:
                    raise InvalidInputError(f"row {name}: {error}") from error
                graphs.append([name, raw({"z": graph.numbers, "d": graph.distances})])
        return graphs

    return Kind([path], load)


def task_table(folder: Path) -> Kind:
    task = tasks.MatbenchTask("matbench_steels", autoload=False)
    ids = sorted([*task.validation.fold_0.train, *task.validation.fold_0.test])
    values = task.metadata.mad * np.where(np.arange(len(ids)) % 2, 1.0, -1.0)
    path = folder / "matbench" / "matbench_steels.csv.gz"
    path.parent.mkdir(parents=True)
    columns = {"mbid": ids, "composition": "Fe3C", task.metadata.target: values}
    path.write_bytes(gzip.compress(pd.DataFrame(columns).to_csv(index=False).encode()))
    return Kind([path], lambda: tasks.load_task("steels", folder).df.reset_index().to_dict("list"))


def record(folder: Path) -> Kind:
    """A submission; its results are a JSON object with its own hash, in gzip."""
    values = np.linspace(0.1, 5.0, 25)
    described = tasks.fold_rule_metadata("gap", "eV", values)
    frame = pd.DataFrame({"composition": ["NaCl"] * 25, "gap": values})
    task = tasks.FoldRuleTask("wetlab_gap", tasks.WETLAB_KEY, described, frame)
    for fold in task.folds:
        submission.record_fold(task, fold, np.ones(5), np.full(5, 0.5), {"lr": 0.1})
    submission.write_record(folder, [task], {}, "finetune")

    def load() -> Any:
        problems = check_record(folder)
        if problems:
            raise InvalidInputError(f"{folder.name}: {problems[0]}")
        assert submission.read_benchmark(folder).is_valid
        return read_json(folder / submission.RESULTS_FILE)

    return Kind([folder / submission.RESULTS_FILE], load)


def fold(folder: Path) -> Kind:
    """A finished fold; a damaged one counts as missing and is trained again."""
    store = FoldStore(folder, "gap", {"epochs": 1})
    ids = [f"wl-gap-{row:04d}" for row in range(5)]
    store.save(0, ids, [0.1, 0.25, 3.0, 4.5, 1e-3], None, {"lr": 0.1})

    def load() -> Any:
        found = store.load(0, ids)
        if found is None:
            raise InvalidInputError(f"{store.path(0).name}: no finished fold")
        return found

    return Kind([store.path(0)], load)


def repacked_record(folder: Path) -> Kind:
    """The same, damaged within the gzip."""
    kind = record(folder)
    return Kind(kind.files, kind.load, None, gzip.compress, gzip.decompress)


def rehash(content: dict[str, Any]) -> bytes:
    """A changed record with a hash that fits."""
    rest = {key: value for key, value in content.items() if key != "hash"}
    return gzip.compress(json.dumps({**rest, "hash": hash_dictionary(rest)}).encode())


# -------------------------------------------------------------- files that people write


def info_file(folder: Path) -> Kind:
    kind = record(folder)
    path = folder / submission.INFO_FILE

    def load() -> Any:
        kind.load()
        return read_json(path)

    return Kind([path], load, json.loads)


def csv_file(folder: Path) -> Kind:
    fitted().save(folder)
    path = folder / "gaps.csv"
    rows = [f"{formula},{0.1 * i:.1f}\n" for i, formula in enumerate(FORMULAS[:9])]
    path.write_text("formula,gap\n" + "".join(rows))

    def load() -> Any:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = cli.main(["predict", "--model", str(folder), "--input", str(path)])
        if status:
            raise InvalidInputError(err.getvalue().strip())
        return [row["formula"] for row in csv.DictReader(io.StringIO(out.getvalue()))]

    def says(content: bytes) -> Any:
        rows = csv.DictReader(io.StringIO(content.decode(errors="replace"), newline=""))
        return [row["formula"] for row in rows]

    return Kind([path], load, says)


def described(structure: Structure) -> Any:
    """What a structure is, its sites in the order of their coordinates."""
    sites = [[*(site.frac_coords % 1).tolist(), site.species_string] for site in structure]
    return [[*structure.lattice.abc, *structure.lattice.angles], sorted(sites)]


def json_file(folder: Path) -> Kind:
    path = folder / "structure.json"
    path.write_text(json.dumps(STRUCTURES[0].as_dict()))

    def says(content: bytes) -> Any:
        given = json.loads(content)
        lattice = Lattice(given["lattice"]["matrix"])
        sites = [
            [*(x % 1 for x in map(float, site["abc"])), site["species"][0]["element"]]
            for site in given["sites"]
        ]
        return [[*lattice.abc, *lattice.angles], sorted(sites)]

    return Kind([path], lambda: described(read_structure(path)), says)


def cif_file(folder: Path) -> Kind:
    path = folder / "structure.cif"
    STRUCTURES[0].to(filename=str(path))

    def says(content: bytes) -> Any:
        lines = [line.split() for line in content.decode(errors="replace").splitlines()]
        values = {words[0]: words[1] for words in lines if len(words) == 2}
        names = [words[0] for words in lines if len(words) == 1 and "_atom_site_" in words[0]]
        rows = [dict(zip(names, words, strict=True)) for words in lines if len(words) == len(names)]
        cell = [float(values[f"_cell_length_{axis}"]) for axis in "abc"]
        cell += [float(values[f"_cell_angle_{angle}"]) for angle in ("alpha", "beta", "gamma")]
        keys = [f"_atom_site_fract_{axis}" for axis in "xyz"]
        sites = [
            [*(float(row[key]) % 1 for key in keys), row["_atom_site_type_symbol"]] for row in rows
        ]
        return [cell, sorted(sites)]

    return Kind([path], lambda: described(read_structure(path)), says)


KINDS: dict[str, Callable[[Path], Kind]] = {
    "model": model_file,
    "checkpoint": checkpoint_file,
    "cache": cache,
    "structures.parquet": parquet,
    "table of a task": task_table,
    "fold": fold,
    "results.json.gz": record,
    "results.json.gz, repacked": repacked_record,
    "info.json": info_file,
    "CSV": csv_file,
    "JSON": json_file,
    "CIF": cif_file,
}
