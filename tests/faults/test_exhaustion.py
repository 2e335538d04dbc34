"""Descriptors run out, completion queues overflow, connections come and go by the thousand."""

from __future__ import annotations

import pytest
from faults_support import needs_uring, run_program


def test_500_clients_of_a_server_with_64_descriptors(engine_name: str) -> None:
    outcome = run_program("descriptors_run_out", engine=engine_name, limit=64, clients=500)
    assert outcome.result["full"]
    assert 0 < outcome.result["held"] < 64
    assert outcome.result["served"] == 500
    assert outcome.result["reports"] > 0  # the application hears of it
    # While it was full, for a second: a spin would have taken all of a processor, and thousands of turns.
    assert outcome.result["busy"] < 0.3
    assert outcome.result["turns"] < 300


@needs_uring
@pytest.mark.parametrize("size", [64, 2000, 100_000])
def test_1000_connections_through_8_completion_entries_lose_no_byte(size: int) -> None:
    outcome = run_program("tiny_completion_queue", connections=1000 if size < 100_000 else 200, size=size)
    assert outcome.result["engine"] == "uring"
    assert outcome.result["good"] == (1000 if size < 100_000 else 200)
    assert outcome.result["overflows"] > 0  # else this tested nothing
    assert outcome.said == []


def test_churn_leaves_nothing_behind(engine_name: str) -> None:
    """10 rounds of 2,000 connections that echo and close, and of 2,000 that are reset."""
    outcome = run_program("churn", engine=engine_name, rounds=10, connections=2000)
    first, *others = outcome.result["left"]
    assert first["leased"] == first["outstanding"] == first["pinned"] == 0
    assert first["StreamTransport"] == first["Echo"] == 0
    # The interpreter's own caches may still fill in the first round.
    for later in others[1:]:
        assert later == others[0]
    assert {name: count for name, count in others[0].items() if name != "objects"} == {
        name: count for name, count in first.items() if name != "objects"
    }
    memory = outcome.result["memory"]
    assert memory[9] - memory[1] <= 1024 * 1024
    assert outcome.said == []
