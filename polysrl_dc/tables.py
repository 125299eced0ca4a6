"""Tables that the command line reads and writes: CSV, JSON, JSON Lines and Parquet."""

import json
import sys
from collections.abc import Callable, Hashable, Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from polysrl_dc.batches import GREATEST_LABEL
from polysrl_dc.errors import InvalidInputError
from polysrl_dc.sources import unpacked

_LARGEST = 2**30  # bytes of a table, unpacked
#: What pandas takes for a missing value.
_MISSING = (
    *("", "#N/A", "#N/A N/A", "#NA", "<NA>", "N/A", "n/a", "NA", "NULL", "null", "None"),
    *("NaN", "nan", "-NaN", "-nan", "1.#IND", "-1.#IND", "1.#QNAN", "-1.#QNAN"),
)
_TRUTH = {"True": 1, "TRUE": 1, "true": 1, "False": 0, "FALSE": 0, "false": 0}
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
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, (bool, int, str)) or (isinstance(value, float) and np.isfinite(value)):
        return value
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


def _write_records(frame: pd.DataFrame, path: str, lines: bool = False) -> None:
    """Rows as JSON, or as JSON Lines."""
    rows = [json.dumps(_plain(row)) for row in frame.to_dict("records")]
    text = "\n".join(rows) if lines else "[" + ",\n".join(rows) + "]"
    Path(path).write_text(f"{text}\n", encoding="utf-8")


#: What writes a table, by how the name of its file ends.
WRITERS: dict[str, Callable[[pd.DataFrame, Any], Any]] = {
    ".csv": lambda frame, path: frame.to_csv(path, index=False),
    ".csv.gz": lambda frame, path: frame.to_csv(path, index=False),
    ".json": _write_records,
    ".jsonl": lambda frame, path: _write_records(frame, path, lines=True),
    ".parquet": lambda frame, path: frame.to_parquet(path, index=False),
}


def read_table(path: str, columns: Sequence[str]) -> pd.DataFrame:
    """A table in one of four formats with ``columns``, of which the first has formulas.

    The name of the file tells the format: ``.json`` (records, columns, or matminer's and Matbench's
    split frames), ``.jsonl``, ``.parquet``, ``.tsv``, else CSV; ``.gz`` and the like may follow.
    Columns of a CSV table are text unless all their fields are numbers as Python writes them.
    Rows are numbered from 0, the first beneath the names. An index that is more than such numbers
    becomes a column, ``index`` if it has no name. The path ``-`` means CSV on standard input.

    Raises
    ------
    InvalidInputError
        The file is no table, has no row or lacks a column; names the file.
    """
    if path.lower().endswith((".xlsx", ".xls", ".ods")):
        raise InvalidInputError(f"{path} is a spreadsheet: save it as CSV")
    content = _standard_input() if path == "-" else unpacked(path, _LARGEST)
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    kind = next((suffix for suffix in reversed(suffixes) if suffix not in _COMPRESSIONS), "")
    advice = _separator(kind, content)
    try:
        frame = _parsed(kind, content, columns[0])
        for name in frame.columns[frame.columns.duplicated()]:
            if name:
                raise ValueError(f"two columns are called {name!r}")
    except Exception as error:  # three parsers, each of which fails in its own ways
        line = " ".join(str(error).split())
        raise InvalidInputError(f"{path} is no table: {line}{advice}") from error
    counted = frame.index.names == [None] and list(frame.index) == list(range(len(frame)))
    frame = frame.reset_index(drop=counted)
    for name in columns:
        if name not in frame:
            given = list(frame.columns)
            alike = [other for other in given if _bare(other) == _bare(name)]
            hint = f"; is it {alike[0]!r}?" if alike else advice
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
        return pd.read_parquet(BytesIO(content))
    if kind in (".json", ".jsonl"):
        return _from_json(content, lines=kind == ".jsonl")
    if b"\0" in content:  # where pandas would end the field
        raise ValueError("it holds a byte that is zero, no text in UTF-8; save it as UTF-8")
    separator = "\t" if kind == ".tsv" else ","
    # as text, or 0012 would become 12 and the formula NaN a missing value
    text = {"header": None, "dtype": str, "na_filter": False, "encoding": "utf-8-sig"}
    lines = content.strip(b"\r\n")  # what is empty within is a row without a formula
    rows = pd.read_csv(BytesIO(lines), sep=separator, skip_blank_lines=False, **text)
    names = rows.iloc[0].tolist()
    fields = (rows.iloc[1:, i].reset_index(drop=True) for i in range(len(names)))
    typed = [f if name == formulas else _typed(f) for name, f in zip(names, fields, strict=True)]
    return pd.concat(typed, axis=1).set_axis(names, axis=1)


