"""The operators: schemas, fakes, and which backend fills which slot. Everything that dispatches is here.

Python owns the schemas, so that an install without a compiler works. Every operator has a default form, served on each
device type by the best backend there is, and forms that one backend serves alone, for :func:`use_backend`:

* ``reference``: eager PyTorch, any device;
* ``cpu``: the compiled module ``gac_kernels._C``, which fills the CPU slot of the default form by being loaded;
* ``triton``: one kernel source for GPUs (and, under ``TRITON_INTERPRET=1``, for tests on a CPU);
* ``cuda``: CUDA C++, when the package carries it.

Nothing falls back in silence: what a backend does not support raises.
"""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from . import eager
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


def _load_cuda() -> str:
    """Load ``gac_kernels._CUDA``, whose loading fills the operators' forms for CUDA C++; on machines with CUDA only."""
    if importlib.util.find_spec("gac_kernels._CUDA") is None:
        return "gac_kernels._CUDA is not built: no CUDA toolkit was found at installation"
    if not torch.cuda.is_available():
        return "gac_kernels._CUDA is not loaded: no CUDA device is visible"
    importlib.import_module("gac_kernels._CUDA")
    return "compiled module"


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


# Operator -> module of gac_kernels._triton that launches it. The others (the controller, sums over gradients) have no form
# for Triton: where it is forced, the device's own form serves them.
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


def _forms(name: str) -> tuple[str, ...]:
    return name, f"{name}_reference", *([f"{name}_triton"] if name in _TRITON else []), f"{name}_cuda"


def _define(name: str) -> None:
    plain, triton = getattr(eager, name), _triton(_TRITON[name], name) if name in _TRITON else None
    for form in _forms(name):
        _lib.define(form + SCHEMAS[name], tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"gac_kernels::{form}", FAKES[name], lib=_lib)
    _lib.impl(f"{name}_reference", plain, "CompositeExplicitAutograd")
    _lib.impl(name, plain, "CompositeExplicitAutograd")
    if triton is not None:
        _lib.impl(f"{name}_triton", triton, "CompositeExplicitAutograd")
        if has_triton:
            _lib.impl(name, triton, "CUDA")
    if not _compiled:
        _lib.impl(name, _warn_uncompiled(plain), "CPU")


has_triton = importlib.util.find_spec("triton") is not None
_compiled, _compiled_why = _load_compiled()
for _name in SCHEMAS:
    _define(_name)
_cuda_why = _load_cuda()
_overloads = {form: getattr(torch.ops.gac_kernels, form).default for name in SCHEMAS for form in _forms(name)}


def define_composite(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Make ``function``, made of other operators, the operator ``name`` on every device: opaque to a compiler."""
    _lib.define(name + COMPOSITES[name], tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"gac_kernels::{name}", FAKES[name], lib=_lib)
    _lib.impl(name, function, "CompositeExplicitAutograd")
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
    if name == "cuda" and not _cuda_devices():
        raise RuntimeError(f"backend 'cuda' is not available: {_cuda_why}")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def backends() -> dict[str, str]:
    """Which backend serves each device type, and why. Decided once, at import."""
    cpu = f"cpu: {_compiled_why}" if _compiled else f"reference: {_compiled_why}"
    cuda = "triton: kernels compile on first use" if has_triton else "reference: the triton package is not installed"
    if not torch.cuda.is_available():
        cuda += " (no CUDA device is visible)"
    return {"cpu": cpu, "cuda": cuda, "other": "reference: no kernels for other device types"}
