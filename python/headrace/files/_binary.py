"""Files of bytes: a buffer, a position, and the descriptor under them."""

from __future__ import annotations

import asyncio
import errno
import io
import os
import stat as stat_module
import warnings
from collections.abc import AsyncIterator, Callable, Generator, Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Any, AnyStr, Protocol, Self, TypeVar

from headrace import _file
from headrace._loop import LoopCore
from headrace.files._modes import BUFFER_SIZE
from headrace.files._threads import Job, ThreadDescriptor

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

    from headrace._pool import Lease
    from headrace.files._modes import Opened

T = TypeVar("T", covariant=True)


# The steps in which a file of unknown size is read to its end grow up to this.
LARGEST_STEP = 16 * 1024 * 1024
CLOSED = "I/O operation on closed file"


class Operation(Protocol[T]):
    """What `headrace._file.FileOperation` and `headrace._filethreads.Job` have in common."""

    @property
    def transferred(self) -> int: ...
    @property
    def received(self) -> bytes: ...
    def done(self) -> bool: ...
    def __await__(self) -> Generator[Any, Any, T]: ...


class Borrowed:
    """A buffer of the user's as bytes, for the time of a call: afterwards a bytearray can be resized again."""

    def __init__(self, buffer: ReadableBuffer) -> None:
        self.given = memoryview(buffer)
        self.view = self.given.cast("B")

    def __enter__(self) -> memoryview:
        return self.view

    def __exit__(self, kind: type[BaseException] | None, error: object, traceback: object) -> None:
        if kind is not GeneratorExit:  # the loop is gone, and the operation still has the buffer
            self.view.release()
            self.given.release()


class AsyncFile:
    """What binary and text files have in common."""

    async def aclose(self) -> None:
        """Writes what is buffered, then closes. Idempotent; the file is closed even if this raises or is cancelled."""
        raise NotImplementedError

    async def close(self) -> None:
        """The same as :meth:`aclose`."""
        await self.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()


