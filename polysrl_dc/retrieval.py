"""Structures beside formulas: their representation, and those that a formula is likely to have."""

from typing import Any

import numpy as np
import torch
from deepchem.data import Dataset
from torch import Tensor
from tqdm import tqdm

from polysrl_dc import losses
from polysrl_dc.batches import PolymorphData
from polysrl_dc.featurizers import Formulas, check_lengths
from polysrl_dc.graphs import StoichiometryBatch
from polysrl_dc.prediction import PredictingModel

_STRUCTURES = 256  # structures embedded at once
_PAIRS = 5_000_000  # pairs of a sample and a structure compared at once: 20 MB
ROUNDING = 1e-5  # by less than which equal proportions differ


def proportions(formulas: StoichiometryBatch) -> Tensor:
    """Atomic fractions without their elements, the largest first, (n, n_elements).

    Parameters
    ----------
    formulas : StoichiometryBatch of n formulas

    Examples
    --------
    >>> proportions(StoichiometryBatch(torch.tensor([[0.2, 0.0, 0.8], [0.8, 0.2, 0.0]]))).tolist()
    [[0.800000011920929, 0.20000000298023224, 0.0], [0.800000011920929, 0.20000000298023224, 0.0]]
    """
    return formulas.fractions.sort(dim=1, descending=True).values


