"""What ``headrace._file`` does by io_uring, done by threads: for the epoll engine, and for other libraries' loops.

The awaitables have the same ``transferred`` and ``received``, and the same way of being cancelled: the task goes on
when the system call has returned, since until then it may write to the task's buffer. A call that no thread has begun
yet is dropped at once. A stream (a pipe, a terminal) is waited for with the loop's selector, not by a thread: a thread
that sleeps in ``read`` can't be cancelled at all.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, StrOrBytesPath, WriteableBuffer

__all__ = ["Job", "ThreadDescriptor", "open_file"]

T = TypeVar("T")

# What a pipe takes at least when it's writable at all: a longer write could put the thread to sleep.
PIPE_PIECE = 4096
# One system call in a thread moves at most this much. (Linux itself stops at 2 GiB.)
PIECE = 1 << 30


class Job(Generic[T]):
    """A function that a thread of the loop's default executor runs; to be awaited once.

    The function gets the job, and counts in ``transferred``. With ``surely`` it runs even if the task is cancelled.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        function: Callable[[Job[T]], T],
        descriptor: ThreadDescriptor | None = None,
        *,
        surely: bool = False,
    ) -> None:
        self.loop = loop
        self.function = function
        self.descriptor = descriptor
        self.surely = surely
        self.transferred = 0
        self.received = b""
        self.future: asyncio.Future[T] | None = None
        self.claim = threading.Lock()  # taken by the thread that begins, or by the task that gives up before

    def __await__(self) -> Generator[Any, None, T]:
        return self.run().__await__()

    def done(self) -> bool:
        """Whether no thread works for it any more."""
        return self.future is None or self.future.done()

    async def run(self) -> T:
        if self.descriptor is None:
            return await self.execute()
        flying = self.descriptor.flying
        flying.add(self)
        try:
            return await self.execute()
        finally:
            if self.future is None or self.future.done():
                self.descriptor.landed(self)
            else:
                self.future.add_done_callback(self.landed)

    def landed(self, future: asyncio.Future[T]) -> None:
        if not future.cancelled():
            future.exception()  # retrieved: the task is gone
        assert self.descriptor is not None
        self.descriptor.landed(self)

    async def execute(self) -> T:
        self.future = future = self.loop.run_in_executor(None, self.call)
        cancelled = None
        while not future.done():
            try:
                await asyncio.shield(future)
            except asyncio.CancelledError as exc:
                if not self.surely and self.claim.acquire(blocking=False):
                    future.cancel()
                    raise
                cancelled = exc
            except Exception:
                break  # the function's own
        if cancelled is not None:
            future.exception()  # retrieved: the cancellation goes first
            raise cancelled
        return future.result()

    def call(self) -> T:
        if not self.claim.acquire(blocking=False):
            raise RuntimeError("this call was cancelled before it began")
        return self.function(self)

    def interrupt(self, error: BaseException) -> None:
        """Only a stream's can be; a regular file's ends by itself."""


class StreamJob(Job[T]):
    """A job that begins when its descriptor is ready; cancelling and interrupting act on the wait for that.

    A write goes on until ``total`` bytes are out.
    """

    ready: asyncio.Future[None] | None = None
    failure: BaseException | None = None
    writing = False
    total = 0

    async def execute(self) -> T:
        while True:
            await self.wait_ready()
            result = await super().execute()
            if self.transferred >= self.total:
                return result
            self.claim = threading.Lock()

    async def wait_ready(self) -> None:
        if self.failure is not None:
            raise self.failure
        assert self.descriptor is not None
        fd = self.descriptor.fd
        ready = self.ready = self.loop.create_future()
        try:
            if self.writing:
                self.loop.add_writer(fd, settle, ready)
            else:
                self.loop.add_reader(fd, settle, ready)
        except PermissionError:  # epoll's way to say that it's always ready: /dev/null and its like
            return
        try:
            await ready
        finally:
            if self.writing:
                self.loop.remove_writer(fd)
            else:
                self.loop.remove_reader(fd)

    def interrupt(self, error: BaseException) -> None:
        self.failure = error
        if self.ready is not None and not self.ready.done():
            self.ready.set_exception(error)


def settle(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)


