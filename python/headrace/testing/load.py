"""Load for a server that answers each request, from one thread, with latencies and the server's CPU time.

Theory of operation
-------------------
A plain epoll loop over blocking-free sockets: no event loop of asyncio's, so it works in any thread, beside a loop
that is running, and shares no code with what it measures.

*Closed loop* (no rate): each connection sends its next request when it has the whole reply to the last one.
*Paced* (a rate): requests fall due at fixed times and go to the next idle connection. A request that finds none
waits, and its latency counts from when it was due: else a stalled server would hide its stall by not being asked
("coordinated omission").

Latencies go to a log-linear histogram: 128 steps for each power of two, so a percentile is right within 1 %.
"""

from __future__ import annotations

import resource
import select
import socket
import time
from collections import Counter, deque
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from headrace.testing.serving import ServerProcess

__all__ = ["Load", "LoadResult", "run_load"]

RECEIVE_SIZE = 256 * 1024
MOST_CONNECTIONS = 50_000
CONNECT_TIMEOUT = 10.0  # seconds
GRACE = 10.0  # seconds that the last replies of a counted run may take after everything else
STEPS_BITS = 7


class Histogram:
    """Counts of nanoseconds in log-linear steps."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[int, int]] = Counter()
        self.total = 0
        self.largest = 0

    def add(self, nanoseconds: int) -> None:
        shift = max(0, nanoseconds.bit_length() - STEPS_BITS - 1)
        self.counts[shift, nanoseconds >> shift] += 1
        self.total += 1
        if nanoseconds > self.largest:
            self.largest = nanoseconds

    def percentile(self, share: float) -> float:
        """In seconds: the smallest step that `share` (0 to 1) of all values lie in or below."""
        left = share * self.total
        for shift, step in sorted(self.counts, key=lambda key: key[1] << key[0]):
            left -= self.counts[shift, step]
            if left <= 0:
                return (step << shift) / 1e9
        return 0.0


@dataclass(frozen=True)
class LoadResult:
    """What a load saw. Times are in seconds."""

    connections: int
    requests: int  # whole replies
    seconds: float
    requests_per_second: float
    bytes: int  # of replies
    latency_p50: float
    latency_p99: float
    latency_p999: float
    latency_max: float
    cpu_per_request: float | None  # the server's; None when it isn't a ServerProcess, or served nothing
    errors: int
    error_kinds: dict[str, int] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """The same as plain data: what pytest-benchmark keeps in ``extra_info``."""
        return asdict(self)


class Connection:
    """One client socket and the request it is at."""

    __slots__ = ("begun", "busy", "received", "sent", "socket", "wants_out")

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self.busy = False  # a request is under way
        self.begun = 0
        self.sent = 0
        self.received = 0
        self.wants_out = False


class Load:
    """Connections to a server, and runs of requests over them. Use it as a context manager; `run_load` does.

    Parameters are those of `run_load`. Not thread-safe.
    """

    def __init__(
        self,
        server: ServerProcess | tuple[str, int],
        *,
        connections: int = 10,
        size: int = 64,
        rate: float | None = None,
        request: bytes | None = None,
        reply: bytes | None = None,
    ) -> None:
        if not 1 <= connections <= MOST_CONNECTIONS:
            raise ValueError(f"connections must be 1 to {MOST_CONNECTIONS}, not {connections}")
        if request is None:
            if size < 1:
                raise ValueError(f"size must be at least 1 byte, not {size}")
            request = pattern(size)
        if not request or reply == b"":
            raise ValueError(
                "request and reply must have at least one byte: their end is how they are told apart"
            )
        if rate is not None and not rate > 0:
            raise ValueError(f"rate must be positive requests per second, or None; not {rate}")
        self.server = server if isinstance(server, ServerProcess) else None
        self.address = server.address if isinstance(server, ServerProcess) else server
        self.wanted = connections
        self.rate = rate
        self.request = request
        self.reply = memoryview(request if reply is None else reply)
        self.epoll = select.epoll()
        self.connections: dict[int, Connection] = {}
        self.idle: deque[Connection] = deque()
        self.errors: Counter[str] = Counter()
        self.buffer = memoryview(bytearray(RECEIVE_SIZE))
        self._reset()

    # ---- connections ----

    def open(self) -> None:
        """Opens all connections; one that can't be opened is an error of the result, not an exception."""
        allow_descriptors(self.wanted)
        for _ in range(self.wanted):
            self._dial()

    def _dial(self) -> None:
        try:
            sock = socket.create_connection(self.address, CONNECT_TIMEOUT)
        except OSError as error:
            self._note(error)
            return
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection = Connection(sock)
        self.connections[sock.fileno()] = connection
        self.epoll.register(sock.fileno(), select.EPOLLIN)
        self.idle.append(connection)

    def _note(self, error: OSError | str) -> None:
        self.errors[error if isinstance(error, str) else type(error).__name__] += 1

    def _drop(self, connection: Connection, error: OSError | str) -> None:
        self._note(error)
        fd = connection.socket.fileno()
        self.epoll.unregister(fd)
        del self.connections[fd]
        connection.socket.close()
        if not connection.busy:
            self.idle.remove(connection)

    def close(self) -> None:
        """Closes all connections. Idempotent."""
        for connection in self.connections.values():
            connection.socket.close()
        self.connections.clear()
        self.idle.clear()
        self.epoll.close()

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- runs ----

    def _reset(self) -> None:
        self.histogram = Histogram()
        self.bytes = 0

    def run(self, *, seconds: float | None = None, requests: int | None = None) -> LoadResult:
        """Requests for `seconds`, or that many of them, on the connections that are open.

        Never hangs: a counted run in which nothing is answered for 10 s ends as it stands, with an error
        ``no reply``.
        """
        if (seconds is None) == (requests is None):
            raise ValueError("give seconds or requests, not both")
        self._reset()
        cpu = self.server.cpu_seconds() if self.server else 0.0
        begun = time.monotonic_ns()
        if seconds is not None:
            self._run_until(begun, begun + int(seconds * 1e9), None)
        else:
            self._run_until(begun, None, requests)
        elapsed = (time.monotonic_ns() - begun) / 1e9
        used = self.server.cpu_seconds() - cpu if self.server else None
        return self._result(elapsed, used)

    def _run_until(self, begun: int, end: int | None, most: int | None) -> None:
        """One run: until a time, or until as many replies as wanted have come and no request is under way."""
        started = 0
        last_reply, replies = begun, 0
        while self.connections:
            now = time.monotonic_ns()
            if end is not None and now >= end:
                return
            if self.histogram.total > replies:
                last_reply, replies = now, self.histogram.total
            if now - last_reply > GRACE * 1e9 and len(self.idle) < len(self.connections):
                self._note("no reply")
                return
            if most is None or started < most:
                started = self._start_due(begun, now, started, most)
            elif len(self.idle) == len(self.connections):
                return
            self._poll(self._pause(begun, now, started, most, end))

    def _due(self, begun: int, number: int) -> int:
        """When a paced request is to be sent."""
        assert self.rate is not None
        return begun + int(number / self.rate * 1e9)

    def _start_due(self, begun: int, now: int, started: int, most: int | None) -> int:
        """Sends what is due on idle connections; how many requests have been started by now."""
        while self.idle and (most is None or started < most):
            due = now if self.rate is None else self._due(begun, started)
            if due > now:
                break
            connection = self.idle.popleft()
            connection.busy = True
            connection.begun = due
            connection.sent = connection.received = 0
            started += 1
            self._send(connection)
        return started

    def _pause(self, begun: int, now: int, started: int, most: int | None, end: int | None) -> float:
        """How long a poll may wait: until the next request is due, or the run is over. In seconds."""
        until = now + int(0.1e9) if end is None else end
        if self.rate is not None and self.idle and (most is None or started < most):
            until = min(until, self._due(begun, started))
        return min(max(until - now, 0) / 1e9, 0.1)

    def _poll(self, timeout: float) -> None:
        for fd, event in self.epoll.poll(timeout, 1024):
            connection = self.connections.get(fd)
            if connection is None:
                continue  # dropped earlier in this batch
            if event & select.EPOLLOUT:
                self._send(connection)
            if event & ~select.EPOLLOUT and fd in self.connections:
                self._receive(connection)

    def _send(self, connection: Connection) -> None:
        try:
            connection.sent += connection.socket.send(memoryview(self.request)[connection.sent :])
        except BlockingIOError:
            pass
        except OSError as error:
            self._drop(connection, error)
            return
        unsent = connection.sent < len(self.request)
        if unsent != connection.wants_out:
            connection.wants_out = unsent
            events = select.EPOLLIN | (select.EPOLLOUT if unsent else 0)
            self.epoll.modify(connection.socket.fileno(), events)

    def _receive(self, connection: Connection) -> None:
        """One read. A byte that differs from the reply's, or one too many, ends the connection as an error."""
        try:
            count = connection.socket.recv_into(self.buffer)
        except BlockingIOError:
            return
        except OSError as error:
            self._drop(connection, error)
            return
        if not count:
            self._drop(connection, "closed by the server")
            return
        expected = self.reply[connection.received : connection.received + count]
        if not connection.busy or self.buffer[:count] != expected:
            self._drop(connection, "wrong bytes")
            return
        self.bytes += count
        connection.received += count
        if connection.received == len(self.reply):
            self.histogram.add(time.monotonic_ns() - connection.begun)
            connection.busy = False
            self.idle.append(connection)

    def _result(self, elapsed: float, used: float | None) -> LoadResult:
        histogram, count = self.histogram, self.histogram.total
        return LoadResult(
            connections=self.wanted,
            requests=count,
            seconds=elapsed,
            requests_per_second=count / elapsed,
            bytes=self.bytes,
            latency_p50=histogram.percentile(0.5),
            latency_p99=histogram.percentile(0.99),
            latency_p999=histogram.percentile(0.999),
            latency_max=histogram.largest / 1e9,
            cpu_per_request=used / count if used is not None and count else None,
            errors=self.errors.total(),
            error_kinds=dict(self.errors),
        )


