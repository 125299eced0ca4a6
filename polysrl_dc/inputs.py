"""What the commands of ``polysrl`` read: formulas, their labels, references and structures."""

import argparse
import json
import re
import sys
from collections.abc import Hashable, Iterator, Sequence
from decimal import Decimal
from numbers import Real
from pathlib import Path
from typing import Any

import deepchem as dc
import numpy as np
import pandas as pd
from tqdm import tqdm

from polysrl_dc.batches import GREATEST_LABEL
from polysrl_dc.cross_validation import row_groups
from polysrl_dc.datasets import PolymorphDataset, drop_skipped
from polysrl_dc.errors import InvalidInputError
from polysrl_dc.featurizers import StoichiometryGraphFeaturizer, StructureGraphFeaturizer
from polysrl_dc.model import PolySRLModel
from polysrl_dc.sources import read_structure, unpacked
from polysrl_dc.tables import read_table

#: What pandas takes for a missing value.
MISSING = (
    *("", "#N/A", "#N/A N/A", "#NA", "<NA>", "N/A", "n/a", "NA", "NULL", "null", "None"),
    *("NaN", "nan", "-NaN", "-nan", "1.#IND", "-1.#IND", "1.#QNAN", "-1.#QNAN"),
)
_TRUTH = {"True": 1, "TRUE": 1, "true": 1, "False": 0, "FALSE": 0, "false": 0}
_LARGEST_LIST = 2**28  # bytes of a JSON list of structures, unpacked; 60,000 of 20 sites
_SHOWN = 10  # of many that are skipped for the same reason
_WIDE = 1000  # times the 5th percentile of labels is their 95th, if they are better learned as logs


def read_formulas(
    options: argparse.Namespace, others: Sequence[str] = ()
) -> tuple[pd.DataFrame, dc.data.Dataset]:
    """The table of formulas, as given or read, and its dataset; the rows of both correspond.

    Parameters
    ----------
    options : argparse.Namespace
        ``input`` and ``column``, or ``formulas``; ``on_error``.
    others : sequence of str
        Columns that the table must have besides.

    Returns
    -------
    frame : pandas.DataFrame, n rows
    dataset : dc.data.Dataset of n stoichiometry graphs

    Raises
    ------
    InvalidInputError
        There is no table, column or usable formula, or a bad formula; names file or row.
    """
    given = getattr(options, "formulas", [])
    if bool(given) == (options.input is not None):
        raise InvalidInputError(
            "give either formulas or --input FILE; formulas go before the options"
        )
    if options.input is not None:
        frame = read_table(options.input, [options.column, *others])
    else:
        frame = pd.DataFrame({options.column: given})
    graphs = StoichiometryGraphFeaturizer(options.on_error).featurize(frame[options.column])
    dataset = drop_skipped(dc.data.NumpyDataset(graphs, ids=frame.index.to_numpy()))
    if len(dataset) == 0:
        raise InvalidInputError("no usable formula is left")
    _say_total(len(frame) - len(dataset))
    frame = frame.loc[dataset.ids]
    if acronyms := list(dict.fromkeys(filter(_is_acronym, frame[options.column]))):
        named = ", ".join(acronyms[:_SHOWN]) + (", ..." if len(acronyms) > _SHOWN else "")
        print(
            f"read letter by letter, each an element: {named}; if it is a name, write the formula",
            file=sys.stderr,
        )
    return frame, dataset


def _is_acronym(text: Any) -> bool:
    """Whether a formula may be the name of a material, such as YBCO."""
    return isinstance(text, str) and re.fullmatch("[A-Z]{3,}", text) is not None


def read_reference(options: argparse.Namespace, model: PolySRLModel) -> dc.data.Dataset:
    """The formulas of ``--reference``, but for the rows without a label of the targets.

    Parameters
    ----------
    options : argparse.Namespace
        ``reference``, ``column``, ``target`` and ``on_error``.
    model : PolySRLModel
        Knows the targets where no option names them.

    Returns
    -------
    dc.data.Dataset of stoichiometry graphs

    Raises
    ------
    InvalidInputError
        As :func:`read_formulas`, a field that is no label, or no row has one.
    """
    given = {"input": options.reference, "column": options.column, "on_error": options.on_error}
    frame, dataset = read_formulas(argparse.Namespace(**given), options.target or [])
    targets = options.target or [n for n in model.provenance.get("targets", []) if n in frame]
    if not targets:
        return dataset
    labels = _labels(frame, targets, model.settings["task"], options.on_error)
    kept = np.flatnonzero(~np.isnan(labels).all(1))
    if len(kept) == 0:
        raise InvalidInputError(f"{options.reference} has no label of {' or '.join(targets)}")
    return dataset.select(kept)


