"""Tables that the command line reads and writes: CSV, JSON, JSON Lines and Parquet."""

import csv
import gzip
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from decimal import Decimal
from io import BytesIO, TextIOWrapper
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from polysrl_dc.checkpoints import write_atomic
from polysrl_dc.errors import InvalidInputError
from polysrl_dc.recalibration import half_width
from polysrl_dc.sources import unpacked

_LARGEST = 2**30  # bytes of a table, unpacked
#: How the names of compressed files end, for which another ending tells the format.
_COMPRESSIONS = (".gz", ".bz2", ".xz", ".lzma")


def _plain(value: Any) -> Any:
    """A field as JSON holds it: to the last digit, which pandas would cut; null where missing."""
    if isinstance(value, (list, tuple, np.ndarray)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if value is None or value is pd.NA or value != value:  # not a number, not a time
        return None
    if isinstance(value, np.datetime64 | np.timedelta64):  # item() makes an integer of nanoseconds
        value = pd.Timestamp(value) if isinstance(value, np.datetime64) else pd.Timedelta(value)
    elif isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, Decimal) and Decimal(repr(float(value))) == value:
        value = float(value)
    if isinstance(value, (bool, int, str)) or (isinstance(value, float) and np.isfinite(value)):
        return value
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


def _as_text(value: Any) -> Any:
    """A list or an object as JSON, of which pandas would write a part; another field as it is."""
    nested = isinstance(value, (list, tuple, dict, np.ndarray))
    return json.dumps(_plain(value)) if nested else value


def _to_csv(frame: pd.DataFrame) -> bytes:
    frame = frame.copy()
    for place, kind in enumerate(frame.dtypes):
        if kind.kind == "O":
            texts = [_as_text(value) for value in frame.iloc[:, place]]
            frame.isetitem(place, pd.Series(texts, frame.index, dtype=object))
    # Fields are quoted where they hold what ends a line, which readers take a lone \r for, too.
    lines: list[str] = []
    frame.to_csv(SimpleNamespace(write=lines.append), index=False, lineterminator="\r\n")
    return "".join(line.removesuffix("\r\n") + "\n" for line in lines).encode()


def _to_json(frame: pd.DataFrame) -> bytes:
    return b"[" + b",\n".join(_records(frame)) + b"]\n"


def _to_json_lines(frame: pd.DataFrame) -> bytes:
    return b"".join(row + b"\n" for row in _records(frame))


def _records(frame: pd.DataFrame) -> list[bytes]:
    if not frame.columns.is_unique:
        twice = frame.columns[frame.columns.duplicated()][0]
        raise ValueError(f"two columns are called {twice!r}")
    return [json.dumps(_plain(row)).encode() for row in frame.to_dict("records")]


#: The content of a table's file, by how its name ends.
WRITERS: dict[str, Callable[[pd.DataFrame], bytes]] = {
    ".csv": _to_csv,
    ".csv.gz": lambda frame: gzip.compress(_to_csv(frame), mtime=0),
    ".json": _to_json,
    ".jsonl": _to_json_lines,
    ".parquet": lambda frame: frame.to_parquet(index=False),
}


