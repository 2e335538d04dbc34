"""TLS 1.3, AES-256-GCM: echo, one way in both directions, handshakes full and resumed, memory of idle connections."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from bench.rounds import Row
from bench.suite import CLOCK, TLS_PEERS, row_id

GIGABIT = 125e6  # bytes per second
ROWS = [
    Row("tls-echo", 10, 16 * 1024),
    Row("tls-echo", 100, 64),
    Row("tls-sink", 1, 256 * 1024),
    Row("tls-source", 10),
    Row("tls-sink", 1, 64 * 1024, GIGABIT),
    Row("tls-handshake", 10),
    Row("tls-resume", 10),
    Row("tls-idle", 1000, 64),
    Row("tls-idle", 1000, 64 * 1024),
]


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("row", ROWS, ids=row_id)
@pytest.mark.parametrize("peer", TLS_PEERS)
def test_tls(row: Row, peer: str, native_tls: None, measure: Callable[[Row, str], None]) -> None:
    measure(row, peer)
