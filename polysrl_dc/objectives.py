"""Pretraining objectives: what is asked of the two encoders; they differ only in the loss.

``mp_property``, pretraining on DFT labels (eq. 14), needs no class of its own: it is
``PolySRLModel(task="regression")`` fitted to the labels, whose encoder others start from.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn

from polysrl_dc import losses
from polysrl_dc.config import PolySRLConfig
from polysrl_dc.distributed import gather_rows
from polysrl_dc.graphs import StoichiometryBatch, StructureBatch
from polysrl_dc.stoichiometry_encoder import StoichiometryEncoder
from polysrl_dc.structure_encoder import StructureEncoder

OBJECTIVES = ("polysrl", "without_sampling", "graphcl", "infomax3d")


class PretrainingNetwork(nn.Module):
    """Both encoders with the loss that aligns them (Section 4.3, Figure 2).

    Parameters
    ----------
    config : PolySRLConfig
    objective : {"polysrl", "without_sampling", "graphcl", "infomax3d"}
        ``polysrl``: soft contrastive loss over samples of each Gaussian plus KL (eq. 6);
        ``without_sampling``: the same on the means (Appendix F.4, no KL);
        ``graphcl``: NT-Xent between two augmented views of each formula (eq. 13), no structures;
        ``infomax3d``: NT-Xent between mean and structure (eq. 15).
        Equal formulas in a batch are positives of one another in the first two only.

    Attributes
    ----------
    parts : dict of str to torch.Tensor
        Terms of the last loss, detached scalars.

    Raises
    ------
    ValueError
        There is no such objective.

    Examples
    --------
    >>> network = PretrainingNetwork(PolySRLConfig.named("paper"), "graphcl")
    >>> metals = StoichiometryBatch(torch.eye(4, 119).roll(26, 1))  # Fe, Co, Ni, Cu
    >>> network(metals, None, torch.arange(4)).ndim
    0
    """

    #: tau of NT-Xent: eq. 13 leaves its value open, eq. 15 prints none.
    temperature = 0.1

    def __init__(self, config: PolySRLConfig, objective: str) -> None:
        super().__init__()
        if objective not in OBJECTIVES:
            raise ValueError(f"objective is {objective!r}: must be one of {OBJECTIVES}")
        self.config = config
        self.objective = objective
        self.encoders = nn.ModuleList([StoichiometryEncoder(config)])
        self.structure_encoder = StructureEncoder(config)
        self.c = nn.Parameter(torch.tensor(float(config.c_init)))
        self.d = nn.Parameter(torch.tensor(float(config.d_init)))
        self.parts: dict[str, Tensor] = {}
        self.encoder.mean_norm.adaptive = self.structure_encoder.norm.adaptive = True

    @property
    def encoder(self) -> StoichiometryEncoder:
        """The encoder of formulas, the one that is kept."""
        return cast(StoichiometryEncoder, self.encoders[0])

    def member_parameters(self) -> list[list[nn.Parameter]]:
        """All parameters as one group for the clipping of gradients (Appendix B.3)."""
        return [list(self.parameters())]

    def forward(
        self,
        formulas: StoichiometryBatch,
        structures: StructureBatch | None,
        groups: Tensor,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Loss of a batch in which structure ``i`` has formula ``i``.

        With several processes the batch is that of all of them.

        Parameters
        ----------
        formulas : StoichiometryBatch
        structures : StructureBatch or None
            Not read by ``graphcl``.
        groups : torch.Tensor, shape (n_graphs,), int64
            Equal where the reduced formulas are equal: such pairs match.
        generator : torch.Generator, optional
            Source of the samples and augmentations.

        Returns
        -------
        torch.Tensor, scalar

        Raises
        ------
        ValueError
            Structures are needed, and there are none.
        """
        if self.objective == "graphcl":
            views = torch.cat([augmented(formulas, generator).fractions for _ in range(2)])
            both = self.encoder.mean(StoichiometryBatch(views))  # whitening adapts once in a step
            first, second = map(gather_rows, both.chunk(2))
            return self._total(nt_xent=losses.nt_xent(first, second, self.temperature))
        if structures is None:
            raise ValueError(f"{self.objective} needs structures")
        mean, log_sigma = self.encoder(formulas)
        mean, crystal, groups = map(gather_rows, (mean, self.structure_encoder(structures), groups))
        if self.objective == "infomax3d":
            return self._total(nt_xent=losses.nt_xent(mean, crystal, self.temperature))
        if self.objective == "without_sampling":
            samples = mean.unsqueeze(1)
        else:
            log_sigma = gather_rows(log_sigma)
            samples = losses.sample_gaussian(mean, log_sigma, self.config.n_samples, generator)
        contrastive = losses.soft_contrastive_loss(
            samples,
            crystal,
            groups,
            groups,
            self.c,
            self.d,
            reduction=self.config.loss_reduction,
            polymorph_sum=self.config.polymorph_sum,
            form=self.config.match_form,
        )
        if self.objective == "without_sampling":
            return self._total(contrastive=contrastive)
        divergence = losses.gaussian_kl(mean, log_sigma, self.config.loss_reduction)
        return self._total(contrastive=contrastive, kl=self.config.beta * divergence)

    loss = forward

    def __getstate__(self) -> dict[str, Any]:
        """Without the parts of the last loss, which lie where the batch was."""
        return {**super().__getstate__(), "parts": {}}

    def _total(self, **parts: Tensor) -> Tensor:
        self.parts = {name: part.detach() for name, part in parts.items()}
        return torch.stack(list(parts.values())).sum()


def augmented(
    formulas: StoichiometryBatch, generator: torch.Generator | None = None
) -> StoichiometryBatch:
    """A view of each formula for GraphCL: one element dropped from some, all fractions perturbed.

    The published code augments nothing. Here an element (not the only one) is dropped from a fifth
    of the formulas, the node dropping of GraphCL (You et al. 2020), and each fraction is multiplied
    by a log-normal factor of 10 %, its edge perturbation on a complete graph.

    Parameters
    ----------
    formulas : StoichiometryBatch
    generator : torch.Generator, optional

    Returns
    -------
    StoichiometryBatch
        Of as many formulas; fractions add up to 1.

    Examples
    --------
    >>> salt = torch.zeros(1, 119)
    >>> salt[0, [11, 17]] = 0.5
    >>> view = augmented(StoichiometryBatch(salt), torch.Generator().manual_seed(0))
    >>> bool(torch.isclose(view.fractions.sum(), torch.tensor(1.0)))
    True
    """
    fractions = formulas.fractions
    like: dict[str, Any] = {"device": fractions.device, "dtype": fractions.dtype}
    like["generator"] = generator
    noise = torch.randn(fractions.shape, **like)
    scores = torch.rand(fractions.shape, **like)
    chance = torch.rand(len(fractions), **like)
    present = fractions > 0
    drops = (chance < 0.2) & (present.sum(1) > 1)
    dropped = torch.where(present, scores, -1.0).argmax(1)
    kept = fractions * torch.exp(0.1 * noise)
    kept[drops, dropped[drops]] = 0.0
    return StoichiometryBatch(kept / kept.sum(1, keepdim=True))
