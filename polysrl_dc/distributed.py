"""What training over several processes needs beyond ``DistributedDataParallel``.

Negatives are shared: each process embeds its part of a batch, and the loss is that of the whole
batch on every process. Outside of ``torchrun`` all of this is the identity.
"""

import torch
from torch import Tensor
from torch import distributed as dist


def process_count() -> int:
    """Number of training processes; 1 without an initialized process group.

    Returns
    -------
    int

    Examples
    --------
    >>> process_count()
    1
    """
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_rank() -> int:
    """Number of this process, from 0.

    Returns
    -------
    int

    Examples
    --------
    >>> process_rank()
    0
    """
    return dist.get_rank() if process_count() > 1 else 0


def gather_rows(rows: Tensor) -> Tensor:
    """Rows of all processes in the order of their ranks; differentiable.

    Processes may have different numbers of rows. Each gradient that arrives here is added to those
    of the other processes, so that ``DistributedDataParallel``, which averages, yields the gradient
    of the loss of the whole batch.

    Parameters
    ----------
    rows : torch.Tensor, shape (b, ...)

    Returns
    -------
    torch.Tensor, shape (sum of b, ...)

    Examples
    --------
    >>> gather_rows(torch.ones(2, 3)).shape
    torch.Size([2, 3])
    """
    if process_count() == 1:
        return rows
    counts = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(process_count())]
    dist.all_gather(counts, torch.tensor([len(rows)], device=rows.device))
    lengths = [int(count) for count in counts]
    first = sum(lengths[: process_rank()])
    whole = rows.new_zeros(sum(lengths), *rows.shape[1:])
    placed = torch.cat([whole[:first], rows, whole[first + len(rows) :]])
    return sum_over_processes(placed)


def sum_over_processes(values: Tensor) -> Tensor:
    """Sum of a tensor over the processes; its gradient is summed as well.

    Parameters
    ----------
    values : torch.Tensor
        Of one shape in all of them.

    Returns
    -------
    torch.Tensor, of this shape
    """
    return values if process_count() == 1 else _AllReduce.apply(values)


class _AllReduce(torch.autograd.Function):
    """All-reduce whose backward is an all-reduce."""

    @staticmethod
    def forward(ctx: object, values: Tensor) -> Tensor:
        total = values.contiguous().clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        total = gradient.contiguous().clone()
        dist.all_reduce(total)
        return total
