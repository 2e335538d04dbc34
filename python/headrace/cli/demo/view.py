"""What a person sees while the demo runs, and at its end: with rich on a terminal, else as plain lines."""

from __future__ import annotations

import os
import sys
from contextlib import AbstractContextManager
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Protocol, Self

from headrace.cli.demo.measure import Interval
from headrace.cli.demo.options import DemoOptions
from headrace.cli.demo.result import RunResult
from headrace.cli.units import format_rate, format_size, format_time

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["View", "choose_view", "describe", "summary_lines"]

_BARS = " ▁▂▃▄▅▆▇█"
_LIVE_INTERVAL = 0.5  # seconds between two pictures
_PLAIN_INTERVAL = 1.0  # and between two lines


class View(Protocol):
    """Shows a run; a context manager around it. ``interval`` is how often it wants figures, in seconds."""

    interval: float

    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
        /,
    ) -> None: ...
    def say(self, text: str) -> None:
        """A line that stays."""

    def show(self, interval: Interval) -> None:
        """The newest figures."""


def describe(options: DemoOptions) -> str:
    """What will be run, in one line."""
    mode = "one-way into the server" if options.mode == "oneway" else "echo"
    if options.security != "none":
        mode = f"{options.security.upper()}, {mode}"
    rate = "unpaced" if options.rate is None else f"{format_rate(options.rate)} in total"
    return (
        f"{options.connections:,} connections, {mode}, {rate}, "
        f"messages of {format_size(options.size)}, {options.seconds:g} s"
    )


def _latency_text(latencies: tuple[float, ...]) -> str:
    return "  ".join(
        f"{name} {format_time(value):>7}"
        for name, value in zip(("p50", "p99", "p99.9"), latencies, strict=True)
    )


def _pool_text(pool: dict[str, Any]) -> str:
    leased = format_size(pool.get("leased", 0))
    text = f"{pool.get('allocated', 0)} of {pool.get('maximum', 0)} blocks, {leased} leased"
    return f"{text}, {pool['exhausted']:,} x exhausted" if pool.get("exhausted") else text