def read_table(path: str, columns: Sequence[str]) -> pd.DataFrame:
    """A table in one of four formats with ``columns``, of which the first has formulas.

    The name of the file tells the format: ``.json`` (records, columns, or matminer's and Matbench's
    split frames), ``.jsonl``, ``.parquet``, ``.tsv``, else CSV; ``.gz`` and the like may follow.
    Columns of a CSV table are text unless all their fields are numbers as Python writes them, or
    empty, which means that a number is missing.
    Rows are numbered from 0, the first beneath the names. An index that is more than such numbers
    becomes a column, ``index`` if it has no name. The path ``-`` means CSV on standard input.

    Parameters
    ----------
    path : str
    columns : sequence of str

    Returns
    -------
    pandas.DataFrame

    Raises
    ------
    InvalidInputError
        The file is no table, has no row or lacks a column; names the file.
    """
    if path.lower().endswith((".xlsx", ".xlsm", ".xlsb", ".xls", ".ods")):
        raise InvalidInputError(f"{path} is a spreadsheet: save it as CSV")
    content = _standard_input() if path == "-" else unpacked(path, _LARGEST)
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    kind = next((suffix for suffix in reversed(suffixes) if suffix not in _COMPRESSIONS), "")
    advice = _separator(kind, content, columns[0])
    try:
        frame = _parsed(kind, content, columns[0])
        for name in frame.columns[frame.columns.duplicated()]:
            if name != "" or name in columns:
                raise ValueError(f"two columns are called {name!r}")
        counted = frame.index.names == [None] and list(frame.index) == list(range(len(frame)))
        frame = frame.reset_index(drop=counted)
    except Exception as error:  # three parsers, each of which fails in its own ways
        line = " ".join(str(error).split())
        if "codec can't decode" in line:
            advice += "; save it as UTF-8"
        raise InvalidInputError(f"{path} is no table: {line}{advice}") from error
    for name in columns:
        if name not in frame:
            given = list(frame.columns)
            alike = [other for other in given if _bare(other) == _bare(name)]
            hint = f"; is it {alike[0]!r}?" if alike else advice
            beneath = np.flatnonzero(frame.eq(name).any(axis=1))
            if not hint and len(beneath):
                hint = f"; row {beneath[0]} has it: the names must stand in the first line"
            if not hint and len(given) == 1 and name in str(given[0]):
                hint = f"; its fields must be separated by {'tabs' if kind == '.tsv' else 'commas'}"
            if not hint and name == columns[0] == "formula":
                hint = "; --column names another one of formulas"
            raise InvalidInputError(f"{path} has no column {name!r}, only {given}{hint}")
    if frame.empty:
        raise InvalidInputError(f"{path} has no row")
    return frame


def _standard_input() -> bytes:
    content = sys.stdin.buffer.read(_LARGEST + 1)
    if len(content) > _LARGEST:
        raise InvalidInputError(f"standard input holds more than {_LARGEST:,} bytes")
    return content


def _parsed(kind: str, content: bytes, formulas: str) -> pd.DataFrame:
    """The table in a file of this kind, of which one column has formulas."""
    if kind == ".parquet":
        return _from_parquet(content, formulas)
    if kind in (".json", ".jsonl"):
        return _from_json(content, lines=kind == ".jsonl")
    if b"\0" in content:  # where other programs would end the field
        raise ValueError("it holds a byte that is zero, no text in UTF-8; save it as UTF-8")
    names, *rows = _csv_rows(content, "\t" if kind == ".tsv" else ",")
    for row, given in enumerate(rows):
        if len(given) != len(names):
            raise ValueError(f"row {row} has {len(given)} fields, but there are {len(names)} names")
    columns = (pd.Series(fields, dtype=object) for fields in zip(*rows, strict=True))
    typed = [f if name == formulas else _typed(f) for name, f in zip(names, columns, strict=False)]
    return pd.concat(typed, axis=1).set_axis(names, axis=1) if rows else pd.DataFrame([], [], names)


def _from_parquet(content: bytes, formulas: str) -> pd.DataFrame:
    """Integers as such, bytes as text, and compositions without the elements of other rows."""
    table = pq.read_table(BytesIO(content))
    for place, field in enumerate(table.schema):
        if str(field.type).startswith(("binary", "large_binary", "fixed_size_binary")):
            try:
                text = table[place].cast(pa.binary()).cast(pa.string())
            except pa.ArrowInvalid as error:
                raise ValueError(f"{field.name!r} holds bytes that are no text in UTF-8") from error
            table = table.set_column(place, field.name, text)
    frame = table.to_pandas(integer_object_nulls=True)  # else floats, where some are missing
    for place, name in enumerate(frame.columns):
        if name == formulas:
            frame.isetitem(place, frame.iloc[:, place].map(_without_nulls))
    return frame


