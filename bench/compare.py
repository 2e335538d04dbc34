"""Compares peers on rows of your choice and prints the tables.

    python -m bench.compare --rows "echo -n 100 -s 64" --peers headrace-uring-lease,uvloop --rounds 15

Rows are separated by semicolons and written in the load generator's words: ``echo -n 100 -s 64;
sink -n 1 -s 262144; source -n 10; storm -n 10000; sink -n 1000 -s 65536 -r 125e6``, and over TLS
``tls-echo -n 10 -s 16384; tls-sink -n 1 -s 262144; tls-source -n 10; tls-handshake -n 10; tls-resume -n 10;
tls-idle -n 1000 -s 65536``. ``--raw FILE`` keeps every measurement as a JSON line. The names of peers are in
``bench/peers/__init__.py``.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from bench.native.build import CompilerMissingError
from bench.report import markdown
from bench.rounds import Row, Settings, run_row

DEFAULT_ROWS = "echo -n 100 -s 64"
DEFAULT_PEERS = "headrace-uring-lease,headrace-uring-bytes,uvloop,c-uring"


def parse_arguments(words: list[str]) -> argparse.Namespace:
    default = Settings.from_environment()
    parser = argparse.ArgumentParser(
        prog="python -m bench.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rows", default=DEFAULT_ROWS, help="rows, separated by semicolons (%(default)s)")
    parser.add_argument("--peers", default=DEFAULT_PEERS, help="peers, separated by commas (%(default)s)")
    parser.add_argument(
        "--rounds", type=int, default=default.rounds, help="15 or more for verdicts (%(default)s)"
    )
    parser.add_argument(
        "--seconds", type=float, default=default.seconds, help="measured per run (%(default)s)"
    )
    parser.add_argument(
        "--warmup", type=float, default=default.warmup, help="seconds before that (%(default)s)"
    )
    parser.add_argument("--verify", action="store_true", help="check every byte that comes back")
    parser.add_argument(
        "--raw", type=Path, help="append every measurement to this file, one JSON object a line"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")
    return parser.parse_args(words)


def show_progress(peer: str, number: int) -> None:
    print(f"\r\x1b[Kround {number + 1}: {peer}", end="", file=sys.stderr, flush=True)


def main(words: list[str]) -> int:
    """0 when every row was measured for at least one peer; 1 when one wasn't; 2 for a bad call."""
    arguments = parse_arguments(words)
    settings = Settings(arguments.rounds, arguments.seconds, arguments.warmup, arguments.verify)
    progress = None if arguments.quiet or not sys.stderr.isatty() else show_progress
    try:
        rows = [Row.parse(text) for text in arguments.rows.split(";") if text.strip()]
        peers = [name.strip() for name in arguments.peers.split(",")]
        empty = False
        for row in rows:
            result = run_row(row, peers, settings, raw=arguments.raw, on_measurement=progress)
            if progress:
                print("\r\x1b[K", end="", file=sys.stderr)
            print(markdown(result), flush=True)
            empty = empty or not result.peers
    except (ValueError, CompilerMissingError, subprocess.CalledProcessError) as error:
        print(error, file=sys.stderr)
        return 2
    return 1 if empty else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
