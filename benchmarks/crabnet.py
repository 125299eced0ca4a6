"""CrabNet, a peer that sees formulas only, written anew from its paper and its public facts.

Wang, Kauwe, Murdock, Sparks, npj Computational Materials 7, 77 (2021),
doi:10.1038/s41524-021-00545-1; constants that the paper leaves out are those of the authors'
repository (anthony-wang/CrabNet). As published: the network (11,987,206 weights), the loss, the
jitter of the fractions, Lamb inside Lookahead under a triangular learning rate, the batch size,
300 epochs, which weights are averaged and when training stops. What differs:

* Elements are Matscholar embeddings, not the authors' default, mat2vec: both are vectors of 200
  numbers from words of the materials literature, but only the former come with matminer.
* The gate acts on each element, as in the paper. The authors' code multiplies the mean value by
  the sigmoid of the mean logit: ``CrabNetConfig(gate="mean")``.
* No formula is padded or cut; the authors cut those that have more elements than any in the
  training data.
* Lookahead's slow weights start at the initial weights, the authors' at its first synchronization.
* Regression only, and every random number follows from the seed of the model.
* Linear maps are computed by oneDNN, for speed (``linear.py``).

It reproduces the published scores within 5 % on each of fifteen folds, and within 1.1 % on each of
three tasks: ``crabnet_matbench.py``, and ``RESULTS.md``.
"""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from graph_data import Dataset
from linear import Linear, linear
from peer_base import PeerModel, asked, labeled, seeded
from pytorch_optimizer import Lamb, Lookahead
from torch import Tensor, nn
from torch.optim.lr_scheduler import CyclicLR
from torch.optim.swa_utils import AveragedModel
from training_state import TrainingState

from polysrl_dc.batches import LabeledData
from polysrl_dc.elements import N_FEATURES, element_features
from polysrl_dc.errors import InvalidInputError
from polysrl_dc.graphs import StoichiometryBatch

EPOCHS = 300


@dataclass(frozen=True)
class CrabNetConfig:
    """Sizes and settings; the defaults are the published ones.

    ``head``: widths of the residual network; ``resolution``: steps of a fraction; ``gate``: element
    or mean, see the module; ``jitter``: relative noise on fractions in training;
    ``learning_rates``: lowest and highest, ``half_cycle`` epochs from each to the other;
    ``patience``: cycles without improvement, in all, that end training; ``valid_fraction``: held
    out where no validation data is given, a quarter as in the authors' record on Matbench.
    """

    width: int = 512
    layers: int = 3
    heads: int = 4
    feed_forward: int = 2048
    dropout: float = 0.1
    head: tuple[int, ...] = (1024, 512, 256, 128)
    resolution: int = 5000
    gate: str = "element"
    jitter: float = 0.02
    learning_rates: tuple[float, float] = (1e-4, 6e-3)
    half_cycle: int = 10
    patience: int = 3
    valid_fraction: float = 0.25

    def __post_init__(self) -> None:
        if self.gate not in ("element", "mean"):
            raise ValueError(f"gate is {self.gate!r}: must be element or mean")


