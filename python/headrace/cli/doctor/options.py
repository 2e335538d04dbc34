"""The options of ``headrace doctor``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from headrace.security.mechanisms import check_target

__all__ = ["DoctorOptions", "add_arguments", "checked"]

MOST = 100_000_000


@dataclass(frozen=True, kw_only=True)
class DoctorOptions:
    """What was asked for; None: nothing."""

    engine: str | None = None
    connections: int = 10_000
    backlog: int = 100
    certificate: Path | None = None
    private_key: Path | None = None
    ca: Path | None = None
    negotiate: bool = False
    keytab: str | None = None
    target: str | None = None
    json: bool = False


def count(text: str) -> int:
    try:
        value = int(text.replace(",", "").replace("_", ""))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number") from None
    if not 1 <= value <= MOST:
        raise argparse.ArgumentTypeError(f"must be between 1 and {MOST:,}")
    return value


def target(text: str) -> str:
    try:
        check_target(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--json", action="store_true", help="print one JSON document")
    add(
        "--engine",
        choices=("uring", "epoll"),
        help="the engine that is demanded (default: HEADRACE_ENGINE's)",
    )
    size: Callable[[str], int] = count
    add("--connections", type=size, default=10_000, metavar="N", help="how many are wanted (default: 10,000)")
    add("--backlog", type=size, default=100, metavar="N", help="create_server's backlog= (default: 100)")
    tls = parser.add_argument_group("TLS")
    tls.add_argument(
        "--certificate", type=Path, metavar="FILE", help="a server's certificate and chain (PEM)"
    )
    tls.add_argument("--private-key", type=Path, metavar="FILE", help="its key, if it isn't in the same file")
    tls.add_argument("--ca", type=Path, metavar="FILE", help="whom its clients trust (PEM)")
    kerberos = parser.add_argument_group("Kerberos and NTLM")
    kerberos.add_argument(
        "--negotiate",
        action="store_true",
        help="check Kerberos (checked without it where KRB5_CONFIG, KRB5_KTNAME, KRB5_CLIENT_KTNAME or a keytab "
        "of the machine's is there)",
    )
    kerberos.add_argument("--keytab", metavar="FILE", help="a server's keys (default: KRB5_KTNAME's)")
    kerberos.add_argument(
        "--target",
        type=target,
        metavar="SPN",
        help="the service that clients ask for, like HTTP/www.example.org",
    )


def checked(arguments: argparse.Namespace) -> DoctorOptions:
    """Raises ValueError for options that don't go together."""
    if arguments.certificate is None and (arguments.private_key or arguments.ca):
        raise ValueError("--private-key and --ca go with a --certificate")
    return DoctorOptions(
        engine=arguments.engine,
        connections=arguments.connections,
        backlog=arguments.backlog,
        certificate=arguments.certificate,
        private_key=arguments.private_key,
        ca=arguments.ca,
        negotiate=arguments.negotiate or arguments.keytab is not None or arguments.target is not None,
        keytab=arguments.keytab,
        target=arguments.target,
        json=arguments.json,
    )