class ThreadDescriptor:
    """An open file: its descriptor, and what is in flight on it. Offset -1 means the file's own position."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, fd: int, owned: bool = True, stream: bool = False
    ) -> None:
        self.loop = loop
        self.fd = fd
        self.owned = owned
        self.stream = stream
        self.closing = False
        self.flying: set[Job[Any]] = set()
        self.idle: asyncio.Future[None] | None = None

    def __del__(self) -> None:
        # Nothing is in flight: a job keeps its descriptor alive.
        if self.fd >= 0 and self.owned:
            os.close(self.fd)

    def landed(self, job: Job[Any]) -> None:
        self.flying.discard(job)
        if not self.flying and self.idle is not None and not self.idle.done():
            self.idle.set_result(None)

    def job(self, function: Callable[[Job[T]], T]) -> Job[T]:
        self.check()
        return Job(self.loop, function, self)

    def check(self) -> None:
        if self.closing:
            raise ValueError("I/O operation on closed file")

    def read(self, size: int, offset: int, expected: int = -1) -> Job[bytes]:
        fd = self.fd
        if offset >= 0:
            return self.job(lambda job: read_whole(job, fd, size, offset, expected))
        self.check()
        kind = StreamJob if self.stream else Job
        return kind(self.loop, lambda job: read_some(job, fd, size), self)

    def readinto(self, buffer: WriteableBuffer, offset: int) -> Job[int]:
        fd = self.fd
        return self.job(lambda job: read_into(job, fd, buffer, offset))

    def write(self, data: ReadableBuffer, offset: int) -> Job[int]:
        fd = self.fd
        if not self.stream:
            return self.job(lambda job: write_whole(job, fd, data, offset))
        self.check()
        job = StreamJob(self.loop, lambda job: write_piece(job, fd, data), self)
        job.writing, job.total = True, memoryview(data).nbytes
        return job

    def sync(self, data_only: bool) -> Job[None]:
        fd = self.fd
        return self.job(lambda job: os.fdatasync(fd) if data_only else os.fsync(fd))

    def truncate(self, size: int) -> Job[None]:
        fd = self.fd
        return self.job(lambda job: os.ftruncate(fd, size))

    def stat(self) -> Job[os.stat_result]:
        fd = self.fd
        return self.job(lambda job: os.fstat(fd))

    def interrupt(self, error: BaseException) -> None:
        """Ends the waits for a stream, with that exception."""
        for job in list(self.flying):
            job.interrupt(error)

    async def close(self) -> None:
        """Closes, once what is in flight has ended. Cancelling it doesn't keep it from closing."""
        self.check()
        self.closing = True
        cancelled = None
        while self.flying:
            self.idle = self.loop.create_future()
            try:
                await self.idle
            except asyncio.CancelledError as exc:
                cancelled = exc
        fd, self.fd = self.fd, -1
        if self.owned:
            await Job(self.loop, lambda job: os.close(fd), surely=True)
        if cancelled is not None:
            raise cancelled


# ---- in the thread ---------------------------------------------------------------------------------------------


def read_some(job: Job[bytes], fd: int, size: int) -> bytes:
    job.received = os.read(fd, size)
    return job.received


def read_whole(job: Job[bytes], fd: int, size: int, offset: int, expected: int) -> bytes:
    """Until there are `size` bytes, or the end of the file is met; see `headrace._file.Descriptor.read`."""
    pieces: list[bytes] = []
    while job.transferred < size:
        piece = os.pread(fd, min(size - job.transferred, PIECE), offset + job.transferred)
        pieces.append(piece)
        job.transferred += len(piece)
        if not piece or (job.transferred < size and job.transferred == expected):
            break
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


# Whoever awaits a job may want to resize its buffer next: no memoryview may be left on it.


def read_into(job: Job[int], fd: int, buffer: WriteableBuffer, offset: int) -> int:
    with memoryview(buffer) as given, given.cast("B") as view:
        while job.transferred < len(view):
            with view[job.transferred : job.transferred + PIECE] as part:
                count = os.preadv(fd, [part], offset + job.transferred)
            job.transferred += count
            if not count:
                break
    return job.transferred


def write_whole(job: Job[int], fd: int, data: ReadableBuffer, offset: int) -> int:
    with memoryview(data) as given, given.cast("B") as view:
        while job.transferred < len(view):
            with view[job.transferred : job.transferred + PIECE] as part:
                if offset >= 0:
                    job.transferred += os.pwrite(fd, part, offset + job.transferred)
                else:
                    job.transferred += os.write(fd, part)
    return job.transferred


def write_piece(job: Job[int], fd: int, data: ReadableBuffer) -> int:
    start, end = job.transferred, job.transferred + PIPE_PIECE
    with memoryview(data) as given, given.cast("B") as view, view[start:end] as part:
        job.transferred += os.write(fd, part)
    return job.transferred


class Opening:
    """An ``open`` in a thread. It may sleep for long (a FIFO), so a task that is cancelled doesn't wait for it."""

    def __init__(self, function: Callable[[], int]) -> None:
        self.function = function
        self.lock = threading.Lock()
        self.abandoned = False
        self.fd = -1

    def call(self) -> int:
        fd = self.function()
        with self.lock:
            if self.abandoned:
                os.close(fd)
                return -1
            self.fd = fd
        return fd

    def abandon(self) -> None:
        with self.lock:
            self.abandoned = True
            fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


async def open_file(loop: asyncio.AbstractEventLoop, function: Callable[[], int]) -> int:
    """Runs `function`, which opens a file; when the task is cancelled the descriptor is closed by the thread."""
    opening = Opening(function)
    future = loop.run_in_executor(None, opening.call)
    try:
        return await asyncio.shield(future)
    except BaseException:
        opening.abandon()
        if not future.done():
            future.add_done_callback(retrieve)
        raise


def retrieve(future: asyncio.Future[int]) -> None:
    if not future.cancelled():
        future.exception()


def open_path(path: StrOrBytesPath, flags: int, mode: int) -> Callable[[], int]:
    """What opens a path in a thread."""
    return lambda: os.open(path, flags, mode)
