"""Connections for programs made of coroutines: something to read from, and something to write to.

Rules
-----
* What comes is kept in its leases, uncopied, until it's read. Above ``limit`` bytes the transport is paused, and goes
  on when half of that is left; who asks for more at a time than the limit gets it all the same.
* A read that is cancelled, or whose time is up, has taken nothing: the next one finds everything there.
* One read at a time. Reading and writing don't hinder each other.
* The end of the stream is told when everything before it was read: ``b""``, or IncompleteReadError where more was
  asked for. So is an error; it's raised by every read from then on.
* ``write`` never waits; ``drain`` waits while more is queued than the transport's high-water mark.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any, Self

from headrace.errors import IncompleteReadError, LimitOverrunError
from headrace.protocol import Protocol

if TYPE_CHECKING:
    from types import TracebackType

    from headrace._pool import Lease
    from headrace.loop import EventLoop
    from headrace.messages import Framing
    from headrace.security.identity import SecurityInfo
    from headrace.security.settings import Secured, Security

    _Handler = Callable[["Reader", "Writer"], Awaitable[None]]

__all__ = [
    "LIMIT",
    "Reader",
    "Writer",
    "open_connection",
    "open_unix_connection",
    "start_server",
    "start_unix_server",
]

LIMIT = 64 * 1024  # bytes that wait to be read, and the longest line


class Reader:
    """What a connection's peer sends. Made by ``open_connection`` and ``start_server``; for its loop's thread only.

    Every read takes ``timeout=``, in seconds: TimeoutError when it's over, with nothing consumed.
    """

    def __init__(self, loop: EventLoop, limit: int = LIMIT) -> None:
        if limit < 1:
            raise ValueError(f"limit must be at least 1 byte, not {limit!r}")
        self._loop = loop
        self._capacity = limit
        self._transport: Any = None
        self._text = bytearray()  # what a search or a join has copied out of leases; it comes before them
        self._leases: deque[Lease] = deque()
        self._taken = 0  # bytes of the first lease
        self._size = 0  # bytes that wait, in both
        self._reading: asyncio.Future[None] | None = None
        self._wanted = 1  # bytes that the waiting read needs
        self._paused = False
        self._ended = False
        self._error: BaseException | None = None

    def __repr__(self) -> str:
        state = "ended" if self._ended else "paused" if self._paused else "open"
        return f"<headrace.Reader {state}, {self._size} bytes waiting>"

    # ---- from the connection ---------------------------------------------------------------------------------

    def _received(self, lease: Lease) -> None:
        self._leases.append(lease)
        self._size += len(lease)
        if self._size < self._wanted:
            return
        self._wake()
        if self._size > self._capacity and not self._paused:
            self._paused = True
            self._transport.pause_reading()

    def _end(self, error: BaseException | None = None) -> None:
        self._ended = True
        if self._error is None:
            self._error = error
        self._wake()

    def _wake(self) -> None:
        if self._reading is not None and not self._reading.done():
            self._reading.set_result(None)

    def _take_all(self) -> tuple[bytes, bool]:
        """What nobody has read, for a layer that comes in between, and whether that was all of the stream."""
        self._join()
        ahead, ended = bytes(self._text), self._ended
        self._text.clear()
        self._size = 0
        self._ended = self._paused = False
        return ahead, ended

    # ---- waiting ---------------------------------------------------------------------------------------------

    def _waits(self, size: int) -> asyncio.Future[None]:
        """What is done when that many bytes are there, or the stream has ended."""
        if self._reading is not None:
            raise RuntimeError("another coroutine is reading from this connection already")
        if self._paused:
            self._paused = False
            self._transport.resume_reading()
        self._wanted = size
        self._reading = waiter = self._loop.create_future()
        return waiter

    def _waited(self) -> None:
        self._reading = None
        self._wanted = 1

    async def _until(self, size: int) -> bool:
        """Waits until that many bytes are there; False if the stream ends before."""
        while self._size < size:
            if self._ended:
                return False
            waiter = self._waits(size)
            try:
                await waiter
            finally:
                self._waited()
        return True

    def _consumed(self, size: int) -> None:
        self._size -= size
        if self._paused and self._size <= self._capacity // 2:
            self._paused = False
            self._transport.resume_reading()

    def _at_end(self) -> None:
        """Raises what the connection has ended with, if it's an error."""
        if self._error is not None:
            raise self._error

    # ---- reading ---------------------------------------------------------------------------------------------

    async def read(self, size: int = -1, *, timeout: float | None = None) -> bytes:
        """Up to ``size`` bytes, as soon as there are any; all until the end without a size. ``b""``: the end."""
        if timeout is not None:
            async with asyncio.timeout(timeout):
                return await self.read(size)
        if size < 0:
            while await self._until(self._size + 1):
                pass
            self._at_end()
            return self._cut(self._size)
        if not self._size and size:
            if not self._ended:  # the usual wait, without a coroutine of its own
                waiter = self._waits(1)
                try:
                    await waiter
                finally:
                    self._waited()
            if not self._size:
                self._at_end()
                return b""
        leases = self._leases
        if len(leases) == 1 and not self._taken and not self._text and self._size <= size:
            # Nearly always: one receive, and all of it.
            lease = leases.popleft()
            data = bytes(lease)
            lease.release()
            self._consumed(len(data))
            return data
        return self._cut(min(size, self._size))

    async def read_lease(self, *, timeout: float | None = None) -> Lease | None:
        """What came next, uncopied and as it came; the caller releases it. None: the end."""
        if timeout is not None:
            async with asyncio.timeout(timeout):
                return await self.read_lease()
        if not self._size and not await self._until(1):
            self._at_end()
            return None
        if self._text:
            engine = self._loop._engine
            assert engine is not None
            assert engine.pool is not None
            lease = engine.pool.adopt(bytes(self._text))
            self._text.clear()
        else:
            lease = self._leases.popleft()
            if self._taken:
                whole, lease = lease, lease[self._taken :]
                whole.release()
                self._taken = 0
        self._consumed(len(lease))
        return lease

    async def readinto(self, buffer: Any, *, timeout: float | None = None) -> int:
        """Fills a writable buffer with what there is, as soon as there's any; how many bytes. 0: the end."""
        if timeout is not None:
            async with asyncio.timeout(timeout):
                return await self.readinto(buffer)
        view = memoryview(buffer).cast("B")
        if not view:
            return 0
        if not self._size and not await self._until(1):
            self._at_end()
            return 0
        return self._fill(view[: self._size])

    async def readexactly(self, size: int, *, timeout: float | None = None) -> bytes:
        """``size`` bytes, neither more nor less.

        Raises
        ------
        IncompleteReadError
            The stream ended before; ``partial`` has what was there.
        """
        if size < 0:
            raise ValueError(f"size must not be negative, as {size!r} is")
        if timeout is not None:
            async with asyncio.timeout(timeout):
                return await self.readexactly(size)
        if self._size < size and not await self._until(size):
            self._at_end()
            raise IncompleteReadError(self._cut(self._size), size)
        return self._cut(size)

    async def readuntil(self, separator: bytes = b"\n", *, timeout: float | None = None) -> bytes:
        """Everything up to the separator, and that.

        Raises
        ------
        IncompleteReadError
            The stream ended before one came; ``partial`` has what was there.
        LimitOverrunError
            None is within the limit; nothing was consumed.
        """
        if not separator:
            raise ValueError("a separator has at least one byte")
        if timeout is not None:
            async with asyncio.timeout(timeout):
                return await self.readuntil(separator)
        searched = 0
        while True:
            self._join()
            at = self._text.find(separator, searched)
            if at > self._capacity or (at < 0 and self._size > self._capacity):
                raise LimitOverrunError(
                    f"no separator within {self._capacity} bytes (limit=)", min(self._size, self._capacity)
                )
            if at >= 0:
                return self._cut(at + len(separator))
            searched = max(0, self._size - len(separator) + 1)
            if not await self._until(self._size + 1):
                self._at_end()
                raise IncompleteReadError(self._cut(self._size), None)

    async def readline(self, *, timeout: float | None = None) -> bytes:
        """A line with its ``\\n``, or what is left at the end of the stream."""
        try:
            return await self.readuntil(b"\n", timeout=timeout)
        except IncompleteReadError as end:
            return end.partial

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self._lines()

    async def _lines(self) -> AsyncIterator[bytes]:
        while line := await self.readline():
            yield line

    async def messages(self, framing: Framing) -> AsyncIterator[bytes]:
        """The peer's messages, one after the other, until it ends its stream.

        Raises
        ------
        IncompleteReadError
            It ended within one.
        MessageError
            It doesn't keep to the framing, or sent a message that is too long.
        """
        decoder = framing.decoder()
        while lease := await self.read_lease():
            with lease:
                decoder.feed(lease)
            while (message := decoder.next()) is not None:
                yield message
        if decoder.partial:
            raise IncompleteReadError(decoder.partial, None)

    def at_eof(self) -> bool:
        """Whether everything was read and nothing more will come."""
        return self._ended and not self._size

    # ---- out of the buffers ----------------------------------------------------------------------------------

    def _join(self) -> None:
        """Copies what lies in leases together."""
        leases = self._leases
        while leases:
            with leases.popleft() as lease:
                self._text += memoryview(lease)[self._taken :] if self._taken else lease
            self._taken = 0

    def _cut(self, size: int) -> bytes:
        """The next bytes; they are there."""
        if not self._text and self._leases and self._taken + size <= len(self._leases[0]):
            lease = self._leases[0]
            end = self._taken + size
            data = bytes(memoryview(lease)[self._taken : end])
            if end == len(lease):
                self._leases.popleft().release()
                end = 0
            self._taken = end
        else:
            self._join()
            data = bytes(memoryview(self._text)[:size])
            del self._text[:size]
        self._consumed(size)
        return data

    def _fill(self, view: memoryview) -> int:
        size = len(view)
        done = min(len(self._text), size)
        if done:
            view[:done] = memoryview(self._text)[:done]
            del self._text[:done]
        while done < size:
            lease = self._leases[0]
            part = min(len(lease) - self._taken, size - done)
            view[done : done + part] = memoryview(lease)[self._taken : self._taken + part]
            done += part
            self._taken += part
            if self._taken == len(lease):
                self._leases.popleft().release()
                self._taken = 0
        self._consumed(size)
        return size


