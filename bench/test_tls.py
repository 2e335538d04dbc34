"""TLS 1.3: echo, one way, handshakes, memory; against asyncio, uvloop, aiofastnet, Twisted and plain C over OpenSSL."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from bench.rounds import Row
from bench.suite import CLOCK, row_id

CHUNK = 256 * 1024
GIGABIT = 125e6  # bytes per second
OURS = ["headrace-uring-lease", "headrace-uring-bytes", "headrace-epoll-lease", "headrace-epoll-bytes"]
PEERS = ["uvloop", "c-tls", *OURS, "aiofastnet-uvloop", "aiofastnet", "asyncio", "twisted"]
ROWS = [
    Row("echo", 100, 64, tls=True),
    Row("echo", 10, 16 * 1024, tls=True),
    Row("sink", 1, CHUNK, tls=True),
    Row("source", 10, tls=True),
    Row("sink", 10, 64 * 1024, GIGABIT, tls=True),
    Row("handshake", tls=True),
    Row("resume", tls=True),
    Row("storm", 1000, tls=True),
]


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("row", ROWS, ids=row_id)
@pytest.mark.parametrize("peer", PEERS)
def test_tls(row: Row, peer: str, measure: Callable[[Row, str], None]) -> None:
    measure(row, peer)
