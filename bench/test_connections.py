"""Connections: accept rate, CPU per accepted connection, memory per idle connection."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from bench.rounds import Row
from bench.suite import CLOCK, row_id

ROWS = [Row("storm", 10_000)]
PEERS = [
    "uvloop",
    "c-uring",
    "headrace-uring-lease",
    "headrace-uring-bytes",
    "headrace-epoll-lease",
    "asyncio",
]


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("row", ROWS, ids=row_id)
@pytest.mark.parametrize("peer", PEERS)
def test_connections(row: Row, peer: str, measure: Callable[[Row, str], None]) -> None:
    measure(row, peer)
