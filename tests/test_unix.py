"""Unix stream sockets: every kind of address, the socket's file, and that they are streams like any other."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import stat
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import headrace
from certificates import tls_contexts
from streams import KINDS, PATIENCE, Bytes, connected, in_thread, receive_all, send_all


@pytest.fixture
def path() -> Iterator[Path]:
    """A name for a socket, short enough for ``sockaddr_un`` (107 bytes) wherever the tests' folders lie."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / "socket"


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    writer.close()


async def exchange(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, data: bytes) -> None:
    async def send() -> None:
        for start in range(0, len(data), 50_000):
            writer.write(data[start : start + 50_000])
            await writer.drain()
        writer.write_eof()

    sending = asyncio.ensure_future(send())
    assert await reader.read() == data
    await sending
    writer.close()
    await writer.wait_closed()


# ---- addresses -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [str, os.fsencode, Path])
def test_kinds_of_path(loop: headrace.EventLoop, path: Path, kind: Callable[[Path], Any]) -> None:
    async def main() -> None:
        server = await asyncio.start_unix_server(echo, kind(path))
        async with server:
            assert server.sockets[0].getsockname() == str(path)
            reader, writer = await asyncio.open_unix_connection(kind(path))
            assert writer.get_extra_info("peername") == str(path)
            assert writer.get_extra_info("sockname") == ""  # an unnamed client
            assert writer.get_extra_info("socket").family == socket.AF_UNIX
            await exchange(reader, writer, b"hello")

    loop.run_until_complete(main())


@pytest.mark.parametrize("kind", [str, os.fsencode])
def test_abstract_names(loop: headrace.EventLoop, kind: Callable[[str], Any]) -> None:
    """A name that begins with a NUL is no file (unix(7))."""
    name = f"\0headrace-{os.getpid()}-{loop.time()}"

    async def main() -> None:
        server = await asyncio.start_unix_server(echo, kind(name))
        async with server:
            assert server.sockets[0].getsockname() == os.fsencode(name)
            reader, writer = await asyncio.open_unix_connection(kind(name))
            assert writer.get_extra_info("peername") == os.fsencode(name)
            await exchange(reader, writer, b"hello")
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_unix_connection(kind(name))

    loop.run_until_complete(main())
    assert not os.path.exists(name[1:])


def test_what_a_server_knows_of_its_peers(loop: headrace.EventLoop, path: Path) -> None:
    """Unnamed ones are an empty string, bound ones have their path; after the end, both stay known."""

    async def main() -> None:
        served: list[Bytes] = []

        def factory() -> Bytes:
            served.append(Bytes(made=lambda _: made.set()))
            return served[-1]

        server = await loop.create_unix_server(factory, path)
        names = ["", str(path.with_name("client"))]
        for name in names:
            made = asyncio.Event()
            with socket.socket(socket.AF_UNIX) as peer:
                if name:
                    peer.bind(name)
                peer.connect(str(path))
                await made.wait()
                assert served[-1].transport.get_extra_info("peername") == name
                assert served[-1].transport.get_extra_info("sockname") == str(path)
            await served[-1].seen("lost")
            assert served[-1].transport.get_extra_info("peername") == name
        server.close()

    loop.run_until_complete(main())


def test_a_name_that_is_too_long(loop: headrace.EventLoop) -> None:
    async def main() -> None:
        with pytest.raises(OSError, match="path too long"):
            await loop.create_unix_server(asyncio.Protocol, "/tmp/" + "x" * 200)
        with pytest.raises(OSError, match="path too long"):
            await loop.create_unix_connection(asyncio.Protocol, "/tmp/" + "x" * 200)

    loop.run_until_complete(main())


def test_nobody_listens(loop: headrace.EventLoop, path: Path) -> None:
    async def main() -> None:
        with pytest.raises(FileNotFoundError):
            await loop.create_unix_connection(asyncio.Protocol, path)
        with socket.socket(socket.AF_UNIX) as stale:
            stale.bind(str(path))
        with pytest.raises(ConnectionRefusedError):
            await loop.create_unix_connection(asyncio.Protocol, path)

    loop.run_until_complete(main())


