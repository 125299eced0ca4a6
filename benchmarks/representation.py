"""Representation protocol of the paper (Appendix E): heads on embeddings that stay as they are.

The heads of all folds, seeds and targets on the same formulas are trained side by side: their
weights are stacked, and one batched product does for all of them what a linear layer does for one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch
from targets import Splits, Target
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from polysrl_dc import PolySRLConfig
from polysrl_dc.batches import batch_rows
from polysrl_dc.checkpoints import checkpoint_path, load_checkpoint
from polysrl_dc.heads import PredictionHead

PAPER = PolySRLConfig.named("paper")
EPOCHS = 300
LEARNING_RATE = 1e-3
SLOPE = 0.01  # of nn.LeakyReLU

#: Formulas of a target -> embeddings (n, F), or (n_seeds, n, F) if they depend on the seed.
Embed = Callable[[list[str]], np.ndarray]


def representation_digest(encoder: str | Path) -> str:
    """SHA-256 of what makes the means of a saved model: configuration and weights.

    The weights that only the variance depends on do not count; no score of a protocol changes
    with them.
    """
    tensors, manifest = load_checkpoint(checkpoint_path(encoder))
    digest = hashlib.sha256(json.dumps(manifest["config"], sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        if name.startswith("encoders.") and ".sigma_" not in name:
            digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def start_of(encoder: str | Path | None, config: PolySRLConfig) -> str:
    """What a model starts from, as keys and records hold it.

    Parameters
    ----------
    encoder : str, path or None
        Saved model, told by its :func:`representation_digest`; None for random weights, told by
        their configuration.
    config : PolySRLConfig
        Of random weights.

    Examples
    --------
    >>> from dataclasses import replace
    >>> start_of(None, PAPER), start_of(None, replace(PAPER, message_power=0.5))
    ('random weights, as published', 'random weights, message_power 0.5')
    """
    if encoder is not None:
        return representation_digest(encoder)
    published = PAPER.to_dict()
    changes = [f"{name} {v}" for name, v in config.to_dict().items() if v != published[name]]
    return f"random weights, {', '.join(changes) or 'as published'}"


class HeadStack:
    """M heads F -> hidden -> hidden -> 1 (:class:`PredictionHead`) with their Adam optimizer.

    Sizes, rate and clipping, by the norm of the gradient of each head, are the paper's. The
    derivatives are written out, which saves 12 to 30 % of the time of autograd.

    Parameters
    ----------
    n_features : int
        F.
    seeds : sequence of int, (M,)
        Each fixes the initial weights of its head.

    Examples
    --------
    >>> heads = HeadStack(200, seeds=[0, 1, 2])
    >>> heads.step(torch.randn(3, 5, 200), torch.randn(3, 5))
    >>> heads.predict(torch.randn(3, 7, 200)).shape
    torch.Size([3, 7])
    """

    def __init__(self, n_features: int, seeds: Sequence[int]) -> None:
        starts = [_initial(n_features, seed) for seed in seeds]
        self.weights = [torch.stack(part) for part in zip(*starts, strict=True)]
        for weight in self.weights:
            weight.grad = torch.zeros_like(weight)
        self._optimizer = torch.optim.Adam(self.weights, lr=LEARNING_RATE, fused=True)

    def predict(self, x: Tensor, member: int | None = None) -> Tensor:
        """Outputs (M, b) for embeddings (M, b, F), or (b,) of one member for its (b, F)."""
        if member is None:
            return _forward(self.weights, x)[2].squeeze(-1)
        weights = [weight[member : member + 1] for weight in self.weights]
        return _forward(weights, x[None])[2].reshape(-1)

    def step(self, x: Tensor, labels: Tensor) -> None:
        """One step down the mean absolute error of each head.

        Parameters
        ----------
        x : torch.Tensor, shape (M, b, F)
        labels : torch.Tensor, shape (M, b)
            Normalized.
        """
        _, _, w2, _, w3, _ = self.weights
        gradients = [cast(Tensor, weight.grad) for weight in self.weights]
        dw1, db1, dw2, db2, dw3, db3 = gradients
        h1, h2, outputs = _forward(self.weights, x)
        g = torch.sign(outputs - labels.unsqueeze(-1)).div_(x.shape[1])
        torch.bmm(h2.mT, g, out=dw3)
        torch.sum(g, 1, keepdim=True, out=db3)
        g = _through_leaky_relu(g * w3.mT, h2)
        torch.bmm(h1.mT, g, out=dw2)
        torch.sum(g, 1, keepdim=True, out=db2)
        g = _through_leaky_relu(torch.bmm(g, w2.mT), h1)
        torch.bmm(x.mT, g, out=dw1)
        torch.sum(g, 1, keepdim=True, out=db1)
        norms = [torch.linalg.vector_norm(part, dim=(1, 2), keepdim=True) for part in gradients]
        norm = torch.linalg.vector_norm(torch.stack(norms), dim=0)
        if norm.max() > PAPER.grad_clip:
            factor = (PAPER.grad_clip / (norm + 1e-6)).clamp_max_(1.0)
            for part in gradients:
                part.mul_(factor)
        self._optimizer.step()


def _forward(weights: list[Tensor], x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Both hidden layers (M, b, hidden) and the output (M, b, 1)."""
    w1, b1, w2, b2, w3, b3 = weights
    h1 = functional.leaky_relu_(torch.bmm(x, w1).add_(b1), SLOPE)
    h2 = functional.leaky_relu_(torch.bmm(h1, w2).add_(b2), SLOPE)
    return h1, h2, torch.bmm(h2, w3).add_(b3)


