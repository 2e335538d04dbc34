"""Parts without a network: what one callback, timer, task switch, wake-up, lease or slice costs."""

from __future__ import annotations

import asyncio
import importlib
import ssl
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from bench.rounds import Row
from bench.suite import CLOCK, Board, Workload, play_back, row_id

EVENTS = 5000
LOOPS = ["uvloop", "headrace-uring", "headrace-epoll", "asyncio"]


@contextmanager
def opened(name: str) -> Iterator[asyncio.AbstractEventLoop]:
    module, _, engine = name.partition("-")
    factory = importlib.import_module(module).new_event_loop
    loop: asyncio.AbstractEventLoop = factory(engine) if engine else factory()
    try:
        yield loop
    finally:
        loop.close()


class Countdown:
    """A callback that ends a run when it has been called often enough."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.left = EVENTS

    def __call__(self) -> None:
        self.left -= 1
        if not self.left:
            self.loop.stop()

    def chain(self) -> None:
        """Calls itself in the next turn."""
        self.left -= 1
        if self.left:
            self.loop.call_soon(self.chain)
        else:
            self.loop.stop()


def call_soon_batch(loop: asyncio.AbstractEventLoop) -> None:
    """All callbacks in one turn."""
    count = Countdown(loop)
    for _ in range(EVENTS):
        loop.call_soon(count)
    loop.run_forever()


def call_soon_chain(loop: asyncio.AbstractEventLoop) -> None:
    """A turn for each callback."""
    loop.call_soon(Countdown(loop).chain)
    loop.run_forever()


def sleep_zero(loop: asyncio.AbstractEventLoop) -> None:
    async def yield_often() -> None:
        for _ in range(EVENTS):
            await asyncio.sleep(0)

    loop.run_until_complete(yield_often())


def call_later_and_cancel(loop: asyncio.AbstractEventLoop) -> None:
    """Timeouts that are nearly always cancelled: the common use of timers."""

    async def arm_and_cancel() -> None:
        for handle in [loop.call_later(60, int) for _ in range(EVENTS)]:
            handle.cancel()

    loop.run_until_complete(arm_and_cancel())


def call_later_fires(loop: asyncio.AbstractEventLoop) -> None:
    count = Countdown(loop)
    for _ in range(EVENTS):
        loop.call_later(0, count)
    loop.run_forever()


def call_soon_threadsafe(loop: asyncio.AbstractEventLoop) -> None:
    """From another thread, while the loop runs."""
    count = Countdown(loop)

    def post() -> None:
        for _ in range(EVENTS):
            loop.call_soon_threadsafe(count)

    thread = threading.Thread(target=post)
    loop.call_soon(thread.start)
    loop.run_forever()
    thread.join()


def tasks(loop: asyncio.AbstractEventLoop) -> None:
    async def nothing() -> None:
        return None

    async def spawn() -> None:
        await asyncio.gather(*(nothing() for _ in range(EVENTS)))

    loop.run_until_complete(spawn())


LOOP_WORKLOADS = {
    work.__name__: work
    for work in (
        call_soon_batch,
        call_soon_chain,
        sleep_zero,
        call_later_and_cancel,
        call_later_fires,
        call_soon_threadsafe,
        tasks,
    )
}
LOOP_ROWS = [Row("micro", label=name) for name in LOOP_WORKLOADS]


@contextmanager
def loop_workload(
    work: Callable[[asyncio.AbstractEventLoop], None], name: str
) -> Iterator[Callable[[], int]]:
    with opened(name) as loop:

        def run() -> int:
            work(loop)
            return EVENTS

        yield run


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("row", LOOP_ROWS, ids=row_id)
@pytest.mark.parametrize("peer", LOOPS)
def test_loop(row: Row, peer: str, benchmark: Any, board: Board) -> None:
    work = LOOP_WORKLOADS[row.label]
    peers: dict[str, Callable[[], Workload]] = {name: partial(loop_workload, work, name) for name in LOOPS}
    play_back(benchmark, board.micro_result(row, peers), peer)


# ---- received bytes as lease, memoryview or bytes ----

SIZE = 16 * 1024
DATA = bytes(range(256)) * (SIZE // 256)


def make_lease() -> Any:
    from headrace import BufferPool

    return BufferPool()._copy(DATA)


HOLDERS: dict[str, Callable[[], Any]] = {
    "lease": make_lease,
    "memoryview": lambda: memoryview(DATA),
    "bytes": lambda: DATA,
}
HOLDER_ROWS = [Row("micro", label="slice_header_and_body"), Row("micro", label="to_bytes")]


@contextmanager
def holder_workload(label: str, name: str) -> Iterator[Callable[[], int]]:
    held = HOLDERS[name]()

    def slice_header_and_body() -> int:
        for _ in range(EVENTS):
            held[:4]
            held[4:]
        return EVENTS

    def to_bytes() -> int:
        for _ in range(EVENTS):
            bytes(held)
        return EVENTS

    yield {"slice_header_and_body": slice_header_and_body, "to_bytes": to_bytes}[label]


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("row", HOLDER_ROWS, ids=row_id)
@pytest.mark.parametrize("peer", HOLDERS)
def test_holding_bytes(row: Row, peer: str, benchmark: Any, board: Board) -> None:
    peers: dict[str, Callable[[], Workload]] = {
        name: partial(holder_workload, row.label, name) for name in HOLDERS
    }
    play_back(benchmark, board.micro_result(row, peers), peer)


# ---- TLS records, without sockets ----

PUMPS = ["stdlib", "native"]
PUMP_SIZES = {"64B": 64, "1KiB": 1024, "16KiB": SIZE, "16x16KiB": 16 * SIZE}
PUMP_ROWS = [
    Row("micro", label=f"tls_{what}_{size}")
    for what in ("encrypt", "encrypt_and_decrypt")
    for size in PUMP_SIZES
]


def connected_pumps(name: str) -> tuple[Any, Any]:
    """(a server's, a client's) of one kind, after a handshake of TLS 1.3; both keep what they send."""
    from headrace.cli.cert import write_certificates
    from headrace.framing import pump

    if name == "native" and not pump.available():
        raise ImportError(pump.reason())
    if name == "native":
        from headrace._tls_pump import NativePump as Pump
    else:
        from headrace.framing.pump import StdlibPump as Pump  # type: ignore[assignment]
    with tempfile.TemporaryDirectory() as folder:
        files = write_certificates(Path(folder), ["localhost"])
        serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        serving.load_cert_chain(files.server, files.server_key)
        asking = ssl.create_default_context(cafile=str(files.ca))
    server, client = Pump(serving, True, None, None), Pump(asking, False, "localhost", None)
    client.handshake(b"")
    server.handshake(client.outgoing())
    client.handshake(server.outgoing())
    server.handshake(client.outgoing())
    client.decrypt(server.outgoing(), [])  # session tickets
    assert client.ssl_object.version() == "TLSv1.3"
    return server, client


@contextmanager
def pump_workload(label: str, name: str) -> Iterator[Callable[[], int]]:
    """An event is a call, of as many records as its size says. The records of the second kind are in the cache."""
    server, client = connected_pumps(name)
    size = PUMP_SIZES[label.rpartition("_")[2]]
    data = bytes(size)
    events = EVENTS if size < SIZE else EVENTS * SIZE // size // 4

    def encrypt() -> int:
        for _ in range(events):
            client.encrypt(data)
            client.outgoing()
        return events

    def encrypt_and_decrypt() -> int:
        for _ in range(events):
            client.encrypt(data)
            server.decrypt(client.outgoing(), [])
        return events

    yield encrypt_and_decrypt if "decrypt" in label else encrypt


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("row", PUMP_ROWS, ids=row_id)
@pytest.mark.parametrize("peer", PUMPS)
def test_tls_records(row: Row, peer: str, benchmark: Any, board: Board) -> None:
    peers: dict[str, Callable[[], Workload]] = {
        name: partial(pump_workload, row.label, name) for name in PUMPS
    }
    play_back(benchmark, board.micro_result(row, peers), peer)
