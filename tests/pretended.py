"""A GPU that is not there: tensors say that they lie on the device ``gpu``, and the CPU computes.

What a real one refuses is refused here: operands on both devices, a generator of the other one, and
NumPy's look into its memory. What functorch computes (``vmap``) is beyond it. A process that has
computed a gradient before can have no such device any more.
"""

import contextlib
from collections.abc import Iterator
from typing import Any, ClassVar
from unittest.mock import patch

import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

aten = torch.ops.aten
#: What may have tensors on both devices, and where rows of a GPU may be named by the CPU.
COPIES = (aten._to_copy.default, aten.copy_.default)
INDEXING = (aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default)


class OnGpu(torch.Tensor):
    """A tensor on the pretended GPU; ``inner`` is where its numbers are."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> "OnGpu":
        like = {"strides": inner.stride(), "storage_offset": inner.storage_offset()}
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), **like, dtype=inner.dtype, device="gpu:0"
        )

    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, operator: Any, types: Any, args: Any, kwargs: Any = None) -> Any:
        return _computed(operator, args, kwargs or {})


class _Pretending(TorchDispatchMode):
    """Sees what makes a tensor on the device out of none."""

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any, kwargs: Any = None) -> Any:
        return _computed(operator, args, kwargs or {})


class _Generator(torch.Generator):
    """A generator of the CPU that says where its numbers are drawn."""

    of_gpu: ClassVar[set[int]] = set()

    def __new__(cls, device: torch.device | str = "cpu") -> "_Generator":
        made = super().__new__(cls, "cpu")
        if torch.device(device).type == "gpu":
            cls.of_gpu.add(made._cdata)
        else:
            cls.of_gpu.discard(made._cdata)
        return made

    def __init__(self, device: torch.device | str = "cpu") -> None: ...


def _computed(operator: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    there = {id(tensor.inner): tensor for tensor in tensors if isinstance(tensor, OnGpu)}
    here = [tensor for tensor in tensors if not isinstance(tensor, OnGpu) and tensor.ndim > 0]
    if operator in INDEXING and isinstance(args[0], OnGpu):
        here = [tensor for tensor in here if not any(tensor is rows for rows in args[1])]
    if there and here and operator not in COPIES:
        shapes = [tuple(tensor.shape) for tensor in tensors]
        raise RuntimeError(f"{operator} of tensors of shapes {shapes} on the GPU and the CPU")
    if kwargs.get("device") is not None:
        on_gpu = torch.device(kwargs["device"]).type == "gpu"
    else:
        on_gpu = isinstance(args[0], OnGpu) if operator in COPIES else bool(there)
    generator = kwargs.get("generator")
    if generator is not None and (generator._cdata in _Generator.of_gpu) != on_gpu:
        raise RuntimeError(f"{operator} with a generator of the other device")
    given = tree_map_only(OnGpu, lambda tensor: tensor.inner, (args, kwargs))
    args, kwargs = tree_map_only(torch.device, lambda _: torch.device("cpu"), given)
    found = operator(*args, **kwargs)
    if not on_gpu:
        return found
    # what an operator on a tensor in place gives back is that tensor
    return tree_map_only(
        torch.Tensor, lambda x: there[id(x)] if id(x) in there else OnGpu(x), found
    )


@contextlib.contextmanager
def pretended_gpu() -> Iterator[str]:
    """Within it there is a device; yields its name.

    Examples
    --------
    >>> with pretended_gpu() as device:
    ...     print(torch.ones(2, device=device).sum().device)
    gpu:0
    """
    if not hasattr(torch, "gpu"):

        class Module(backend_registration._DummyBackendModule):
            def get_amp_supported_dtype(self) -> list[torch.dtype]:
                return [torch.bfloat16]

        backend_registration._setup_privateuseone_for_python_backend("gpu", Module())
    with patch.object(torch, "Generator", _Generator), _Pretending():
        yield "gpu"