class Writer:
    """What goes to a connection's peer, and the connection itself. For its loop's thread only.

    ``async with writer:`` closes it at the end, and waits for that.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._transport: Any = None

    def __repr__(self) -> str:
        return f"<headrace.Writer {self._transport!r}>"

    @property
    def transport(self) -> Any:
        """The transport below: a :class:`headrace.StreamTransport`, or what secures one."""
        return self._transport

    @property
    def security(self) -> SecurityInfo | None:
        """Who the peer is and how the connection is protected; None where it isn't."""
        info: SecurityInfo | None = self._transport.get_extra_info("security")
        return info

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """See :meth:`asyncio.BaseTransport.get_extra_info`."""
        return self._transport.get_extra_info(name, default)

    def write(self, data: bytes | bytearray | memoryview | Lease) -> None:
        """Queues bytes, or a lease, to be sent. Doesn't wait: ``await drain()`` where much is written."""
        self._transport.write(data)

    def writelines(self, pieces: Any) -> None:
        """Queues several."""
        self._transport.writelines(pieces)

    def write_message(self, framing: Framing, message: bytes) -> None:
        """Queues a message in its framing. Raises MessageError for one that the framing can't hold."""
        self._transport.writelines(framing.encode(message))

    async def drain(self, *, timeout: float | None = None) -> None:
        """Waits while the peer, or the network, takes less than was written.

        Raises
        ------
        ConnectionError
            The connection is gone: what was written may not have arrived.
        TimeoutError
            ``timeout`` seconds weren't enough; everything stays queued.
        """
        connection = self._connection
        if connection.lost:
            raise connection.error or ConnectionResetError("the connection is closed")
        if connection.writable is None:
            return
        async with asyncio.timeout(timeout):
            await asyncio.shield(connection.writable)

    def can_write_eof(self) -> bool:
        """Whether ``write_eof`` can be called."""
        return bool(self._transport.can_write_eof())

    def write_eof(self) -> None:
        """Ends our stream behind what was written; the peer's goes on."""
        self._transport.write_eof()

    def is_closing(self) -> bool:
        """Whether the connection is closed, or on the way there."""
        return bool(self._transport.is_closing())

    def close(self) -> None:
        """Sends what is queued, and closes the connection."""
        self._transport.close()

    def abort(self) -> None:
        """Closes the connection at once; what is queued is dropped."""
        self._transport.abort()

    async def wait_closed(self) -> None:
        """Returns when the connection is closed; raises what ended it, if that's an error."""
        await asyncio.shield(self._connection.closed)
        if self._connection.error is not None:
            raise self._connection.error

    async def start_security(
        self, security: Security, *, server_side: bool = False, server_hostname: str | None = None
    ) -> None:
        """Secures the connection from here on; what was read ahead goes to the handshake.

        Raises
        ------
        SecurityError
            See :class:`headrace.TLS` and :class:`headrace.Negotiate`.
        """
        connection = self._connection
        loop = connection.loop
        await self.drain()
        self._use(
            await loop.start_security(
                self._transport,
                connection,
                security,
                server_side=server_side,
                server_hostname=server_hostname,
            )
        )

    def _use(self, transport: Any) -> None:
        self._transport = self._connection.reader._transport = transport

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        if exc is not None:
            self.abort()
            return
        self.close()
        await self.wait_closed()


