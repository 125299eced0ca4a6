"""What pretraining may see of the labelled data sets: their formulas, and DFT labels."""

from __future__ import annotations

from pathlib import Path

import deepchem as dc
import pandas as pd
from folds import group_key
from targets import wetlab_targets
from tasks import MATBENCH_TASKS, load_task, task_inputs

from polysrl_dc import StoichiometryGraphFeaturizer
from polysrl_dc.datasets import drop_skipped

EXCLUDED = ("wetlab", "matbench", "wetlab+matbench", "test-folds")


def labelled_formulas(data_dir: str | Path, which: str) -> set[str]:
    """Reduced formulas of labelled data sets.

    Parameters
    ----------
    data_dir : path
        Layout of the shared data.
    which : {"wetlab", "matbench", "wetlab+matbench", "test-folds"}
        The nine wet-lab targets, the 13 Matbench tasks or both; ``test-folds``: only those of
        fold 0's test part of the two Materials Project tasks, for pretraining on DFT labels.
    """
    formulas: set[str] = set()
    if "wetlab" in which:
        for target in wetlab_targets(data_dir):
            formulas |= set(target.formulas)
    if "matbench" in which:
        for name in MATBENCH_TASKS:
            formulas |= set(_compositions(data_dir, name))
    if which == "test-folds":
        for name in ("matbench_mp_gap", "matbench_mp_e_form"):
            formulas |= set(task_inputs(load_task(name, data_dir), 0)[2])
    return {group_key(formula) for formula in formulas}


def mp_property_dataset(
    name: str, data_dir: str | Path, exclude: str | None = None
) -> dc.data.Dataset:
    """Formulas and DFT labels of a Matbench table, one row per formula: that of lowest energy.

    Matbench's table of band gaps has no energies, so the mean over the polymorphs is taken there.

    Parameters
    ----------
    name : {"matbench_mp_gap", "matbench_mp_e_form"}
    data_dir : path
    exclude : str, optional
        As ``which`` of :func:`labelled_formulas`.
    """
    table = _table(data_dir, name)
    target = next(column for column in table if column not in _KEYS)
    keys = table["composition"].map(group_key)
    if exclude:
        kept = ~keys.isin(labelled_formulas(data_dir, exclude))
        table, keys = table[kept], keys[kept]
    grouped = table.groupby(keys.to_numpy(), sort=True)[target]
    labels = grouped.min() if name == "matbench_mp_e_form" else grouped.mean()
    graphs = StoichiometryGraphFeaturizer(on_error="skip").featurize(labels.index.to_numpy())
    return drop_skipped(dc.data.NumpyDataset(graphs, labels.to_numpy(float), ids=labels.index))


_KEYS = ("mbid", "composition", "space_group_number")


def _table(data_dir: str | Path, name: str) -> pd.DataFrame:
    return pd.read_csv(
        Path(data_dir) / "matbench" / f"{name}.csv.gz", converters={"composition": str}
    )


def _compositions(data_dir: str | Path, name: str) -> pd.Series:
    return _table(data_dir, name)["composition"]
