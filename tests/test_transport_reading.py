"""The read side of stream transports, on real sockets and both engines: what arrives, when, and where it ends."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import hashlib
import random
import socket
import ssl
import struct
import warnings
import weakref
from asyncio.trsock import TransportSocket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

import headrace
from certificates import tls_contexts
from conftest import descriptors
from headrace import BufferPool, EventLoop

KINDS = ("lease", "bytes", "buffered")
SMALL_BLOCK = 16 * 1024  # so that what is in a socket's buffer comes as many completions


def noise(size: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size)


class Record:
    """What a connection's protocols were told; `on` maps a callback's name to what it does besides.

    The callbacks are named as in ``events``: made, data, eof, lost; get is get_buffer. `lost` is set in the last one.
    """

    def __init__(self, **on: Callable[..., Any]) -> None:
        self.on = on
        self.events: list[str] = []
        self.sizes: list[int] = []
        self.data = bytearray()
        self.lost = asyncio.Event()
        self.error: BaseException | None = None
        self.transport: Any = None

    def note(self, event: str, *arguments: Any) -> Any:
        self.events.append(event)
        return self.on[event](self, *arguments) if event in self.on else None

    def take(self, data: Any) -> None:
        self.data += data
        self.sizes.append(len(data))
        self.note("data")

    def made(self, transport: Any) -> None:
        self.transport = transport
        self.note("made")

    def eof(self) -> Any:
        return self.note("eof")

    def over(self, exc: BaseException | None) -> None:
        self.error = exc
        self.lost.set()
        self.note("lost")


class Forward:
    """The callbacks that all kinds have in common."""

    def __init__(self, record: Record) -> None:
        self.record = record

    def connection_made(self, transport: Any) -> None:
        self.record.made(transport)

    def eof_received(self) -> Any:
        return self.record.eof()

    def connection_lost(self, exc: BaseException | None) -> None:
        self.record.over(exc)

    def pause_writing(self) -> None: ...

    def resume_writing(self) -> None: ...


class Leases(Forward, headrace.Protocol):
    def lease_received(self, lease: headrace.Lease) -> None:
        with lease:
            data = bytes(lease)
        self.record.take(data)


class Bytes(Forward, asyncio.Protocol):
    def data_received(self, data: bytes) -> None:
        assert type(data) is bytes
        self.record.take(data)


class Buffered(Forward, asyncio.BufferedProtocol):
    """Its buffer has as many bytes as the next of `sizes`; the last goes on for ever."""

    def __init__(self, record: Record, *sizes: int) -> None:
        super().__init__(record)
        self.sizes = list(sizes or (65536,))

    def get_buffer(self, sizehint: int) -> bytearray:
        if "get" in self.record.on:
            self.record.on["get"](self.record)
        self.buffer = bytearray(self.sizes.pop(0) if len(self.sizes) > 1 else self.sizes[0])
        return self.buffer

    def buffer_updated(self, nbytes: int) -> None:
        assert 0 < nbytes <= len(self.buffer)
        self.record.take(self.buffer[:nbytes])


class Duck(Forward):
    """An asyncio.Protocol only by its methods."""

    def data_received(self, data: bytes) -> None:
        self.record.take(data)


def protocol(kind: str, record: Record) -> Any:
    return {"lease": Leases, "bytes": Bytes, "buffered": Buffered, "duck": Duck}[kind](record)


async def pair(protocol: Any) -> tuple[Any, socket.socket]:
    """A transport, and the blocking socket at its other end."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        peer = socket.create_connection(listener.getsockname(), timeout=20)
        near, _ = listener.accept()
    loop = asyncio.get_running_loop()
    transport, _ = await loop.connect_accepted_socket(lambda: protocol, near)
    return transport, peer


def reset(peer: socket.socket) -> None:
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    peer.close()


def send_all(peer: socket.socket, data: bytes) -> None:
    """In a thread: sends everything, then the end."""
    with peer:
        peer.sendall(data)


def read_all(peer: socket.socket) -> bytes:
    with peer:
        return b"".join(iter(lambda: peer.recv(65536), b""))


async def in_thread(function: Callable[..., Any], *arguments: Any) -> Any:
    return await asyncio.get_running_loop().run_in_executor(None, function, *arguments)


async def turns(count: int = 20) -> None:
    """Lets the loop look at its sockets: in each of these turns the engine waits for nothing, but looks."""
    for _ in range(count):
        await asyncio.sleep(0)


def reports(loop: EventLoop) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _, context: found.append(context))
    return found


@asynccontextmanager
async def serving(factory: Callable[[], Any], host: Any = "127.0.0.1", **options: Any) -> AsyncIterator[Any]:
    """A server, and the address of its first socket."""
    server = await asyncio.get_running_loop().create_server(factory, host, 0, **options)
    async with server:
        yield server.sockets[0].getsockname()


@pytest.fixture
def small(engine_name: str) -> Iterator[EventLoop]:
    """A loop with small blocks, which must all be back when the test is over."""
    pool = BufferPool(SMALL_BLOCK, 8, 64)
    loop = headrace.new_event_loop(engine=engine_name, pool=pool)
    try:
        yield loop
    finally:
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()
    assert (pool.free, pool.outstanding, pool.leased_bytes) == (pool.allocated, 0, 0), pool.stats()


# ---- every byte, to every kind -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*KINDS, "duck"])
def test_every_kind_receives_4_mib_as_they_were_sent(loop: EventLoop, kind: str) -> None:
    data = noise(4 << 20)

    async def main() -> None:
        record = Record()
        _, peer = await pair(protocol(kind, record))
        await in_thread(send_all, peer, data)
        await record.lost.wait()
        assert hashlib.sha256(record.data).digest() == hashlib.sha256(data).digest()
        assert set(record.events[1:-2]) == {"data"}
        assert (record.events[0], *record.events[-2:]) == ("made", "eof", "lost")
        assert record.error is None

    loop.run_until_complete(main())
    assert loop.stats()["pool"]["outstanding"] == 0


