"""What pretraining may see of the labelled data sets: their formulas, and DFT labels."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd
from folds import group_key
from graph_data import Dataset, graph_dataset
from targets import matbench_target, wetlab_targets
from tasks import MATBENCH_TASKS, load_task, task_inputs

from polysrl_dc.checkpoints import checkpoint_path, load_checkpoint
from polysrl_dc.errors import InvalidInputError

#: Models pretrained on DFT labels, and the table of these.
MP_PROPERTIES = {"mp_band_gap": "matbench_mp_gap", "mp_formation_energy": "matbench_mp_e_form"}
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
        for name in MP_PROPERTIES.values():
            formulas |= set(task_inputs(load_task(name, data_dir), 0)[2])
    return {group_key(formula) for formula in formulas}


def mp_property_dataset(name: str, data_dir: str | Path, exclude: str | None = None) -> Dataset:
    """Formulas and DFT labels of a Matbench table, one row per formula.

    Parameters
    ----------
    name : {"matbench_mp_gap", "matbench_mp_e_form"}
        Values as :func:`targets.matbench_target` has them: of the stable polymorph.
    data_dir : path
    exclude : str, optional
        As ``which`` of :func:`labelled_formulas`.
    """
    target = matbench_target(name, data_dir)
    excluded = labelled_formulas(data_dir, exclude) if exclude else set()
    kept = np.array([formula not in excluded for formula in target.formulas])
    return graph_dataset(target.formulas[kept], target.values[kept])


def has_learned(encoder: str | Path, task: str, folds: Iterable[int]) -> bool:
    """Whether ``pretrain.py`` trained an encoder on labels of test rows of a Matbench task.

    Parameters
    ----------
    encoder : str or path
        Name, folder or file; its manifest tells.
    task : str
    folds : iterable of int
        Whose test rows are scored.

    Examples
    --------
    >>> has_learned("formation-energy-mp", "matbench_mp_e_form", [0])
    True
    >>> has_learned("formation-energy-mp", "matbench_jdft2d", [0])
    False
    """
    _, manifest = load_checkpoint(checkpoint_path(encoder))
    data = manifest.get("provenance", {}).get("data", {})
    spared = data.get("excluded") == "test-folds" and set(folds) == {0}
    return data.get("labels") == task and not spared


def refuse_learned(encoder: str | Path, task: str, folds: Iterable[int]) -> None:
    """Raise InvalidInputError if :func:`has_learned`."""
    if has_learned(encoder, task, folds):
        raise InvalidInputError(
            f"{encoder} was pretrained on labels of test rows of {task}: no score there is fair"
        )


def _compositions(data_dir: str | Path, name: str) -> pd.Series:
    path = Path(data_dir) / "matbench" / f"{name}.csv.gz"
    return pd.read_csv(path, converters={"composition": str})["composition"]
