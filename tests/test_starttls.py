"""STARTTLS: what the peer sent right behind the line that asks for TLS reaches the TLS layer, wherever it lies."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable
from typing import Any

import pytest

import headrace
from certificates import tls_contexts
from streams import PATIENCE, connected, in_thread, sockets

LINE = b"STARTTLS\r\n"
SECRET = b"through TLS " * 20_000  # more than one record, one receive, and a StreamReader's limit

Contexts = tuple[ssl.SSLContext, ssl.SSLContext]
Sender = Callable[[socket.socket, bytes], None]


@pytest.fixture(scope="module")
def contexts(tmp_path_factory: pytest.TempPathFactory) -> Contexts:
    """(the server's, the client's)"""
    return tls_contexts(tmp_path_factory.mktemp("tls"))


def in_one_segment(peer: socket.socket, data: bytes) -> None:
    peer.sendall(data)


def byte_by_byte(peer: socket.socket, data: bytes) -> None:
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for byte in data:
        peer.sendall(bytes([byte]))


SENDERS = [in_one_segment, byte_by_byte]


class BlockingClient:
    """TLS over a blocking socket, whose ClientHello goes out together with what comes before it."""

    def __init__(self, peer: socket.socket, context: ssl.SSLContext) -> None:
        self.peer = peer
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self.incoming, self.outgoing, server_hostname="127.0.0.1")

    def hello(self) -> bytes:
        with pytest.raises(ssl.SSLWantReadError):
            self.tls.do_handshake()
        return self.outgoing.read()

    def until_done(self, step: Callable[..., Any], *args: Any) -> Any:
        """Repeats a TLS call until it needs nothing more from the peer."""
        while True:
            try:
                result = step(*args)
            except ssl.SSLWantReadError:
                result = None
            self.peer.sendall(self.outgoing.read())
            if result is not None or (step == self.tls.do_handshake and self.tls.version()):
                return result
            data = self.peer.recv(65536)
            assert data, "the server closed the connection"
            self.incoming.write(data)

    def exchange(self, first: Sender, before: bytes = LINE) -> bytes:
        """The line and the ClientHello, the handshake, the secret, and its echo."""
        with self.peer:
            first(self.peer, before + self.hello())
            self.until_done(self.tls.do_handshake)
            for start in range(0, len(SECRET), 16_000):
                self.until_done(self.tls.write, SECRET[start : start + 16_000])
            echo = bytearray()
            while len(echo) < len(SECRET):
                echo += self.until_done(self.tls.read, 65536)
            return bytes(echo)


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    secret = await reader.readexactly(len(SECRET))
    writer.write(secret)
    await writer.drain()


async def fill(reader: asyncio.StreamReader, size: int) -> None:
    """Returns when so many bytes lie in the reader, unread."""
    while len(reader._buffer) < size:
        await reader._wait_for_data("fill")


# ---- servers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unread", [0, 1, 200], ids="with {} bytes in the reader".format)
@pytest.mark.parametrize("send", SENDERS)
def test_a_server_s_stream(loop: headrace.EventLoop, contexts: Contexts, send: Sender, unread: int) -> None:
    """The line is read by itself, by when any part of the ClientHello may be in the reader."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            assert await reader.readline() == LINE
            await fill(reader, unread)
            await writer.start_tls(contexts[0])
            assert reader._transport is writer.transport
            await echo(reader, writer)
        finally:
            writer.close()
            served.set()

    async def main() -> None:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        async with server:
            peer = await in_thread(socket.create_connection, server.sockets[0].getsockname(), PATIENCE)
            assert await in_thread(BlockingClient(peer, contexts[1]).exchange, send) == SECRET
            await served.wait()

    served = asyncio.Event()
    loop.run_until_complete(main())


