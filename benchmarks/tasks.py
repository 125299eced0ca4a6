"""The benchmark tasks: Matbench v0.1 and an embedded suite that needs no download.

``load_task("matbench_jdft2d")`` gives a real ``matbench.task.MatbenchTask`` with Matbench's own
folds and scoring; ``load_task("embedded_seebeck")`` gives a task of the same kind built on the DFT
transport table that is packaged inside matminer. Both hold compositions only.
"""

from __future__ import annotations

import functools
import hashlib
import io
import os
import tarfile
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import matbench.metadata
import numpy as np
import pandas as pd
from downloads import load_official
from files import LARGEST, one_line
from matbench.constants import REG_KEY, STRUCTURE_KEY
from matbench.task import MatbenchTask
from matbench.util import RecursiveDotDict
from pymatgen.core import Composition
from sklearn.model_selection import KFold

from polysrl_dc.errors import InvalidInputError
from polysrl_dc.sources import unpacked

MATBENCH_TASKS: tuple[str, ...] = tuple(sorted(matbench.metadata.mbv01_metadata))
PAPER_TASKS = (
    "matbench_perovskites",
    "matbench_dielectric",
    "matbench_log_gvrh",
    "matbench_log_kvrh",
    "matbench_jdft2d",
    "matbench_mp_gap",
    "matbench_mp_e_form",
)
EMBEDDED_KEY = "embedded_v0.1"
WETLAB_KEY = "wetlab_v0.1"
FOLD_RULE_KEYS = {"embedded": EMBEDDED_KEY, "wetlab": WETLAB_KEY, "paper": "paper_v0.1"}
"""Names of the benchmarks outside Matbench by the suite that begins the names of their tasks."""
EMBEDDED_FORMULAS = 5000
"""Formulas kept by the embedded suite, so that all its folds run in minutes on two cores."""
FOLD_SEED = 18012019
"""Matbench's own seed: its folds are KFold(5, shuffle=True) in row order with this state."""


class DataNotFoundError(FileNotFoundError):
    """The data of a task is nowhere: one line says what is missing and how to get it."""


@dataclass(frozen=True)
class EmbeddedTarget:
    """A target of the embedded suite: its column, unit, and transform of the packaged value."""

    column: str
    name: str
    unit: str
    transform: Callable[[np.ndarray], np.ndarray]


EMBEDDED_TARGETS = {
    "embedded_seebeck": EmbeddedTarget("S_p", "S_p", "uV/K", lambda values: values),
    "embedded_log_conductivity": EmbeddedTarget(
        "sigma_p", "log10(sigma_p)", "log10(S/m per fs)", np.log10
    ),
}


class FoldRuleTask(MatbenchTask):
    """A regression task outside Matbench v0.1 that follows Matbench's fold rule and file format.

    The ids are ``<prefix>-<task>-<number>`` in row order, and the folds are
    ``KFold(5, shuffle=True, random_state=18012019)`` over the rows, so a record of such a task is
    checked from the number of its samples alone.

    Parameters
    ----------
    dataset_name : str
        The task's name, which starts with its suite: ``embedded_seebeck``.
    benchmark : str
        ``embedded_v0.1`` or ``wetlab_v0.1``.
    metadata : dict
        ``input_type``, ``target``, ``task_type``, ``unit``, ``mad`` and ``n_samples``.
    df : pandas.DataFrame, optional
        (n_samples, 2): the composition and the target, rows in the order of the ids.

    Examples
    --------
    >>> task = FoldRuleTask("wetlab_x", WETLAB_KEY, fold_rule_metadata("y", "eV", [1.0] * 10))
    >>> task.validation.fold_0.test
    ['wl-x-0002', 'wl-x-0010']
    """

    def __init__(
        self,
        dataset_name: str,
        benchmark: str,
        metadata: dict[str, Any],
        df: pd.DataFrame | None = None,
    ) -> None:
        ids = fold_rule_ids(dataset_name, int(metadata["n_samples"]))
        self.dataset_name = dataset_name
        self.benchmark_name = benchmark
        self.info = f"{dataset_name}: {metadata['target']} ({metadata['unit']})"
        self.metadata = RecursiveDotDict(dict(metadata))
        splits = KFold(5, shuffle=True, random_state=FOLD_SEED).split(ids)
        self.validation = RecursiveDotDict(
            {
                f"fold_{fold}": {
                    "train": [ids[i] for i in train],
                    "test": [ids[i] for i in test],
                }
                for fold, (train, test) in enumerate(splits)
            }
        )
        self.folds_keys = list(self.validation)
        self.folds_nums = list(range(len(self.folds_keys)))
        self.folds_map = dict(zip(self.folds_nums, self.folds_keys, strict=True))
        self.folds = self.folds_nums
        self.results = RecursiveDotDict({})
        self.df = None if df is None else df.set_axis(pd.Index(ids, name="mbid"), axis=0)


