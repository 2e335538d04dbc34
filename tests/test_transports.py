"""Stream transports on real sockets, on both engines: the promises of ``docs/protocols.md`` one by one.

The simulator runs the same transports through tens of thousands of schedules (``test_simulated.py``); here are the
contracts that have a name.
"""

from __future__ import annotations

import asyncio
import contextvars
import gc
import hashlib
import os
import socket
import struct
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest

import headrace
from headrace.testing import Faults, simulated_run


class Recorder(headrace.Protocol):
    """Notes every callback, keeps every byte; `on` maps a callback's name to what it does besides."""

    def __init__(self, **on: Callable[..., Any]) -> None:
        self.on = on
        self.events: list[str] = []
        self.data = bytearray()
        self.error: BaseException | None = None
        self.lost = asyncio.get_running_loop().create_future()

    def note(self, event: str, *arguments: Any) -> Any:
        self.events.append(event)
        return self.on[event](self, *arguments) if event in self.on else None

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.note("made")

    def lease_received(self, lease: headrace.Lease) -> None:
        self.data += lease
        self.note("data")

    def eof_received(self) -> Any:
        return self.note("eof")

    def pause_writing(self) -> None:
        self.note("pause")

    def resume_writing(self) -> None:
        self.note("resume")

    def connection_lost(self, exc: Exception | None) -> None:
        self.error = exc
        self.events.append("lost")
        self.lost.set_result(None)
        if "lost" in self.on:
            self.on["lost"](self, exc)


def plain(recorder: Recorder) -> asyncio.Protocol:
    """An asyncio.Protocol that forwards to a recorder."""

    class Plain(asyncio.Protocol):
        connection_made = staticmethod(recorder.connection_made)  # type: ignore[assignment]
        eof_received = staticmethod(recorder.eof_received)  # type: ignore[assignment]
        connection_lost = staticmethod(recorder.connection_lost)  # type: ignore[assignment]

        def data_received(self, data: bytes) -> None:
            assert type(data) is bytes
            recorder.data += data
            recorder.note("data")

    return Plain()


def buffered(recorder: Recorder, size: int) -> asyncio.BufferedProtocol:
    """An asyncio.BufferedProtocol with a buffer of `size` bytes that forwards to a recorder."""
    buffer = bytearray(size)

    class Buffered(asyncio.BufferedProtocol):
        connection_made = staticmethod(recorder.connection_made)  # type: ignore[assignment]
        eof_received = staticmethod(recorder.eof_received)  # type: ignore[assignment]
        connection_lost = staticmethod(recorder.connection_lost)  # type: ignore[assignment]

        def get_buffer(self, sizehint: int) -> bytearray:
            return buffer

        def buffer_updated(self, nbytes: int) -> None:
            recorder.data += buffer[:nbytes]
            recorder.note("data")

    return Buffered()


async def pair(protocol: Any, *, receive_buffer: int | None = None) -> tuple[Any, socket.socket]:
    """A transport with `protocol`, and the blocking socket at its other end."""
    loop = asyncio.get_running_loop()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        peer = socket.socket()
        if receive_buffer:
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        peer.connect(listener.getsockname())
        near, _ = listener.accept()
    transport, _ = await loop.connect_accepted_socket(lambda: protocol, near)
    peer.settimeout(20)
    return transport, peer


def reset(peer: socket.socket) -> None:
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    peer.close()


async def in_thread(function: Callable[..., Any], *arguments: Any) -> Any:
    return await asyncio.get_running_loop().run_in_executor(None, function, *arguments)


def receive_all(peer: socket.socket) -> bytes:
    got = bytearray()
    while data := peer.recv(65536):
        got += data
    peer.close()
    return bytes(got)


def reports(loop: headrace.EventLoop) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _, context: found.append(context))
    return found


# ---- writing -------------------------------------------------------------------------------------------------


