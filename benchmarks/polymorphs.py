"""What is known of a formula's structures: how many, of which crystal systems, how alike."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from folds import group_key
from pymatgen.analysis.structure_matcher import StructureMatcher
from pymatgen.core import Lattice, Structure
from pymatgen.symmetry.analyzer import SpacegroupAnalyzer

from polysrl_dc.stoichiometry import parse_formula

#: Distance of an amount from a whole number that rounding explains.
ROUNDING = 1e-6


def is_impure(formula: str) -> bool:
    """Whether a formula has an amount that is no whole number: doped, alloyed or with vacancies.

    Parameters
    ----------
    formula : str
        As its authors wrote it; a formula scaled to whole numbers counts as pure.

    Raises
    ------
    InvalidInputError
        The text is no formula.

    Examples
    --------
    >>> is_impure("Bi2Te3"), is_impure("Cu3.0SbSe4"), is_impure("Ge0.99Mn0.01Te")
    (False, False, True)
    """
    amounts = parse_formula(formula)[1]
    return bool((np.abs(amounts - np.round(amounts)) > ROUNDING).any())


def structure_counts(formulas: Iterable[str], known: Iterable[str]) -> np.ndarray:
    """Known structures of each formula, shape (n,), int; equal reduced formulas are one.

    Parameters
    ----------
    formulas : iterable of str
    known : iterable of str
        The formula of each known structure.

    Examples
    --------
    >>> structure_counts(["Na2Cl2", "KCl"], ["NaCl", "NaCl", "MgO"]).tolist()
    [2, 0]
    """
    counts = pd.Series([group_key(formula) for formula in known]).value_counts()
    return np.array([counts.get(group_key(formula), 0) for formula in formulas], dtype=int)


def structures_of(path: Path, formula: str) -> list[Structure]:
    """Structures of a formula in a table such as ``mp/structures.parquet``, in its order.

    The table's formulas are reduced ones; a formula that is not in it has none.
    """
    names = sorted({formula, group_key(formula)})
    table = pd.read_parquet(path, filters=[("formula", "in", names)])
    return [
        Structure(
            Lattice.from_parameters(*row.cell),
            row.numbers,
            np.reshape(row.frac_coords, (-1, 3)),
        )
        for row in table.itertuples()
    ]


def crystal_systems(structures: Sequence[Structure]) -> list[str]:
    """Crystal system of each structure at a tolerance of 0.1 Å, that of the Materials Project."""
    return [SpacegroupAnalyzer(item, symprec=0.1).get_crystal_system() for item in structures]


def distinct_structures(structures: Sequence[Structure]) -> int:
    """How many groups ``StructureMatcher`` (default tolerances) sorts the structures into.

    Examples
    --------
    >>> cubic = Structure(Lattice.cubic(3.0), ["Fe"], [[0, 0, 0]])
    >>> distinct_structures([cubic, cubic * (2, 1, 1)])
    1
    """
    return len(StructureMatcher().group_structures(list(structures)))
