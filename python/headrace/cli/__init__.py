"""The ``headrace`` command.

``headrace demo`` runs a server and 1,000 connections on this machine and shows what they do, ``headrace cert``
makes certificates for development, ``headrace doctor`` says what limits a server on this machine. Each subcommand
is a module or package of its own with ``register(subparsers)``; what it needs beyond the base install is imported when
it runs, so that ``--help`` always works.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from headrace import __version__

__all__ = ["main"]


def _parser() -> argparse.ArgumentParser:
    from headrace.cli import cert, demo, doctor

    parser = argparse.ArgumentParser(
        prog="headrace", description="Completion-based networking for Python: see it work on this machine."
    )
    version = f"headrace {__version__}, Python {sys.version.split()[0]}"
    parser.add_argument("--version", action="version", version=version)
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    demo.register(subparsers)
    cert.register(subparsers)
    doctor.register(subparsers)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line ``arguments`` (default: the process's own) and returns the exit status.

    0: all went well. 1: the command failed, or what it checks did. 2: it couldn't run as asked (a bad
    option, a limit of the system). 130: interrupted. Bad options raise ``SystemExit(2)``, as argparse does.
    """
    options = _parser().parse_args(arguments)
    status: int = options.command(options)
    return status
