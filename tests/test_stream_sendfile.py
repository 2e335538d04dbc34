"""``loop.sendfile``: natively over a transport's descriptor; by reading and writing where the file is no real one."""

from __future__ import annotations

import asyncio
import io
import os
import socket
import tempfile
from collections.abc import Iterator
from typing import IO, Any

import pytest

import headrace
from streams import Leases, connected, in_thread, receive_all, reset

SIZE = 3 << 20
CONTENT = os.urandom(SIZE)


@pytest.fixture
def file() -> Iterator[IO[bytes]]:
    with tempfile.TemporaryFile() as file:
        file.write(CONTENT)
        file.seek(0)
        yield file


async def stuck(loop: headrace.EventLoop, file: IO[bytes]) -> tuple[Leases, Any, asyncio.Future[int]]:
    """A connection whose peer takes nothing yet, and a sendfile that waits in the middle of the file."""
    protocol = Leases()
    transport, peer = await connected(protocol, receive_buffer=8192)
    transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
    sending = asyncio.ensure_future(loop.sendfile(transport, file))
    while not waits_for(loop, transport):
        await asyncio.sleep(0)
    return protocol, peer, sending


def waits_for(loop: headrace.EventLoop, transport: Any) -> bool:
    """Whether the inherited selector has the transport's descriptor."""
    assert loop._selector is not None
    return transport.get_extra_info("socket").fileno() in loop._selector.get_map()


async def full(transport: Any) -> None:
    """Writes until the socket takes no more."""
    while transport.get_write_buffer_size() == 0:
        transport.write(bytes(1 << 20))
        await asyncio.sleep(0)


@pytest.mark.parametrize("debug", [False, True])
@pytest.mark.parametrize(
    ("offset", "count", "sent"),
    [(0, None, CONTENT), (7, None, CONTENT[7:]), (5, 1_000_000, CONTENT[5:1_000_005]), (SIZE, None, b"")],
)
def test_from_an_accepted_connection(
    loop: headrace.EventLoop, file: IO[bytes], debug: bool, offset: int, count: int | None, sent: bytes
) -> None:
    """Between what was written before and what is written after."""
    loop.set_debug(debug)
    loop.slow_callback_duration = 60

    async def main() -> None:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"<")
            assert await loop.sendfile(writer.transport, file, offset, count, fallback=False) == len(sent)
            writer.write(b">")
            writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        async with server:
            reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
            assert await reader.read(-1) == b"<" + sent + b">"
            writer.close()
            await writer.wait_closed()

    loop.run_until_complete(main())


def test_over_a_slow_reader_writing_is_refused_and_reading_goes_on_after(
    loop: headrace.EventLoop, file: IO[bytes]
) -> None:
    async def main() -> None:
        protocol = Leases()
        transport, peer = await connected(protocol, receive_buffer=8192)
        sending = asyncio.ensure_future(loop.sendfile(transport, file, fallback=False))
        while transport.is_reading():
            await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="unable to write; sendfile is in progress"):
            transport.write(b"x")
        with pytest.raises(RuntimeError, match="unable to writelines; sendfile is in progress"):
            transport.writelines([b"x"])
        peer.sendall(b"what was sent meanwhile")
        receiving = asyncio.ensure_future(in_thread(receive_all, peer))
        assert await sending == SIZE
        assert transport.is_reading()
        await protocol.seen("received")
        assert protocol.data == b"what was sent meanwhile"
        transport.close()
        assert await receiving == CONTENT

    loop.run_until_complete(main())


def test_a_paused_transport_stays_paused(loop: headrace.EventLoop, file: IO[bytes]) -> None:
    async def main() -> None:
        transport, peer = await connected(Leases())
        transport.pause_reading()
        receiving = asyncio.ensure_future(in_thread(receive_all, peer))
        await loop.sendfile(transport, file)
        assert not transport.is_reading()
        transport.close()
        assert await receiving == CONTENT

    loop.run_until_complete(main())


