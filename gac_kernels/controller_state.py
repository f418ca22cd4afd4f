"""What a controller saves: the entries of its state_dict, and the reading of one, of this version or an older."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import controller_schema as schema
from .config import ControllerConfig

# The tensors of a state_dict, by name: shape, dtype, and place in the state on the device.
STATE: dict[str, tuple[tuple[int, ...], torch.dtype, int | slice]] = {
    "mu": ((), torch.float64, schema.MU),
    "mu_star": ((), torch.float64, schema.MU_STAR),
    "estimate": ((), torch.float64, schema.ESTIMATE),  # e
    "alpha": ((), torch.float64, schema.ALPHA),
    "signals": ((3,), torch.float64, schema.SIGNALS),  # EMAs of sigma_s^2, sigma_r^2, Delta^2; 0 until first measured
    "measured": ((3,), torch.bool, schema.MEASURED),
    "skipped": ((), torch.float64, schema.SKIPPED),
    "prior": ((), torch.float64, schema.PRIOR),  # that the last step used
}
STATE_VERSION = 2
_SINCE = {"prior": 2}  # entries that version 1 did not have


def first_state(config: ControllerConfig) -> list[float]:
    """The numbers of a controller that has not taken a step."""
    alpha = config.alpha if isinstance(config.alpha, float) else config.alpha.init
    mu, prior = config.init_mu, schema.prior_before(config, 0, config.init_mu)
    return [mu, mu, mu, alpha, *[0.0] * 6, 0.0, 0.0, prior]


def bits_of(numbers: Sequence[float]) -> list[int]:
    """float64 numbers as 64-bit integers, in which ranks compare them."""
    return list(struct.unpack(f"<{len(numbers)}q", struct.pack(f"<{len(numbers)}d", *numbers)))


def numbers_of(bits: Sequence[int]) -> list[float]:
    """The inverse of :func:`bits_of`."""
    return list(struct.unpack(f"<{len(bits)}d", struct.pack(f"<{len(bits)}q", *bits)))


def named(numbers: Sequence[float]) -> dict[str, Any]:
    """The numbers of a state by the names of the entries, and the count of steps."""
    return {name: numbers[place] for name, (_, _, place) in STATE.items()} | {"step": int(numbers[schema.STEPS])}


def read_state(state_dict: Mapping[str, Any], config: ControllerConfig) -> tuple[Tensor, int]:
    """The state, on the CPU, and its count of steps. TypeError or ValueError says what does not fit."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict must be a mapping, got {type(state_dict).__name__}")
    version = state_dict.get("version", STATE_VERSION)
    known = isinstance(version, int) and not isinstance(version, bool) and 1 <= version <= STATE_VERSION
    entries = [name for name in STATE if not known or _SINCE.get(name, 1) <= version]
    expected = {"version", "config", "step", *entries}
    if missing := sorted(expected - set(state_dict)):
        raise ValueError(f"state_dict lacks {missing}")
    if not known:
        raise ValueError(f"state_dict['version'] must be in [1, {STATE_VERSION}], got {version!r}")
    if unknown := sorted(set(state_dict) - expected, key=str):
        raise ValueError(f"state_dict has unknown keys {unknown}")
    _check_config(state_dict["config"], config)
    step = state_dict["step"]
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:
        raise ValueError(f"state_dict['step'] must be an int of at least 0, got {step!r}")
    state = torch.empty(schema.STATE_NUMBERS, dtype=torch.float64)
    for name in entries:
        state[STATE[name][2]] = _checked(name, state_dict[name], config, version)
    state[schema.STEPS] = step
    if "prior" not in entries:
        state[schema.PRIOR] = schema.prior_before(config, step, float(state[schema.ESTIMATE]))
    return state, step


def _check_config(theirs: object, config: ControllerConfig) -> None:
    ours = config.as_dict()
    if not isinstance(theirs, Mapping):
        raise TypeError(f"state_dict['config'] must be a mapping, got {type(theirs).__name__}")
    if odd := [v for v in theirs.values() if not isinstance(v, (str, int, float, dict, type(None)))]:
        raise TypeError(f"state_dict['config'] must hold plain values, got {type(odd[0]).__name__}")
    if ours != theirs:
        differing = sorted((k for k in ours.keys() | theirs.keys() if ours.get(k) != theirs.get(k)), key=str)
        text = ", ".join(f"{k}: {ours.get(k)!r} here, {theirs.get(k)!r} there" for k in differing)
        raise ValueError(f"state_dict['config'] must be this controller's configuration, differs in {text}")


def _checked(name: str, tensor: object, config: ControllerConfig, version: int) -> Tensor:
    """A tensor of a state_dict, on the CPU, or an error that names it."""
    shape, dtype, _ = STATE[name]
    if not isinstance(tensor, Tensor):
        raise TypeError(f"state_dict[{name!r}] must be a tensor, got {type(tensor).__name__}")
    if (tuple(tensor.shape), tensor.dtype) != (shape, dtype):
        got = f"{tuple(tensor.shape)} {tensor.dtype}"
        raise ValueError(f"state_dict[{name!r}] must be a tensor of {shape} {dtype}, got {got}")
    tensor = tensor.detach().cpu()
    if version == 1 and name == "signals":  # whose squared norms could round below 0
        tensor = torch.where(tensor > -torch.inf, tensor.clamp(min=0.0), tensor)
    low, high = (config.mu_min, config.mu_max) if name == "mu" else (0.0, schema.LARGEST_SIGNAL)
    if not ((tensor >= low) & (tensor <= high)).all():  # also nan
        raise ValueError(f"state_dict[{name!r}] must be in [{low:g}, {high:g}], got {tensor.tolist()}")
    return tensor
