"""What the pytest-benchmark suites share: which rows and peers, and how their figures reach pytest-benchmark.

pytest-benchmark times a function again and again, and then the next one. Servers can't be compared like that
on a machine with neighbours: all peers of a row are measured in interleaved rounds when the first of its
tests runs, and each test plays its own peer's figures back to pytest-benchmark, whose clock is a
``Playback``. So the times in its tables, histograms and saved files are CPU time of the server (per request,
GB, connection or event; bytes of memory for idle connections), one value per round.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from bench.judge import judge, limit_peer
from bench.peers import standard_peers, tls_peers
from bench.report import REFERENCE, figures
from bench.rounds import SIZED, Placement, Result, Row, Settings, run_row

__all__ = [
    "CLOCK",
    "PEERS",
    "STREAM_PEERS",
    "TLS_PEERS",
    "Board",
    "Workload",
    "current_settings",
    "play_back",
    "row_id",
    "run_micro",
]

FULL = Settings(rounds=15, seconds=0.3, warmup=0.1)
QUICK = Settings(rounds=3, seconds=0.2, warmup=0.05)
# pytest-timeout's limit for each of our tests, and the time after which a row begins no further round. The
# second is shorter by more than one round takes.
TEST_TIMEOUT = 280
ROW_BUDGET = 180.0

PEERS = standard_peers()
TLS_PEERS = tls_peers()
STREAM_PEERS = [
    "uvloop",
    "uvloop-streams",
    "asyncio-streams",
    "headrace-uring-streams",
    "headrace-epoll-streams",
    "headrace-uring-reader",
    "headrace-epoll-reader",
]

# The metric's unit in seconds: pytest-benchmark takes every figure for seconds.
UNITS = {
    "cpu_us_per_request": 1e-6,
    "cpu_us_per_connection": 1e-6,
    "cpu_us_per_event": 1e-6,
    "cpu_seconds_per_gigabyte": 1.0,
    "bytes_per_connection": 1e-9,  # shown as nanoseconds
    "server_cpu_percent_of_core": 0.01,
}


def current_settings() -> Settings:
    """Quick by default; ``HEADRACE_BENCH=full`` for verdicts; single values from the environment."""
    chosen = FULL if os.environ.get("HEADRACE_BENCH") == "full" else QUICK
    settings = Settings.from_environment(chosen)
    return Settings(settings.rounds, settings.seconds, settings.warmup, settings.verify, ROW_BUDGET)


class Playback:
    """A clock that pytest-benchmark reads: ``advance`` moves it on by the next recorded duration."""

    def __init__(self) -> None:
        self.time = 0.0
        self.durations: list[float] = []

    def __call__(self) -> float:
        return self.time

    def load(self, durations: Sequence[float]) -> None:
        self.durations = list(durations)[::-1]

    def advance(self) -> None:
        self.time += self.durations.pop()


CLOCK = Playback()


def row_id(row: Row) -> str:
    """A row as part of a test's name: ``64B-n100``."""
    size = f"{row.size // 1024}KiB" if row.size >= 1024 else f"{row.size}B"
    paced = "-paced" if row.rate else ""
    if row.label:
        return row.label
    if row.kind not in SIZED:
        return f"{row.mode}-n{row.connections}"
    return f"{'' if row.mode == 'echo' else row.mode + '-'}{size}-n{row.connections}{paced}"


@dataclass
class Board:
    """Results of this session: each row is measured once, with the peers whose tests were selected."""

    settings: Settings
    raw: Path
    selected: dict[Row, list[str]] = field(default_factory=dict)
    results: dict[Row, Result] = field(default_factory=dict)

    def select(self, row: Row, peer: str) -> None:
        self.selected.setdefault(row, []).append(peer)

    def result(self, row: Row) -> Result:
        """The row's figures; measured now if they haven't been."""
        if row not in self.results:
            # Ratios need their denominators, whatever -k has left over.
            needed = [REFERENCE] if row.mode.startswith("datagram") else [REFERENCE, limit_peer(row)]
            if any(peer.endswith(("-streams", "-reader")) for peer in self.selected[row]):
                needed.append(f"{REFERENCE}-streams")
            peers = list(dict.fromkeys([*needed, *self.selected[row]]))
            self.results[row] = run_row(row, peers, self.settings, raw=self.raw)
        return self.results[row]

    def micro_result(self, row: Row, peers: Mapping[str, Callable[[], Workload]]) -> Result:
        """The same for a workload inside this process."""
        if row not in self.results:
            chosen = {
                name: peers[name] for name in dict.fromkeys([REFERENCE, *self.selected[row]]) if name in peers
            }
            self.results[row] = run_micro(row, chosen, self.settings)
        return self.results[row]


Workload = AbstractContextManager[
    Callable[[], int]
]  # inside: each call does the work and says how many events


def run_micro(row: Row, peers: Mapping[str, Callable[[], Workload]], settings: Settings) -> Result:
    """Interleaved rounds of workloads in this process; the cost is CPU time of all its threads."""
    result = Result(row, settings, Placement.choose())
    with ExitStack() as stack:
        # pytest's own objects are many: a full collection of them would be charged to whom it happens to.
        gc.collect()
        gc.freeze()
        stack.callback(gc.unfreeze)
        works: dict[str, Callable[[], int]] = {}
        for name, open_peer in peers.items():
            try:
                works[name] = stack.enter_context(open_peer())
            except ImportError as error:
                result.failures[name] = str(error)
        for work in works.values():
            work()  # warm-up
        for _ in range(settings.rounds):
            measured: dict[str, dict[str, Any]] = {}
            for name, work in works.items():
                begun = time.process_time_ns()
                events = work()
                measured[name] = {row.metric: (time.process_time_ns() - begun) / 1e3 / events}
            result.rounds.append(measured)
    return result


def play_back(benchmark: Any, result: Result, peer: str) -> None:
    """Gives one peer's figures to pytest-benchmark, and what they mean to ``extra_info``.

    A peer that isn't installed skips the test; one that broke fails it. Slowness never does.
    """
    if reason := result.failures.get(peer):
        if reason.startswith(("no ", "No module")):
            pytest.skip(f"{peer}: {reason}")
        pytest.fail(reason)
    row, unit = result.row, UNITS[result.row.metric]
    values = result.values(peer)
    assert values, f"{peer} has no figures in {row}"
    CLOCK.load([value * unit for value in values])
    benchmark.group = str(row)
    benchmark.extra_info.update(figures(result))
    benchmark.extra_info["peer"] = peer
    benchmark.extra_info["verdict"] = [
        f"{each.case}: {each.summary}" for each in judge(result) if each.peer == peer
    ]
    benchmark.pedantic(CLOCK.advance, rounds=len(values))
