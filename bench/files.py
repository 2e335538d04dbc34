"""Files: headrace.files against aiofiles, anyio and plain threads, and against blocking calls as the limit.

::

    python -m bench.files --rounds 7

prints, per workload, CPU time and elapsed time per event and their ratios to headrace on io_uring: medians over
interleaved rounds of what each peer costs in the same process. Everything is read from the page cache. ``--gigabytes``
is the size of the file that is read from end to end.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

__all__ = ["PEERS", "WORKLOADS", "Data", "opened"]

DEPTH = 32
READ = 4096
READS = 4096
CHUNK = 256 * 1024
SMALL_FILES = 1000
REFERENCE = "headrace-uring"


class Data:
    """The files to read, in a directory that goes with them."""

    def __init__(self, size: int) -> None:
        self.stack = ExitStack()
        self.directory = Path(self.stack.enter_context(tempfile.TemporaryDirectory(prefix="headrace-bench-")))
        self.size = size
        self.large = self.directory / "large"
        block = random.Random(1).randbytes(1 << 20)
        with self.large.open("wb") as file:
            for _ in range(size >> 20):
                file.write(block)
        dice = random.Random(2)
        self.offsets = [dice.randrange(size - READ) for _ in range(READS)]
        self.small = [self.directory / f"small{i}" for i in range(SMALL_FILES)]
        for path in self.small:
            path.write_bytes(block[:1024])

    def close(self) -> None:
        self.stack.close()


# ---- random reads, DEPTH at a time ----


async def at_depth(read: Callable[[int, int], Awaitable[bytes]], data: Data) -> int:
    """`read(worker, offset)` at each offset, by DEPTH tasks."""
    offsets = iter(data.offsets)

    async def work(worker: int) -> None:
        for offset in offsets:
            assert len(await read(worker, offset)) == READ

    await asyncio.gather(*(work(i) for i in range(DEPTH)))
    return READS


async def random_headrace(data: Data) -> int:
    from headrace import files

    async with files.open(data.large, "rb") as file:
        return await at_depth(lambda worker, offset: file.pread(READ, offset), data)


async def random_threads(data: Data) -> int:
    loop = asyncio.get_running_loop()
    fd = os.open(data.large, os.O_RDONLY)
    try:
        return await at_depth(
            lambda worker, offset: loop.run_in_executor(None, os.pread, fd, READ, offset), data
        )
    finally:
        os.close(fd)


async def random_handles(data: Data, opening: Callable[[Path], Awaitable[Any]]) -> int:
    """Files that have no read at an offset: each task has its own, seeks and reads."""
    handles = [await opening(data.large) for _ in range(DEPTH)]

    async def read(worker: int, offset: int) -> bytes:
        await handles[worker].seek(offset)
        result: bytes = await handles[worker].read(READ)
        return result

    try:
        return await at_depth(read, data)
    finally:
        for handle in handles:
            await (handle.aclose() if hasattr(handle, "aclose") else handle.close())


def random_blocking(data: Data) -> int:
    fd = os.open(data.large, os.O_RDONLY)
    for offset in data.offsets:
        assert len(os.pread(fd, READ, offset)) == READ
    os.close(fd)
    return READS


# ---- a large file from end to end ----


async def sequential_headrace(data: Data) -> int:
    from headrace import files

    count = 0
    async with files.open(data.large, "rb") as file:
        while piece := await file.read(CHUNK):
            count += len(piece)
    return mebibytes(count, data)


async def sequential_lease(data: Data) -> int:
    from headrace import files

    count = 0
    async with files.open(data.large, "rb") as file:
        while True:
            with await file.read_lease(CHUNK) as lease:
                if not lease:
                    return mebibytes(count, data)
                count += len(lease)


async def sequential_readinto(data: Data) -> int:
    from headrace import files

    count = 0
    buffer = bytearray(CHUNK)
    async with files.open(data.large, "rb") as file:
        while read := await file.readinto(buffer):
            count += read
    return mebibytes(count, data)


async def sequential_threads(data: Data) -> int:
    loop = asyncio.get_running_loop()
    count = 0
    with data.large.open("rb", buffering=0) as file:
        while piece := await loop.run_in_executor(None, partial(file.read, CHUNK)):
            count += len(piece)
    return mebibytes(count, data)


async def sequential_handle(data: Data, opening: Callable[[Path], Awaitable[Any]]) -> int:
    count = 0
    handle = await opening(data.large)
    while piece := await handle.read(CHUNK):
        count += len(piece)
    await (handle.aclose() if hasattr(handle, "aclose") else handle.close())
    return mebibytes(count, data)


def sequential_blocking(data: Data) -> int:
    count = 0
    with data.large.open("rb", buffering=0) as file:
        while piece := file.read(CHUNK):
            count += len(piece)
    return mebibytes(count, data)


def mebibytes(count: int, data: Data) -> int:
    assert count == data.size
    return count >> 20


# ---- small files: open, read, close ----


async def small(read: Callable[[Path], Awaitable[bytes]], data: Data, tasks: int) -> int:
    paths = iter(data.small)

    async def work() -> None:
        for path in paths:
            assert len(await read(path)) == 1024

    await asyncio.gather(*(work() for _ in range(tasks)))
    return SMALL_FILES


async def read_headrace(path: Path) -> bytes:
    from headrace import files

    async with files.open(path, "rb") as file:
        return await file.read()


async def read_threads(path: Path) -> bytes:
    """Each call in a thread: as a library does it that doesn't know what comes next."""
    loop = asyncio.get_running_loop()
    file = await loop.run_in_executor(None, partial(path.open, "rb"))
    try:
        return await loop.run_in_executor(None, file.read)
    finally:
        await loop.run_in_executor(None, file.close)


