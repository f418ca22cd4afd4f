"""The operators: schemas, fakes, and which backend fills which slot. Everything that dispatches is here.

Python owns the schemas, so that an install without a compiler works. Every operator has a default form, served on each
device type by the best backend there is, and forms that one backend serves alone, for :func:`use_backend`:

* ``reference``: eager PyTorch, any device;
* ``cpu``: the compiled module ``gac_kernels._C``, which fills the CPU slot of the default form by being loaded;
* ``triton``: one kernel source for GPUs (and, under ``TRITON_INTERPRET=1``, for tests on a CPU);
* ``cuda``: the compiled module ``gac_kernels._CUDA``, CUDA C++ for NVIDIA's GPUs from sm_80 on.

Nothing falls back in silence: what a backend does not support raises.
"""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch

from . import eager
from .arguments import checked
from .schemas import COMPOSITES, FAKES, SCHEMAS

BACKENDS = ("reference", "cpu", "triton", "cuda")

_lib = torch.library.Library("gac_kernels", "DEF")
_forced: str | None = None


def _load_compiled() -> tuple[bool, str]:
    """Load ``gac_kernels._C``, whose loading fills the CPU slots."""
    if importlib.util.find_spec("gac_kernels._C") is None:
        return False, "gac_kernels._C is not built: no C++ compiler or no torch headers were found at installation"
    module = importlib.import_module("gac_kernels._C")
    return True, f"compiled module, {module.instruction_set()} instructions"


@lru_cache
def _load_cuda() -> str:
    """Load ``gac_kernels._CUDA``, whose loading fills the operators' forms for CUDA C++, when first one is asked for: a
    machine without CUDA never does. Returns why it cannot be, or ""."""
    if importlib.util.find_spec("gac_kernels._CUDA") is None:
        return "gac_kernels._CUDA is not built: at installation there was no CUDA toolkit, or a torch for the CPU"
    if torch.version.cuda is None:
        return "gac_kernels._CUDA is built, but this torch is not one for CUDA"
    importlib.import_module("gac_kernels._CUDA")
    return ""


_said_uncompiled = False


def _warn_uncompiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The reference in a CPU slot says once that it is there because the compiled module is not."""

    def slot(*args: Any) -> Any:
        global _said_uncompiled
        if not _said_uncompiled:
            _said_uncompiled = True
            warnings.warn(
                f"gac_kernels runs its eager reference on the CPU: {_compiled_why}", RuntimeWarning, stacklevel=2
            )
        return function(*args)

    return slot


def _triton(module: str, name: str) -> Callable[..., Any]:
    """The launcher of a Triton kernel; triton is imported when a kernel is asked for, not before."""

    def launch(*args: Any) -> Any:
        return getattr(importlib.import_module(f"gac_kernels._triton.{module}"), name)(*args)

    return launch


# Operator -> module of gac_kernels._triton that launches it. The others (the controller, sums over gradients) have no
# form for Triton: where it is forced, the device's own form serves them.
_TRITON = {
    "token_loss": "token_loss",
    "token_weights": "token_weights",
    "row_statistics": "rows",
    "row_gradient": "rows",
    "row_gradient_": "rows",
    "fused_rows": "rows",
    "fused_rows_": "rows",
    "scale_": "scale",
}


# What serves an operator on a CUDA device: the first backend that this install has and whose least compute capability
# the device has. Nothing has been timed on a GPU yet: where Triton has a kernel it serves; CUDA C++ goes ahead of it
# for those operators and capabilities on which benchmarks/results shows that it is faster.
_BOTH = (("triton", 70), ("cuda", 80), ("reference", 0))
_CUDA_ALONE = (("cuda", 80), ("reference", 0))


def serving_on_cuda(name: str, capability: int, has: Collection[str]) -> str:
    """The backend of an operator on a device of ``capability`` (90 is sm_90), of those there are. Intel's and AMD's
    devices have no CUDA C++; AMD's pass for CUDA devices in torch."""
    order = _BOTH if name in _TRITON else _CUDA_ALONE
    return next(backend for backend, least in order if backend in has and capability >= least)


def _here() -> set[str]:
    """The backends for CUDA devices that this install has."""
    cuda = importlib.util.find_spec("gac_kernels._CUDA") is not None and torch.version.cuda is not None
    return {"reference", *(["triton"] if has_triton else []), *(["cuda"] if cuda else [])}


def _on_cuda(name: str, of: dict[str, Callable[..., Any] | None]) -> Callable[..., Any]:
    """The CUDA slot of an operator; the choice is made at its first call on a device."""
    chosen: dict[int, Callable[..., Any]] = {}

    def slot(*args: Any) -> Any:
        index = (args[0] if isinstance(args[0], torch.Tensor) else args[0][0]).get_device()
        if index not in chosen:
            major, minor = torch.cuda.get_device_capability(index)
            backend = serving_on_cuda(name, 10 * major + minor, _here())
            if backend == "cuda" and (why := _load_cuda()):
                raise RuntimeError(why)
            chosen[index] = _overloads[f"{name}_cuda"] if backend == "cuda" else of[backend]  # type: ignore[assignment]
        return chosen[index](*args)

    return slot


