"""Training on the command line: what an interrupted command had trained is not trained again."""

import shutil
import time
from pathlib import Path

from deepchem.data import Dataset
from tqdm import tqdm

from polysrl_dc.checkpoints import MODEL_FILE, content_digest
from polysrl_dc.model import PolySRLModel

#: Folder for the parts of a training, in the one of the model.
UNFINISHED = "unfinished"
#: Seconds between two checkpoints: what an interruption costs at most.
INTERVAL = 300.0


def fit_in(
    folder: Path, model: PolySRLModel, dataset: Dataset, nb_epoch: int, name: str = "training"
) -> PolySRLModel:
    """Train with a progress bar; or return what the same call has trained before.

    The same call is one on a model of the same weights and settings with the same data, which are
    known again by their digest: each has a folder of its own in ``folder``. It holds the latest
    checkpoint and, after the last step, the model.

    Parameters
    ----------
    folder : path
        Made if it is missing.
    model : PolySRLModel
        Not trained so far.
    dataset : dc.data.Dataset
    nb_epoch : int
    name : str
        Stands before the progress bar.

    Returns
    -------
    PolySRLModel
        ``model``, or the one that was trained before.

    Raises
    ------
    InvalidInputError, FloatingPointError
        As :meth:`PolySRLModel.fit`.

    Examples
    --------
    >>> import tempfile, deepchem as dc, numpy as np
    >>> graphs = dc.feat.StoichiometryGraphFeaturizer().featurize(["NaCl", "KCl", "MgO", "CaO"])
    >>> dataset = dc.data.NumpyDataset(graphs, np.array([8.5, 8.4, 7.8, 7.1]))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     first = fit_in(Path(folder), PolySRLModel(freeze_encoder=True), dataset, 2)
    ...     again = fit_in(Path(folder), PolySRLModel(freeze_encoder=True), dataset, 2)
    >>> bool((first.predict(dataset) == again.predict(dataset)).all())
    True
    """
    key = {
        "config": model.config.to_dict(),
        "settings": model.settings,
        "training": model.training,
        "provenance": model.provenance,
        "epochs": nb_epoch,
        "data": model._tensors(dataset).fingerprint(),
    }
    place = folder / content_digest(model.model.state_dict(), key)[:16]
    if (place / MODEL_FILE).exists():
        return PolySRLModel.from_pretrained(place, device=model.device)
    if model.model_dir_is_temp:
        shutil.rmtree(model.model_dir, ignore_errors=True)
    model.model_dir, model.model_dir_is_temp = str(place), False
    written = time.monotonic()

    def keep(model: PolySRLModel, step: int) -> None:
        nonlocal written
        if not bar.n:  # steps done before it was interrupted say nothing of the rate
            bar.initial = bar.n = step - 1
            bar.total = model._run["steps"] if model._run else None
        bar.update(step - bar.n)
        if time.monotonic() >= written + INTERVAL:
            model.save_checkpoint(max_checkpoints_to_keep=1)
            written = time.monotonic()

    with tqdm(desc=name, unit="step", disable=None) as bar:
        model.fit(
            dataset,
            nb_epoch=nb_epoch,
            checkpoint_interval=0,
            restore=bool(model.get_checkpoints()),
            callbacks=keep,
        )
    model.save()
    return model
