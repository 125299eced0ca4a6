"""Early stopping on a validation set, and the log of a pretraining run."""

import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from deepchem.data import Dataset
from deepchem.metrics import Metric
from deepchem.models import ValidationCallback

from polysrl_dc.checkpoints import write_atomic
from polysrl_dc.datasets import PolymorphDataset
from polysrl_dc.distributed import process_count, process_rank
from polysrl_dc.losses import effective_rank, retrieval_at_k
from polysrl_dc.objectives import PretrainingNetwork


class StopTraining(Exception):
    """Raised by a callback to end :meth:`polysrl_dc.model.PolySRLModel.fit` in good order."""


class EarlyStopping(ValidationCallback):
    """DeepChem's ``ValidationCallback`` that also ends the training and restores the best weights.

    A score that is NaN is no better one. Every call of ``fit`` starts anew, also one that continues
    an interrupted call.

    Parameters
    ----------
    dataset : dc.data.Dataset
        Validation set.
    metric : dc.metrics.Metric
    interval : int
        Steps (batches) between two evaluations.
    patience : int
        Evaluations without a better score after which the training ends.
    save_on_minimum : bool, optional
        Whether a lower score is the better one. Default: what the name of the metric says, by
        scikit-learn's rule (``..._error`` and ``..._loss`` are lower, ``..._score`` higher) and for
        DeepChem's ``mae_score`` and ``rms_score``, which are errors.
    **kwargs
        Of ``ValidationCallback``: ``output_file``, ``save_dir``, ``transformers``.

    Raises
    ------
    ValueError
        The name of the metric does not tell, and ``save_on_minimum`` is not given; ``interval`` or
        ``patience`` is less than 1.

    Examples
    --------
    >>> import io
    >>> import deepchem as dc, numpy as np, polysrl_dc
    >>> graphs = dc.feat.StoichiometryGraphFeaturizer()(["NaCl", "KCl", "MgO", "CaO"])
    >>> dataset = dc.data.NumpyDataset(graphs, np.array([8.5, 8.4, 7.8, 7.1]))
    >>> stop = EarlyStopping(dataset, dc.metrics.Metric(dc.metrics.mae_score), interval=1,
    ...                      patience=2, output_file=io.StringIO())
    >>> loss = polysrl_dc.PolySRLModel().fit(dataset, nb_epoch=5, callbacks=stop)
    >>> bool(stop.get_best_score() < 1.0)
    True
    """

    _best_score: Any

    def __init__(
        self,
        dataset: Dataset,
        metric: Metric,
        interval: int,
        patience: int,
        save_on_minimum: bool | None = None,
        **kwargs: Any,
    ) -> None:
        for name, value in (("interval", interval), ("patience", patience)):
            if value < 1:
                raise ValueError(f"{name} is {value}: must be at least 1")
        if save_on_minimum is None:
            save_on_minimum = _is_error(metric)
        super().__init__(dataset, interval, [metric], save_on_minimum=save_on_minimum, **kwargs)
        self.patience = patience
        self._waited = 0
        self._best_state: dict[str, Any] | None = None

    def begin(self, model: Any) -> None:
        """Forget the call of ``fit`` before; called by ``fit`` when it begins."""
        self._waited, self._best_score, self._best_state = 0, None, None

    def __call__(self, model: Any, step: int) -> None:
        """Evaluate every ``interval`` steps; raise :class:`StopTraining` when patience is out."""
        if step % self.interval:
            return
        before = math.inf if self._best_score is None else self._best_score
        self._best_score = before  # NaN is not less
        super().__call__(model, step)
        if self._best_score < before:
            self._waited = 0
            self._best_state = {k: v.clone() for k, v in model.model.state_dict().items()}
            return
        self._waited += 1
        if self._waited >= self.patience:
            raise StopTraining(f"no better score in {self.patience} evaluations")

    def get_best_score(self) -> float:
        """The best score of the last call of ``fit``.

        Returns
        -------
        float

        Raises
        ------
        ValueError
            There has been no evaluation.
        """
        if self._best_score is None:
            raise ValueError(f"no evaluation so far: one comes every {self.interval} steps")
        return super().get_best_score()

    def finish(self, model: Any) -> None:
        """Put the best weights back; called by ``fit`` when it ends, early or not."""
        if self._best_state is not None:
            model.model.load_state_dict(self._best_state)
        self._best_state = None


def _is_error(metric: Metric) -> bool:
    """Whether a lower score is better, by the name of the metric's function."""
    name = getattr(metric.metric, "__name__", "")
    if name in ("mae_score", "rms_score") or name.endswith(("_error", "_loss", "_deviance")):
        return True
    if name.endswith(("_score", "_accuracy", "_auc")):
        return False
    raise ValueError(f"is a lower {name or metric.name} better? save_on_minimum must say it")


