"""Sources of crystal structures, cut into parts that processes turn into graphs on their own."""

import hashlib
import json
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from lzma import LZMAError
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from monty.io import zopen
from monty.serialization import loadfn
from pymatgen.core import Composition, IStructure, Structure
from pymatgen.io.cif import CifFile, CifParser, str2float

from polysrl_dc.crystal import check_cell
from polysrl_dc.errors import InvalidInputError
from polysrl_dc.featurizers import StructureGraphFeaturizer, structure_graph, structure_of_dict
from polysrl_dc.graphs import StructureGraph

PARQUET_COLUMNS = ("material_id", "cell", "numbers", "frac_coords")
_PART = 4096  # rows of a table
_SMALL_PART = 256  # structures of other sources
_LARGEST_FILE = 2**24  # bytes of one structure, unpacked; 300,000 lines of a CIF file
_LARGEST_CELL = 10_000  # sites of a CIF file; pymatgen takes a minute for as many
_LARGEST_GROUP = 2**32  # bytes of a row group, unpacked
_ANGLES = ("alpha", "beta", "gamma")

Graphs = Iterator[tuple[str, Callable[[], StructureGraph]]]


@dataclass(frozen=True)
class PackSettings:
    """What a cache of structures depends on besides its source.

    Attributes
    ----------
    max_neighbors : int
    cutoff : float
        In Å. Both as in the configuration of the model that is pretrained on the structures.
    rounds : int
        Blocks of message passing for which equivalent sites are merged.
    resolution : float
        To which distances are rounded in the merged graphs, in Å.

    Raises
    ------
    ValueError
        One is not positive.

    Examples
    --------
    >>> PackSettings(rounds=4).max_neighbors
    12
    """

    max_neighbors: int = 12
    cutoff: float = 8.0
    rounds: int = 3
    resolution: float = 0.01

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not value > 0:
                raise ValueError(f"{name} is {value}: must be positive")


@dataclass(frozen=True)
class ParquetRows:
    """Part of a source: rows ``start`` to below ``stop`` of a Parquet file."""

    path: str
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def graphs(self, settings: PackSettings) -> Graphs:
        """Name of each structure, and a function that makes its graph or raises."""
        table = _read_rows(self.path, self.start, self.stop)
        columns = [_row_arrays(table[name]) for name in PARQUET_COLUMNS[1:]]
        rows = zip(table["material_id"].to_pylist(), *columns, strict=True)
        for row, (name, cell, numbers, coords) in enumerate(rows, self.start):
            if _is_id(name):
                yield str(name), partial(_graph_of_row, cell, numbers, coords, settings)
            else:
                yield Path(self.path).name, partial(_refuse_id, name, row)


@dataclass(frozen=True)
class Structures:
    """Part of a source: structures, or files to ``read`` them from, and their names."""

    structures: tuple[Any, ...]
    names: tuple[str, ...]
    read: Callable[[Any], Any] | None  # of files

    def __len__(self) -> int:
        return len(self.structures)

    def graphs(self, settings: PackSettings) -> Graphs:
        """Name of each structure, and a function that makes its graph or raises."""
        featurizer = StructureGraphFeaturizer(settings.max_neighbors, settings.cutoff)
        for name, structure in zip(self.names, self.structures, strict=True):
            yield name, partial(_featurize, featurizer, structure, self.read)


def _is_id(name: Any) -> bool:
    """Whether a name is there and can be kept as bytes, which end at a null character."""
    return not np.all(pd.isna(name)) and str(name) != "" and "\0" not in str(name)


def _refuse_id(name: Any, row: int) -> Any:
    raise InvalidInputError(f"row {row} has the id {name!r}: empty, or with a null character")


def _featurize(
    featurizer: StructureGraphFeaturizer, structure: Any, read: Callable[[Any], Any] | None
) -> StructureGraph:
    return featurizer.featurize(read(structure) if read else structure)[0]


