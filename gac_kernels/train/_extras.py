"""Import of the packages that only training needs, with an error that says how to get them."""

from __future__ import annotations

import importlib
from typing import Any


def require(module: str, *, package: str, purpose: str) -> Any:
    """Import `module` of the optional distribution `package`.

    Raises:
        ImportError: it is not installed; names the package, what needs it and the extra that brings it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{purpose} needs the package {package!r} ({error}): pip install 'gac-kernels[train]'"
        ) from error