def fold_rule_ids(dataset_name: str, n_samples: int) -> list[str]:
    """The ids of a task outside Matbench: ``em-seebeck-00001`` and so on."""
    prefix = {"embedded": "em", "wetlab": "wl", "paper": "pm"}
    suite, _, rest = dataset_name.partition("_")
    stem = f"{prefix.get(suite, suite)}-{rest.replace('_', '-')}"
    digits = 4 if suite == "wetlab" else 5
    return [f"{stem}-{number:0{digits}d}" for number in range(1, n_samples + 1)]


def fold_rule_metadata(target: str, unit: str, values: Iterable[float]) -> dict[str, Any]:
    """Metadata of a regression task; ``mad`` is the mean absolute deviation of the target."""
    array = np.asarray(list(values), dtype=float)
    return {
        "input_type": "composition",
        "target": target,
        "task_type": "regression",
        "unit": unit,
        "mad": float(np.abs(array - array.mean()).mean()),
        "n_samples": len(array),
    }


def full_name(
    name: str, known: Iterable[str] = (*MATBENCH_TASKS, *EMBEDDED_TARGETS), what: str = "task"
) -> str:
    """The full name of a task, which may be given without its ``matbench_`` prefix.

    Parameters
    ----------
    name : str
    known : iterable of str
        Full names; by default those of all tasks.
    what : str
        They name, for the message.

    Raises
    ------
    ValueError
        When none is known by this name; the message lists them.

    Examples
    --------
    >>> full_name("jdft2d")
    'matbench_jdft2d'
    """
    names = list(known)
    for candidate in (name, f"matbench_{name}", f"embedded_{name}"):
        if candidate in names:
            return candidate
    raise ValueError(f"no {what} is named {name!r}; the {what}s are: {', '.join(names)}")


def find_data_dir(data_dir: str | Path | None = None) -> Path | None:
    """The data folder: the one given, else the one named by ``POLYSRL_DATA``, else ``None``.

    Raises
    ------
    DataNotFoundError
        When the folder that was named does not exist.
    """
    named = data_dir or os.environ.get("POLYSRL_DATA")
    if not named:
        return None
    path = Path(named)
    if not path.is_dir():
        raise DataNotFoundError(f"the data folder {path} does not exist")
    return path


def required_data_dir(data_dir: str | Path | None = None, needed: str = "data") -> Path:
    """The data folder as :func:`find_data_dir` finds it; the error says what is needed from it.

    Raises
    ------
    DataNotFoundError
        None was named, or it does not exist.
    """
    if (folder := find_data_dir(data_dir)) is None:
        raise DataNotFoundError(f"no {needed}: pass --data-dir or set POLYSRL_DATA")
    return folder