def _forms(name: str) -> tuple[str, ...]:
    return name, f"{name}_reference", *([f"{name}_triton"] if name in _TRITON else []), f"{name}_cuda"


def _define(name: str) -> None:
    plain = checked(name, SCHEMAS[name], getattr(eager, name))
    triton = checked(name, SCHEMAS[name], _triton(_TRITON[name], name)) if name in _TRITON else None
    for form in _forms(name):
        _lib.define(form + SCHEMAS[name], tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"gac_kernels::{form}", FAKES[name], lib=_lib)
    _lib.impl(f"{name}_reference", plain, "CompositeExplicitAutograd")
    _lib.impl(name, plain, "CompositeExplicitAutograd")
    if triton is not None:
        _lib.impl(f"{name}_triton", triton, "CompositeExplicitAutograd")
    _lib.impl(name, _on_cuda(name, {"reference": plain, "triton": triton}), "CUDA")
    if not _compiled:
        _lib.impl(name, _warn_uncompiled(plain), "CPU")


has_triton = importlib.util.find_spec("triton") is not None
_compiled, _compiled_why = _load_compiled()
for _name in SCHEMAS:
    _define(_name)
_overloads = {form: getattr(torch.ops.gac_kernels, form).default for name in SCHEMAS for form in _forms(name)}


def define_composite(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Make ``function``, made of other operators, the operator ``name`` on every device: opaque to a compiler."""
    _lib.define(name + COMPOSITES[name], tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"gac_kernels::{name}", FAKES[name], lib=_lib)
    _lib.impl(name, checked(name, COMPOSITES[name], function), "CompositeExplicitAutograd")
    overload: Callable[..., Any] = getattr(torch.ops.gac_kernels, name).default
    return overload


def call(name: str, *args: Any) -> Any:
    """Call the form of operator ``name`` that :func:`use_backend` asks for, else the device's own."""
    own = _forced in (None, "cpu") or (_forced == "triton" and name not in _TRITON)
    form = name if own else f"{name}_{_forced}"
    if _forced is not None:
        first = args[0] if isinstance(args[0], torch.Tensor) else args[0][0]  # a tensor, or a list of some
        _check_device(name, first.device)
    return _overloads[form](*args)


def _check_device(name: str, device: torch.device) -> None:
    if (_forced == "cpu" and device.type != "cpu") or (_forced == "cuda" and device.type not in _cuda_devices()):
        raise ValueError(f"backend {_forced!r} was forced, but {name}'s tensors are on {device}")


def _cuda_devices() -> list[str]:
    """Device types that CUDA C++ serves: "cuda", and "cpu" where the kernels' emulation is loaded, by tests."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return [key.lower() for key in ("CUDA", "CPU") if has("gac_kernels::fused_rows_cuda", key)]


def forced_backend() -> str | None:
    """The backend of the innermost :func:`use_backend`, None outside."""
    return _forced


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Serve every operator by one backend inside a ``with`` block: for tests and comparisons.

    The setting is one for the process. An input that the backend does not support raises; nothing falls back.

    Args:
        name: ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``.

    Raises:
        ValueError: for an unknown name. RuntimeError: when this install does not have the backend, saying why.
    """
    global _forced
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {name!r}")
    if name == "cpu" and not _compiled:
        raise RuntimeError(f"backend 'cpu' is not available: {_compiled_why}")
    if name == "triton" and not has_triton:
        raise RuntimeError("backend 'triton' is not available: the triton package is not installed")
    if name == "cuda" and not _cuda_devices() and (why := _load_cuda()):
        raise RuntimeError(f"backend 'cuda' is not available: {why}")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def backends() -> dict[str, str]:
    """Which backend serves the losses on each device type, and why; inside :func:`use_backend` the one that it asks
    for. ``library.table`` has it operator by operator."""
    if _forced is not None:
        serves = {"cpu": ["cpu"], "cuda": _cuda_devices()}.get(_forced, ["cpu", "cuda", "other"])
        asked, none = f"{_forced}: asked for by use_backend", f"none: use_backend({_forced!r}) has no kernels for it"
        return {device: asked if device in serves else none for device in ("cpu", "cuda", "other")}
    cpu = f"cpu: {_compiled_why}" if _compiled else f"reference: {_compiled_why}"
    backend = serving_on_cuda("fused_rows", _capability(), _here())
    why = {"triton": "kernels compile on first use", "cuda": "compiled module"}
    cuda = f"{backend}: {why.get(backend, 'the triton package is not installed')}"
    if not torch.cuda.is_available():
        cuda += " (no CUDA device is visible)"
    return {"cpu": cpu, "cuda": cuda, "other": "reference: no kernels for other device types"}


def _capability() -> int:
    """Of the current CUDA device; without one, Hopper's."""
    major, minor = torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)
    return 10 * major + minor


def table() -> list[tuple[str, str, str]]:
    """Operator, device type and the backend that serves it there, of every operator."""
    on_cuda = {name: serving_on_cuda(name, _capability(), _here()) for name in SCHEMAS}
    on_cpu = "cpu" if _compiled else "reference"
    return [row for name in SCHEMAS for row in ((name, "cpu", on_cpu), (name, "cuda", on_cuda[name]))]