class BinaryFile(AsyncFile):
    """A file of bytes; made by :func:`open`.

    Methods raise ValueError when the file is closed, ``io.UnsupportedOperation`` for what its mode or kind doesn't
    allow, and OSError as the system has it.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, fd: int, status: os.stat_result, name: Any, opened: Opened
    ) -> None:
        self._loop = loop
        self._name = name
        self._mode = opened.mode
        self._readable, self._writable, self._appending = opened.readable, opened.writable, opened.appending
        self._descriptor: _file.Descriptor | ThreadDescriptor | None = None
        found = describe(fd, status, opened, name)
        self._seekable = found.seekable
        self._size = found.size  # as far as is known: how much the next read should ask for
        self._position = found.position
        self._limit = opened.buffering
        self._ahead: bytes | bytearray = b""  # read already; its byte `_at` is at `_position`
        self._at = 0
        self._pending = bytearray()  # written by the user, up to `_position`, and not by the kernel yet
        self._lock = asyncio.Lock()
        self._closed = False
        self._descriptor = new_descriptor(loop, fd, opened.owned, not found.seekable)

    def __repr__(self) -> str:
        state = "closed " if self._closed else ""
        return f"<{state}headrace.files.{type(self).__name__} name={self._name!r} mode={self._mode!r}>"

    def __del__(self, warn: Callable[..., None] = warnings.warn) -> None:
        if getattr(self, "_descriptor", None) is not None and not self._closed:
            lost = f", {len(self._pending)} buffered bytes are lost" if self._pending else ""
            warn(f"unclosed file {self!r}{lost}", ResourceWarning, source=self, stacklevel=2)

    # ---- what it is -----------------------------------------------------------------------------------------

    @property
    def name(self) -> Any:
        """The path, or the descriptor, that it was opened with."""
        return self._name

    @property
    def mode(self) -> str:
        """The mode, as ``io`` spells it: ``"rb"``, ``"wb"``, ``"ab"``, ``"xb"``, or with ``+``."""
        return self._mode

    @property
    def closed(self) -> bool:
        """Whether :meth:`aclose` was called."""
        return self._closed

    def fileno(self) -> int:
        """The descriptor. Don't close it, and don't move its position."""
        return self._open_descriptor().fd

    def readable(self) -> bool:
        """Whether it was opened for reading."""
        return self._readable

    def writable(self) -> bool:
        """Whether it was opened for writing."""
        return self._writable

    def seekable(self) -> bool:
        """Whether it has positions: false for pipes, terminals and sockets."""
        return self._seekable

    def isatty(self) -> bool:
        """Whether it's a terminal."""
        return os.isatty(self.fileno())

    # ---- reading --------------------------------------------------------------------------------------------

    async def read(self, size: int | None = -1) -> bytes:
        """The next `size` bytes: fewer, or none, only at the end of the file. By default all that follow."""
        self._check_readable()
        if size is not None and 0 <= size <= len(self._ahead) - self._at and not self._lock.locked():
            return self._take(size)
        async with self._lock:
            await self._drain()
            if size is None or size < 0:
                return await self._read_all()
            if self._seekable and size - self._available() >= self._limit:
                return await self._read_directly(size)
            while self._available() < size and await self._fill():
                pass
            return self._take(size)

    async def read1(self, size: int = -1) -> bytes:
        """Up to `size` bytes, with at most one operation: what a stream has at the moment. Empty at its end."""
        self._check_readable()
        async with self._lock:
            await self._drain()
            if not self._available() and size:
                await self._fill()
            return self._take(self._available() if size < 0 else size)

    async def readinto(self, buffer: WriteableBuffer) -> int:
        """Fills a writable buffer from the position on; returns how many bytes, fewer only at the end of the file.

        The kernel writes to the buffer itself. It's left alone again when this returns or raises.
        """
        self._check_readable()
        with Borrowed(buffer) as view:
            if view.readonly:
                raise TypeError("readinto() needs a writable buffer")
            async with self._lock:
                await self._drain()
                have = min(self._available(), len(view))
                if self._seekable and len(view) - have >= max(self._limit, 1):
                    return await self._read_directly_into(view, have)
                while self._available() < len(view) and await self._fill():
                    pass
                have = min(self._available(), len(view))
                view[:have] = memoryview(self._ahead)[self._at : self._at + have]
                self._skip(have)
                return have

    async def read_lease(self, size: int = 256 * 1024) -> Lease:
        """Up to `size` bytes from the position on, as a :class:`headrace.Lease`; an empty one at the end of the file.

        ``transport.write(lease)`` sends them from where the kernel has put them. From a stream it brings what there
        is, as :meth:`read1` does. Only on a headrace loop; elsewhere RuntimeError.
        """
        self._check_readable()
        loop = self._loop
        if not isinstance(loop, LoopCore):
            raise RuntimeError("a lease belongs to the pool of a headrace loop; use read() on this one")
        if size < 0:
            raise ValueError(f"size must not be negative: {size}")
        async with self._lock:
            await self._drain()
            if not self._seekable:
                if not self._available():
                    await self._fill(size)
                return _file.lease_bytes(loop, self._take(size))
            descriptor = self._open_descriptor()
            if isinstance(descriptor, _file.Descriptor):
                lease = await descriptor.lease(size, self._position)
            else:
                lease = _file.lease_bytes(loop, await descriptor.read(size, self._position))
            self._skip(len(lease))
            return lease

    async def pread(self, size: int, offset: int) -> bytes:
        """`size` bytes at `offset`, fewer only at the end of the file. Neither uses nor moves the position."""
        self._check_readable()
        self._check_seekable()
        if size < 0 or offset < 0:
            raise ValueError(f"size and offset must not be negative: {size}, {offset}")
        if self._pending:
            await self.flush()
        return await self._open_descriptor().read(size, offset, self._size - offset)

    async def readline(self, limit: int = -1) -> bytes:
        """The next line with its ``\\n``, or at most `limit` bytes of it; empty at the end of the file."""
        self._check_readable()
        if not self._lock.locked():
            end = self._ahead.find(b"\n", self._at) + 1
            if end and not 0 <= limit < end - self._at:
                return self._take(end - self._at)
        async with self._lock:
            await self._drain()
            return self._take(await self._line_length(limit))

    async def _line_length(self, limit: int) -> int:
        """How many of the bytes that were read ahead belong to the next line; reads on until that's known."""
        seen = 0
        while True:
            end = self._ahead.find(b"\n", self._at + seen) + 1
            seen = self._available()
            if end:
                seen = end - self._at
            if 0 <= limit <= seen:
                return limit
            if end or not await self._fill():
                return seen

    async def readlines(self, hint: int = -1) -> list[bytes]:
        """The lines that follow: all, or until they have `hint` bytes."""
        return await collect_lines(self, hint)

    def __aiter__(self) -> AsyncIterator[bytes]:
        self._check_readable()
        return self

    async def __anext__(self) -> bytes:
        line = await self.readline()
        if not line:
            raise StopAsyncIteration
        return line

    # ---- writing --------------------------------------------------------------------------------------------

    async def write(self, data: ReadableBuffer) -> int:
        """Writes all of `data`, at the position or, in append mode, at the end of the file; returns its length.

        Small writes are collected, up to the size of the buffer, and written by :meth:`flush`, :meth:`aclose` or the
        next call that needs it. `data` must not change until this returns.
        """
        self._check_writable()
        with Borrowed(data) as view:
            async with self._lock:
                self._check_writable()
                self._forget_ahead()
                if len(self._pending) + len(view) >= max(self._limit, 1):
                    await self._drain()
                if len(view) >= max(self._limit, 1):
                    await self._write_out(view)
                else:
                    self._pending += view
                    self._position += len(view)
                return len(view)

    async def writelines(self, lines: Iterable[ReadableBuffer]) -> None:
        """Writes each of them; nothing is put in between."""
        for line in lines:
            await self.write(line)

    async def pwrite(self, data: ReadableBuffer, offset: int) -> int:
        """Writes all of `data` at `offset`, unbuffered; returns its length. Neither uses nor moves the position.

        On Linux a file in append mode is written at its end even so (pwrite(2), BUGS).
        """
        self._check_writable()
        self._check_seekable()
        if offset < 0:
            raise ValueError(f"offset must not be negative: {offset}")
        if self._pending:
            await self.flush()
        with Borrowed(data) as view:
            count = await self._open_descriptor().write(view, offset) if len(view) else 0
        self._forget_ahead()
        self._size = max(self._size, offset + count)
        return count

    async def flush(self) -> None:
        """Writes what was collected, so that other processes see it."""
        self._check_open()
        async with self._lock:
            await self._drain()

    async def fsync(self, data_only: bool = False) -> None:
        """:meth:`flush`, and on to the disk: fsync(2), or with `data_only` fdatasync(2)."""
        self._check_open()
        async with self._lock:
            await self._drain()
            await self._open_descriptor().sync(data_only)

    async def truncate(self, size: int | None = None) -> int:
        """Makes the file `size` bytes long, by default as long as the position; returns that. The position stays."""
        self._check_writable()
        self._check_seekable()
        async with self._lock:
            await self._drain()
            size = self._position if size is None else size
            if size < 0:
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            descriptor, length = self._open_descriptor(), size
            if isinstance(descriptor, ThreadDescriptor) or _file.supported(self._loop, "truncate"):
                await descriptor.truncate(length)
            else:  # before Linux 6.9
                fd = descriptor.fd
                await Job(self._loop, lambda job: os.ftruncate(fd, length))
            self._forget_ahead()
            self._size = size
            return size

    # ---- the position ---------------------------------------------------------------------------------------

    async def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Moves the position; returns it. `whence` as for lseek(2), also ``os.SEEK_DATA`` and ``os.SEEK_HOLE``."""
        self._check_open()
        self._check_seekable()
        async with self._lock:
            await self._drain()
            if whence == os.SEEK_SET:
                target = offset
            elif whence == os.SEEK_CUR:
                target = self._position + offset
            elif whence == os.SEEK_END:
                target = await self._end() + offset
            elif whence in (os.SEEK_DATA, os.SEEK_HOLE):
                fd = self.fileno()
                target = await Job(self._loop, lambda job: os.lseek(fd, offset, whence))
            else:
                raise ValueError(f"whence must be 0 to 4, not {whence}")
            if target < 0:
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            at = self._at + target - self._position
            if 0 <= at <= len(self._ahead):
                self._at = at
            else:
                self._forget_ahead()
            self._position = target
            return target

    async def tell(self) -> int:
        """The position."""
        self._check_open()
        self._check_seekable()
        if self._appending and self._pending:
            await self.flush()
        return self._position

    async def _end(self) -> int:
        found = await self._open_descriptor().stat()
        if stat_module.S_ISREG(found.st_mode):
            return found.st_size
        return os.lseek(self.fileno(), 0, os.SEEK_END)  # a device's size is in memory

    # ---- closing --------------------------------------------------------------------------------------------

    async def aclose(self) -> None:
        """Writes what is buffered, then closes, when what other tasks have in flight has ended.

        A read that waits for a stream is ended: it raises ValueError. Idempotent. The file is closed even if this
        raises or is cancelled; what could not be written by then is lost.
        """
        if self._closed:
            return
        descriptor = self._open_descriptor()
        self._closed = True
        if not self._seekable and self._readable:
            descriptor.interrupt(ValueError("the file was closed during this call"))
        try:
            async with self._lock:
                await self._drain()
        finally:
            self._pending.clear()
            self._ahead, self._at = b"", 0
            await descriptor.close()

    # ---- inside: the caller has the lock --------------------------------------------------------------------

    def _open_descriptor(self) -> _file.Descriptor | ThreadDescriptor:
        if self._descriptor is None or self._closed:
            raise ValueError(CLOSED)
        return self._descriptor

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError(CLOSED)
        if asyncio.get_running_loop() is not self._loop:
            raise RuntimeError(f"{self!r} belongs to another event loop")

    def _check_readable(self) -> None:
        self._check_open()
        if not self._readable:
            raise io.UnsupportedOperation("not readable")

    def _check_writable(self) -> None:
        self._check_open()
        if not self._writable:
            raise io.UnsupportedOperation("not writable")

    def _check_seekable(self) -> None:
        if not self._seekable:
            raise io.UnsupportedOperation("the file is not seekable")

    def _available(self) -> int:
        return len(self._ahead) - self._at

    def _take(self, size: int) -> bytes:
        """Up to `size` of the bytes that were read ahead."""
        piece = self._ahead[self._at : self._at + size]
        self._skip(len(piece))
        return piece if isinstance(piece, bytes) else bytes(piece)

    def _skip(self, count: int) -> None:
        """Moves the position; what was read ahead beyond it is kept."""
        self._position += count
        self._at += count
        if self._at >= len(self._ahead):
            self._ahead, self._at = b"", 0

    def _forget_ahead(self) -> None:
        if self._seekable:
            self._ahead, self._at = b"", 0

    def _keep(self, data: bytes) -> None:
        """Appends to what was read ahead."""
        if self._at == len(self._ahead):
            self._ahead, self._at = data, 0
            return
        if isinstance(self._ahead, bytes):
            self._ahead = bytearray(memoryview(self._ahead)[self._at :])
        else:
            del self._ahead[: self._at]
        self._at = 0
        self._ahead += data

    async def _fill(self, size: int = 0) -> int:
        """Reads on ahead; returns how many bytes that brought: 0 at the end of the file."""
        size = size or self._limit or (1 if self._seekable else BUFFER_SIZE)
        descriptor = self._open_descriptor()
        if self._seekable:
            offset = self._position + self._available()
            data = await descriptor.read(size, offset, self._size - offset)
            self._keep(data)
            return len(data)
        operation: Operation[bytes] = descriptor.read(size, -1)
        try:
            data = await operation
        except BaseException:
            self._keep(operation.received)
            raise
        self._keep(data)
        return len(data)

    async def _read_directly(self, size: int) -> bytes:
        """More than the buffer holds: the kernel writes into the result itself."""
        have = self._ahead[self._at :]
        offset = self._position + len(have)
        data = await self._open_descriptor().read(size - len(have), offset, self._size - offset)
        if have:
            data = bytes(have) + data
        self._forget_ahead()
        self._position += len(data)
        return data

    async def _read_directly_into(self, view: memoryview, have: int) -> int:
        with Borrowed(view[have:]) as rest:
            count = await self._open_descriptor().readinto(rest, self._position + have)
        view[:have] = memoryview(self._ahead)[self._at : self._at + have]
        self._forget_ahead()
        self._position += have + count
        return have + count

    async def _read_all(self) -> bytes:
        if not self._seekable:
            while await self._fill():
                pass
            return self._take(self._available())
        pieces = [bytes(self._ahead[self._at :])]
        offset = self._position + len(pieces[0])
        step = max(self._size - offset, 0) + 1
        while True:
            data = await self._open_descriptor().read(step, offset, self._size - offset)
            pieces.append(data)
            offset += len(data)
            if len(data) < step:
                break
            step = min(max(2 * step, BUFFER_SIZE), LARGEST_STEP)
        self._forget_ahead()
        self._position = offset
        return b"".join(pieces) if pieces[0] or len(pieces) > 2 else pieces[1]

    async def _drain(self) -> None:
        """Writes what was collected. What can't be written stays collected."""
        while self._pending:
            start = -1 if self._appending or not self._seekable else self._position - len(self._pending)
            operation: Operation[int] = self._raw_descriptor().write(self._pending, start)
            try:
                await operation
            finally:
                if operation.done():  # not if the loop is gone
                    del self._pending[: operation.transferred]
                    self._wrote()

    async def _write_out(self, view: memoryview) -> None:
        start = -1 if self._appending or not self._seekable else self._position
        operation: Operation[int] = self._raw_descriptor().write(view, start)
        try:
            await operation
        finally:
            if operation.done():
                self._position += operation.transferred
                self._wrote()

    def _raw_descriptor(self) -> _file.Descriptor | ThreadDescriptor:
        """Also while the file is being closed: what was collected is still written."""
        assert self._descriptor is not None
        return self._descriptor

    def _wrote(self) -> None:
        if self._appending and self._seekable and not self._pending:
            # Where the end is, only the kernel knows: others may append as well. This doesn't look at the disk.
            self._position = os.lseek(self._raw_descriptor().fd, 0, os.SEEK_CUR)
        self._size = max(self._size, self._position - len(self._pending))