class Connection(Protocol):
    """What binds a reader and a writer to their transport."""

    def __init__(self, loop: EventLoop, limit: int, handler: _Handler | None = None) -> None:
        self.loop = loop
        self.reader = Reader(loop, limit)
        self.writer = Writer(self)
        self.lost = False
        self.error: BaseException | None = None
        self.closed: asyncio.Future[None] = loop.create_future()
        self.writable: asyncio.Future[None] | None = None  # while writing is paused
        self._handler = handler
        self._handling: asyncio.Task[None] | None = None
        # The transport takes it from here: one call less for each receive.
        self.lease_received = self.reader._received  # type: ignore[method-assign]

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.writer._use(transport)
        if self._handler is not None:
            # It's held by the connection, which the transport holds, and then by what it waits for.
            self._handling = self.loop.create_task(self._serve(self._handler))

    async def _serve(self, handler: _Handler) -> None:
        try:
            await handler(self.reader, self.writer)
        except asyncio.CancelledError:
            self.writer.abort()
            raise
        except Exception as exc:
            # That the peer has left is nobody's mistake here.
            if not (exc is self.error or (isinstance(exc, IncompleteReadError) and self.reader.at_eof())):
                self.loop.call_exception_handler(
                    {
                        "message": "a connection's handler failed",
                        "exception": exc,
                        "transport": self.writer.transport,
                        # No "task": since 3.12 the handler would be run in its context, and that's this one.
                    }
                )
            self.writer.abort()
        else:
            self.writer.close()
        finally:
            self._handling = None

    def eof_received(self) -> bool:
        self.reader._end()
        return bool(self.writer._transport.can_write_eof())  # the handler may still have something to say

    def connection_lost(self, exc: BaseException | None) -> None:
        self.lost = True
        self.error = exc
        self.reader._end(exc)
        self.resume_writing()
        if not self.closed.done():
            self.closed.set_result(None)

    def pause_writing(self) -> None:
        self.writable = self.loop.create_future()

    def resume_writing(self) -> None:
        writable, self.writable = self.writable, None
        if writable is None or writable.done():
            return
        if self.error is None:
            writable.set_result(None)
        else:
            writable.set_exception(self.error)
            writable.exception()  # nobody may be waiting: no complaint then

    def _take_read_ahead(self, transport: Any) -> tuple[bytes, bool]:
        """See ``headrace.starttls``: from here on the connection is that transport's."""
        self.writer._use(transport)
        return self.reader._take_all()


