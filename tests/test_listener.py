"""Accepting: servers that close in the middle of it, descriptors that run out, listening sockets that break."""

from __future__ import annotations

import asyncio
import fcntl
import gc
import os
import resource
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

import headrace
from streams import KINDS, Leases, in_thread, receive_all, reports


@contextmanager
def no_descriptor_left() -> Iterator[None]:
    """Within it this process can't open one more descriptor."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def connections(server: asyncio.Server) -> int:
    """How many the server counts as its own."""
    clients = getattr(server, "_clients", None)
    return len(clients) if clients is not None else server._active_count  # type: ignore[attr-defined, no-any-return]


def ended(peer: socket.socket) -> bool:
    """Whether the other side has closed, or reset, the connection."""
    try:
        return receive_all(peer) == b""
    except ConnectionResetError:
        return True


# ---- what is accepted ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_burst_of_connections_is_served_and_counted(loop: headrace.EventLoop, kind: str) -> None:
    async def main() -> None:
        made: list[Any] = []

        def factory() -> Any:
            made.append(KINDS[kind](received=lambda self: self.transport.write(bytes(self.data))))
            return made[-1]

        server = await loop.create_server(factory, "127.0.0.1", 0, backlog=300)
        async with server:
            address = server.sockets[0].getsockname()
            peers = [socket.create_connection(address, 20) for _ in range(200)]
            for number, peer in enumerate(peers):
                peer.sendall(b"%03d" % number)
            for number, peer in enumerate(peers):
                assert await in_thread(peer.recv, 3) == b"%03d" % number
            assert connections(server) == len(made) == 200
            for peer in peers:
                peer.close()
            for protocol in made:
                await protocol.seen("lost")
            await asyncio.sleep(0)
            assert connections(server) == 0

    loop.run_until_complete(main())


def test_accepted_sockets_do_not_block_and_are_not_inherited(loop: headrace.EventLoop) -> None:
    async def main() -> None:
        protocol = Leases()
        server = await loop.create_server(lambda: protocol, "127.0.0.1", 0)
        async with server:
            with socket.create_connection(server.sockets[0].getsockname()):
                await protocol.seen("made")
                sock = protocol.transport.get_extra_info("socket")
                assert sock.gettimeout() == 0
                assert sock.type == socket.SOCK_STREAM
                assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
                descriptor = sock.fileno()
                assert not os.get_inheritable(descriptor)
                assert fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_NONBLOCK
            await protocol.seen("lost")

    loop.run_until_complete(main())


def test_a_socket_that_was_bound_elsewhere(loop: headrace.EventLoop) -> None:
    async def main() -> None:
        protocol = Leases()
        sock = socket.create_server(("127.0.0.1", 0))  # blocking, as it comes
        address = sock.getsockname()
        server = await loop.create_server(lambda: protocol, sock=sock)
        async with server:
            with socket.create_connection(address) as peer:
                peer.sendall(b"x")
                await protocol.seen("received")
            await protocol.seen("lost")
        assert sock.fileno() == -1

    loop.run_until_complete(main())


# ---- the end of a server -------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["connection_made", "call_soon"])
def test_closing_with_connections_in_the_batch(loop: headrace.EventLoop, where: str) -> None:
    """Every connection is either served or closed, and none keeps its descriptor."""

    async def main() -> None:
        made: list[Leases] = []

        def close(protocol: Any) -> None:
            if where == "connection_made":
                server.close()
            else:
                loop.call_soon(server.close)

        def factory() -> Leases:
            made.append(Leases(made=close))
            return made[-1]

        sock = socket.create_server(("127.0.0.1", 0), backlog=64)
        address = sock.getsockname()
        peers = [socket.create_connection(address, 20) for _ in range(20)]
        server = await loop.create_server(factory, sock=sock, start_serving=False)
        await server.start_serving()
        while server.is_serving():
            await asyncio.sleep(0)
        with socket.socket() as late, pytest.raises(ConnectionRefusedError):
            late.connect(address)
        for protocol in made:
            protocol.transport.close()
        for peer in peers:
            assert await in_thread(ended, peer)
        for protocol in made:
            await protocol.seen("lost")

    loop.run_until_complete(main())


def test_a_server_closed_after_its_loop(engine_name: str) -> None:
    loop = headrace.new_event_loop(engine=engine_name)
    server = loop.run_until_complete(loop.create_server(asyncio.Protocol, "127.0.0.1", 0))
    address = server.sockets[0].getsockname()
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    server.close()
    with socket.socket() as again:
        again.bind(address)


def test_a_server_whose_socket_was_closed_by_its_owner_still_frees_the_port(loop: headrace.EventLoop) -> None:
    async def main() -> None:
        sock = socket.create_server(("127.0.0.1", 0))
        address = sock.getsockname()
        server = await loop.create_server(asyncio.Protocol, sock=sock)
        await asyncio.sleep(0)
        sock.close()
        server.close()
        with socket.socket() as again:
            again.bind(address)

    loop.run_until_complete(main())


def test_a_forgotten_connection_leaves_its_server(loop: headrace.EventLoop) -> None:
    """Paused, nobody's and collected: nothing is in flight that would keep it."""

    async def main() -> None:
        made = asyncio.Event()

        def forget() -> asyncio.Protocol:
            return Forgetful()

        class Forgetful(asyncio.Protocol):
            def connection_made(self, transport: Any) -> None:
                self.transport = transport  # a cycle
                transport.pause_reading()
                made.set()

        server = await loop.create_server(forget, "127.0.0.1", 0)
        with socket.create_connection(server.sockets[0].getsockname(), 20) as peer:
            await made.wait()
            assert connections(server) == 1
            with pytest.warns(ResourceWarning, match="unclosed transport"):
                gc.collect()
            assert connections(server) == 0
            assert await in_thread(peer.recv, 1) == b""
        server.close()
        await server.wait_closed()

    loop.run_until_complete(main())