def _without_nulls(value: Any) -> Any:
    """A composition of Parquet, where each row has all elements of the column."""
    return {k: v for k, v in value.items() if v is not None} if isinstance(value, dict) else value


def _csv_rows(content: bytes, separator: str) -> list[list[str]]:
    """The fields of all lines as text, or 0012 would become 12 and the formula NaN be missing.

    An empty line beneath the names, but not at the end, is a row of empty fields.
    """
    lines = TextIOWrapper(BytesIO(content.strip(b"\r\n")), encoding="utf-8-sig", newline="")
    limit = csv.field_size_limit(_LARGEST)
    try:
        rows = list(csv.reader(lines, delimiter=separator, strict=True))
    except csv.Error as error:
        raise ValueError(f"{error}; a quoted field ends where its quotes do") from error
    finally:
        csv.field_size_limit(limit)
    if not rows:
        raise ValueError("it is empty")
    return [row or [""] * len(rows[0]) for row in rows]


def _from_json(content: bytes, lines: bool) -> pd.DataFrame:
    """Fields as they are given, which pandas would turn into floats where some are missing."""
    try:
        given = list(_json_lines(content)) if lines else _json(content)
    except json.JSONDecodeError as error:
        if lines or error.msg != "Extra data":
            raise
        raise ValueError(f"{error}; if each line holds a row, call it .jsonl") from error
    if isinstance(given, dict) and given.keys() == {"index", "columns", "data"}:
        return pd.DataFrame(given["data"], given["index"], given["columns"], dtype=object)
    if isinstance(given, dict):
        if not all(isinstance(column, dict | list) for column in given.values()):
            raise ValueError("it is an object without columns; rows are objects in a list")
        if all(isinstance(column, dict) for column in given.values()):
            return _of_columns(given)
        return pd.DataFrame(given, dtype=object)
    if not isinstance(given, list):
        raise ValueError(f"it holds neither rows nor columns, but {given!r}"[:80])
    for row, record in enumerate(given):
        if not isinstance(record, dict):
            raise ValueError(f"row {row} is {record!r}, not an object with named fields")
    return pd.DataFrame(given, dtype=object)


def _of_columns(columns: dict[str, dict[str, Any]]) -> pd.DataFrame:
    """A row for each key of the columns, counted ones in their order and without their numbers."""
    keys = list(dict.fromkeys(key for column in columns.values() for key in column))
    if sorted(keys) == sorted(str(row) for row in range(len(keys))):
        keys.sort(key=int)
    rows = [
        {name: column[key] for name, column in columns.items() if key in column} for key in keys
    ]
    index = range(len(keys)) if keys == [str(row) for row in range(len(keys))] else keys
    return pd.DataFrame(rows, index, list(columns), dtype=object)


def _json_lines(content: bytes) -> Iterator[Any]:
    """What each line holds but the empty ones."""
    for number, line in enumerate(content.splitlines(), start=1):
        if line.strip():
            try:
                yield _json(line)
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from error


def _json(content: bytes) -> Any:
    return json.loads(content, object_pairs_hook=_named_once)


def _named_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, of whose fields that share a name Python would keep the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"two fields are called {next(n for n in names if names.count(n) > 1)!r}")
    return found


def _typed(fields: pd.Series) -> pd.Series:
    """Text as numbers, if all but empty fields are written like that; else the text."""
    given = fields[fields != ""]
    nullable = {"dtype_backend": "numpy_nullable"} if len(given) < len(fields) else {}
    found = pd.to_numeric(given, errors="coerce", **nullable)
    if given.empty or found.isna().any() or (found.astype(str) != given).any():
        return fields
    return found.reindex(fields.index)


def _bare(name: Any) -> str:
    return " ".join(str(name).split()).casefold()