# ---- the socket's file -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [0o077, 0o027, 0o000])
def test_the_file_has_the_permissions_of_the_umask(loop: headrace.EventLoop, path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        server = loop.run_until_complete(loop.create_unix_server(asyncio.Protocol, path))
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o777 & ~mask
    server.close()


def test_a_mode_set_between_bind_and_listen(loop: headrace.EventLoop, path: Path) -> None:
    """The race-free way: nobody can connect before ``start_serving``."""

    async def main() -> None:
        server = await asyncio.start_unix_server(echo, path, start_serving=False)
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_unix_connection(path)
        path.chmod(0o660)
        await server.start_serving()
        assert stat.S_IMODE(path.stat().st_mode) == 0o660
        reader, writer = await asyncio.open_unix_connection(path)
        await exchange(reader, writer, b"hello")
        server.close()

    loop.run_until_complete(main())


def test_a_stale_socket_is_replaced_and_any_other_file_is_not(loop: headrace.EventLoop, path: Path) -> None:
    async def main() -> None:
        with socket.socket(socket.AF_UNIX) as stale:
            stale.bind(str(path))
        server = await asyncio.start_unix_server(echo, path)
        async with server:
            reader, writer = await asyncio.open_unix_connection(path)
            await exchange(reader, writer, b"hello")
        path.unlink(missing_ok=True)
        path.write_text("precious")
        with pytest.raises(OSError, match="is already in use") as caught:
            await asyncio.start_unix_server(echo, path)
        assert caught.value.errno == errno.EADDRINUSE
        assert path.read_text() == "precious"

    loop.run_until_complete(main())


# ---- sockets that are passed -----------------------------------------------------------------------------------


def test_a_server_and_a_client_on_sockets_of_their_own(loop: headrace.EventLoop, path: Path) -> None:
    async def main() -> None:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(path))
        server = await asyncio.start_unix_server(echo, sock=listener)
        async with server:
            client = socket.socket(socket.AF_UNIX)
            client.connect(str(path))
            reader, writer = await asyncio.open_unix_connection(sock=client)
            await exchange(reader, writer, b"hello")
            assert client.fileno() == -1  # the transport's, and closed
        assert listener.fileno() == -1

    loop.run_until_complete(main())


def test_a_socketpair(loop: headrace.EventLoop) -> None:
    async def main() -> None:
        near, far = socket.socketpair()
        far.settimeout(PATIENCE)
        transport, protocol = await loop.create_unix_connection(Bytes, sock=near)
        assert transport.get_extra_info("peername") == transport.get_extra_info("sockname") == ""
        transport.write(b"hello")
        assert await in_thread(far.recv, 100) == b"hello"
        far.close()
        await protocol.seen("lost")

    loop.run_until_complete(main())


def test_sockets_of_other_kinds_are_refused(loop: headrace.EventLoop) -> None:
    async def main() -> None:
        for arguments in ((socket.AF_INET, socket.SOCK_STREAM), (socket.AF_UNIX, socket.SOCK_DGRAM)):
            with socket.socket(*arguments) as sock:
                with pytest.raises(ValueError, match="UNIX Domain Stream Socket was expected"):
                    await loop.create_unix_connection(asyncio.Protocol, sock=sock)
                with pytest.raises(ValueError, match="UNIX Domain Stream Socket was expected"):
                    await loop.create_unix_server(asyncio.Protocol, sock=sock)

    loop.run_until_complete(main())


# ---- streams like any other ------------------------------------------------------------------------------------


def test_64_mib_each_way(loop: headrace.EventLoop, path: Path) -> None:
    async def main() -> None:
        server = await asyncio.start_unix_server(echo, path)
        async with server:
            reader, writer = await asyncio.open_unix_connection(path)
            await exchange(reader, writer, os.urandom(1 << 20) * 64)

    loop.run_until_complete(main())


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_protocol_gets_every_byte(loop: headrace.EventLoop, kind: str) -> None:
    data = os.urandom(3_000_001)

    async def main() -> None:
        protocol = KINDS[kind]()
        _, peer = await connected(protocol, socket.AF_UNIX)
        await in_thread(send_all, peer, data, 70_001)
        await protocol.seen("lost")
        assert protocol.data == data

    loop.run_until_complete(main())


