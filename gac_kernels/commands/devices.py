"""Which device a command runs on."""

from __future__ import annotations

import torch


def pick_device(name: str | None) -> str:
    """``name`` if PyTorch can use it; None takes CUDA where there is a device, else the CPU.

    Raises:
        ValueError: for a name that PyTorch does not know, and for CUDA without a device.
    """
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: PyTorch sees {torch.cuda.device_count()} CUDA devices")
    return name