def read_structure(path: str | Path) -> Structure:
    """The structure of a file in any format of pymatgen but YAML; nothing in it is executed.

    Of a calculation of several steps, such as ``vasprun.xml``, it is the one that pymatgen takes.

    Parameters
    ----------
    path : path
        At most 16 MiB, unpacked.

    Raises
    ------
    InvalidInputError
        The file cannot be read, holds several structures, is a POSCAR that names no elements, or a
        CIF file whose sites do not add up to its own formula or are more than 10,000.

    Examples
    --------
    >>> import tempfile
    >>> from pymatgen.core import Lattice
    >>> iron = Structure(Lattice.cubic(2.87), ["Fe", "Fe"], [[0, 0, 0], [0.5, 0.5, 0.5]])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     text = iron.to(filename=f"{folder}/iron.cif")
    ...     read_structure(f"{folder}/iron.cif").formula
    'Fe2'
    """
    path = Path(path)
    name = path.name.lower()
    text = unpacked(path, _LARGEST_FILE).decode(errors="replace")
    try:
        if ".cif" in name or ".mcif" in name:
            return _read_cif(text)
        if ".json" in name or ".mson" in name:
            given = json.loads(text)
            if isinstance(given, list):
                raise ValueError(f"{len(given)} structures in one file")
            return structure_of_dict(given)
        if ".yaml" in name or ".yml" in name:
            raise ValueError("YAML is not read; write CIF or JSON")
        with warnings.catch_warnings():  # else they are taken for H, He, Li, ...
            warnings.filterwarnings("error", "Elements in POSCAR cannot be determined")
            return Structure.from_file(path)
    except Exception as error:  # a parser of text files fails in any way
        raise InvalidInputError(f"{path.name} cannot be read: {error!r:.300}") from error


def unpacked(path: str | Path, largest: int) -> bytes:
    """Content of a file, which may be compressed; no more than ``largest`` bytes are unpacked.

    Raises
    ------
    InvalidInputError
        It is missing, damaged or larger.

    Examples
    --------
    >>> unpacked("nowhere", 10)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    polysrl_dc.errors.InvalidInputError: nowhere cannot be read: ...
    """
    try:
        with zopen(path, "rb") as file:
            content = bytes(file.read(largest + 1))
    except (OSError, EOFError, ValueError, zlib.error, LZMAError) as error:
        raise InvalidInputError(f"{path} cannot be read: {_line(error)}") from error
    if len(content) > largest:
        raise InvalidInputError(f"{path} holds more than {largest:,} bytes")
    return content


def _read_cif(text: str) -> Structure:
    """The one structure of a CIF file; pymatgen leaves out what it does not understand."""
    text = text.encode("ascii", "replace").decode()  # other letters it takes out of numbers
    words = [line.split("#")[0].split() for line in text.splitlines() if "_cell_" in line]
    for name, *values in filter(None, words):
        if name.startswith(("_cell_length_", "_cell_angle_")) and len(values) > 1:
            raise ValueError(f"{name} has the values {values}")
    sections = CifFile.from_str(text).data.values()
    blocks = [section for section in sections if section.data.get("_atom_site_label")]
    if len(blocks) != 1:
        raise ValueError(f"{len(blocks)} structures in one file")
    block = blocks[0].data
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from_str gives the same ones
        symmetries = CifParser.from_str(text).get_symops(blocks[0])
    matrices = np.array([symmetry.affine_matrix for symmetry in symmetries])
    rigid = np.isclose(np.abs(np.linalg.det(matrices)), 1, atol=0.01).all()
    if not rigid or not np.isclose(matrices, np.eye(4)).all(axis=(1, 2)).any():
        raise ValueError("its symmetry operations distort the cell or lack the identity")
    cell = [str2float(block.get(f"_cell_length_{name}", "1")) for name in "abc"]
    cell += [str2float(block.get(f"_cell_angle_{name}", "90")) for name in _ANGLES]
    check_cell(cell)
    n_sites = len(symmetries) * len(block["_atom_site_label"])
    if n_sites > _LARGEST_CELL:
        raise ValueError(f"up to {n_sites:,} sites, more than {_LARGEST_CELL:,}")
    structure = Structure.from_str(text, "cif")
    formula = block.get("_chemical_formula_sum", "?").strip()
    if structure.is_ordered and formula not in ("", "?", "."):
        said = Composition(formula)
        reduced, factor = said.get_reduced_composition_and_factor()
        if structure.composition.element_composition.reduced_composition != reduced:
            raise ValueError(f"the sites are {structure.formula}, the file says {formula}")
        units = block.get("_cell_formula_units_Z", "?")
        if units.isdecimal():
            cells = {int(units) * said.num_atoms}
            if factor == int(units):  # pymatgen writes the formula of the cell beside its units
                cells.add(said.num_atoms)
            if len(structure) not in cells:
                raise ValueError(f"{len(structure)} sites instead of {units} times {formula}")
    return structure


def _graph_of_row(
    cell: np.ndarray, numbers: np.ndarray, coords: np.ndarray, settings: PackSettings
) -> StructureGraph:
    if cell.size != 6:
        raise InvalidInputError(f"cell has {cell.size} parameters, not 6")
    check_cell(cell.tolist())
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


Part = ParquetRows | Structures


