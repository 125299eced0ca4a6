"""Crystal structures -> a memory-mapped cache of structure graphs, built by parallel processes.

The cache is a folder of ``.npy`` files and a manifest with their SHA-256, named by the hash of the
source's content and of the settings. Parts of a few thousand structures are written one by one,
each complete or absent; a build that was killed goes on with the parts that are there.
"""

import hashlib
import json
import multiprocessing
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from monty.serialization import loadfn
from pymatgen.analysis import prototypes
from pymatgen.core import Structure
from tqdm import tqdm

from polysrl_dc.errors import InvalidInputError
from polysrl_dc.featurizers import StructureGraphFeaturizer, structure_graph
from polysrl_dc.graphs import StructureGraph
from polysrl_dc.quotient import quotient_graphs

VERSION = 1
PARQUET_COLUMNS = ("material_id", "cell", "numbers", "frac_coords")
_PART = 4096  # rows of a table
_SMALL_PART = 256  # structures of other sources
_MANIFEST = "manifest.json"


@dataclass(frozen=True)
class PackSettings:
    """What a cache depends on besides its source.

    Attributes
    ----------
    max_neighbors : int
    cutoff : float
        In Å.
    rounds : int
        Blocks of message passing for which equivalent sites are merged.
    resolution : float
        To which distances are rounded in the merged graphs, in Å.
    """

    max_neighbors: int = 12
    cutoff: float = 8.0
    rounds: int = 3
    resolution: float = 0.01

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not value > 0:
                raise ValueError(f"{name} is {value}: must be positive")


def pack(
    source: str | Path | Sequence[Structure],
    cache_dir: str | Path | None = None,
    settings: PackSettings | None = None,
    *,
    processes: int | None = None,
    progress: bool = True,
) -> Path:
    """Build the cache of a source, or find it built.

    Parameters
    ----------
    source : path, str or sequence of pymatgen Structure
        A Parquet file or a folder of them with the columns ``material_id``, ``cell`` (a, b, c in
        Å, three angles in degrees), ``numbers`` and ``frac_coords`` (flattened); a CIF file or a
        folder of them; ``"aflow"`` for the prototypes packaged with pymatgen; or structures.
    cache_dir : path, optional
        Default: ``POLYSRL_CACHE``, else ``~/.cache/polysrl_dc``.
    settings : PackSettings, optional
    processes : int, optional
        Default: the CPUs of this process.
    progress : bool

    Returns
    -------
    pathlib.Path
        Folder of the cache.

    Raises
    ------
    InvalidInputError
        The source holds no structure, or a file is damaged or lacks a column.

    Examples
    --------
    >>> import tempfile
    >>> from pymatgen.core import Lattice
    >>> iron = Structure(Lattice.cubic(2.87), ["Fe", "Fe"], [[0, 0, 0], [0.5, 0.5, 0.5]])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     sorted(path.stem for path in pack([iron], folder, progress=False).glob("node*.npy"))
    ['node_counts', 'node_edges', 'node_multiplicity']
    """
    settings = settings or PackSettings()
    content, jobs = _opened(source)
    key = hashlib.sha256(
        json.dumps([VERSION, content, asdict(settings)], sort_keys=True).encode()
    ).hexdigest()[:24]
    folder = _cache_root(cache_dir) / key
    if (folder / _MANIFEST).exists():
        return folder
    if folder.exists():
        raise InvalidInputError(f"{folder} has no {_MANIFEST}; remove it")
    try:
        described = {"content": content, "settings": asdict(settings)}
        _build(jobs(), folder, settings, described, processes, progress)
    except (OSError, InvalidInputError):
        if not (folder / _MANIFEST).exists():
            raise  # else another process was first and has removed the parts
    return folder