def test_what_can_be_written_arrives_as_it_was(loop: headrace.EventLoop) -> None:
    async def main() -> None:
        transport, peer = await pair(Recorder())
        mutable = bytearray(b"mutable")
        view = memoryview(b"0123456789")

        class Text(bytes):
            pass

        transport.write(b"bytes ")
        transport.write(mutable)
        mutable[:] = b"CHANGED"
        transport.write(view[2:8:2])
        transport.write(memoryview(struct.pack("2H", 1, 2)).cast("H"))
        transport.write(Text(b" text"))
        transport.write(b"")
        transport.writelines([b"", b" a", memoryview(b"b"), bytearray(b"c")])
        transport.writelines([])
        transport.close()
        assert (
            await in_thread(receive_all, peer) == b"bytes mutable246" + struct.pack("2H", 1, 2) + b" text abc"
        )

    loop.run_until_complete(main())


def test_a_lease_released_after_the_write_is_sent_intact(loop: headrace.EventLoop) -> None:
    sent = os.urandom(100_000)

    def echo(self: Recorder, lease: headrace.Lease) -> None:
        part = lease[: len(lease) // 2]
        rest = lease[len(lease) // 2 :]
        with lease, part, rest:
            self.transport.write(part)
            self.transport.write(rest)
        with pytest.raises(ValueError, match="released lease"):
            self.transport.write(lease)

    class Echo(Recorder):
        def lease_received(self, lease: headrace.Lease) -> None:
            echo(self, lease)

    async def main() -> None:
        _, peer = await pair(Echo())

        def talk() -> bytes:
            peer.sendall(sent)
            peer.shutdown(socket.SHUT_WR)
            return receive_all(peer)

        assert await in_thread(talk) == sent

    loop.run_until_complete(main())
    assert loop.stats()["pool"]["leased"] == 0


def test_wrong_types_and_wrong_times(loop: headrace.EventLoop) -> None:
    async def main() -> None:
        transport, peer = await pair(Recorder())
        with pytest.raises(TypeError, match="data argument must be a bytes-like object, not 'str'"):
            transport.write("text")
        with pytest.raises(TypeError, match="bytes-like"):
            transport.writelines([b"fine", 7])
        assert transport.can_write_eof()
        transport.write_eof()
        transport.write_eof()
        with pytest.raises(RuntimeError, match=r"Cannot call write\(\) after write_eof\(\)"):
            transport.write(b"more")
        with pytest.raises(RuntimeError, match=r"Cannot call writelines\(\) after write_eof\(\)"):
            transport.writelines([b"more"])
        assert await in_thread(receive_all, peer) == b""

    loop.run_until_complete(main())


def test_many_small_writes_are_one_send(loop: headrace.EventLoop) -> None:
    async def main() -> None:
        transport, peer = await pair(Recorder())
        await asyncio.sleep(0)
        before = loop.stats()["engine"]["submitted"]
        for number in range(5000):
            transport.write(b"%06d" % number)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        # The selector's watch may be armed anew meanwhile; every other operation is a send.
        assert loop.stats()["engine"]["submitted"] - before <= 2
        transport.close()
        assert await in_thread(receive_all, peer) == b"".join(b"%06d" % number for number in range(5000))

    loop.run_until_complete(main())


def test_a_slow_reader_gets_every_byte_in_order(loop: headrace.EventLoop) -> None:
    data = os.urandom(8 << 20)
    sizes = [1, 700, 66_000, 3, 300_000, 2048, 2049, 1_200_000]

    async def main() -> None:
        recorder = Recorder()
        transport, peer = await pair(recorder, receive_buffer=8192)
        reader = in_thread(receive_all, peer)
        reading = asyncio.ensure_future(reader)
        offset = turn = 0
        while offset < len(data):
            size = sizes[turn % len(sizes)]
            transport.write(data[offset : offset + size])
            offset += size
            turn += 1
            if turn % 5 == 0:
                await asyncio.sleep(0)
        transport.close()
        assert hashlib.sha256(await reading).digest() == hashlib.sha256(data).digest()
        await recorder.lost
        flow = [event for event in recorder.events if event in ("pause", "resume")]
        assert flow
        assert flow == ["pause", "resume"] * (len(flow) // 2) + ["pause"] * (len(flow) % 2)

    loop.run_until_complete(main())


def test_flow_control_pauses_and_resumes_in_turns(loop: headrace.EventLoop) -> None:
    async def main() -> None:
        resumed = loop.create_future()
        recorder = Recorder(resume=lambda self: resumed.set_result(self.transport.get_write_buffer_size()))
        transport, peer = await pair(recorder, receive_buffer=8192)
        assert transport.get_write_buffer_limits() == (16384, 65536)
        written = 0
        while "pause" not in recorder.events:
            transport.write(bytes(100_000))
            written += 100_000
            assert written < 256 << 20, "an unread connection took 256 MiB without a pause"
        assert transport.get_write_buffer_size() > 65536
        reading = asyncio.ensure_future(in_thread(receive_all, peer))
        assert await resumed <= 16384
        transport.close()
        assert len(await reading) == written
        assert recorder.events.count("pause") == recorder.events.count("resume") == 1

    loop.run_until_complete(main())


def test_write_buffer_limits(loop: headrace.EventLoop) -> None:
    async def main() -> None:
        transport, peer = await pair(Recorder())
        for arguments, limits in (
            ({"high": 100}, (25, 100)),
            ({"low": 100}, (100, 400)),
            ({"high": 0}, (0, 0)),
            ({"high": 7, "low": 7}, (7, 7)),
            ({}, (16384, 65536)),
        ):
            transport.set_write_buffer_limits(**arguments)
            assert transport.get_write_buffer_limits() == limits
        with pytest.raises(ValueError, match=r"high \(1\) must be >= low \(2\) must be >= 0"):
            transport.set_write_buffer_limits(high=1, low=2)
        transport.abort()
        peer.close()

    loop.run_until_complete(main())


def test_high_water_zero_means_wait_for_the_kernel(loop: headrace.EventLoop) -> None:
    async def main() -> None:
        recorder = Recorder()
        transport, peer = await pair(recorder)
        transport.set_write_buffer_limits(high=0)
        transport.write(b"x")
        for _ in range(10):
            await asyncio.sleep(0)
        assert transport.get_write_buffer_size() == 0
        assert recorder.events.count("pause") == recorder.events.count("resume")
        transport.close()
        assert await in_thread(receive_all, peer) == b"x"

    loop.run_until_complete(main())


def test_what_was_written_last_is_sent_before_the_run_ends(loop: headrace.EventLoop) -> None:
    async def main() -> socket.socket:
        transport, peer = await pair(Recorder())
        transport.write(b"the last words")
        weakrefs.append(transport)
        return peer

    weakrefs: list[Any] = []
    peer = loop.run_until_complete(main())
    assert peer.recv(100) == b"the last words"
    weakrefs[0].abort()
    loop.run_until_complete(asyncio.sleep(0))
    peer.close()


def test_writes_after_the_loss_are_dropped_and_said_so(
    loop: headrace.EventLoop, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        recorder = Recorder()
        transport, peer = await pair(recorder)
        reset(peer)
        await recorder.lost
        assert isinstance(recorder.error, ConnectionResetError)
        for _ in range(7):
            transport.write(b"too late")
        assert transport.get_write_buffer_size() == 0

    loop.run_until_complete(main())
    assert "socket.send() raised exception." in caplog.text


# ---- the end -------------------------------------------------------------------------------------------------


def test_close_flushes_then_ends_and_reads_no_more(loop: headrace.EventLoop) -> None:
    data = os.urandom(4 << 20)

    async def main() -> None:
        recorder = Recorder()
        transport, peer = await pair(recorder, receive_buffer=8192)
        transport.write(data)
        transport.close()
        transport.close()
        assert transport.is_closing() is True
        assert not transport.is_reading()
        assert await in_thread(receive_all, peer) == data
        await recorder.lost
        assert recorder.error is None
        assert recorder.events[-1] == "lost"
        assert not recorder.data
        assert "closed" in repr(transport)

    loop.run_until_complete(main())


def test_abort_drops_what_is_queued(loop: headrace.EventLoop) -> None:
    async def main() -> None:
        recorder = Recorder()
        transport, peer = await pair(recorder, receive_buffer=8192)
        transport.write(bytes(32 << 20))
        transport.abort()
        await recorder.lost
        assert recorder.error is None
        try:
            got = len(await in_thread(receive_all, peer))
        except ConnectionResetError:
            got = 0
        assert got < 32 << 20
        assert transport.get_write_buffer_size() == 0

    loop.run_until_complete(main())


@pytest.mark.parametrize("keep_open", [True, False])
def test_half_close(loop: headrace.EventLoop, keep_open: bool) -> None:
    async def main() -> None:
        recorder = Recorder(eof=lambda self: keep_open)
        transport, peer = await pair(recorder)
        peer.sendall(b"request")
        peer.shutdown(socket.SHUT_WR)
        while "eof" not in recorder.events:
            await asyncio.sleep(0.001)
        assert recorder.data == b"request"
        if keep_open:
            assert not transport.is_closing()
            transport.write(b"response")
            transport.write_eof()
        assert await in_thread(receive_all, peer) == (b"response" if keep_open else b"")
        transport.close()
        await recorder.lost
        assert recorder.events[-2:] == ["eof", "lost"]
        assert recorder.error is None

    loop.run_until_complete(main())


def test_a_peer_that_takes_nothing_is_given_up_after_a_while() -> None:
    """30 s of virtual time; the transport is the real one."""

    async def main() -> tuple[Recorder, float]:
        loop = asyncio.get_running_loop()
        stalled = Recorder(made=lambda self: self.transport.pause_reading())
        server = await loop.create_server(lambda: stalled, "stalled", 1)
        recorder = Recorder()
        transport, _ = await loop.create_connection(lambda: recorder, "stalled", 1)
        transport.write(bytes(64 << 20))
        began = loop.time()
        transport.close()
        await recorder.lost
        stalled.transport.abort()
        await stalled.lost
        server.close()
        return recorder, loop.time() - began

    recorder, took = simulated_run(main(), 1, faults=Faults(**dict.fromkeys(Faults.NAMES, 0)))
    assert isinstance(recorder.error, headrace.StalledError)
    assert "took no byte for 30 s" in str(recorder.error)
    assert took >= 30


# ---- reading -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lease", "bytes", "buffered", "buffered-tiny"])
def test_every_kind_of_protocol_gets_every_byte(loop: headrace.EventLoop, kind: str) -> None:
    data = os.urandom(3 << 20)

    async def main() -> None:
        recorder = Recorder()
        protocol = {
            "lease": lambda: recorder,
            "bytes": lambda: plain(recorder),
            "buffered": lambda: buffered(recorder, 65536),
            "buffered-tiny": lambda: buffered(recorder, 1000),
        }[kind]()
        _, peer = await pair(protocol)

        def talk() -> None:
            with peer:
                for offset in range(0, len(data), 90_001):
                    peer.sendall(data[offset : offset + 90_001])

        await in_thread(talk)
        await recorder.lost
        assert hashlib.sha256(recorder.data).digest() == hashlib.sha256(data).digest()

    loop.run_until_complete(main())
    assert loop.stats()["pool"]["outstanding"] == 0


def test_protocols_swapped_in_mid_stream_lose_nothing(loop: headrace.EventLoop) -> None:
    data = os.urandom(2 << 20)

    async def main() -> None:
        everything = bytearray()
        kinds: list[Any] = []
        turn = 0

        def swap(self: Recorder) -> None:
            nonlocal turn
            everything.extend(self.data)
            self.data.clear()
            turn += 1
            self.transport.set_protocol(kinds[turn % len(kinds)])

        recorder = Recorder(data=swap)
        kinds[:] = [recorder, plain(recorder), buffered(recorder, 777)]
        _, peer = await pair(recorder)

        def talk() -> None:
            with peer:
                peer.sendall(data)

        await in_thread(talk)
        await recorder.lost
        assert turn > 3
        assert everything == data

    loop.run_until_complete(main())


def test_nothing_comes_while_paused_and_nothing_is_lost(loop: headrace.EventLoop) -> None:
    data = os.urandom(4 << 20)

    async def main() -> None:
        def pause(self: Recorder) -> None:
            assert self.transport.is_reading(), "a callback came while reading was paused"
            self.transport.pause_reading()
            self.transport.pause_reading()
            loop.call_later(0.001, self.transport.resume_reading)

        recorder = Recorder(data=pause, eof=lambda self: None)
        _, peer = await pair(recorder)

        def talk() -> None:
            with peer:
                peer.sendall(data)

        talking = asyncio.ensure_future(in_thread(talk))
        await recorder.lost
        await talking
        assert recorder.data == data
        assert recorder.events[-2:] == ["eof", "lost"]

    loop.run_until_complete(main())


def test_paused_from_the_start_holds_bytes_and_the_end(loop: headrace.EventLoop) -> None:
    async def main() -> None:
        recorder = Recorder(made=lambda self: self.transport.pause_reading())
        transport, peer = await pair(recorder)
        peer.sendall(b"held")
        peer.close()
        await asyncio.sleep(0.05)
        assert recorder.events == ["made"]
        transport.resume_reading()
        assert recorder.events == ["made"], "resume_reading called back at once"
        await recorder.lost
        assert recorder.events == ["made", "data", "eof", "lost"]
        assert recorder.data == b"held"

    loop.run_until_complete(main())


# ---- exceptions ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("callback", ["data", "eof", "lost", "made"])
def test_an_exception_in_a_callback_ends_that_connection_once(
    loop: headrace.EventLoop, callback: str
) -> None:
    found = reports(loop)

    def fail(self: Recorder, *_: Any) -> None:
        raise ZeroDivisionError(callback)

    async def main() -> None:
        accepted: list[Recorder] = []

        def factory() -> Recorder:
            accepted.append(Recorder(**{callback: fail}))
            return accepted[-1]

        server = await loop.create_server(factory, "127.0.0.1", 0)
        async with server:
            with socket.create_connection(server.sockets[0].getsockname()) as peer:
                peer.sendall(b"x")
                peer.shutdown(socket.SHUT_WR)
                while not accepted:
                    await asyncio.sleep(0.001)
                await accepted[0].lost
                await asyncio.sleep(0)
        assert accepted[0].events.count("lost") == 1
        assert accepted[0].events[-1] == "lost"

    loop.run_until_complete(main())
    assert [type(context["exception"]) for context in found] == [ZeroDivisionError]


def test_an_exception_in_the_factory_closes_the_connection(loop: headrace.EventLoop) -> None:
    found = reports(loop)

    def factory() -> asyncio.Protocol:
        raise ZeroDivisionError("factory")

    async def main() -> None:
        server = await loop.create_server(factory, "127.0.0.1", 0)
        async with server:
            with socket.create_connection(server.sockets[0].getsockname()) as peer:
                peer.settimeout(10)
                assert await in_thread(peer.recv, 1) == b""

    loop.run_until_complete(main())
    assert [str(context["exception"]) for context in found] == ["factory"]


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_leaves_the_loop_and_loses_nothing(
    loop: headrace.EventLoop, kind: type[BaseException]
) -> None:
    data = os.urandom(1 << 20)
    state: dict[str, Any] = {}

    def interrupt(self: Recorder) -> None:
        if len(self.data) > 100_000 and "interrupted" not in state:
            state["interrupted"] = True
            raise kind

    async def main() -> None:
        state["recorder"] = Recorder(data=interrupt)
        _, peer = await pair(state["recorder"])

        def talk() -> None:
            with peer:
                peer.sendall(data)

        state["talking"] = loop.run_in_executor(None, talk)
        await asyncio.shield(state["recorder"].lost)

    task = loop.create_task(main())
    with pytest.raises(kind):
        loop.run_until_complete(task)
    recorder = state["recorder"]
    loop.run_until_complete(asyncio.wait_for(recorder.lost, 20))
    loop.run_until_complete(state["talking"])
    if not task.done():
        loop.run_until_complete(task)
    assert recorder.data == data


# ---- what a transport is -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("host", "family"), [("127.0.0.1", socket.AF_INET), ("::1", socket.AF_INET6)])
def test_extra_info(loop: headrace.EventLoop, host: str, family: int) -> None:
    async def main() -> None:
        accepted: list[Recorder] = []

        def factory() -> Recorder:
            accepted.append(Recorder())
            return accepted[-1]

        server = await loop.create_server(factory, host, 0)
        async with server:
            with socket.socket(family) as peer:
                peer.connect(server.sockets[0].getsockname())
                while not accepted:
                    await asyncio.sleep(0.001)
                transport = accepted[0].transport
                local, remote = peer.getsockname(), peer.getpeername()
                assert transport.get_extra_info("sockname") == remote
                sock = transport.get_extra_info("socket")
                assert (sock.family, sock.getsockname()) == (family, remote)
                assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
                assert transport.get_extra_info("nothing", "default") == "default"
                reset(peer)
                await accepted[0].lost
                # The kernel has forgotten it by now.
                assert transport.get_extra_info("peername") == local

    loop.run_until_complete(main())


def test_is_an_asyncio_transport(loop: headrace.EventLoop) -> None:
    async def main() -> None:
        recorder = Recorder()
        transport, peer = await pair(recorder)
        assert isinstance(transport, asyncio.Transport)
        assert weakref.ref(transport)() is transport
        assert transport.get_protocol() is recorder
        while "reading" not in repr(transport):
            await asyncio.sleep(0)
        transport.pause_reading()
        assert "paused" in repr(transport)
        assert not transport.is_reading()
        with pytest.raises(RuntimeError, match="is used by transport"):
            loop.add_reader(transport.get_extra_info("socket").fileno(), print)
        transport.close()
        await recorder.lost
        assert "closed" in repr(transport)
        peer.close()

    loop.run_until_complete(main())


def test_a_transport_that_nobody_closed_says_so(engine_name: str) -> None:
    loop = headrace.new_event_loop(engine=engine_name)

    async def main() -> socket.socket:
        _, peer = await pair(asyncio.Protocol())
        return peer

    peer = loop.run_until_complete(main())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loop.close()
        del loop
        gc.collect()
    assert any("unclosed transport" in str(warning.message) for warning in caught)
    peer.settimeout(10)
    assert peer.recv(1) == b""
    peer.close()


def test_callbacks_run_in_a_context_of_the_connections_own(loop: headrace.EventLoop) -> None:
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="unset")
    seen: list[tuple[str, str]] = []

    class Remember(headrace.Protocol):
        def connection_made(self, transport: Any) -> None:
            self.transport = transport

        def lease_received(self, lease: headrace.Lease) -> None:
            before = variable.get()
            variable.set(bytes(lease).decode())
            seen.append((before, variable.get()))
            self.transport.write(lease)

    async def main() -> None:
        variable.set("server")
        server = await loop.create_server(Remember, "127.0.0.1", 0)
        async with server:
            for name in ("first", "second"):
                reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
                for _ in range(2):
                    writer.write(name.encode())
                    assert await reader.readexactly(len(name)) == name.encode()
                writer.close()
                await writer.wait_closed()

    loop.run_until_complete(main())
    assert seen == [("server", "first"), ("first", "first"), ("server", "second"), ("second", "second")]


# ---- serving -------------------------------------------------------------------------------------------------


def test_close_of_a_server_frees_the_port_before_it_returns(loop: headrace.EventLoop) -> None:
    async def main() -> None:
        server = await loop.create_server(Recorder, "127.0.0.1", 0)
        address = server.sockets[0].getsockname()
        await asyncio.sleep(0)
        server.close()
        with socket.socket() as again:
            again.bind(address)  # without SO_REUSEADDR
            again.listen()
        await server.wait_closed()

    loop.run_until_complete(main())


def test_accepted_connections_outlive_their_server(loop: headrace.EventLoop) -> None:
    class Echo(headrace.Protocol):
        def connection_made(self, transport: Any) -> None:
            self.transport = transport

        def lease_received(self, lease: headrace.Lease) -> None:
            self.transport.write(lease)

    async def main() -> None:
        server = await loop.create_server(Echo, "127.0.0.1", 0, start_serving=False)
        await server.start_serving()
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        writer.write(b"1")
        assert await reader.readexactly(1) == b"1"
        server.close()
        writer.write(b"2")
        assert await reader.readexactly(1) == b"2"
        writer.close()
        await writer.wait_closed()

    loop.run_until_complete(main())


def test_unix_sockets_are_served_too(loop: headrace.EventLoop, tmp_path: Any) -> None:
    async def main() -> None:
        path = str(tmp_path / "socket")
        accepted: list[Recorder] = []

        def factory() -> Recorder:
            accepted.append(Recorder(data=lambda self: self.transport.write(bytes(self.data))))
            return accepted[-1]

        server = await loop.create_unix_server(factory, path)
        async with server:
            reader, writer = await asyncio.open_unix_connection(path)
            writer.write(b"over a path")
            assert await reader.readexactly(11) == b"over a path"
            assert accepted[0].transport.get_extra_info("sockname") == path
            writer.close()
            await writer.wait_closed()

    loop.run_until_complete(main())