def _labels(frame: pd.DataFrame, targets: Sequence[str], task: str, on_error: str) -> np.ndarray:
    """Labels of each row, NaN where they are missing; wrong ones end the run, or are said."""
    found = [numbers(frame[name], task == "classification") for name in targets]
    labels = np.column_stack([values for values, _ in found])
    empty = set(frame.index[np.isnan(labels).all(1)])
    for row, text in (pair for _, wrong in found for pair in wrong.items()):
        if on_error == "raise":
            raise InvalidInputError(text)
        print(f"skipped {'' if row in empty else 'the label in '}{text}", file=sys.stderr)
    missing = len(empty.difference(*(wrong for _, wrong in found)))
    _say_total(len(empty) - missing)
    if missing:
        print(f"rows without {' or '.join(targets)}, left out: {missing}", file=sys.stderr)
    return labels


def _say_skipped(texts: Sequence[str], what: str) -> None:
    for text in texts[:_SHOWN]:
        print(f"skipped {text}", file=sys.stderr)
    _say_total(len(texts), what)


def _say_total(n: int, what: str = "rows") -> None:
    """The number of those that are skipped, where it takes long to count what has been said."""
    if n > _SHOWN:
        print(f"skipped {n:,} {what} in all", file=sys.stderr)


def read_labels(
    options: argparse.Namespace, frame: pd.DataFrame, dataset: dc.data.Dataset
) -> dc.data.Dataset:
    """The rows with a label, and a group if one is asked for; what is left out is said.

    Parameters
    ----------
    options : argparse.Namespace
        ``target``, ``task``, ``group`` and ``on_error``.
    frame : pandas.DataFrame, n rows
    dataset : dc.data.Dataset of n stoichiometry graphs
        Both as :func:`read_formulas` gives them.

    Returns
    -------
    dc.data.Dataset
        A column of labels for each target; missing ones have weight 0.

    Raises
    ------
    InvalidInputError
        A field that is no number, class or group (names row and column), or a column without one.
    """
    if len(set(options.target)) < len(options.target):
        raise InvalidInputError(f"--target names a column twice: {' '.join(options.target)}")
    labels = _labels(frame, options.target, options.task, options.on_error)
    weights = (~np.isnan(labels)).astype(float)
    labels = np.where(weights, labels, 0.0)
    dataset = dc.data.NumpyDataset(dataset.X, labels, weights, dataset.ids)
    dataset = dataset.select(np.flatnonzero(weights.any(1)))
    rows = ""
    if options.group is not None:
        column = frame.loc[dataset.ids, options.group]
        missing = _ungrouped(column)
        if missing and options.on_error == "raise":
            text = next(iter(missing.values()))
            raise InvalidInputError(f"{text}; --group needs all of them, or --on-error skip")
        _say_skipped(list(missing.values()), "rows")
        dataset = dataset.select(np.flatnonzero(~column.index.isin(list(missing))))
        rows = f" in the rows with {options.group!r}"
    known = dataset.w > 0
    for name, any_known in zip(options.target, known.any(0), strict=True):
        if not any_known:
            raise InvalidInputError(f"the column {name!r} has no number{rows}")
    if options.task == "regression":
        formulas = row_groups(dataset)
        for name, y, here in zip(options.target, dataset.y.T, known.T, strict=True):
            for text in remarks(y[here], formulas[here]):
                print(f"the labels of {name!r} {text}", file=sys.stderr)
    return dataset


def remarks(labels: np.ndarray, formulas: np.ndarray) -> Iterator[str]:
    """What a user may not know of labels that are learned as numbers.

    Parameters
    ----------
    labels : numpy.ndarray, shape (n,)
    formulas : numpy.ndarray, shape (n,), integer
        Equal where the formulas are.

    Yields
    ------
    str
        They are classes; they span orders of magnitude; rows of one formula differ. The last tells
        the mean distance of a label from the median of its formula, the least mean absolute error
        that predictions from formulas can have on these rows.
    """
    if set(np.unique(labels)) == {0, 1}:
        yield "are 0 and 1: --task classification learns them as classes"
    low, high = np.percentile(labels, [5, 95])
    if labels.min() > 0 and high > _WIDE * low:
        yield f"span orders of magnitude ({low:.3g} to {high:.3g}): consider their logarithms"
    column = pd.Series(labels)
    apart = (column - column.groupby(formulas).transform("median")).abs()
    if apart.any():
        yield (
            f"are {len(labels):,} of {len(np.unique(formulas)):,} formulas; they lie "
            f"{apart.mean():.3g} from the median of their formula on average, and no prediction "
            "from formulas alone comes closer"
        )


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
    missing = given.isna() | given.map(lambda value: isinstance(value, str) and value in MISSING)
    given = given[~missing]
    if all(isinstance(value, str) and value in _TRUTH for value in given):
        given = given.map(_TRUTH)
    found = given.map(_number).astype(float).reindex(column.index)
    wrong, right = {}, found.isin([0, 1]) if classes else found.abs() <= GREATEST_LABEL
    for row in column.index[~missing & ~right]:
        limit = "" if np.isnan(found[row]) else f" of at most {GREATEST_LABEL:g}"
        kind = "a class: these are 0 and 1" if classes else f"a number{limit}"
        text = str(column[row])
        plain = classes or limit or text.isalpha()
        advice = "" if plain else "; write one number alone, as 1.5, or leave the field empty"
        wrong[row] = f"row {row}: {column.name} is {text!r}, not {kind}{advice}"
    return found.mask(found.index.isin(list(wrong))).to_numpy(), wrong


