"""Every loss against its equation written as loops of Python floats, and its gradient."""

import math

import pytest
import torch
from torch.autograd import gradcheck

from polysrl_dc import losses

GROUPS_A = torch.tensor([5, 2, 5, 9, 7])  # 9 has no structure
GROUPS_B = torch.tensor([2, 5, 7, 5, 3, 2])  # two polymorphs of 5 and of 2; 3 has no row
B, J, P, F = 5, 3, 6, 4


def double(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def problem():
    """Samples, structures, c, d near the threshold, so that no term is negligible."""
    scalars = torch.tensor(1.7, dtype=torch.float64), torch.tensor(2.9, dtype=torch.float64)
    return double(B, J, F), double(P, F), *scalars


def distance(x, y):
    return math.sqrt(sum((p - q) ** 2 for p, q in zip(x.tolist(), y.tolist(), strict=True)))


def probability(samples, structure, c, d, form):
    """Equation 4 for one structure."""
    values = [-c.item() * distance(x, structure) + d.item() for x in samples]
    if form == "hib":
        return sum(math.exp(s) / (math.exp(s) + math.exp(-s)) for s in values) / J
    return sum(1 / (1 + math.exp(-s)) for s in values) / J


def literal_pairs(samples, structures, c, d, form):
    terms = []
    for i in range(B):
        for p in range(P):
            m = probability(samples[i], structures[p], c, d, form)
            terms.append(-math.log(m if GROUPS_A[i] == GROUPS_B[p] else 1 - m))
    return terms


def literal_sets(samples, structures, c, d, form):
    terms = []
    for i in range(B):
        for group in sorted(set(GROUPS_B.tolist())):
            members = [
                probability(samples[i], structures[p], c, d, form)
                for p in range(P)
                if GROUPS_B[p] == group
            ]
            if GROUPS_A[i] == group:
                terms.append(-math.log(min(1.0, sum(members))))
            else:
                terms.append(-math.log(math.prod(1 - m for m in members)))
    return terms


@pytest.mark.parametrize("form", ["sigmoid", "hib"])
@pytest.mark.parametrize("polymorph_sum", [False, True])
def test_soft_contrastive_loss_is_its_equation(polymorph_sum, form):
    inputs = problem()
    terms = (literal_sets if polymorph_sum else literal_pairs)(*inputs, form)
    samples, structures, c, d = inputs
    for reduction, expected in [("sum", sum(terms)), ("mean", sum(terms) / len(terms))]:
        loss = losses.soft_contrastive_loss(
            samples,
            structures,
            GROUPS_A,
            GROUPS_B,
            c,
            d,
            reduction=reduction,
            polymorph_sum=polymorph_sum,
            form=form,
        )
        assert loss.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("form", ["sigmoid", "hib"])
@pytest.mark.parametrize("polymorph_sum", [False, True])
def test_soft_contrastive_gradient(polymorph_sum, form):
    inputs = [x.requires_grad_() for x in problem()]

    def loss(samples, structures, c, d):
        return losses.soft_contrastive_loss(
            samples, structures, GROUPS_A, GROUPS_B, c, d, polymorph_sum=polymorph_sum, form=form
        )

    assert gradcheck(loss, inputs)


def test_one_near_polymorph_suffices_only_under_the_sum():
    sample, c = torch.zeros(1, 1, 2), torch.tensor(20.0)
    structures = torch.tensor([[0.0, 0.0], [0.0, 3.0]])
    ids = torch.zeros(2, dtype=torch.int64)
    arguments = (sample, structures, ids[:1], ids, c, c)
    assert losses.soft_contrastive_loss(*arguments, polymorph_sum=True) < 1e-6
    assert losses.soft_contrastive_loss(*arguments) == pytest.approx(20.0, rel=1e-3)


def test_without_polymorphs_both_readings_agree():
    samples, structures, c, d = problem()
    ids = torch.arange(B)
    arguments = (samples, structures[:B], ids, ids, c, d)
    pairs = losses.soft_contrastive_loss(*arguments)
    torch.testing.assert_close(losses.soft_contrastive_loss(*arguments, polymorph_sum=True), pairs)


@pytest.mark.parametrize("polymorph_sum", [False, True])
def test_saturated_logits_keep_finite_loss_and_gradient(polymorph_sum):
    samples = (1e3 * torch.randn(B, J, F)).requires_grad_()
    structures = 1e3 * torch.randn(P, F)
    structures[0] = samples.detach()[0, 0]
    c = torch.tensor(20.0)
    loss = losses.soft_contrastive_loss(
        samples, structures, GROUPS_A, GROUPS_B, c, c, polymorph_sum=polymorph_sum
    )
    loss.backward()
    assert loss > 1e3 and torch.isfinite(loss)
    assert torch.isfinite(samples.grad).all() and samples.grad.abs().sum() > 0


def test_match_logits_and_probability():
    samples, structures, c, d = problem()
    logits = losses.match_logits(samples, structures, c, d)
    for i in range(B):
        for p in range(P):
            for j in range(J):
                s = -c.item() * distance(samples[i, j], structures[p]) + d.item()
                assert logits[i, j, p].item() == pytest.approx(s, rel=1e-12)
    for form in ("sigmoid", "hib"):
        found = losses.log_match_probability(logits, form).exp()
        expected = [[probability(x, y, c, d, form) for y in structures] for x in samples]
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_distance_has_zero_gradient_where_points_coincide():
    a = torch.randn(3, F).requires_grad_()
    distances = losses.pair_distances(a, a.detach())
    assert distances.diagonal().tolist() == [0.0] * 3
    distances.diagonal().sum().backward()
    assert a.grad.tolist() == [[0.0] * F] * 3


def test_distance_gradient():
    assert gradcheck(losses.pair_distances, [double(3, F).requires_grad_(), double(2, F)])


def test_distances_under_autocast_are_float32():
    a = torch.nn.functional.normalize(torch.randn(8, 200), dim=-1)
    b = a + 1e-3 * torch.randn(8, 200)
    expected = torch.cdist(a.double(), b.double())
    with torch.autocast("cpu", torch.bfloat16):
        found = losses.pair_distances(a, b)
    torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=0)