@pytest.mark.parametrize("send", SENDERS)
def test_a_reader_that_had_paused_its_transport(
    loop: headrace.EventLoop, contexts: Contexts, send: Sender
) -> None:
    """A ClientHello beyond the reader's limit: part is in the reader, part in the transport, which is paused."""

    async def main() -> None:
        near, peer = sockets()
        reader = asyncio.StreamReader(limit=20)
        protocol = asyncio.StreamReaderProtocol(reader)
        transport, _ = await loop.connect_accepted_socket(lambda: protocol, near)
        client = in_thread(BlockingClient(peer, contexts[1]).exchange, send)
        exchange = asyncio.ensure_future(client)
        assert await reader.readexactly(len(LINE)) == LINE
        await fill(reader, 41)
        assert not transport.is_reading()
        new = await loop.start_tls(transport, protocol, contexts[0], server_side=True)
        writer = asyncio.StreamWriter(new, protocol, reader, loop)
        secret = await reader.readexactly(len(SECRET))
        writer.write(secret)
        assert await exchange == SECRET
        writer.close()

    loop.run_until_complete(main())


class Line(asyncio.BufferedProtocol):
    """Takes the line and not one byte more and pauses. What comes after that has come through TLS."""

    def __init__(self) -> None:
        self.buffer = bytearray(len(LINE))
        self.line = b""
        self.secret = bytearray()
        self.asked, self.complete, self.lost = asyncio.Event(), asyncio.Event(), asyncio.Event()

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def get_buffer(self, sizehint: int) -> memoryview:
        missing = len(LINE) - len(self.line)
        return memoryview(self.buffer)[: missing or None]

    def buffer_updated(self, size: int) -> None:
        if self.asked.is_set():
            self.secret += self.buffer[:size]
            if len(self.secret) == len(SECRET):
                self.complete.set()
            return
        self.line += self.buffer[:size]
        if len(self.line) == len(LINE):
            self.transport.pause_reading()
            self.asked.set()

    def connection_lost(self, exc: BaseException | None) -> None:
        self.lost.set()


@pytest.mark.parametrize("send", SENDERS)
def test_what_the_transport_holds(loop: headrace.EventLoop, contexts: Contexts, send: Sender) -> None:
    async def main() -> None:
        protocol = Line()
        transport, peer = await connected(protocol)
        exchange = asyncio.ensure_future(in_thread(BlockingClient(peer, contexts[1]).exchange, send))
        await protocol.asked.wait()
        assert protocol.line == LINE
        upgraded = await loop.start_tls(transport, protocol, contexts[0], server_side=True)
        await protocol.complete.wait()
        upgraded.write(protocol.secret)
        assert await exchange == SECRET
        await protocol.lost.wait()

    loop.run_until_complete(main())


# ---- clients ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("send", SENDERS)
def test_who_connected_may_be_tls_s_server(
    loop: headrace.EventLoop, contexts: Contexts, send: Sender
) -> None:
    async def main() -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            reader, writer = await asyncio.open_connection(*listener.getsockname())
            peer, _ = listener.accept()
        exchange = asyncio.ensure_future(in_thread(BlockingClient(peer, contexts[1]).exchange, send))
        assert await reader.readline() == LINE
        await fill(reader, 100)
        protocol: Any = writer.transport.get_protocol()
        transport = await loop.start_tls(writer.transport, protocol, contexts[0], server_side=True)
        tls = asyncio.StreamWriter(transport, protocol, reader, loop)
        await echo(reader, tls)
        assert await exchange == SECRET
        tls.close()

    loop.run_until_complete(main())


