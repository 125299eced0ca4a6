"""Losses and pretraining diagnostics as pure functions: tensors in, scalar out.

Shapes: B stoichiometries (rows), P structures (columns), J samples per stoichiometry, F features.
Rows and columns match where their group ids are equal (the same reduced formula), so polymorphs
in one batch are positives of one another. An unknown ``reduction`` or ``form`` is a ValueError.
"""

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from polysrl_dc.layers import at_least_float32

Reduction = Literal["mean", "sum"]
Form = Literal["sigmoid", "hib"]


def sample_gaussian(
    mean: Tensor, log_sigma: Tensor, n_samples: int, generator: torch.Generator | None = None
) -> Tensor:
    """Reparameterized samples mean + sigma * epsilon, epsilon ~ N(0, I) (after eq. 3).

    Parameters
    ----------
    mean : torch.Tensor, shape (B, F)
    log_sigma : torch.Tensor, shape (B, F)
        Natural logarithm of the standard deviation. The paper's z_sigma is the variance, so its
        square root is taken there: log_sigma = log(z_sigma) / 2.
    n_samples : int
        J.
    generator : torch.Generator, optional
        Source of epsilon.

    Returns
    -------
    torch.Tensor, shape (B, J, F)

    Examples
    --------
    >>> sample_gaussian(torch.zeros(2, 5), torch.zeros(2, 5), n_samples=8).shape
    torch.Size([2, 8, 5])
    """
    mean, log_sigma = at_least_float32(mean), at_least_float32(log_sigma)
    n_rows, width = mean.shape
    noise = torch.randn(
        n_rows, n_samples, width, generator=generator, device=mean.device, dtype=mean.dtype
    )
    return mean.unsqueeze(1) + log_sigma.exp().unsqueeze(1) * noise


