"""Linear maps in float32 on a CPU by oneDNN.

torch takes MKL for them, which on the AMD processor at hand runs at half the speed (``python
benchmarks/linear.py`` measures it). Sums are rounded in another order; nothing else differs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.benchmark import Timer

#: The operator that ``torch.compile`` calls for linear maps of constant weights; no public one
#: leads to oneDNN in float32. None where this torch lacks it.
_ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """(n, i), (o, i), (o,) -> (n, o)."""
    assert _ONEDNN is not None
    return _ONEDNN(_dense(x), _dense(weight), bias, "none", [], "")


def _dense(x: Tensor) -> Tensor:
    """The same without gaps between rows or columns, with which oneDNN is far slower."""
    return x if x.is_contiguous() or x.T.is_contiguous() else x.contiguous()


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        into_x, into_weight, into_bias = ctx.needs_input_grad
        return (
            _product(grad, weight.T) if into_x else None,
            _product(grad.T, x.T) if into_weight else None,
            grad.sum(0) if into_bias else None,
        )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """:func:`torch.nn.functional.linear`; by oneDNN where rows of float32 lie on a CPU.

    Parameters
    ----------
    x : torch.Tensor, shape (..., n_inputs)
    weight : torch.Tensor, shape (n_outputs, n_inputs)
    bias : torch.Tensor, shape (n_outputs,), optional

    Examples
    --------
    >>> x, weight = torch.randn(3, 4), torch.randn(2, 4)
    >>> bool(torch.allclose(linear(x, weight), x @ weight.T, atol=1e-5))
    True
    """
    fits = x.ndim == 2 and x.numel() > 0 and x.dtype == weight.dtype == torch.float32
    if _ONEDNN is None or not fits or x.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return functional.linear(x, weight, bias)
    return _Linear.apply(x, weight, bias)


class Linear(nn.Linear):
    """:class:`torch.nn.Linear` by :func:`linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., n_inputs) -> (..., n_outputs)."""
        return linear(x, self.weight, self.bias)


def main() -> None:
    """Print milliseconds of a map and its gradients at sizes of CrabNet, by MKL and by oneDNN."""
    torch.set_num_threads(1)
    for rows, n_inputs, n_outputs in ((64, 512, 512), (512, 512, 2048), (512, 2048, 512)):
        x, weight, bias = (
            torch.randn(shape, requires_grad=True)
            for shape in ((rows, n_inputs), (n_outputs, n_inputs), (n_outputs,))
        )
        took = [
            Timer("f(x, w, b).sum().backward()", globals={"f": f, "x": x, "w": weight, "b": bias})
            .blocked_autorange(min_run_time=1)
            .median
            * 1e3
            for f in (functional.linear, linear)
        ]
        ratio = took[0] / took[1]
        print(
            f"{rows} x {n_inputs} -> {n_outputs}: {took[0]:.2f} and {took[1]:.2f} ms, {ratio:.2f}"
        )


if __name__ == "__main__":
    main()
