"""What every public function checks of a tensor that it is given: one rule, and errors that name the argument."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTS = (torch.int32, torch.int64)
NUMBERS = (*FLOATS, torch.uint8, torch.int8, torch.int16, *INTS)
_ORDINARY = (Tensor, torch.nn.Parameter)


def plain_tensor(name: str, value: object, dtypes: tuple[torch.dtype, ...] | None = None) -> Tensor:
    """``value``, if it is a tensor that holds its numbers in strided memory of its own, in one of ``dtypes``.

    Refused by name: sparse, mkldnn, nested and quantised tensors, and subclasses that take part in dispatch (DTensor,
    torchao's and others). What stands for a plain tensor while torch.compile or make_fx traces passes. No value is
    looked at.

    Raises:
        TypeError: what it is, or its dtype.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if type(value) not in _ORDINARY:
        _check_class(name, value)
    if value.layout is not torch.strided or value.is_nested:
        kind = "a nested tensor" if value.is_nested else f"layout {str(value.layout).removeprefix('torch.')}"
        raise TypeError(f"{name} must be a dense torch.Tensor, got {kind}")
    if dtypes is not None and value.dtype not in dtypes:
        expected = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{name} must have dtype {expected}, got {str(value.dtype).removeprefix('torch.')}")
    if value.is_quantized:
        raise TypeError(f"{name} must be a dense torch.Tensor, got a quantized one, {value.dtype}")
    return value


def _check_class(name: str, value: Tensor) -> None:
    """A subclass that changes what torch does with it is no memory to hand to a kernel."""
    kind = type(value)
    if kind.__module__.startswith("torch._subclasses"):  # FakeTensor, FunctionalTensor
        return
    if _changes(kind, "__torch_function__") or _changes(kind, "__torch_dispatch__"):
        if hasattr(value, "full_tensor"):
            raise TypeError(
                f"{name} must be a whole torch.Tensor, got a sharded DTensor: under FSDP2 call this inside the forward "
                "of the module that owns it, which gathers it"
            )
        raise TypeError(f"{name} must be a plain torch.Tensor, got {kind.__name__}")


def _changes(kind: type, hook: str) -> bool:
    owner = next((one for one in kind.__mro__ if hook in vars(one)), None)
    if owner in (None, torch._C.TensorBase, *_ORDINARY):
        return False
    return vars(owner)[hook] is not torch._C._disabled_torch_function_impl


def shape_text(leading: tuple[int, ...], last: str) -> str:
    """A shape whose last size has a name: ``(4, 6, V)``."""
    return f"({', '.join(map(str, (*leading, last)))})"


def check_shape(name: str, value: Tensor, *allowed: tuple[int, ...]) -> None:
    if tuple(value.shape) not in allowed:
        expected = " or ".join(str(shape) for shape in dict.fromkeys(allowed))
        raise ValueError(f"{name} must have shape {expected}, got {tuple(value.shape)}")


def looks_free(value: Tensor) -> bool:
    """Whether looking at values costs no device sync and no graph break."""
    return value.device.type == "cpu" and not torch.compiler.is_compiling()


def check_mask(name: str, mask: Tensor) -> None:
    """A mask in numbers holds 0 and 1: looked at where that costs no device sync."""
    if mask.dtype is torch.bool or not looks_free(mask):
        return
    odd = mask[(mask != 0) & (mask != 1)]
    if odd.numel():
        raise ValueError(f"{name} must hold 0 (left out) and 1 (counts), got {odd[0].item():g}")


def check_offsets(cu_seqlens: Tensor, num_tokens: int) -> None:
    """Looked at where that costs no device sync."""
    if not looks_free(cu_seqlens):
        return
    steps = cu_seqlens.diff()
    if int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != num_tokens or bool((steps < 0).any()):
        raise ValueError(
            f"cu_seqlens must rise from 0 to N = {num_tokens} without falling, got first {int(cu_seqlens[0])}, "
            f"last {int(cu_seqlens[-1])}, smallest step {int(steps.min()) if steps.numel() else 0}"
        )


def holds_numbers(value: Tensor, weight: bool) -> bool:
    """Whether all of it is finite and, of weights, not negative: one pass."""
    if value.numel() == 0:
        return True
    low, high = (float(bound) for bound in value.aminmax())  # nan if any is
    return low >= (0.0 if weight else -sys.float_info.max) and high <= sys.float_info.max


def refuse_odd(name: str, value: Tensor, read: Tensor, weight: bool) -> None:
    """ValueError for the first value at a place that is ``read`` which is not finite, or a negative weight."""
    odd = read & ~value.isfinite()
    if weight:
        odd = odd | (read & (value < 0))
    places = odd.nonzero()
    if len(places):
        place = tuple(places[0].tolist())
        expected = "finite and not negative" if weight else "finite"
        raise ValueError(
            f"{name} must be {expected} at every token that reads it, got {value[place].item():g} at "
            f"{list(place)} and {len(places) - 1} more"
        )