@pytest.mark.parametrize("side", ["client", "server"])
def test_plain_text_slipped_in_fails_the_handshake(
    loop: headrace.EventLoop, contexts: Contexts, side: str
) -> None:
    """It must not be read later as if it had come through TLS."""

    async def upgrade(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert await reader.readline() == LINE
        await fill(reader, 10)
        with pytest.raises(ssl.SSLError):
            await writer.start_tls(
                contexts[side == "client"], server_hostname="127.0.0.1" if side == "client" else None
            )
        with pytest.raises(ssl.SSLError):
            await reader.read()
        assert not reader._buffer

    async def main() -> None:
        if side == "server":
            upgraded = loop.create_future()

            async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                try:
                    upgraded.set_result(await upgrade(reader, writer))
                except BaseException as error:
                    upgraded.set_exception(error)

            server = await asyncio.start_server(serve, "127.0.0.1", 0)
            async with server:
                with socket.create_connection(server.sockets[0].getsockname(), PATIENCE) as peer:
                    peer.sendall(LINE + b"RCPT TO:<victim>\r\n")
                    await upgraded
            return
        with socket.create_server(("127.0.0.1", 0)) as listener:
            reader, writer = await asyncio.open_connection(*listener.getsockname())
            peer, _ = listener.accept()
        with peer:
            peer.sendall(LINE + b"250 you are logged in\r\n")
            await upgrade(reader, writer)

    loop.run_until_complete(main())


# ---- the end, and what is refused ------------------------------------------------------------------------------


def test_a_peer_that_has_left_behind_the_line(loop: headrace.EventLoop, contexts: Contexts) -> None:
    """The handshake fails at once, not after its timeout of a minute."""

    async def main() -> None:
        near, peer = sockets()
        reader = asyncio.StreamReader()
        protocol = asyncio.StreamReaderProtocol(reader)
        transport, _ = await loop.connect_accepted_socket(lambda: protocol, near)
        with peer:
            hello = BlockingClient(peer, contexts[1]).hello()
            peer.sendall(hello)
            peer.shutdown(socket.SHUT_WR)
            while not reader._eof:
                await reader._wait_for_data("test")
            with pytest.raises(ConnectionResetError):
                await loop.start_tls(transport, protocol, contexts[0], server_side=True)
            assert transport.is_closing()

    loop.run_until_complete(main())


def test_what_is_refused_leaves_the_connection_as_it_was(
    loop: headrace.EventLoop, contexts: Contexts
) -> None:
    async def main() -> None:
        near, peer = sockets()
        reader = asyncio.StreamReader()
        protocol = asyncio.StreamReaderProtocol(reader)
        transport, _ = await loop.connect_accepted_socket(lambda: protocol, near)
        with peer:
            peer.sendall(b"line\nnext\n")
            assert await reader.readline() == b"line\n"
            with pytest.raises(TypeError, match="SSLContext"):
                await loop.start_tls(transport, protocol, None)  # type: ignore[arg-type]
            with pytest.raises(ValueError, match="ssl_handshake_timeout"):
                await loop.start_tls(transport, protocol, contexts[0], ssl_handshake_timeout=0)
            with pytest.raises(TypeError, match="not supported"):
                await loop.start_tls(object(), protocol, contexts[0])  # type: ignore[arg-type]
            assert await reader.readline() == b"next\n"
            transport.close()
            with pytest.raises(ConnectionResetError, match="closing"):
                await loop.start_tls(transport, protocol, contexts[0])

    loop.run_until_complete(main())


def test_a_cancelled_handshake_closes_the_transport(loop: headrace.EventLoop, contexts: Contexts) -> None:
    async def main() -> None:
        protocol = Line()
        transport, peer = await connected(protocol)
        with peer:
            upgrade = asyncio.ensure_future(
                loop.start_tls(transport, protocol, contexts[0], server_side=True)
            )
            await asyncio.sleep(0)
            upgrade.cancel()
            with pytest.raises(asyncio.CancelledError):
                await upgrade
            assert transport.is_closing()
            assert await in_thread(peer.recv, 1) == b""

    loop.run_until_complete(main())


def test_tls_within_tls(loop: headrace.EventLoop, contexts: Contexts) -> None:
    """What the reader has taken through the outer TLS goes to the inner one."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert await reader.readline() == LINE
        await fill(reader, 100)
        await writer.start_tls(contexts[0])
        writer.write(await reader.readexactly(6))
        await writer.drain()
        writer.close()
        served.set()

    async def main() -> None:
        server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=contexts[0])
        async with server:
            address = server.sockets[0].getsockname()
            reader, writer = await asyncio.open_connection(*address, ssl=contexts[1])
            client: Any = BlockingClient(socket.socket(), contexts[1])
            client.peer.close()
            writer.write(LINE + client.hello())
            while True:
                try:
                    client.tls.do_handshake()
                    break
                except ssl.SSLWantReadError:
                    writer.write(client.outgoing.read())
                    client.incoming.write(await reader.read(65536))
            client.tls.write(b"secret")
            writer.write(client.outgoing.read())
            await served.wait()
            while True:
                try:
                    assert client.tls.read(100) == b"secret"
                    break
                except ssl.SSLWantReadError:
                    client.incoming.write(await reader.read(65536))
            writer.close()

    served = asyncio.Event()
    loop.run_until_complete(main())