class FractionEncoding(nn.Module):
    """Fractions as waves: one half of the width encodes f, the other 0.0025 log2(f)^2.

    Either number, kept within 1/resolution and 1, is rounded to a step p = 0 ... resolution - 1.
    Column j of the d = width/2 columns is sin(p / 50^(2j/d)) for even j, and the cosine for odd j.
    """

    waves: Tensor

    def __init__(self, width: int, resolution: int) -> None:
        super().__init__()
        columns = torch.arange(width // 2)
        angles = torch.arange(resolution).unsqueeze(1) / 50.0 ** (2 * columns / len(columns))
        waves = torch.where(columns % 2 == 0, angles.sin(), angles.cos())
        self.register_buffer("waves", waves, persistent=False)
        # As published: the slope of 2^((1 - s)^2) is 0 at s = 1, so these two never move.
        self.scales = nn.Parameter(torch.ones(2))

    def forward(self, fractions: Tensor) -> Tensor:
        """(T,) -> (T, width)."""
        steps = len(self.waves)
        both = torch.stack([fractions, 0.0025 * fractions.log2() ** 2], dim=-1)
        rows = (both.clamp(1 / steps, 1.0) * steps).round().long() - 1
        factors = 2 ** ((1 - self.scales) ** 2)
        return (self.waves[rows] * factors.unsqueeze(-1)).flatten(-2)


class ResidualLayer(nn.Module):
    """LeakyReLU of a linear map, plus a linear map without bias, as the width changes."""

    def __init__(self, n_inputs: int, n_outputs: int) -> None:
        super().__init__()
        self.linear = Linear(n_inputs, n_outputs)
        self.shortcut = Linear(n_inputs, n_outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., n_inputs) -> (..., n_outputs)."""
        return nn.functional.leaky_relu(self.linear(x)) + self.shortcut(x)


class AttentionLayer(nn.TransformerEncoderLayer):
    """A layer of a Transformer that computes no padding but in the attention itself.

    The longest formula of a batch has many more elements than most of the others.
    """

    def forward(self, x: Tensor, present: Tensor) -> Tensor:  # type: ignore[override]
        """Elements (T, width) formula by formula, where they are (B, n) -> (T, width)."""
        attention = self.self_attn
        projected = linear(x, attention.in_proj_weight, attention.in_proj_bias)
        padded = x.new_zeros(*present.shape, projected.shape[1])
        padded[present] = projected
        query, key, value = (
            part.unflatten(2, (attention.num_heads, -1)).transpose(1, 2)
            for part in padded.chunk(3, dim=2)
        )
        mixed = nn.functional.scaled_dot_product_attention(
            *(query, key, value),
            attn_mask=present[:, None, None, :],
            dropout_p=attention.dropout if self.training else 0.0,
        )
        mixed = _by(attention.out_proj, mixed.transpose(1, 2).flatten(2)[present])
        x = self.norm1(x + self.dropout1(mixed))
        inner = self.dropout(self.activation(_by(self.linear1, x)))
        return self.norm2(x + self.dropout2(_by(self.linear2, inner)))


def _by(layer: nn.Linear, x: Tensor) -> Tensor:
    return linear(x, layer.weight, layer.bias)


class CrabNet(nn.Module):
    """Elements that attend to one another, and what each contributes to the property."""

    features: Tensor

    def __init__(self, config: CrabNetConfig) -> None:
        super().__init__()
        self.gate = config.gate
        self.register_buffer("features", torch.tensor(element_features()), persistent=False)
        self.input = Linear(N_FEATURES, config.width)
        self.input_scale = nn.Parameter(torch.ones(1))
        self.fractions = FractionEncoding(config.width, config.resolution)
        layer = AttentionLayer(config.width, config.heads, config.feed_forward, config.dropout)
        # As published, the layers start as copies of one another.
        self.layers = nn.ModuleList(deepcopy(layer) for _ in range(config.layers))
        widths = (config.width, *config.head)
        self.head = nn.Sequential(
            *(ResidualLayer(*pair) for pair in pairwise(widths)), Linear(widths[-1], 3)
        )

    def forward(self, fractions: Tensor) -> tuple[Tensor, Tensor]:
        """Fractions by atomic number (B, Z) -> normalized value and log std, each (B,)."""
        formulas, numbers = fractions.nonzero(as_tuple=True)
        counts = formulas.bincount(minlength=len(fractions))
        present = torch.arange(int(counts.max()), device=counts.device) < counts.unsqueeze(1)
        elements = self.input(self.features[numbers]) * 2**self.input_scale
        elements = elements + self.fractions(fractions[formulas, numbers])
        for layer in self.layers:
            elements = layer(elements, present)
        value, log_std, gate = self.head(elements).unbind(-1)

        def mean(x: Tensor) -> Tensor:
            return x.new_zeros(len(fractions)).index_add(0, formulas, x) / counts

        if self.gate == "element":
            return mean(value * gate.sigmoid()), mean(log_std)
        return mean(value) * mean(gate).sigmoid(), mean(log_std)


def outputs(network: CrabNet, formulas: StoichiometryBatch) -> tuple[Tensor, Tensor]:
    """Values and logarithms of standard deviations, each (n,); leaves the network's dropout off."""
    network.eval()
    with torch.no_grad():
        parts = [network(part) for part in formulas.fractions.split(1024)]
    return torch.cat([value for value, _ in parts]), torch.cat([log_std for _, log_std in parts])


def robust_l1(value: Tensor, log_std: Tensor, target: Tensor) -> Tensor:
    """Mean of sqrt(2) |value - target| / std + log std, all (B,): a Laplace likelihood."""
    return (math.sqrt(2) * (value - target).abs() * torch.exp(-log_std) + log_std).mean()


def batch_size(n_rows: int) -> int:
    """About a sixteenth of the rows, a power of two from 128 to 4096."""
    return min(max(2 ** round(math.log2(n_rows) - 4), 2**7), 2**12)


def crabnet_optimizer(network: nn.Module) -> Lookahead:
    """Lamb (no decay, no correction of the moments' bias) inside Lookahead (6 steps, half-way)."""
    lamb = Lamb(network.parameters(), betas=(0.9, 0.999), eps=1e-6, adam_debias=True)
    return Lookahead(lamb, k=6, alpha=0.5)


class WeightAverage:
    """Mean of weights that validate within 1 % of the best; the n-th is taken in by n^(-1/3).

    It starts anew where the error is more than 2 % below that of its last start.
    """

    def __init__(self, network: nn.Module) -> None:
        self.model = AveragedModel(
            network, avg_fn=lambda mean, new, n: mean + (new - mean) * (n + 1) ** (-1 / 3)
        )
        self.started_at = self.best = math.inf

    def update(self, network: nn.Module, error: float) -> bool:
        """Take in these weights if their validation error is good, and say so."""
        if error < 0.98 * self.started_at:
            self.model.n_averaged.zero_()
            self.model.update_parameters(network)
            self.started_at = error
        self.best = min(self.best, error)
        good = error <= 1.01 * self.best
        if good:  # the first weights thus count as two, as published
            self.model.update_parameters(network)
        return good

    def state_dict(self) -> dict[str, Any]:
        """The mean and the two errors."""
        return {
            "model": self.model.state_dict(),
            "started_at": self.started_at,
            "best": self.best,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`."""
        self.model.load_state_dict(state["model"])
        self.started_at, self.best = state["started_at"], state["best"]


class CrabNetModel(PeerModel):
    """CrabNet, trained as its authors do.

    After :meth:`fit`, ``history`` lists epoch and validation MAE (label units) by cycle.

    Parameters
    ----------
    seed : int
        Fixes weights, validation part, orders, jitter and dropout; exactly repeatable on a CPU.
    epochs : int
        At most; a multiple of the 20 of a cycle.
    device, model_dir : optional
        As of :class:`peer_base.PeerModel`.
    config : CrabNetConfig, optional

    Examples
    --------
    >>> from graph_data import graph_dataset
    >>> dataset = graph_dataset(["NaCl", "KCl", "MgO", "CaO"], [8.5, 8.4, 7.8, 7.1])
    >>> small = CrabNetConfig(width=8, layers=1, heads=2, feed_forward=8, head=(4,))
    >>> CrabNetModel(epochs=20, config=small).fit(dataset).predict(dataset).shape
    (4, 1)
    """

    def __init__(
        self,
        seed: int = 0,
        epochs: int = EPOCHS,
        device: str | torch.device | None = None,
        model_dir: str | None = None,
        config: CrabNetConfig | None = None,
    ) -> None:
        self.config = config or CrabNetConfig()
        self.cycle = 2 * self.config.half_cycle
        if epochs < self.cycle or epochs % self.cycle:
            raise ValueError(f"epochs is {epochs}: must be a positive multiple of {self.cycle}")
        self.history: list[tuple[int, float]] = []
        super().__init__(seed, epochs, device, model_dir)

    def _untrained(self) -> CrabNet:
        return CrabNet(self.config).to(self.device)

    def fit(
        self, dataset: Dataset, unfinished: Path | None = None, valid: Dataset | None = None
    ) -> CrabNetModel:
        """Train from the initial weights, chosen among by validation data; returns itself.

        Parameters
        ----------
        dataset : dc.data.Dataset
            X holds stoichiometry graphs, y one column.
        unfinished : path, optional
            Folder from which the same training, if it was interrupted, goes on.
        valid : dc.data.Dataset, optional
            Default: a quarter of ``dataset``, drawn by the seed, which is then not learned from.

        Raises
        ------
        InvalidInputError
            A row that is no graph or has no finite label (names row and id), weights that differ.
        FloatingPointError
            The loss is not finite.
        """
        data = labeled(dataset).to(self.device)
        held_out = None if valid is None else labeled(valid).to(self.device)
        with seeded(self.seed, self.device):
            self.model = self._untrained()
            if held_out is None:
                order = torch.randperm(len(data))
                n = max(1, round(self.config.valid_fraction * len(data)))
                data, held_out = (
                    LabeledData(data.inputs[rows], data.labels[rows], data.weights[rows])
                    for rows in (order[n:], order[:n])
                )
            if len(data) < 2:
                raise InvalidInputError("fewer than two rows to learn from")
            self._train(data, held_out, unfinished)
        return self

    def _train(self, data: LabeledData, held_out: LabeledData, unfinished: Path | None) -> None:
        network, config, size = self.model, self.config, batch_size(len(data))
        optimizer, average = crabnet_optimizer(network), WeightAverage(network)
        rise = config.half_cycle * math.ceil(len(data) / size)
        rates = CyclicLR(optimizer.optimizer, *config.learning_rates, rise, cycle_momentum=False)
        center, scale = data.label_statistics()
        scale = torch.where(scale > 0, scale, 1.0)
        targets = (data.labels[:, 0] - center) / scale
        made_of = [str(config), self.epochs, data.fingerprint(), held_out.fingerprint()]
        parts = {"optimizer": optimizer, "rates": rates, "average": average}
        state = TrainingState(unfinished, made_of, self.device, network, **parts)
        kept = {"history": [], "failures": 0, **state.restore()}
        self.history, self._scale, failures = kept["history"], None, kept["failures"]
        done = self.history[-1][0] if self.history else 0
        for epoch in range(done + 1, self.epochs + 1):
            network.train()
            errors, good = [], False
            for rows in torch.randperm(len(data)).split(size):
                fractions = data.inputs[rows].fractions
                noise = 1 + config.jitter * torch.randn_like(fractions)
                fractions = nn.functional.normalize((fractions * noise).clamp(0, 1), p=1.0)
                value, log_std = network(fractions)
                loss = robust_l1(value, log_std, targets[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                rates.step()
                if epoch % self.cycle == 0:  # from here on without dropout, as published
                    value = scale * outputs(network, held_out.inputs)[0] + center
                    errors.append(float((value - held_out.labels[:, 0]).abs().mean()))
                    good |= average.update(network, errors[-1])
            if not torch.isfinite(loss):
                raise FloatingPointError(f"the loss of epoch {epoch} is {float(loss)}")
            if errors:
                self.history.append((epoch, errors[-1]))
                failures += not good
                if failures == config.patience:
                    break
                state.keep(history=self.history, failures=failures)
        network.load_state_dict(average.model.module.state_dict())
        self._scale = center, scale

    def _outputs(self, dataset: Dataset) -> tuple[Tensor, Tensor]:
        return outputs(self.model, asked(dataset).to(self.device))