def _build(
    jobs: list["_Job"],
    folder: Path,
    settings: PackSettings,
    described: dict[str, Any],
    processes: int | None,
    progress: bool,
) -> None:
    if not jobs:
        raise InvalidInputError("the source holds no structure")
    parts = folder.with_name(f"{folder.name}.parts")
    parts.mkdir(parents=True, exist_ok=True)
    todo = [(job, parts / f"{i:06d}", settings) for i, job in enumerate(jobs)]
    missing = [arguments for arguments in todo if not _is_complete(arguments[1])]
    total = sum(len(job) for job in jobs)
    bar = tqdm(total=total, desc="structures", unit="structure", disable=not progress)
    with bar:
        bar.update(total - sum(len(job) for job, _, _ in missing))
        for job, _ in zip(missing, _map(_write_part, missing, processes), strict=True):
            bar.update(len(job[0]))
    _join([path for _, path, _ in todo], folder, described)
    shutil.rmtree(parts, ignore_errors=True)


def read_cache(folder: str | Path, verify: bool = True) -> tuple[dict[str, np.ndarray], dict]:
    """Memory-map a cache.

    Parameters
    ----------
    folder : path
        As :func:`pack` returns it.
    verify : bool
        Compare every file with its SHA-256 (about 1 s per GB); sizes are always compared.

    Returns
    -------
    arrays : dict of str to numpy.memmap
    manifest : dict

    Raises
    ------
    InvalidInputError
        A file is missing, truncated or altered; the message names it.
    """
    return _read(Path(folder), _array_names() | {"groups"}, verify)


def _read(
    folder: Path, names: set[str], verify: bool
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    try:
        manifest = json.loads((folder / _MANIFEST).read_text())
        if manifest["version"] != VERSION or manifest["files"].keys() != names:
            raise ValueError(f"{_MANIFEST} is not that of version {VERSION}")
        entries = {
            name: (entry["size"], entry["sha256"]) for name, entry in manifest["files"].items()
        }
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise InvalidInputError(f"{folder} is no complete cache of structures: {error}") from error
    arrays = {}
    for name, (size, digest) in entries.items():
        path = folder / f"{name}.npy"
        if not path.exists() or path.stat().st_size != size:
            raise InvalidInputError(f"{path} is missing or truncated; remove {folder}")
        if verify and _sha256(path) != digest:
            raise InvalidInputError(f"{path} is damaged: not its sha256; remove {folder}")
        try:
            arrays[name] = np.load(path, mmap_mode="r", allow_pickle=False)
        except ValueError as error:
            raise InvalidInputError(f"{path} is no array of numbers: {error}") from error
    return arrays, manifest


# -------------------------------------------------------------------- sources


@dataclass(frozen=True)
class _ParquetRows:
    path: str
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def graphs(self, settings: PackSettings) -> Iterator[tuple[str, Callable[[], StructureGraph]]]:
        table = _read_rows(self.path, self.start, self.stop)
        columns = [_row_arrays(table[name]) for name in PARQUET_COLUMNS[1:]]
        names = table["material_id"].to_pylist()
        for name, cell, numbers, coords in zip(names, *columns, strict=True):
            yield str(name), partial(_graph_of_row, cell, numbers, coords, settings)


@dataclass(frozen=True)
class _CifFiles:
    root: Path
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)

    def graphs(self, settings: PackSettings) -> Iterator[tuple[str, Callable[[], StructureGraph]]]:
        featurizer = StructureGraphFeaturizer(settings.max_neighbors, settings.cutoff)
        for name in self.names:
            yield name, partial(_featurize_file, featurizer, self.root / name)


@dataclass(frozen=True)
class _Structures:
    structures: tuple[Any, ...]
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.structures)

    def graphs(self, settings: PackSettings) -> Iterator[tuple[str, Callable[[], StructureGraph]]]:
        featurizer = StructureGraphFeaturizer(settings.max_neighbors, settings.cutoff)
        for name, structure in zip(self.names, self.structures, strict=True):
            yield name, partial(_featurize, featurizer, structure)


def _featurize(featurizer: StructureGraphFeaturizer, structure: Any) -> StructureGraph:
    return featurizer.featurize(structure)[0]


def _featurize_file(featurizer: StructureGraphFeaturizer, path: Path) -> StructureGraph:
    try:
        structure = Structure.from_file(path)
    except Exception as error:  # a parser of text files fails in any way
        raise InvalidInputError(f"cannot be read: {error!r}") from error
    return _featurize(featurizer, structure)