def test_samples_and_divergence_of_narrow_gaussians_are_float32():
    mean, log_sigma = torch.randn(2, B, F).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        samples, wide = (
            losses.sample_gaussian(*gaussian, J, torch.Generator().manual_seed(0))
            for gaussian in ((mean, log_sigma), (mean.float(), log_sigma.float()))
        )
        divergence = losses.gaussian_kl(mean, log_sigma)
    assert samples.dtype == torch.float32 and torch.equal(samples, wide)
    assert torch.equal(divergence, losses.gaussian_kl(mean.float(), log_sigma.float()))


@pytest.mark.parametrize("polymorph_sum", [False, True])
def test_no_tensor_has_samples_times_pairs_times_features(polymorph_sum):
    largest = 0

    def note(tensor):
        nonlocal largest
        largest = max(largest, tensor.numel())
        return tensor

    n, width = 32, 50
    samples, structures = torch.randn(n, 8, width).requires_grad_(), torch.randn(n, width)
    ids, c = torch.arange(n), torch.tensor(1.0)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        losses.soft_contrastive_loss(
            samples, structures, ids, ids, c, c, polymorph_sum=polymorph_sum
        )
    assert 0 < largest <= n * 8 * width


def test_samples_have_the_mean_and_the_standard_deviation():
    mean, log_sigma = torch.tensor([[1.0, -2.0]]), torch.tensor([[0.5, 3.0]]).log()
    samples = losses.sample_gaussian(mean, log_sigma, 200_000)
    torch.testing.assert_close(samples.mean(dim=1), mean, atol=0.03, rtol=0)
    torch.testing.assert_close(samples.std(dim=1), torch.tensor([[0.5, 3.0]]), rtol=0.01, atol=0)


def test_samples_are_reparameterized_and_seeded():
    mean, log_sigma = double(B, F).requires_grad_(), double(B, F).requires_grad_()

    def draw(mean, log_sigma):
        return losses.sample_gaussian(mean, log_sigma, J, torch.Generator().manual_seed(4))

    noise = draw(torch.zeros_like(mean), torch.zeros_like(mean))
    for j in range(J):
        expected = mean + log_sigma.exp() * noise[:, j]
        torch.testing.assert_close(draw(mean, log_sigma)[:, j], expected)
    assert gradcheck(draw, [mean, log_sigma])


def literal_kl(mean, log_sigma):
    rows = zip(mean.tolist(), log_sigma.tolist(), strict=True)
    return [
        sum(0.5 * (math.exp(2 * s) + m * m - 1 - 2 * s) for m, s in zip(*row, strict=True))
        for row in rows
    ]


