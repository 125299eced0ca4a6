"""What is learned on an official fold of Matbench, encoder fine-tuned or frozen.

The paper's representation and transfer protocols are in ``paper_protocol.py``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import compress, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from folds import readable, split_validation
from graph_data import graph_dataset
from representation import start_of
from sklearn.metrics import mean_absolute_error, roc_auc_score
from training_state import trained

from polysrl_dc import PolySRLConfig, PolySRLModel
from polysrl_dc.checkpoints import checkpoint_path

PROTOCOLS = ("finetune", "frozen")
NORMAL_95 = 1.96


@dataclass(frozen=True)
class Settings:
    """Settings of a run; all but ``device`` and ``threads`` change the predictions.

    ``epochs`` and ``learning_rates`` span the grid of which the validation part of the training
    fold chooses a point; ``pretrained`` are the encoders to start from, members of the ensemble on
    each alike, none for random weights.
    """

    epochs: tuple[int, ...]
    learning_rates: tuple[float, ...]
    ensemble: int = 1
    batch_size: int = 128
    weight_decay: float = 0.0
    pretrained: tuple[str, ...] = ()
    seed: int = 0
    valid_fraction: float = 0.2
    device: str | None = None
    threads: int | None = None

    def fingerprint(self) -> dict[str, Any]:
        """The settings that change the predictions, as plain JSON values."""
        values = asdict(self)
        del values["device"], values["threads"]
        random = start_of(None, PolySRLConfig.named("default"))
        values["pretrained"] = " ".join(self.pretrained) or random
        if self.pretrained:
            contents = [checkpoint_path(name).read_bytes() for name in self.pretrained]
            digests = [hashlib.sha256(content).hexdigest() for content in contents]
            values["pretrained_sha256"] = " ".join(digests)
        values["learning_rates"] = list(self.learning_rates)
        values["epochs"] = list(self.epochs)
        return values


#: What is trained with unless told otherwise. ``large``: fine-tuning on :data:`LARGE` rows and
#: more, where the decay and the small batches of ``finetune`` keep a model from learning all it
#: could: on the validation part of fold 0 of matbench_mp_gap one member has 0.261 eV, and with
#: those 0.319 after 60 epochs (``validation_losses`` of the folds that ``run_matbench.py`` keeps).
DEFAULTS = {
    "finetune": Settings((15, 60, 150), (3e-3,), ensemble=4, weight_decay=0.3),
    "large": Settings((100,), (3e-3,), ensemble=4, batch_size=512),
    "frozen": Settings((300,), (1e-3,), ensemble=4),
    "embedded": Settings((20,), (3e-3,), ensemble=2, weight_decay=0.3),
}
LARGE = 50_000


def defaults_of(protocol: str, suite: str, n_rows: int) -> Settings:
    """Those of :data:`DEFAULTS` that a task of so many rows is trained with.

    Examples
    --------
    >>> [defaults_of("finetune", "matbench", n).batch_size for n in (18928, 106113)]
    [128, 512]
    """
    if protocol == "finetune" and suite == "embedded":
        return DEFAULTS["embedded"]
    if protocol == "finetune" and n_rows >= LARGE:
        return DEFAULTS["large"]
    return DEFAULTS[protocol]


def train_and_predict(
    task_type: str,
    train_formulas: Sequence[str],
    train_targets: np.ndarray,
    test_formulas: Sequence[str],
    protocol: str,
    settings: Settings,
    unfinished: Path | None = None,
) -> tuple[np.ndarray, np.ndarray | None, dict[str, Any]]:
    """Choose hyperparameters on a validation part, train on the whole training fold, predict.

    Parameters
    ----------
    task_type : {"regression", "classification"}
    train_formulas : sequence of str, (n_train,)
    train_targets : numpy.ndarray, (n_train,)
        Label units, or 0 and 1.
    test_formulas : sequence of str, (n_test,)
    protocol : {"finetune", "frozen"}
        Whether the encoder is trained with the head or kept as it is (paper, section 5).
    settings : Settings
    unfinished : path, optional
        Folder from which the same trainings, if they were interrupted, go on.

    Returns
    -------
    predictions : numpy.ndarray, (n_test,)
        Label units, or the probability of class 1.
    std : numpy.ndarray, (n_test,), or None
        Standard deviations in label units; ``None`` for classification.
    params : dict
        What was chosen: ``learning_rate``, ``epochs``, the ``validation_losses`` of the grid, the
        ``std_factor`` that the standard deviations were multiplied by (validation part), and
        ``constant_predictions``, the number of test formulas that hold an element without an
        embedding and get the mean of the training targets.
    """
    if settings.threads:
        torch.set_num_threads(settings.threads)
    targets = np.asarray(train_targets, dtype=float).reshape(-1, 1)
    parsed = np.array([readable(formula) for formula in train_formulas])
    formulas, targets = list(compress(train_formulas, parsed)), targets[parsed]
    trials = _trials(task_type, formulas, targets, protocol, settings, unfinished)
    best = min(trials, key=lambda point: trials[point][0])
    rate, epochs = best
    params: dict[str, Any] = {
        "protocol": protocol,
        "learning_rate": rate,
        "epochs": epochs,
        "validation_losses": {
            f"learning_rate {rate:g}, epochs {epochs}": loss
            for (rate, epochs), (loss, _) in trials.items()
        },
    }

    model = _model(task_type, protocol, settings, rate, settings.ensemble)
    model = trained(model, graph_dataset(formulas, targets), epochs, "training", unfinished)
    known = np.array([readable(formula) for formula in test_formulas])
    test = graph_dataset(list(compress(test_formulas, known)))
    predictions = np.full(len(test_formulas), targets.mean())
    params["constant_predictions"] = int((~known).sum())
    if task_type == "classification":
        predictions[known] = np.asarray(model.predict(test)).reshape(-1)
        return predictions, None, params
    std = np.full(len(test_formulas), max(float(targets.std()), 1e-6))
    mean, spread = model.predict_uncertainty(test)
    params["std_factor"] = trials[best][1]
    predictions[known] = np.reshape(mean, -1)
    std[known] = np.reshape(spread, -1) * params["std_factor"]
    return predictions, std, params


def _trials(
    task_type: str,
    formulas: Sequence[str],
    targets: np.ndarray,
    protocol: str,
    settings: Settings,
    unfinished: Path | None,
) -> dict[tuple[float, int], tuple[float, float]]:
    """Loss and uncertainty factor of each (learning rate, epochs) on a part of the training fold.

    The loss is the MAE, or 1 - ROC-AUC. The factor brings 95 % of the absolute errors within 1.96
    standard deviations; it is 1 for classification. One member is trained on each encoder.
    """
    train, valid = split_validation(formulas, settings.valid_fraction, settings.seed)
    part = graph_dataset([formulas[i] for i in train], targets[train])
    rest = graph_dataset([formulas[i] for i in valid])
    truth = targets[valid, 0]
    trials = {}
    for rate, epochs in product(settings.learning_rates, settings.epochs):
        model = _model(task_type, protocol, settings, rate, None)
        model = trained(model, part, epochs, f"trial, {epochs} epochs at {rate:g}", unfinished)
        if task_type == "classification":
            predicted = np.asarray(model.predict(rest)).reshape(-1)
            trials[rate, epochs] = float(1.0 - roc_auc_score(truth, predicted)), 1.0
            continue
        mean, std = (np.reshape(part, -1) for part in model.predict_uncertainty(rest))
        factor = np.quantile(np.abs(truth - mean) / std, 0.95) / NORMAL_95
        trials[rate, epochs] = float(mean_absolute_error(truth, mean)), float(factor)
    return trials


def _model(
    task_type: str, protocol: str, settings: Settings, rate: float, ensemble: int | None
) -> PolySRLModel:
    return PolySRLModel(
        task=task_type,
        n_tasks=1,
        pretrained=settings.pretrained or None,
        freeze_encoder=protocol == "frozen",
        n_ensemble=ensemble,
        batch_size=settings.batch_size,
        learning_rate=rate,
        weight_decay=settings.weight_decay,
        device=settings.device,
        seed=settings.seed,
    )