def _graph_of_row(
    cell: np.ndarray, numbers: np.ndarray, coords: np.ndarray, settings: PackSettings
) -> StructureGraph:
    if cell.size != 6:
        raise InvalidInputError(f"cell has {cell.size} parameters, not 6")
    if coords.size != 3 * numbers.size:
        raise InvalidInputError(f"{coords.size} fractional coordinates for {numbers.size} sites")
    if not np.isin(numbers, np.arange(256)).all():
        raise InvalidInputError(f"atomic numbers are {numbers.tolist()!s:.80}")
    return structure_graph(
        numbers.astype(np.int64),
        _cell_matrix(cell.astype(np.float64)),
        coords.astype(np.float64).reshape(-1, 3),
        settings.max_neighbors,
        settings.cutoff,
    )


_Job = _ParquetRows | _CifFiles | _Structures


def _opened(source: Any) -> tuple[list[Any], Callable[[], list[_Job]]]:
    """What identifies the content of a source, and a function that cuts it into parts."""
    if not isinstance(source, str | Path):
        structures = list(source)
        digest = hashlib.sha256()
        for structure in structures:
            described = structure.as_dict() if isinstance(structure, Structure) else str(structure)
            digest.update(json.dumps(described, sort_keys=True, default=str).encode())
        names = [str(i) for i in range(len(structures))]
        return [digest.hexdigest()], partial(_structure_jobs, structures, names)
    if str(source) == "aflow":
        # The AFLOW Library of Crystallographic Prototypes (Mehl et al. 2017) packaged in pymatgen
        path = Path(prototypes.__file__).with_name("aflow_prototypes.json.gz")
        return [_sha256(path)], partial(_aflow_jobs, path)
    path = Path(source)
    if path.is_dir():
        tables, cifs = sorted(path.rglob("*.parquet")), sorted(path.rglob("*.cif"))
        if bool(tables) == bool(cifs):
            raise InvalidInputError(f"{path} must hold either .parquet or .cif files")
    elif path.exists():
        tables, cifs = ([path], []) if path.suffix == ".parquet" else ([], [path])
    else:
        raise InvalidInputError(f"there is no {path}")
    if tables:
        return [_sha256(file) for file in tables], partial(_parquet_jobs, tables)
    root = path if path.is_dir() else path.parent
    names = [cif.relative_to(root).as_posix() for cif in cifs]
    return [*map(_sha256, cifs), names], partial(_cif_jobs, root, names)


def _structure_jobs(structures: list[Any], names: list[str]) -> list[_Job]:
    starts = range(0, len(structures), _SMALL_PART)
    return [
        _Structures(tuple(structures[i : i + _SMALL_PART]), tuple(names[i : i + _SMALL_PART]))
        for i in starts
    ]


def _aflow_jobs(path: Path) -> list[_Job]:
    entries = loadfn(path)
    names = [entry["tags"]["aflow"] for entry in entries]
    return _structure_jobs([entry["snl"].structure for entry in entries], names)


def _cif_jobs(root: Path, names: list[str]) -> list[_Job]:
    starts = range(0, len(names), _SMALL_PART)
    return [_CifFiles(root, tuple(names[i : i + _SMALL_PART])) for i in starts]


def _parquet_jobs(paths: list[Path]) -> list[_Job]:
    return [job for path in paths for job in _jobs_of_table(path)]


def _jobs_of_table(path: Path) -> list[_Job]:
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise InvalidInputError(f"{path} is not a complete Parquet file: {error}") from error
    with file:
        missing = set(PARQUET_COLUMNS) - set(file.schema_arrow.names)
        if missing:
            raise InvalidInputError(f"{path} lacks the columns {sorted(missing)}")
        for name in PARQUET_COLUMNS[1:]:
            kind = file.schema_arrow.field(name).type
            if not (_is_list(kind) and _is_number(kind.value_type)):
                raise InvalidInputError(f"{path}: {name} is {kind}, not a list of numbers")
        rows = file.metadata.num_rows
    return [
        _ParquetRows(str(path), start, min(start + _PART, rows)) for start in range(0, rows, _PART)
    ]


def _is_list(kind: pa.DataType) -> bool:
    types = pa.types
    return types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind)


