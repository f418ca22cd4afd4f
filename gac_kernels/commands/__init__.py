"""The commands of the command line, one module each."""

from __future__ import annotations

import importlib
from types import ModuleType

COMMANDS = ("doctor", "bench", "overhead", "train", "validate")


def load(name: str) -> ModuleType:
    """The module of a command: ``HELP``, ``add_arguments(parser)``, ``run(args, console) -> exit status``."""
    return importlib.import_module(f"{__name__}.{name}")