def test_a_protocol_that_never_reads_needs_no_data_received(loop: EventLoop) -> None:
    class Writer(Forward):
        pass

    async def main() -> None:
        record = Record()
        transport, peer = await pair(Writer(record))
        transport.write(b"said")
        transport.close()
        assert await in_thread(read_all, peer) == b"said"
        await record.lost.wait()
        assert record.events == ["made", "lost"]

    loop.run_until_complete(main())


@pytest.mark.parametrize("first", KINDS)
@pytest.mark.parametrize("second", KINDS)
def test_a_protocol_set_in_a_callback_gets_what_comes_after(
    small: EventLoop, first: str, second: str
) -> None:
    data = noise(600_000)

    async def main() -> None:
        kinds = [first, second]

        def swap(record: Record) -> None:
            kinds.reverse()
            old = record.transport.get_protocol()
            new = protocol(kinds[0], record)
            if kinds[0] == "buffered":
                new.sizes = [1000]
            record.transport.set_protocol(new)
            assert record.transport.get_protocol() is new is not old

        record = Record(data=swap)
        _, peer = await pair(protocol(first, record))
        await in_thread(send_all, peer, data)
        await record.lost.wait()
        assert record.data == data
        assert len(record.sizes) > 3
        if "buffered" in (first, second):
            assert 1000 in record.sizes
        assert (record.events.count("made"), record.events.count("eof"), record.events.count("lost")) == (
            1,
            1,
            1,
        )

    small.run_until_complete(main())


@pytest.mark.parametrize(
    "sizes", [(1,), (7,), (1, 2, 4, 8, 16, 32, 1 << 20), (1 << 20, 1)], ids=["1", "7", "growing", "shrinking"]
)
def test_a_buffer_of_any_size_is_filled_in_order(loop: EventLoop, sizes: tuple[int, ...]) -> None:
    data = noise(20_000)

    async def main() -> None:
        record = Record()
        _, peer = await pair(Buffered(record, *sizes))
        await in_thread(send_all, peer, data)
        await record.lost.wait()
        assert record.data == data
        assert max(record.sizes) <= max(sizes)

    loop.run_until_complete(main())


def test_a_buffer_may_be_any_writable_one(loop: EventLoop) -> None:
    async def main() -> None:
        whole = bytearray(100)
        ended = asyncio.Event()
        end = 0

        class Filling(asyncio.BufferedProtocol):
            def get_buffer(self, sizehint: int) -> memoryview:
                assert sizehint != 0
                return memoryview(whole)[end:]

            def buffer_updated(self, nbytes: int) -> None:
                nonlocal end
                end += nbytes

            def connection_lost(self, exc: BaseException | None) -> None:
                ended.set()

        _, peer = await pair(Filling())
        await in_thread(send_all, peer, b"x" * 40 + b"y" * 40)
        await ended.wait()
        assert whole == b"x" * 40 + b"y" * 40 + bytes(20)

    loop.run_until_complete(main())


@pytest.mark.parametrize("buffer", [bytearray(), b"read-only", None], ids=["empty", "read-only", "none"])
def test_a_buffer_that_takes_nothing_is_an_error_and_the_end(loop: EventLoop, buffer: Any) -> None:
    found = reports(loop)

    async def main() -> None:
        record = Record()

        class Wrong(Buffered):
            def get_buffer(self, sizehint: int) -> Any:
                return buffer

        transport, peer = await pair(Wrong(record))
        peer.sendall(b"x")
        await record.lost.wait()
        await turns(2)
        assert record.events == ["made", "lost"]
        assert [context["message"] for context in found] == [
            "Fatal error: protocol.get_buffer() call failed."
        ]
        assert found[0]["exception"] is record.error
        assert found[0]["transport"] is transport
        found.clear()
        peer.close()

    loop.run_until_complete(main())


# ---- pausing -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("end", ["open", "eof"])
def test_after_a_pause_nothing_comes_and_then_everything_in_order(
    small: EventLoop, kind: str, end: str
) -> None:
    data = noise(6 * SMALL_BLOCK)

    async def main() -> None:
        def pause(record: Record) -> None:
            assert record.transport.is_reading(), "called back while paused"
            record.transport.pause_reading()

        record = Record(data=pause)
        transport, peer = await pair(protocol(kind, record))
        # Here before the transport looks: all of it completes in the batch in which the first callback pauses.
        peer.sendall(data)
        if end == "eof":
            peer.shutdown(socket.SHUT_WR)
        expected = 0
        while len(record.data) < len(data):
            while record.events.count("data") == expected:
                await asyncio.sleep(0)
            expected += 1
            await turns(5)
            assert record.events.count("data") == expected
            assert "eof" not in record.events
            transport.resume_reading()
            assert record.events.count("data") == expected, "resume_reading called back at once"
        assert expected > 1
        if end == "open":
            peer.shutdown(socket.SHUT_WR)
        await record.lost.wait()
        assert record.data == data
        assert record.events == ["made", *["data"] * expected, "eof", "lost"]
        peer.close()

    small.run_until_complete(main())


@pytest.mark.parametrize("kind", KINDS)
def test_a_reset_is_held_while_paused(loop: EventLoop, kind: str) -> None:
    async def main() -> None:
        came = asyncio.Event()

        def pause(record: Record) -> None:
            record.transport.pause_reading()
            came.set()

        record = Record(data=pause)
        transport, peer = await pair(protocol(kind, record))
        peer.sendall(b"first")
        await came.wait()
        reset(peer)
        await turns()
        assert record.events == ["made", "data"]
        assert not transport.is_closing()
        transport.resume_reading()
        assert record.events == ["made", "data"]
        await record.lost.wait()
        assert record.events == ["made", "data", "lost"]
        assert isinstance(record.error, ConnectionResetError)

    loop.run_until_complete(main())


