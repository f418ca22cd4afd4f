"""Looks into Triton's interpreter while it runs a kernel: which addresses, in which order, how many launches."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor


@contextmanager
def wrapped(owner: Any, name: str, wrapper: Callable[..., Any]) -> Iterator[None]:
    """``owner.name(*args)`` becomes ``wrapper(the original, *args)``."""
    before = getattr(owner, name)
    setattr(owner, name, lambda *args, **kwargs: wrapper(before, *args, **kwargs))
    try:
        yield
    finally:
        setattr(owner, name, before)


def tensors_in(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for item in value for t in tensors_in(item)] if isinstance(value, tuple) else []


@contextmanager
def bounds_checked() -> Iterator[list[int]]:
    """Every lane that a kernel reads or writes must lie in a tensor it was given. Yields the lanes of each access."""
    from triton.runtime import interpreter

    allowed: list[tuple[int, int]] = []
    lanes: list[int] = []

    def check(pointers: Any, mask: Any, what: str) -> None:
        size = max(pointers.get_element_ty().primitive_bitwidth // 8, 1)
        addresses = pointers.data[mask.data.astype(bool)].reshape(-1).astype("int64").tolist()
        lanes.append(len(addresses))
        for address in addresses:
            if not any(first <= address and address + size <= last for first, last in allowed):
                raise AssertionError(f"a lane {what} out of bounds")

    def load(before, self, pointers, mask, *rest):
        check(pointers, mask, "reads")
        return before(self, pointers, mask, *rest)

    def store(before, self, pointers, value, mask, *rest):
        check(pointers, mask, "writes")
        return before(self, pointers, value, mask, *rest)

    def launch(before, self, *args, **kwargs):
        given = tensors_in((*args, *kwargs.values()))
        allowed[:] = [(t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in given]
        return before(self, *args, **kwargs)

    with ExitStack() as stack:
        stack.enter_context(wrapped(interpreter.InterpreterBuilder, "create_masked_load", load))
        stack.enter_context(wrapped(interpreter.InterpreterBuilder, "create_masked_store", store))
        stack.enter_context(wrapped(interpreter.GridExecutor, "__call__", launch))
        yield lanes


@contextmanager
def program_order(order: Callable[[int], list[int]]) -> Iterator[None]:
    """The programs of a grid run in ``order(their number)`` instead of one after the other."""
    from triton.runtime import interpreter

    now: list[int] = []

    def set_dim(before, x, y, z):
        now[:] = order(x)
        assert sorted(now) == list(range(x))
        return before(x, y, z)

    with ExitStack() as stack:
        builder = interpreter.interpreter_builder
        stack.enter_context(wrapped(builder, "set_grid_dim", set_dim))
        stack.enter_context(wrapped(builder, "set_grid_idx", lambda before, x, y, z: before(now[x], y, z)))
        yield


@contextmanager
def launches() -> Iterator[list[str]]:
    """The names of the kernels launched inside."""
    from triton.runtime import interpreter

    names: list[str] = []

    def call(before, self, *args, **kwargs):
        names.append(self.fn.__name__)
        return before(self, *args, **kwargs)

    with wrapped(interpreter.GridExecutor, "__call__", call):
        yield names


def patch_languages_once_a_launch() -> None:
    """The interpreter swaps triton.language for its own at every call of a device function; that was half its time."""
    from triton import language as tl
    from triton.runtime import interpreter

    done: set[tuple[int, ...]] = set()
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__

    def patch_once(fn):
        found = tuple(sorted({id(v) for v in fn.__globals__.values() if inspect.ismodule(v) and v in (tl, tl.core)}))
        if found not in done:
            done.add(found)
            return patch(fn)
        return None

    def launch_afresh(self, *args, **kwargs):
        done.clear()
        return launch(self, *args, **kwargs)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_once, launch_afresh


def patch_rounding_to_bfloat16() -> None:
    """The interpreter cuts the last 16 bits of a float32 off; every GPU rounds to nearest, ties to even."""
    import numpy as np
    import torch
    from triton import language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounded(value, input_dtype, output_dtype, mode):
        if (input_dtype, output_dtype) != (tl.float32, tl.bfloat16):
            return convert(value, input_dtype, output_dtype, mode)
        wide = torch.from_numpy(np.ascontiguousarray(value).view(np.float32).copy())
        return wide.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16).reshape(np.shape(value))

    interpreter._convert_float = rounded
