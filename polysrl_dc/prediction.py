"""Prediction and evaluation of a fitted model, with and without uncertainty."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from deepchem.data import Dataset
from deepchem.trans import Transformer
from deepchem.utils.evaluate import _process_metric_input
from torch import Tensor, nn
from tqdm import tqdm

from polysrl_dc.batches import checked_labels, stoichiometries
from polysrl_dc.domain import Domain
from polysrl_dc.errors import refused
from polysrl_dc.featurizers import Formulas, formulas_dataset
from polysrl_dc.graphs import StoichiometryBatch
from polysrl_dc.metrics import masked_scores, undone
from polysrl_dc.persistence import PersistentModel
from polysrl_dc.recalibration import Calibration

CHUNK = 1024  # formulas embedded at once: their activations stay in the cache of a core
_QUIET = 50_000  # formulas that take no time to speak of


class PredictingModel(PersistentModel):
    """What a :class:`~polysrl_dc.model.PolySRLModel` answers; nothing here changes a weight."""

    #: What :attr:`domain` has made, and the formulas it is of.
    _domain: tuple[Domain | None, list[str]] = (None, [])

    fit_generator = refused("fit_generator", "fit(dataset)")
    predict_on_generator = refused("predict_on_generator", "predict(dataset)")
    evaluate_generator = refused("evaluate_generator", "evaluate(dataset, metrics)")
    predict_uncertainty_on_batch = refused("predict_uncertainty_on_batch", "predict_uncertainty")
    compute_saliency = refused("compute_saliency", "predict(dataset)")
    load_from_pretrained = refused("load_from_pretrained", "load_encoder or from_pretrained")

    @property
    def domain(self) -> Domain | None:
        """The formulas that the model has learned from, if it holds two at least; made once.

        ``polysrl train``, the estimators for scikit-learn and
        :func:`~polysrl_dc.domain.keep_formulas` put them into it.
        """
        known = self._kept_formulas()
        if known is None:
            return None
        domain, of = self._domain
        if domain is None or of is not known:  # there are others after fit or restore
            domain = Domain(self)
            self._domain = domain, known
        return domain

    def _kept_formulas(self) -> list[str] | None:
        """Those of :attr:`domain`, which takes long to make where they are many."""
        known = self.provenance.get("formulas")
        return known if isinstance(known, list) and len(known) > 1 else None

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Evaluation mode without gradients; the mode is restored afterwards."""
        self._ensure_built()
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.model.train(training)

    def _map(self, source: Formulas, function: Callable[[StoichiometryBatch], Any]) -> list[Any]:
        """Apply to batches of formulas in evaluation mode."""
        dataset = formulas_dataset(source)
        results, row = [], 0
        quiet = True if len(dataset) <= _QUIET else None  # None: unless there is a terminal
        with self._evaluating(), tqdm(total=len(dataset), unit="formula", disable=quiet) as bar:
            for X, _, _, ids in dataset.iterbatches(CHUNK, deterministic=True):
                results.append(function(stoichiometries(X, ids, row).to(self.device)))
                row += len(X)
                bar.update(len(X))
        return results

    def _check_fitted(self) -> None:
        """Refuse a model that cannot predict labels."""
        if self.settings["task"] == "pretraining":
            start = "PolySRLModel(pretrained=...) or `polysrl train --pretrained FOLDER`"
            raise ValueError(f"a pretraining model has no labels to predict; try {start}")
        if not self.model.fitted:
            raise ValueError("the model is not fitted; call fit or restore first")

    def _mean_and_std(self, dataset: Formulas, polymorphs: bool = False) -> list[np.ndarray]:
        self._check_fitted()
        found = self._map(dataset, lambda batch: self.model(batch, polymorphs))
        return [torch.cat(parts).cpu().numpy() for parts in zip(*found, strict=True)]

    def predict(
        self,
        dataset: Formulas,
        transformers: Sequence[Transformer] = (),
        output_types: None = None,
    ) -> np.ndarray:
        """Predict labels.

        Parameters
        ----------
        dataset : dc.data.Dataset of stoichiometry graphs, or iterable of formulas
        transformers : list of dc.trans.Transformer
            Undone on the predictions.
        output_types : None
            Not supported; see :meth:`predict_embedding`.

        Returns
        -------
        numpy.ndarray, shape (n, n_tasks)
            In label units; for classification the probability of class 1.

        Raises
        ------
        InvalidInputError
            A bad formula or row, which is named.
        ValueError
            The model is not fitted, or ``output_types`` is given.

        Examples
        --------
        >>> import deepchem as dc, numpy as np, polysrl_dc
        >>> graphs = dc.feat.StoichiometryGraphFeaturizer().featurize(["NaCl", "KCl", "MgO", "CaO"])
        >>> model = dc.models.PolySRLModel(freeze_encoder=True)
        >>> loss = model.fit(dc.data.NumpyDataset(graphs, np.array([8.5, 8.4, 7.8, 7.1])))
        >>> model.predict(["RbCl", "SrO"]).shape
        (2, 1)
        """
        if output_types is not None:
            raise ValueError("output_types must be None; see predict_embedding")
        return undone(self._mean_and_std(dataset)[0], transformers)

    def predict_uncertainty(
        self,
        dataset: Formulas,
        masks: None = None,
        polymorphs: bool | None = None,
        distance: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Predict labels and the standard deviation of each.

        The variance follows the law of total variance: that between the members of the ensemble
        and, with ``polymorphs``, what the formula's Gaussian N(z_mu, sigma²) changes in them, plus
        the mean over both of what a heteroscedastic head predicts, the variance of a Laplace
        distribution. By itself it is too small (``benchmarks/UNCERTAINTY.md``), most of all far
        from what was learned: see :meth:`calibrate`. For classification it is p (1 - p).

        Parameters
        ----------
        dataset : dc.data.Dataset of stoichiometry graphs, or iterable of formulas
        masks : None
            DeepChem's dropout masks; there is no dropout here.
        polymorphs : bool, optional
            For regression, whether the Gaussian of each formula in every encoder counts: what the
            polymorphs that it may have add to the variance, where ``variance_trained``; elsewhere
            sigma is nearly the same for all formulas. It is carried through the heads to first
            order. Default: the calibrated standard deviation of a calibrated model, else False.
            What is asked for is not calibrated.
        distance : numpy.ndarray, shape (n,), optional
            What ``domain.distance(dataset)`` says, if it is there already.

        Returns
        -------
        mean, std : numpy.ndarray, each of shape (n, n_tasks)
            In label units. The mean is that of :meth:`predict`.

        Raises
        ------
        InvalidInputError
            A bad formula or row, which is named.
        ValueError
            Nothing here makes a variance, ``polymorphs`` is asked of a classifier, the model is not
            fitted, its formulas have been removed, which its calibration needs, ``distance`` has
            another shape, or ``masks`` are given.

        Examples
        --------
        >>> import deepchem as dc, polysrl_dc
        >>> graphs = dc.feat.StoichiometryGraphFeaturizer().featurize(["NaCl", "KCl", "MgO"])
        >>> dataset = dc.data.NumpyDataset(graphs, np.array([8.5, 8.4, 7.8]))
        >>> model = dc.models.PolySRLModel(freeze_encoder=True)
        >>> loss = model.fit(dataset, nb_epoch=2)
        >>> mean, std = model.predict_uncertainty(dataset, polymorphs=True)
        >>> mean.shape, std.shape
        ((3, 1), (3, 1))
        """
        if masks is not None:
            raise ValueError("masks must be None: the uncertainty does not come from dropout")
        self._check_fitted()
        calibration = self.calibration if polymorphs is None else None
        if polymorphs is None:
            polymorphs = calibration.polymorphs if calibration else False
        if polymorphs and self.model.classification:
            raise ValueError("polymorphs is True: only regression has it")
        if not (self.model.heteroscedastic or self.model.classification or polymorphs) and (
            self.settings["n_ensemble"] < 2
        ):
            raise ValueError("needs a heteroscedastic configuration, n_ensemble > 1 or polymorphs")
        if calibration is None or not calibration.needs_distance:
            mean, std = self._mean_and_std(dataset, polymorphs)
            return mean, calibration.apply(std) if calibration else std
        if self.domain is None:
            raise ValueError("the formulas that the model has learned from have been removed")
        dataset = formulas_dataset(dataset)
        mean, std = self._mean_and_std(dataset, polymorphs)
        distance = self.domain.distance(dataset) if distance is None else distance
        return mean, calibration.apply(std, distance)

    def calibrate(
        self,
        dataset: Dataset,
        polymorphs: bool = True,
        predicted: Sequence[np.ndarray] | None = None,
    ) -> Calibration:
        """Scale the standard deviations by the errors on data that the model has not learned from.

        From here on :meth:`predict_uncertainty` gives calibrated standard deviations, those of a
        Laplace distribution: one more error like these lies within 2.12 of them with 95 %.
        Predictions stay as they are. The calibration is saved with the model and forgotten when it
        is fitted again.

        Of a model that holds the formulas it has learned from (:attr:`domain`), they also grow with
        the distance to the nearest of these, as the errors do, up to the spread of the labels.

        Parameters
        ----------
        dataset : dc.data.Dataset
            X holds stoichiometry graphs, y labels; labels of weight 0 are missing.
        polymorphs : bool
            As in :meth:`predict_uncertainty`.
        predicted : sequence of numpy.ndarray, optional
            Mean and standard deviation of these rows, (n, n_tasks) each, made with ``polymorphs``,
            and, where they shall grow with it, the distance, (n,). For rows that this model has
            learned from: by models like it that have not, as
            :func:`~polysrl_dc.cross_val_predict` makes them. Default: this model's own.

        Returns
        -------
        Calibration
            For each task, factor, offset, rate and ceiling. Of several tasks, those with fewer than
            20 labels are left as they are (1, 0, 0 and 0) and named by a warning.

        Raises
        ------
        InvalidInputError
            A row or label is bad, or fewer than 20 rows have a label of any task.
        ValueError, TypeError
            No fitted model of regression; ``predicted`` not finite or of another shape; no dataset.

        Examples
        --------
        >>> import deepchem as dc, polysrl_dc
        >>> formulas = [f"{metal}{n}Cl" for metal in ("Li", "Na", "K") for n in range(1, 41)]
        >>> graphs = dc.feat.StoichiometryGraphFeaturizer().featurize(formulas)
        >>> dataset = dc.data.NumpyDataset(graphs, np.linspace(8, 9, 120))
        >>> train, valid = dc.splits.StoichiometrySplitter().train_test_split(dataset)
        >>> model = dc.models.PolySRLModel(freeze_encoder=True)
        >>> loss = model.fit(train, nb_epoch=2)
        >>> polysrl_dc.keep_formulas(model, train)
        >>> calibration = model.calibrate(valid)
        >>> std = model.predict_uncertainty(valid)[1]
        """
        if self.settings["task"] != "regression" or not self.model.fitted:
            raise ValueError("only a fitted model of regression has a std to scale")
        if predicted is None:
            mean, std = self.predict_uncertainty(dataset, polymorphs=polymorphs)
            given = [self.domain.distance(dataset)] if self.domain else []
        else:
            mean, std, *given = predicted
        labels, weights = checked_labels(dataset, self.settings["n_tasks"], False)
        if np.shape(mean) != labels.shape:
            raise ValueError(f"the mean has shape {np.shape(mean)}, not {labels.shape}")
        far = (given[0], labels) if given and self._kept_formulas() else ()
        self.calibration = Calibration.fit(labels - mean, std, weights != 0, polymorphs, *far)
        return self.calibration

    def predict_embedding(self, dataset: Formulas) -> np.ndarray:
        """Representation of each formula, z_mu of eq. 11.

        Those of several encoders, whose spaces are unrelated, stand side by side; the scalar
        product of two formulas is then the mean over the encoders.

        Parameters
        ----------
        dataset : dc.data.Dataset of stoichiometry graphs, or iterable of formulas

        Returns
        -------
        numpy.ndarray, shape (n, n_encoders F), float32
            Of unit length.

        Raises
        ------
        InvalidInputError
            A bad formula or row, which is named.

        Examples
        --------
        >>> import polysrl_dc
        >>> model = polysrl_dc.PolySRLModel.from_pretrained("polysrl-mp")
        >>> model.predict_embedding(["Fe2O3", "TiO2"]).shape
        (2, 200)
        """

        def mean(batch: StoichiometryBatch) -> Tensor:
            means = [encoder.mean(batch) for encoder in self.model.encoders]
            return nn.functional.normalize(torch.cat(means, dim=-1), dim=-1)

        return torch.cat(self._map(dataset, mean)).cpu().numpy()

    def predict_polymorphism(self, dataset: Formulas) -> np.ndarray:
        """Uncertainty due to polymorphism (Section 4.3): geometric mean of the variances of eq. 12.

        Of several encoders, that of the first with a trained variance (``variance_trained``). Fine-
        tuning moves it, though nothing trains it then, as sigma reads layers that the mean reads.

        Parameters
        ----------
        dataset : dc.data.Dataset of stoichiometry graphs, or iterable of formulas

        Returns
        -------
        numpy.ndarray, shape (n,), float32
            In squared units of the embedding, which has length 1.

        Raises
        ------
        InvalidInputError
            A bad formula or row, which is named.
        ValueError
            No encoder has a trained variance.
        """
        if not any(self.variance_trained):
            raise ValueError(
                "no encoder of this model is known to have a trained variance: use one pretrained "
                'by the objective "polysrl", as PolySRLModel.from_pretrained("polysrl-mp") has'
            )
        encoder = self.model.encoders[self.variance_trained.index(True)]

        def variance(batch: StoichiometryBatch) -> Tensor:
            return torch.exp(2 * encoder.log_sigma(batch).mean(-1))

        return torch.cat(self._map(dataset, variance)).cpu().numpy()

    def evaluate(
        self,
        dataset: Dataset,
        metrics: Any,
        transformers: Sequence[Transformer] = (),
        per_task_metrics: bool = False,
        use_sample_weights: bool = False,
        n_classes: int = 2,
    ) -> Any:
        """Score predictions; labels of weight 0 are missing and not scored.

        Parameters
        ----------
        dataset : dc.data.Dataset
        metrics : dc.metrics.Metric, metric function or list of them
            A function is named by its place, ``"metric-1"``.
        transformers : list of dc.trans.Transformer
            Undone on labels and predictions.
        per_task_metrics : bool
            Also return the scores of each task; of a single task it is a number, as in DeepChem.
        use_sample_weights : bool
            Pass the weights to the metrics; only where no label is missing.
        n_classes : int
            Of classification metrics.

        Returns
        -------
        dict, or a pair of dicts with ``per_task_metrics``
            Name of the metric -> score.

        Raises
        ------
        InvalidInputError
            A row that is no graph, a label that is NaN or infinite, naming row and id; a task
            without any label.
        ValueError, TypeError
            The model is not fitted; ``use_sample_weights`` meets a missing label; no dataset.
        """
        self._check_fitted()
        n_tasks, classification = self.settings["n_tasks"], self.model.classification
        labels, weights = checked_labels(dataset, n_tasks, classification)
        if use_sample_weights and not weights.all():
            raise ValueError("use_sample_weights needs a dataset without missing labels")
        metrics = _process_metric_input(list(metrics) if isinstance(metrics, tuple) else metrics)
        transformers = [transformer for transformer in transformers if transformer.transform_y]
        predictions = self.predict(dataset, transformers)
        labels = undone(labels, transformers)
        found = masked_scores(labels, predictions, weights, metrics, n_classes, use_sample_weights)
        return found if per_task_metrics else found[0]
