"""One frozen configuration for encoders, loss and head; strict when read, complete when written."""

import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_args

_GREATEST = 10_000  # of widths, layers, steps and samples: what is more was not meant
#: What a number must be -> least and greatest value, and the fields.
_RANGES = {
    "finite number above 0": (
        *(math.ulp(0.0), math.inf),
        ("gaussian_step", "cutoff", "c_init", "d_init", "head_scale", "grad_clip"),
    ),
    "finite number of at least 0": (0, math.inf, ("message_power", "attention_power", "beta")),
    "finite number in 0 ... 1": (0, 1, ("whitening",)),
    "finite number": (-math.inf, math.inf, ("log_sigma_shift",)),
}


@dataclass(frozen=True, kw_only=True)
class PolySRLConfig:
    """Every constant of networks and losses. The defaults are those of ``paper`` (Table 3).

    How long and at what rate a model learns is no part of it: Table 3 has a learning rate of 5e-5,
    batches of 256 and 100 epochs.

    Attributes
    ----------
    n_features : int
        F, width of every embedding.
    element_source : {"matscholar", "random"}
        Element features: word embeddings, or fixed random directions that say only which element
        it is.
    stoichiometry_layers, structure_layers : int
        L' of f^a and of f^b.
    convolution_init : {"glorot", "linear"}
        Start of the GCN layers: Glorot weights and zero bias as Kipf & Welling have it, or that
        of ``torch.nn.Linear``. With a random encoder and the representation protocol the second
        brings the MAE of the formation enthalpies from 0.682 (0.016) to 0.604 (0.022) and leaves
        the three others tried within noise (mean over five folds and its standard error).
    message_power : float
        Elements are weighed by this power of their fractions in the GCN layers. At 0, as published,
        a dopant changes the mean over the elements as much as a main component; at 1 it fades out
        with its fraction, and elements below a few per cent are hardly seen.
    attention_power : float
        Above 0, the attention of Set2Set is proportional to this power of the fraction times
        ``exp(query . x_i)``, as in Roost (Goodall & Lee 2020). At 0, as published, the set is
        ``r_i x_i`` instead, and a trace of an element takes its full share of the softmax.
    set2set_steps : int
        Processing steps of each Set2Set.
    edge_hidden : int
        Hidden width of the edge MLPs of f^b.
    n_gaussians : int
    gaussian_step : float
        Distance basis: number of centers 0, step, 2 step, ... in Å; the width equals the step.
    max_neighbors : int
    cutoff : float
        Neighbors per site at most, and their greatest distance in Å, in the graphs of structures
        that are pretrained on. ``PackSettings`` and ``StructureGraphFeaturizer`` build these;
        what was built with other values than those here is refused.
    structure_pooling : {"sum", "mean"}
        Pooling of eq. 1.
    feature_norm : bool
        Batch-normalize (no affine) both embeddings before their L2 normalization. The paper does
        not; without it short pretraining collapses the embedding.
    whitening : float
        Between 0 and 1: how far features are decorrelated besides, see
        :class:`polysrl_dc.layers.FeatureNorm`.
    log_sigma_shift : float
        Added to the output of eq. 12, so that training starts from sigma near its exponential. At
        0, the paper's start, samples lie ten times farther apart than the unit sphere is wide.
    n_samples : int
        J of eq. 4.
    c_init, d_init : float
        Start of the learnable scale and shift of eq. 4.
    beta : float
        Weight of the KL term, eq. 6.
    loss_reduction : {"mean", "sum"}
        Of the loss over the pairs of a batch.
    polymorph_sum : bool
        Whether the polymorphs of a formula in a batch are one term, as eq. 4 has it, or as many.
    match_form : {"sigmoid", "hib"}
        See :func:`polysrl_dc.losses.log_match_probability`.
    head_hidden : int
        Width of the two hidden layers of the prediction head.
    head_scale : float
        The head reads the unit-length representation times this; sqrt(F) gives features of unit
        variance, 1 is the paper's.
    heteroscedastic : bool
        A second regression head predicts the scale of the Laplace distribution of the error.
    grad_clip : float
        Greatest gradient norm (Appendix B.3).

    Raises
    ------
    ValueError
        A value is of another type, out of range or not among the choices; names the field.

    Examples
    --------
    >>> PolySRLConfig.named("paper").n_features
    200
    """

    n_features: int = 200
    element_source: Literal["matscholar", "random"] = "matscholar"
    stoichiometry_layers: int = 3
    structure_layers: int = 3
    convolution_init: Literal["glorot", "linear"] = "glorot"
    message_power: float = 0.0
    attention_power: float = 0.0
    set2set_steps: int = 2
    edge_hidden: int = 400
    n_gaussians: int = 41
    gaussian_step: float = 0.2
    max_neighbors: int = 12
    cutoff: float = 8.0
    structure_pooling: Literal["sum", "mean"] = "sum"
    feature_norm: bool = False
    whitening: float = 0.0
    log_sigma_shift: float = 0.0
    n_samples: int = 8
    c_init: float = 20.0
    d_init: float = 20.0
    beta: float = 1e-8
    loss_reduction: Literal["mean", "sum"] = "mean"
    polymorph_sum: bool = False
    match_form: Literal["sigmoid", "hib"] = "sigmoid"
    head_hidden: int = 128
    head_scale: float = 1.0
    heteroscedastic: bool = False
    grad_clip: float = 2.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value, choices = getattr(self, field.name), get_args(field.type)
            if choices and value not in choices:
                raise ValueError(f"{field.name} is {value!r}: must be one of {choices}")
            if field.type is bool and type(value) is not bool:
                raise ValueError(f"{field.name} is {value!r}: must be True or False")
            if field.type is int and not (_is_number(value, int) and 1 <= value <= _GREATEST):
                raise ValueError(f"{field.name} is {value!r}: no integer in 1 ... {_GREATEST}")
        for what, (least, greatest, names) in _RANGES.items():
            for name in names:
                value = getattr(self, name)
                if not (_is_number(value, int | float) and least <= value <= greatest):
                    raise ValueError(f"{name} is {value!r}: no {what}")

    @classmethod
    def named(cls, name: str) -> "PolySRLConfig":
        """``"paper"`` as published, or ``"default"`` as measured to be better.

        ``default`` normalizes the features before the L2 norm (without it short pretraining
        collapses) and feeds the head features of unit variance: together they bring the MAE of
        matbench_dielectric, fold 0, 60 epochs, one member, from 0.230 to 0.219. It weighs messages
        by the square root of the fraction, which lowers the errors on the nine wet-lab targets by
        6 % after 600 steps of pretraining, starts the GCN layers differently, has edge MLPs of a
        quarter of the width (speed) and predicts the scale of its errors. For pretraining it also
        whitens, starts sigma at exp(-4) and pools by the mean. Without normalization and whitening
        the nine errors are 8 % greater, with sigma from 1 they are 10 % greater, with sum pooling
        equal within noise (``benchmarks/PRETRAINING.md``, which has every row and the commands).

        Parameters
        ----------
        name : {"default", "paper"}

        Returns
        -------
        PolySRLConfig

        Raises
        ------
        ValueError
            There is no such name.
        """
        if name not in _NAMED:
            raise ValueError(f"configuration {name!r} is not one of {sorted(_NAMED)}")
        return _NAMED[name]

    def to_dict(self) -> dict[str, Any]:
        """All fields.

        Returns
        -------
        dict of str to str, bool, int or float
            What JSON can hold.
        """
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "PolySRLConfig":
        """Inverse of :meth:`to_dict`.

        Parameters
        ----------
        values : dict
            Every field, and no other.

        Returns
        -------
        PolySRLConfig

        Raises
        ------
        ValueError
            Fields are missing or unknown, or a value is refused; names them.
        """
        known = {field.name for field in fields(cls)}
        if values.keys() != known:
            raise ValueError(
                f"configuration lacks {sorted(known - values.keys())} "
                f"and has unknown {sorted(values.keys() - known)}"
            )
        return cls(**values)


def _is_number(value: Any, kind: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool) and abs(value) < math.inf


_PAPER = PolySRLConfig()
_NAMED = {
    "paper": _PAPER,
    "default": replace(
        _PAPER,
        convolution_init="linear",
        feature_norm=True,
        whitening=0.5,
        log_sigma_shift=-4.0,
        structure_pooling="mean",
        edge_hidden=100,
        message_power=0.5,
        head_scale=200**0.5,
        heteroscedastic=True,
    ),
}