# ---- trouble -------------------------------------------------------------------------------------------------


async def short_of_descriptors(
    loop: headrace.EventLoop, protocol: Leases
) -> tuple[asyncio.Server, socket.socket]:
    """A server with a connection in its backlog. Called without a descriptor left, it can't accept."""
    sock = socket.create_server(("127.0.0.1", 0))
    peer = socket.create_connection(sock.getsockname(), 20)
    server = await loop.create_server(lambda: protocol, sock=sock, start_serving=False)
    return server, peer


def test_out_of_descriptors_the_connection_waits_in_the_backlog(loop: headrace.EventLoop) -> None:
    async def main() -> None:
        reported = asyncio.Event()
        found: list[dict[str, Any]] = []

        def report(_: object, context: dict[str, Any]) -> None:
            found.append(context)
            reported.set()

        loop.set_exception_handler(report)
        protocol = Leases()
        server, peer = await short_of_descriptors(loop, protocol)
        with no_descriptor_left():
            await server.start_serving()
            await reported.wait()
            turns = loop.turns
            await asyncio.sleep(0.5)
            assert loop.turns - turns < 20  # it waits, it doesn't spin
            assert "made" not in protocol.events
        await protocol.seen("made")
        peer.close()
        await protocol.seen("lost")
        server.close()
        assert len(found) == 1  # not at each attempt
        assert found[0]["message"].startswith(
            "accept() is out of system resources, retrying: Too many open files"
        )
        assert isinstance(found[0]["exception"], OSError)

    loop.run_until_complete(main())


def test_closing_a_server_that_is_short_of_descriptors(loop: headrace.EventLoop) -> None:
    async def main() -> None:
        found = reports(loop)
        server, peer = await short_of_descriptors(loop, Leases())
        with no_descriptor_left():
            await server.start_serving()
            while not found:
                await asyncio.sleep(0)
            server.close()
        assert await in_thread(ended, peer)
        await asyncio.sleep(0.15)  # beyond the time of the retry

    loop.run_until_complete(main())


def test_an_interrupt_while_a_shortage_is_reported(loop: headrace.EventLoop) -> None:
    protocol = Leases()
    server, peer = loop.run_until_complete(short_of_descriptors(loop, protocol))

    def interrupt(_: object, context: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    loop.set_exception_handler(interrupt)
    with no_descriptor_left(), pytest.raises(KeyboardInterrupt):
        loop.run_until_complete(server.serve_forever())
    loop.set_exception_handler(None)

    async def main() -> None:
        await server.start_serving()
        await protocol.seen("made")
        peer.close()
        await protocol.seen("lost")
        server.close()

    loop.run_until_complete(main())


def test_a_listening_socket_that_somebody_shut_down_is_tried_again_and_again(
    loop: headrace.EventLoop,
) -> None:
    """A process that shares it may do that; accept says EINVAL then, each time and at once."""

    async def main() -> None:
        found = reports(loop)
        protocol = Leases()
        server = await loop.create_server(lambda: protocol, "127.0.0.1", 0)
        with server.sockets[0].dup() as shared:
            await asyncio.sleep(0)
            shared.shutdown(socket.SHUT_RD)
            while not found:
                await asyncio.sleep(0.001)
            turns = loop.turns
            await asyncio.sleep(0.3)
            assert loop.turns - turns < 20
            assert [context["message"] for context in found] == ["accept() fails, retrying: Invalid argument"]
            shared.listen()
            with socket.create_connection(shared.getsockname(), 20):
                await protocol.seen("made")
            await protocol.seen("lost")
        server.close()

    loop.run_until_complete(main())
