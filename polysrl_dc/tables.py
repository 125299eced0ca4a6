"""Tables that the command line reads and writes: CSV, JSON and Parquet."""

import sys
from collections.abc import Callable, Sequence
from io import BytesIO
from typing import Any

import numpy as np
import pandas as pd

from polysrl_dc.errors import InvalidInputError
from polysrl_dc.sources import unpacked

_LARGEST = 2**30  # bytes of a table, unpacked
#: What writes a table, by how the name of its file ends.
WRITERS: dict[str, Callable[[pd.DataFrame, Any], Any]] = {
    ".csv": lambda frame, path: frame.to_csv(path, index=False),
    ".csv.gz": lambda frame, path: frame.to_csv(path, index=False),
    ".parquet": lambda frame, path: frame.to_parquet(path, index=False),
}


def read_table(path: str, columns: Sequence[str]) -> pd.DataFrame:
    """A CSV, JSON or Parquet table with ``columns``; the first of them is read as text.

    Rows are numbered from 0. The name of an index becomes that of a column.

    Raises
    ------
    InvalidInputError
        The file is no table, has no row or lacks a column; names the file.
    """
    content = unpacked(path, _LARGEST)
    try:
        frame = _parsed(path, content, columns[0])
    except Exception as error:  # three parsers, each of which fails in its own ways
        raise InvalidInputError(f"{path} is no table: {error}") from error
    frame = frame.reset_index(drop=frame.index.names == [None])
    missing = [name for name in columns if name not in frame]
    if missing:
        raise InvalidInputError(f"{path} has no column {missing[0]!r}, only {list(frame.columns)}")
    if frame.empty:
        raise InvalidInputError(f"{path} has no row")
    return frame


def _parsed(path: str, content: bytes, text: str) -> pd.DataFrame:
    """The table in a file whose column ``text`` is one of text."""
    if path.endswith(".parquet"):
        return pd.read_parquet(BytesIO(content))
    if path.endswith(".json"):
        return pd.read_json(BytesIO(content), dtype={text: str}, convert_dates=False)
    if b"\0" in content:  # where pandas would end the field
        raise ValueError("it holds a byte that is zero, no text in UTF-8")
    # a converter keeps pandas from reading the formula NaN as a missing value
    frame = pd.read_csv(BytesIO(content), converters={text: str})
    if not isinstance(frame.index, pd.RangeIndex):
        raise ValueError("rows have more fields than the first line has names")
    return frame


def numbers(column: pd.Series) -> np.ndarray:
    """Labels as floats, shape (n,), NaN where there is none.

    Raises
    ------
    InvalidInputError
        A value is no number; names row, column and value.
    """
    found = pd.to_numeric(column.astype(object), errors="coerce")  # a date is no number
    bad = found.isna() & column.notna()
    if bad.any():
        row = bad.idxmax()
        raise InvalidInputError(f"row {row}: {column.name} is {column[row]!r}, not a number")
    return found.to_numpy(dtype=float)


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
        Both have a column of the same name.
    """
    check_names(given, list(found))
    frame = pd.concat([given.reset_index(drop=True), found], axis=1)
    if path is None:
        WRITERS[".csv"](frame, sys.stdout)
        return
    writer = next(writer for suffix, writer in WRITERS.items() if path.endswith(suffix))
    writer(frame, path)
    print(f"{len(frame)} rows written to {path}", file=sys.stderr)
