"""Kerberos through the whole stack, beside .NET 8's NegotiateStream, pyspnego and headrace's TLS: ``negotiate.py``."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.negotiate import PEERS, REFERENCE, ROWS, Row, compared, lacking, measure, pin
from bench.suite import CLOCK, Board
from headrace.testing.realm import Realm, needs

# The units in seconds: pytest-benchmark takes every figure for seconds.
UNITS = {"s/GB": 1.0, "us": 1e-6, "% of a core": 0.01}

Measured = Callable[[Row], dict[str, list[float]]]


@pytest.fixture(scope="module")
def measured(board: Board, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Measured]:
    """Measures a row, once, with the peers whose tests were selected; this process is the client, on its processor."""
    if reason := needs():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("negotiate")
    results: dict[Row, dict[str, list[float]]] = {}
    affinity = os.sched_getaffinity(0)
    realm = Realm()

    def once(row: Row) -> dict[str, list[float]]:
        if row not in results:
            results[row] = measure(row, peers_of(board, row), realm, Path(folder), board.settings.rounds)
        return results[row]

    try:
        pin(0, 1)
        with realm.applied():
            yield once
    finally:
        os.sched_setaffinity(0, affinity)
        realm.stop()


def peers_of(board: Board, row: Row) -> list[str]:
    selected: Any = board.selected
    return [peer for peer in dict.fromkeys([REFERENCE, *selected[row]]) if lacking(peer) is None]


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name.replace(" ", "-").replace(",", ""))
@pytest.mark.parametrize("peer", PEERS)
def test_stack(row: Row, peer: str, measured: Measured, benchmark: Any) -> None:
    if reason := lacking(peer):
        pytest.skip(f"{peer} needs {reason}")
    costs = measured(row)
    CLOCK.load([value * UNITS[row.unit] for value in costs[peer]])
    benchmark.group = f"Kerberos: {row.name}"
    benchmark.extra_info.update(peer=peer, unit=row.unit, ours_by_this=compared(costs, peer))
    benchmark.pedantic(CLOCK.advance, rounds=len(costs[peer]))
