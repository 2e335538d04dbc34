"""Echo: CPU per request over sizes and connections."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from bench.rounds import Row
from bench.suite import CLOCK, PEERS, row_id

SIZES = (64, 1024, 16 * 1024, 100 * 1024)
CONNECTIONS = (1, 10, 100, 1000)
ROWS = [Row("echo", connections, size) for size in SIZES for connections in CONNECTIONS]
MANY = Row("echo", 10_000, 64)
MANY_PEERS = [
    "uvloop",
    "c-uring",
    "c-epoll",
    "headrace-uring-lease",
    "headrace-uring-bytes",
    "headrace-epoll-bytes",
]


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("row", ROWS, ids=row_id)
@pytest.mark.parametrize("peer", PEERS)
def test_echo(row: Row, peer: str, measure: Callable[[Row, str], None]) -> None:
    measure(row, peer)


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("row", [MANY], ids=row_id)
@pytest.mark.parametrize("peer", MANY_PEERS)
def test_echo_with_very_many_connections(row: Row, peer: str, measure: Callable[[Row, str], None]) -> None:
    measure(row, peer)