class PlainView:
    """One line an interval; for pipes, logs, and terminals without rich."""

    def __init__(self, options: DemoOptions, stream: IO[str], *, interval: float = _PLAIN_INTERVAL) -> None:
        self.interval = min(interval, options.seconds / 4)
        self._stream = stream

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
        /,
    ) -> None:
        return None

    def say(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    def show(self, interval: Interval) -> None:
        core = interval.server_core_percent
        machine = core / (os.cpu_count() or 1)
        pool = interval.loop.get("pool", {})
        completions = interval.loop.get("engine", {}).get("completed", 0)
        columns = (
            f"{interval.ends:5.1f} s",
            f"{format_rate(interval.throughput):>11}",
            f"{interval.messages:7,.0f} msg/s",
            _latency_text(interval.latencies),
            f"server {core:4.1f} % of a core, {machine:4.1f} % of the machine",
            f"engine {completions:,} completions",
            f"pool {pool.get('allocated', 0)} blocks, {format_size(pool.get('leased', 0))} leased",
        )
        self.say("  ".join(columns))


def _sparkline(values: list[float], width: int = 40) -> str:
    values = values[-width:]
    top = max(values, default=0.0) or 1.0
    return "".join(_BARS[round(value / top * (len(_BARS) - 1))] for value in values)


class LiveView:
    """A panel that is redrawn in place. Raises ``ImportError`` without rich."""

    def __init__(self, options: DemoOptions) -> None:
        from rich.console import Console
        from rich.live import Live

        self.interval = min(_LIVE_INTERVAL, options.seconds / 4)
        self._options = options
        self._console = Console()
        self._shown: list[Interval] = []
        # Not redrawn by a thread of its own: that would compete with the processes that are measured.
        self._live: AbstractContextManager[Live] = Live(console=self._console, auto_refresh=False)
        self._started: Live | None = None

    def __enter__(self) -> Self:
        self._started = self._live.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
        /,
    ) -> None:
        self._live.__exit__(kind, error, traceback)

    def say(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False)

    def show(self, interval: Interval) -> None:
        self._shown.append(interval)
        if self._started is not None:
            self._started.update(self._draw(), refresh=True)

    def _rows(self) -> list[tuple[str, str, str]]:
        """Name, figure and recent history of everything that is shown."""
        now = self._shown[-1]
        processors = os.cpu_count() or 1
        rates = [interval.throughput for interval in self._shown]
        cores = [interval.server_core_percent for interval in self._shown]
        messages = [interval.messages for interval in self._shown]
        rows = [
            ("throughput", format_rate(now.throughput), _sparkline(rates)),
            ("messages", f"{now.messages:,.0f} /s", _sparkline(messages)),
        ]
        for index, name in enumerate(("p50", "p99", "p99.9")):
            history = [interval.latencies[index] for interval in self._shown]
            rows.append((f"latency {name}", format_time(now.latencies[index]), _sparkline(history)))
        rows += [
            ("server", f"{now.server_core_percent:.1f} % of a core", _sparkline(cores)),
            ("", f"{now.server_core_percent / processors:.1f} % of the machine", f"{processors} processors"),
            ("load", f"{now.load_core_percent:.1f} % of a core", ""),
            ("memory", format_size(now.server_memory), "of the server process"),
        ]
        return rows + self._loop_rows()

    def _loop_rows(self) -> list[tuple[str, str, str]]:
        now = self._shown[-1]
        before = self._shown[-2].loop if len(self._shown) > 1 else {}

        def per_second(group: str, name: str) -> str:
            new = now.loop.get(group, {}).get(name, 0)
            old = before.get(group, {}).get(name, 0)
            return f"{(new - old) / now.seconds:,.0f}"

        engine = f"{per_second('engine', 'completed')} completions/s"
        calls = f"{per_second('engine', 'calls')} system calls/s, {per_second('engine', 'waits')} waits/s"
        leases = f"{per_second('pool', 'leases')} leases/s, {per_second('pool', 'copies')} copies/s"
        return [("engine", engine, calls), ("pool", _pool_text(now.loop.get("pool", {})), leases)]

    def _draw(self) -> RenderableType:
        from rich import box
        from rich.panel import Panel
        from rich.table import Table

        table = Table(box=box.SIMPLE, show_header=False, pad_edge=False)
        table.add_column(style="dim", min_width=11)
        table.add_column(justify="right", style="bold", min_width=26)
        table.add_column(style="cyan", min_width=42)
        for row in self._rows():
            table.add_row(*row)
        ends = self._shown[-1].ends
        title = f"{self._options.connections:,} connections, {ends:.0f} of {self._options.seconds:g} s"
        return Panel(table, title=title, border_style="blue", expand=False)


def choose_view(options: DemoOptions) -> View:
    """Live where a person looks at a terminal, else plain."""
    if not sys.stdout.isatty() or os.environ.get("TERM") == "dumb":
        return PlainView(options, sys.stdout)
    try:
        return LiveView(options)
    except ImportError:
        print("(for a live view: pip install 'headrace[demo]')")
        return PlainView(options, sys.stdout)


def summary_lines(result: RunResult) -> list[str]:
    """The end of a run, in words."""
    document = result.document
    rate, latency = document["throughput_bytes_per_second"], document["latency_seconds"]
    target = result.options.rate
    share = "unpaced" if target is None else f"{100 * rate / target:.1f} % of the target"
    parts = {
        "connections": (
            f"{document['connections']:,}",
            f"{document['errors']:,} errors",
            "every byte checked",
        ),
        "throughput": (
            f"{format_rate(rate)} ({share})",
            f"{document['messages_per_second']:,.0f} messages/s",
            f"{format_size(document['bytes'])} in {document['seconds']:.2f} s",
        ),
        "latency": (
            f"p50 {format_time(latency['p50'])}",
            f"p99 {format_time(latency['p99'])}",
            f"p99.9 {format_time(latency['p999'])}",
            f"at most {format_time(latency['max'])}",
        ),
        "server": (
            f"{document['server_cpu_percent_of_core']:.1f} % of a core",
            f"{document['server_cpu_percent_of_machine']:.1f} % of the machine",
            f"{document['server_cpu_seconds_per_gigabyte']:.3f} CPU seconds per GB",
            f"{format_size(document['server_memory_bytes'])} of memory",
        ),
        "engine": (f"{document['engine']}: {document['engine_reason']}",),
    }
    lines = [f"{name:<13} {', '.join(values)}" for name, values in parts.items()]
    if result.problems:
        lines += ["", "FAILED:", *(f"  {problem}" for problem in result.problems)]
    return lines