def pair_distances(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean distances between all rows of ``a`` and ``b`` from one matrix product.

    ||a||^2 + ||b||^2 - 2 a.b, in float32 at least (also under autocast). Squares below the machine
    epsilon are noise for vectors of about unit length: distance 0 with gradient 0.

    Parameters
    ----------
    a : torch.Tensor, shape (..., F)
    b : torch.Tensor, shape (P, F)

    Returns
    -------
    torch.Tensor, shape (..., P)

    Examples
    --------
    >>> pair_distances(torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 0.0], [3.0, 4.0]])).tolist()
    [[5.0, 0.0]]
    """
    with torch.autocast(a.device.type, enabled=False):
        dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
        a, b = a.to(dtype), b.to(dtype)
        products = functional.linear(a, b)
        squared = (a**2).sum(-1, keepdim=True) + (b**2).sum(-1) - 2 * products
        apart = squared > torch.finfo(dtype).eps
        return torch.where(apart, squared, 1.0).sqrt() * apart


def match_logits(samples: Tensor, structures: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """Argument of the sigmoid in eq. 4: -c ||sample - structure|| + d.

    Parameters
    ----------
    samples : torch.Tensor, shape (B, J, F)
    structures : torch.Tensor, shape (P, F)
    c, d : torch.Tensor, scalar
        Scale and shift, positive.

    Returns
    -------
    torch.Tensor, shape (B, J, P)

    Examples
    --------
    >>> match_logits(torch.zeros(1, 1, 2), torch.eye(2), torch.tensor(20.0), torch.tensor(20.0))
    tensor([[[0., 0.]]])
    """
    return d - c * pair_distances(samples, structures)


def log_match_probability(logits: Tensor, form: Form = "sigmoid") -> Tensor:
    """Logarithm of eq. 4 for each pair: log of the mean over samples of sigmoid(logits).

    Parameters
    ----------
    logits : torch.Tensor, shape (B, J, P)
        s. For the probability of no match pass -s.
    form : {"sigmoid", "hib"}
        ``"sigmoid"`` as printed in eq. 4; ``"hib"`` e^s / (e^s + e^-s) = sigmoid(2 s), the form in
        the code of Hedged Instance Embeddings (Oh et al. 2018).

    Returns
    -------
    torch.Tensor, shape (B, P)

    Raises
    ------
    ValueError
        ``form`` is neither.

    Examples
    --------
    >>> log_match_probability(torch.zeros(1, 8, 1)).exp().tolist()
    [[0.5]]
    """
    if form not in ("sigmoid", "hib"):
        raise ValueError(f"form is {form!r}: sigmoid or hib")
    scale = 2.0 if form == "hib" else 1.0
    per_sample = functional.logsigmoid(scale * logits)
    return per_sample.logsumexp(dim=1) - math.log(logits.shape[1])


def soft_contrastive_loss(
    samples: Tensor,
    structures: Tensor,
    groups_a: Tensor,
    groups_b: Tensor,
    c: Tensor,
    d: Tensor,
    *,
    reduction: Reduction = "mean",
    polymorph_sum: bool = False,
    form: Form = "sigmoid",
) -> Tensor:
    """Negative log-likelihood of match or no match over all pairs of a batch (eq. 5).

    Parameters
    ----------
    samples : torch.Tensor, shape (B, J, F)
    structures : torch.Tensor, shape (P, F)
    groups_a : torch.Tensor, shape (B,), integer
        Formula of each stoichiometry.
    groups_b : torch.Tensor, shape (P,), integer
        Formula of each structure.
    c, d : torch.Tensor, scalar
        See :func:`match_logits`.
    reduction : {"mean", "sum"}
        Over the pairs; the paper does not say which.
    polymorph_sum : bool
        False: each pair of a stoichiometry and a structure is one term. True: each pair of a
        stoichiometry and the polymorph set of a formula is one term, and the probabilities of its
        members are added as printed in eq. 4, so that one near polymorph suffices. That sum can
        exceed 1, where eq. 5 has no meaning: for a match it is capped at 1, and for no match
        1 - sum p is replaced by prod (1 - p), its upper bound and equal to first order.
    form : {"sigmoid", "hib"}
        See :func:`log_match_probability`.

    Returns
    -------
    torch.Tensor, scalar

    Examples
    --------
    >>> ids, c, d = torch.arange(3), torch.tensor(20.0), torch.tensor(20.0)
    >>> apart = soft_contrastive_loss(torch.eye(3).unsqueeze(1), torch.eye(3), ids, ids, c, d)
    >>> mixed = soft_contrastive_loss(torch.eye(3).unsqueeze(1), torch.eye(3), ids, 2 - ids, c, d)
    >>> bool(apart < mixed)
    True
    """
    logits = match_logits(samples, structures, c, d)
    match = groups_a.unsqueeze(1) == groups_b.unsqueeze(0)
    if not polymorph_sum:
        signed = torch.where(match.unsqueeze(1), logits, -logits)
        return _reduce(-log_match_probability(signed, form), reduction)
    known = match.any(dim=1)  # rows without a structure in the batch have no term for a match
    members = log_match_probability(logits[known], form).masked_fill(~match[known], -math.inf)
    positive = -members.logsumexp(dim=1).clamp(max=0.0)
    negative = -log_match_probability(-logits, form).masked_fill(match, 0.0)
    total = positive.sum() + negative.sum()
    if reduction == "mean":
        return total / (len(samples) * len(groups_b.unique()))
    return _reduce(total, reduction)


def gaussian_kl(mean: Tensor, log_sigma: Tensor, reduction: Reduction = "mean") -> Tensor:
    """KL divergence of N(mean, sigma^2) from N(0, I) in closed form (the KL term of eq. 6).

    1/2 sum over features of (sigma^2 + mean^2 - 1 - 2 log sigma), the mean of an estimate by
    samples, which the paper does not rule out.

    Parameters
    ----------
    mean, log_sigma : torch.Tensor, shape (B, F)
        As in :func:`sample_gaussian`.
    reduction : {"mean", "sum"}
        Over the B rows; features are always summed.

    Returns
    -------
    torch.Tensor, scalar
        In nats.

    Examples
    --------
    >>> gaussian_kl(torch.zeros(2, 3), torch.zeros(2, 3)).item()
    0.0
    """
    mean, log_sigma = at_least_float32(mean), at_least_float32(log_sigma)
    per_feature = torch.expm1(2 * log_sigma) + mean**2 - 2 * log_sigma
    return _reduce(0.5 * per_feature.sum(dim=-1), reduction)


def polysrl_loss(
    mean: Tensor,
    log_sigma: Tensor,
    structures: Tensor,
    groups_a: Tensor,
    groups_b: Tensor,
    c: Tensor,
    d: Tensor,
    *,
    n_samples: int = 8,
    beta: float = 1e-8,
    reduction: Reduction = "mean",
    polymorph_sum: bool = False,
    form: Form = "sigmoid",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Soft contrastive loss on samples plus beta times the KL divergence (eq. 6).

    Parameters
    ----------
    mean, log_sigma : torch.Tensor, shape (B, F)
        As in :func:`sample_gaussian`.
    structures, groups_a, groups_b, c, d
        As in :func:`soft_contrastive_loss`.
    n_samples : int
        J.
    beta : float
        Weight of the KL term.
    reduction : {"mean", "sum"}
        Of both terms.
    polymorph_sum, form
        As in :func:`soft_contrastive_loss`.
    generator : torch.Generator, optional

    Returns
    -------
    torch.Tensor, scalar

    Examples
    --------
    >>> ids, c = torch.arange(4), torch.tensor(20.0)
    >>> polysrl_loss(torch.eye(4), -7 * torch.ones(4, 4), torch.eye(4), ids, ids, c, c).ndim
    0
    """
    samples = sample_gaussian(mean, log_sigma, n_samples, generator)
    contrastive = soft_contrastive_loss(
        samples,
        structures,
        groups_a,
        groups_b,
        c,
        d,
        reduction=reduction,
        polymorph_sum=polymorph_sum,
        form=form,
    )
    return contrastive + beta * gaussian_kl(mean, log_sigma, reduction)