def pattern(size: int) -> bytes:
    """Bytes without a short period: bytes that come back at a wrong place differ."""
    return bytes((k * 131 + (k >> 8) * 7) & 0xFF for k in range(size))


def allow_descriptors(connections: int) -> None:
    """Raises the soft limit of open descriptors where it is too low and may be raised."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = connections + 256
    if soft != resource.RLIM_INFINITY and soft < needed:
        raised = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, raised), hard))


def run_load(
    server: ServerProcess | tuple[str, int],
    *,
    connections: int = 10,
    size: int = 64,
    rate: float | None = None,
    seconds: float = 1.0,
    warmup: float = 0.1,
    request: bytes | None = None,
    reply: bytes | None = None,
) -> LoadResult:
    """Loads a server that answers each request with a fixed reply (by default: echoes it).

    Parameters
    ----------
    server : ServerProcess or (host, port)
        CPU time is known for the first only.
    connections : int
        1 to 50,000; the limit of open descriptors is raised where it may be.
    size : int
        Bytes of a request, when `request` isn't given.
    rate : float, optional
        Requests per second in total; by default each connection asks again as soon as it has its answer.
    seconds, warmup : float
        Measured time, and time before it that isn't measured.
    request, reply : bytes, optional
        What is sent, and what must come back, byte for byte; `reply` defaults to the request.

    Blocks the calling thread: in a coroutine use ``await asyncio.to_thread(run_load, ...)``. A connection that is
    refused, lost or gets wrong bytes counts in ``errors`` and isn't opened again.
    """
    with Load(server, connections=connections, size=size, rate=rate, request=request, reply=reply) as load:
        if warmup:
            load.run(seconds=warmup)
        return load.run(seconds=seconds)