def test_kl_is_its_equation():
    mean, log_sigma = double(B, F), double(B, F)
    terms = literal_kl(mean, log_sigma)
    assert losses.gaussian_kl(mean, log_sigma, "sum").item() == pytest.approx(sum(terms))
    assert losses.gaussian_kl(mean, log_sigma).item() == pytest.approx(sum(terms) / B)
    normal = torch.distributions.Normal(mean, log_sigma.exp())
    expected = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0))
    torch.testing.assert_close(losses.gaussian_kl(mean, log_sigma, "sum"), expected.sum())
    assert gradcheck(losses.gaussian_kl, [mean.requires_grad_(), log_sigma.requires_grad_()])


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_total_loss_is_equation_6(reduction):
    mean, log_sigma, (_, structures, c, d) = double(B, F), double(B, F), problem()
    total = losses.polysrl_loss(
        mean,
        log_sigma,
        structures,
        GROUPS_A,
        GROUPS_B,
        c,
        d,
        n_samples=J,
        beta=0.3,
        reduction=reduction,
        generator=torch.Generator().manual_seed(1),
    )
    samples = losses.sample_gaussian(mean, log_sigma, J, torch.Generator().manual_seed(1))
    pairs, kl = literal_pairs(samples, structures, c, d, "sigmoid"), literal_kl(mean, log_sigma)
    expected = sum(pairs) + 0.3 * sum(kl)
    if reduction == "mean":
        expected = sum(pairs) / len(pairs) + 0.3 * sum(kl) / len(kl)
    assert total.item() == pytest.approx(expected, rel=1e-12)


def literal_nt_xent(a, b, temperature, positive_in_denominator):
    def cosine(x, y):
        dot = sum(p * q for p, q in zip(x.tolist(), y.tolist(), strict=True))
        return dot / (x.norm() * y.norm()).item()

    terms = []
    for n in range(len(a)):
        others = [k for k in range(len(b)) if positive_in_denominator or k != n]
        bottom = sum(math.exp(cosine(a[n], b[k]) / temperature) for k in others)
        terms.append(-math.log(math.exp(cosine(a[n], b[n]) / temperature) / bottom))
    return terms


@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_nt_xent_is_its_equation(temperature, positive):
    a, b = double(B, F).requires_grad_(), double(B, F).requires_grad_()
    terms = literal_nt_xent(a.detach(), b.detach(), temperature, positive)

    def loss(a, b, reduction="mean"):
        return losses.nt_xent(
            a, b, temperature, positive_in_denominator=positive, reduction=reduction
        )

    assert loss(a, b).item() == pytest.approx(sum(terms) / B, rel=1e-12)
    assert loss(a, b, "sum").item() == pytest.approx(sum(terms), rel=1e-12)
    assert gradcheck(loss, [a, b])


def test_effective_rank():
    """Known cases, and invariance to rotation, scale and shift."""
    basis = torch.cat([torch.eye(6), -torch.eye(6)])
    assert losses.effective_rank(basis).item() == pytest.approx(6.0)
    assert losses.effective_rank(basis[:, :2] * torch.tensor([1.0, 0.0])).item() == 1.0
    assert losses.effective_rank(torch.full((5, 3), 0.1)).item() == 0.0
    # singular values 3 sqrt(2), 1 sqrt(2): shares of the variance 9/10, 1/10
    uneven = torch.tensor([[3.0, 0.0], [-3.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    expected = math.exp(-0.9 * math.log(0.9) - 0.1 * math.log(0.1))
    rotation = torch.linalg.qr(torch.randn(2, 2))[0]
    for matrix in (uneven, 7 * uneven @ rotation + 1):
        assert losses.effective_rank(matrix).item() == pytest.approx(expected, rel=1e-5)


def test_retrieval_at_k():
    similarity = torch.tensor([[9.0, 8.0, 7.0, 6.0], [1.0, 4.0, 3.0, 2.0], [1.0, 2.0, 3.0, 4.0]])
    rows, columns = torch.tensor([1, 2, 8]), torch.tensor([0, 1, 2, 1])  # 8 has no match
    found = [losses.retrieval_at_k(similarity, rows, columns, k).item() for k in (1, 2, 3, 9)]
    assert found == [0.0, 1.0, 1.0, 1.0]
    assert losses.retrieval_at_k(similarity[:1], rows[:1], columns, k=2).item() == 1.0
    similarity[0, 3] = 10.0
    assert losses.retrieval_at_k(similarity, rows, columns).item() == 0.5


def test_refused_arguments():
    samples, structures, c, d = problem()
    arguments = (samples, structures, GROUPS_A, GROUPS_B, c, d)
    for polymorph_sum in (False, True):
        with pytest.raises(ValueError, match="reduction is 'none'"):
            losses.soft_contrastive_loss(*arguments, reduction="none", polymorph_sum=polymorph_sum)
    with pytest.raises(ValueError, match="form is 'softmax'"):
        losses.soft_contrastive_loss(*arguments, form="softmax")
    with pytest.raises(ValueError, match="two or more pairs"):
        losses.nt_xent(double(1, F), double(1, F))
