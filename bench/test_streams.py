"""Bytes in one direction, as fast as they go and paced; and streams, asyncio's and headrace's."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from bench.rounds import Row
from bench.suite import CLOCK, PEERS, STREAM_PEERS, row_id

GIGABIT = 125e6  # bytes per second
CHUNK = 256 * 1024
ONE_WAY = [
    Row("sink", 1, CHUNK),
    Row("sink", 10, CHUNK),
    Row("source", 1),
    Row("source", 10),
    Row("sink", 1, 64 * 1024, GIGABIT),
    Row("sink", 1000, 64 * 1024, GIGABIT),
]
STREAMS = [Row("echo", 10, 1024), Row("echo", 100, 64), Row("echo", 100, 16 * 1024), Row("sink", 10, CHUNK)]


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("row", ONE_WAY, ids=row_id)
@pytest.mark.parametrize("peer", PEERS)
def test_one_way(row: Row, peer: str, measure: Callable[[Row, str], None]) -> None:
    measure(row, peer)


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("row", STREAMS, ids=row_id)
@pytest.mark.parametrize("peer", STREAM_PEERS)
def test_asyncio_streams(row: Row, peer: str, measure: Callable[[Row, str], None]) -> None:
    measure(row, peer)
