"""What a checkpoint can hold: plain data for `torch.load(weights_only=True)`, dense tensors for safetensors."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor

# What `torch.load(weights_only=True)` rebuilds: exact types, since a subclass (numpy.float64 is a float) is refused.
_LEAVES = (type(None), bool, float, complex, str, bytearray, torch.Size, torch.dtype, torch.device, torch.layout)
_SEQUENCES = (list, tuple, set)
_MAPPINGS = (dict, OrderedDict)
_TENSORS = (Tensor, torch.nn.Parameter)


def check_count(name: str, value: int, least: int) -> None:
    """Raise unless `value` is an int (no bool) of at least `least`."""
    if type(value) is not int:
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be >= {least}, got {value}")


def check_state(value: object, where: str) -> None:
    """Raise TypeError naming the entry that `weights_only=True` would refuse, while the run can still be mended."""
    kind = type(value)
    if where == "state" and kind not in _MAPPINGS:
        raise TypeError(f"state must be a dict, got {kind.__name__}")
    if isinstance(value, dict) and kind in _MAPPINGS:
        for key, item in value.items():
            check_state(key, f"the key {key!r} of {where}")
            check_state(item, f"{where}[{key!r}]")
    elif isinstance(value, _SEQUENCES) and kind in _SEQUENCES:
        for index, item in enumerate(value):
            check_state(item, f"{where}[{index}]")
    elif isinstance(value, Tensor) and kind in _TENSORS:
        for name, item in vars(value).items():  # Python attributes are stored along
            check_state(item, f"{where}.{name}")
    elif isinstance(value, bytes) and kind is bytes:
        if not value:  # pickled as a call of `bytes`, which is refused
            raise TypeError(f"{where} is an empty bytes object, which torch.load(weights_only=True) refuses")
    elif isinstance(value, int) and kind is int:
        if value.bit_length() >= 8 * 255:  # the pickle opcode for longer ones is refused
            raise TypeError(f"{where} is an int of {value.bit_length()} bits, torch.load(weights_only=True) reads 2039")
    elif kind not in _LEAVES:
        raise TypeError(
            f"{where} is a {kind.__module__}.{kind.__qualname__}, which torch.load(weights_only=True) refuses; "
            "store plain Python numbers, strings, dicts, lists, tuples, sets and tensors"
        )


def untie(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Split into what safetensors can hold (contiguous, on the CPU, no shared memory) and alias -> stored name."""
    unique: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first_name: dict[tuple[object, ...], str] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        where = f"tensors[{name!r}]"
        if type(name) is not str:
            raise TypeError(f"{where}: names must be str, got {type(name).__name__}")
        if type(tensor) not in _TENSORS:
            raise TypeError(f"{where} must be a plain tensor (gather a sharded one first), got {type(tensor).__name__}")
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
            raise TypeError(f"{where} must be a dense tensor with data, got {tensor.layout} on {tensor.device}")
        view = (tensor.device, tensor.dtype, tensor.shape, tensor.stride(), tensor.is_conj(), tensor.is_neg())
        if tensor.numel() and (same := first_name.setdefault((tensor.data_ptr(), *view), name)) != name:
            aliases[name] = same
            continue
        plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
        if plain.untyped_storage().data_ptr() in storages:
            plain = plain.clone()
        storages.add(plain.untyped_storage().data_ptr())
        unique[name] = plain
    return unique, aliases