def current_loop() -> EventLoop:
    from headrace.loop import EventLoop

    loop = asyncio.get_running_loop()
    if not isinstance(loop, EventLoop):
        raise RuntimeError(f"headrace's streams need headrace's loop, not {loop!r}: use headrace.run()")
    return loop


async def open_connection(
    host: str | None = None,
    port: int | None = None,
    *,
    security: Secured | None = None,
    limit: int = LIMIT,
    **options: Any,
) -> tuple[Reader, Writer]:
    """Connects, and secures the connection if it's to be; what to read from and what to write to.

    Parameters
    ----------
    host, port, options
        See :meth:`asyncio.loop.create_connection`.
    security : TLS, Negotiate, ProxyProtocol or a list of them, the outermost first; optional
    limit : int
        Bytes that may wait to be read, and the longest line.

    Raises
    ------
    OSError
        The connection can't be made.
    SecurityError
        It can't be secured.
    """
    loop = current_loop()
    _, connection = await loop.create_connection(
        lambda: Connection(loop, limit), host, port, security=security, **options
    )
    return connection.reader, connection.writer


async def open_unix_connection(
    path: str | None = None, *, security: Secured | None = None, limit: int = LIMIT, **options: Any
) -> tuple[Reader, Writer]:
    """The same over a Unix socket; see :meth:`asyncio.loop.create_unix_connection`."""
    loop = current_loop()
    _, connection = await loop.create_unix_connection(
        lambda: Connection(loop, limit), path, security=security, **options
    )
    return connection.reader, connection.writer


async def start_server(
    handler: _Handler,
    host: str | list[str] | None = None,
    port: int | None = None,
    *,
    security: Secured | None = None,
    limit: int = LIMIT,
    **options: Any,
) -> asyncio.Server:
    """Serves each connection by ``handler(reader, writer)``, a task of its own, once it's secured and let in.

    When the handler returns, its connection is closed behind what was written. When it raises, the loop's exception
    handler is told and the connection aborted; an error that the connection itself ended with is no news. The other
    arguments are those of :meth:`asyncio.loop.create_server` and ``open_connection``.
    """
    loop = current_loop()
    return await loop.create_server(
        lambda: Connection(loop, limit, handler), host, port, security=security, **options
    )


async def start_unix_server(
    handler: _Handler,
    path: str | None = None,
    *,
    security: Secured | None = None,
    limit: int = LIMIT,
    **options: Any,
) -> asyncio.Server:
    """The same over a Unix socket; see :meth:`asyncio.loop.create_unix_server`."""
    loop = current_loop()
    return await loop.create_unix_server(
        lambda: Connection(loop, limit, handler), path, security=security, **options
    )
