"""UDP: echo with one peer and with many, and one way into the server; CPU per datagram."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from bench.rounds import Row
from bench.suite import CLOCK, row_id

PEERS = ["uvloop", "headrace-uring-bytes", "headrace-epoll-bytes", "asyncio"]
SIZES = (64, 1400)
ROWS = [
    *(Row("datagram-echo", peers, size) for peers in (1, 100) for size in SIZES),
    *(Row("datagram-sink", 1, size) for size in SIZES),
]


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("row", ROWS, ids=row_id)
@pytest.mark.parametrize("peer", PEERS)
def test_datagrams(row: Row, peer: str, measure: Callable[[Row, str], None]) -> None:
    measure(row, peer)