def open_source(source: Any) -> tuple[list[Any], Callable[[], list[Part]]]:
    """What identifies the content of a source, and a function that cuts it into parts."""
    if not isinstance(source, str | Path):
        structures = list(source)
        digest = hashlib.sha256()
        for structure in structures:
            described = structure.as_dict() if isinstance(structure, IStructure) else str(structure)
            digest.update(json.dumps(described, sort_keys=True, default=str).encode())
        index = source.index if isinstance(source, pd.Series) else range(len(structures))
        names = [str(x) if _is_id(x) else _refuse_id(x, row) for row, x in enumerate(index)]
        digest.update(json.dumps(names).encode())
        return [digest.hexdigest()], partial(_structure_parts, structures, names)
    if str(source) == "aflow":
        # The AFLOW Library of Crystallographic Prototypes (Mehl et al. 2017) packaged in pymatgen,
        # beside a module that reads all of it for some seconds when it is imported
        module = find_spec("pymatgen.analysis.prototypes")
        assert module is not None and module.origin is not None
        path = Path(module.origin).with_name("aflow_prototypes.json.gz")
        return [file_digest(path)], partial(_aflow_parts, path)
    path = Path(source)
    if path.is_dir():
        found = sorted(path.rglob("*"))
        tables = [file for file in found if file.suffix.lower() == ".parquet"]
        cifs = [file for file in found if file.suffix.lower() == ".cif"]
        if bool(tables) == bool(cifs):
            raise InvalidInputError(f"{path} must hold either .parquet or .cif files")
    elif path.exists():
        tables, cifs = ([path], []) if path.suffix.lower() == ".parquet" else ([], [path])
    else:
        raise InvalidInputError(f"there is no {path}")
    if tables:
        return [file_digest(file) for file in tables], partial(_parquet_parts, tables)
    root = path if path.is_dir() else path.parent
    names = [cif.relative_to(root).as_posix() for cif in cifs]
    return [*map(file_digest, cifs), names], partial(_structure_parts, cifs, names, read_structure)


def _structure_parts(
    structures: list[Any], names: list[str], read: Callable[[Any], Any] | None = None
) -> list[Part]:
    parts = [slice(i, i + _SMALL_PART) for i in range(0, len(structures), _SMALL_PART)]
    return [Structures(tuple(structures[part]), tuple(names[part]), read) for part in parts]


def _aflow_parts(path: Path) -> list[Part]:
    entries = loadfn(path)
    names = [entry["tags"]["aflow"] for entry in entries]
    return _structure_parts([entry["snl"].structure for entry in entries], names)


def _parquet_parts(paths: list[Path]) -> list[Part]:
    return [job for path in paths for job in _parts_of_table(path)]


def _parts_of_table(path: Path) -> list[Part]:
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise InvalidInputError(f"{path} is not a complete Parquet file: {_line(error)}") from error
    with file:
        missing = set(PARQUET_COLUMNS) - set(file.schema_arrow.names)
        if missing:
            raise InvalidInputError(f"{path} lacks the columns {sorted(missing)}")
        kind = file.schema_arrow.field("material_id").type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or _is_number(kind)):
            raise InvalidInputError(f"{path}: material_id is {kind}, not a text or number")
        for name in PARQUET_COLUMNS[1:]:
            kind = file.schema_arrow.field(name).type
            if not (_is_list(kind) and _is_number(kind.value_type)):
                raise InvalidInputError(f"{path}: {name} is {kind}, not a list of numbers")
        rows, size = file.metadata.num_rows, path.stat().st_size
        groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
        if sum(group.num_rows for group in groups) != rows or rows > size:
            raise InvalidInputError(f"{path} claims {rows:,} structures in {size:,} bytes")
        largest = max((group.total_byte_size for group in groups), default=0)
        if largest > _LARGEST_GROUP:
            raise InvalidInputError(f"{path} has a row group of {largest:,} bytes")
    return [
        ParquetRows(str(path), start, min(start + _PART, rows)) for start in range(0, rows, _PART)
    ]


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _is_list(kind: pa.DataType) -> bool:
    types = pa.types
    return types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind)


def _read_rows(path: str, start: int, stop: int) -> pa.Table:
    """Rows of a Parquet file; only the row groups that hold them are read."""
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            metadata = file.metadata
            ends = np.cumsum([metadata.row_group(i).num_rows for i in range(file.num_row_groups)])
            first, last = np.searchsorted(ends, [start, stop - 1], side="right")
            groups = list(range(first, last + 1))
            table = file.read_row_groups(groups, columns=list(PARQUET_COLUMNS))
    except (pa.ArrowException, OSError) as error:
        raise InvalidInputError(f"{path} is damaged: {_line(error)}") from error
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


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
