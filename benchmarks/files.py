"""JSON from elsewhere, read within bounds; tables, written at once; errors in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd

from polysrl_dc.checkpoints import write_atomic
from polysrl_dc.errors import InvalidInputError
from polysrl_dc.sources import unpacked

LARGEST = 2**27
"""Bytes of a file, unpacked; a record of all 13 Matbench tasks with uncertainties has half."""


def read_json(path: str | Path, largest: int = LARGEST) -> Any:
    """What a JSON file holds, compressed or not.

    Raises
    ------
    InvalidInputError
        It is missing, damaged, nested too deeply or larger than ``largest`` bytes.
    """
    content = unpacked(path, largest)
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InvalidInputError(f"{path} cannot be read: {error}") from error


def one_line(error: Exception) -> str:
    """Kind and text of an error in one line."""
    return printable(f"{type(error).__name__}: {error}")


def printable(text: str) -> str:
    """A text in one line of at most 300 letters that a terminal can show."""
    line = " ".join(text.split())[:300]
    return "".join(letter if letter.isprintable() else "?" for letter in line)


def write_csv(path: str | Path, table: pd.DataFrame, digits: int | None = 6) -> None:
    """Write the columns of a table at once: whoever reads the file finds the old one or this.

    Parameters
    ----------
    path : path
    table : pandas.DataFrame
        Its index is not written.
    digits : int, optional
        Significant digits of its floats; default: six. None: all.
    """
    form = None if digits is None else f"%.{digits}g"
    write_atomic(Path(path), table.to_csv(index=False, float_format=form).encode())
