"""Pretraining objectives: what is asked of the two encoders; they differ only in the loss."""

import torch
from torch import Tensor, nn

from polysrl_dc import losses
from polysrl_dc.config import PolySRLConfig
from polysrl_dc.graphs import StoichiometryBatch, StructureBatch
from polysrl_dc.stoichiometry_encoder import StoichiometryEncoder
from polysrl_dc.structure_encoder import StructureEncoder

OBJECTIVES = ("polysrl", "without_sampling", "infomax3d")


class PretrainingNetwork(nn.Module):
    """Both encoders with the loss that aligns them (Section 4.3, Figure 2).

    Parameters
    ----------
    config : PolySRLConfig
    objective : {"polysrl", "without_sampling", "infomax3d"}
        ``polysrl``: soft contrastive loss over samples of each Gaussian plus KL (eq. 6);
        ``without_sampling``: the same on the means (Appendix F.4, no KL);
        ``infomax3d``: NT-Xent between mean and structure (eq. 15).
    """

    #: Temperature of NT-Xent, as in 3D Infomax.
    temperature = 0.1

    def __init__(self, config: PolySRLConfig, objective: str) -> None:
        super().__init__()
        if objective not in OBJECTIVES:
            raise ValueError(f"objective is {objective!r}: must be one of {OBJECTIVES}")
        self.config = config
        self.objective = objective
        self.encoders = nn.ModuleList([StoichiometryEncoder(config)])
        self.structure_encoder = StructureEncoder(config)
        self.c = nn.Parameter(torch.tensor(config.c_init))
        self.d = nn.Parameter(torch.tensor(config.d_init))

    def member_parameters(self) -> list[list[nn.Parameter]]:
        """All parameters as one group for the clipping of gradients (Appendix B.3)."""
        return [list(self.parameters())]

    def loss(
        self,
        formulas: StoichiometryBatch,
        structures: StructureBatch,
        groups: Tensor,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Loss of a batch in which structure ``i`` has formula ``i``.

        Parameters
        ----------
        formulas : StoichiometryBatch
        structures : StructureBatch
        groups : torch.Tensor, shape (n_graphs,), int64
            Equal where the reduced formulas are equal: such pairs match.
        generator : torch.Generator, optional
            Source of the samples.

        Returns
        -------
        torch.Tensor, scalar
        """
        mean, log_sigma = self.encoders[0](formulas)
        crystal = self.structure_encoder(structures)
        if self.objective == "infomax3d":
            return losses.nt_xent(mean, crystal, self.temperature)
        if self.objective == "without_sampling":
            return losses.soft_contrastive_loss(
                mean.unsqueeze(1), crystal, groups, groups, self.c, self.d
            )
        return losses.polysrl_loss(
            mean,
            log_sigma,
            crystal,
            groups,
            groups,
            self.c,
            self.d,
            n_samples=self.config.n_samples,
            beta=self.config.beta,
            generator=generator,
        )
