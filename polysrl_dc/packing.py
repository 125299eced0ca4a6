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
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
from pymatgen.core import Structure
from tqdm import tqdm

from polysrl_dc.errors import InvalidInputError
from polysrl_dc.graphs import StructureGraph
from polysrl_dc.quotient import quotient_graphs
from polysrl_dc.sources import PackSettings, Part, file_digest, open_source

VERSION = 3
_MANIFEST = "manifest.json"
_LARGEST_MANIFEST = 2**28  # bytes; it names every file of a folder of CIF files
_PIECES = {
    "element_counts": ("elements", "fractions"),
    "site_counts": ("numbers", "degrees"),
    "pair_counts": ("neighbors", "distances"),
    "node_counts": ("node_multiplicity", "node_edges"),
    "edge_counts": ("edge_neighbors", "edge_steps", "edge_multiplicity"),
}


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
        folder of them; ``"aflow"`` for the prototypes packaged with pymatgen; or structures. An id
        names its structure in messages and results; several structures may have the same.
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
    content, jobs = open_source(source)
    described = {"content": content, "settings": asdict(settings)}
    folder = _cache_root(cache_dir) / _key(**described)
    if (folder / _MANIFEST).exists():
        shutil.rmtree(_parts_of(folder), ignore_errors=True)  # of a build killed at its very end
        return folder
    if folder.exists():
        raise InvalidInputError(f"{folder} has no {_MANIFEST}; remove it")
    try:
        _build(jobs(), folder, settings, described, processes, progress)
    except (OSError, InvalidInputError):
        if not (folder / _MANIFEST).exists():
            raise  # else another process was first and has removed the parts
        shutil.rmtree(_parts_of(folder), ignore_errors=True)  # those that this one made since
    return folder


