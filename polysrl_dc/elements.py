"""Element features: the 200-dimensional Matscholar word embeddings packaged with matminer.

Source: Tshitoyan et al., Nature 571, 95-98 (2019), doi:10.1038/s41586-019-1335-8.
"""

from functools import cache

import numpy as np
from matminer.utils.data import MatscholarElementData
from pymatgen.core import Element

N_FEATURES = 200
#: Rows of every element-indexed array: row ``Z`` belongs to atomic number ``Z``, row 0 is unused.
N_ELEMENTS = 119


@cache
def element_features(source: str = "matscholar") -> np.ndarray:
    """Element feature matrix X^a of the paper (Section 3.1).

    Parameters
    ----------
    source : {"matscholar", "random"}
        ``random`` replaces each embedding by a random direction, always the same: what a model can
        do without knowledge of the elements.

    Returns
    -------
    numpy.ndarray, shape (119, 200), float32
        Row ``Z`` is the embedding of the element with atomic number ``Z`` (unit length,
        dimensionless); rows of elements without an embedding are zero. Read-only.

    Examples
    --------
    >>> element_features().shape
    (119, 200)
    """
    table = MatscholarElementData(impute_nan=False)
    features = np.zeros((N_ELEMENTS, N_FEATURES), dtype=np.float32)
    for symbol, row in table.all_element_data.items():
        features[Element(symbol).Z] = [row[name] for name in table.prop_names]
    if source == "random":
        directions = np.random.default_rng(0).normal(size=features.shape)
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)
        features = np.where(features.any(axis=1, keepdims=True), directions, 0.0).astype(np.float32)
    features.setflags(write=False)
    return features


@cache
def has_embedding() -> np.ndarray:
    """Which elements can be represented.

    Returns
    -------
    numpy.ndarray, shape (119,), bool
        True at ``Z`` where the element has an embedding (H to Lr, Z = 1 ... 103).

    Examples
    --------
    >>> bool(has_embedding()[26]), bool(has_embedding()[118])
    (True, False)
    """
    supported = np.any(element_features(), axis=1)
    supported.setflags(write=False)
    return supported
