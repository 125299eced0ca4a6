"""Linear maps by oneDNN: those of torch, with their gradients, wherever they are asked for."""

import linear
import pytest
import torch
from torch.nn import functional

#: As on a torch that lacks the operator of oneDNN.
OPERATOR = linear._ONEDNN or (lambda x, weight, bias, *_: functional.linear(x, weight, bias))


@pytest.mark.parametrize("rows", [1, 7, 300])
@pytest.mark.parametrize("with_bias", [True, False])
def test_values_and_gradients_are_those_of_torch(rows, with_bias):
    torch.manual_seed(0)
    given = [torch.randn(rows, 20), torch.randn(30, 20), torch.randn(30) if with_bias else None]
    found = []
    for function in (functional.linear, linear.linear):
        x, weight, bias = (
            None if part is None else part.clone().requires_grad_() for part in given
        )
        out = function(x, weight, bias)
        (out**2).sum().backward()
        found.append([out.detach(), *(part.grad for part in (x, weight, bias) if part is not None)])
    assert len(found[0]) == 3 + with_bias
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)


def test_only_the_gradients_asked_for_are_computed(monkeypatch):
    products, product = [], linear._product
    monkeypatch.setattr(linear, "_product", lambda *a: products.append(a) or product(*a))
    monkeypatch.setattr(linear, "_ONEDNN", OPERATOR)
    weight = torch.randn(3, 2, requires_grad=True)
    linear.linear(torch.randn(4, 2), weight).sum().backward()
    assert len(products) == 2 and weight.grad.shape == (3, 2)


def test_onednn_gets_no_matrix_with_gaps(monkeypatch):
    def checked(x, weight, *others):
        assert all(part.is_contiguous() or part.T.is_contiguous() for part in (x, weight))
        return OPERATOR(x, weight, *others)

    monkeypatch.setattr(linear, "_ONEDNN", checked)
    whole = torch.randn(8, 10, requires_grad=True)
    x, weight = whole[:, :4], torch.randn(6, 10, requires_grad=True)[:, 2:6]
    out = linear.linear(x, weight)
    torch.testing.assert_close(out, functional.linear(x, weight), rtol=1e-4, atol=1e-4)
    out[:, :3].sum().backward()
    expected = weight[:3].sum(0).expand(8, 4)
    torch.testing.assert_close(whole.grad[:, :4], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("x", "kind"),
    [
        (torch.randn(4, 5, 2), torch.float32),
        (torch.randn(2), torch.float32),
        (torch.randn(0, 2), torch.float32),
        (torch.randn(4, 2), torch.float64),
        (torch.randn(4, 2), torch.bfloat16),
    ],
)
def test_what_it_is_not_made_for_is_left_to_torch(x, kind, monkeypatch):
    monkeypatch.setattr(linear, "_product", lambda *_: pytest.fail("taken for rows of float32"))
    layer = linear.Linear(2, 3).to(kind)
    expected = functional.linear(x.to(kind), layer.weight, layer.bias)
    assert torch.equal(layer(x.to(kind)), expected) and layer(x.to(kind)).dtype == kind


def test_autocast_and_a_torch_without_the_operator(monkeypatch):
    x, layer = torch.randn(4, 2), linear.Linear(2, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    monkeypatch.setattr(linear, "_ONEDNN", None)
    assert torch.equal(layer(x), functional.linear(x, layer.weight, layer.bias))
