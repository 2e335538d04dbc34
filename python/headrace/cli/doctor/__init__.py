"""``headrace doctor``: what this machine gives a server, what limits it, and what to change.

``CHECKS`` is the table; a check is a function that takes the options and yields findings (``finding``). They look and
change nothing, each has its time (``finding.look``), and none shows a secret.
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys

from headrace.cli.doctor import certificate, engine, kerberos, limits, software
from headrace.cli.doctor.finding import Check, Finding, look
from headrace.cli.doctor.options import DoctorOptions, add_arguments, checked
from headrace.cli.doctor.report import as_json, as_text, status_of

__all__ = ["CHECKS", "examine", "register"]

CHECKS: dict[str, tuple[Check, ...]] = {
    "software": (
        Check("versions", software.versions),
        Check("tls", software.tls),
        Check("packages", software.packages, seconds=10.0),
    ),
    "engine": (
        Check("kernel", engine.kernel),
        Check("engine", engine.engines),
        Check("locked-memory", engine.locked_memory),
    ),
    "limits": (
        Check("open-files", limits.open_files),
        Check("system-files", limits.system_files),
        Check("network", limits.network),
        Check("control-group", limits.control_group),
    ),
    "certificate": (Check("certificate", certificate.certificate),),
    "kerberos and ntlm": (
        Check("krb5-conf", kerberos.configuration),
        Check("keytab", kerberos.keytab),
        Check("kdc", kerberos.kdc, seconds=12.0),
        Check("replay-cache", kerberos.replay_cache),
        Check("target", kerberos.target, seconds=12.0),
        Check("ntlm-users", kerberos.ntlm_users),
    ),
}


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds ``doctor`` to the commands."""
    parser = subparsers.add_parser(
        "doctor",
        help="say what this machine gives a server, and what to change",
        description="Checks engine, limits, TLS and, where they are used, certificates, Kerberos and NTLM. Run it as "
        "the server's user, in the server's container or unit: limits are counted there. It changes nothing and shows "
        "no secrets. The exit status is 0 if all is good, 1 if something limits a server, 2 for bad arguments.",
    )
    add_arguments(parser)

    def command(arguments: argparse.Namespace) -> int:
        try:
            options = checked(arguments)
        except ValueError as error:
            parser.error(str(error))
        return run(options)

    parser.set_defaults(command=command)


def run(options: DoctorOptions) -> int:
    """Prints the report. Exit status: see :func:`headrace.cli.main`."""
    # A loop's own word about its engine is a finding here: it needn't be on standard error as well.
    silence = logging.NullHandler()
    logging.getLogger("headrace").addHandler(silence)
    try:
        groups = examine(options)
    except KeyboardInterrupt:
        print("headrace doctor: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    finally:
        logging.getLogger("headrace").removeHandler(silence)
    print(as_json(groups) if options.json else as_text(groups))
    return status_of([finding for findings in groups.values() for finding in findings])


def examine(options: DoctorOptions) -> dict[str, list[Finding]]:
    """What every check finds, by group, in the table's order."""
    return {
        title: [finding for check in checks for finding in look(check, options)]
        for title, checks in CHECKS.items()
    }