async def read_one_thread(path: Path) -> bytes:
    """The best that threads can do: the three calls in one of them."""
    return await asyncio.to_thread(path.read_bytes)


async def read_handle(opening: Callable[[Path], Awaitable[Any]], path: Path) -> bytes:
    handle = await opening(path)
    try:
        result: bytes = await handle.read()
        return result
    finally:
        await (handle.aclose() if hasattr(handle, "aclose") else handle.close())


def small_blocking(data: Data) -> int:
    for path in data.small:
        assert len(path.read_bytes()) == 1024
    return SMALL_FILES


# ---- peers ----


def open_aiofiles(path: Path) -> Awaitable[Any]:
    return importlib.import_module("aiofiles").open(path, "rb")  # type: ignore[no-any-return]


def open_anyio(path: Path) -> Awaitable[Any]:
    return importlib.import_module("anyio").open_file(path, "rb")  # type: ignore[no-any-return]


Work = Callable[[Data], Coroutine[Any, Any, int]] | Callable[[Data], int]
HEADRACE = ("headrace-uring", "headrace-epoll")


def small_works(tasks: int) -> dict[str, Work]:
    return {
        **dict.fromkeys(HEADRACE, partial(small, read_headrace, tasks=tasks)),
        "aiofiles": partial(small, partial(read_handle, open_aiofiles), tasks=tasks),
        "anyio": partial(small, partial(read_handle, open_anyio), tasks=tasks),
        "threads": partial(small, read_threads, tasks=tasks),
        "one-thread-call": partial(small, read_one_thread, tasks=tasks),
        "blocking": small_blocking,
    }


WORKLOADS: dict[str, dict[str, Work]] = {
    "random_4k": {
        **dict.fromkeys(HEADRACE, random_headrace),
        "aiofiles": partial(random_handles, opening=open_aiofiles),
        "anyio": partial(random_handles, opening=open_anyio),
        "threads": random_threads,
        "blocking": random_blocking,
    },
    "sequential": {
        **dict.fromkeys(HEADRACE, sequential_headrace),
        "headrace-uring-lease": sequential_lease,
        "headrace-uring-readinto": sequential_readinto,
        "aiofiles": partial(sequential_handle, opening=open_aiofiles),
        "anyio": partial(sequential_handle, opening=open_anyio),
        "threads": sequential_threads,
        "blocking": sequential_blocking,
    },
    "small_files": small_works(1),
    "small_files_x32": small_works(DEPTH),
}
PEERS = list(dict.fromkeys(peer for works in WORKLOADS.values() for peer in works))


@contextmanager
def opened(workload: str, peer: str, data: Data) -> Iterator[Callable[[], int]]:
    """What runs a workload once and says how many events it had."""
    work = WORKLOADS[workload][peer]
    if peer == "blocking":
        yield lambda: work(data)  # type: ignore[misc,return-value]
        return
    if peer in ("aiofiles", "anyio"):
        importlib.import_module(peer)  # ImportError: it isn't there
    name, _, engine = peer.partition("-")
    if name == "headrace":
        loop = importlib.import_module("headrace").new_event_loop(engine.partition("-")[0])
    else:
        loop = asyncio.new_event_loop()
    try:
        yield lambda: loop.run_until_complete(work(data))
    finally:
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()


# ---- on the command line ----


def measure(workload: str, data: Data, rounds: int) -> dict[str, tuple[list[float], list[float]]]:
    """Per peer: CPU time and elapsed time per event, microseconds, of each round."""
    costs: dict[str, tuple[list[float], list[float]]] = {}
    with ExitStack() as stack:
        works = {}
        for peer in WORKLOADS[workload]:
            try:
                works[peer] = stack.enter_context(opened(workload, peer, data))
            except ImportError as error:
                print(f"{peer} is left out: {error}", file=sys.stderr)
        for work in works.values():
            work()  # warm-up: threads, page cache
        for _ in range(rounds):
            for peer, work in works.items():
                cpu, elapsed = time.process_time(), time.perf_counter()
                events = work()
                cpus, walls = costs.setdefault(peer, ([], []))
                cpus.append((time.process_time() - cpu) * 1e6 / events)
                walls.append((time.perf_counter() - elapsed) * 1e6 / events)
    return costs


def report(workload: str, costs: dict[str, tuple[list[float], list[float]]]) -> str:
    reference = costs[REFERENCE]
    lines = [f"{workload:24} {'CPU us':>9} {'ratio':>6} {'elapsed us':>11} {'ratio':>6}"]
    for peer, values in costs.items():
        cells = []
        for mine, theirs in zip(values, reference, strict=True):
            ratio = statistics.median(a / b for a, b in zip(mine, theirs, strict=True))
            cells += [statistics.median(mine), ratio]
        lines.append(f"  {peer:22} {cells[0]:9.2f} {cells[1]:6.2f} {cells[2]:11.2f} {cells[3]:6.2f}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.files", description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--gigabytes", type=float, default=0.25)
    parser.add_argument("--workloads", default=",".join(WORKLOADS))
    arguments = parser.parse_args()
    data = Data(int(arguments.gigabytes * 1024) << 20)
    try:
        for workload in arguments.workloads.split(","):
            print(report(workload, measure(workload, data, arguments.rounds)), flush=True)
    finally:
        data.close()


if __name__ == "__main__":
    main()
