"""The variance of a formula, fitted to the spread of its polymorphs; means stay as they are.

The soft contrastive loss does not make the variance mean polymorphism: noise in all features takes
a sample away from every structure, whatever structures a formula has, so sigma shrinks most where
a formula has most pairs to match. Here the Gaussian of eq. 3 is asked directly for the polymorph
set of eq. 4: its diagonal covariance is that under which the structure embeddings z^b of a formula,
measured from their center, are likeliest.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import trange

from polysrl_dc.datasets import PolymorphDataset
from polysrl_dc.errors import InvalidInputError
from polysrl_dc.featurizers import StoichiometryGraphFeaturizer
from polysrl_dc.graphs import StoichiometryBatch
from polysrl_dc.model import PolySRLModel


def polymorph_spread(embeddings: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Mean square of the structures of each formula about their center, by feature.

    Parameters
    ----------
    embeddings : numpy.ndarray, shape (n, F)
        Of structures.
    groups : numpy.ndarray, shape (n,), integer
        0 ... m - 1, equal for polymorphs.

    Returns
    -------
    numpy.ndarray, shape (m, F)
        Zero for a formula with one structure.

    Examples
    --------
    >>> polymorph_spread(np.array([[0.0], [2.0], [5.0]]), np.array([0, 0, 1])).tolist()
    [[1.0], [0.0]]
    """
    counts = np.bincount(groups)[:, None]

    def mean(values: np.ndarray) -> np.ndarray:
        total = np.zeros((len(counts), values.shape[1]))
        np.add.at(total, groups, values)
        return total / counts

    return mean((embeddings - mean(embeddings)[groups]) ** 2)


def doped(
    formulas: StoichiometryBatch,
    generator: torch.Generator | None = None,
    least: float = 0.005,
    most: float = 0.3,
    vacant: float = 0.3,
) -> StoichiometryBatch:
    """Each formula with a part of one element missing or replaced by one of another formula.

    Parameters
    ----------
    formulas : StoichiometryBatch
    generator : torch.Generator, optional
    least, most : float
        The part is drawn between these, evenly on a logarithmic scale.
    vacant : float
        Share of the formulas in which it is missing.

    Returns
    -------
    StoichiometryBatch
        Of as many formulas; fractions add up to 1.

    Examples
    --------
    >>> fractions = torch.zeros(2, 119)
    >>> fractions[0, [11, 17]], fractions[1, [12, 8]] = 0.5, 0.5
    >>> batch = doped(StoichiometryBatch(fractions), torch.Generator().manual_seed(0))
    >>> bool(torch.allclose(batch.fractions.sum(1), torch.ones(2)))
    True
    """
    fractions = formulas.fractions.clone()
    n, device = len(fractions), fractions.device

    def random(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, device=device, dtype=fractions.dtype)

    def element_of(rows: Tensor) -> Tensor:
        return (random(*rows.shape) * (rows > 0)).argmax(1)

    row = torch.arange(n, device=device)
    host = element_of(fractions)
    dopant = element_of(fractions[random(n).argsort()])
    amount = fractions[row, host] * least * (most / least) ** random(n)
    fractions[row, host] -= amount
    fractions[row, dopant] += amount * (random(n) > vacant)
    return StoichiometryBatch(fractions / fractions.sum(1, keepdim=True))


