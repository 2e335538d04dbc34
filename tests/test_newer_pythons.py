"""What asyncio has got since Python 3.11, with headrace's transports and turn."""

from __future__ import annotations

import asyncio
import contextvars
import os
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

import headrace
from certificates import tls_contexts
from streams import PATIENCE, Bytes, in_thread, receive_all, sockets


def since(*version: int) -> pytest.MarkDecorator:
    """Skipped on Pythons that don't have it yet: nothing is missing then."""
    text = ".".join(map(str, version))
    return pytest.mark.skipif(sys.version_info < version, reason=f"asyncio has it since Python {text}")


# ---- servers and their clients -----------------------------------------------------------------------------------


class Clients:
    """A server of one of three kinds, and clients of it that wait for the end of the stream."""

    def __init__(self, loop: headrace.EventLoop, kind: str, folder: Path) -> None:
        self.loop = loop
        self.kind = kind
        self.path = folder / "socket"
        self.contexts: Any = (None, None)
        if kind == "tls":
            self.contexts = tls_contexts(folder)
        self.served: list[Bytes] = []
        self.peers: list[Bytes] = []

    async def serve(self) -> asyncio.Server:
        def factory() -> Bytes:
            self.served.append(Bytes())
            return self.served[-1]

        if self.kind == "unix":
            return await self.loop.create_unix_server(factory, self.path)
        return await self.loop.create_server(factory, "127.0.0.1", 0, ssl=self.contexts[0])

    async def connect(self, server: asyncio.Server) -> None:
        if self.kind == "unix":
            _, peer = await self.loop.create_unix_connection(Bytes, os.fspath(self.path))
        else:
            address = server.sockets[0].getsockname()
            _, peer = await self.loop.create_connection(Bytes, *address, ssl=self.contexts[1])
        self.peers.append(peer)
        while len(self.served) < len(self.peers):
            await asyncio.sleep(0)
        await self.served[-1].seen("made")


@pytest.fixture(params=["tcp", "unix", "tls"])
def clients(loop: headrace.EventLoop, request: pytest.FixtureRequest, tmp_path: Path) -> Clients:
    return Clients(loop, request.param, tmp_path)


@since(3, 13)
def test_close_clients_sends_what_is_queued(clients: Clients) -> None:
    async def main() -> None:
        server: Any = await clients.serve()
        for _ in range(3):
            await clients.connect(server)
        data = os.urandom(500_000)
        if clients.kind == "tls":
            data = b""  # close_clients closes what is under TLS: what TLS has queued is dropped, with asyncio, too
        for served in clients.served:
            served.transport.write(data)
        server.close()
        server.close_clients()
        await server.wait_closed()
        for peer in clients.peers:
            await peer.seen("lost")
            assert bytes(peer.data) == data
        assert all(served.events[-1] == "lost" for served in clients.served)

    clients.loop.run_until_complete(main())


@since(3, 13)
def test_abort_clients_drops_what_is_queued(clients: Clients) -> None:
    async def main() -> None:
        server: Any = await clients.serve()
        for _ in range(3):
            await clients.connect(server)
        for peer in clients.peers:
            peer.transport.pause_reading()
        for served in clients.served:
            served.transport.write(bytes(10_000_000))
        server.close()
        server.abort_clients()
        await server.wait_closed()
        for peer, served in zip(clients.peers, clients.served, strict=True):
            assert served.events[-1] == "lost"
            peer.transport.abort()
            await peer.seen("lost")
            assert len(peer.data) < 10_000_000

    clients.loop.run_until_complete(main())


@since(3, 12)
def test_wait_closed_waits_for_the_last_client(clients: Clients) -> None:
    async def main() -> None:
        server = await clients.serve()
        await clients.connect(server)
        await clients.connect(server)
        server.close()
        waiting = asyncio.ensure_future(server.wait_closed())
        clients.served[0].transport.abort()
        await clients.served[0].seen("lost")
        for _ in range(5):
            await asyncio.sleep(0)
        assert not waiting.done()
        clients.served[1].transport.abort()
        await waiting
        assert clients.served[1].events[-1] == "lost"
        for peer in clients.peers:
            peer.transport.abort()
            await peer.seen("lost")

    clients.loop.run_until_complete(main())


