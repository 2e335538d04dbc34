"""The loop's ``sock_*``: system calls on sockets that the user owns.

Each tries at once. Where the kernel would block, the coroutine waits until the descriptor is ready and tries again
*itself*, after its resumption. So a cancelled call has consumed nothing: there is no moment at which bytes, a datagram
or an accepted connection are on their way to a coroutine that won't take them. (asyncio's own receive in a callback
and lose what came if the task is cancelled before it resumes.)

Waiting to read is one operation on the engine where it allows any number of them, no system call of its own; it's
cancelled with the coroutine, so the ring holds the user's descriptor no longer than the call. Waiting to write is
rare, and left to the inherited selector, as is ``sock_connect``.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from headrace._loop import LoopCore

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

    from headrace._loop import ReadWait

__all__ = ["SocketOperations"]

WOULD_BLOCK = (BlockingIOError, InterruptedError)


class SocketOperations(LoopCore, asyncio.SelectorEventLoop):
    """Adds ``sock_*`` to the core. Not used by itself: see :class:`headrace.EventLoop`.

    All of them raise ``TypeError`` for an ``ssl.SSLSocket``, ``ValueError`` (in debug mode) for a blocking socket, and
    ``RuntimeError`` for a socket that a transport of this loop owns: two readers would each get half of a stream.
    """

    if TYPE_CHECKING:
        # asyncio's own; typeshed leaves them out.
        def _add_reader(self, fd: int, callback: Callable[..., object], *args: Any) -> asyncio.Handle: ...
        def _add_writer(self, fd: int, callback: Callable[..., object], *args: Any) -> asyncio.Handle: ...

    def __init__(self) -> None:
        super().__init__()
        self._read_waits = SelectorWaits(self, self._add_reader, self.remove_reader)
        self._write_waits = SelectorWaits(self, self._add_writer, self.remove_writer)

    def _check_socket(self, sock: socket.socket) -> None:
        if isinstance(sock, ssl.SSLSocket):
            raise TypeError("Socket cannot be of type SSLSocket")
        if self.get_debug() and sock.gettimeout() != 0:
            raise ValueError("the socket must be non-blocking")
        self._ensure_fd_no_transport(sock)

    async def _readable(self, sock: socket.socket) -> None:
        wait: ReadWait | None = self._poll_readable(sock.fileno())
        if wait is None:
            await self._read_waits.ready(sock.fileno())
            return
        try:
            await wait.future
        finally:
            wait.cancel()

    async def _writable(self, sock: socket.socket) -> None:
        await self._write_waits.ready(sock.fileno())

    async def sock_recv(self, sock: socket.socket, nbytes: int) -> bytes:
        """Up to ``nbytes`` bytes, as soon as there are any; ``b""`` at the end of the stream."""
        self._check_socket(sock)
        while True:
            try:
                return sock.recv(nbytes)
            except WOULD_BLOCK:
                await self._readable(sock)

    async def sock_recv_into(self, sock: socket.socket, buf: WriteableBuffer) -> int:
        """Receives into ``buf``: the number of bytes, as soon as there are any; 0 at the end of the stream."""
        self._check_socket(sock)
        while True:
            try:
                return sock.recv_into(buf)
            except WOULD_BLOCK:
                await self._readable(sock)

    async def sock_recvfrom(self, sock: socket.socket, bufsize: int) -> tuple[bytes, Any]:
        """The next datagram, cut to ``bufsize`` bytes, and its sender's address."""
        self._check_socket(sock)
        while True:
            try:
                return sock.recvfrom(bufsize)
            except WOULD_BLOCK:
                await self._readable(sock)

    async def sock_recvfrom_into(
        self, sock: socket.socket, buf: WriteableBuffer, nbytes: int = 0
    ) -> tuple[int, Any]:
        """Receives the next datagram into ``buf``, up to ``nbytes`` (0: its size): its length and sender's address."""
        self._check_socket(sock)
        size = nbytes or memoryview(buf).nbytes
        while True:
            try:
                return sock.recvfrom_into(buf, size)
            except WOULD_BLOCK:
                await self._readable(sock)

    async def sock_sendto(self, sock: socket.socket, data: ReadableBuffer, address: Any) -> int:
        """Sends a datagram to ``address``; the number of its bytes."""
        self._check_socket(sock)
        while True:
            try:
                return sock.sendto(data, address)
            except WOULD_BLOCK:
                await self._writable(sock)

    async def sock_sendall(self, sock: socket.socket, data: ReadableBuffer) -> None:
        """Sends all of ``data``. If it's cancelled, or fails, nobody can tell how much the peer has received."""
        self._check_socket(sock)
        with memoryview(data) as given, given.cast("B") as view:
            sent = 0
            while True:
                try:
                    sent += sock.send(view[sent:] if sent else view)
                except WOULD_BLOCK:
                    pass
                if sent >= len(view):
                    return
                await self._writable(sock)

    async def sock_accept(self, sock: socket.socket) -> tuple[socket.socket, Any]:
        """The next connection of a listening socket, as a non-blocking socket, and its peer's address."""
        self._check_socket(sock)
        while True:
            try:
                connection, address = sock.accept()
            except WOULD_BLOCK:
                await self._readable(sock)
            else:
                connection.setblocking(False)
                return connection, address


class SelectorWaits:
    """Coroutines that wait for descriptors in one direction, any number for each: a selector knows one callback."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        add: Callable[..., asyncio.Handle],
        remove: Callable[[int], object],
    ) -> None:
        self._loop = loop
        self._add = add
        self._remove = remove
        self._waiting: dict[int, tuple[asyncio.Handle, set[asyncio.Future[None]]]] = {}

    async def ready(self, fd: int) -> None:
        """Waits until ``fd`` is ready, or has an error to tell."""
        future: asyncio.Future[None] = self._loop.create_future()
        handle, futures = self._waiting.get(fd) or (None, set())
        if handle is None or handle.cancelled():  # by an add_reader() of the user's, which took its place
            self._waiting[fd] = self._add(fd, self._wake, fd), futures
        futures.add(future)
        try:
            await future
        finally:
            futures.discard(future)
            if not futures:
                self._forget(fd, futures)

    def _wake(self, fd: int) -> None:
        futures = self._waiting[fd][1]
        self._forget(fd, futures)
        for future in futures:
            if not future.done():
                future.set_result(None)

    def _forget(self, fd: int, futures: set[asyncio.Future[None]]) -> None:
        handle, waiting = self._waiting.get(fd) or (None, None)
        if handle is not None and waiting is futures:
            del self._waiting[fd]
            if not handle.cancelled():
                self._remove(fd)