def structures_path(
    structures: str | Path | None = None, data_dir: str | Path | None = None
) -> str | Path:
    """Source of crystal structures: the one given, else ``mp/structures.parquet`` of the data.

    Raises
    ------
    DataNotFoundError
        Neither is known, or the folder that was named does not exist.
    """
    if structures:
        return structures
    return required_data_dir(data_dir, "structures") / "mp" / "structures.parquet"


def load_task(name: str, data_dir: str | Path | None = None) -> MatbenchTask:
    """A task with its data, indexed by id, holding composition strings.

    Parameters
    ----------
    name : str
        One of the 13 Matbench names, with or without prefix, or an embedded one.
    data_dir : path, optional
        Folder with ``matbench/matbench_<task>.csv.gz``. Without that file matminer's cache is
        used, and then the download that matminer describes.

    Raises
    ------
    DataNotFoundError
        When the data is in none of the three places.
    ValueError
        When the name is unknown, the file is damaged, the ids are not those of Matbench's own
        folds, or the mean absolute deviation of the target is not the one Matbench gives.
    """
    name = full_name(name)
    return _embedded_task(name) if name in EMBEDDED_TARGETS else _matbench_task(name, data_dir)


def task_inputs(task: MatbenchTask, fold: int) -> tuple[list[str], np.ndarray, list[str]]:
    """Training formulas, training targets (n,) and test formulas of a fold."""
    inputs, targets = task.get_train_and_val_data(fold)
    tests = task.get_test_data(fold)
    return list(inputs), np.asarray(targets, dtype=float), list(tests)


def _matbench_task(name: str, data_dir: str | Path | None) -> MatbenchTask:
    task = MatbenchTask(name, autoload=False)
    column, target = task.metadata.input_type, task.metadata.target
    folder = find_data_dir(data_dir)
    source = None if folder is None else folder / "matbench" / f"{name}.csv.gz"
    if source is not None and source.is_file():
        table = _local_table(source, target).rename(columns={"composition": column})
    else:
        table = _official_table(name, source)
        if column == STRUCTURE_KEY:
            table[column] = [structure.composition.formula for structure in table[column]]
    folds = task.validation.fold_0
    if sorted(table.index) != sorted([*folds.train, *folds.test]):
        raise ValueError(f"{name}: the ids of the data are not those of Matbench's own folds")
    if task.metadata.task_type == REG_KEY:
        mad = float(np.abs(table[target] - table[target].mean()).mean())
        if not np.isclose(mad, task.metadata.mad, rtol=0.01):
            raise ValueError(f"{name}: the deviation of {target} is {mad}, not {task.metadata.mad}")
    task.df = table
    return task


def _local_table(source: Path, target: str) -> pd.DataFrame:
    """Composition and target by id, from a file laid out as ``load_task`` says."""
    text = io.BytesIO(unpacked(source, LARGEST))
    kinds = {"composition": str}
    try:
        table = pd.read_csv(text, index_col="mbid", dtype=kinds, na_filter=False)
        return table[["composition", target]]
    except (KeyError, ValueError) as error:
        raise InvalidInputError(
            f"{source} is no table of mbid, composition and {target}: {error}"
        ) from error


def _official_table(name: str, source: Path | None) -> pd.DataFrame:
    """The table from matminer's cache or, failing that, from its download."""
    try:
        return load_official(name)
    except InvalidInputError:
        raise
    except Exception as error:  # a download fails in many ways; each means the data is missing
        where = f"{source}, nor" if source else "POLYSRL_DATA or --data-dir (neither is set), nor"
        raise DataNotFoundError(
            f"{name}: no data in {where} in matminer's cache, and no download "
            f"({one_line(error)}); get it with a network connection by "
            f"python -c \"from matminer.datasets import load_dataset; load_dataset('{name}')\""
        ) from error