def _read_rows(path: str, start: int, stop: int) -> pa.Table:
    """Rows of a Parquet file; only the row groups that hold them are read."""
    try:
        with pq.ParquetFile(path) as file:
            metadata = file.metadata
            ends = np.cumsum([metadata.row_group(i).num_rows for i in range(file.num_row_groups)])
            first, last = np.searchsorted(ends, [start, stop - 1], side="right")
            groups = list(range(first, last + 1))
            table = file.read_row_groups(groups, columns=list(PARQUET_COLUMNS))
    except (pa.ArrowException, OSError) as error:
        raise InvalidInputError(f"{path} is damaged: {error}") from error
    skipped = int(ends[first - 1]) if first else 0
    return table.slice(start - skipped, stop - start)


def _row_arrays(column: pa.ChunkedArray) -> list[np.ndarray]:
    """The list of each row; empty where it is null."""
    lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy()
    return np.split(pc.list_flatten(column).to_numpy(), np.cumsum(lengths)[:-1])


@np.errstate(all="ignore")  # a cell without volume is refused by its name later
def _cell_matrix(parameters: np.ndarray) -> np.ndarray:
    """Unit vectors as rows, (3, 3) in Å, from (6,): a along x, b in the xy plane."""
    a, b, c = parameters[:3]
    cos_alpha, cos_beta, cos_gamma = np.cos(np.radians(parameters[3:]))
    sin_gamma = np.sqrt(1 - cos_gamma**2)
    c_y = (cos_alpha - cos_beta * cos_gamma) / sin_gamma
    c_z = np.sqrt(np.maximum(1 - cos_beta**2 - c_y**2, 0.0))
    return np.array(
        [[a, 0, 0], [b * cos_gamma, b * sin_gamma, 0], [c * cos_beta, c * c_y, c * c_z]]
    )


# ---------------------------------------------------------------------- parts


def _write_part(arguments: tuple[_Job, Path, PackSettings]) -> None:
    """Featurize one part and write it; the folder appears when all its files are complete."""
    job, path, settings = arguments
    with _appearing(path) as temporary:
        files = {}
        for name, array in _part_arrays(job, settings).items():
            np.save(temporary / f"{name}.npy", array, allow_pickle=False)
            files[name] = _entry(temporary / f"{name}.npy")
        _write_manifest(temporary, files)


def _is_complete(part: Path) -> bool:
    """Whether a part of an earlier build is what that build wrote; a damaged one is removed."""
    try:
        _read(part, _array_names(), verify=True)
    except InvalidInputError:
        shutil.rmtree(part, ignore_errors=True)
        return False
    return True


@contextmanager
def _appearing(folder: Path) -> Iterator[Path]:
    """A folder to fill that takes its name at the end, unless another process was first."""
    temporary = folder.with_name(f".{folder.name}.{uuid4().hex}")
    temporary.mkdir()
    try:
        yield temporary
        try:
            os.replace(temporary, folder)
        except OSError:
            if not (folder / _MANIFEST).exists():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _part_arrays(job: _Job, settings: PackSettings) -> dict[str, np.ndarray]:
    graphs, ids, bad_ids, bad_messages = [], [], [], []
    for name, read in job.graphs(settings):
        try:
            graphs.append(read())
        except (ValueError, TypeError) as error:
            bad_ids.append(name)
            bad_messages.append(str(error))
        else:
            ids.append(name)
    skipped = {"skipped_ids": _text(bad_ids), "skipped_messages": _text(bad_messages)}
    return graph_arrays(graphs, ids, settings) | skipped


