"""A peer that resets the connection, anywhere in the stream; and ends that come while a receive is in flight."""

from __future__ import annotations

import asyncio
import fcntl
import random
import socket
import struct
import termios
import time
from collections.abc import Callable
from typing import Any

import pytest

import headrace
from headrace._pool import Probe

STREAM = random.Random(7).randbytes(400_000)
# Around what a stream is cut into: nothing, single bytes, segments, the sizes of receives, the end of all.
OFFSETS = (
    *(0, 1, 2, 1000, 1447, 1448, 1449, 2048, 2049, 4096),
    *(16_384, 32_767, 65_483, 65_535, 65_536, 65_537, 131_072, 262_144, 262_145, 399_999),
)


class Recorder:
    """What a connection brought, whichever kind of protocol got it."""

    transport: Any

    def __init__(self) -> None:
        self.received = bytearray()
        self.lost: list[Exception | None] = []
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.echo = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def take(self, data: Any) -> None:
        assert not self.lost
        self.received += data
        if self.echo:
            self.transport.write(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost.append(exc)
        if not self.ended.done():
            self.ended.set_result(None)


class LeaseRecorder(Recorder, headrace.Protocol):
    def lease_received(self, lease: headrace.Lease) -> None:
        with lease:
            self.take(lease)


class BytesRecorder(Recorder, asyncio.Protocol):
    def data_received(self, data: bytes) -> None:
        self.take(data)


class BufferedRecorder(Recorder, asyncio.BufferedProtocol):
    def get_buffer(self, sizehint: int) -> bytearray:
        self.buffer = bytearray(5000)
        return self.buffer

    def buffer_updated(self, nbytes: int) -> None:
        self.take(bytes(self.buffer[:nbytes]))


KINDS = {"lease": LeaseRecorder, "bytes": BytesRecorder, "buffered": BufferedRecorder}


def reset_after(address: tuple[str, int], offset: int) -> None:
    """Sends so many bytes of the stream, waits until the peer's kernel has them all, and resets the connection."""
    with socket.create_connection(address, timeout=10) as sock:
        sock.sendall(STREAM[:offset])
        deadline = time.monotonic() + 10
        while struct.unpack("i", fcntl.ioctl(sock, termios.TIOCOUTQ, bytes(4)))[0]:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


async def still_works(server: asyncio.Server) -> None:
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    writer.write(b"?")
    writer.write_eof()
    assert await reader.read() == b""
    writer.close()
    await writer.wait_closed()


@pytest.mark.parametrize("kind", KINDS)
def test_reset_at_20_offsets_brings_all_bytes_and_one_end(loop: headrace.EventLoop, kind: str) -> None:
    async def main() -> None:
        made: asyncio.Queue[Recorder] = asyncio.Queue()

        def factory() -> Recorder:
            recorder = KINDS[kind]()
            made.put_nowait(recorder)
            return recorder

        server = await loop.create_server(factory, "127.0.0.1", 0)  # type: ignore[arg-type]
        for offset in OFFSETS:
            await asyncio.to_thread(reset_after, server.sockets[0].getsockname(), offset)
            recorder = await made.get()
            async with asyncio.timeout(10):
                await recorder.ended
            # What had arrived before the reset is delivered before the end is told.
            assert recorder.received == STREAM[:offset]
            assert len(recorder.lost) == 1
            assert isinstance(recorder.lost[0], ConnectionResetError)
            assert recorder.transport.is_closing()
        await still_works(server)
        assert loop.stats()["pool"]["leased"] == 0
        server.close()
        await server.wait_closed()

    loop.run_until_complete(main())


@pytest.mark.parametrize("kind", KINDS)
def test_reset_at_20_offsets_while_the_server_sends(loop: headrace.EventLoop, kind: str) -> None:
    """The peer never reads its echo, so sends are in flight, silent ones too, or wait in the queue."""

    async def main() -> None:
        made: asyncio.Queue[Recorder] = asyncio.Queue()

        def factory() -> Recorder:
            recorder = KINDS[kind]()
            recorder.echo = True
            made.put_nowait(recorder)
            return recorder

        server = await loop.create_server(factory, "127.0.0.1", 0)  # type: ignore[arg-type]
        for offset in OFFSETS:
            await asyncio.to_thread(reset_after, server.sockets[0].getsockname(), offset)
            recorder = await made.get()
            async with asyncio.timeout(10):
                await recorder.ended
            # The first call to notice may be a send: what was received is a beginning of the stream in any case.
            assert STREAM.startswith(recorder.received)
            assert len(recorder.received) <= offset
            assert len(recorder.lost) == 1
            assert isinstance(recorder.lost[0], ConnectionResetError | BrokenPipeError)
        assert loop.stats()["pool"]["leased"] == 0
        server.close()
        await server.wait_closed()

    loop.run_until_complete(main())


@pytest.mark.parametrize("end", ["close", "abort", "close_after_pause"])
def test_close_with_a_receive_in_flight(loop: headrace.EventLoop, end: str) -> None:
    """The peer sees the end at once, and what it sends after that is written nowhere."""
    mark = b"\xa5\x5a" * 500

    def ends(transport: Any) -> None:
        if end == "close_after_pause":
            transport.pause_reading()
        getattr(transport, "abort" if end == "abort" else "close")()

    def peer(sock: socket.socket, close: Callable[[], None]) -> float:
        sock.settimeout(10)
        began = time.monotonic()
        close()
        try:
            assert sock.recv(1) == b""
        except ConnectionResetError:
            assert end == "abort"
        took = time.monotonic() - began
        try:
            for _ in range(3):
                sock.sendall(mark)
        except OSError:  # the first one was answered by a reset, as it should be
            pass
        sock.close()
        return took

    async def main() -> list[float]:
        times = []
        recorders: asyncio.Queue[Recorder] = asyncio.Queue()

        def factory() -> Recorder:
            recorder = LeaseRecorder()
            recorders.put_nowait(recorder)
            return recorder

        server = await loop.create_server(factory, "127.0.0.1", 0)  # type: ignore[arg-type]
        for _ in range(5):
            sock = socket.create_connection(server.sockets[0].getsockname())
            sock.sendall(b"first")
            recorder = await recorders.get()
            while not recorder.received:
                await asyncio.sleep(0)
            close = lambda t=recorder.transport: loop.call_soon_threadsafe(ends, t)  # noqa: E731
            times.append(await asyncio.to_thread(peer, sock, close))
            await recorder.ended
            await asyncio.sleep(0.01)  # for a late receive to do its harm
            assert recorder.received == b"first"
            assert recorder.lost == [None]
        server.close()
        await server.wait_closed()
        return times

    times = loop.run_until_complete(main())
    # The requirement is 50 ms; the best of five, as the machine may be busy. A lost FIN would time out instead.
    assert min(times) < 0.05
    pool = loop._engine.pool
    probe = Probe(pool)
    for index in range(pool.allocated):
        assert mark[:8] not in probe.peek(index, pool.block_size)