@pytest.mark.parametrize("kind", KINDS)
def test_paused_in_connection_made(loop: EventLoop, kind: str) -> None:
    async def main() -> None:
        records: list[Record] = []

        def accept() -> Any:
            records.append(Record(made=lambda record: record.transport.pause_reading()))
            return protocol(kind, records[-1])

        async with serving(accept) as address:
            peer = await in_thread(socket.create_connection, address)
            await in_thread(send_all, peer, b"held")
            await turns()
            while not records:
                await asyncio.sleep(0)
            await turns()
            (record,) = records
            assert record.events == ["made"]
            assert "paused" in repr(record.transport)
            record.transport.resume_reading()
            await record.lost.wait()
            assert record.events == ["made", "data", "eof", "lost"]
            assert record.data == b"held"

    loop.run_until_complete(main())


@pytest.mark.parametrize("kind", KINDS)
def test_paused_and_resumed_in_one_callback(small: EventLoop, kind: str) -> None:
    data = noise(10 * SMALL_BLOCK)

    async def main() -> None:
        depth = 0

        def blink(record: Record) -> None:
            nonlocal depth
            depth += 1
            assert depth == 1, "called back from within resume_reading"
            record.transport.pause_reading()
            record.transport.resume_reading()
            record.transport.resume_reading()
            depth -= 1

        record = Record(made=blink, data=blink)
        _, peer = await pair(protocol(kind, record))
        await in_thread(send_all, peer, data)
        await record.lost.wait()
        assert record.data == data

    small.run_until_complete(main())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["close", "abort"])
def test_what_is_held_is_dropped_when_the_transport_is_closed(small: EventLoop, kind: str, how: str) -> None:
    async def main() -> None:
        came = asyncio.Event()

        def pause(record: Record) -> None:
            record.transport.pause_reading()
            came.set()

        record = Record(data=pause)
        transport, peer = await pair(protocol(kind, record))
        peer.sendall(noise(6 * SMALL_BLOCK))
        await came.wait()
        await turns()
        getattr(transport, how)()
        transport.resume_reading()
        await record.lost.wait()
        assert record.events == ["made", "data", "lost"]
        assert record.error is None
        peer.close()

    small.run_until_complete(main())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["close", "abort"])
def test_closed_in_a_callback_nothing_more_comes(small: EventLoop, kind: str, how: str) -> None:
    async def main() -> None:
        record = Record(data=lambda record: getattr(record.transport, how)())
        _, peer = await pair(protocol(kind, record))
        peer.sendall(noise(6 * SMALL_BLOCK))
        await record.lost.wait()
        assert record.events == ["made", "data", "lost"]
        peer.close()

    small.run_until_complete(main())


@pytest.mark.parametrize("kind", KINDS)
def test_pauses_at_each_callback_over_10_mib_lose_nothing(loop: EventLoop, kind: str) -> None:
    data = noise(10 << 20)

    async def main() -> None:
        def pause(record: Record) -> None:
            assert record.transport.is_reading()
            record.transport.pause_reading()
            loop.call_soon(record.transport.resume_reading)

        record = Record(data=pause)
        _, peer = await pair(protocol(kind, record))
        await asyncio.gather(in_thread(send_all, peer, data), record.lost.wait())
        assert len(record.sizes) > 20
        assert hashlib.sha256(record.data).digest() == hashlib.sha256(data).digest()

    loop.run_until_complete(main())


def test_another_protocol_gets_what_was_held_for_the_first(small: EventLoop) -> None:
    data = noise(6 * SMALL_BLOCK)

    async def main() -> None:
        came = asyncio.Event()

        def pause(record: Record) -> None:
            record.transport.pause_reading()
            came.set()

        for first in KINDS:
            for second in KINDS:
                came.clear()
                before, after = Record(data=pause), Record()
                transport, peer = await pair(protocol(first, before))
                peer.sendall(data)
                peer.shutdown(socket.SHUT_WR)
                await came.wait()
                await turns()
                transport.set_protocol(protocol(second, after))
                transport.resume_reading()
                await after.lost.wait()
                assert before.events == ["made", "data"]
                assert before.data + after.data == data
                assert after.events[-2:] == ["eof", "lost"]
                peer.close()

    small.run_until_complete(main())


# ---- the end of the stream -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("answer", [True, False, None])
def test_eof_received_says_whether_the_writing_side_stays_open(
    loop: EventLoop, kind: str, answer: bool | None
) -> None:
    async def main() -> None:
        ended = asyncio.Event()

        def eof(record: Record) -> bool | None:
            ended.set()
            return answer

        record = Record(eof=eof)
        transport, peer = await pair(protocol(kind, record))
        peer.sendall(b"question")
        peer.shutdown(socket.SHUT_WR)
        await ended.wait()
        if answer:
            await turns()
            assert not transport.is_closing()
            transport.write(b"answer")
            transport.close()
        else:
            assert transport.is_closing()
        assert await in_thread(read_all, peer) == (b"answer" if answer else b"")
        await record.lost.wait()
        assert record.events == ["made", "data", "eof", "lost"]

    loop.run_until_complete(main())


# ---- exceptions ----------------------------------------------------------------------------------------------

FAILURES = [
    ("lease", "data", "lease_received"),
    ("bytes", "data", "data_received"),
    ("buffered", "data", "buffer_updated"),
    ("buffered", "get", "get_buffer"),
    *((kind, "eof", "eof_received") for kind in KINDS),
]


@pytest.mark.parametrize(("kind", "callback", "name"), FAILURES)
@pytest.mark.parametrize("paused", [False, True], ids=["", "held"])
def test_an_exception_while_reading_is_reported_once_and_ends_the_connection(
    small: EventLoop, kind: str, callback: str, name: str, paused: bool
) -> None:
    found = reports(small)

    def fail(record: Record) -> None:
        raise ZeroDivisionError(callback)

    def pause(record: Record) -> None:
        if paused:
            record.transport.pause_reading()

    async def main() -> None:
        record = Record(**{"made": pause, callback: fail})
        serves = protocol(kind, record)
        transport, peer = await pair(serves)
        await turns()
        peer.sendall(noise(6 * SMALL_BLOCK))
        peer.shutdown(socket.SHUT_WR)
        await turns()
        transport.resume_reading()
        await record.lost.wait()
        await turns(3)
        assert record.events.count("lost") == 1
        assert record.events[-1] == "lost"
        assert isinstance(record.error, ZeroDivisionError)
        assert found == [
            {
                "message": f"Fatal error: protocol.{name}() call failed.",
                "exception": record.error,
                "transport": transport,
                "protocol": serves,
            }
        ]
        assert "closed" in repr(transport)
        peer.close()

    small.run_until_complete(main())