def test_half_closing_in_both_directions(loop: headrace.EventLoop) -> None:
    async def main() -> None:
        protocol = Bytes(eof=lambda _: True)
        transport, peer = await connected(protocol, socket.AF_UNIX)
        transport.write(b"last words")
        transport.write_eof()
        assert await in_thread(receive_until_end, peer) == b"last words"
        peer.sendall(b"answer")
        peer.shutdown(socket.SHUT_WR)
        await protocol.seen("eof")
        assert protocol.data == b"answer"
        transport.close()
        await protocol.seen("lost")
        peer.close()

    def receive_until_end(peer: socket.socket) -> bytes:
        got = b""
        while data := peer.recv(100):
            got += data
        return got

    loop.run_until_complete(main())


def test_a_peer_that_reads_nothing_pauses_the_writer(loop: headrace.EventLoop) -> None:
    async def main() -> None:
        protocol = Bytes()
        transport, peer = await connected(protocol, socket.AF_UNIX)
        data = os.urandom(4_000_000)
        transport.write(data)
        await protocol.seen("pause")
        transport.close()
        assert await in_thread(receive_all, peer) == data
        await protocol.seen("lost")
        assert protocol.error is None

    loop.run_until_complete(main())


def test_a_peer_that_is_gone_breaks_the_pipe(loop: headrace.EventLoop) -> None:
    """Unread bytes at the peer's close are a reset, as with TCP (unix(7))."""

    async def main() -> None:
        protocol = Bytes()
        transport, peer = await connected(protocol, socket.AF_UNIX)
        transport.write(b"never read")
        await in_thread(lambda: peer.recv(1, socket.MSG_PEEK))
        peer.close()
        await protocol.seen("lost")
        assert isinstance(protocol.error, ConnectionResetError)

    loop.run_until_complete(main())


def test_200_clients_at_once(loop: headrace.EventLoop, path: Path) -> None:
    async def client(index: int) -> None:
        reader, writer = await asyncio.open_unix_connection(path)
        await exchange(reader, writer, os.urandom(1000 + index))

    async def main() -> None:
        server = await asyncio.start_unix_server(echo, path, backlog=300)
        async with server:
            await asyncio.gather(*(client(index) for index in range(200)))

    loop.run_until_complete(main())


def test_tls(loop: headrace.EventLoop, path: Path) -> None:
    server_context, client_context = tls_contexts(path.parent)

    async def main() -> None:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            data = await reader.readexactly(1 << 20)
            writer.write(data)
            await writer.drain()
            writer.close()

        server = await asyncio.start_unix_server(serve, path, ssl=server_context)
        async with server:
            reader, writer = await asyncio.open_unix_connection(
                path, ssl=client_context, server_hostname="127.0.0.1"
            )
            assert writer.get_extra_info("ssl_object") is not None
            data = os.urandom(1 << 20)
            writer.write(data)
            assert await reader.readexactly(len(data)) == data
            writer.close()
            await writer.wait_closed()
        with pytest.raises(ValueError, match="server_hostname"):
            await loop.create_unix_connection(asyncio.Protocol, path, ssl=client_context)

    loop.run_until_complete(main())


def test_two_threads_each_with_a_loop(engine_name: str, path: Path) -> None:
    ready = threading.Event()
    results: list[bytes] = []

    async def serve() -> None:
        done = asyncio.Event()

        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write((await reader.read())[::-1])
            writer.close()
            await writer.wait_closed()
            done.set()

        server = await asyncio.start_unix_server(handle, path)
        async with server:
            ready.set()
            await done.wait()

    async def ask() -> None:
        reader, writer = await asyncio.open_unix_connection(path)
        writer.write(b"abc")
        writer.write_eof()
        results.append(await reader.read())
        writer.close()

    thread = threading.Thread(target=lambda: headrace.run(serve(), engine=engine_name))
    thread.start()
    assert ready.wait(PATIENCE)
    headrace.run(ask(), engine=engine_name)
    thread.join(PATIENCE)
    assert results == [b"cba"]
