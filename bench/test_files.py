"""Files: random reads at depth 32, a large file from end to end, 1,000 small ones. See ``bench/files.py``."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest

from bench.files import WORKLOADS, Data, opened
from bench.rounds import Row
from bench.suite import CLOCK, Board, Workload, play_back

# In MiB. The page cache must hold it.
SIZE = int(os.environ.get("HEADRACE_BENCH_FILE_SIZE", "256"))
CASES = [(Row("micro", label=name), peer) for name, works in WORKLOADS.items() for peer in works]


@pytest.fixture(scope="module")
def data() -> Iterator[Data]:
    data = Data(SIZE << 20)
    yield data
    data.close()


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize(("row", "peer"), CASES, ids=[f"{row.label}-{peer}" for row, peer in CASES])
def test_files(row: Row, peer: str, data: Data, benchmark: Any, board: Board) -> None:
    """CPU time of the whole process, workers of the kernel included, per read, MiB or file."""
    peers: dict[str, Callable[[], Workload]] = {
        name: partial(opened, row.label, name, data) for name in WORKLOADS[row.label]
    }
    play_back(benchmark, board.micro_result(row, peers), peer)