def _initial(n_features: int, seed: int) -> list[Tensor]:
    """Matrices (in, out) and biases (1, out) of a new head."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = PredictionHead(n_features, PAPER.head_hidden, 1)
    return [p.detach().T if p.ndim > 1 else p.detach()[None] for p in head.parameters()]


def _through_leaky_relu(gradient: Tensor, output: Tensor) -> Tensor:
    return torch.ops.aten.leaky_relu_backward(gradient, output, SLOPE, True)


def train_heads(
    embeddings: Tensor,
    rows: np.ndarray,
    labels: np.ndarray,
    seeds: Sequence[int],
    batch_size: int,
    epochs: Iterable[int] = range(EPOCHS),
) -> HeadStack:
    """Train M heads of equally many rows; each meets its rows in the order of its own seed.

    Parameters
    ----------
    embeddings : torch.Tensor, shape (n, F), float32
    rows : numpy.ndarray, shape (M, n_train), int
        Rows of ``embeddings`` in the training fold of each head.
    labels : numpy.ndarray, shape (M, n_train)
        Normalized.
    seeds : sequence of int, (M,)
    batch_size : int
        The last batch of an epoch is smaller; one row left over joins the batch before it.
    epochs : iterable of int
        Numbers of the epochs, e.g. ``tqdm(range(300))``.
    """
    heads = HeadStack(embeddings.shape[1], seeds)
    n_train = rows.shape[1]
    batches = [slice(part[0], part[-1] + 1) for part in batch_rows(n_train, batch_size)]
    for epoch in epochs:
        order = _orders(seeds, epoch, n_train)
        shuffled_rows = torch.from_numpy(np.take_along_axis(rows, order, 1))
        shuffled = torch.as_tensor(np.take_along_axis(labels, order, 1), dtype=torch.float32)
        for part in batches:
            chosen = shuffled_rows[:, part]
            x = embeddings.index_select(0, chosen.reshape(-1)).view(*chosen.shape, -1)
            heads.step(x, shuffled[:, part])
    return heads


def _orders(seeds: Sequence[int], epoch: int, n: int) -> np.ndarray:
    """(M, n): the order of an epoch, that of a ``PolySRLModel`` of the same seed."""
    orders = {
        seed: np.random.default_rng([seed, epoch]).permuted(np.arange(n)[None], axis=1)[0]
        for seed in set(seeds)
    }
    return np.stack([orders[seed] for seed in seeds])


def predict_folds(
    embeddings: np.ndarray,
    values: np.ndarray,
    splits: Splits,
    seeds: Sequence[int],
    batch_size: int,
    epochs: int = EPOCHS,
    progress: bool = False,
) -> np.ndarray:
    """Predict each formula by the head that was trained on the fold without it.

    Parameters
    ----------
    embeddings : numpy.ndarray, shape (n, F) or (n_seeds, n, F)
        The latter where the encoder depends on the seed.
    values : numpy.ndarray, shape (n_targets, n)
        Normalized here, by the training rows.
    splits : list of (numpy.ndarray, numpy.ndarray)
        Training and test rows of each fold.
    seeds : sequence of int
        Of initial weights and orders.
    batch_size, epochs : int
    progress : bool
        Show a bar over the epochs.

    Returns
    -------
    numpy.ndarray, shape (n_targets, n_seeds, n)
        In the units of ``values``; NaN for rows in no test part.

    Examples
    --------
    >>> x, y = np.random.default_rng(0).normal(size=(30, 4)), np.ones((2, 30))
    >>> splits = [(np.arange(20), np.arange(20, 30)), (np.arange(10, 30), np.arange(10))]
    >>> predict_folds(x, y, splits, seeds=[0, 1, 2], batch_size=8, epochs=1).shape
    (2, 3, 30)
    """
    n = values.shape[1]
    if embeddings.shape[-2] != n or (embeddings.ndim == 3 and len(embeddings) != len(seeds)):
        raise ValueError(f"{embeddings.shape} embeddings of {n} formulas, {len(seeds)} seeds")
    table = torch.as_tensor(embeddings, dtype=torch.float32).reshape(-1, embeddings.shape[-1])
    members: dict[int, list[tuple[int, int, np.ndarray, np.ndarray]]] = {}  # by training rows
    for train, test in splits:
        members.setdefault(len(train), []).extend(
            (target, i, train, test) for i in range(len(seeds)) for target in range(len(values))
        )
    predictions = np.full((len(values), len(seeds), n), np.nan)
    for group in members.values():
        first = [n * i if embeddings.ndim == 3 else 0 for _, i, _, _ in group]
        labels = np.stack([values[target, train] for target, _, train, _ in group])
        mean, std = labels.mean(1), labels.std(1)
        std[std <= 1e-8 * (1 + np.abs(mean))] = 1.0
        heads = train_heads(
            table,
            np.stack([start + train for start, (_, _, train, _) in zip(first, group, strict=True)]),
            (labels - mean[:, None]) / std[:, None],
            [seeds[i] for _, i, _, _ in group],
            batch_size,
            tqdm(range(epochs), desc=f"{len(group)} heads", disable=not progress),
        )
        for j, (target, i, _, test) in enumerate(group):
            outputs = heads.predict(table[torch.from_numpy(first[j] + test)], j).numpy()
            predictions[target, i, test] = outputs * std[j] + mean[j]
    return predictions


def predict_targets(
    embed: Embed,
    targets: Sequence[Target],
    seeds: Sequence[int],
    splits_of: Callable[[Target], Splits] = Target.splits,
    epochs: int = EPOCHS,
    progress: bool = False,
) -> dict[str, np.ndarray]:
    """Predictions for every formula of several targets, five folds for each seed.

    Targets on the same formulas are trained together, and their formulas embedded once.

    Parameters
    ----------
    embed : callable
        Formulas (list of n str) -> embeddings (n, F), or (n_seeds, n, F) of a random encoder.
    targets : sequence of Target
    seeds : sequence of int
    splits_of : callable
        Target -> training and test rows of its folds; by default those of Matbench's rule.
    epochs : int
    progress : bool

    Returns
    -------
    dict of str to numpy.ndarray, shape (n_seeds, n)
        By name of the target, in its units.
    """
    found: dict[str, np.ndarray] = {}
    for group in on_same_formulas(targets):
        first = group[0]
        values = np.stack([target.values for target in group])
        embeddings = np.asarray(embed(list(first.formulas)))
        by_target = predict_folds(
            embeddings, values, splits_of(first), seeds, first.batch_size, epochs, progress
        )
        found |= {target.name: part for target, part in zip(group, by_target, strict=True)}
    return found


def on_same_formulas(targets: Iterable[Target]) -> list[list[Target]]:
    """Targets that can be trained together, in groups."""
    together: dict[tuple[int, tuple[str, ...]], list[Target]] = {}
    for target in targets:
        together.setdefault((target.batch_size, tuple(target.formulas)), []).append(target)
    return list(together.values())
