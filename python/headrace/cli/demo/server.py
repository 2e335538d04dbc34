"""The demo's server process: ``python -m headrace.cli.demo.server OPTIONS``.

One-way mode: every connection's bytes are checked and timed here. Echo mode: every byte goes back.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from typing import Any, cast

import headrace
from headrace.cli.demo.child import Channel, ChildOptions, Sampler, engine_fields, run_child
from headrace.cli.demo.histogram import LatencyHistogram
from headrace.cli.demo.security import server_security
from headrace.cli.demo.traffic import GREETING, MAGIC, StreamCheck, WrongBytesError, make_pattern

__all__ = ["main"]

_BACKLOG = 1024
_MOST_FAILURES = 20  # kept as text; all are counted


class Site:
    """What the server's connections share: options, counters, the record of what went wrong."""

    def __init__(self, options: ChildOptions) -> None:
        self.options = options
        self.pattern = make_pattern(options.size)
        self.latencies = LatencyHistogram()
        self.checks: dict[int, StreamCheck] = {}
        self.open = 0
        self.failed = 0
        self.failures: list[str] = []

    def totals(self) -> tuple[int, int]:
        """Bytes and messages that came and were right."""
        checks = self.checks.values()
        return sum(check.received for check in checks), sum(check.messages for check in checks)

    def fail(self, text: str) -> None:
        self.failed += 1
        if len(self.failures) < _MOST_FAILURES:
            self.failures.append(text)


class Sink:
    """One connection of one-way mode: all but how its bytes come."""

    transport: asyncio.Transport

    def __init__(self, site: Site) -> None:
        self.site = site
        self.check: StreamCheck | None = None
        self.greeting = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.site.open += 1

    def connection_lost(self, exc: Exception | None) -> None:
        self.site.open -= 1
        if exc is not None:
            number = "?" if self.check is None else self.check.connection
            self.site.fail(f"connection {number} broke at the server: {exc!r}")

    def begin(self, data: bytes) -> None:
        """The first bytes of a connection, until it is known which one it is."""
        self.greeting += data
        if len(self.greeting) < GREETING.size:
            return
        magic, number, size = GREETING.unpack_from(self.greeting)
        if magic != MAGIC or size != self.site.options.size or number in self.site.checks:
            self.refuse("a connection began with wrong bytes")
            return
        self.check = StreamCheck(number, size, self.site.pattern, self.site.latencies)
        self.site.checks[number] = self.check
        self.feed(self.greeting[GREETING.size :])

    def feed(self, data: bytes | headrace.Lease) -> None:
        try:
            if self.check is not None:
                self.check.feed(data)
            else:
                self.begin(bytes(data))
        except WrongBytesError as error:
            self.refuse(str(error))

    def refuse(self, reason: str) -> None:
        self.site.fail(reason)
        self.transport.abort()


class LeaseSink(Sink, headrace.Protocol):
    def lease_received(self, lease: headrace.Lease) -> None:
        with lease:
            self.feed(lease)


class BytesSink(Sink, asyncio.Protocol):
    def data_received(self, data: bytes) -> None:
        self.feed(data)


class Echo:
    """One connection of echo mode: all but how its bytes come."""

    transport: Any  # an asyncio.Transport that takes leases as well, which asyncio's type can't say

    def __init__(self, site: Site) -> None:
        self.site = site

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.site.open += 1

    def connection_lost(self, exc: Exception | None) -> None:
        self.site.open -= 1
        if exc is not None:
            self.site.fail(f"a connection broke at the server: {exc!r}")

    # Who doesn't read the echo is read no further: what waits here stays bounded.
    def pause_writing(self) -> None:
        self.transport.pause_reading()

    def resume_writing(self) -> None:
        self.transport.resume_reading()


class LeaseEcho(Echo, headrace.Protocol):
    def lease_received(self, lease: headrace.Lease) -> None:
        # The transport keeps the bytes until the kernel has taken them: nothing is copied.
        with lease:
            self.transport.write(lease)


class BytesEcho(Echo, asyncio.Protocol):
    def data_received(self, data: bytes) -> None:
        self.transport.write(data)


PROTOCOLS: dict[tuple[str, str], Callable[[Site], asyncio.BaseProtocol]] = {
    ("oneway", "lease"): LeaseSink,
    ("oneway", "bytes"): BytesSink,
    ("echo", "lease"): LeaseEcho,
    ("echo", "bytes"): BytesEcho,
}


async def serve(options: ChildOptions, channel: Channel) -> None:
    loop = cast(headrace.EventLoop, asyncio.get_running_loop())
    site = Site(options)
    protocol = PROTOCOLS[options.mode, options.protocol]
    server = await loop.create_server(
        lambda: protocol(site),
        options.host,
        options.port,
        backlog=_BACKLOG,
        security=server_security(options.security),
    )
    channel.send("ready", port=server.sockets[0].getsockname()[1], **engine_fields(loop))
    start = await channel.receive("start")
    sampler = Sampler(loop, channel, site.totals, site.latencies)
    sampler.start(start["at"] / 1e9, start["interval"])
    await channel.receive("finish")
    sampler.stop()
    channel.send(
        "result",
        open=site.open,
        failed=site.failed,
        failures=site.failures,
        last_arrival=max((check.last_arrival for check in site.checks.values()), default=0),
        received={str(number): check.received for number, check in site.checks.items()},
    )
    server.close()
    await channel.receive("stop")


def main() -> int:
    return run_child(serve)


if __name__ == "__main__":
    sys.exit(main())
