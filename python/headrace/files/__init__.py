"""Asynchronous files: by io_uring where the loop's engine has it, else by threads.

::

    async with headrace.files.open("data.bin", "rb") as file:
        header = await file.read(16)
        async for line in file: ...

:func:`open` takes what the built-in takes, and its files are what io's are, with ``await``. On a headrace loop with the
``uring`` engine, reads, writes and most other calls are io_uring operations: no thread is involved. On ``epoll``, and
on any other asyncio loop, the loop's default executor does the same; streams (pipes, terminals) are waited for with the
loop's selector.

*Errors* are the operating system's own: ``FileNotFoundError``, ``PermissionError`` and their kin, with the file name.

*Cancelling* a task asks the kernel to cancel the operation, and the task goes on, with ``CancelledError``, when the
operation has ended: for a regular file within one disk access. Nothing is lost or half done unseen: a cancelled read
doesn't move the position, and what it took from a stream is kept for the next read; a cancelled write has moved the
position by what was written.

*Tasks.* Calls that use a file's position (or a stream) take turns, first come, first served; ``pread`` and ``pwrite``
don't wait for each other. A file belongs to the loop that opened it. Nothing here is thread-safe.
"""

from __future__ import annotations

from headrace.files._binary import BinaryFile
from headrace.files._open import open  # noqa: A004
from headrace.files._paths import (
    Directory,
    lstat,
    makedirs,
    mkdir,
    read_bytes,
    remove,
    rename,
    replace,
    rmdir,
    scandir,
    stat,
    unlink,
    write_bytes,
)
from headrace.files._text import TextFile

__all__ = [
    "BinaryFile",
    "Directory",
    "TextFile",
    "lstat",
    "makedirs",
    "mkdir",
    "open",
    "read_bytes",
    "remove",
    "rename",
    "replace",
    "rmdir",
    "scandir",
    "stat",
    "unlink",
    "write_bytes",
]
