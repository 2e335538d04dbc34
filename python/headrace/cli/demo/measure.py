"""What the demo measures of its processes, and how one second's figures come from two readings."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic_ns
from typing import Any

from headrace.cli.demo.histogram import LatencyHistogram

__all__ = ["Interval", "ProcessMeter", "Recorder", "Usage"]

PERCENTILES = (50.0, 99.0, 99.9)


@dataclass(frozen=True)
class Usage:
    """One reading: when, the processor time so far (both nanoseconds), the resident memory (bytes)."""

    at: int
    processor: int
    memory: int


class ProcessMeter:
    """Reads a process's processor time from outside, so measuring costs the process nothing.

    The time is the scheduler's own (``/proc/PID/task/*/schedstat``), in nanoseconds and of all its threads,
    the kernel's io_uring workers among them; ``/proc/PID/stat`` counts in ticks of 10 ms and misses threads
    that come and go between two of them.
    """

    def __init__(self, pid: int) -> None:
        self._tasks = Path(f"/proc/{pid}/task")
        self._statm = Path(f"/proc/{pid}/statm")
        self._page = os.sysconf("SC_PAGE_SIZE")
        self._by_thread: dict[str, int] = {}

    def read(self) -> Usage:
        """Raises ``OSError`` when the process is gone."""
        for thread in os.listdir(self._tasks):
            try:
                text = (self._tasks / thread / "schedstat").read_text()
            except OSError:  # this thread just ended; what it had used stays counted
                continue
            self._by_thread[thread] = int(text.split()[0])
        resident = int(self._statm.read_text().split()[1]) * self._page
        return Usage(monotonic_ns(), sum(self._by_thread.values()), resident)


@dataclass(frozen=True)
class Interval:
    """What happened between two samples. Times are seconds since the start of the run, latencies seconds."""

    ends: float
    seconds: float
    throughput: float  # bytes a second
    messages: float  # a second
    latencies: tuple[float, ...]  # p50, p99, p99.9
    server_core_percent: float
    load_core_percent: float
    server_memory: int
    loop: dict[str, Any] = field(repr=False)  # the server's loop.stats()


class Recorder:
    """Turns the children's samples and the meters' readings into intervals, and keeps the run's latencies."""

    def __init__(self, server: ProcessMeter, load: ProcessMeter) -> None:
        self._meters = (server, load)
        self.latencies = LatencyHistogram()
        self.intervals: list[Interval] = []
        self._fresh = LatencyHistogram()
        self._loop: dict[str, Any] = {}
        self._totals = (0, 0)
        self._sampled = 0  # when the totals were taken

    def begin(self, at: int) -> None:
        """The run begins at ``at`` nanoseconds."""
        self.began = self._sampled = at
        self.first = self.last = self._read()
        self._before = (at, 0, 0)

    def read_server(self) -> Usage:
        return self._meters[0].read()

    def _read(self) -> tuple[Usage, Usage]:
        server, load = self._meters
        return server.read(), load.read()

    def server_sample(self, sample: dict[str, Any]) -> None:
        self._loop = sample["loop"]

    def traffic_sample(self, sample: dict[str, Any]) -> None:
        """A sample of the process that receives and checks: the server in one-way mode, else the load."""
        self._totals = (sample["bytes"], sample["messages"])
        self._sampled = sample["at"]
        self._fresh.add(sample["latencies"])
        self.latencies.add(sample["latencies"])

    def cut_last(self, seconds: float, last_arrival: int) -> Interval | None:
        """The interval up to the end of sending, or up to the last byte where that came later.

        The last samples were made when all had ended: without this the last interval would count the time of
        closing as time without traffic.
        """
        self._sampled = max(self.began + int(seconds * 1e9), last_arrival)
        return self.cut()

    def cut(self) -> Interval | None:
        """What has happened since the last call, or None when no sample came."""
        before, received, messages = self._before
        seconds = (self._sampled - before) / 1e9
        if seconds <= 0:
            return None
        usage = self._read()
        walls = (usage[0].at - self.last[0].at) or 1
        self._before = (self._sampled, *self._totals)
        interval = Interval(
            ends=(self._sampled - self.began) / 1e9,
            seconds=seconds,
            throughput=(self._totals[0] - received) / seconds,
            messages=(self._totals[1] - messages) / seconds,
            latencies=tuple(self._fresh.percentiles(PERCENTILES)),
            server_core_percent=100 * (usage[0].processor - self.last[0].processor) / walls,
            load_core_percent=100 * (usage[1].processor - self.last[1].processor) / walls,
            server_memory=usage[0].memory,
            loop=self._loop,
        )
        self.last = usage
        self._fresh.take()
        self.intervals.append(interval)
        return interval
