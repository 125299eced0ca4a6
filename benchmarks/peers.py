"""Published models that see formulas only, on the folds and records of the transfer protocol.

A peer is trained on a whole training fold by its own published recipe; nothing is tuned. Roost's
recipe is 100 epochs, which on some hundred rows are few steps; so that nothing is said of Roost
that is true of these few steps only, it is trained for as many epochs as our own models as well.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from graph_data import dataset_of
from targets import Target
from transfer import EPOCHS

#: What each peer needs to be imported; the extra ``peers`` has both.
PEERS = {"roost": "aviary", "roost_500_epochs": "aviary", "crabnet": "pytorch_optimizer"}
#: Peers whose epochs are not those of their recipe, but those of the transfer protocol.
LONGER = {"roost_500_epochs": EPOCHS}
#: What ``info.json`` says of their records.
ABOUT: dict[str, dict[str, Any]] = {
    "roost": {
        "algorithm": "Roost",
        "algorithm_long": (
            "Roost of the package aviary-models with its defaults and its authors' training "
            "script: message passing between the elements of a formula, weighted by attention. "
            "No validation data; the weights of the last epoch."
        ),
        "bibtex_refs": [
            "@article{roost, title={Predicting materials properties without crystal structure: "
            "deep representation learning from stoichiometry}, author={Goodall, Rhys E. A. and "
            "Lee, Alpha A.}, journal={Nature Communications}, volume={11}, pages={6280}, "
            "year={2020}}"
        ],
    },
    "crabnet": {
        "algorithm": "CrabNet",
        "algorithm_long": (
            "CrabNet written anew from its paper: self-attention between the elements of a "
            "formula. A quarter of each training fold is its validation data; what differs from "
            "the authors' code stands in crabnet.py."
        ),
        "bibtex_refs": [
            "@article{crabnet, title={Compositionally restricted attention-based network for "
            "materials property predictions}, author={Wang, Anthony Yu-Tung and Kauwe, Steven K. "
            "and Murdock, Ryan J. and Sparks, Taylor D.}, journal={npj Computational Materials}, "
            "volume={7}, pages={77}, year={2021}}"
        ],
    },
}
ABOUT["roost_500_epochs"] = ABOUT["roost"] | {
    "algorithm": f"Roost, {EPOCHS} epochs",
    "algorithm_long": f"{ABOUT['roost']['algorithm_long']} Trained for {EPOCHS} epochs, not 100.",
}


def lacking(name: str) -> str | None:
    """What keeps a peer from being run, as one line; None if nothing does."""
    if find_spec(PEERS[name]) is None:
        return f"{name}: {PEERS[name]} is not installed; the extra 'peers' has it"
    return None


def peer_model(name: str, seed: int = 0, **settings: Any) -> Any:
    """A peer with its published settings, unless told otherwise.

    Parameters
    ----------
    name : {"roost", "roost_500_epochs", "crabnet"}
    seed : int
    **settings
        Of :class:`roost.RoostModel` or :class:`crabnet.CrabNetModel`.
    """
    if name == "crabnet":
        from crabnet import CrabNetModel

        return CrabNetModel(seed, **settings)
    from roost import RoostModel

    if name in LONGER:
        settings = {"epochs": LONGER[name], **settings}
    return RoostModel(seed, **settings)


def peer_settings(name: str) -> dict[str, Any]:
    """What makes the predictions of a peer: a record made by anything else is not taken for one."""
    if name == "crabnet":
        import crabnet

        config, epochs = str(crabnet.CrabNetConfig()), crabnet.EPOCHS
    else:
        import roost

        config, epochs = roost.VERSION, LONGER.get(name, roost.EPOCHS)
    return {"encoder": "none", "config": config, "epochs": epochs}


def predict_peer_fold(
    target: Target,
    split: tuple[np.ndarray, np.ndarray],
    name: str,
    seed: int,
    unfinished: Path | None = None,
) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Train a peer on the training rows of a fold, and predict its test rows.

    Parameters
    ----------
    target : Target
    split : tuple of numpy.ndarray
        Training and test rows.
    name : str
        As for :func:`peer_model`.
    seed : int
    unfinished : path, optional
        As for :func:`transfer.predict_fold`.

    Returns
    -------
    predictions : numpy.ndarray, shape (n_test,)
        In units of the target.
    std : numpy.ndarray, shape (n_test,)
        Standard deviations that the peer itself predicts, in the same units.
    params : dict
        The GPU and the version of torch, if one trained it: its random numbers are others. Nothing
        was chosen.
    """
    torch.set_num_threads(1)
    train, test = split
    model = peer_model(name, seed).fit(dataset_of(target, train), unfinished=unfinished)
    predictions, std = model.predict_uncertainty(dataset_of(target, test))
    return np.ravel(predictions), np.ravel(std), _trained_on(model.device)


def _trained_on(device: torch.device) -> dict[str, str]:
    if device.type != "cuda":
        return {}
    return {"device": torch.cuda.get_device_name(device), "torch": torch.__version__}