def fit_polymorph_variance(
    model: PolySRLModel,
    structures: PolymorphDataset,
    *,
    n_steps: int = 2000,
    batch_size: int = 256,
    learning_rate: float = 1e-3,
    unknown: float = 0.15,
    noise: float = 0.01,
    seed: int = 0,
) -> list[float]:
    """Train what eq. 12 adds to eq. 11; no other weight changes, so no mean does.

    The loss of a formula is half the mean over features of ``v / sigma^2 + log sigma^2``, a
    Gaussian negative log-likelihood, with ``v`` from :func:`polymorph_spread` plus ``noise ** 2``.
    A share ``unknown`` of further formulas is made by :func:`doped`: nothing is known of their
    structures, so their ``v`` is the unbiased variance of the formulas with several, on average.
    Without them the variance says nothing about formulas unlike those of the structures.

    Parameters
    ----------
    model : PolySRLModel
        Of pretraining, with a structure encoder.
    structures : PolymorphDataset
        Each is embedded once.
    n_steps, batch_size : int
        Steps, and formulas of each.
    learning_rate : float
        Peak of a one-cycle schedule of Adam. Gradients are clipped: while sigma is far below the
        spread, theirs would fill Adam's memory.
    unknown : float
        Doped formulas for each formula with structures, from 0 to 1.
    noise : float
        The smallest sigma worth telling from none, in units of the embedding.
    seed : int
        Of order and doping.

    Returns
    -------
    list of float
        Mean loss of each tenth of the steps, or of each step of fewer than ten.

    Raises
    ------
    InvalidInputError
        No formula has several structures.
    ValueError
        The model has no structure encoder, ``unknown`` is not between 0 and 1, or there is no step.

    Examples
    --------
    >>> from pymatgen.core import Lattice, Structure
    >>> cubic = Lattice.cubic(5.6)
    >>> salt, cesium = (
    ...     Structure.from_spacegroup(group, cubic, ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])
    ...     for group in ("Fm-3m", "Pm-3m")
    ... )
    >>> model = PolySRLModel.from_pretrained("polysrl-mp")
    >>> data = PolymorphDataset([salt, cesium], progress=False)
    >>> losses = fit_polymorph_variance(model, data, n_steps=10, batch_size=1)
    >>> len(losses)
    10
    """
    if not 0 <= unknown <= 1:
        raise ValueError(f"unknown is {unknown}: must be between 0 and 1")
    if n_steps < 1:
        raise ValueError(f"n_steps is {n_steps}: must be at least 1")
    rows, groups = np.unique(structures.groups, return_index=True, return_inverse=True)[1:]
    spread = polymorph_spread(model.predict_structure_embedding(structures), groups)
    counts = np.bincount(groups)
    several = counts > 1
    if not several.any():
        raise InvalidInputError("no formula has several structures: there is no spread to learn")
    unbiased = spread[several] * (counts[several] / (counts[several] - 1))[:, None]
    encoder, device = model.model.encoder, model.device
    variances = (spread, unbiased.mean(0))
    targets, prior = ((torch.from_numpy(v).float() + noise**2).to(device) for v in variances)
    graphs = StoichiometryGraphFeaturizer().featurize(structures.formulas[rows])
    formulas = StoichiometryBatch.from_graphs(list(graphs)).to(device)
    parameters = list(encoder.variance_parameters())
    optimizer = torch.optim.Adam(parameters, lr=learning_rate, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=n_steps)
    generator = torch.Generator(device).manual_seed(seed)
    batch_size = min(batch_size, len(formulas))
    n_unknown = round(unknown * batch_size)
    losses = []
    training = model.model.training
    model.model.eval()
    for _ in trange(n_steps, desc="variance", unit="step"):
        chosen = torch.randint(len(formulas), (batch_size,), generator=generator, device=device)
        known = formulas[chosen]
        loss = _negative_log_likelihood(encoder.log_sigma(known), targets[chosen])
        if n_unknown:
            log_sigma = encoder.log_sigma(doped(known[:n_unknown], generator))
            loss = loss + unknown * _negative_log_likelihood(log_sigma, prior)
        optimizer.zero_grad(set_to_none=True)
        loss.backward(inputs=parameters)
        nn.utils.clip_grad_norm_(parameters, model.config.grad_clip)
        optimizer.step()
        schedule.step()
        losses.append(loss.detach())
    model.model.train(training)
    model.variance_trained = [True]
    return [float(part.mean()) for part in torch.stack(losses).tensor_split(min(10, n_steps))]


def _negative_log_likelihood(log_sigma: Tensor, variance: Tensor) -> Tensor:
    """Of deviations with this mean square under N(0, sigma^2), without the constant; scalar."""
    return (0.5 * variance * torch.exp(-2 * log_sigma) + log_sigma).mean()
