"""What is done to files by their paths."""

from __future__ import annotations

import asyncio
import itertools
import os
import sys
from collections import deque
from collections.abc import AsyncIterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, AnyStr, Generic, Self, overload

from headrace import _file
from headrace._loop import LoopCore
from headrace.files._open import encode, open  # noqa: A004
from headrace.files._threads import Job

if TYPE_CHECKING:
    from _typeshed import FileDescriptorOrPath, ReadableBuffer, StrOrBytesPath

# Directory entries that one call of the executor brings.
BATCH = 256


def ring(name: str) -> tuple[asyncio.AbstractEventLoop, LoopCore | None]:
    """The running loop, twice if its engine does what is named."""
    loop = asyncio.get_running_loop()
    return loop, loop if isinstance(loop, LoopCore) and _file.supported(loop, name) else None


async def stat(path: FileDescriptorOrPath, *, follow_symlinks: bool = True) -> os.stat_result:
    """As :func:`os.stat`, of a path or a descriptor."""
    loop, core = ring("stat")
    if core is None:
        return await Job(loop, lambda job: os.stat(path, follow_symlinks=follow_symlinks))
    if isinstance(path, int):
        return await _file.stat(core, path, None, True, None)
    return await _file.stat(core, -1, encode(path), follow_symlinks, os.fspath(path))


async def lstat(path: StrOrBytesPath) -> os.stat_result:
    """As :func:`os.lstat`: of a symbolic link itself."""
    return await stat(path, follow_symlinks=False)


async def rename(source: StrOrBytesPath, target: StrOrBytesPath) -> None:
    """As :func:`os.rename`: a file that is there as `target` is replaced, in one step."""
    loop, core = ring("rename")
    if core is None:
        return await Job(loop, lambda job: os.rename(source, target))
    sys.audit("os.rename", source, target, -1, -1)  # as os.rename does
    return await _file.rename(core, encode(source), encode(target), os.fspath(source), os.fspath(target))


replace = rename


async def unlink(path: StrOrBytesPath) -> None:
    """As :func:`os.unlink`: removes a file."""
    loop, core = ring("unlink")
    if core is None:
        return await Job(loop, lambda job: os.unlink(path))
    sys.audit("os.remove", path, -1)
    return await _file.unlink(core, encode(path), False, os.fspath(path))


remove = unlink


async def rmdir(path: StrOrBytesPath) -> None:
    """As :func:`os.rmdir`: removes an empty directory."""
    loop, core = ring("unlink")
    if core is None:
        return await Job(loop, lambda job: os.rmdir(path))
    sys.audit("os.rmdir", path, -1)
    return await _file.unlink(core, encode(path), True, os.fspath(path))


async def mkdir(path: StrOrBytesPath, mode: int = 0o777) -> None:
    """As :func:`os.mkdir`."""
    loop, core = ring("mkdir")
    if core is None:
        return await Job(loop, lambda job: os.mkdir(path, mode))
    sys.audit("os.mkdir", path, mode, -1)
    return await _file.mkdir(core, encode(path), mode, os.fspath(path))


async def makedirs(path: StrOrBytesPath, mode: int = 0o777, exist_ok: bool = False) -> None:
    """As :func:`os.makedirs`: with all parents, in a thread."""
    await Job(asyncio.get_running_loop(), lambda job: os.makedirs(path, mode, exist_ok))


async def read_bytes(path: StrOrBytesPath) -> bytes:
    """All bytes of a file."""
    async with open(path, "rb", 0) as file:
        return await file.read()


async def write_bytes(path: StrOrBytesPath, data: ReadableBuffer) -> int:
    """Writes a file anew, with these bytes; returns how many."""
    async with open(path, "wb", 0) as file:
        return await file.write(data)


class Directory(Generic[AnyStr]):
    """The entries of a directory, ``os.DirEntry`` objects: ``async for``, in or without ``async with``.

    The system is asked in a thread, for some hundred entries at a time.
    """

    def __init__(self, path: AnyStr | os.PathLike[AnyStr] | int) -> None:
        self._path: Any = path
        self._entries: Any = None
        self._batch: deque[os.DirEntry[AnyStr]] = deque()
        self._ended = False
        self._lock = asyncio.Lock()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Ends the iteration, which it need not have reached the end of."""
        async with self._lock:
            self._ended = True
            self._batch.clear()
            if self._entries is not None:
                self._entries.close()

    def __aiter__(self) -> AsyncIterator[os.DirEntry[AnyStr]]:
        return self

    async def __anext__(self) -> os.DirEntry[AnyStr]:
        if not self._batch and not self._ended:
            async with self._lock:
                if not self._batch and not self._ended:
                    await Job(asyncio.get_running_loop(), self._more)
        if not self._batch:
            raise StopAsyncIteration
        return self._batch.popleft()

    def _more(self, job: Job[None]) -> None:
        """In the thread. Entries that a cancelled task doesn't take are there for the next."""
        if self._entries is None:
            self._entries = os.scandir(self._path)
        self._batch.extend(itertools.islice(self._entries, BATCH))
        self._ended = not self._batch


@overload
def scandir(path: None = None) -> Directory[str]: ...
@overload
def scandir(path: int) -> Directory[str]: ...
@overload
def scandir(path: AnyStr | os.PathLike[AnyStr]) -> Directory[AnyStr]: ...
def scandir(path: Any = None) -> Directory[Any]:
    """As :func:`os.scandir`: ``async for entry in scandir(path)``. OSError comes with the first entry."""
    return Directory("." if path is None else path)
