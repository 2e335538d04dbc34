"""The demo's load process: ``python -m headrace.cli.demo.load OPTIONS``.

Paced, the load is open: message *j* of the whole run is due at its own fixed time, on connection *j* modulo
their number, and is stamped with the time it was *due*. A server (or a load process) that falls behind thus
shows in the latencies, instead of slowing the questions down to the answers ("coordinated omission").

Unpaced, one-way connections write as long as they may, and echo connections have one message under way each.
"""

from __future__ import annotations

import asyncio
import math
import socket
import sys
from collections.abc import Callable
from time import monotonic_ns
from typing import cast

import headrace
from headrace.cli.demo.child import Channel, ChildOptions, Sampler, engine_fields, run_child
from headrace.cli.demo.histogram import LatencyHistogram
from headrace.cli.demo.security import client_security
from headrace.cli.demo.traffic import (
    GREETING,
    MAGIC,
    MessageSource,
    StreamCheck,
    WrongBytesError,
    make_pattern,
)

__all__ = ["main"]

_CONNECTING = 100  # connection attempts at a time
_CONNECT_TIMEOUT = 10.0  # seconds, each
_DRAIN_TIMEOUT = 10.0  # seconds for what is under way when the time is up
_MESSAGES_PER_TURN = 64  # of the pacer, and
_WRITES_PER_TURN = 4  # of one connection, before others get their turn
_UNPACED_SEND_BUFFER = 256 * 1024  # bytes: else seconds' worth of data lies in the kernel when the time is up
_MOST_FAILURES = 20  # kept as text; all are counted


class Load:
    """What the connections share: options, messages, counters, the record of what went wrong."""

    def __init__(self, options: ChildOptions, loop: headrace.EventLoop) -> None:
        self.options = options
        self.loop = loop
        self.echo = options.mode == "echo"
        self.source = MessageSource(options.size)
        self.pattern = make_pattern(options.size) if self.echo else b""
        self.latencies = LatencyHistogram()
        self.connections: list[Connection] = []
        self.started = 0  # nanoseconds on the monotonic clock
        self.ends = 0
        self.interval = 0.0 if options.rate is None else options.size / options.rate * 1e9
        self.running = False
        self.open = 0
        self.drained = loop.create_future()
        self.failed = 0
        self.failures: list[str] = []

    @property
    def paced(self) -> bool:
        return self.options.rate is not None

    def due(self, index: int) -> int:
        """When the message ``index`` of the whole run is to be sent."""
        return self.started + int(index * self.interval)

    def unsent(self) -> int:
        """Messages that were due and not sent, because this process or a full connection was in the way."""
        if not self.paced:
            return 0
        due = math.ceil((self.ends - self.started) / self.interval)
        return due - sum(connection.sent for connection in self.connections)

    def fail(self, text: str) -> None:
        self.failed += 1
        if len(self.failures) < _MOST_FAILURES:
            self.failures.append(text)

    def totals(self) -> tuple[int, int]:
        """Bytes and messages that came back and were right; nothing comes back in one-way mode."""
        checks = [connection.check for connection in self.connections if connection.check is not None]
        return sum(check.received for check in checks), sum(check.messages for check in checks)

    def closed(self) -> None:
        self.open -= 1
        if self.open == 0 and not self.drained.done():
            self.drained.set_result(None)


class Connection:
    """One connection of the load: all but how its bytes come."""

    transport: asyncio.Transport

    def __init__(self, load: Load, number: int) -> None:
        self.load = load
        self.number = number
        self.sent = 0  # messages
        self.owed = 0  # messages that are due and not sent
        self.paused = False
        self.finishing = False
        self.closing = False
        self.scheduled = False
        self.lost = False
        self.check: StreamCheck | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        options = self.load.options
        self.load.open += 1
        if self.load.echo:
            self.check = StreamCheck(
                self.number, options.size, self.load.pattern, self.load.latencies, self.replied
            )
        else:
            self.transport.write(GREETING.pack(MAGIC, self.number, options.size))

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True
        if exc is not None:
            self.load.fail(f"connection {self.number} broke: {exc!r}")
        elif not (self.finishing or self.closing):
            self.load.fail(f"connection {self.number} was closed by the server")
        self.load.closed()

    def pause_writing(self) -> None:
        self.paused = True

    def resume_writing(self) -> None:
        self.paused = False
        self.pump()

    def send(self, stamp: int) -> None:
        self.transport.write(self.load.source.message(self.number, self.sent, stamp))
        self.sent += 1

    def pump(self) -> None:
        """Sends what is to be sent now, as far as the transport takes it."""
        load = self.load
        if not load.running or self.lost:
            return
        if load.paced:
            count = load.options.connections
            while self.owed and not self.paused:
                self.owed -= 1
                self.send(load.due(self.sent * count + self.number))
        elif not load.echo:
            for _ in range(_WRITES_PER_TURN):
                if self.paused:
                    return
                self.send(monotonic_ns())
            if not (self.paused or self.scheduled):
                self.scheduled = True
                load.loop.call_soon(self.pump_later)

    def pump_later(self) -> None:
        self.scheduled = False
        self.pump()

    def feed(self, data: bytes | headrace.Lease) -> None:
        if self.check is None:
            self.refuse(f"connection {self.number}: the server sent bytes, and nothing was asked")
            return
        try:
            self.check.feed(data)
        except WrongBytesError as error:
            self.refuse(str(error))

    def refuse(self, reason: str) -> None:
        self.load.fail(reason)
        self.closing = True
        self.transport.abort()

    def replied(self) -> None:
        """An echo came back as a whole."""
        if self.finishing:
            self.close_if_done()
        elif not self.load.paced:
            self.send(monotonic_ns())

    def finish(self) -> None:
        """No new messages: ends the connection when all that was sent has arrived."""
        self.finishing = True
        if self.lost:
            return
        if self.load.echo:
            self.close_if_done()
        else:
            self.transport.write_eof()

    def close_if_done(self) -> None:
        assert self.check is not None
        if self.check.messages == self.sent:
            self.transport.close()

    def give_up(self) -> None:
        if not self.lost:
            self.closing = True
            self.load.fail(
                f"connection {self.number}: not all had arrived {_DRAIN_TIMEOUT:g} s after the end"
            )
            self.transport.abort()