def _number(value: Any) -> float:
    """To the last digit; NaN for what is none, such as 1_000, dates and digits of other scripts."""
    text = value if isinstance(value, str) else ""
    if "_" in text or not text.isascii() or not isinstance(value, (str, Real, Decimal, np.bool_)):
        return np.nan
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return np.nan


def listed_structures(path: str, name: str) -> dict[str, Any]:
    """The entries of a JSON file that is a list: dicts of structures, if it is what it should be.

    Parameters
    ----------
    path : str
    name : str
        Of the file; its entries are NAME:0, NAME:1, ...

    Returns
    -------
    dict
        Empty for any other file, which :func:`~polysrl_dc.sources.read_structure` reads or refuses.

    Raises
    ------
    InvalidInputError
        A JSON file of more than 256 MiB, unpacked.

    Examples
    --------
    >>> listed_structures("salt.cif", "salt.cif")
    {}
    """
    if not (Path(path).is_file() and {".json", ".mson"} & set(Path(path.lower()).suffixes)):
        return {}
    content = unpacked(path, _LARGEST_LIST)
    try:
        given = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return {f"{name}:{i}": each for i, each in enumerate(given)} if isinstance(given, list) else {}


def read_structures(paths: Sequence[str], on_error: str) -> dc.data.Dataset:
    """Structure graphs of one source of PolymorphDataset, or of files of structures.

    Parameters
    ----------
    paths : sequence of str
        Several are files.
    on_error : {"raise", "skip"}

    Returns
    -------
    PolymorphDataset, or dc.data.Dataset of structure graphs

    Raises
    ------
    InvalidInputError
        A bad source or structure, which is named, or no usable one.
    """
    skipped: list[tuple[str, str]] = []
    dataset: dc.data.Dataset
    if len(paths) == 1:
        listed = listed_structures(paths[0], Path(paths[0]).name)
        source = pd.Series(listed, dtype=object) if listed else paths[0]
        dataset = PolymorphDataset(source, on_error=on_error)
        skipped = dataset.skipped
    else:
        for path in paths:
            if Path(path).is_dir() or path.lower().endswith(".parquet"):
                raise InvalidInputError(
                    f"{path} is one of {len(paths)} sources: give one table or one folder alone, "
                    "or files of one structure, or a JSON list, each"
                )
        structures: dict[str, Any] = {}
        for path in tqdm(paths, unit="file", disable=None):
            try:
                listed = listed_structures(path, path)
                structures |= listed or {path: read_structure(path)}
            except InvalidInputError as error:
                if on_error == "raise":
                    raise InvalidInputError(f"{path}: {error}") from error
                skipped.append((path, str(error)))
        featurizer = StructureGraphFeaturizer(on_error=on_error)
        graphs = featurizer.featurize(pd.Series(structures, dtype=object))
        dataset = dc.data.NumpyDataset(graphs, ids=np.array(list(structures), dtype=object))
        dataset = drop_skipped(dataset) if structures else dataset
    _say_skipped([f"{name}: {message}" for name, message in skipped], "structures")
    if len(dataset) == 0:
        raise InvalidInputError("no usable structure is left")
    return dataset


def _ungrouped(column: pd.Series) -> dict[Hashable, str]:
    """What is wrong with the fields that name no group: row -> a sentence."""
    wrong = {}
    for row, value in column.items():
        if not pd.api.types.is_scalar(value):
            wrong[row] = f"row {row}: {column.name} is {value!r}, not a name or number"
        elif pd.isna(value) or value in MISSING:
            wrong[row] = f"row {row}: {column.name} is {value!r}, which means that it is missing"
    return wrong


def at_most(k: int, n: int, what: str) -> int:
    """``-k``, or the number there is if that is less, which is said."""
    if n < k:
        print(f"only {number_of(n, what)}: fewer than -k {k}", file=sys.stderr)
    return min(k, n)


def number_of(n: int, what: str) -> str:
    """A number and what is counted, as text."""
    return f"{n:,} {what}{'' if n == 1 else 's'}"