def _separator(kind: str, content: bytes, formulas: str) -> str:
    """Advice on a CSV table whose first line has what other programs write for a comma."""
    if kind in (".parquet", ".json", ".jsonl", ".tsv"):
        return ""
    line = BytesIO(content).readline().decode("utf-8-sig", "replace")
    for mark, name in ((";", "semicolons"), ("\t", "tabs")):
        fields = [_bare(field.strip().strip('"')) for field in line.split(mark)]
        if len(fields) > 1 and ("," not in line or _bare(formulas) in fields):
            return f"; its fields are separated by {name}: save it with commas, and decimal points"
    return ""


def predictions(
    mean: np.ndarray,
    std: np.ndarray,
    targets: Sequence[str] | range,
    interval: float | None = None,
) -> pd.DataFrame:
    """The columns that :func:`prediction_names` names.

    With ``interval``, a share of the values, also the bounds that a calibrated standard deviation
    gives it.

    Examples
    --------
    >>> predictions(np.array([[8.5]]), np.array([[0.1]]), ["gap"]).to_dict("records")
    [{'prediction': 8.5, 'std': 0.1}]
    """
    columns = [mean, std]
    if interval is not None:
        half = half_width(interval) * std
        columns += [mean - half, mean + half]
    return pd.DataFrame(np.hstack(columns), columns=prediction_names(targets, interval))


def prediction_names(targets: Sequence[str] | range, interval: float | None = None) -> list[str]:
    """``prediction``, ``std`` and, with an interval, ``lower`` and ``upper``, of each target."""
    names = ["prediction", "std"] + (["lower", "upper"] if interval is not None else [])
    return [column for name in names for column in for_each(targets, name)]


def for_each(targets: Sequence[str] | range, name: str) -> list[str]:
    """Names of the columns of a quantity that each target has."""
    return [f"{name}_{target}" for target in targets] if len(targets) > 1 else [name]


def check_table(given: pd.DataFrame, names: Sequence[str], path: str | None) -> None:
    """Refuse what :func:`write_table` could not write beside columns that are yet to be made.

    Parameters
    ----------
    given : pandas.DataFrame
    names : sequence of str
        Of the columns that are to be found.
    path : str or None
        Ends in one of :data:`WRITERS`; None: standard output.

    Raises
    ------
    InvalidInputError
        One of ``names`` is taken, or the format cannot hold a column.
    """
    _refuse_taken(given, names)
    if path is not None:
        _content(given, path)


def write_table(given: pd.DataFrame, found: pd.DataFrame, path: str | None) -> None:
    """Write the rows of a table as they were given, and what was found, beside one another.

    Parameters
    ----------
    given, found : pandas.DataFrame
        Of the same number of rows, in the same order.
    path : str or None
        Ends in one of :data:`WRITERS`; None: CSV to standard output.

    Raises
    ------
    InvalidInputError
        Both have a column of the same name, the format cannot hold a column of mixed types, or the
        file cannot be written.
    """
    _refuse_taken(given, found)
    frame = pd.concat([given.reset_index(drop=True), found], axis=1)
    if path is None:
        sys.stdout.writelines(_to_csv(frame).decode().splitlines(keepends=True))
        sys.stdout.flush()
        return
    content = _content(frame, path)
    try:
        write_atomic(path, content)
    except OSError as error:  # which names another file, beside this one
        raise InvalidInputError(f"{path} cannot be written: {error.strerror or error}") from error
    print(f"{len(frame)} rows written to {path}", file=sys.stderr)


def _refuse_taken(given: pd.DataFrame, names: Iterable[str]) -> None:
    if taken := [name for name in names if name in given]:
        raise InvalidInputError(f"the table has a column {taken[0]!r} already; rename it")


def _content(frame: pd.DataFrame, path: str) -> bytes:
    try:
        return next(write for end, write in WRITERS.items() if path.endswith(end))(frame)
    except (ValueError, TypeError, OverflowError, NotImplementedError) as error:
        # Parquet: a column has one type, and each of its objects a field
        line = " ".join(str(error).split())
        raise InvalidInputError(f"{path} cannot be written: {line}; CSV can") from error
