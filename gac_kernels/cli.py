"""The command line: ``gac-kernels`` and ``python -m gac_kernels``.

A command is a module of ``commands`` with a one-line ``HELP``, a docstring that ``--help`` shows, ``add_arguments`` and
``run(args, console) -> exit status``; one that needs environment variables from the start names them in
``ENVIRONMENT``. It imports what is heavy inside ``run``.

Exit status: 0 done; 1 the command ran and its verdict is no (a self-test failed, a bound was missed); 2 the request
cannot be served (a bad option, file or line, a missing package), said in one line; 130 interrupted. Anything else is a
bug in the package and leaves its traceback.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from .commands import COMMANDS, load
from .commands.console import Console

PROGRAM = "gac-kernels"


class _Parser(argparse.ArgumentParser):
    """Complains in one line, under the name of the program, whichever command's parser it is."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{PROGRAM}: error: {message} ({self.prog} --help)\n")


def build_parser() -> argparse.ArgumentParser:
    """Every command with its options; imports nothing heavy."""
    parser = _Parser(prog=PROGRAM, description="Fused losses for hybrid SFT + RL post-training, mixed by GAC.")
    parser.add_argument("--version", action="store_true", help="print the version and leave")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands", parser_class=_Parser)
    for name in COMMANDS:
        module = load(name)
        sub = commands.add_parser(
            name, help=module.HELP, description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        module.add_arguments(sub)
        common = sub.add_argument_group("common to all commands")
        common.add_argument(
            "--json", action="store_true", help="no table; the last line of standard output is one object"
        )
        common.add_argument("--seed", type=int, default=0, help="seed of everything random (default: %(default)s)")
        common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status. ``argv`` None takes the process's own arguments."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.version:
        from . import __version__

        print(f"{PROGRAM} {__version__}")
        return 0
    if args.command is None:
        parser.error(f"name a command: {', '.join(COMMANDS)}")
    module = load(args.command)
    if argv is None:
        _ensure_environment(getattr(module, "ENVIRONMENT", {}))
    try:
        return module.run(args, Console(json=args.json))
    except (ValueError, OSError, ImportError) as error:  # what a request can get wrong
        if args.debug:
            raise
        print(f"{PROGRAM}: error: {_one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted", file=sys.stderr)
        return 130


def _ensure_environment(wanted: dict[str, str]) -> None:
    """Start this process anew with what libraries read only when they are loaded; the user's own settings stand."""
    missing = {name: value for name, value in wanted.items() if name not in os.environ}
    if missing:
        sys.stdout.flush()
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | missing)


def _one_line(error: BaseException) -> str:
    """The message without line breaks; an empty one would say nothing, so the type stands for it."""
    return " ".join(str(error).split()) or type(error).__name__


if __name__ == "__main__":
    raise SystemExit(main())