@since(3, 13)
def test_a_client_that_has_left_is_forgotten(clients: Clients) -> None:
    async def main() -> None:
        server: Any = await clients.serve()
        await clients.connect(server)
        clients.peers[0].transport.close()
        await clients.served[0].seen("lost")
        await asyncio.sleep(0)
        server.close_clients()
        server.abort_clients()
        server.close()
        await server.wait_closed()

    clients.loop.run_until_complete(main())


@since(3, 13)
@pytest.mark.parametrize("cleanup", [True, False])
def test_the_socket_s_file_is_removed_with_the_server(
    loop: headrace.EventLoop, tmp_path: Path, cleanup: bool
) -> None:
    async def main() -> None:
        path = tmp_path / "socket"
        options: Any = {} if cleanup else {"cleanup_socket": False}
        server = await loop.create_unix_server(asyncio.Protocol, path, **options)
        assert path.is_socket()
        server.close()
        assert path.exists() is not cleanup
        # One that another server has put in its place isn't touched.
        path.unlink(missing_ok=True)
        first = await loop.create_unix_server(asyncio.Protocol, path)
        second = await loop.create_unix_server(asyncio.Protocol, path)
        first.close()
        assert path.is_socket()
        second.close()
        assert not path.exists()

    loop.run_until_complete(main())


# ---- tasks -----------------------------------------------------------------------------------------------------


def test_tasks_have_names_and_contexts(loop: headrace.EventLoop) -> None:
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable")

    async def read() -> str:
        return variable.get()

    async def main() -> None:
        context = contextvars.copy_context()
        context.run(variable.set, "mine")
        task = loop.create_task(read(), name="a name", context=context)
        assert task.get_name() == "a name"
        assert await task == "mine"

    loop.run_until_complete(main())


@since(3, 13, 3)
def test_a_task_that_starts_eagerly(loop: headrace.EventLoop) -> None:
    async def main() -> None:
        create: Any = loop.create_task
        assert create(asyncio.sleep(0), eager_start=False).done() is False
        assert create(no_wait(), eager_start=True).done()

    async def no_wait() -> None:
        pass

    loop.run_until_complete(main())


@since(3, 12)
@pytest.mark.parametrize("debug", [False, True])
def test_eager_tasks(loop: headrace.EventLoop, debug: bool) -> None:
    """A task that needn't wait never enters the ready queue; one that waits goes on in the loop's turn."""

    async def no_wait() -> str:
        order.append("body")
        return "result"

    async def reads() -> bytes:
        order.append("before")
        received = await reader.read(100)
        order.append("after")
        return received

    async def main() -> None:
        nonlocal reader
        loop.set_task_factory(asyncio.eager_task_factory)
        task = asyncio.create_task(no_wait(), name="eager")
        assert task.done()
        assert order == ["body"]
        assert task.get_name() == "eager"
        near, peer = sockets()
        with peer:
            reader, writer = await asyncio.open_connection(sock=near)
            reading = asyncio.create_task(reads())
            assert order == ["body", "before"]
            peer.sendall(b"x")
            assert await reading == b"x"
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(no_wait()) for _ in range(10)]
                assert all(task.done() for task in tasks)
            writer.close()
            await writer.wait_closed()

    reader: Any = None
    order: list[str] = []
    loop.set_debug(debug)
    loop.run_until_complete(main())
    assert order[:3] == ["body", "before", "after"]


@since(3, 12)
def test_an_eager_server(loop: headrace.EventLoop) -> None:
    """Handlers of ``start_server`` begin within ``connection_made`` then."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"hello ")
        writer.write(await reader.readline())
        writer.close()
        await writer.wait_closed()

    def ask(address: Any) -> bytes:
        peer = socket.create_connection(address, PATIENCE)
        assert peer.recv(6) == b"hello "  # before a byte is sent
        peer.sendall(b"world\n")
        return receive_all(peer)

    async def main() -> None:
        loop.set_task_factory(asyncio.eager_task_factory)
        server = await asyncio.start_server(handle, "127.0.0.1", 0)
        async with server:
            address = server.sockets[0].getsockname()
            asked = [in_thread(ask, address) for _ in range(5)]
            assert await asyncio.gather(*asked) == [b"world\n"] * 5

    loop.run_until_complete(main())


def test_the_loop_adds_no_way_of_its_own_to_make_tasks() -> None:
    """So the parameters are those of the interpreter, whichever it is."""
    assert headrace.EventLoop.create_task is asyncio.BaseEventLoop.create_task
    assert headrace.EventLoop.set_task_factory is asyncio.BaseEventLoop.set_task_factory