@pytest.mark.parametrize("kind", KINDS)
def test_an_exception_in_an_accepted_connection_s_connection_made(loop: EventLoop, kind: str) -> None:
    found = reports(loop)
    records: list[Record] = []

    def fail(record: Record) -> None:
        raise ZeroDivisionError

    def accept() -> Any:
        records.append(Record(made=fail))
        return protocol(kind, records[-1])

    async def main() -> None:
        async with serving(accept) as address:
            peer = await in_thread(socket.create_connection, address)
            assert await in_thread(read_all, peer) == b""
            (record,) = records
            await record.lost.wait()
            assert record.events == ["made", "lost"]
        assert [(context["message"], type(context["exception"])) for context in found] == [
            ("Fatal error: protocol.connection_made() call failed.", ZeroDivisionError)
        ]
        assert found[0]["transport"] is record.transport

    loop.run_until_complete(main())
    found.clear()


@pytest.mark.parametrize("kind", KINDS)
def test_an_exception_in_connection_lost_leaves_no_descriptor(loop: EventLoop, kind: str) -> None:
    found = reports(loop)

    def fail(record: Record) -> None:
        raise ZeroDivisionError

    async def main() -> None:
        record = Record(lost=fail)
        transport, peer = await pair(protocol(kind, record))
        peer.close()
        await record.lost.wait()
        await turns(2)
        assert record.events == ["made", "eof", "lost"]
        assert [type(context["exception"]) for context in found] == [ZeroDivisionError]
        assert "closed" in repr(transport)

    loop.run_until_complete(main())
    found.clear()


def test_an_exception_in_the_factory_is_reported_and_the_next_one_is_served(loop: EventLoop) -> None:
    found = reports(loop)
    record: Record | None = None
    attempts = 0

    def accept() -> Any:
        nonlocal attempts, record
        attempts += 1
        if attempts < 3:
            raise ZeroDivisionError
        record = Record()
        return Bytes(record)

    async def main() -> None:
        async with serving(accept) as address:
            for _ in range(2):
                peer = await in_thread(socket.create_connection, address)
                assert await in_thread(read_all, peer) == b""
            peer = await in_thread(socket.create_connection, address)
            await in_thread(send_all, peer, b"served")
            while record is None:
                await asyncio.sleep(0)
            await record.lost.wait()
            assert record.data == b"served"
        assert [(context["message"], context["protocol"]) for context in found] == [
            ("Error on transport creation for incoming connection", None)
        ] * 2

    loop.run_until_complete(main())


def test_a_factory_that_closes_its_server_costs_no_other_s_descriptor(loop: EventLoop) -> None:
    """A server that is closed takes no more transports; its descriptor must be closed once, not twice."""
    found = reports(loop)

    async def main() -> None:
        def accept() -> Any:
            server.close()
            return Bytes(Record())

        server = await loop.create_server(accept, "127.0.0.1", 0)
        peer = await in_thread(socket.create_connection, server.sockets[0].getsockname())
        assert await in_thread(read_all, peer) == b""
        # A second close would hit one of these.
        others = [socket.socket() for _ in range(8)]
        assert len(found) == 1
        assert found[0]["message"] == "Error on transport creation for incoming connection"
        found.clear()
        gc.collect()
        for other in others:
            other.getsockname()
            other.close()
        await server.wait_closed()

    loop.run_until_complete(main())


# ---- what a transport is -------------------------------------------------------------------------------------


@asynccontextmanager
async def accepted(
    address_family: int, host: str, record: Record
) -> AsyncIterator[tuple[Any, socket.socket]]:
    """An accepted connection's transport, and the socket that has connected."""
    made = asyncio.Event()
    record.on["made"] = lambda _: made.set()
    async with serving(lambda: Bytes(record), host) as address:
        with socket.socket(address_family) as peer:
            await in_thread(peer.connect, address)
            await made.wait()
            yield record.transport, peer


