"""Ways to train on formulas and labels, and which of them suits how many rows.

``polysrl train`` takes the one that suits unless it is told otherwise. They were measured by
``benchmarks/recipes.py`` (wet-lab sets) and ``benchmarks/recipe_sizes.py`` (numbers of rows).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from polysrl_dc.checkpoints import DEFAULT_ENCODER


@dataclass(frozen=True)
class Recipe:
    """How to train a :class:`~polysrl_dc.model.PolySRLModel`.

    Attributes
    ----------
    text : str
        In words.
    epochs : int
    settings : mapping
        Arguments of ``PolySRLModel``.

    Examples
    --------
    >>> import deepchem as dc, numpy as np, polysrl_dc
    >>> graphs = dc.feat.StoichiometryGraphFeaturizer().featurize(["NaCl", "KCl", "MgO", "CaO"])
    >>> dataset = dc.data.NumpyDataset(graphs, np.array([8.5, 8.4, 7.8, 7.1]))
    >>> recipe = polysrl_dc.RECIPES[polysrl_dc.suitable_recipe(len(dataset))]
    >>> model = dc.models.PolySRLModel(**recipe.settings)
    >>> loss = model.fit(dataset, nb_epoch=recipe.epochs)
    >>> model.predict(dataset).shape
    (4, 1)
    """

    text: str
    epochs: int
    settings: Mapping[str, Any]


_SMALL_STEPS = {"batch_size": 32, "learning_rate": 1e-3}
_THREE = {"pretrained": (DEFAULT_ENCODER, "formation-energy-mp", "graphcl-mp"), **_SMALL_STEPS}
RECIPES = {
    "frozen": Recipe(
        "three encoders that were pretrained in different ways stay as they are, with a head each",
        300,
        {**_THREE, "freeze_encoder": True},
    ),
    "fine-tuned": Recipe("three such encoders and their heads", 100, _THREE),
    "single": Recipe("one encoder and its head", 100, _SMALL_STEPS),
    "large": Recipe(
        "three encoders and their heads, in larger batches at a higher rate",
        100,
        {**_THREE, "batch_size": 512, "learning_rate": 3e-3},
    ),
}
#: From so many rows on each of them suits.
LEAST_ROWS = {"frozen": 1, "fine-tuned": 1_000, "large": 5_000}


def suitable_recipe(n_rows: int) -> str:
    """Name of the recipe for so many rows.

    Parameters
    ----------
    n_rows : int
        Rows with labels to learn from; at least 1.

    Returns
    -------
    str
        A key of :data:`RECIPES`.

    Raises
    ------
    ValueError
        There is no row.

    Examples
    --------
    >>> [suitable_recipe(n) for n in (400, 2_000, 100_000)]
    ['frozen', 'fine-tuned', 'large']
    """
    if n_rows < 1:
        raise ValueError(f"n_rows is {n_rows}: must be at least 1")
    return [name for name, least in LEAST_ROWS.items() if n_rows >= least][-1]