class PretrainingLog:
    """Writes a row of diagnostics after each epoch of pretraining to a CSV file.

    A falling loss hides a collapsed embedding, so each row has, beside the mean ``loss`` and its
    parts, what :func:`pretraining_diagnostics` finds on stoichiometries that are held out, and the
    cost: structures per second and the peak memory of the process. The sums of an epoch under way
    are part of the checkpoints, and after a restart the rows of epochs that are run again are
    replaced. TensorBoard gets the same numbers if it is installed.

    Parameters
    ----------
    path : path
        CSV file; events for TensorBoard go to the folder beside it.
    held_out : PolymorphDataset
        May be empty: there are no diagnostics then.
    batch_size : int
        Structures among which the one of a formula is to be found.

    Examples
    --------
    >>> import tempfile, polysrl_dc
    >>> dataset = polysrl_dc.PolymorphDataset("aflow", progress=False)
    >>> train, held_out = dataset.select(range(64)), dataset.select(range(64, 128))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     log = PretrainingLog(f"{folder}/log.csv", held_out, batch_size=32)
    ...     model = polysrl_dc.PolySRLModel("pretraining", batch_size=32)
    ...     loss = model.fit(train, nb_epoch=2, checkpoint_interval=0, callbacks=log)
    ...     pd.read_csv(f"{folder}/log.csv")["epoch"].tolist()
    [1, 2]
    """

    def __init__(self, path: str | Path, held_out: PolymorphDataset, batch_size: int = 256) -> None:
        self.path, self.held_out, self.batch_size = Path(path), held_out, batch_size
        self._key = f"sums of {self.path.name}"  # in the plan of the run
        self._writer: Any = None

    def begin(self, model: Any) -> None:
        """Start the clock of an epoch."""
        self._started, self._structures = time.perf_counter(), 0

    def __call__(self, model: Any, step: int) -> None:
        """Nothing; the sums are taken by :meth:`end_step`."""

    def end_step(self, model: Any, loss: torch.Tensor, n_rows: int) -> None:
        """Add up the parts of the loss of one step."""
        sums = model._run.setdefault(self._key, {})
        for name, value in {"loss": loss, **model.model.parts, "steps": 1}.items():
            sums[name] = sums.get(name, 0.0) + float(value)
        self._structures += n_rows

    def end_epoch(self, model: Any) -> None:
        """Evaluate and write; on the first process only."""
        seconds = time.perf_counter() - self._started
        sums = model._run.pop(self._key)
        if process_rank() == 0:
            network = model.model
            row = {
                "epoch": model._epoch,
                "step": model._global_step,
                **{name: sums[name] / sums["steps"] for name in ("loss", *network.parts)},
                "c": float(network.c.detach()),
                "d": float(network.d.detach()),
                **pretraining_diagnostics(network, self.held_out, self.batch_size, model.device),
                "learning_rate": model._pytorch_optimizer.param_groups[0]["lr"],
                "structures_per_second": self._structures / seconds,
                "peak_memory_mib": _peak_memory(model.device),
                "processes": process_count(),
            }
            self._write(row)
        self.begin(model)

    def _write(self, row: dict[str, float]) -> None:
        table = pd.DataFrame([row])
        if self.path.exists():
            old = pd.read_csv(self.path, float_precision="round_trip")
            table = pd.concat([old[old["epoch"] < row["epoch"]], table], ignore_index=True)
        write_atomic(self.path, table.to_csv(index=False).encode())
        if self._writer is None:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                self._writer = False
            else:
                self._writer = SummaryWriter(str(self.path.parent / "tensorboard"))
        if self._writer:
            for name, value in row.items():
                self._writer.add_scalar(name, value, row["step"])
            self._writer.flush()


@torch.no_grad()
def pretraining_diagnostics(
    network: PretrainingNetwork, held_out: PolymorphDataset, batch_size: int, device: Any = "cpu"
) -> dict[str, float]:
    """How well formulas that were held out find their structures, and what the embeddings fill.

    One structure of each formula, the first, in batches; a last batch that is smaller is left out.

    Parameters
    ----------
    network : PretrainingNetwork
    held_out : PolymorphDataset
        May be empty: the result is then empty as well.
    batch_size : int
    device : str or torch.device

    Returns
    -------
    dict of str to float
        ``retrieval@1`` and ``retrieval@10`` (share of formulas whose structure is nearest, or
        among the ten nearest, of ``batch_size``), ``rank_formulas`` and ``rank_structures``
        (:func:`~polysrl_dc.losses.effective_rank`), ``mean_sigma``, ``mean_log_sigma``.
    """
    if not len(held_out):
        return {}
    rows = np.sort(np.unique(held_out.groups, return_index=True)[1])
    batch_size = min(batch_size, len(rows))
    training = network.training
    network.eval()
    means, log_sigmas, crystals, first, tenth = [], [], [], [], []
    for start in range(0, len(rows) - batch_size + 1, batch_size):
        formulas, structures, groups = held_out.batch(rows[start : start + batch_size])
        mean, log_sigma = network.encoder(formulas.to(device))
        crystal, groups = network.structure_encoder(structures.to(device)), groups.to(device)
        similarity = mean @ crystal.T
        first.append(retrieval_at_k(similarity, groups, groups, 1))
        tenth.append(retrieval_at_k(similarity, groups, groups, 10))
        means.append(mean)
        log_sigmas.append(log_sigma)
        crystals.append(crystal)
    network.train(training)
    log_sigma = torch.cat(log_sigmas)
    return {
        "retrieval@1": float(torch.stack(first).mean()),
        "retrieval@10": float(torch.stack(tenth).mean()),
        "rank_formulas": float(effective_rank(torch.cat(means))),
        "rank_structures": float(effective_rank(torch.cat(crystals))),
        "mean_sigma": float(log_sigma.exp().mean()),
        "mean_log_sigma": float(log_sigma.mean()),
    }


def _peak_memory(device: torch.device) -> float:
    """Peak memory in MiB: of the GPU, or resident of this process; NaN where none tells."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