@pytest.mark.parametrize(("family", "host"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")])
def test_addresses_are_the_socket_module_s_on_both_sides(loop: EventLoop, family: int, host: str) -> None:
    async def main() -> None:
        record = Record()
        async with accepted(family, host, record) as (transport, peer):
            near = transport.get_extra_info("socket")
            assert isinstance(near, TransportSocket)
            assert (near.family, near.type) == (family, socket.SOCK_STREAM)
            assert transport.get_extra_info("sockname") == near.getsockname() == peer.getpeername()
            assert transport.get_extra_info("peername") == near.getpeername() == peer.getsockname()
            assert transport.get_extra_info("socket") is near
            with pytest.raises(AttributeError):
                near.recv(1)

        mine = Record()
        async with serving(asyncio.Protocol, host) as address:
            transport, _ = await loop.create_connection(lambda: Bytes(mine), *address[:2])
            near = transport.get_extra_info("socket")
            assert transport.get_extra_info("peername") == near.getpeername() == address
            assert transport.get_extra_info("sockname") == near.getsockname()
            transport.abort()
            await mine.lost.wait()
        await record.lost.wait()

    loop.run_until_complete(main())


@pytest.mark.parametrize(("family", "host"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")])
@pytest.mark.parametrize("ask", [True, False], ids=["asked in connection_lost", "asked after the end"])
def test_addresses_are_known_after_a_reset_and_after_the_end(
    loop: EventLoop, family: int, host: str, ask: bool
) -> None:
    async def main() -> None:
        at_the_end: list[Any] = []
        record = Record()
        if ask:
            record.on["lost"] = lambda record: at_the_end.extend(
                record.transport.get_extra_info(name) for name in ("sockname", "peername")
            )
        async with accepted(family, host, record) as (transport, peer):
            expected = [peer.getpeername(), peer.getsockname()]
            reset(peer)
            await record.lost.wait()
            assert isinstance(record.error, ConnectionResetError)
            assert at_the_end == (expected if ask else [])
            assert "closed" in repr(transport)
            assert transport.get_extra_info("peername") == expected[1]
            assert transport.get_extra_info("sockname") == expected[0]
            sock = transport.get_extra_info("socket")
            assert sock is None or sock.fileno() == -1

    loop.run_until_complete(main())


def test_addresses_of_unix_sockets(loop: EventLoop, tmp_path: Path) -> None:
    async def main() -> None:
        path = str(tmp_path / "socket")
        record, mine = Record(), Record()
        server = await loop.create_unix_server(lambda: Bytes(record), path)
        async with server:
            transport, _ = await loop.create_unix_connection(lambda: Bytes(mine), path)
            transport.write(b"over a path")
            assert transport.get_extra_info("peername") == path
            assert transport.get_extra_info("sockname") == ""
            assert transport.get_extra_info("socket").family == socket.AF_UNIX
            while not record.data:
                await asyncio.sleep(0)
            assert record.transport.get_extra_info("sockname") == path
            assert record.transport.get_extra_info("peername") == ""
            transport.close()
            await mine.lost.wait()
            await record.lost.wait()
            assert record.data == b"over a path"

    loop.run_until_complete(main())


def test_unknown_extra_info_is_the_default(loop: EventLoop) -> None:
    async def main() -> None:
        record = Record()
        transport, peer = await pair(Bytes(record))
        assert transport.get_extra_info("sslcontext") is None
        assert transport.get_extra_info("compression", "none") == "none"
        peer.close()
        await record.lost.wait()
        assert transport.get_extra_info("compression", "none") == "none"

    loop.run_until_complete(main())


def test_it_passes_for_asyncio_s_own(loop: EventLoop) -> None:
    async def main() -> None:
        record = Record()
        transport, peer = await pair(Bytes(record))
        assert isinstance(transport, asyncio.Transport)
        assert isinstance(transport, asyncio.ReadTransport)
        assert isinstance(transport, asyncio.WriteTransport)
        assert not isinstance(transport, asyncio.DatagramTransport)
        assert weakref.ref(transport)() is transport
        assert {transport: 1}[transport] == 1
        peer.close()
        await record.lost.wait()

    loop.run_until_complete(main())


def test_what_is_over_is_freed_without_the_collector(loop: EventLoop) -> None:
    async def main() -> weakref.ref[Any]:
        record = Record()
        transport, peer = await pair(Bytes(record))
        peer.sendall(b"x")
        peer.close()
        await record.lost.wait()
        record.transport = None
        return weakref.ref(transport)

    gc.disable()
    try:
        assert loop.run_until_complete(main())() is None
    finally:
        gc.enable()


def test_its_repr_says_in_what_state_it_is(loop: EventLoop) -> None:
    async def main() -> None:
        record = Record()
        transport, peer = await pair(Bytes(record))
        await turns(3)
        fd = transport.get_extra_info("socket").fileno()
        assert repr(transport) == f"<headrace.StreamTransport fd={fd} reading write_buffer=0>"
        transport.pause_reading()
        assert f"fd={fd} paused" in repr(transport)
        transport.resume_reading()
        transport.write(b"12345")
        assert repr(transport) == f"<headrace.StreamTransport fd={fd} reading write_buffer=5>"
        transport.close()
        assert f"fd={fd} closing" in repr(transport)
        await record.lost.wait()
        await turns(1)
        assert repr(transport) == "<headrace.StreamTransport fd=-1 closed write_buffer=0>"
        assert await in_thread(read_all, peer) == b"12345"

    loop.run_until_complete(main())


@pytest.mark.parametrize("accept", [False, True], ids=["connected", "accepted"])
def test_a_transport_left_open_by_a_closed_loop_warns_and_leaves_no_descriptor(
    engine_name: str, accept: bool
) -> None:
    with headrace_loop(engine_name):
        pass  # a closed uring engine leaves its ring to the next one of the thread
    gc.collect()
    before = descriptors()
    loop = headrace.new_event_loop(engine=engine_name)

    async def main() -> Any:
        if not accept:
            return (await pair(asyncio.Protocol()))[1]
        made = asyncio.Event()
        record = Record(made=lambda _: made.set())
        server = await asyncio.get_running_loop().create_server(lambda: Bytes(record), "127.0.0.1", 0)
        peer = await in_thread(socket.create_connection, server.sockets[0].getsockname(), 20)
        await made.wait()
        server.close()  # and don't wait: from 3.12 on, that would be for the connection's end
        await asyncio.sleep(0)
        return peer

    peer = loop.run_until_complete(main())
    loop.run_until_complete(loop.shutdown_default_executor())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loop.close()
        del loop
        gc.collect()
    warned = [str(warning.message) for warning in caught if warning.category is ResourceWarning]
    assert len([text for text in warned if "unclosed transport <headrace.StreamTransport fd=" in text]) == 1
    assert read_all(peer) == b""
    assert len(descriptors()) == len(before)


class headrace_loop:  # noqa: N801  a context manager
    """Runs a loop once, and closes it."""

    def __init__(self, engine: str) -> None:
        self.loop = headrace.new_event_loop(engine=engine)

    def __enter__(self) -> EventLoop:
        self.loop.run_until_complete(asyncio.sleep(0))
        return self.loop

    def __exit__(self, *exception: object) -> None:
        self.loop.close()


def test_its_descriptor_is_nobody_else_s(loop: EventLoop) -> None:
    async def main() -> None:
        record = Record()
        transport, peer = await pair(Bytes(record))
        sock = transport._sock
        fd = sock.fileno()
        for used in (
            lambda: loop.add_reader(fd, print),
            lambda: loop.add_writer(sock, print),
            lambda: loop.remove_reader(fd),
            lambda: loop.remove_writer(sock),
        ):
            with pytest.raises(RuntimeError, match=r"is used by transport <headrace\.StreamTransport"):
                used()
        # asyncio tries at once, and asks whose the descriptor is when it has to wait; in debug mode too.
        for receiving in (loop.sock_recv(sock, 1), loop.sock_recv_into(sock, bytearray(1))):
            with pytest.raises(RuntimeError, match="is used by transport"):
                await receiving
        with pytest.raises(RuntimeError, match="is used by transport"):
            await loop.create_connection(asyncio.Protocol, sock=sock)
        peer.close()
        await record.lost.wait()
        # Free again: the number belongs to whoever opens it next.
        left, right = socket.socketpair()
        with left, right:
            loop.add_reader(left, print)
            assert loop.remove_reader(left)

    loop.run_until_complete(main())


# ---- contexts ------------------------------------------------------------------------------------------------

variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="unset")


@pytest.mark.parametrize("kind", KINDS)
def test_accepted_connections_don_t_see_each_other_s_variables(small: EventLoop, kind: str) -> None:
    async def main() -> None:
        records: list[Record] = []
        seen: dict[str, list[str]] = {}

        def note(record: Record) -> None:
            seen.setdefault(str(id(record)), []).append(variable.get())
            variable.set(str(id(record)))
            if record.events[-1] == "data":
                record.transport.write(b"+")
                # Then what is passed on comes from the ready queue.
                record.transport.pause_reading()
                record.transport.resume_reading()

        def accept() -> Any:
            records.append(Record(made=note, data=note, eof=note, lost=note))
            return protocol(kind, records[-1])

        variable.set("server")
        async with serving(accept) as address:
            variable.set("after the server was made")
            peers = [await in_thread(socket.create_connection, address, 20) for _ in range(2)]
            for _ in range(2):
                for peer in peers:
                    await in_thread(peer.sendall, b"x")
                    assert await in_thread(peer.recv, 1) == b"+"
            for peer in peers:
                peer.close()
            for record in records:
                await record.lost.wait()
        assert len(records) == 2
        for own, values in seen.items():
            assert values == ["server", own, own, own, own]
        assert variable.get() == "after the server was made"

    small.run_until_complete(main())


@pytest.mark.parametrize("kind", KINDS)
def test_a_client_s_callbacks_see_the_context_of_its_maker(loop: EventLoop, kind: str) -> None:
    async def main() -> None:
        seen: list[str] = []

        def note(record: Record) -> None:
            seen.append(variable.get())

        async def connect(address: Any, record: Record) -> Any:
            variable.set("maker")
            return await loop.create_connection(lambda: protocol(kind, record), *address)

        record = Record(made=note, data=note, eof=note, lost=note)
        async with serving(
            lambda: Bytes(Record(made=lambda record: record.transport.write(b"x")))
        ) as address:
            transport, _ = await asyncio.create_task(connect(address, record))
            transport.pause_reading()
            variable.set("somebody else")
            transport.resume_reading()
            while not record.data:
                await asyncio.sleep(0)
            transport.write_eof()
            await record.lost.wait()
        assert seen == ["maker"] * 4

    loop.run_until_complete(main())


# ---- ways to make one, and what asyncio builds on it ---------------------------------------------------------


def echo() -> Any:
    return Bytes(
        Record(data=lambda record: (record.transport.write(bytes(record.data)), record.data.clear()))
    )


def test_a_connection_over_a_given_socket(loop: EventLoop) -> None:
    async def main() -> None:
        async with serving(echo) as address:
            sock = await in_thread(socket.create_connection, address)
            record = Record()
            transport, made = await loop.create_connection(lambda: Leases(record), sock=sock)
            assert made is transport.get_protocol()
            assert record.events == ["made"]
            transport.write(b"given")
            while record.data != b"given":
                await asyncio.sleep(0)
            transport.close()
            await record.lost.wait()
            assert sock.fileno() == -1

    loop.run_until_complete(main())


@pytest.mark.parametrize("both", [True, False], ids=["both answer", "only IPv4 answers"])
def test_localhost_with_both_families(loop: EventLoop, monkeypatch: pytest.MonkeyPatch, both: bool) -> None:
    async def main() -> None:
        async with serving(echo) as (_, port):
            addresses = [
                (socket.AF_INET6, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", ("::1", port, 0, 0)),
                (socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", ("127.0.0.1", port)),
            ]

            async def resolve(*arguments: Any, **options: Any) -> Any:
                return addresses

            sixth = None
            if both:
                sixth = await loop.create_server(echo, "::1", port)
            monkeypatch.setattr(loop, "getaddrinfo", resolve)
            reader, writer = await asyncio.open_connection("localhost", port, happy_eyeballs_delay=0.25)
            family = writer.get_extra_info("socket").family
            assert family == (socket.AF_INET6 if both else socket.AF_INET)
            writer.write(b"x")
            assert await reader.readexactly(1) == b"x"
            writer.close()
            await writer.wait_closed()
            monkeypatch.undo()
            if sixth is not None:
                sixth.close()
                await sixth.wait_closed()

    loop.run_until_complete(main())


def test_asyncio_s_streams(loop: EventLoop) -> None:
    async def main() -> None:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"12345" + b"a line\n" + b"x" * 200 + b"\n" + b"the rest")
            writer.write_eof()
            assert await reader.read() == b""
            writer.close()
            await writer.wait_closed()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        async with server:
            reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname(), limit=100)
            assert await reader.readexactly(5) == b"12345"
            assert await reader.readuntil() == b"a line\n"
            with pytest.raises(asyncio.LimitOverrunError) as overrun:
                await reader.readuntil()
            assert await reader.readexactly(overrun.value.consumed) == b"x" * overrun.value.consumed
            assert await reader.readexactly(201 - overrun.value.consumed) == (
                b"x" * (200 - overrun.value.consumed) + b"\n"
            )
            with pytest.raises(asyncio.IncompleteReadError) as incomplete:
                await reader.readexactly(100)
            assert incomplete.value.partial == b"the rest"
            assert reader.at_eof()
            assert await reader.read() == b""
            writer.close()
            await writer.wait_closed()

    loop.run_until_complete(main())


# ---- TLS, asyncio's own --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def contexts(tmp_path_factory: pytest.TempPathFactory) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """(the server's, the client's), with a certificate of 127.0.0.1 that has signed itself."""
    return tls_contexts(tmp_path_factory.mktemp("tls"))


async def serve_echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    writer.close()
    await writer.wait_closed()


async def exchange(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, data: bytes) -> None:
    """Sends, and reads the echo meanwhile."""

    async def send() -> None:
        for start in range(0, len(data), 50_000):
            writer.write(data[start : start + 50_000])
            await writer.drain()

    sending = asyncio.ensure_future(send())
    assert await reader.readexactly(len(data)) == data
    await sending
    writer.close()
    await writer.wait_closed()


def test_tls_echoes_1_mib(loop: EventLoop, contexts: tuple[ssl.SSLContext, ssl.SSLContext]) -> None:
    async def main() -> None:
        server = await asyncio.start_server(serve_echo, "127.0.0.1", 0, ssl=contexts[0])
        async with server:
            address = server.sockets[0].getsockname()
            reader, writer = await asyncio.open_connection(*address, ssl=contexts[1])
            assert writer.get_extra_info("peername") == address
            assert writer.get_extra_info("cipher") is not None
            await exchange(reader, writer, noise(1 << 20))

    loop.run_until_complete(main())


def test_start_tls_in_mid_connection_on_both_sides(
    loop: EventLoop, contexts: tuple[ssl.SSLContext, ssl.SSLContext]
) -> None:
    async def main() -> None:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            assert await reader.readline() == b"STARTTLS\n"
            writer.write(b"GO\n")
            await writer.start_tls(contexts[0])
            await serve_echo(reader, writer)

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        async with server:
            address = server.sockets[0].getsockname()
            reader, writer = await asyncio.open_connection(*address)
            writer.write(b"STARTTLS\n")
            assert await reader.readline() == b"GO\n"
            await writer.start_tls(contexts[1], server_hostname="127.0.0.1")
            assert writer.get_extra_info("ssl_object") is not None
            await exchange(reader, writer, noise(1 << 20))

    loop.run_until_complete(main())


def test_a_peer_that_speaks_no_tls_is_dropped(
    loop: EventLoop, contexts: tuple[ssl.SSLContext, ssl.SSLContext]
) -> None:
    async def main() -> None:
        record = Record()
        async with serving(lambda: Bytes(record), ssl=contexts[0]) as address:
            peer = await in_thread(socket.create_connection, address, 20)
            peer.sendall(b"GET / HTTP/1.0\r\n\r\n")
            await in_thread(read_all, peer)
            assert record.events == []

    loop.run_until_complete(main())


# ---- servers -------------------------------------------------------------------------------------------------


def test_a_closed_server_has_freed_its_port(loop: EventLoop) -> None:
    async def main() -> None:
        port = 0
        for _ in range(10):
            server = await loop.create_server(asyncio.Protocol, "127.0.0.1", port, reuse_address=False)
            port = server.sockets[0].getsockname()[1]
            await turns(2)
            server.close()
            with socket.socket() as again:
                again.bind(("127.0.0.1", port))
                again.listen()
            assert server.sockets == ()
            await server.wait_closed()

    loop.run_until_complete(main())


def test_start_serving_is_when_connections_are_served(loop: EventLoop) -> None:
    async def main() -> None:
        made = asyncio.Event()
        record = Record(made=lambda _: made.set())
        server = await loop.create_server(lambda: Bytes(record), "127.0.0.1", 0, start_serving=False)
        assert not server.is_serving()
        address = server.sockets[0].getsockname()
        with socket.socket() as early, pytest.raises(ConnectionRefusedError):
            early.connect(address)
        await server.start_serving()
        await server.start_serving()
        assert server.is_serving()
        with socket.create_connection(address) as peer:
            await made.wait()
            peer.close()
            await record.lost.wait()
        server.close()
        server.close()
        assert not server.is_serving()
        await server.wait_closed()

    loop.run_until_complete(main())


def test_several_hosts_one_server(loop: EventLoop) -> None:
    async def main() -> None:
        server = await loop.create_server(echo, ["127.0.0.1", "127.0.0.2", "::1"], 0)
        async with server:
            assert sorted(sock.getsockname()[0] for sock in server.sockets) == [
                "127.0.0.1",
                "127.0.0.2",
                "::1",
            ]
            for sock in server.sockets:
                reader, writer = await asyncio.open_connection(*sock.getsockname()[:2])
                writer.write(b"x")
                assert await reader.readexactly(1) == b"x"
                writer.close()
                await writer.wait_closed()
        assert server.sockets == ()

    loop.run_until_complete(main())


@pytest.mark.parametrize("kind", KINDS)
def test_a_closed_server_s_connections_go_on(loop: EventLoop, kind: str) -> None:
    async def main() -> None:
        records: list[Record] = []

        def accept() -> Any:
            records.append(Record(data=lambda record: record.transport.write(b"+")))
            return protocol(kind, records[-1])

        server = await loop.create_server(accept, "127.0.0.1", 0)
        address = server.sockets[0].getsockname()
        peers = [await in_thread(socket.create_connection, address, 20) for _ in range(3)]
        for peer in peers:
            peer.sendall(b"1")
            assert await in_thread(peer.recv, 1) == b"+"
        server.close()
        with pytest.raises(ConnectionRefusedError):
            await in_thread(socket.create_connection, address)
        for peer in peers:
            peer.sendall(b"2")
            assert await in_thread(peer.recv, 1) == b"+"
        for peer, record in zip(peers, records, strict=True):
            assert record.data == b"12"
            peer.close()
            await record.lost.wait()
        await server.wait_closed()

    loop.run_until_complete(main())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("end", [socket.socket.close, reset], ids=["closed", "reset"])
def test_200_connections_leave_everything_as_it_was(small: EventLoop, kind: str, end: Any) -> None:
    async def rounds(count: int) -> None:
        records: list[Record] = []

        def accept() -> Any:
            records.append(Record(data=lambda record: record.transport.write(b"+")))
            return protocol(kind, records[-1])

        async with serving(accept) as address:
            peers = [socket.create_connection(address, 20) for _ in range(count)]
            for peer in peers:
                peer.sendall(b"x")
            for peer in peers:
                assert await in_thread(peer.recv, 1) == b"+"
                end(peer)
            for record in records:
                await record.lost.wait()
                assert record.events.count("lost") == 1
            await turns(1)
        assert len(records) == count

    def now() -> tuple[Any, ...]:
        gc.collect()
        pool = small.stats()["pool"]
        return len(descriptors()), pool["outstanding"], pool["pinned"], pool["leased"]

    small.run_until_complete(rounds(5))
    before = now()
    small.run_until_complete(rounds(50))
    small.run_until_complete(rounds(50))
    small.run_until_complete(rounds(100))
    assert now() == before


# ---- in any order --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_any_mix_of_pauses_and_protocols_keeps_every_byte_in_order(small: EventLoop, seed: int) -> None:
    """Also the callbacks' promise: none while paused, and none from within a call."""
    chance = random.Random(seed)
    data = noise(1 << 20, seed)

    async def main() -> None:
        inside = False

        def resume(transport: Any) -> None:
            nonlocal inside
            inside = True
            transport.resume_reading()
            inside = False

        def act(record: Record) -> None:
            transport = record.transport
            assert transport.is_reading()
            assert not inside, "called back from within resume_reading"
            for _ in range(chance.randrange(3)):
                step = chance.randrange(4)
                if step == 0:
                    transport.pause_reading()
                elif step == 1:
                    resume(transport)
                elif step == 2:
                    following = protocol(chance.choice(KINDS), record)
                    following.sizes = [chance.choice((100, 5000, 100_000))]
                    transport.set_protocol(following)
            if not transport.is_reading():
                if chance.randrange(2):
                    loop.call_soon(resume, transport)
                else:
                    loop.call_later(chance.random() / 500, resume, transport)

        loop = small
        record = Record(data=act)
        _, peer = await pair(protocol(chance.choice(KINDS), record))

        def talk() -> None:
            with peer:
                start = 0
                pieces = random.Random(seed)
                while start < len(data):
                    size = pieces.choice((1, 500, 3000, 40_000, 200_000))
                    peer.sendall(data[start : start + size])
                    start += size

        await asyncio.gather(in_thread(talk), record.lost.wait())
        assert record.data == data
        assert record.events[-2:] == ["eof", "lost"]

    small.run_until_complete(main())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("paused", [False, True], ids=["reading", "paused"])
def test_what_comes_between_two_runs_is_there_in_the_second(
    small: EventLoop, kind: str, paused: bool
) -> None:
    data = noise(6 * SMALL_BLOCK)
    state: dict[str, Any] = {}

    async def first() -> None:
        state["record"] = Record()
        state["transport"], state["peer"] = await pair(protocol(kind, state["record"]))
        state["peer"].sendall(data[:1000])
        while not state["record"].data:
            await asyncio.sleep(0)
        if paused:
            state["transport"].pause_reading()

    async def second() -> None:
        if paused:
            await turns()
            assert len(state["record"].data) == 1000
            state["transport"].resume_reading()
        await state["record"].lost.wait()

    small.run_until_complete(first())
    send_all(state["peer"], data[1000:])
    small.run_until_complete(second())
    assert state["record"].data == data
    assert state["record"].events[-2:] == ["eof", "lost"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_connection_that_is_reset_before_it_is_accepted(loop: EventLoop, kind: str) -> None:
    """The kernel still hands it over; its protocol is told of the beginning and the end."""

    async def main() -> None:
        records: list[Record] = []

        def accept() -> Any:
            records.append(Record())
            return protocol(kind, records[-1])

        async with serving(accept) as address:
            for _ in range(5):
                reset(socket.create_connection(address))
            while len(records) < 5:
                await asyncio.sleep(0)
            for record in records:
                await record.lost.wait()
                assert record.events == ["made", "lost"]
                assert isinstance(record.error, ConnectionResetError)

    loop.run_until_complete(main())


def test_an_exception_in_a_client_s_connection_made_is_reported_as_asyncio_does(loop: EventLoop) -> None:
    """asyncio doesn't end such a connection: the caller has its transport, and the callbacks go on."""

    def fail(record: Record) -> None:
        raise ZeroDivisionError

    async def main(found: list[dict[str, Any]]) -> list[Any]:
        record = Record(made=fail)
        _, peer = await pair(Bytes(record))
        send_all(peer, b"x")
        await record.lost.wait()
        assert record.data == b"x"
        told = [sorted(context) for context in found]
        found.clear()
        return [record.events, told]

    reference = asyncio.SelectorEventLoop()
    try:
        expected = reference.run_until_complete(main(reports(reference)))  # type: ignore[arg-type]
    finally:
        reference.close()
    assert loop.run_until_complete(main(reports(loop))) == expected
    assert expected[0] == ["made", "data", "eof", "lost"]


def test_an_exception_after_the_end_is_still_reported(small: EventLoop) -> None:
    found = reports(small)

    def fail(record: Record) -> None:
        record.transport.abort()
        raise ZeroDivisionError

    async def main() -> None:
        for kind in KINDS:
            record = Record(data=fail)
            _, peer = await pair(protocol(kind, record))
            peer.sendall(noise(3 * SMALL_BLOCK))
            await record.lost.wait()
            await turns(2)
            assert record.events == ["made", "data", "lost"]
            assert [type(context["exception"]) for context in found] == [ZeroDivisionError]
            found.clear()
            peer.close()

    small.run_until_complete(main())