class RetrievingModel(PredictingModel):
    """What a :class:`~polysrl_dc.model.PolySRLModel` of pretraining says of structures."""

    def predict_structure_embedding(self, structures: Dataset) -> np.ndarray:
        """Representation of each structure, z^b of eq. 1.

        Parameters
        ----------
        structures : PolymorphDataset, or dc.data.Dataset of structure graphs

        Returns
        -------
        numpy.ndarray, shape (n, F), float32
            Of unit length.

        Raises
        ------
        InvalidInputError
            A row is no structure graph, which is named, or the structures were built with other
            limits than the configuration of the model has.
        TypeError
            The structures are no dataset.
        ValueError
            The model is not one of pretraining.

        Examples
        --------
        >>> import polysrl_dc
        >>> structures = polysrl_dc.PolymorphDataset("aflow", max_sites=4, progress=False)
        >>> model = polysrl_dc.PolySRLModel.from_pretrained("polysrl-mp")
        >>> model.predict_structure_embedding(structures.select([0, 1])).shape
        (2, 200)
        """
        return self._embedded(structures)[0].cpu().numpy()

    def _embedded(self, structures: Dataset) -> tuple[Tensor, Tensor]:
        """Representation, (m, F), and :func:`proportions`, (m, n_elements), of each structure."""
        network = self._matching_network()
        check_lengths(structures)
        rows = PolymorphData.from_dataset(structures, self.config, least=1).dataset
        quiet = True if len(rows) <= _STRUCTURES else None  # None: unless there is a terminal
        parts = []
        with self._evaluating():
            for start in tqdm(range(0, len(rows), _STRUCTURES), disable=quiet):
                chosen = np.arange(start, min(start + _STRUCTURES, len(rows)))
                formulas, crystals, _ = rows.batch(chosen)
                crystals = network.structure_encoder(crystals.to(self.device))
                parts.append((crystals, proportions(formulas.to(self.device))))
        embeddings, amounts = zip(*parts, strict=True)
        return torch.cat(embeddings), torch.cat(amounts)

    def retrieve(
        self,
        formulas: Formulas,
        structures: Dataset,
        k: int = 10,
        n_samples: int = 64,
        same_proportions: bool = False,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Structures that a formula is most likely to have, by the match probability of eq. 4.

        Ranks say what the database of the pretraining holds for such a formula, not energy:
        metastable entries rank as high as the ground state.

        The encoder of structures sees no elements, so any candidate may be the likeliest. Where
        their own formulas are to be believed, ``same_proportions`` finds far more
        (``benchmarks/retrieval.py``).

        Parameters
        ----------
        formulas : dc.data.Dataset of n stoichiometry graphs, or iterable of n formulas
        structures : PolymorphDataset, or dc.data.Dataset of m structure graphs, the candidates
        k : int
            Candidates to return, at most m.
        n_samples : int
            J, samples of each Gaussian, the same noise for all: none depends on the other rows.
        same_proportions : bool
            Candidates with the proportions of the formula come first, as GaN for NaCl.

        Returns
        -------
        indices : numpy.ndarray, shape (n, k), int64
            Rows of ``structures``, the likeliest first (of those of the same proportions, and then
            of the others).
        probabilities : numpy.ndarray, shape (n, k)
            That formula and structure match.

        Raises
        ------
        InvalidInputError
            A bad formula or row, which is named, or structures of other limits.
        ValueError
            The model is not one of pretraining, nothing has trained its encoder of structures,
            ``k`` not in 1 ... m, or ``n_samples`` below 1.
        TypeError
            The structures are no dataset.

        Examples
        --------
        >>> import deepchem as dc, polysrl_dc
        >>> candidates = polysrl_dc.PolymorphDataset("aflow", max_sites=8, progress=False)
        >>> model = dc.models.PolySRLModel.from_pretrained("polysrl-mp")
        >>> indices, probabilities = model.retrieve(["NaCl"], candidates, k=2)
        >>> indices.shape, bool(probabilities[0, 0] >= probabilities[0, 1])
        ((1, 2), True)
        """
        self.check_retrieves()
        network = self._matching_network()
        check_lengths(structures)
        if not 1 <= k <= len(structures):
            raise ValueError(f"k is {k}: must be between 1 and {len(structures)}, the candidates")
        if n_samples < 1:
            raise ValueError(f"n_samples is {n_samples}: must be at least 1")
        crystals, amounts = self._embedded(structures)
        generator = torch.Generator(self.device).manual_seed(0)
        noise = torch.randn(n_samples, crystals.shape[1], generator=generator, device=self.device)
        together = max(1, _PAIRS // (n_samples * len(crystals)))

        def likeliest(batch: StoichiometryBatch) -> tuple[Tensor, Tensor]:
            found: list[tuple[Tensor, Tensor]] = []
            means, log_sigmas = (part.split(together) for part in network.encoder(batch))
            asked = proportions(batch).split(together)
            for mean, log_sigma, wanted in zip(means, log_sigmas, asked, strict=True):
                samples = mean.unsqueeze(1) + log_sigma.exp().unsqueeze(1) * noise
                logits = losses.match_logits(samples, crystals, network.c, network.d)
                matches = losses.log_match_probability(logits, network.config.match_form)
                if not same_proportions:
                    found.append(torch.topk(matches, k, dim=1))
                    continue
                order = matches.argsort(dim=1, descending=True)
                others = torch.cdist(wanted, amounts, p=torch.inf) > ROUNDING
                last = others.gather(1, order).long().argsort(dim=1, stable=True)
                order = order.gather(1, last)[:, :k]
                found.append((matches.gather(1, order), order))
            logs, indices = zip(*found, strict=True)
            return torch.cat(logs), torch.cat(indices)

        logs, indices = zip(*self._map(formulas, likeliest), strict=True)
        return torch.cat(indices).cpu().numpy(), torch.cat(logs).exp().cpu().numpy()

    def check_retrieves(self) -> None:
        """Refuse a model that cannot :meth:`retrieve`, before structures are read for it.

        Raises
        ------
        ValueError
            The model is not one of pretraining, or nothing has trained its encoder of structures.

        Examples
        --------
        >>> import polysrl_dc
        >>> polysrl_dc.PolySRLModel.from_pretrained("polysrl-mp").check_retrieves()
        """
        self._matching_network()
        read = self.settings["objective"] != "graphcl"  # which reads no structures
        if not (read and (any(self.variance_trained) or self.get_global_step())):
            raise ValueError("nothing has trained the encoder of structures: fit or restore first")

    def _matching_network(self) -> Any:
        """The network with both encoders."""
        if self.settings["task"] != "pretraining":
            raise ValueError(
                f"the model is one of {self.settings['task']}, without a structure encoder: use a "
                "pretraining model, as the shipped polysrl-mp is"
            )
        return self.model
