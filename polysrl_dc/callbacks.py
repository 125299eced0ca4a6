"""Early stopping on a validation set, with the best weights restored."""

from typing import Any

from deepchem.data import Dataset
from deepchem.metrics import Metric
from deepchem.models import ValidationCallback


class StopTraining(Exception):
    """Raised by a callback to end :meth:`polysrl_dc.model.PolySRLModel.fit` in good order."""


class EarlyStopping(ValidationCallback):
    """DeepChem's ``ValidationCallback`` that also ends the training and restores the best weights.

    Parameters
    ----------
    dataset : dc.data.Dataset
        Validation set.
    metric : dc.metrics.Metric
    interval : int
        Steps (batches) between two evaluations.
    patience : int
        Evaluations without a better score after which the training ends.
    **kwargs
        Of ``ValidationCallback``: ``output_file``, ``save_dir``, ``save_on_minimum``,
        ``transformers``.

    Examples
    --------
    >>> import io
    >>> import deepchem as dc, numpy as np, polysrl_dc
    >>> graphs = dc.feat.StoichiometryGraphFeaturizer()(["NaCl", "KCl", "MgO", "CaO"])
    >>> dataset = dc.data.NumpyDataset(graphs, np.array([8.5, 8.4, 7.8, 7.1]))
    >>> stop = EarlyStopping(dataset, dc.metrics.Metric(dc.metrics.mae_score), interval=1,
    ...                      patience=2, output_file=io.StringIO())
    >>> loss = polysrl_dc.PolySRLModel().fit(dataset, nb_epoch=5, callbacks=stop)
    >>> stop.get_best_score() < 1.0
    True
    """

    def __init__(
        self, dataset: Dataset, metric: Metric, interval: int, patience: int, **kwargs: Any
    ) -> None:
        for name, value in (("interval", interval), ("patience", patience)):
            if value < 1:
                raise ValueError(f"{name} is {value}: must be at least 1")
        super().__init__(dataset, interval, [metric], **kwargs)
        self.patience = patience
        self._waited = 0
        self._best_state: dict[str, Any] | None = None

    def __call__(self, model: Any, step: int) -> None:
        """Evaluate every ``interval`` steps; raise :class:`StopTraining` when patience is out."""
        if step % self.interval:
            return
        before = self._best_score
        super().__call__(model, step)
        if self._best_score != before:
            self._waited = 0
            self._best_state = {k: v.clone() for k, v in model.model.state_dict().items()}
            return
        self._waited += 1
        if self._waited >= self.patience:
            raise StopTraining(f"no better score in {self.patience} evaluations")

    def finish(self, model: Any) -> None:
        """Put the best weights back; called by ``fit`` when it ends, early or not."""
        if self._best_state is not None:
            model.model.load_state_dict(self._best_state)
