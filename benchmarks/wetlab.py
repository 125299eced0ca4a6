"""The nine wet-lab targets of the paper (Section 5.1, Appendix C) from their raw files.

Targets are in the units of the raw files after the paper's transform; ``scale`` is the factor of
the paper's tables ("we report MAE values multiplied by 10").
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd


@dataclass(frozen=True)
class WetlabTarget:
    """Formulas and values of one target.

    Attributes
    ----------
    name, unit : str
    formulas : numpy.ndarray, shape (n,), str
    values : numpy.ndarray, shape (n,), float64
    scale : float
        Reported errors are multiplied by it.
    batch_size : int
        Of the representation protocol (Appendix E; DESIGN: 32 for ESTM).
    """

    name: str
    unit: str
    formulas: np.ndarray
    values: np.ndarray
    scale: float
    batch_size: int


def wetlab_targets(data_dir: str | Path) -> list[WetlabTarget]:
    """Read all nine targets.

    Band gap: non-zero gaps averaged per formula. Formation enthalpy: measured values averaged per
    formula. ESTM at 295 to 305 K and 593 to 608 K: natural logarithm of the conductivities,
    Seebeck coefficient scaled to 0 ... 1 over the whole set, as the paper reports it.
    """
    folder = Path(data_dir) / "wetlab"
    gaps = pd.read_csv(folder / "expt_gap.csv")
    gaps = gaps[(gaps["gap expt"] != 0) & (gaps["formula"] != "GaAs0.1P0.9G1128")]
    enthalpies = pd.read_csv(folder / "expt_formation_enthalpy.csv").dropna(subset=["e_form expt"])
    metallic = pd.read_csv(folder / "metallic_glass_trg.csv").dropna(subset=["Trg"])
    targets = [
        _target("band_gap", "eV", _averaged(gaps, "formula", "gap expt"), 1.0, 128),
        _target(
            "formation_enthalpy",
            "eV/atom",
            _averaged(enthalpies, "formula", "e_form expt"),
            10.0,
            128,
        ),
        _target("metallic", "1", metallic.set_index("Material compositions")["Trg"], 10.0, 128),
    ]
    estm = pd.read_csv(folder / "estm.csv").rename(columns=lambda name: name.partition("(")[0])
    for kelvin, low, high in ((300, 295, 305), (600, 593, 608)):
        rows = estm[estm["temperature"].between(low, high)].set_index("Formula")
        seebeck = rows["seebeck_coefficient"]
        seebeck = (seebeck - seebeck.min()) / (seebeck.max() - seebeck.min())
        for name, unit, values, scale in (
            ("electrical_conductivity", "ln S/m", np.log(rows["electrical_conductivity"]), 1.0),
            ("thermal_conductivity", "ln W/mK", np.log(rows["thermal_conductivity"]), 1.0),
            ("seebeck", "1", seebeck, 10.0),
        ):
            targets.append(_target(f"estm{kelvin}_{name}", unit, values, scale, 32))
    return targets


def _averaged(table: pd.DataFrame, formula: str, value: str) -> pd.Series:
    return table.groupby(formula, sort=False)[value].mean()


def _target(
    name: str, unit: str, values: pd.Series, scale: float, batch_size: int
) -> WetlabTarget:
    return WetlabTarget(
        name, unit, values.index.to_numpy(), values.to_numpy(float), float(scale), batch_size
    )