def nt_xent(
    a: Tensor,
    b: Tensor,
    temperature: float = 1.0,
    *,
    positive_in_denominator: bool = False,
    reduction: Reduction = "mean",
) -> Tensor:
    """NT-Xent on cosine similarities: row n of ``a`` against all rows of ``b`` (eq. 13 and 15).

    Eq. 13 (GraphCL) is of two views of the stoichiometries, eq. 15 (3D Infomax) of stoichiometries
    and structures; it prints no temperature.

    Parameters
    ----------
    a, b : torch.Tensor, shape (N, F)
        Rows of equal index are positives; N is at least 2.
    temperature : float
        tau of eq. 13; positive.
    positive_in_denominator : bool
        False as printed (n' != n); True as in SimCLR (Chen et al. 2020).
    reduction : {"mean", "sum"}
        Over the N rows.

    Returns
    -------
    torch.Tensor, scalar

    Raises
    ------
    ValueError
        There are fewer than two pairs, or ``a`` and ``b`` differ in length.

    Examples
    --------
    >>> round(nt_xent(torch.eye(2), torch.eye(2)).item(), 6)
    -1.0
    """
    if len(a) != len(b) or len(a) < 2:
        raise ValueError(f"NT-Xent needs two or more pairs, not {len(a)} and {len(b)} rows")
    with torch.autocast(a.device.type, enabled=False):
        dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
        a, b = functional.normalize(a.to(dtype), dim=-1), functional.normalize(b.to(dtype), dim=-1)
        similarity = a @ b.T / temperature
    positive = similarity.diagonal()
    if not positive_in_denominator:
        itself = torch.eye(len(a), dtype=torch.bool, device=a.device)
        similarity = similarity.masked_fill(itself, -math.inf)
    return _reduce(similarity.logsumexp(dim=1) - positive, reduction)


@torch.no_grad()
def effective_rank(embeddings: Tensor) -> Tensor:
    """Number of dimensions that embeddings fill: exp of the entropy of the principal variances.

    The effective rank of Roy & Vetterli (2007) of the covariance matrix. Rows that are all equal
    fill 0 dimensions.

    Parameters
    ----------
    embeddings : torch.Tensor, shape (N, F)

    Returns
    -------
    torch.Tensor, scalar
        Between 1 and min(N - 1, F), or 0.

    Examples
    --------
    >>> effective_rank(torch.cat([torch.eye(3), -torch.eye(3)])).round(decimals=4).item()
    3.0
    """
    embeddings = embeddings.double()
    values = torch.linalg.svdvals(embeddings - embeddings.mean(dim=0))
    noise = max(embeddings.shape) * torch.finfo(torch.float32).eps * embeddings.norm()
    variances = values[values > noise] ** 2
    if not len(variances):
        return variances.sum()
    shares = variances / variances.sum()
    return (-(shares * shares.log()).sum()).exp()


@torch.no_grad()
def retrieval_at_k(similarity: Tensor, groups_a: Tensor, groups_b: Tensor, k: int = 1) -> Tensor:
    """Share of rows with a match among their k most similar columns.

    Parameters
    ----------
    similarity : torch.Tensor, shape (B, P)
        Greater is more similar: a log probability, cosine or negative distance.
    groups_a, groups_b : torch.Tensor, shape (B,) and (P,), integer
        Rows and columns with equal groups match. Rows without any matching column do not count.
    k : int
        Columns looked at.

    Returns
    -------
    torch.Tensor, scalar
        Between 0 and 1; NaN where no row counts.

    Examples
    --------
    >>> retrieval_at_k(torch.eye(4), torch.arange(4), torch.arange(4)).item()
    1.0
    """
    match = groups_a.unsqueeze(1) == groups_b.unsqueeze(0)
    best = similarity.topk(min(k, similarity.shape[1]), dim=1).indices
    hit = match.gather(1, best).any(dim=1)
    return hit[match.any(dim=1)].double().mean()


def _reduce(values: Tensor, reduction: Reduction) -> Tensor:
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction is {reduction!r}: mean or sum")
    return values.mean() if reduction == "mean" else values.sum()
