"""The models of the paper's tables: one encoder, pretrained in six ways or not at all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from graph_data import graph_dataset
from representation import Embed

from polysrl_dc import PolySRLModel
from polysrl_dc.checkpoints import DEFAULT_ENCODER

#: The models of the paper's tables. All have the same encoder and differ in its pretraining, which
#: ``pretrain.py --objective NAME`` runs; what came of it is in the package or in :data:`ENCODERS`.
MODELS = (
    "rand_init",
    "graphcl",
    "mp_band_gap",
    "mp_formation_energy",
    "infomax3d",
    "without_sampling",
    "polysrl",
)
#: Those whose encoders come with the package.
SHIPPED_AS = {
    "graphcl": "graphcl-mp",
    "mp_formation_energy": "formation-energy-mp",
    "polysrl": DEFAULT_ENCODER,
}
#: Folder of the others.
ENCODERS = Path(__file__).parent / "encoders"


def encoder_of(model: str) -> str | None:
    """Name or file of the encoder of one of :data:`MODELS`; None for random weights."""
    if model == "rand_init":
        return None
    return SHIPPED_AS.get(model, str(ENCODERS / f"{model}.formulas.safetensors"))


def encoder_embeddings(encoder: str | None, seeds: Sequence[int], config: str = "default") -> Embed:
    """The embedding function of a saved model, or of random encoders, one for each seed.

    Parameters
    ----------
    encoder : str or None
        Name, folder or file of a saved model; None for random weights.
    seeds : sequence of int
        Of the random weights.
    config : str
        Configuration of the random encoders.
    """
    if encoder is not None:
        models = [PolySRLModel.from_pretrained(encoder)]
    else:
        models = [PolySRLModel(config=config, pretrained=None, seed=seed) for seed in seeds]

    def embed(formulas: list[str]) -> np.ndarray:
        dataset = graph_dataset(formulas)
        parts = np.stack([model.predict_embedding(dataset) for model in models])
        return parts[0] if encoder is not None else parts

    return embed
