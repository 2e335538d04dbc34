"""Opening files."""

from __future__ import annotations

import asyncio
import codecs
import errno
import io
import locale
import os
import stat as stat_module
import sys
from collections.abc import Awaitable, Callable, Generator
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, TypeVar, overload

from headrace import _file
from headrace._loop import LoopCore
from headrace.files._binary import AsyncFile, BinaryFile
from headrace.files._modes import Opened, parsed
from headrace.files._text import TextFile
from headrace.files._threads import open_file, open_path

if TYPE_CHECKING:
    from _typeshed import FileDescriptorOrPath, OpenBinaryMode, OpenTextMode, StrOrBytesPath


F = TypeVar("F", bound=AsyncFile)


class Opening(Generic[F]):
    """What :func:`open` returns: ``async with`` it, or ``await`` it and close the file yourself."""

    def __init__(self, begin: Callable[[], Awaitable[F]]) -> None:
        self._begin = begin
        self._file: F | None = None

    def __await__(self) -> Generator[Any, Any, F]:
        return self._begin().__await__()

    async def __aenter__(self) -> F:
        self._file = await self._begin()
        return self._file

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        file, self._file = self._file, None
        if file is not None:
            await file.aclose()


@overload
def open(  # noqa: A001
    file: FileDescriptorOrPath,
    mode: OpenTextMode = "r",
    buffering: int = -1,
    encoding: str | None = None,
    errors: str | None = None,
    newline: str | None = None,
    closefd: bool = True,
    opener: Callable[[str, int], int] | None = None,
    *,
    permissions: int = 0o666,
) -> Opening[TextFile]: ...


@overload
def open(  # noqa: A001
    file: FileDescriptorOrPath,
    mode: OpenBinaryMode,
    buffering: int = -1,
    encoding: None = None,
    errors: None = None,
    newline: None = None,
    closefd: bool = True,
    opener: Callable[[str, int], int] | None = None,
    *,
    permissions: int = 0o666,
) -> Opening[BinaryFile]: ...


def open(  # noqa: A001
    file: FileDescriptorOrPath,
    mode: str = "r",
    buffering: int = -1,
    encoding: str | None = None,
    errors: str | None = None,
    newline: str | None = None,
    closefd: bool = True,
    opener: Callable[[str, int], int] | None = None,
    *,
    permissions: int = 0o666,
) -> Opening[Any]:
    """Opens a file: ``async with open(...) as file``, or ``file = await open(...)``.

    Parameters
    ----------
    file : path or int
        Or a descriptor, which is closed with the file unless ``closefd`` is false.
    mode, encoding, errors, newline, closefd, opener
        As for the built-in ``open``. ``opener`` is called in a thread.
    buffering : int
        The size of the buffer in bytes, for reads and for writes; by default 64 KiB. 0: none (binary only), 1: text is
        written when a line is complete.
    permissions : int
        Of a file that is created, less the process's umask.

    Returns
    -------
    What is awaited, or entered, for a :class:`BinaryFile` if the mode has a ``b``, else for a :class:`TextFile`. Errors
    of the arguments, ValueError and TypeError, are raised at once; OSError when it's awaited.
    """
    opened = parsed(mode, buffering, closefd)
    if not isinstance(file, int):
        os.fspath(file)
        if not closefd:
            raise ValueError("closefd=False needs a descriptor, not a path")
    if not opened.text:
        for name, value in (("encoding", encoding), ("errors", errors), ("newline", newline)):
            if value is not None:
                raise ValueError(f"binary mode doesn't take {name}=")
        return Opening(lambda: open_binary(file, opened, opener, permissions))
    if newline not in (None, "", "\n", "\r", "\r\n"):
        raise ValueError(f"illegal newline value: {newline!r}")
    encoding = io.text_encoding(encoding, 3)
    encoding = locale.getencoding() if encoding == "locale" else codecs.lookup(encoding).name and encoding
    codecs.lookup_error(errors or "strict")
    return Opening(
        lambda: open_text(file, opened, opener, permissions, encoding, errors or "strict", newline)
    )


async def open_text(
    file: FileDescriptorOrPath,
    opened: Opened,
    opener: Callable[[str, int], int] | None,
    permissions: int,
    encoding: str,
    errors: str,
    newline: str | None,
) -> TextFile:
    buffer = await open_binary(file, opened, opener, permissions)
    try:
        return TextFile(buffer, encoding, errors, newline, opened.line_buffering)
    except BaseException:
        await buffer.aclose()
        raise


async def open_binary(
    file: FileDescriptorOrPath,
    opened: Opened,
    opener: Callable[[str, int], int] | None,
    permissions: int,
) -> BinaryFile:
    loop = asyncio.get_running_loop()
    if isinstance(file, int):
        return BinaryFile(loop, file, os.fstat(file), file, opened)
    name, flags = os.fspath(file), opened.flags
    core = loop if isinstance(loop, LoopCore) and _file.supported(loop, "open") else None
    if opener is not None:
        fd = await open_file(loop, lambda: opener(name, flags | os.O_CLOEXEC))  # type: ignore[arg-type]
        if fd < 0:
            raise ValueError(f"opener returned {fd}")
    elif core is not None:
        sys.audit("open", name, None, flags)  # as os.open does
        fd = await open_by_ring(core, name, flags, permissions)
    else:
        fd = await open_file(loop, open_path(name, flags, permissions))
    try:
        # This doesn't wait for a disk or a server: opening has just brought the attributes.
        status = os.fstat(fd)
        if stat_module.S_ISFIFO(status.st_mode) and core is not None and opener is None:
            fd = await open_other_end(core, fd, name, flags, permissions)
        return BinaryFile(loop, fd, status, name, opened)
    except BaseException:
        os.close(fd)
        raise


async def open_by_ring(loop: LoopCore, name: StrOrBytesPath, flags: int, permissions: int) -> int:
    path = encode(name)
    try:
        return await begun(_file.open_file(loop, path, flags, permissions, name))
    except OSError as exc:
        if exc.errno != errno.ENXIO:
            raise
        return await begun(_file.open_file(loop, path, flags, permissions, name, wait=True))


async def open_other_end(
    loop: LoopCore, first: int, name: StrOrBytesPath, flags: int, permissions: int
) -> int:
    """A FIFO, opened as blocking opens do it: when somebody has the other end. Closes `first`, once there is a second.

    The ring opened `first` as with O_NONBLOCK, at once. A writer that has met it isn't to find a broken pipe.
    """
    second = await begun(_file.open_file(loop, encode(name), flags, permissions, name, wait=True))
    os.close(first)
    return second


async def begun(operation: _file.FileOperation[int]) -> int:
    try:
        return await operation
    except BaseException:
        operation.discard()
        raise


def encode(path: StrOrBytesPath) -> bytes:
    """A path as the kernel wants it."""
    encoded = os.fsencode(path)
    if b"\0" in encoded:
        raise ValueError("embedded null byte")
    return encoded
