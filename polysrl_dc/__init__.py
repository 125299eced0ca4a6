"""PolySRL for DeepChem: composition models pretrained on polymorphic crystal structures.

Importing the package puts its classes where DeepChem users look for them:
``dc.models.PolySRLModel``, ``dc.feat.StoichiometryGraphFeaturizer``,
``dc.feat.StructureGraphFeaturizer`` and ``dc.splits.StoichiometrySplitter``.
"""

from polysrl_dc import _deepchem, datasets
from polysrl_dc.callbacks import EarlyStopping
from polysrl_dc.config import PolySRLConfig
from polysrl_dc.cross_validation import StoichiometrySplitter, cross_val_predict
from polysrl_dc.datasets import PolymorphDataset
from polysrl_dc.domain import Domain, keep_formulas
from polysrl_dc.errors import InvalidInputError
from polysrl_dc.estimators import PolySRLClassifier, PolySRLRegressor
from polysrl_dc.featurizers import (
    StoichiometryGraphFeaturizer,
    StructureGraphFeaturizer,
    reduced_formulas,
)
from polysrl_dc.model import PolySRLModel
from polysrl_dc.recipes import RECIPES, Recipe, suitable_recipe

dc = _deepchem.deepchem
__version__ = "0.1.0"

__all__ = [
    "RECIPES",
    "Domain",
    "EarlyStopping",
    "InvalidInputError",
    "PolySRLClassifier",
    "PolySRLConfig",
    "PolySRLModel",
    "PolySRLRegressor",
    "PolymorphDataset",
    "Recipe",
    "StoichiometryGraphFeaturizer",
    "StoichiometrySplitter",
    "StructureGraphFeaturizer",
    "cross_val_predict",
    "datasets",
    "keep_formulas",
    "reduced_formulas",
    "register",
    "suitable_recipe",
]


def register() -> None:
    """Put the public classes into DeepChem's namespaces; repeating it changes nothing.

    Raises
    ------
    RuntimeError
        If one of the names is taken by something else, which is left as it is.

    Examples
    --------
    >>> import deepchem as dc
    >>> register()
    >>> dc.models.PolySRLModel is PolySRLModel
    True
    """
    places = [
        (dc.models, PolySRLModel),
        (dc.feat, StoichiometryGraphFeaturizer),
        (dc.feat, StructureGraphFeaturizer),
        (dc.splits, StoichiometrySplitter),
    ]
    for module, public in places:
        name = public.__name__
        if getattr(module, name, public) is not public:
            raise RuntimeError(f"{module.__name__}.{name} exists and is not polysrl_dc's")
    for module, public in places:
        setattr(module, public.__name__, public)


register()