def _from_json(content: bytes, lines: bool) -> pd.DataFrame:
    """Fields as they are given, which pandas would turn into floats where some are missing."""
    given = list(_json_lines(content)) if lines else _json(content)
    if isinstance(given, dict) and given.keys() == {"index", "columns", "data"}:
        return pd.DataFrame(given["data"], given["index"], given["columns"], dtype=object)
    if isinstance(given, dict):
        if not all(isinstance(column, dict | list) for column in given.values()):
            raise ValueError("it is an object without columns; rows are objects in a list")
        columns = {
            name: pd.Series(column, dtype=object) if isinstance(column, dict) else column
            for name, column in given.items()
        }
        frame = pd.DataFrame(columns, dtype=object)
        numbered = list(frame.index) == [str(row) for row in range(len(frame))]
        return frame.reset_index(drop=True) if numbered else frame
    if not isinstance(given, list):
        raise ValueError(f"it holds neither rows nor columns, but {given!r}"[:80])
    for row, record in enumerate(given):
        if not isinstance(record, dict):
            raise ValueError(f"row {row} is {record!r}, not an object with named fields")
    return pd.DataFrame(given, dtype=object)


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
    """Text as numbers, if they are written like that; else the text."""
    found = pd.to_numeric(fields, errors="coerce")
    return found if found.notna().all() and (found.astype(str) == fields).all() else fields


def _bare(name: Any) -> str:
    return str(name).strip().casefold()


def _separator(kind: str, content: bytes) -> str:
    """Advice on a CSV table whose first line has what other programs write for a comma."""
    if kind in (".parquet", ".json", ".jsonl", ".tsv"):
        return ""
    line = BytesIO(content).readline()
    found = [name for mark, name in ((b";", "semicolons"), (b"\t", "tabs")) if mark in line]
    if not found or b"," in line:
        return ""
    return f"; its fields are separated by {found[0]}: save it with commas, and decimal points"


def numbers(column: pd.Series, classes: bool = False) -> tuple[np.ndarray, dict[Hashable, str]]:
    """Labels as floats, and what is wrong with those that are none.

    Parameters
    ----------
    column : pandas.Series, shape (n,)
    classes : bool
        Whether only 0 and 1 are labels.

    Returns
    -------
    values : numpy.ndarray, shape (n,)
        NaN where there is no label or a wrong one. True is 1 and False 0.
    wrong : dict
        Row -> a sentence with row, column and value.

    Examples
    --------
    >>> values, wrong = numbers(pd.Series(["8.5", "", "large"], name="gap"))
    >>> values.tolist(), wrong
    ([8.5, nan, nan], {2: "row 2: gap is 'large', not a number"})
    """
    given = column.astype(object)  # a date is no number
    missing = given.isna() | given.map(lambda value: isinstance(value, str) and value in _MISSING)
    given = given[~missing]
    if all(isinstance(value, str) and value in _TRUTH for value in given):
        given = given.map(_TRUTH)
    found = pd.to_numeric(given, errors="coerce").astype(float).reindex(column.index)
    wrong, right = {}, found.isin([0, 1]) if classes else found.abs() <= GREATEST_LABEL
    for row in column.index[~missing & ~right]:
        limit = "" if np.isnan(found[row]) else f" of at most {GREATEST_LABEL:g}"
        kind = "a class: these are 0 and 1" if classes else f"a number{limit}"
        wrong[row] = f"row {row}: {column.name} is {str(column[row])!r}, not {kind}"
    return found.mask(found.index.isin(list(wrong))).to_numpy(), wrong


def check_names(given: pd.DataFrame, found: Sequence[str]) -> None:
    """Refuse columns that a table has already."""
    if taken := [name for name in found if name in given]:
        raise InvalidInputError(f"the table has a column {taken[0]!r} already; rename it")


def write_table(given: pd.DataFrame, found: pd.DataFrame, path: str | None) -> None:
    """Write the rows of a table as they were given, and what was found, beside one another.

    Parameters
    ----------
    given, found : pandas.DataFrame
        Of the same number of rows, in the same order.
    path : str, optional
        Ends in one of :data:`WRITERS`; default: CSV to standard output.

    Raises
    ------
    InvalidInputError
        Both have a column of the same name, or the format cannot hold a column of mixed types.
    """
    check_names(given, list(found))
    frame = pd.concat([given.reset_index(drop=True), found], axis=1)
    if path is None:
        WRITERS[".csv"](frame, sys.stdout)
        sys.stdout.flush()
        return
    writer = next(writer for suffix, writer in WRITERS.items() if path.endswith(suffix))
    try:
        writer(frame, path)
    except (ValueError, TypeError, OverflowError) as error:  # Parquet: a column has one type
        line = " ".join(str(error).split())
        raise InvalidInputError(f"{path} cannot be written: {line}; CSV can") from error
    print(f"{len(frame)} rows written to {path}", file=sys.stderr)