class LeaseConnection(Connection, headrace.Protocol):
    def lease_received(self, lease: headrace.Lease) -> None:
        with lease:
            self.feed(lease)


class BytesConnection(Connection, asyncio.Protocol):
    def data_received(self, data: bytes) -> None:
        self.feed(data)


PROTOCOLS: dict[str, Callable[[Load, int], LeaseConnection | BytesConnection]] = {
    "lease": LeaseConnection,
    "bytes": BytesConnection,
}


async def connect(load: Load) -> None:
    """Makes all the connections; those that fail are recorded."""
    options = load.options
    limit = asyncio.Semaphore(_CONNECTING)

    security = client_security(options.security)

    async def connect_one(number: int) -> None:
        connection = PROTOCOLS[options.protocol](load, number)
        async with limit:
            try:
                async with asyncio.timeout(_CONNECT_TIMEOUT):
                    await load.loop.create_connection(
                        lambda: connection, options.host, options.port, security=security
                    )
            except OSError as error:  # TimeoutError is one
                text = str(error) or f"no answer in {_CONNECT_TIMEOUT:g} s"
                load.fail(f"connection {number} couldn't be made: {text}")
                return
        load.connections.append(connection)
        if not load.paced:
            sock = connection.transport.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _UNPACED_SEND_BUFFER)

    async with asyncio.TaskGroup() as group:
        for number in range(options.connections):
            group.create_task(connect_one(number))


class Pacer:
    """Gives each connection its messages when they are due."""

    def __init__(self, load: Load) -> None:
        self.load = load
        self.by_number = {connection.number: connection for connection in load.connections}
        self.next = 0  # the next message of the run
        self.tick()

    def tick(self) -> None:
        load = self.load
        if not load.running:
            return
        now = monotonic_ns()
        for _ in range(_MESSAGES_PER_TURN):
            due = load.due(self.next)
            if due > now or due >= load.ends:
                break
            connection = self.by_number.get(self.next % load.options.connections)
            if connection is not None:  # it was made
                connection.owed += 1
                connection.pump()
            self.next += 1
        # Behind by more than a turn's worth: the time is in the past, and the next turn goes on.
        due = load.due(self.next)
        if due < load.ends:
            load.loop.call_at(due / 1e9, self.tick)


def begin(load: Load) -> None:
    load.running = True
    if load.paced:
        Pacer(load)
        return
    for connection in load.connections:
        if load.echo and not connection.lost:
            connection.send(monotonic_ns())
        else:
            connection.pump()


async def finish(load: Load) -> None:
    """Stops sending and waits until all connections have ended in order."""
    load.running = False
    if load.open:
        for connection in load.connections:
            connection.finish()
        try:
            async with asyncio.timeout(_DRAIN_TIMEOUT):
                await asyncio.shield(load.drained)
        except TimeoutError:
            for connection in load.connections:
                connection.give_up()
            await load.drained


async def generate(options: ChildOptions, channel: Channel) -> None:
    loop = cast(headrace.EventLoop, asyncio.get_running_loop())
    load = Load(options, loop)
    await connect(load)
    channel.send("connected", connections=len(load.connections), **engine_fields(loop))
    start = await channel.receive("start")
    load.started = start["at"]
    load.ends = load.started + int(options.seconds * 1e9)
    sampler = Sampler(loop, channel, load.totals, load.latencies)
    sampler.start(load.started / 1e9, start["interval"])
    await asyncio.sleep(load.started / 1e9 - loop.time())
    begin(load)
    await asyncio.sleep(load.ends / 1e9 - loop.time())
    await finish(load)
    sampler.stop()
    checks = [connection.check for connection in load.connections if connection.check is not None]
    channel.send(
        "result",
        failed=load.failed,
        failures=load.failures,
        last_arrival=max((check.last_arrival for check in checks), default=0),
        received={str(check.connection): check.received for check in checks},
        sent={str(connection.number): connection.sent * options.size for connection in load.connections},
        unsent=load.unsent(),
    )
    await channel.receive("stop")


def main() -> int:
    return run_child(generate)


if __name__ == "__main__":
    sys.exit(main())
