"""The paper's prediction targets: nine from the wet lab, and seven Matbench tasks as it uses them.

Values carry the paper's transform (Section 5.1, Appendix C); ``scale`` is the factor of its tables
("we report MAE values multiplied by 10"), and ``account`` says what became of every row.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from downloads import load_dataset
from files import one_line
from folds import group_key, readable
from sklearn.model_selection import GroupKFold, KFold, train_test_split
from tasks import (
    FOLD_RULE_KEYS,
    FOLD_SEED,
    PAPER_TASKS,
    DataNotFoundError,
    FoldRuleTask,
    fold_rule_metadata,
    load_task,
)

from polysrl_dc.errors import InvalidInputError

N_FOLDS = 5
#: The tasks of Matbench on which a peer can be trained in hours: at most 18,928 rows.
SMALL_TASKS = tuple(name for name in PAPER_TASKS if not name.startswith("matbench_mp_"))
#: Part of a training fold that 72/8/20 keeps for validation.
HELD_BACK = 0.1
#: Parts of the training folds of learning curves.
PARTS = {"10%": 0.1, "25%": 0.25, "50%": 0.5}
WETLAB_SOURCES = {
    "expt_gap": "matminer",
    "expt_formation_enthalpy": "matminer",
    "metallic_glass_trg": "figshare 7017254, Trg of the MAST-ML education datasets",
    "estm": "ESTM of Na & Chang, npj Computational Materials 8, 214 (2022)",
}
Splits = list[tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Target:
    """Formulas and values of one target.

    Attributes
    ----------
    name, unit : str
    formulas : numpy.ndarray, shape (n,), str
    values : numpy.ndarray, shape (n,), float64
    scale : float
        Reported errors are multiplied by it.
    batch_size : int
        Of both protocols, for which the paper names none: 128, of ESTM 32.
    account : str
        How the rows of the source became these.
    suite : {"wetlab", "paper"}
        ``paper``: a Matbench task as the paper uses it.
    held_back : float
        Part of each training fold that is left unused: 72/8/20 of the Matbench tasks has a
        validation part of 8 %, which the representation protocol does not need; the transfer
        protocol validates on a fifth of the rest, as on the other targets.
    publications : numpy.ndarray, shape (n,), str, or None
        Where each row was published (a DOI), if the source says so.
    """

    name: str
    unit: str
    formulas: np.ndarray
    values: np.ndarray
    scale: float
    batch_size: int
    account: str = ""
    suite: str = field(default="wetlab", kw_only=True)
    held_back: float = field(default=0.0, kw_only=True)
    publications: np.ndarray | None = field(default=None, kw_only=True)

    @property
    def task(self) -> FoldRuleTask:
        """The target as a task in Matbench's format: ids ``wl-band-gap-0001``, Matbench's folds."""
        frame = pd.DataFrame({"composition": self.formulas, self.name: self.values})
        metadata = fold_rule_metadata(self.name, self.unit, self.values)
        name, benchmark = f"{self.suite}_{self.name}", FOLD_RULE_KEYS[self.suite]
        return FoldRuleTask(name, benchmark, metadata, frame)

    @property
    def compositions(self) -> list[str]:
        """The reduced formula of each row."""
        return [group_key(formula) for formula in self.formulas]

    def splits(self, groups: Sequence[str] | np.ndarray | None = None) -> Splits:
        """Training and test rows of five folds, the same for every model and seed.

        Parameters
        ----------
        groups : sequence of str, shape (n,), optional
            Labels none of which is on both sides, such as ``compositions`` or ``publications``.
            Default: Matbench's rule, ``KFold(5, shuffle=True, random_state=18012019)``.
        """
        if groups is not None:
            splitter = GroupKFold(N_FOLDS, shuffle=True, random_state=FOLD_SEED)
            return list(splitter.split(self.values, groups=groups))
        folds = list(KFold(N_FOLDS, shuffle=True, random_state=FOLD_SEED).split(self.values))
        if not self.held_back:
            return folds
        return [
            (np.sort(train_test_split(a, test_size=self.held_back, random_state=FOLD_SEED)[0]), b)
            for a, b in folds
        ]


def wetlab_targets(data_dir: str | Path | None) -> list[Target]:
    """All nine wet-lab targets of Table 1.

    Band gap: zero gaps left out, measurements averaged per formula. Formation enthalpy: averaged
    per formula. ESTM at 295 to 305 K and 593 to 608 K, every row kept: natural logarithm of the
    conductivities, Seebeck coefficient scaled to 0 ... 1 by the least and greatest value of the
    whole set, as the paper reports it.

    Parameters
    ----------
    data_dir : path, optional
        Folder with ``wetlab/*.csv``; two of the four tables are also downloaded by matminer.

    Raises
    ------
    DataNotFoundError
        A table is neither there nor downloaded; the line says where it comes from.
    """
    gaps = _wetlab_table("expt_gap", data_dir)
    zero = gaps["gap expt"] == 0
    parsed = gaps["formula"].map(readable)
    enthalpies = _wetlab_table("expt_formation_enthalpy", data_dir)
    metallic = _wetlab_table("metallic_glass_trg", data_dir)
    targets = [
        _averaged(
            "band_gap",
            "eV",
            gaps[~zero & parsed],
            ("formula", "gap expt"),
            1.0,
            f"{len(gaps):,} measurements, {zero.sum():,} of no gap and "
            f"{(~parsed & ~zero).sum()} without a formula left out",
        ),
        _averaged(
            "formation_enthalpy",
            "eV/atom",
            enthalpies.dropna(subset=["e_form expt"]),
            ("formula", "e_form expt"),
            10.0,
            f"{len(enthalpies):,} rows, {enthalpies['e_form expt'].isna().sum()} without a "
            "measurement left out",
        ),
        _averaged(
            "metallic",
            "1",
            metallic.dropna(subset=["Trg"]),
            ("Material compositions", "Trg"),
            10.0,
            f"{len(metallic)} alloys, {metallic['Trg'].isna().sum()} without a value left out",
        ),
    ]
    for kelvin in (300, 600):
        rows = estm_rows(data_dir, kelvin)
        account = (
            f"{len(rows)} rows of ESTM at {rows['temperature'].min():.0f} to "
            f"{rows['temperature'].max():.0f} K, all kept "
            f"({rows['Formula'].nunique()} formulas)"
        )
        seebeck = rows["seebeck_coefficient"]
        low, high = seebeck.min(), seebeck.max()
        for name, unit, values, scale, how in (
            ("electrical_conductivity", "ln S/m", np.log(rows["electrical_conductivity"]), 1.0, ""),
            ("thermal_conductivity", "ln W/mK", np.log(rows["thermal_conductivity"]), 1.0, ""),
            (
                "seebeck",
                "1",
                (seebeck - low) / (high - low),
                10.0,
                f"; {low:g} to {high:g} µV/K of the whole set become 0 to 1",
            ),
        ):
            targets.append(
                Target(
                    f"estm{kelvin}_{name}",
                    unit,
                    rows["Formula"].to_numpy(str),
                    values.to_numpy(float),
                    scale,
                    32,
                    account + how,
                    publications=rows["reference"].to_numpy(str),
                )
            )
    return targets


def estm_rows(data_dir: str | Path | None, kelvin: int) -> pd.DataFrame:
    """Rows of ESTM near a temperature, in the order of the targets at it.

    Parameters
    ----------
    data_dir : path, optional
    kelvin : {300, 600}

    Returns
    -------
    pandas.DataFrame
        ``Formula, temperature`` (K), ``seebeck_coefficient`` (µV/K), ``electrical_conductivity``
        (S/m), ``thermal_conductivity`` (W/mK), ``ZT`` and others.
    """
    low, high = {300: (295, 305), 600: (593, 608)}[kelvin]
    table = _wetlab_table("estm", data_dir).rename(columns=lambda name: name.partition("(")[0])
    return table[table["temperature"].between(low, high)].reset_index(drop=True)


#: Transform, its unit, and factor of the paper's Table 6, which states none of them; they follow
#: from the size of its errors.
MATBENCH_TRANSFORMS: dict[str, tuple[Callable[[np.ndarray], np.ndarray], str, float]] = {
    "matbench_perovskites": (np.asarray, "eV/unit cell", 1.0),
    "matbench_dielectric": (np.asarray, "1", 1.0),
    "matbench_log_gvrh": (np.asarray, "log10 GPa", 1.0),
    "matbench_log_kvrh": (np.asarray, "log10 GPa", 10.0),
    "matbench_jdft2d": (np.log, "ln meV/atom", 1.0),
    "matbench_mp_gap": (np.asarray, "eV", 1.0),
    "matbench_mp_e_form": (np.asarray, "eV/atom", 1.0),
}


def matbench_target(name: str, data_dir: str | Path | None) -> Target:
    """A Matbench task as the paper uses it (Appendix F.2): one row per reduced formula, 72/8/20.

    The value of a formula is that of its polymorph of lowest formation energy for the two tasks
    of Materials Project, and the mean for the others. The band gaps carry no energies: it is the
    mean of the rows in the space group that is lowest in ``matbench_mp_e_form`` (one row for nearly
    all formulas), or of all rows where that one is missing.

    Parameters
    ----------
    name : str
        One of the seven, e.g. ``matbench_jdft2d``.
    data_dir : path, optional
    """
    transform, unit, scale = MATBENCH_TRANSFORMS[name]
    task = load_task(name, data_dir)
    table = task.df.rename(columns={task.metadata.target: "value"})
    keys = table[task.metadata.input_type].map(group_key)
    known = keys.map(readable)
    table, keys = table[known], keys[known]
    how = "mean"
    by_formula = table.groupby(keys.to_numpy(), sort=True)["value"]
    if name == "matbench_mp_e_form":
        values, how = by_formula.min(), "lowest"
    elif name == "matbench_mp_gap":
        lowest = _lowest_space_groups(data_dir)
        found = _space_groups(name, data_dir).reindex(keys.index) == keys.map(lowest)
        stable = table["value"][found].groupby(keys[found].to_numpy())
        values = by_formula.mean()
        values.update(stable.mean())
        how = (
            f"polymorph of lowest formation energy; {(stable.size() > 1).sum():,} the mean of its "
            f"space group, {len(values) - len(stable):,} of all rows"
        )
    else:
        values = by_formula.mean()
    account = (
        f"{len(known):,} rows, {(~known).sum()} with an element without features left out, "
        f"{len(values):,} formulas ({how})"
    )
    return Target(
        name,
        unit,
        values.index.to_numpy(str),
        transform(values.to_numpy(float)),
        scale,
        128,
        account,
        suite="paper",
        held_back=HELD_BACK,
    )


def matbench_targets(
    data_dir: str | Path | None, names: Sequence[str] = PAPER_TASKS
) -> list[Target]:
    """The seven tasks of Table 6, or some of them."""
    return [matbench_target(name, data_dir) for name in names]


def small_targets(data_dir: str | Path | None) -> list[Target]:
    """Those of :data:`SMALL_TASKS`."""
    return matbench_targets(data_dir, SMALL_TASKS)


@functools.lru_cache(maxsize=1)
def _lowest_space_groups(data_dir: str | Path | None) -> dict[str, int]:
    """Space group of the polymorph of lowest formation energy, by reduced formula."""
    name = "matbench_mp_e_form"
    task = load_task(name, data_dir)
    order = task.df[task.metadata.target].sort_values().index
    keys = task.df[task.metadata.input_type].map(group_key)
    groups = _space_groups(name, data_dir)
    return groups.reindex(order).groupby(keys[order].to_numpy()).first().to_dict()


def _space_groups(name: str, data_dir: str | Path | None) -> pd.Series:
    """Space group number by id; none without the data folder."""
    if data_dir is None:
        return pd.Series(dtype=float)
    path = Path(data_dir) / "matbench" / f"{name}.csv.gz"
    return pd.read_csv(path, index_col="mbid")["space_group_number"]


def _wetlab_table(name: str, data_dir: str | Path | None) -> pd.DataFrame:
    path = None if data_dir is None else Path(data_dir) / "wetlab" / f"{name}.csv"
    if path is not None and path.is_file():
        return pd.read_csv(path, na_filter=True, keep_default_na=False, na_values=[""])
    source = WETLAB_SOURCES[name]
    if source == "matminer":
        try:
            return load_dataset(name)
        except InvalidInputError:
            raise
        except Exception as error:  # a download fails in many ways; each means the data is missing
            source = f"matminer, without a download ({one_line(error)})"
    raise DataNotFoundError(
        f"{path or f'wetlab/{name}.csv'} is missing; pass --data-dir or set POLYSRL_DATA "
        f"(source: {source})"
    )


def _averaged(
    name: str,
    unit: str,
    rows: pd.DataFrame,
    columns: tuple[str, str],
    scale: float,
    account: str,
) -> Target:
    """A target of one value per formula: the mean of its rows, in the order of first appearance."""
    values = rows.groupby(columns[0], sort=False)[columns[1]].mean()
    averaged = len(rows) - len(values)
    return Target(
        name,
        unit,
        values.index.to_numpy(str),
        values.to_numpy(float),
        scale,
        128,
        f"{account}, {averaged:,} averaged away: {len(values):,} formulas",
    )
