"""A context in which reading a tensor from the host raises: what waits for a GPU must not be done on a CPU either."""

from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Operators whose result, or whose result's shape, the host must know; and methods that hand values to Python.
READING_OPERATORS = {
    "_local_scalar_dense", "nonzero", "masked_select", "unique_dim", "_unique2", "unique_consecutive", "equal", "item",
    "is_nonzero", "bincount", "repeat_interleave",
}  # fmt: skip
READING_METHODS = (
    "item", "tolist", "numpy", "cpu", "nonzero", "__bool__", "__int__", "__float__", "__index__", "__contains__",
    "__array__",
)  # fmt: skip


class HostRead(AssertionError):
    """The host would have read the device."""


class _Watch(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operators = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operators += 1
        name = func.overloadpacket.__name__
        # x[mask] with a bool mask is a nonzero in disguise.
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        if name in READING_OPERATORS or any(i is not None and i.dtype == torch.bool for i in indices):
            raise HostRead(f"{func} reads the device")
        return func(*args, **(kwargs or {}))


@contextmanager
def forbid_host_reads():
    """Yields an object whose `operators` counts the operators that ran."""

    def refuse(name):
        def read(*_, **__):
            raise HostRead(f"Tensor.{name} reads the device")

        return read

    with ExitStack() as stack:
        for name in READING_METHODS:
            stack.enter_context(mock.patch.object(torch.Tensor, name, refuse(name)))
        yield stack.enter_context(_Watch())