def _key(content: Any, settings: Any) -> str:
    """Name of the folder of a cache; the content and settings in its manifest must give it."""
    text = json.dumps([VERSION, content, settings], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _build(
    jobs: list["Part"],
    folder: Path,
    settings: PackSettings,
    described: dict[str, Any],
    processes: int | None,
    progress: bool,
) -> None:
    if not jobs:
        raise InvalidInputError("the source holds no structure")
    parts = _parts_of(folder)
    parts.mkdir(parents=True, exist_ok=True)
    todo = [(job, parts / f"{i:06d}", settings) for i, job in enumerate(jobs)]
    missing = [arguments for arguments in todo if not _is_complete(arguments[1])]
    total = sum(len(job) for job in jobs)
    bar = tqdm(total=total, desc="structures", unit="structure", disable=not progress)
    with bar:
        bar.update(total - sum(len(job) for job, _, _ in missing))
        for job, _ in zip(missing, _map(_write_part, missing, processes), strict=True):
            bar.update(len(job[0]))
    _join([path for _, path, _ in todo], parts, folder, described)
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
    folder = Path(folder)
    arrays, manifest = _read(folder, _array_names() | {"groups"}, verify)
    try:
        named = _key(manifest["content"], manifest["settings"])
    except KeyError as error:
        raise InvalidInputError(f"{folder}: {_MANIFEST} lacks {error}") from error
    if named != folder.name:
        raise InvalidInputError(f"{folder}: {_MANIFEST} is that of another cache; remove {folder}")
    _check_lengths(folder, arrays)
    return arrays, manifest


def _check_lengths(folder: Path, arrays: dict[str, np.ndarray]) -> None:
    """Refuse arrays that their counts do not cut into pieces."""
    expected = {name: len(arrays["ids"]) for name in ("ids", "formulas", "groups", *_PIECES)}
    for counts, names in _PIECES.items():
        if (arrays[counts] < 0).any():
            raise InvalidInputError(f"{folder / counts}.npy has a negative count")
        expected |= dict.fromkeys(names, int(arrays[counts].sum(dtype=np.int64)))
    expected |= dict.fromkeys(("skipped_ids", "skipped_messages"), len(arrays["skipped_ids"]))
    for name, length in expected.items():
        if len(arrays[name]) != length:
            raise InvalidInputError(
                f"{folder / name}.npy has {len(arrays[name])} entries instead of {length}"
            )


def _read(
    folder: Path, names: set[str], verify: bool
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    try:
        if (folder / _MANIFEST).stat().st_size > _LARGEST_MANIFEST:
            raise ValueError(f"{_MANIFEST} is larger than {_LARGEST_MANIFEST:,} bytes")
        manifest = json.loads((folder / _MANIFEST).read_text())
        if manifest["version"] != VERSION or manifest["files"].keys() != names:
            raise ValueError(f"{_MANIFEST} is not that of version {VERSION}")
        entries = {
            name: (entry["size"], entry["sha256"]) for name, entry in manifest["files"].items()
        }
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise InvalidInputError(f"{folder} is no complete cache of structures: {error}") from error
    arrays: dict[str, np.ndarray] = {}
    for name, (size, digest) in entries.items():
        path = folder / f"{name}.npy"
        if not path.exists() or path.stat().st_size != size:
            raise InvalidInputError(f"{path} is missing or truncated; remove {folder}")
        if verify and file_digest(path) != digest:
            raise InvalidInputError(f"{path} is damaged: not its sha256; remove {folder}")
        try:
            arrays[name] = np.lib.format.open_memmap(path, mode="r")
            if arrays[name].ndim != 1 or arrays[name].dtype.kind not in "iufS":
                raise ValueError(f"{arrays[name].dtype} of shape {arrays[name].shape}")
        except Exception as error:  # the header of the file is a text in Python's syntax
            raise InvalidInputError(f"{path} is no array of numbers: {error!r}") from error
    return arrays, manifest


# ---------------------------------------------------------------------- parts


def _write_part(arguments: tuple[Part, Path, PackSettings]) -> None:
    """Featurize one part and write it; the folder appears when all its files are complete."""
    job, path, settings = arguments
    with _appearing(path, path.parent) as temporary:
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
def _appearing(folder: Path, within: Path) -> Iterator[Path]:
    """A folder to fill that takes its name at the end, unless another process was first."""
    temporary = within / f".{folder.name}.{uuid4().hex}"
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


def _part_arrays(job: Part, settings: PackSettings) -> dict[str, np.ndarray]:
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

    Counts per structure say how long its piece of the other arrays is: ``element_counts`` of
    ``elements`` and ``fractions``, ``site_counts`` of ``numbers`` and ``degrees``, ``pair_counts``
    of ``neighbors`` and ``distances``, ``node_counts`` and ``edge_counts`` of ``node_*`` and
    ``edge_*``, the merged graph. ``degrees`` and ``node_edges`` cut the edges by site and by node.
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
        "pair_counts": np.array([len(graph.neighbors) for graph in graphs], np.int32),
        "degrees": degrees,
        "neighbors": neighbors,
        "distances": distances,
        "node_counts": quotient.node_counts.astype(np.int32),
        "edge_counts": np.diff(first_edge[first_node]).astype(np.int32),
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
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    processes = min(processes or cores or 1, len(arguments))
    if processes <= 1:
        yield from map(function, arguments)
        return
    try:
        with ProcessPoolExecutor(processes, initializer=_end_with_parent) as pool:
            yield from pool.map(function, arguments)
    except BrokenProcessPool as error:
        raise RuntimeError(
            "a process that packs structures has died: for want of memory, or because it started "
            'the script anew, which lacks `if __name__ == "__main__":`; with processes=1 there is '
            "no other process"
        ) from error


def _end_with_parent() -> None:
    """Let a worker end when the process that started it is killed, instead of waiting forever."""
    parent = multiprocessing.parent_process()

    def wait() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


# ----------------------------------------------------------------------- join


def _join(parts: list[Path], within: Path, folder: Path, described: dict[str, Any]) -> None:
    """Concatenate the parts file by file, within the folder of the build that is removed later."""
    with _appearing(folder, within) as temporary:
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
            np.concatenate(arrays, out=joined)
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
    return {"size": path.stat().st_size, "sha256": file_digest(path)}


def _parts_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.parts")


def _cache_root(cache_dir: str | Path | None) -> Path:
    chosen = cache_dir or os.environ.get("POLYSRL_CACHE") or Path.home() / ".cache" / "polysrl_dc"
    return Path(chosen).expanduser()