def graph_arrays(
    graphs: Sequence[StructureGraph], ids: Sequence[Any], settings: PackSettings
) -> dict[str, np.ndarray]:
    """Structure graphs and their merged graphs as flat arrays, the content of a cache.

    Counts stand beside the arrays they cut: ``site_counts`` cuts ``numbers`` and ``degrees``,
    ``degrees`` cuts ``neighbors`` and ``distances``, ``node_counts`` cuts ``node_*``,
    ``node_edges`` cuts ``edge_*``, ``element_counts`` cuts ``elements`` and ``fractions``.
    """
    site_counts = np.array([len(graph.numbers) for graph in graphs], np.int32)
    degrees = _concatenate([np.diff(graph.indptr) for graph in graphs], np.int32)
    neighbors = _concatenate([graph.neighbors for graph in graphs], np.int32)
    distances = _concatenate([graph.distances for graph in graphs], np.float32)
    formulas = [graph.stoichiometry for graph in graphs]
    quotient = quotient_graphs(
        site_counts.astype(np.int64),
        degrees,
        neighbors,
        distances.astype(np.float64),
        rounds=settings.rounds,
        resolution=settings.resolution,
    )
    first_edge = np.concatenate([[0], np.cumsum(quotient.edge_counts)])
    first_node = np.concatenate([[0], np.cumsum(quotient.node_counts)])
    return {
        "ids": _text([str(name) for name in ids]),
        "formulas": _text([formula.formula for formula in formulas]),
        "element_counts": np.array([len(formula.numbers) for formula in formulas], np.uint8),
        "elements": _concatenate([formula.numbers for formula in formulas], np.uint8),
        "fractions": _concatenate([formula.fractions for formula in formulas], np.float64),
        "site_counts": site_counts,
        "numbers": _concatenate([graph.numbers for graph in graphs], np.uint8),
        "degrees": degrees,
        "neighbors": neighbors,
        "distances": distances,
        "node_counts": quotient.node_counts.astype(np.int32),
        "edge_totals": np.diff(first_edge[first_node]).astype(np.int32),
        "node_multiplicity": quotient.multiplicity,
        "node_edges": quotient.edge_counts,
        "edge_neighbors": quotient.neighbors,
        "edge_steps": quotient.steps,
        "edge_multiplicity": quotient.edge_multiplicity,
    }


def _array_names() -> set[str]:
    return {*graph_arrays([], [], PackSettings()), "skipped_ids", "skipped_messages"}


def _concatenate(arrays: list[np.ndarray], dtype: Any) -> np.ndarray:
    return np.concatenate([np.empty(0, dtype), *arrays]).astype(dtype)


def _text(values: list[str]) -> np.ndarray:
    return np.array([value.encode() for value in values], dtype=np.bytes_)


def _map(function: Callable, arguments: list[Any], processes: int | None) -> Iterator[Any]:
    processes = min(processes or len(os.sched_getaffinity(0)), len(arguments))
    if processes <= 1:
        yield from map(function, arguments)
        return
    with ProcessPoolExecutor(processes, initializer=_end_with_parent) as pool:
        yield from pool.map(function, arguments)


def _end_with_parent() -> None:
    """Let a worker end when the process that started it is killed, instead of waiting forever."""
    parent = multiprocessing.parent_process()

    def wait() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


# ----------------------------------------------------------------------- join


def _join(parts: list[Path], folder: Path, described: dict[str, Any]) -> None:
    """Concatenate the parts file by file."""
    with _appearing(folder) as temporary:
        files = {}
        for name in sorted(_array_names()):
            target = temporary / f"{name}.npy"
            sources = [part / f"{name}.npy" for part in parts]
            arrays = [np.load(source, mmap_mode="r", allow_pickle=False) for source in sources]
            joined = np.lib.format.open_memmap(
                target,
                mode="w+",
                dtype=np.result_type(*arrays),
                shape=(sum(len(array) for array in arrays),),
            )
            start = 0
            for array in arrays:
                joined[start : start + len(array)] = array
                start += len(array)
            joined.flush()
            del joined
            files[name] = _entry(target)
        formulas = np.load(temporary / "formulas.npy", mmap_mode="r", allow_pickle=False)
        groups = np.unique(formulas, return_inverse=True)[1].astype(np.int64)
        np.save(temporary / "groups.npy", groups, allow_pickle=False)
        files["groups"] = _entry(temporary / "groups.npy")
        _write_manifest(temporary, files, **described)


def _write_manifest(folder: Path, files: dict[str, Any], **described: Any) -> None:
    text = json.dumps({"version": VERSION, "files": files, **described}, indent=1, sort_keys=True)
    (folder / _MANIFEST).write_text(text)


def _entry(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": _sha256(path)}


def _cache_root(cache_dir: str | Path | None) -> Path:
    chosen = cache_dir or os.environ.get("POLYSRL_CACHE") or Path.home() / ".cache" / "polysrl_dc"
    return Path(chosen)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