@functools.lru_cache(maxsize=1)
def embedded_table(n_formulas: int = EMBEDDED_FORMULAS) -> tuple[pd.DataFrame, dict[str, int]]:
    """The DFT transport table packaged inside matminer, one row per reduced formula.

    Source: Ricci et al., Scientific Data 4, 170085 (2017): 47,737 Materials Project compounds.
    The packaged archive is read where it is; nothing is extracted. Columns used: ``S_p`` (Seebeck
    coefficient, p-type, in uV/K) and ``sigma_p`` (electrical conductivity, p-type, in S/m for a
    constant relaxation time of 1 fs, that is sigma/tau in 1e15 1/(ohm m s)). The package states
    no units. These follow from the table itself: its effective mass is n e^2 tau / sigma for
    n = 1e18 1/cm^3 and tau = 1 fs, its power factor in uW/(m K^2) is S^2 sigma, and for metals
    kappa / sigma is the Wiedemann-Franz value at 300 K.

    Rows are dropped when their formula does not parse, or a value is not finite, or the
    conductivity is not positive. Polymorphs become one row: the median of each column. Then the
    ``n_formulas`` formulas with the smallest SHA-256 of their name are kept, in the order of the
    table: a sample without regard to chemistry, the same everywhere.

    Returns
    -------
    table : pandas.DataFrame
        ``composition``, ``S_p``, ``sigma_p``.
    counts : dict
        ``rows``, ``unusable``, ``formulas``, ``kept``.
    """
    archive = files("matminer") / "utils" / "data_files" / "mp_transport"
    with (archive / "transport_database.tar.xz").open("rb") as packed:
        with tarfile.open(fileobj=packed, mode="r:xz") as tar:
            member = tar.extractfile("transport_database.csv")
            if member is None:
                raise DataNotFoundError("matminer's transport_database.tar.xz holds no table")
            raw = pd.read_csv(member, na_filter=False)
    columns = [target.column for target in EMBEDDED_TARGETS.values()]
    values = raw[columns].apply(pd.to_numeric, errors="coerce")
    formulas = pd.Series([_reduced(formula) for formula in raw["pretty_formula"]])
    usable = formulas.notna() & np.isfinite(values).all(axis=1) & (values["sigma_p"] > 0)
    grouped = values[usable].groupby(formulas[usable], sort=False).median()
    order = sorted(grouped.index, key=lambda f: hashlib.sha256(f.encode()).hexdigest())
    table = grouped[grouped.index.isin(order[:n_formulas])].rename_axis("composition")
    counts = {
        "rows": len(raw),
        "unusable": int((~usable).sum()),
        "formulas": len(grouped),
        "kept": len(table),
    }
    return table.reset_index(), counts


def _reduced(formula: str) -> str | None:
    """Reduced formula, or ``None`` when it is no formula of real elements."""
    try:
        composition = Composition(formula)
    except ValueError:
        return None
    if not composition.valid or not composition:
        return None
    with warnings.catch_warnings():  # noble gases have no electronegativity to sort by
        warnings.filterwarnings("ignore", message="No Pauling electronegativity")
        return composition.reduced_formula


def embedded_note() -> str:
    """One line that says which rows of the packaged table the embedded suite uses."""
    counts = embedded_table()[1]
    return (
        f"{counts['rows']:,} rows of matminer's transport table, {counts['unusable']:,} unusable "
        f"ones dropped, {counts['formulas']:,} formulas (median over polymorphs), "
        f"{counts['kept']:,} of them kept by the hash of their name"
    )


def _embedded_task(name: str) -> FoldRuleTask:
    target = EMBEDDED_TARGETS[name]
    table = embedded_table()[0]
    values = target.transform(table[target.column].to_numpy())
    metadata = fold_rule_metadata(target.name, target.unit, values)
    df = pd.DataFrame({"composition": table["composition"], target.name: values})
    return FoldRuleTask(name, EMBEDDED_KEY, metadata, df)


def default_tasks(suite: str) -> tuple[str, ...]:
    """The tasks a suite runs when none is named."""
    return PAPER_TASKS if suite == "matbench" else tuple(EMBEDDED_TARGETS)