def test_what_is_no_real_file_is_read_and_written(loop: headrace.EventLoop) -> None:
    async def main() -> None:
        transport, peer = await connected(Leases(), receive_buffer=8192)
        with pytest.raises(asyncio.SendfileNotAvailableError):
            await loop.sendfile(transport, io.BytesIO(CONTENT), fallback=False)
        receiving = asyncio.ensure_future(in_thread(receive_all, peer))
        transport.write(b"<")
        assert await loop.sendfile(transport, io.BytesIO(CONTENT), 3) == SIZE - 3
        transport.write(b">")
        transport.close()
        assert await receiving == b"<" + CONTENT[3:] + b">"

    loop.run_until_complete(main())


def test_cancelled_before_it_began(loop: headrace.EventLoop, file: IO[bytes]) -> None:
    """While it waits for what was written before: the transport is as if it had never been asked for."""

    async def main() -> None:
        transport, peer = await connected(Leases(), receive_buffer=8192)
        await full(transport)
        sending = asyncio.ensure_future(loop.sendfile(transport, file))
        while transport.is_reading():
            await asyncio.sleep(0)
        sending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sending
        assert transport.is_reading()
        transport.write(b"the last words")
        transport.close()
        assert (await in_thread(receive_all, peer)).endswith(b"\0the last words")

    loop.run_until_complete(main())


def test_cancelled_in_the_middle(loop: headrace.EventLoop, file: IO[bytes]) -> None:
    async def main() -> None:
        protocol, peer, sending = await stuck(loop, file)
        sending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sending
        assert not waits_for(loop, protocol.transport)
        protocol.transport.write(b"the last words")
        protocol.transport.close()
        received = await in_thread(receive_all, peer)
        sent = len(received) - len(b"the last words")
        assert received[sent:] == b"the last words"
        assert 0 < sent < SIZE
        assert received[:sent] == CONTENT[:sent]

    loop.run_until_complete(main())


@pytest.mark.parametrize("how", ["close", "abort"])
def test_the_transport_is_closed_in_the_middle(loop: headrace.EventLoop, file: IO[bytes], how: str) -> None:
    async def main() -> None:
        protocol, peer, sending = await stuck(loop, file)
        descriptor = protocol.transport.get_extra_info("socket").fileno()
        getattr(protocol.transport, how)()
        with pytest.raises(ConnectionError, match="closed during sendfile"):
            await sending
        await protocol.seen("lost")
        # The number may be another file's by now; nobody waits for it any more.
        assert loop._selector is not None
        assert descriptor not in loop._selector.get_map()
        received = await in_thread(receive_all, peer)
        assert len(received) < SIZE
        assert CONTENT.startswith(received)

    loop.run_until_complete(main())


def test_the_peer_resets_in_the_middle(loop: headrace.EventLoop, file: IO[bytes]) -> None:
    async def main() -> None:
        protocol, peer, sending = await stuck(loop, file)
        reset(peer)
        with pytest.raises(ConnectionError):
            await sending
        await protocol.seen("lost")
        assert protocol.events[-1] == "lost"

    loop.run_until_complete(main())


def test_half_closing_waits_for_the_file(loop: headrace.EventLoop, file: IO[bytes]) -> None:
    async def main() -> None:
        protocol, peer, sending = await stuck(loop, file)
        protocol.transport.write_eof()
        receiving = asyncio.ensure_future(in_thread(receive_all, peer))
        assert await sending == SIZE
        assert await receiving == CONTENT
        await protocol.seen("lost")
        assert protocol.events == ["made", "eof", "lost"]

    loop.run_until_complete(main())


def test_the_transport_is_closed_already(loop: headrace.EventLoop, file: IO[bytes]) -> None:
    async def main() -> None:
        transport, peer = await connected(Leases())
        transport.close()
        with pytest.raises(RuntimeError, match="Transport is closing"):
            await loop.sendfile(transport, file)
        assert await in_thread(receive_all, peer) == b""

    loop.run_until_complete(main())
