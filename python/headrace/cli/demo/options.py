"""The options of ``headrace demo``, and what they must fulfil together."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from headrace.cli import units
from headrace.cli.demo.security import SECURITY
from headrace.cli.demo.traffic import HEADER

__all__ = ["DemoOptions", "add_arguments", "check"]

T = TypeVar("T")

# One address and one port of the server's: about 28,000 local ports are left for the other end.
_MOST_CONNECTIONS = 25_000
_LARGEST_MESSAGE = 64 * 1024 * 1024
_LONGEST_RUN = 24 * 3600.0


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """What was asked for: ``rate`` in bytes a second or None for unpaced, ``size`` in bytes."""

    connections: int
    seconds: float
    rate: float | None
    size: int
    mode: str
    engine: str | None
    protocol: str
    security: str
    json: Path
    chart: Path


def _option(parse: Callable[[str], T]) -> Callable[[str], T]:
    """argparse shows the text of an ArgumentTypeError, and only "invalid value" for a ValueError."""

    def parse_option(text: str) -> T:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parse_option


def _count(text: str) -> int:
    try:
        value = int(text.replace(",", "").replace("_", ""))
    except ValueError:
        raise ValueError(f"{text!r} is no whole number") from None
    if not 1 <= value <= _MOST_CONNECTIONS:
        raise ValueError(
            f"must be between 1 and {_MOST_CONNECTIONS:,} (the local ports that one address has)"
        )
    return value


def _seconds(text: str) -> float:
    try:
        value = float(text.removesuffix("s"))
    except ValueError:
        raise ValueError(f"{text!r} is no number of seconds") from None
    if not 0.1 <= value <= _LONGEST_RUN:
        raise ValueError(f"must be between 0.1 and {_LONGEST_RUN:.0f} seconds")
    return value


def _message_size(text: str) -> int:
    size = units.parse_size(text)
    if not HEADER.size <= size <= _LARGEST_MESSAGE:
        largest = units.format_size(_LARGEST_MESSAGE)
        raise ValueError(f"must be between {HEADER.size} bytes (a message's header) and {largest}")
    return size


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--connections", type=_option(_count), default=1000, metavar="N", help="how many (default: 1000)")
    add("--seconds", type=_option(_seconds), default=10.0, metavar="S", help="how long to send (default: 10)")
    add(
        "--rate",
        type=_option(units.parse_rate),
        default="1Gbit",
        help="of all connections together, like 1Gbit or 125MB/s; max (or 0) for unpaced (default: 1Gbit)",
    )
    add("--size", type=_option(_message_size), default="64KiB", help="of a message (default: 64KiB)")
    add(
        "--mode",
        choices=("oneway", "echo"),
        default="oneway",
        help="one way into the server, or there and back (default: oneway)",
    )
    add(
        "--engine",
        choices=("auto", "uring", "epoll"),
        default="auto",
        help="what drives the sockets; auto takes io_uring where it works (default: auto)",
    )
    add(
        "--protocol",
        choices=("lease", "bytes"),
        default="lease",
        help="headrace.Protocol (received bytes in place) or asyncio.Protocol (copied) (default: lease)",
    )
    add(
        "--security",
        choices=SECURITY,
        default="none",
        help="plain TCP; TLS with certificates made for the run; Kerberos with a KDC of its own (NTLM where none is "
        "installed); NTLM (default: none)",
    )
    add(
        "--json",
        type=Path,
        default=Path("demo.json"),
        metavar="PATH",
        help="the results (default: demo.json)",
    )
    add(
        "--chart",
        type=Path,
        default=None,
        metavar="PATH",
        help="the chart, an SVG (default: beside the results, as .svg)",
    )


def _check_writable(option: str, path: Path) -> None:
    """Better known before the run than after it."""
    folder = path.parent
    if path.is_dir() or not folder.is_dir():
        problem = "is a folder" if path.is_dir() else f"has no folder {str(folder)!r}"
    elif not os.access(path if path.exists() else folder, os.W_OK):
        problem = "can't be written by this user"
    else:
        return
    raise ValueError(f"argument {option}: {str(path)!r} {problem}; name another file")


def check(arguments: argparse.Namespace) -> DemoOptions:
    """The options, checked together. Raises ``ValueError`` with the option's name and what would help."""
    chart = arguments.chart or arguments.json.with_suffix(".svg")
    if chart == arguments.json:
        raise ValueError("argument --json: must not end in .svg when --chart isn't given")
    _check_writable("--json", arguments.json)
    _check_writable("--chart", chart)
    options = DemoOptions(
        connections=arguments.connections,
        seconds=arguments.seconds,
        rate=arguments.rate,
        size=arguments.size,
        mode=arguments.mode,
        engine=None if arguments.engine == "auto" else arguments.engine,
        protocol=arguments.protocol,
        security=arguments.security,
        json=arguments.json,
        chart=chart,
    )
    if options.rate is not None:
        messages = options.seconds * options.rate / options.size
        if messages < options.connections:
            raise ValueError(
                f"argument --rate: {units.format_rate(options.rate)} for {options.seconds:g} s is "
                f"{int(messages):,} messages of {units.format_size(options.size)}: not one for each of "
                f"{options.connections:,} connections. Lower --size or --connections, "
                "or raise --rate or --seconds"
            )
    return options