class Lines(Protocol[T]):
    def __aiter__(self) -> AsyncIterator[T]: ...


async def collect_lines(file: Lines[AnyStr], hint: int) -> list[AnyStr]:
    lines: list[AnyStr] = []
    size = 0
    async for line in file:
        lines.append(line)
        size += len(line)
        if 0 < hint <= size:
            break
    return lines


class Found:
    """What a descriptor turned out to be."""

    def __init__(self, seekable: bool, size: int, position: int) -> None:
        self.seekable = seekable
        self.size = size
        self.position = position


def describe(fd: int, status: os.stat_result, opened: Opened, name: Any) -> Found:
    if stat_module.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), name)
    try:
        position = os.lseek(fd, 0, os.SEEK_CUR)
    except OSError as exc:
        if exc.errno != errno.ESPIPE:
            raise
        if opened.readable and opened.writable:
            raise io.UnsupportedOperation(
                "a stream can't be opened for reading and writing at once"
            ) from None
        return Found(False, 0, 0)
    return Found(True, status.st_size, status.st_size if opened.appending else position)


def new_descriptor(
    loop: asyncio.AbstractEventLoop, fd: int, owned: bool, stream: bool
) -> _file.Descriptor | ThreadDescriptor:
    if isinstance(loop, LoopCore) and _file.supported(loop):
        return _file.Descriptor(loop, fd, owned)
    return ThreadDescriptor(loop, fd, owned, stream)
